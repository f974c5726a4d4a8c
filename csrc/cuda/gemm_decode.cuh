// What the decode kernels share: copies to shared memory, and how the planes of a result are combined.
#pragma once

#include "common.cuh"
#include "fixed_point.h"
#include "gemm_decode.h"
#include "mma.cuh"

namespace bitinfer::cuda {

constexpr int kKWarps = 8;                       // that share the columns of a row tile
constexpr int kTileRows = 16, kChunkWords = 16;  // a chunk is 512 columns: 64 bytes of a row

// From one row of weights in shared memory to the next, in bytes: eight lanes read 16 bytes each of two rows without
// bank conflicts if it is an odd multiple of 64.
constexpr int pitch_of(int words) { return ((words + kChunkWords - 1) / kChunkWords * 64) | 64; }

// Numbers that a row has per slot: one a token, two a token in fixed point (its lower 16 bits and its upper 8), and for
// one-bit activations one more, the row's set bits.
constexpr int result_count(int m, int bits) { return bits == kFixedPointBits ? 2 * m : m + (bits == 1); }

// The work of a launch: one product, or several of one shape, each with blocks of its own one after the other.
template <class Shape, class Product>
struct One {
  Shape shape;
  Product only;

  __device__ __forceinline__ const Product& product(int&) const { return only; }
};

template <class Shape, class Product>
struct Several {
  Shape shape;
  Product of[kMaxProducts];
  int end[kMaxProducts];  // of each product's blocks

