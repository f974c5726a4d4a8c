// Greedy decoding's end of a step, in one kernel:
//
//   s[t, v] = logits[t, v], or for tokens that were seen s / penalty if s > 0, else s * penalty
//   tokens[t] = finished[t] ? pad : the first v with the largest s;  finished[t] |= tokens[t] is an end
//
// and the token counts as seen, and the slot of the cache moves on. In float32, as transformers' processor does it. NaN
// is larger than all else.
//
//   block        a sequence; a thread looks at every kThreads-th group of kWidth logits
//
// Bounds: latency; 32,000 logits are 64 KB, that one multiprocessor reads from level 2 in about 2 us.
#include "choose_greedy.h"
#include "common.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kThreads = 1024, kWidth = 4;

// Orders by value, then the smaller index first: the larger key wins.
__device__ __forceinline__ uint64_t key_of(float value, int64_t index) {
  uint32_t bits = __float_as_uint(value);
  if (value != value) bits = 0x7fffffffu;
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__global__ void __launch_bounds__(kThreads) choose_greedy_kernel(const ChooseGreedy p) {
  __shared__ uint64_t best_of[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const Floats logits = {static_cast<const std::byte*>(p.logits.data) + row * p.stride * element_size(p.logits.dtype),
                         p.logits.dtype};
  bool* seen = p.seen == nullptr ? nullptr : p.seen + row * p.n;
  uint64_t best = 0;
  for (int64_t first = int64_t{thread} * kWidth; first < p.n; first += int64_t{kThreads} * kWidth) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t v = first + i;
      if (v >= p.n) break;
      float s = load_float(logits, v);
      if (seen != nullptr && seen[v]) s = s < 0 ? s * p.penalty : s / p.penalty;
      best = max(best, key_of(s, v));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) best = max(best, __shfl_xor_sync(~0u, best, distance));
  if (lane == 0) best_of[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = best_of[lane];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) best = max(best, __shfl_xor_sync(~0u, best, distance));
  if (lane > 0) return;
  const bool finished = p.finished[row];
  const int64_t token = finished ? *p.pad : static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(best));
  bool ends = finished;
  for (int64_t i = 0; i < p.end_count; ++i) ends = ends || token == p.ends[i];
  p.finished[row] = ends;
  p.tokens[row] = token;
  if (seen != nullptr) seen[token] = true;
  if (row == 0 && p.slot != nullptr) *p.slot += 1;
}

}  // namespace

cudaError_t choose_greedy(const ChooseGreedy& problem, const Launch& on) {
  if (problem.m == 0) return cudaSuccess;
  return launch(choose_greedy_kernel, on, static_cast<unsigned>(problem.m), kThreads, 0, false, problem);
}

}  // namespace bitinfer::cuda
