// power[t] * z[t, k] = in_scale[k] * x[t, k],  shift[t] = sum over k of in_shift[k] * x[t, k]
// x [M, K], in_scale and in_shift [K], z [M, pitch], power and shift [M]
//
// For any M and K, as the prologue of sign_gemm. A block does one token: its threads read x once, eight neighbours at a
// time, keep what they read in registers (up to kKept * 8 elements each; what is beyond is read twice), agree on the
// largest |z|, and write z. Bound by reading x and writing z, which mostly stay in L2.
#include "common.cuh"
#include "scale_activations.h"

namespace bitinfer::cuda {
namespace {

constexpr int kRun = 8;   // elements that a thread takes together: 16 bytes
constexpr int kKept = 4;  // runs that stay in registers
constexpr int kMaxWarps = 16;
constexpr int kTopExponent = 14;  // of the largest |z|

template <typename T>
struct Run {
  uint4 words;

  __device__ float at(int i) const { return to_float(reinterpret_cast<const T*>(&words)[i]); }
  __device__ void set(int i, float value) { reinterpret_cast<T*>(&words)[i] = from_float<T>(value); }
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

// The same of in_scale or in_shift.
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

struct Totals {
  float largest, shift;
};

// Of all threads of the block. fmaxf passes over NaN, which z keeps by itself.
__device__ __forceinline__ Totals block_totals(Totals mine) {
  __shared__ Totals parts[kMaxWarps];
  const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
  const auto reduce = [](Totals value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      value.largest = fmaxf(value.largest, __shfl_xor_sync(~0u, value.largest, distance));
      value.shift += __shfl_xor_sync(~0u, value.shift, distance);
    }
    return value;
  };
  mine = reduce(mine);
  if (lane == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  return reduce(lane < warps ? parts[lane] : Totals{0.0f, 0.0f});
}

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps) scale_activations_kernel(const ScaleActivations p, bool aligned) {
  allow_next_kernel();
  const int64_t token = blockIdx.x;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kRun, start = static_cast<int64_t>(threadIdx.x) * kRun;
  const T* x = static_cast<const T*>(p.x.data) + token * p.stride;
  const bool has_scale = p.in_scale.data != nullptr, has_shift = p.in_shift.data != nullptr;
  wait_for_previous_kernel();

  Run<T> kept[kKept];
  Totals totals{0.0f, 0.0f};
  const auto add = [&](const Run<T>& run, int64_t first) {
    float factors[kRun];
    if (p.z != nullptr) {
      if (has_scale) load_factors(factors, p.in_scale, first, p.k, aligned);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        totals.largest = fmaxf(totals.largest, fabsf(has_scale ? run.at(i) * factors[i] : run.at(i)));
      }
    }
    if (has_shift) {
      load_factors(factors, p.in_shift, first, p.k, aligned);
#pragma unroll
      for (int i = 0; i < kRun; ++i) totals.shift = fmaf(run.at(i), factors[i], totals.shift);
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t first = start + i * step;
    if (first < p.k) kept[i] = load_run(x, first, p.k, aligned);
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (start + i * step < p.k) add(kept[i], start + i * step);
  }
  for (int64_t first = start + kKept * step; first < p.k; first += step) add(load_run(x, first, p.k, aligned), first);

  totals = block_totals(totals);
  if (has_shift && threadIdx.x == 0) p.shift[token] = totals.shift;
  if (p.z == nullptr) return;

  // up to 2^126, so that power is a normal number
  const uint32_t bits = __float_as_uint(totals.largest);
  const bool scales = bits != 0 && bits < 0x7f800000u;
  const int exponent = scales ? min(kTopExponent + 127 - static_cast<int>(bits >> 23), 126) : 0;
  const float factor = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
  if (threadIdx.x == 0) p.power[token] = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);

  T* z = static_cast<T*>(p.z) + token * p.pitch;
  const auto write = [&](const Run<T>& run, int64_t first) {
    float factors[kRun];
    if (has_scale) load_factors(factors, p.in_scale, first, p.k, aligned);
    Run<T> scaled{};
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      scaled.set(i, (has_scale ? run.at(i) * factors[i] : run.at(i)) * factor);
    }
    *reinterpret_cast<uint4*>(z + first) = scaled.words;
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (start + i * step < p.k) write(kept[i], start + i * step);
  }
  for (int64_t first = start + kKept * step; first < p.k; first += step) {
    write(load_run(x, first, p.k, aligned), first);
  }
}

bool aligned_to_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

cudaError_t scale_activations(const ScaleActivations& problem, const Launch& on) {
  if (problem.m == 0) return cudaSuccess;
  const bool aligned = aligned_to_16(problem.x.data) && problem.stride % kRun == 0 && problem.k % kRun == 0 &&
                       aligned_to_16(problem.in_scale.data) && aligned_to_16(problem.in_shift.data);
  int warps = 4;
  while (warps < kMaxWarps && warps * 32 * kRun * 2 < problem.k) warps *= 2;
  const auto kernel =
      problem.x.dtype == Dtype::kFloat16 ? scale_activations_kernel<__half> : scale_activations_kernel<__nv_bfloat16>;
  return launch(kernel, on, static_cast<unsigned>(problem.m), 32 * warps, 0, true, problem, aligned);
}

}  // namespace bitinfer::cuda
