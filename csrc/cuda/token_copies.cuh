// How weights, keys and values come to the shared memory of a block of decode_token.cu: by a warp of its own, which
// waits until a stage has left a place and then copies what comes there next, through all layers.
//
//   left by      comes
//   q, k, v      q, k or v of the next layer
//   attention    up and down: keys and values have their place until then
//   gate, up     output and gate of the next layer; floating point activations have planes in the output's place before
//   down         keys and values of the next layer
//
// It copies pieces of a size of which one after the other, each taking some 200 cycles to start, makes 80 % of what
// memory gives. Larger ones would make all of it, and keep what the other warps load waiting in line for thousands of
// cycles; smaller ones would make less.
#pragma once

#include "token_exchange.cuh"

namespace bitinfer::cuda {

enum TokenStage { kQkvStage, kAttentionStage, kGateStage, kDownStage, kTokenStages };
enum Copied { kQkvCopy, kCacheCopy, kOutCopy, kGateCopy, kUpCopy, kDownCopy, kCopies };

// A phase of each barrier is a layer.
struct TokenBarriers {
  uint64_t left[kTokenStages], there[kCopies];

  // by one thread
  __device__ __forceinline__ void init() {
    for (uint64_t& barrier : left) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : there) barrier_init(shared_address(&barrier), 1);
    barrier_init_fence();
  }
  // by all threads that compute
  __device__ __forceinline__ void leave(TokenStage stage) {
    fence_async_proxy();  // what they wrote, before what is copied there
    sync_threads();
    if (threadIdx.x == kThreads - 1) barrier_arrive(shared_address(left + stage));
  }
  __device__ __forceinline__ void wait_for(Copied what, int layer) {
    barrier_wait(shared_address(there + what), layer & 1);
  }
};

__device__ __forceinline__ void fetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// Slots of a block's part of the cache that fit in shared memory.
__device__ __forceinline__ int slots_there(const AttentionShare& share, const TokenPlan& plan) {
  return min(share.end - share.begin, plan.cache_slots);
}

template <typename T, int kDim, int kBits>
struct Copies {
  const DecodeToken& p;
  const TokenPlan& plan;
  const Common& common;
  TokenBarriers& barriers;
  uint32_t shared;  // address

  __device__ void run() const {
    const bool first = threadIdx.x % 32 == 0;
    if (first) {
      qkv(0);
      cache(0);
      out(0);
      gate(0);
    }
    for (int layer = 0; layer < p.layer_count; ++layer) {
      const int next = layer + 1;
      if (next < p.layer_count) fetch_factors(p.layers[next]);
      if (!first) continue;
      wait_until_left(kQkvStage, layer);
      qkv(next);
      wait_until_left(kAttentionStage, layer);
      up(layer);
      down(layer);
      wait_until_left(kGateStage, layer);
      out(next);
      gate(next);
      wait_until_left(kDownStage, layer);
      cache(next);
    }
  }

 private:
  static constexpr uint32_t kPiece = 4096;

