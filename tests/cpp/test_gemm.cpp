// sign_gemm, pack_activations and popcount_gemm of every table against plain double loops written from the formula.
// Inputs are allocated to the byte, so that the address sanitizer sees any read past them; outputs are guarded.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "cpu/run.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

struct Shape {
  int64_t m, n, k;
};

struct Layout {
  const char* name;
  int64_t planes, group_size;
  bool scale, in_scale, in_shift, group_shift, bias;
  std::optional<double> norm_eps;
};

constexpr Layout kLayouts[] = {
    {"plain", 1, 0, false, false, false, false, false, {}},    {"row", 1, 0, true, false, false, false, true, {}},
    {"fbi", 1, 0, false, true, true, false, false, {}},        {"onebit", 1, 0, true, true, false, false, true, 1e-5},
    {"groups", 1, 128, true, false, false, false, false, {}},  {"ternary", 2, 0, true, false, false, false, false, {}},
    {"everything", 2, 64, true, true, true, true, true, 1e-5}, {"shifts", 3, 32, true, true, true, true, true, {}},
    {"odd groups", 1, 96, true, false, false, true, false, {}}};

// m covers every block of tokens and several passes, n and k the edges of words, tiles, chunks and panels
constexpr Shape kShapes[] = {{1, 1, 1},     {2, 3, 31},  {3, 31, 32},   {4, 33, 33},   {5, 65, 127},  {1, 128, 128},
                             {7, 129, 129}, {2, 9, 511}, {6, 5, 513},   {1, 260, 300}, {9, 17, 1111}, {70, 20, 160},
                             {0, 4, 64},    {3, 0, 64},  {33, 290, 97}, {530, 3, 40},  {17, 40, 1300}};

struct Problem {
  Shape shape;
  const Layout& layout;
  int64_t groups, words;
  std::vector<float> x, in_scale, in_shift, scale, group_shift, bias;
  std::vector<uint32_t> signs;

  Problem(Shape s, const Layout& l)
      : shape(s), layout(l), groups(group_count(s.k, l.group_size)), words(words_per_row(s.k)) {
    Random random(static_cast<uint64_t>(s.m * 7919 + s.n * 104729 + s.k));
    const auto fill = [&random](std::vector<float>& values, bool wanted, int64_t count, float mean) {
      if (wanted) values.resize(static_cast<size_t>(count));
      for (float& value : values) value = mean + 0.5f * random.normal();
    };
    fill(x, true, s.m * s.k, 0);
    fill(in_scale, l.in_scale, s.k, 1);
    fill(in_shift, l.in_shift, s.k, 0);
    fill(scale, l.scale, l.planes * s.n * groups, 1);
    fill(group_shift, l.group_shift, s.n * groups, 0);
    fill(bias, l.bias, s.n, 0);
    signs.resize(static_cast<size_t>(l.planes * s.n * words));
    for (size_t i = 0; i < signs.size(); ++i) {
      signs[i] = random.word() & ((i + 1) % words == 0 ? last_word_mask(s.k) : 0xffffffff);
    }
  }

  static Floats view(const std::vector<float>& values, bool wanted) {
    return {wanted ? values.data() : nullptr, Dtype::kFloat32};
  }
  Weight weight() const {
    return {signs.data(),
            layout.planes,
            shape.n,
            shape.k,
            view(scale, layout.scale && shape.n),
            view(group_shift, layout.group_shift && shape.n),
            view(bias, layout.bias && shape.n),
            layout.group_size};
  }
  int64_t group_of(int64_t column) const { return layout.group_size ? column / layout.group_size : 0; }
  double sign(int64_t plane, int64_t row, int64_t column) const {
    return is_negative(signs.data() + (plane * shape.n + row) * words, column) ? -1 : 1;
  }
  float row_scale(int64_t plane, int64_t row, int64_t group) const {
    return layout.scale ? scale[(plane * shape.n + row) * groups + group] : 1;
  }
  double shift(int64_t t) const {
    double total = 0;
    for (int64_t i = 0; layout.in_shift && i < shape.k; ++i) total += double{in_shift[i]} * x[t * shape.k + i];
    return total;
  }
};

