// Reductions over the warps of a row, wherever they run, and the transposition of integers to bit planes.
//
// A row belongs to a team: one block, or on sm_90 a cluster of up to eight. Each warp publishes its part to the blocks
// that need it, and these combine the parts once all are there: one exchange a reduction, however large the team is.
// Within a cluster a part is stored and counted by one st.async, on a barrier of transactions in the block that it goes
// to. barrier.cluster would serve, but its release waits for all memory of the thread, and its acquire empties the L1.
#pragma once

#include <cstdint>
#include <type_traits>

#include "hopper.cuh"

namespace bitinfer::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxTeamBlocks = 8;  // what every device grants a cluster
constexpr int kMaxTeamWarps = 32 * kMaxTeamBlocks;

// One part for each warp of the team.
template <typename T>
using Parts = T[kMaxTeamWarps];

constexpr int kExchanges = 3;  // that a team can make, each once

struct Team {
  int blocks = 1, rank = 0;  // of the cluster, and of this block in it
  int warps, warp;           // of the team, and of this thread in it; a helper has the number of the warp it helps
  bool helps;                // warps past the first `row_warps` of a block are helpers
  uint64_t* barriers;        // shared, of the exchanges

  __device__ __forceinline__ Team(int row_warps, uint64_t (&barriers)[kExchanges]) : barriers(barriers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    const int warp_here = static_cast<int>(threadIdx.x) / 32;
    helps = warp_here >= row_warps;
    warps = blocks * row_warps;
    warp = rank * row_warps + (helps ? warp_here - row_warps : warp_here);
  }

  // Prepares the exchanges, in each of which this block will receive so many bytes. wait_for_start() must come before
  // the first is used, and by then costs nothing: no block may write to another's shared memory before that one runs.
  __device__ __forceinline__ void start(const int (&bytes)[kExchanges]) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks == 1) return;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kExchanges; ++i) barrier_init(shared_address(barriers + i), 1);
      barrier_init_fence();
#pragma unroll
      for (int i = 0; i < kExchanges; ++i) barrier_arrive_expecting(shared_address(barriers + i), bytes[i]);
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait_for_start() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // Makes the part of this warp, which all its lanes hold, known to all blocks of the team, or to its first.
  template <typename T>
  __device__ __forceinline__ void publish(int exchange, Parts<T>& parts, T value) const {
    send(exchange, parts, value, static_cast<int>(threadIdx.x) % 32, blocks);
  }
  template <typename T>
  __device__ __forceinline__ void publish_to_first(int exchange, Parts<T>& parts, T value) const {
    send(exchange, parts, value, static_cast<int>(threadIdx.x) % 32, 1);
  }

  // Waits until all parts are here; in a block alone `threads` of it call this, those that publish among them.
  __device__ __forceinline__ void settle(int exchange, int threads) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      barrier_wait(shared_address(barriers + exchange), 0);
      return;
    }
#endif
    named_barrier(1 + exchange, threads);
  }

  // Orders what all threads of a cluster wrote to memory; slow. In a block alone settle() does that.
  __device__ __forceinline__ void order_memory() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks == 1) return;
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

 private:
  template <typename T>
  __device__ __forceinline__ void send(int exchange, Parts<T>& parts, T value, int block, int count) const {
    if (block >= count) return;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      uint32_t target, barrier;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(target) : "r"(shared_address(&parts[warp])), "r"(block));
      asm("mapa.shared::cluster.u32 %0, %1, %2;"
          : "=r"(barrier)
          : "r"(shared_address(barriers + exchange)), "r"(block));
      if constexpr (sizeof(T) == 4) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target),
                     "r"(reinterpret_cast<const uint32_t&>(value)), "r"(barrier)
                     : "memory");
      } else {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(target),
                     "l"(reinterpret_cast<const uint64_t&>(value)), "r"(barrier)
                     : "memory");
      }
      return;
    }
#endif
    parts[warp] = value;
  }
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// What a warp makes of all parts, for every lane. Few parts take few steps: the next kernel waits for these.
template <typename T>
__device__ __forceinline__ T sum_of(const Parts<T>& parts, int count) {
  const int width = count < 32 ? 1 << (32 - __clz(count - 1)) : 32, lane = static_cast<int>(threadIdx.x) % 32;
  T total = 0;
#pragma unroll 1
  for (int i = lane % width; i < count; i += 32) total += parts[i];
  if constexpr (std::is_same_v<T, int32_t>) {
    return __reduce_add_sync(kAllLanes, lane < width ? total : 0);
  } else {
#pragma unroll 1
    for (int distance = width / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kAllLanes, total, distance);
    }
    return total;
  }
}

__device__ __forceinline__ uint32_t max_of(const Parts<uint32_t>& parts, int count) {
  uint32_t largest = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) largest = max(largest, parts[i]);
  return __reduce_max_sync(kAllLanes, largest);
}

// Transposes 8 x 8 bits, byte c of (low, high) being row c: afterwards bit c of byte b is what was bit b of byte c.
// 21 instructions for eight integers; ballots would take one vote and one test for each bit of each column, 128.
__device__ __forceinline__ void transpose_bits(uint32_t& low, uint32_t& high) {
  const auto within = [](uint32_t x) {
    uint32_t t = (x ^ (x >> 7)) & 0x00aa00aau;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000ccccu;
    return x ^ t ^ (t << 14);
  };
  low = within(low);
  high = within(high);
  const uint32_t t = (low ^ (high << 4)) & 0xf0f0f0f0u;
  low ^= t;
  high ^= t >> 4;
}

// Transposes 4 x 4 bytes over four neighbouring lanes: byte i of lane j becomes what was byte j of lane i.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t word) {
  const uint32_t lane = threadIdx.x;
  const uint32_t pair = __shfl_xor_sync(kAllLanes, word, 1);
  word = __byte_perm(word, pair, lane & 1 ? 0x3715 : 0x6240);
  const uint32_t other = __shfl_xor_sync(kAllLanes, word, 2);
  return __byte_perm(word, other, lane & 2 ? 0x3276 : 0x5410);
}

// Byte kByte of each of four words.
template <int kByte>
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  constexpr uint32_t kPair = kByte | (kByte + 4) << 4;
  return __byte_perm(__byte_perm(a, b, kPair), __byte_perm(c, d, kPair), 0x5410);
}

}  // namespace bitinfer::cuda