  // The product of a block, which becomes the number of the block within it.
  __device__ __forceinline__ const Product& product(int& block) const {
    const int i = (block >= end[0]) + (block >= end[1]);
    block -= i > 0 ? end[i - 1] : 0;
    return of[i];
  }
};
static_assert(kMaxProducts == 3);

inline int tiles_of(const Weight& w) { return static_cast<int>((w.n + kTileRows - 1) / kTileRows); }

// Blocks of a product, and of some, none of which has more than so many tiles.
inline int blocks_for(const Weight& w, int tiles) { return (tiles_of(w) + tiles - 1) / tiles; }

template <class Problem>
int blocks_for(std::span<const Problem> products, int tiles) {
  int blocks = 0;
  for (const Problem& p : products) blocks += blocks_for(p.weight, tiles);
  return blocks;
}

// Several products, made by product_of(problem, blocks).
template <class Shape, class Problem, class Make>
auto several(const Shape& shape, std::span<const Problem> products, int tiles, Make product_of) {
  Several<Shape, decltype(product_of(products[0], 1))> work{.shape = shape, .of = {}, .end = {}};
  int end = 0;
  for (size_t i = 0; i < kMaxProducts; ++i) {
    if (i < products.size()) {
      const int blocks = blocks_for(products[i].weight, tiles);
      work.of[i] = product_of(products[i], blocks);
      end += blocks;
    }
    work.end[i] = end;
  }
  return work;
}

// Whether words can be copied 16 bytes at a time.
inline bool is_aligned(const uint32_t* words) { return reinterpret_cast<uintptr_t>(words) % 16 == 0; }

__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// Copies rows [row0, row0 + rows) of packed words to shared memory, a warp a row; rows past the end are left out.
__device__ __forceinline__ void copy_rows(uint32_t to, int pitch, const uint32_t* signs, int64_t row0, int rows,
                                          int64_t end, int words) {
  const int lane = threadIdx.x & 31, warps = blockDim.x / 32;
  const int count = static_cast<int>(min(static_cast<int64_t>(rows), end - row0));
  for (int r = threadIdx.x / 32; r < count; r += warps) {
    const uint32_t* row = signs + (row0 + r) * words;
    for (int i = lane; i < words / 4; i += 32) copy_async(to + r * pitch + 16 * i, row + 4 * i);
  }
}

// Combines the planes of an accumulator (rows g and g + 8, columns 2t and 2t + 1 of a group of 8) into results and
// hands each to emit(result of the group, row, value).
template <int kBits, typename Emit>
__device__ __forceinline__ void combine_group(const int (&c)[4], int g, int t, Emit emit) {
  if constexpr (kBits >= 4) {
    // the top plane counts negative
    const int pair = kBits == 8 ? t : t & 1, low = 1 << (2 * pair), high = pair == kBits / 2 - 1 ? -2 * low : 2 * low;
    const int upper = c[0] * low + c[1] * high, lower = c[2] * low + c[3] * high;
    // even lanes take the upper row of their neighbour, odd lanes the lower
    int sum = (t & 1 ? lower : upper) + __shfl_xor_sync(~0u, t & 1 ? upper : lower, 1);
    if constexpr (kBits == 8) sum += __shfl_xor_sync(~0u, sum, 2);
    if (kBits == 4 || t < 2) emit(kBits == 8 ? 0 : t >> 1, g + 8 * (t & 1), sum);
  } else if constexpr (kBits == 2) {
    emit(t, g, c[0] - 2 * c[1]);
    emit(t, g + 8, c[2] - 2 * c[3]);
  } else {
    emit(2 * t, g, c[0]);
    emit(2 * t + 1, g, c[1]);
    emit(2 * t, g + 8, c[2]);
    emit(2 * t + 1, g + 8, c[3]);
  }
}

// Sums low16 and top8 of two rows (g and g + 8) over the four lanes of these rows. Each lane ends up with one of the
// four sums and hands it to emit(0 for low16 or 1 for top8, row, value).
template <typename Emit>
__device__ __forceinline__ void sum_of_lanes(const int (&low16)[2], const int (&top8)[2], int g, int t, Emit emit) {
  const bool odd = t & 1, upper_lanes = t & 2;
  int kept16 = (odd ? low16[1] : low16[0]) + __shfl_xor_sync(~0u, odd ? low16[0] : low16[1], 1);
  int kept8 = (odd ? top8[1] : top8[0]) + __shfl_xor_sync(~0u, odd ? top8[0] : top8[1], 1);
  const int sum = (upper_lanes ? kept8 : kept16) + __shfl_xor_sync(~0u, upper_lanes ? kept16 : kept8, 2);
  emit(t >> 1, g + 8 * (t & 1), sum);
}

// The same for the three groups of a token in fixed point: its planes 0 to 15 and 16 to 23 are a result each, since all
// 24 together would not fit an int.
template <typename Emit>
__device__ __forceinline__ void combine_fixed_point(const int (&low8)[4], const int (&middle8)[4],
                                                    const int (&high8)[4], int g, int t, Emit emit) {
  const int low = 1 << (2 * t), high = t == 3 ? -2 * low : 2 * low;
  int low16[2], top8[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = 2 * half;
    low16[half] = (low8[i] + 2 * low8[i + 1] + ((middle8[i] + 2 * middle8[i + 1]) << 8)) << (2 * t);
    top8[half] = high8[i] * low + high8[i + 1] * high;
  }
  sum_of_lanes(low16, top8, g, t, emit);
}

// scale * (low + 2^16 * high), exact before its last two roundings
__device__ __forceinline__ float scaled(float scale, int low, int high) {
  return scale * fmaf(static_cast<float>(high + (low >> 16)), 65536.0f, static_cast<float>(low & 0xffff));
}

template <int kBits, int kGroups, typename Emit>
__device__ __forceinline__ void combine_groups(const int (&c)[kGroups][4], int g, int t, Emit emit) {
  if constexpr (kBits == kFixedPointBits) {
    static_assert(kGroups % 3 == 0);
#pragma unroll
    for (int j = 0; j < kGroups; j += 3) {
      combine_fixed_point(c[j], c[j + 1], c[j + 2], g, t,
                          [&](int result, int row, int value) { emit(j / 3 * 2 + result, row, value); });
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      combine_group<kBits>(c[j], g, t,
                           [&](int result, int row, int value) { emit(j * (8 / kBits) + result, row, value); });
    }
  }
}

}  // namespace bitinfer::cuda