// LayerNorm and bias over the outputs of each token, in double.
void finish(const Problem& p, std::vector<double>& a) {
  for (int64_t t = 0; t < p.shape.m; ++t) {
    double* row = a.data() + t * p.shape.n;
    if (p.layout.norm_eps) {
      double mean = 0, variance = 0;
      for (int64_t n = 0; n < p.shape.n; ++n) mean += row[n] / static_cast<double>(p.shape.n);
      for (int64_t n = 0; n < p.shape.n; ++n)
        variance += (row[n] - mean) * (row[n] - mean) / static_cast<double>(p.shape.n);
      for (int64_t n = 0; n < p.shape.n; ++n) row[n] = (row[n] - mean) / std::sqrt(variance + *p.layout.norm_eps);
    }
    for (int64_t n = 0; p.layout.bias && n < p.shape.n; ++n) row[n] += p.bias[n];
  }
}

std::vector<double> exact_sign_gemm(const Problem& p) {
  std::vector<double> a(static_cast<size_t>(p.shape.m * p.shape.n));
  for (int64_t t = 0; t < p.shape.m; ++t) {
    for (int64_t n = 0; n < p.shape.n; ++n) {
      double total = p.shift(t);
      for (int64_t i = 0; i < p.shape.k; ++i) {
        const double z = double{p.x[t * p.shape.k + i]} * (p.layout.in_scale ? p.in_scale[i] : 1);
        const int64_t g = p.group_of(i);
        double weight = p.layout.group_shift ? p.group_shift[n * p.groups + g] : 0;
        for (int64_t plane = 0; plane < p.layout.planes; ++plane)
          weight += p.row_scale(plane, n, g) * p.sign(plane, n, i);
        total += weight * z;
      }
      a[t * p.shape.n + n] = total;
    }
  }
  finish(p, a);
  return a;
}

void test_sign_gemm(const Kernels& kernels, const Problem& p) {
  SignGemm problem;
  problem.x = Problem::view(p.x, true);
  problem.m = p.shape.m;
  problem.stride = p.shape.k;
  problem.in_scale = Problem::view(p.in_scale, p.layout.in_scale);
  problem.in_shift = Problem::view(p.in_shift, p.layout.in_shift);
  problem.weight = p.weight();
  Guarded<float> y(p.shape.m * p.shape.n);
  problem.y = {y.data(), Dtype::kFloat32, p.shape.n};
  sign_gemm(kernels, problem, p.layout.norm_eps, serial);
  const std::vector<double> exact = exact_sign_gemm(p);
  double square = 0;
  for (const double value : exact) square += value * value / static_cast<double>(exact.size());
  // a norm of one output divides rounding errors by themselves: sqrt(eps) is the least divisor
  const double bound = 2e-5 * std::max(std::sqrt(square), 0.1) * (p.layout.norm_eps && p.shape.n < 3 ? 1e3 : 1);
  for (int64_t i = 0; i < y.size(); ++i) CHECK(std::fabs(y[i] - exact[i]) <= bound);
}

struct Activations {
  std::vector<uint32_t> planes;
  std::vector<float> scale, shift;
  std::vector<int32_t> sum, q;
};

