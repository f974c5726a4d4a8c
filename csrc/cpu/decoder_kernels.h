// The table of what stands between the products of a decoder layer, for decoder_<isa>.cpp to fill.
#pragma once

#include "decoder.h"

namespace bitinfer::cpu {

// One key head of one sequence over some slots: the queries that share it, and the token's own key and value where
// their slot is among these.
struct Attend {
  Heads heads = {};
  Dtype dtype = Dtype::kFloat32;
  Floats q = {}, k = {}, v = {};  // [group, dim], [dim], [dim]: as projected; k and v absent if not to be stored
  RmsNorm q_norm = {}, k_norm = {};
  Floats cos = {}, sin = {};                // [dim]
  void *keys = nullptr, *values = nullptr;  // [capacity, dim]
  int64_t begin = 0, end = 0, slot = 0;     // slots to read; where k and v go
  float* part = nullptr;                    // [group, parts, dim + 2]: this part's weighted sum of values, the sum of
  int64_t parts = 1;                        // the weights, and the largest score, by which the weights are scaled
};

// y[t, v] = weight[v] . x[t] in float32, for the rows [begin, end) of the weight.
struct Head {
  Floats weight = {};        // [n, k]
  const float* x = nullptr;  // [m, k]
  int64_t m = 0, n = 0, k = 0;
  Output y = {};  // [m, n]
};

struct DecoderKernels {
  void (*rms_norm)(const RmsNorm&, Floats x, int64_t n, void* y);
  void (*attend)(const Attend&);
  void (*combine)(const float* part, int64_t heads, int64_t parts, int64_t dim, Dtype dtype,
                  void* y);  // y [heads, dim]
  void (*silu_mul)(Floats gate, Floats up, int64_t n, void* y);
  void (*add)(Floats x, int64_t n, void* y);  // y += x
  void (*widen)(Floats x, int64_t n, float* y);
  void (*head)(const Head&, int64_t begin, int64_t end);
};

// The table for the instruction set in use.
const DecoderKernels& active_decoder_kernels();

// Null if it is compiled for another processor.
const DecoderKernels* decoder_avx512();
const DecoderKernels* decoder_avx2();
const DecoderKernels* decoder_scalar();

}  // namespace bitinfer::cpu
