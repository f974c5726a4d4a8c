// z = in_scale * x in the 16 bits of x, and in_shift . x, for matrix products that read z through TMA.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// power[t] * z[t, k] = in_scale[k] * x[t, k],  shift[t] = sum over k of in_shift[k] * x[t, k]
//
// power[t] is the power of two that brings the largest |z[t, k]| to [2^14, 2^15): a product with in_scale then neither
// overflows 16 bits nor loses digits to their smallest numbers. It is 1 for tokens that hold an infinity or a NaN,
// which z and shift keep.
struct ScaleActivations {
  Floats x;  // [m, k], float16 or bfloat16
  int64_t m = 0, k = 0, stride = 0;
  Floats in_scale = {}, in_shift = {};  // [k]
  void* z = nullptr;                    // [m, pitch] in the dtype of x; absent: power is not written either
  int64_t pitch = 0;                    // elements, at least k
  float* power = nullptr;               // [m]
  float* shift = nullptr;               // [m], unused without in_shift
};

cudaError_t scale_activations(const ScaleActivations& problem, const Launch& on);

}  // namespace bitinfer::cuda