// The integers by the documented formula, in float32 and with the C library's rounding.
Activations exact_activations(const Problem& p, int64_t bits, int64_t block_size) {
  const int64_t k = p.shape.k, block = block_size ? block_size : k, blocks = group_count(k, block_size);
  const int64_t segment = segment_size(block_size, p.layout.group_size), segments = group_count(k, segment);
  Activations a;
  a.planes.resize(static_cast<size_t>(p.shape.m * bits * p.words));
  a.scale.resize(static_cast<size_t>(p.shape.m * blocks));
  a.sum.resize(static_cast<size_t>(p.shape.m * segments));
  a.shift.resize(static_cast<size_t>(p.shape.m));
  a.q.resize(static_cast<size_t>(p.shape.m * k));
  for (int64_t t = 0; t < p.shape.m; ++t) {
    a.shift[t] = static_cast<float>(p.shift(t));
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * block, end = std::min(k, begin + block);
      std::vector<float> z;
      for (int64_t i = begin; i < end; ++i) z.push_back(p.x[t * k + i] * (p.layout.in_scale ? p.in_scale[i] : 1));
      float absmax = 0;
      double mean = 0;
      for (const float value : z) {
        absmax = std::max(absmax, std::fabs(value));
        mean += std::fabs(double{value}) / static_cast<double>(z.size());
      }
      const auto highest = static_cast<float>((1 << (bits - 1)) - 1), factor = highest / absmax;
      a.scale[t * blocks + b] = bits == 1 ? static_cast<float>(mean) : absmax / highest;
      for (int64_t i = begin; i < end; ++i) {
        const float value = z[i - begin];
        a.q[t * k + i] = bits == 1 ? (value < 0 ? -1 : 1) : static_cast<int32_t>(std::nearbyint(value * factor));
        a.sum[t * segments + (segment ? i / segment : 0)] += a.q[t * k + i];
        for (int64_t bit = 0; bit < bits; ++bit) {
          const uint32_t set = bits == 1 ? a.q[t * k + i] < 0 : static_cast<uint32_t>(a.q[t * k + i]) >> bit & 1;
          a.planes[(t * bits + bit) * p.words + i / 32] |= set << (i % 32);
        }
      }
    }
  }
  return a;
}

void test_pack_activations(const Kernels& kernels, const Problem& p, int64_t bits, int64_t block_size,
                           const Activations& exact) {
  Guarded<uint32_t> planes(static_cast<int64_t>(exact.planes.size()));
  Guarded<float> scale(static_cast<int64_t>(exact.scale.size())), shift(p.layout.in_shift ? p.shape.m : 0);
  Guarded<int32_t> sum(static_cast<int64_t>(exact.sum.size()));
  PackActivations problem;
  problem.x = Problem::view(p.x, true);
  problem.k = problem.stride = p.shape.k;
  problem.in_scale = Problem::view(p.in_scale, p.layout.in_scale);
  problem.in_shift = Problem::view(p.in_shift, p.layout.in_shift);
  problem.bits = bits;
  problem.block_size = block_size;
  problem.group_size = p.layout.group_size;
  problem.planes = planes.data();
  problem.scale = scale.data();
  problem.sum = sum.data();
  problem.shift = shift.data();
  pack_activations(kernels, problem, p.shape.m, serial);
  for (int64_t i = 0; i < planes.size(); ++i) CHECK(planes[i] == exact.planes[i]);
  for (int64_t i = 0; i < sum.size(); ++i) CHECK(sum[i] == exact.sum[i]);
  for (int64_t i = 0; i < shift.size(); ++i) CHECK(std::fabs(shift[i] - exact.shift[i]) <= 1e-6f * std::fabs(shift[i]));
  for (int64_t i = 0; i < scale.size(); ++i) {
    CHECK(bits == 1 ? std::fabs(scale[i] - exact.scale[i]) <= 1e-6f * scale[i] : scale[i] == exact.scale[i]);
  }
}

