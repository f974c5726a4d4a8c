// The blocks of decode_token.cu: who has what, and how they hand one another numbers.
//
// What a block sends are words of a 16-bit number and above it a tag, which is another for each layer and launch. Who
// reads polls the numbers themselves until they have the tag: one trip to L2 and one from it, where a flag would take a
// fence, its own trip, and the numbers after it. A vector has one place for all layers: whoever reads it goes on to
// send what the next layer's senders of this vector wait for.
#pragma once

#include "decode_token.h"
#include "gemm_decode.cuh"
#include "pack_row.cuh"

namespace bitinfer::cuda {

constexpr int kWarps = 16, kThreads = 32 * kWarps;

// The thread, as if it could have changed: what is derived from it shall be computed again for each stage, not kept for
// all layers in registers that there are not.
__device__ __forceinline__ int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Tiles of a block.
struct Share {
  int first, count;

  Share() = default;
  __device__ Share(int tiles, int block, int blocks) {
    first = block * (tiles / blocks) + min(block, tiles % blocks);
    count = tiles / blocks + (block < tiles % blocks);
  }
  // a thread writes the output of a row
  __device__ __forceinline__ int row_of_thread() const { return first * kTileRows + thread_index(); }
  __device__ __forceinline__ bool has_thread(int n) const {
    return thread_index() < count * kTileRows && row_of_thread() < n;
  }
};

// What a block attends to: its head, and its slots before the new one.
struct AttentionShare {
  int head, rank, splits, slot, begin, end;
};

// What a block knows for all layers, in shared memory, since registers are few.
struct Common {
  uint32_t *q, *k, *v, *attended, *o, *m, *down;  // activations between stages
  uint32_t* projected;                            // q, k or v: no block has some of two
  uint32_t layers;                                // done by earlier launches
  int projection;
  Share qkv, out, gate, of_down;
  AttentionShare attention;
};

// A barrier of the threads that compute.
__device__ __forceinline__ void sync_threads() { named_barrier(1, kThreads); }

template <typename T>
__device__ __forceinline__ void send(uint32_t* to, float value, uint32_t tag) {
  const T number = from_float<T>(value);
  const uint32_t word = tag | reinterpret_cast<const unsigned short&>(number);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// Bits at 16 and above that are set where one of four words has another tag.
__device__ __forceinline__ uint32_t wrong_tags(const uint4& words, uint32_t tag) {
  return (words.x ^ tag) | (words.y ^ tag) | (words.z ^ tag) | (words.w ^ tag);
}

// Two quads, one behind the other, if they are asked for again.
__device__ __forceinline__ void poll_again(const uint32_t* from, bool again, uint4& low, uint4& high) {
  asm volatile(
      "{\n.reg .pred again;\nsetp.ne.u32 again, %8, 0;\n"
      "@again ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%9];\n"
      "@again ld.relaxed.gpu.global.v4.u32 {%4, %5, %6, %7}, [%9+16];\n}"
      : "+r"(low.x), "+r"(low.y), "+r"(low.z), "+r"(low.w), "+r"(high.x), "+r"(high.y), "+r"(high.z), "+r"(high.w)
      : "r"(static_cast<uint32_t>(again)), "l"(from)
      : "memory");
}

// Octets at some columns of a vector; those from column k on are zeros.
template <int kCount>
__device__ __forceinline__ void receive(const uint32_t* row, const int (&columns)[kCount], int k, uint32_t tag,
                                        uint4 (&to)[kCount]) {
  uint4 low[kCount], high[kCount];
  bool missing[kCount], any;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    low[i] = high[i] = make_uint4(tag, tag, tag, tag);
    missing[i] = columns[i] < k;
  }
  do {
#pragma unroll
    for (int i = 0; i < kCount; ++i) poll_again(row + columns[i], missing[i], low[i], high[i]);
    any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      missing[i] = (wrong_tags(low[i], tag) | wrong_tags(high[i], tag)) >> 16 != 0;
      any = any || missing[i];
    }
  } while (any);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    to[i] = make_uint4(__byte_perm(low[i].x, low[i].y, 0x5410), __byte_perm(low[i].z, low[i].w, 0x5410),
                       __byte_perm(high[i].x, high[i].y, 0x5410), __byte_perm(high[i].z, high[i].w, 0x5410));
  }
}

}  // namespace bitinfer::cuda
