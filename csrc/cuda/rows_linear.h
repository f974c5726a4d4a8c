// A product with a matrix in 8 bits: see rows_linear.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// y[t, v] = scale[v] * sum_k codes[v, k] * x[t, k], y in the dtype of x. Any shape with k < 2^30; infinity in
// float32 counts as NaN.
struct RowsLinear {
  Floats x;  // [m, k]
  int64_t m = 0, k = 0, stride = 0;
  const int8_t* codes = nullptr;  // [n, k]
  const float* scale = nullptr;   // [n]
  int64_t n = 0;
  void* y = nullptr;  // [m, n]
};

cudaError_t rows_linear(const RowsLinear& problem, const Launch& on);

}  // namespace bitinfer::cuda
