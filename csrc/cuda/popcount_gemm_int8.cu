// popcount_gemm with int8 tensor cores, for GPUs that have no binary ones (from sm_100 on): the formula and the
// pipeline stand in popcount_tiled.cuh.
//
//   C[n, t] = sum of q[t, k] over the k of a segment whose weight bit is set = bits[n] . q[t]
//
// For any shape. The left operand is the weights' bits as bytes 0 and 1, expanded in registers: two operations for four
// weights, used for eight tiles of tokens. The right one is the activations' integers, put together from their planes
// on the way into shared memory. A block of four warps makes 128 rows of 64 tokens, a warp 32 by 64. Bound by the
// tensor cores, and by the latency of loading planes.
//
// The order of columns inside a product is free. Lane t of a quad supplies columns of word t of four: in product u of
// these 128 columns, columns u, u + 8, u + 16, u + 24 and u + 4, u + 12, u + 20, u + 28 of that word, which is
// (word >> u) & 0x01010101 and (word >> (u + 4)) & 0x01010101. Shared memory holds, for a token and four words, the 16
// bytes of q that go with the first kind for u = 0 to 3, word by word, and then the same for the second kind.
#include "popcount_gemm_tiled.h"
#include "popcount_tiled.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kTiles = kWarpColumns / 8;  // of tokens, in a warp

// x[b] bit 8*i + u becomes x[u] bit 8*i + b: in each byte an 8 x 8 transposition, halves first.
__device__ __forceinline__ void transpose_bits(uint32_t (&x)[8]) {
  constexpr uint32_t kMasks[3] = {0x0f0f0f0f, 0x33333333, 0x55555555};
#pragma unroll
  for (int round = 0; round < 3; ++round) {
    const int distance = 4 >> round;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint32_t swap = ((x[i] >> distance) ^ x[i + distance]) & kMasks[round];
      x[i + distance] ^= swap;
      x[i] ^= swap << distance;
    }
  }
}

struct Int8 {
  static constexpr int kStepWords = 4, kStageWords = 8, kStages = 2, kTokens = kWarpColumns;
  // 32 bytes a word, and 64 that let the lanes of two tokens read from different banks
  static constexpr int kPitch = kStageWords * 8 + 16;
  static constexpr int kMaxThreads = 128, kMinBlocks = 2;

  struct Context {
    __device__ Context(int, const Cut&) {}
  };

  struct Sums {
    int sum[2][kTiles][4];
  };

  __device__ static void start(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.sum[i][j][e] = 0;
      }
    }
  }

  __device__ static void copy(uint32_t* to, int tokens, const PopcountGemm& p, int64_t token0, bool, const Cut& cut,
                              const Item& item) {
    const int bits = static_cast<int>(p.bits);
    const int at = threadIdx.x % kStageWords, slot = kStageWords / cut.per_stage;
    const int offset = at % slot + item.chunk * kStageWords;
    const int word = (item.segment + at / slot) * cut.segment_words + offset;
    const bool valid = offset < cut.segment_words && word < cut.words;
    for (int token = threadIdx.x / kStageWords; token < tokens; token += blockDim.x / kStageWords) {
      // where there is nothing the weights' bits are zero, or the results are not stored
      uint32_t x[8] = {};
      if (valid && token0 + token < p.m) {
        const uint32_t* planes = p.planes + (token0 + token) * bits * cut.words + word;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          if (b < bits) x[b] = __ldcg(planes + static_cast<int64_t>(b) * cut.words);
        }
      }
      // the top plane is the sign; the one plane of one bit says -1, and where it does not, 1
#pragma unroll
      for (int b = 1; b < 8; ++b) {
        if (b >= bits) x[b] = x[b - 1];
      }
      if (bits == 1) x[0] = ~uint32_t{0};
      transpose_bits(x);
      uint32_t* target = to + token * kPitch + at / 4 * 32 + at % 4 * 4;
      *reinterpret_cast<uint4*>(target) = uint4{x[0], x[1], x[2], x[3]};
      *reinterpret_cast<uint4*>(target + 16) = uint4{x[4], x[5], x[6], x[7]};
    }
  }

  __device__ static void step(Sums& sums, const uint32_t* rows, const uint32_t* columns, int step) {
    const int lane = threadIdx.x % 32;
    uint32_t words[4];  // word t of rows g, g + 8, g + 16, g + 24
    load_matrices(words, rows + lane * row_pitch(kStageWords) + step * kStepWords);
    uint32_t a[2][4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][u][r] = words[2 * i + r % 2] >> (u + r / 2 * 4) & 0x01010101;
      }
    }
    columns += lane / 4 * kPitch + step * 32 + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 first = *reinterpret_cast<const uint4*>(columns + j * 8 * kPitch);
      const uint4 second = *reinterpret_cast<const uint4*>(columns + j * 8 * kPitch + 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_s8(sums.sum[i][j], a[i][0], first.x, second.x);
        multiply_s8(sums.sum[i][j], a[i][1], first.y, second.y);
        multiply_s8(sums.sum[i][j], a[i][2], first.z, second.z);
        multiply_s8(sums.sum[i][j], a[i][3], first.w, second.w);
      }
    }
  }

  __device__ static void integers(float (&out)[4], const Context&, const Sums& sums, int i, int j, int x0, int x1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = static_cast<float>((e % 2 ? x1 : x0) - 2 * sums.sum[i][j][e]);
  }
};

}  // namespace

cudaError_t popcount_gemm_int8(const PopcountGemm& problem, const Launch& on) {
  return launch_popcount_gemm<Int8>(problem, on, Warps{4, 1});
}

}  // namespace bitinfer::cuda
