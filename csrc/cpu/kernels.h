// The table of kernels that an instruction set fills, and the problems that they take. No torch here.
//
// Kernels check nothing: the callers (ops.cpp, python.cpp) have checked shapes, and scratch memory is theirs to ask
// for. Every kernel works on a range of rows or tokens, so that the caller decides about threads; results do not depend
// on how a range is cut.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../packing.h"
#include "numbers.h"

namespace bitinfer::cpu {

// A row of floating point numbers of any of the three types; absent if data is null.
struct Floats {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  explicit operator bool() const { return data != nullptr; }
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

  int64_t words() const { return words_per_row(k); }
  int64_t groups() const { return group_count(k, group_size); }
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

  int64_t blocks() const { return group_count(weight.k, block_size); }
  int64_t segment() const { return segment_size(block_size, weight.group_size); }
  int64_t segments() const { return group_count(weight.k, segment()); }
};

// y[t] = (a[t] - mean) / sqrt(variance + eps) + bias over the n outputs of a token, statistics in double
struct LayerNorm {
  const float* a;  // [m, n]
  int64_t n;
  double eps;
  Floats bias;  // [n]
  Output y;     // [m, n]
};

// A product has two steps. `prepare` turns tokens into whatever form the table's inner loop reads (each kernel has its
// own: lookup tables, bit planes, padded bytes), in `prepared`, which holds prepared_bytes(problem) bytes aligned
// to 64. `multiply` computes all tokens of the problem for the weight rows [row_begin, row_end).
template <typename Problem>
struct Gemm {
  int64_t row_tile;  // ranges that start at a multiple of this waste nothing
  size_t (*prepared_bytes)(const Problem&);
  void (*prepare)(const Problem&, std::byte* prepared, int64_t token_begin, int64_t token_end);
  void (*multiply)(const Problem&, const std::byte* prepared, int64_t row_begin, int64_t row_end);
};

struct Kernels {
  void (*pack_signs)(const PackSigns&, int64_t row_begin, int64_t row_end);
  void (*pack_activations)(const PackActivations&, int64_t token_begin, int64_t token_end);
  Gemm<SignGemm> sign_gemm;
  Gemm<PopcountGemm> popcount_gemm;
  void (*layer_norm)(const LayerNorm&, int64_t token_begin, int64_t token_end);
};

}  // namespace bitinfer::cpu
