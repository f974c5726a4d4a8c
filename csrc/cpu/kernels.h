// The table of kernels that an instruction set fills. No torch here.
//
// Kernels check nothing: the callers (ops.cpp, python.cpp) have checked shapes, and scratch memory is theirs to ask
// for. Every kernel works on a range of rows or tokens, so that the caller decides about threads; results do not depend
// on how a range is cut.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "numbers.h"

namespace bitinfer::cpu {

// Tokens whose prepared forms, of so many bytes each, stay in a core's second-level cache.
constexpr int64_t pass_in_cache(size_t token_bytes) {
  constexpr int64_t kBytes = 1 << 20, kFewest = 8, kMost = 64;
  const int64_t tokens = kBytes / (token_bytes ? static_cast<int64_t>(token_bytes) : 1) / 8 * 8;
  return tokens < kFewest ? kFewest : tokens > kMost ? kMost : tokens;
}

// A product has two steps. `prepare` turns tokens into whatever form the table's inner loop reads (each kernel has its
// own: lookup tables, bit planes, padded bytes), in `prepared`, which holds prepared_bytes(problem) bytes aligned
// to 64. `multiply` computes all tokens of the problem for the weight rows [row_begin, row_end).
template <typename Problem>
struct Gemm {
  int64_t row_tile;                 // ranges that start at a multiple of this waste nothing
  int64_t (*pass)(const Problem&);  // how many tokens to multiply at a time; every pass reads the weight once
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
