// The bit layout in golden words written by hand, and pack_signs of every table in every type.
#include <limits>

#include "check.h"
#include "cpu/run.h"
#include "packing.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

void golden_words() {
  const uint32_t row[2] = {0x00000005, 0x80000001};  // columns 0, 2, 32 and 63 are -1
  for (int64_t k = 0; k < 64; ++k) CHECK(is_negative(row, k) == (k == 0 || k == 2 || k == 32 || k == 63));
  CHECK(last_word_mask(1) == 1 && last_word_mask(32) == 0xffffffff && last_word_mask(33) == 1);
}

void golden_packing(const Kernels& kernels) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // -1 at column 0 and 4; zeros of either sign and NaN are +1; column 33 is bit 1 of the second word
  std::vector<float> x(35, 1.0f);
  x[0] = -1;
  x[1] = 0.0f;
  x[2] = -0.0f;
  x[3] = nan;
  x[4] = -1e-40f;
  x[31] = -std::numeric_limits<float>::infinity();
  x[33] = -2;
  Guarded<uint32_t> words(2);
  pack_signs(kernels, {{x.data(), Dtype::kFloat32}, 35, 35, words.data()}, 1, serial);
  CHECK(words[0] == 0x80000011 && words[1] == 0x00000002);
}

// Every type and length, rows apart, against the definition.
void any_packing(const Kernels& kernels, Dtype dtype, int64_t k) {
  Random random(static_cast<uint64_t>(k));
  const int64_t rows = 3, stride = k + 5, words_in_row = words_per_row(k);
  std::vector<uint16_t> half(rows * stride - 5);
  std::vector<float> full(rows * stride - 5), exact(rows * stride - 5);
  for (size_t i = 0; i < full.size(); ++i) {
    exact[i] = full[i] = random.word() % 7 == 0 ? 0.0f : random.normal();
    half[i] = dtype == Dtype::kFloat16 ? float_to_half(full[i]) : float_to_bfloat16(full[i]);
  }
  const void* data = dtype == Dtype::kFloat32 ? static_cast<const void*>(full.data()) : half.data();
  Guarded<uint32_t> words(rows * words_in_row);
  pack_signs(kernels, {{data, dtype}, k, stride, words.data()}, rows, serial);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < words_in_row * kWordBits; ++i) {
      CHECK(is_negative(words.data() + r * words_in_row, i) == (i < k && exact[r * stride + i] < 0));
    }
  }
}

}  // namespace

int main() {
  golden_words();
  for (const std::string& isa : supported_isas()) {
    golden_packing(kernels_named(isa));
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const int64_t k : {1, 7, 8, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1111}) {
        context = isa + " k=" + std::to_string(k) + " dtype=" + std::to_string(static_cast<int>(dtype));
        any_packing(kernels_named(isa), dtype, k);
      }
    }
  }
  return report();
}
