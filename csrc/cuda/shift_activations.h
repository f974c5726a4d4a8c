// in_shift . x, and x in rows that TMA can read, for matrix products.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// shift[t] = sum over k of in_shift[k] * x[t, k],  z[t, k] = x[t, k]
struct ShiftActivations {
  Floats x;  // [m, k], float16 or bfloat16
  int64_t m = 0, k = 0, stride = 0;
  Floats in_shift = {};    // [k], or absent
  float* shift = nullptr;  // [m], unused without in_shift
  void* z = nullptr;       // [m, pitch] in the dtype of x, aligned to 16 bytes; or absent
  int64_t pitch = 0;       // elements, a multiple of 8, at least k
};

cudaError_t shift_activations(const ShiftActivations& problem, const Launch& on);

}  // namespace bitinfer::cuda
