// shift[t] = sum over k of in_shift[k] * x[t, k],  z[t, k] = x[t, k]
// x [M, K], in_shift [K], z [M, pitch], shift [M]
//
// For any M and K, as the prologue of sign_gemm. A block does one token, eight neighbouring columns of a thread at a
// time. Bound by reading x, which mostly stays in L2.
#include "common.cuh"
#include "shift_activations.h"

namespace bitinfer::cuda {
namespace {

constexpr int kRun = 8;    // elements that a thread takes together: 16 bytes
constexpr int kBatch = 4;  // runs in flight
constexpr int kMaxWarps = 16;

template <typename T>
struct Run {
  uint4 words;

  __device__ float at(int i) const { return to_float(reinterpret_cast<const T*>(&words)[i]); }
};

// Elements first ... first + 7 of a row of x, zeros past its end.
template <typename T>
__device__ __forceinline__ Run<T> load_run(const T* row, int64_t first, int64_t k, bool aligned) {
  Run<T> run{};
  if (aligned) {
    run.words = __ldcg(reinterpret_cast<const uint4*>(row + first));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (first + i < k) {
        const uint16_t bits = __ldcg(reinterpret_cast<const unsigned short*>(row + first + i));
        reinterpret_cast<uint16_t*>(&run.words)[i] = bits;
      }
    }
  }
  return run;
}

// The same of in_shift.
__device__ __forceinline__ void load_factors(float (&factors)[kRun], const Floats& row, int64_t first, int64_t k,
                                             bool aligned) {
  if (aligned && row.dtype == Dtype::kFloat32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(row.data) + first);
    reinterpret_cast<float4*>(factors)[0] = __ldg(from);
    reinterpret_cast<float4*>(factors)[1] = __ldg(from + 1);
  } else if (aligned) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const __half*>(row.data) + first));
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      factors[i] = row.dtype == Dtype::kFloat16 ? to_float(reinterpret_cast<const __half*>(&words)[i])
                                                : to_float(reinterpret_cast<const __nv_bfloat16*>(&words)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) factors[i] = first + i < k ? load_float(row, first + i) : 0.0f;
  }
}

// The sum over all threads of the block.
__device__ __forceinline__ float block_sum(float mine) {
  __shared__ float parts[kMaxWarps];
  const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
  const auto of_warp = [](float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
  };
  mine = of_warp(mine);
  if (lane == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  return of_warp(lane < warps ? parts[lane] : 0.0f);
}

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps) shift_activations_kernel(const ShiftActivations p, bool aligned) {
  allow_next_kernel();
  const int64_t token = blockIdx.x;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kRun;
  const T* x = static_cast<const T*>(p.x.data) + token * p.stride;
  T* z = static_cast<T*>(p.z) + token * p.pitch;
  const bool has_shift = p.in_shift.data != nullptr;
  wait_for_previous_kernel();

  float sum = 0.0f;
  for (int64_t start = static_cast<int64_t>(threadIdx.x) * kRun; start < p.k; start += kBatch * step) {
    Run<T> runs[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t first = start + i * step;
      if (first < p.k) runs[i] = load_run(x, first, p.k, aligned);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t first = start + i * step;
      if (first >= p.k) break;
      if (p.z != nullptr) *reinterpret_cast<uint4*>(z + first) = runs[i].words;
      if (!has_shift) continue;
      float factors[kRun];
      load_factors(factors, p.in_shift, first, p.k, aligned);
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum = fmaf(runs[i].at(j), factors[j], sum);
    }
  }
  if (!has_shift) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.shift[token] = sum;
}

bool aligned_to_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

cudaError_t shift_activations(const ShiftActivations& problem, const Launch& on) {
  if (problem.m == 0) return cudaSuccess;
  const bool aligned = aligned_to_16(problem.x.data) && problem.stride % kRun == 0 && problem.k % kRun == 0 &&
                       aligned_to_16(problem.in_shift.data);
  int warps = 4;
  while (warps < kMaxWarps && warps * 32 * kRun * 2 < problem.k) warps *= 2;
  const auto kernel =
      problem.x.dtype == Dtype::kFloat16 ? shift_activations_kernel<__half> : shift_activations_kernel<__nv_bfloat16>;
  return launch(kernel, on, static_cast<unsigned>(problem.m), 32 * warps, 0, true, problem, aligned);
}

}  // namespace bitinfer::cuda
