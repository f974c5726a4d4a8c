// A query or a key of the new token in a warp, and what every attention kernel needs.
#pragma once

#include "octet.cuh"
#include "reduce.cuh"

namespace bitinfer::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// Volatile, as load_quad() is.
__device__ __forceinline__ int64_t load_long(const int64_t* from) {
  int64_t v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(from));
  return v;
}

template <typename T>
__device__ __forceinline__ float load_number(const T* from) {
  unsigned short bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  return to_float(reinterpret_cast<const T&>(bits));
}

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A row of kDim numbers of a warp, lane l having columns l, l + 32, ..., normed and turned to its position.
template <typename T, int kDim>
struct Row {
  static constexpr int kColumns = kDim / 32;
  float x[kColumns];

  __device__ __forceinline__ void load(const T* from, int lane) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] = load_number(from + lane + 32 * i);
  }
  __device__ __forceinline__ void normalise(const float (&weight)[kColumns], float eps) {
    float squares = 0;
#pragma unroll
    for (float value : x) squares += value * value;
    const float factor = rsqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      x[i] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(x[i], factor)), weight[i]));
    }
  }
  __device__ __forceinline__ void rotate(const float (&cos)[kColumns], const float (&sin)[kColumns]) {
    constexpr int kHalf = kColumns / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = x[i], high = x[i + kHalf];
      x[i] = rounded<T>(rounded<T>(__fmul_rn(low, cos[i])) - rounded<T>(__fmul_rn(high, sin[i])));
      x[i + kHalf] =
          rounded<T>(rounded<T>(__fmul_rn(high, cos[i + kHalf])) + rounded<T>(__fmul_rn(low, sin[i + kHalf])));
    }
  }
};

}  // namespace bitinfer::cuda