  __device__ void wait_until_left(TokenStage stage, int layer) const {
    barrier_wait(shared_address(barriers.left + stage), layer & 1);
  }
  __device__ void announce(Copied what, uint32_t bytes) const {
    barrier_arrive_expecting(shared_address(barriers.there + what), bytes);
  }
  __device__ void copy(int at, const void* from, uint32_t bytes, Copied what) const {
    for (uint32_t done = 0; done < bytes; done += kPiece) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared + at + done),
                   "l"(static_cast<const unsigned char*>(from) + done), "r"(min(kPiece, bytes - done)),
                   "r"(shared_address(barriers.there + what))
                   : "memory");
    }
  }
  // A share of n rows of k, which lie together in memory, and in shared memory too: rows without padding cost some bank
  // conflicts, a copy for each row would cost more.
  __device__ void weights(int layer, int which, Copied what, int at, int n, int k, const Share& share) const {
    const int rows = min(share.count * kTileRows, n - share.first * kTileRows);
    if (layer >= p.layer_count || rows <= 0) return;
    const auto* const signs = reinterpret_cast<const unsigned char*>(p.layers[layer].of[which].signs);
    const uint32_t bytes = static_cast<uint32_t>(rows) * (k / 8);
    announce(what, bytes);
    copy(at, signs + int64_t{share.first} * kTileRows * (k / 8), bytes, what);
  }
  __device__ void qkv(int layer) const {
    weights(layer, common.projection, kQkvCopy, 0, p.shape.heads * kDim, p.shape.hidden, common.qkv);
  }
  __device__ void out(int layer) const {
    weights(layer, kOutput, kOutCopy, plan.out_at, p.shape.hidden, p.shape.heads * kDim, common.out);
  }
  __device__ void gate(int layer) const {
    weights(layer, kGate, kGateCopy, plan.gate_at, p.shape.inner, p.shape.hidden, common.gate);
  }
  __device__ void up(int layer) const {
    weights(layer, kUp, kUpCopy, plan.up_at, p.shape.inner, p.shape.hidden, common.gate);
  }
  __device__ void down(int layer) const {
    weights(layer, kDown, kDownCopy, plan.down_at, p.shape.hidden, p.shape.inner, common.of_down);
  }
  __device__ void cache(int layer) const {
    const AttentionShare& share = common.attention;
    if (layer >= p.layer_count || share.head >= p.shape.heads) return;
    constexpr int kRow = cache_row_bytes(kDim, kBits);
    // copies begin and end at multiples of 16 bytes, and so every other rounded row does: of an odd number one more
    const int slots = (slots_there(share, plan) + 1) / 2 * 2;
    const uint32_t bytes = static_cast<uint32_t>(slots) * kRow;
    const int64_t at = ((static_cast<int64_t>(layer) * p.shape.heads + share.head) * p.capacity + share.begin) * kRow;
    announce(kCacheCopy, 2 * bytes);
    copy(plan.cache_at, static_cast<const unsigned char*>(p.keys) + at, bytes, kCacheCopy);
    copy(plan.cache_at + plan.cache_slots * kRow, static_cast<const unsigned char*>(p.values) + at, bytes, kCacheCopy);
  }

  // Brings to L2 what a layer's stages will load: some lines of one vector of columns, and the factors of the block's
  // own rows.
  __device__ void fetch_factors(const TokenLayer& layer) const {
    constexpr int kVectors = 2 * kTokenProjections + 2, kLine = 128 / sizeof(T);
    const int lane = static_cast<int>(threadIdx.x) % 32, block = static_cast<int>(blockIdx.x);
    const int hidden = p.shape.hidden, inner = p.shape.inner, width = p.shape.heads * kDim;
    const int vector = block % kVectors, which = vector % kTokenProjections;
    const bool of_norm = vector >= 2 * kTokenProjections;
    const void* const row = of_norm                      ? (vector % 2 == 0 ? layer.input_norm : layer.post_norm)
                            : vector < kTokenProjections ? layer.of[which].in_scale
                                                         : layer.of[which].in_shift;
    const int columns = of_norm ? hidden : which == kOutput ? width : which == kDown ? inner : hidden;
    const int blocks = max(static_cast<int>(gridDim.x) / kVectors, 1);  // of a vector; some fetch again
    for (int line = block / kVectors % blocks * 32 + lane; row != nullptr && line * kLine < columns;
         line += 32 * blocks) {
      fetch_to_l2(static_cast<const T*>(row) + line * kLine);
    }
    if (lane >= kTokenProjections || !layer.of[lane].has_rows) return;
    const TokenMatrix& own = layer.of[lane];
    const bool inside = lane == kGate || lane == kUp;
    const Share share = inside                      ? common.gate
                        : lane == kOutput           ? common.out
                        : lane == kDown             ? common.of_down
                        : lane == common.projection ? common.qkv
                                                    : Share(0, 0, 1);
    const int n = inside ? inner : lane < kOutput ? width : hidden;
    const int end = min((share.first + share.count) * kTileRows, n);
    for (const Floats* of : {&own.scale, &own.group_shift, &own.bias}) {
      const int size = of->dtype == Dtype::kFloat32 ? 4 : 2;
      for (int at = share.first * kTileRows; *of && at < end; at += 32) {
        fetch_to_l2(static_cast<const unsigned char*>(of->data) + int64_t{at} * size);
      }
    }
  }
};

}  // namespace bitinfer::cuda
