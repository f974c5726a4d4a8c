// popcount_gemm with binary tensor cores: the formula and the pipeline stand in popcount_tiled.cuh.
//
//   C[n, c] = popcount(w[n] & planes[c]) over a segment,   c = token * bits + plane
//   sum of q[t, k] over set bits = sum_b c_b * C[n, t * bits + b],   c_b = 2^b, the top one negative
//
// For any shape. Packed words are the operands as they are: 16 rows of words by eight rows of planes. A block of four
// warps makes 64 rows of 128 columns (16 tokens at eight bits, 128 at one), a warp 32 by 64.
//
// Planes are added up by the tensor cores as well. Counts below 1024 are exact in float16, a tile of results of one
// product is laid out as the left operand of the next, and so one m16n8k16 turns 16 columns of counts into sums: with
// the plane weights as the right operand, eight planes take four of them for 16 rows x 8 tokens. Counts become halves
// by setting the exponent: the half 0x6400 + c is 1024 + c, and since the plane weights sum to -1, adding 1024 corrects
// it.
//
// With long segments bound by the tensor cores and their feed from shared memory; with groups of 128 by the float32
// operations of the epilogue, about ten for each segment of each result.
#include <algorithm>
#include <type_traits>

#include "popcount_gemm_tiled.h"
#include "popcount_tiled.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kHalfOf1024 = 0x6400;
constexpr uint32_t kOnes = 0xffffffff;
constexpr int kTiles = kWarpColumns / 8;  // of columns, in a warp

// The right operands that add up kBits planes: of the products for a tile of eight tokens, one for each two tiles of
// columns. Column j weighs the columns of counts that are planes of token j, and no others.
template <int kBits>
struct PlaneWeights {
  uint32_t b[kBits / 2][2];
  int largest_count;

  __device__ PlaneWeights(int lane, const Cut& cut) : largest_count(cut.segment_words * static_cast<int>(kWordBits)) {
    const int token = lane / 4;
#pragma unroll
    for (int i = 0; i < kBits / 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = i * 16 + half * 8 + lane % 4 * 2;
        b[i][half] = weight(column, token) | weight(column + 1, token) << 16;
      }
    }
  }

 private:
  __device__ static uint32_t weight(int column, int token) {
    if (column / kBits != token) return 0;
    const int plane = column % kBits;
    return __half_as_ushort(__int2half_rn(plane == kBits - 1 ? -(1 << plane) : 1 << plane));
  }
};

struct Nothing {
  __device__ Nothing(int, const Cut&) {}
};

// out = sum_b c_b * counts of plane b, from halves(x, y) = the float16 numbers 1024 + x and 1024 + y
template <int kBits, class Halves>
__device__ __forceinline__ void add_planes(float (&out)[4], const PlaneWeights<kBits>& weights,
                                           const int (&count)[kTiles][4], int token_tile, Halves halves) {
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = 1024;
#pragma unroll
  for (int i = 0; i < kBits / 2; ++i) {
    const int (&x)[4] = count[token_tile * kBits + 2 * i], (&y)[4] = count[token_tile * kBits + 2 * i + 1];
    const uint32_t a[4] = {halves(x[0], x[1]), halves(x[2], x[3]), halves(y[0], y[1]), halves(y[2], y[3])};
    multiply_f16(out, a, weights.b[i][0], weights.b[i][1]);
  }
}

template <int kBits>
struct Binary {
  static constexpr int kStageWords = 16, kStages = 3, kTokens = kWarpColumns / kBits, kPitch = row_pitch(kStageWords);
  static constexpr int kMaxThreads = 128, kMinBlocks = kBits >= 4 ? 3 : 2;

  using Context = std::conditional_t<kBits == 1, Nothing, PlaneWeights<std::max(kBits, 2)>>;

  // of one tile of 16 rows; one bit needs the set bits of the rows too: ones[0] of row g, ones[2] of row g + 8
  struct Counts {
    int count[kTiles][4];
    int ones[4];
  };

  __device__ static void copy(uint32_t* to, int columns, const PopcountGemm& p, int64_t token0, bool units,
                              const Cut& cut, const Item& item) {
    copy_words<kStageWords, true>(to, columns, p.planes + token0 * kBits * cut.words, (p.m - token0) * kBits, units,
                                  cut, item);
  }

  // q is -1 where its bit is set and else 1: the sum over set bits of w is |w| - 2 |w & a|
  __device__ static void integers_of_signs(float (&out)[4], const Counts& counts, int j, int x0, int x1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int sum = counts.ones[e / 2 * 2] - 2 * counts.count[j][e];
      out[e] = static_cast<float>((e % 2 ? x1 : x0) - 2 * sum);
    }
  }
};

