// Device functions that every kernel needs: floats of any of the three types, and dependent launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../problem.h"

namespace bitinfer::cuda {

// Lets the next kernel of the stream start: its blocks take the room that ours leave, and load their weights.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all earlier kernels of the stream have finished and their writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Element `i` of a row whose type is known at run time only: for scales, shifts and biases, which are read once.
__device__ __forceinline__ float load_float(const Floats& row, int64_t i) {
  switch (row.dtype) {
    case Dtype::kFloat16:
      return __half2float(static_cast<const __half*>(row.data)[i]);
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(row.data)[i]);
    default:
      return static_cast<const float*>(row.data)[i];
  }
}

__device__ __forceinline__ void store_float(const Output& y, int64_t row, int64_t column, float value) {
  const int64_t i = row * y.stride + column;
  switch (y.dtype) {
    case Dtype::kFloat16:
      static_cast<__half*>(y.data)[i] = __float2half_rn(value);
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(y.data)[i] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<float*>(y.data)[i] = value;
  }
}

}  // namespace bitinfer::cuda