// The epilogue in the order that bitinfer.ops.popcount_gemm fixes, one float32 rounding at a time.
std::vector<float> exact_popcount_gemm(const Problem& p, int64_t block_size, const Activations& q) {
  const int64_t k = p.shape.k, segment = segment_size(block_size, p.layout.group_size);
  const int64_t segments = group_count(k, segment), blocks = group_count(k, block_size);
  std::vector<float> a(static_cast<size_t>(p.shape.m * p.shape.n));
  for (int64_t t = 0; t < p.shape.m; ++t) {
    for (int64_t n = 0; n < p.shape.n; ++n) {
      volatile float total = 0;  // keeps the compiler from fusing what follows
      for (int64_t s = 0; s < segments; ++s) {
        const int64_t begin = s * segment, end = segment ? std::min(k, begin + segment) : k, g = p.group_of(begin);
        const float token = q.scale[t * blocks + (block_size ? begin / block_size : 0)];
        for (int64_t plane = 0; plane < p.layout.planes; ++plane) {
          int64_t integer = 0;
          for (int64_t i = begin; i < end; ++i) integer += static_cast<int64_t>(p.sign(plane, n, i)) * q.q[t * k + i];
          volatile float product = token * p.row_scale(plane, n, g);
          product = product * static_cast<float>(integer);
          total = total + product;
        }
        if (p.layout.group_shift) {
          volatile float product = token * p.group_shift[n * p.groups + g];
          product = product * static_cast<float>(q.sum[t * segments + s]);
          total = total + product;
        }
      }
      if (p.layout.in_shift) total = total + q.shift[t];
      if (p.layout.bias && !p.layout.norm_eps) total = total + p.bias[n];
      a[t * p.shape.n + n] = total;
    }
  }
  return a;
}

void test_popcount_gemm(const Kernels& kernels, const Problem& p, int64_t bits, int64_t block_size,
                        const Activations& q) {
  PopcountGemm problem;
  problem.planes = q.planes.data();
  problem.act_scale = q.scale.data();
  problem.act_sum = q.sum.data();
  problem.act_shift = p.layout.in_shift ? q.shift.data() : nullptr;
  problem.m = p.shape.m;
  problem.bits = bits;
  problem.block_size = block_size;
  problem.weight = p.weight();
  Guarded<float> y(p.shape.m * p.shape.n);
  problem.y = {y.data(), Dtype::kFloat32, p.shape.n};
  popcount_gemm(kernels, problem, p.layout.norm_eps, serial);
  const std::vector<float> exact = exact_popcount_gemm(p, block_size, q);
  if (!p.layout.norm_eps) {
    for (int64_t i = 0; i < y.size(); ++i) CHECK(y[i] == exact[i]);
    return;
  }
  std::vector<double> normed(exact.begin(), exact.end());
  finish(p, normed);
  for (int64_t i = 0; i < y.size(); ++i) CHECK(std::fabs(y[i] - normed[i]) <= 1e-6 * (1 + std::fabs(normed[i])));
}

// Rounded to each output type: the same as rounding the float32 result.
void test_output_types(const Kernels& kernels) {
  const Problem p({3, 37, 100}, kLayouts[1]);
  SignGemm problem;
  problem.x = Problem::view(p.x, true);
  problem.m = p.shape.m;
  problem.stride = p.shape.k;
  problem.weight = p.weight();
  Guarded<float> full(3 * 37);
  Guarded<uint16_t> half(3 * 37), brain(3 * 37);
  for (const Output& y : {Output{full.data(), Dtype::kFloat32, 37}, Output{half.data(), Dtype::kFloat16, 37},
                          Output{brain.data(), Dtype::kBFloat16, 37}}) {
    problem.y = y;
    sign_gemm(kernels, problem, {}, serial);
  }
  for (int64_t i = 0; i < full.size(); ++i) {
    CHECK(half[i] == float_to_half(full[i]) && brain[i] == float_to_bfloat16(full[i]));
  }
}

// A value that towers over its token must not cost the others their precision, with any number of tokens beside it.
void test_outliers(const Kernels& kernels) {
  for (const int64_t m : {1, 3, 40}) {
    Problem p({m, 33, 2048}, kLayouts[0]);
    std::vector<uint16_t> brain(p.x.size());
    for (size_t i = 0; i < brain.size(); ++i) {
      brain[i] = float_to_bfloat16(i == 77 ? 1000 : p.x[i]);
      p.x[i] = bfloat16_to_float(brain[i]);
    }
    SignGemm problem;
    problem.x = {brain.data(), Dtype::kBFloat16};
    problem.m = m;
    problem.stride = 2048;
    problem.weight = p.weight();
    Guarded<float> y(m * 33);
    problem.y = {y.data(), Dtype::kFloat32, 33};
    sign_gemm(kernels, problem, {}, serial);
    const std::vector<double> exact = exact_sign_gemm(p);
    for (int64_t i = 0; i < y.size(); ++i) CHECK(std::fabs(y[i] - exact[i]) <= 0.02);
  }
}