// Segments of at most 128 columns: a step is a segment.
template <int kBits>
struct BinaryNarrow : Binary<kBits> {
  using Base = Binary<kBits>;
  using Base::kPitch;
  static constexpr int kStepWords = 4, kMinBlocks = kBits == 8 ? 4 : Base::kMinBlocks;

  struct Sums {
    typename Base::Counts tile[2];
  };
  __device__ static void start(Sums&) {}

  __device__ static void step(Sums& sums, const uint32_t* rows, const uint32_t* columns, int step) {
    const int offset = threadIdx.x % 32 * kPitch + step * kStepWords;
    uint32_t a[4], b[kTiles];
    load_matrices(a, rows + offset);
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      load_matrices(reinterpret_cast<uint32_t (&)[4]>(b[j]), columns + j * 8 * kPitch + offset);
    }
    // counts start at what makes them halves
    constexpr int kStart = kBits == 1 ? 0 : kHalfOf1024;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        multiply_b1_k128(sums.tile[i].count[j], a[2 * i], a[2 * i + 1], b[j], kStart);
      }
      if constexpr (kBits == 1) multiply_b1_k128(sums.tile[i].ones, a[2 * i], a[2 * i + 1], kOnes, 0);
    }
  }

  __device__ static void integers(float (&out)[4], const typename Base::Context& context, const Sums& sums, int i,
                                  int j, int x0, int x1) {
    if constexpr (kBits == 1) {
      Base::integers_of_signs(out, sums.tile[i], j, x0, x1);
    } else {
      float sum[4];
      add_planes(sum, context, sums.tile[i].count, j, [](int x, int y) { return __byte_perm(x, y, 0x5410); });
      // exact: all terms are below 2^24
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] = fmaf(-2, sum[e], static_cast<float>(e % 2 ? x1 : x0));
    }
  }
};

// Segments of any length.
template <int kBits>
struct BinaryWide : Binary<kBits> {
  using Base = Binary<kBits>;
  using Base::kPitch;
  static constexpr int kStepWords = 8;

  struct Sums {
    typename Base::Counts tile[2];
  };

  __device__ static void start(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) sums.tile[i].count[j][e] = 0;
        sums.tile[i].ones[e] = 0;
      }
    }
  }

  __device__ static void step(Sums& sums, const uint32_t* rows, const uint32_t* columns, int step) {
    const int lane = threadIdx.x % 32;
    rows += lane % 16 * kPitch + lane / 16 * 4 + step * kStepWords;
    columns += (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 4 + step * kStepWords;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices(a[i], rows + i * 16 * kPitch);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      load_matrices(b, columns + j * 8 * kPitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_b1_k256(sums.tile[i].count[j], a[i], b[0], b[1]);
        multiply_b1_k256(sums.tile[i].count[j + 1], a[i], b[2], b[3]);
      }
    }
    if constexpr (kBits == 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply_b1_k256(sums.tile[i].ones, a[i], kOnes, kOnes);
    }
  }

  __device__ static void integers(float (&out)[4], const typename Base::Context& context, const Sums& sums, int i,
                                  int j, int x0, int x1) {
    if constexpr (kBits == 1) {
      Base::integers_of_signs(out, sums.tile[i], j, x0, x1);
    } else {
      // counts of any size, ten bits at a time: every digit's sum is exact in float32
      int sum[4] = {};
      for (int shift = 0; shift == 0 || context.largest_count >> shift != 0; shift += 10) {
        float digit[4];
        add_planes(digit, context, sums.tile[i].count, j, [shift](int x, int y) {
          return (__byte_perm(x >> shift, y >> shift, 0x5410) & 0x03ff03ff) | 0x64006400;
        });
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += __float2int_rn(digit[e]) << shift;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] = static_cast<float>((e % 2 ? x1 : x0) - 2 * sum[e]);
    }
  }
};

template <int kBits>
cudaError_t run(const PopcountGemm& p, const Launch& on) {
  constexpr Warps kLarge{2, 2};
  const int64_t segment = p.segment();
  return segment != 0 && segment <= 128 ? launch_popcount_gemm<BinaryNarrow<kBits>>(p, on, kLarge)
                                        : launch_popcount_gemm<BinaryWide<kBits>>(p, on, kLarge);
}

}  // namespace

cudaError_t popcount_gemm_tiled(const PopcountGemm& problem, const Launch& on) {
  switch (problem.bits) {
    case 8:
      return run<8>(problem, on);
    case 4:
      return run<4>(problem, on);
    case 2:
      return run<2>(problem, on);
    default:
      return run<1>(problem, on);
  }
}

}  // namespace bitinfer::cuda
