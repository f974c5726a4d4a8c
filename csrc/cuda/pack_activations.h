// Entry points of the kernels that make bit planes, and of those around them.
//
// Rows of `m` tokens become integers, and these bit planes. Scales and shifts of columns and norm weights count as
// weights: the kernels read them before the kernel ahead of them in the stream has finished.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// How the columns of a row are spread: over `blocks` blocks of a cluster, `held` octets of columns in the registers of
// a thread; 0 if the row does not fit and is read once for each pass. With `helpers` as many threads again make the sum
// of in_shift (held == 1 only).
struct RowPlan {
  int blocks = 0, threads = 0, held = 0;
  bool helpers = false;
};

// The fastest plan known, a pure function; and the one with that many blocks, and as few octets held as `held` if it
// can.
RowPlan plan_rows(int64_t m, int64_t k, const Device& device);
RowPlan plan_rows_over(int64_t k, int blocks, int held);

// x = RMSNorm(x + residual) * weight, rounded to the dtype of x after every step but the sum, as LlamaRMSNorm does.
struct RmsNormPack {
  PackActivations packed;  // x and stride unused
  Floats x, residual;      // [m, k], residual may be absent
  int64_t stride = 0, residual_stride = 0;
  void* hidden = nullptr;  // x + residual [m, k] is written here if there is a residual; may be either of the two
  int64_t hidden_stride = 0;
  Floats weight;  // [k], the dtype of x
  float eps = 0;
};

// x = silu(gate) * up, both steps rounded to their dtype, as LlamaMLP does.
struct SiluMulPack {
  PackActivations packed;  // x and stride unused
  Floats gate, up;         // [m, k] of one dtype
  int64_t gate_stride = 0, up_stride = 0;
};

// z = in_scale * x in 24-bit fixed point: q = rint(z / scale), scale = 2^e such that the largest |q| of a token lies in
// [2^22, 2^23). Tokens below 2^-96 are zeros of scale 0; those with infinity or NaN are zeros of scale NaN.
struct FixedPoint {
  Floats x;  // [m, k]
  int64_t k = 0, stride = 0;
  Floats in_scale = {}, in_shift = {};  // [k]
  int64_t group_size = 0;
  uint32_t* planes = nullptr;  // [m, 24, words], two's complement
  float* scale = nullptr;      // [m]
  int64_t* sum = nullptr;      // [m, groups] of q
  float* shift = nullptr;      // [m], unused without in_shift
};

// A plan overrides plan_rows, for tests and tuning.
cudaError_t pack_activations(const PackActivations& problem, int64_t m, const Launch& on,
                             const RowPlan* plan = nullptr);
cudaError_t rms_norm_pack_activations(const RmsNormPack& problem, int64_t m, const Launch& on,
                                      const RowPlan* plan = nullptr);
cudaError_t silu_mul_pack_activations(const SiluMulPack& problem, int64_t m, const Launch& on,
                                      const RowPlan* plan = nullptr);
cudaError_t pack_fixed_point(const FixedPoint& problem, int64_t m, const Launch& on, const RowPlan* plan = nullptr);
cudaError_t layer_norm(const LayerNorm& problem, int64_t m, const Launch& on, const RowPlan* plan = nullptr);
cudaError_t pack_signs(const PackSigns& problem, int64_t rows, const Launch& on);

}  // namespace bitinfer::cuda
