// rows_linear of every instruction set against double, for odd sizes, every type, and rows that end with their memory.
#include <cmath>

#include "check.h"
#include "cpu/numbers.h"
#include "cpu/rows_linear.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

void any_rows(const std::string& isa, Dtype dtype, int64_t m, int64_t n, int64_t k) {
  context = isa + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k);
  Random random(static_cast<uint64_t>(97 * k + n));
  const int64_t stride = k + 3;
  std::vector<int8_t> codes(n * k);
  std::vector<float> scale(n), x(m * stride - 3), exact(x.size());
  std::vector<uint16_t> half(x.size());
  for (auto& code : codes) code = static_cast<int8_t>(random.word());
  for (auto& value : scale) value = random.normal();
  for (size_t i = 0; i < x.size(); ++i) {
    exact[i] = x[i] = random.normal();
    if (dtype == Dtype::kFloat32) continue;
    half[i] = dtype == Dtype::kFloat16 ? float_to_half(x[i]) : float_to_bfloat16(x[i]);
    exact[i] = dtype == Dtype::kFloat16 ? half_to_float(half[i]) : bfloat16_to_float(half[i]);
  }
  const void* data = dtype == Dtype::kFloat32 ? static_cast<const void*>(x.data()) : half.data();
  Guarded<float> wide(dtype == Dtype::kFloat32 ? m * n : 0);
  Guarded<uint16_t> narrow(dtype == Dtype::kFloat32 ? 0 : m * n);
  RowsLinear problem{{data, dtype}, m, k, stride};
  problem.codes = codes.data();
  problem.scale = scale.data();
  problem.n = n;
  problem.y = {dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data(), dtype, n};
  rows_linear(problem, isa, serial);
  const double ulp = dtype == Dtype::kFloat32 ? 0x1p-23 : dtype == Dtype::kFloat16 ? 0x1p-10 : 0x1p-7;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t v = 0; v < n; ++v) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = double{scale[v]} * codes[v * k + i] * exact[t * stride + i];
        sum += term;
        magnitude += std::fabs(term);
      }
      const float y = dtype == Dtype::kFloat32   ? wide[t * n + v]
                      : dtype == Dtype::kFloat16 ? half_to_float(narrow[t * n + v])
                                                 : bfloat16_to_float(narrow[t * n + v]);
      CHECK(std::fabs(y - sum) <= ulp * std::fabs(sum) + static_cast<double>(k) * 0x1p-24 * magnitude + 0x1p-24);
    }
  }
}

}  // namespace

int main() {
  for (const std::string& isa : supported_isas()) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const int64_t k : {1, 7, 15, 16, 17, 31, 32, 33, 64, 100}) {
        for (const int64_t m : {1, 2, 3, 4, 5, 9}) any_rows(isa, dtype, m, 6, k);
      }
    }
  }
  return report();
}
