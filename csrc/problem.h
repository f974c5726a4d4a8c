// The problems that kernels take, on any device. No torch here.
//
// Pointers are those of the device that runs the problem. Callers have checked shapes; kernels check nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.h"

namespace bitinfer {

enum class Dtype : uint8_t { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A row of floating point numbers of any of the three types; absent if data is null.
struct Floats {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  constexpr explicit operator bool() const { return data != nullptr; }
  Floats operator+(int64_t elements) const {
    return {static_cast<const std::byte*>(data) + elements * element_size(dtype), dtype};
  }
};

// A matrix to write; consecutive rows are `stride` elements apart.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride = 0;

  void* at(int64_t row, int64_t column) const {
    return static_cast<std::byte*>(data) + (row * stride + column) * element_size(dtype);
  }
};

// words[r, w] = signs of x[r, 32*w ... 32*w + 31]
struct PackSigns {
  Floats x;  // [rows, k]
  int64_t k = 0, stride = 0;
  uint32_t* words = nullptr;  // [rows, words_per_row(k)]
};

// The integers of z = in_scale * x in bit planes, as bitinfer.ops.pack_activations documents.
struct PackActivations {
  Floats x;  // [m, k]
  int64_t k = 0, stride = 0;
  Floats in_scale = {}, in_shift = {};  // [k]
  int64_t bits = 8, block_size = 0, group_size = 0;
  uint32_t* planes = nullptr;  // [m, bits, words]
  float* scale = nullptr;      // [m, blocks]
  int32_t* sum = nullptr;      // [m, segments]
  float* shift = nullptr;      // [m], unused without in_shift
};

// The packed matrix with what applies to its rows. Contiguous, row-major.
struct Weight {
  const uint32_t* signs = nullptr;  // [planes, n, words]
  int64_t planes = 1, n = 0, k = 0;
  Floats scale = {};        // [planes, n, groups]
  Floats group_shift = {};  // [n, groups]
  Floats bias = {};         // [n]
  int64_t group_size = 0;   // 0: one group

  constexpr int64_t words() const { return words_per_row(k); }
  constexpr int64_t groups() const { return group_count(k, group_size); }
};

// y[t, n] = sum_p sum_g scale * (S_p z[t])_g + group_shift * sum z + in_shift . x[t] + bias,  z = in_scale * x
struct SignGemm {
  Floats x;  // [m, k]
  int64_t m = 0, stride = 0;
  Floats in_scale = {}, in_shift = {};  // [k]
  Weight weight = {};
  Output y = {};  // [m, n]
};

// The same for the integers of pack_activations; the epilogue is fixed to the rounding by bitinfer.ops.popcount_gemm.
struct PopcountGemm {
  const uint32_t* planes = nullptr;  // [m, bits, words]
  const float* act_scale = nullptr;  // [m, blocks]
  const int32_t* act_sum = nullptr;  // [m, segments]
  const float* act_shift = nullptr;  // [m], or absent
  int64_t m = 0, bits = 8, block_size = 0;
  Weight weight = {};
  Output y = {};  // [m, n]

  constexpr int64_t blocks() const { return group_count(weight.k, block_size); }
  constexpr int64_t segment() const { return segment_size(block_size, weight.group_size); }
  constexpr int64_t segments() const { return group_count(weight.k, segment()); }
};

// y[t] = (a[t] - mean) / sqrt(variance + eps) + bias over the n outputs of a token, statistics in double
struct LayerNorm {
  const float* a;  // [m, n]
  int64_t n;
  double eps;
  Floats bias;  // [n]
  Output y;     // [m, n]
};

}  // namespace bitinfer