// What is not finite must show: in the outputs of that token, and as a NaN scale over zeros.
void test_not_finite(const Kernels& kernels) {
  for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    Problem p({2, 9, 40}, kLayouts[0]);
    p.x[37] = bad;
    SignGemm problem;
    problem.x = Problem::view(p.x, true);
    problem.m = 2;
    problem.stride = 40;
    problem.weight = p.weight();
    Guarded<float> y(2 * 9);
    problem.y = {y.data(), Dtype::kFloat32, 9};
    sign_gemm(kernels, problem, {}, serial);
    for (int64_t n = 0; n < 9; ++n) {
      CHECK(std::isnan(bad) ? std::isnan(y[n]) : y[n] == static_cast<float>(p.sign(0, n, 37)) * bad);
      CHECK(std::isfinite(y[9 + n]));
    }
    for (const int64_t bits : {8, 1}) {
      Guarded<uint32_t> planes(2 * bits * 2);
      Guarded<float> scale(2);
      Guarded<int32_t> sum(2);
      PackActivations pack;
      pack.x = problem.x;
      pack.k = pack.stride = 40;
      pack.bits = bits;
      pack.planes = planes.data();
      pack.scale = scale.data();
      pack.sum = sum.data();
      pack_activations(kernels, pack, 2, serial);
      CHECK(std::isnan(scale[0]) && std::isfinite(scale[1]) && sum[0] == (bits == 1 ? 40 : 0));
      for (int64_t i = 0; i < bits * 2; ++i) CHECK(planes[i] == 0);
    }
  }
}

// Integers halfway between two go to the even one.
void test_ties(const Kernels& kernels) {
  const std::vector<float> x = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 125.5f};
  const int expected[8] = {127, 0, 2, 2, 0, -2, -2, 126};
  Guarded<uint32_t> planes(8);
  Guarded<float> scale(1);
  Guarded<int32_t> sum(1);
  PackActivations problem;
  problem.x = Problem::view(x, true);
  problem.k = problem.stride = 8;
  problem.planes = planes.data();
  problem.scale = scale.data();
  problem.sum = sum.data();
  pack_activations(kernels, problem, 1, serial);
  for (int column = 0; column < 8; ++column) {
    uint32_t octet = 0;
    for (int bit = 0; bit < 8; ++bit) octet |= (planes[bit] >> column & 1) << bit;
    CHECK(static_cast<int8_t>(octet) == expected[column]);
  }
  CHECK(scale[0] == 1 && sum[0] == 127 + 2 + 2 - 2 - 2 + 126);
}

}  // namespace

int main() {
  for (const std::string& isa : supported_isas()) {
    const Kernels& kernels = kernels_named(isa);
    for (const Layout& layout : kLayouts) {
      for (const Shape& shape : kShapes) {
        const Problem p(shape, layout);
        const std::string where = isa + " " + layout.name + " m=" + std::to_string(shape.m) +
                                  " n=" + std::to_string(shape.n) + " k=" + std::to_string(shape.k);
        context = where + " sign_gemm";
        test_sign_gemm(kernels, p);
        for (const int64_t bits : {8, 4, 2, 1}) {
          for (const int64_t block_size : {0, 256}) {
            if (block_size && layout.group_size == 96) continue;  // neither divides the other
            context = where + " bits=" + std::to_string(bits) + " block_size=" + std::to_string(block_size);
            const Activations exact = exact_activations(p, bits, block_size);
            test_pack_activations(kernels, p, bits, block_size, exact);
            test_popcount_gemm(kernels, p, bits, block_size, exact);
          }
        }
      }
    }
    context = isa;
    test_output_types(kernels);
    test_outliers(kernels);
    test_not_finite(kernels);
    test_ties(kernels);
  }
  return report();
}
