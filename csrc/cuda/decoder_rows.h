// What a decoder does between its projections, row by row: see decoder_rows.cu and pack_norm_few.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

inline constexpr int64_t kMaxRowColumns = 8192;
inline constexpr int kMaxPacks = 3;

// y = RMSNorm(x + residual) * weight, rounded to the dtype of x after every step but the sum, as LlamaRMSNorm does.
// All rows are of one 16-bit type at addresses that are multiples of 16; k % 8 == 0.
struct RmsNorm {
  Floats x, residual;  // [m, k], residual may be absent
  int64_t stride = 0, residual_stride = 0;
  Floats weight;  // [k]
  float eps = 0;
  int64_t k = 0;
  void* hidden = nullptr;  // x + residual [m, k], contiguous, if there is a residual; no memory of the two
};

// y = silu(gate) * up, both steps rounded to their dtype, as LlamaMLP does; types and addresses as above.
struct SiluMul {
  Floats gate, up;  // [m, k]
  int64_t gate_stride = 0, up_stride = 0, k = 0;
};

// The same norm, packed for up to three projections that have column factors of their own.
struct RmsNormPacks {
  RmsNorm norm;
  PackActivations packed[kMaxPacks];  // x and stride unused; bits, block_size and group_size of all alike
  int count = 0;
};

// Whether rms_norm and silu_mul take rows of so many columns.
bool takes_rows(const void* data, int64_t stride, Dtype dtype, int64_t k);

cudaError_t rms_norm(const RmsNorm& problem, void* y, int64_t m, const Launch& on);
cudaError_t silu_mul(const SiluMul& problem, void* y, int64_t m, const Launch& on);

// Whether the packs of so many tokens are made faster from the rows that rms_norm() leaves in memory.
bool rms_norm_comes_first(const RmsNormPacks& problem, int64_t m, const Device& device);

// Any shape and type; one launch for a few tokens of the usual ones.
cudaError_t rms_norm_packs(const RmsNormPacks& problem, int64_t m, const Launch& on);

}  // namespace bitinfer::cuda
