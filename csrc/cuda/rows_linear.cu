// A head in 8 bits: y[t, v] = scale[v] * sum_k codes[v, k] * x[t, k] for a few tokens, int8 codes [V, K], x [M, K] of
// any of the three types.
//
// The codes are the left operand of mma.m16n8k16 and eight tokens its right one, since multiply-adds of eight tokens
// would take longer than reading the codes. A code of 8 bits is exact in either 16-bit type, and a float is the sum of
// three bfloat16 (24 bits are three times 8): all products are exact. Their sums over a chunk are the tensor core's,
// which truncates; those of chunks are added in float32.
//
// The order of columns within a product is free, so a lane takes 16 that follow each other, one load, for four
// products of four columns:
//
//   lane 4g + t     rows g and g + 8 of each tile, token g of each group: columns 16t to 16t + 15 of a chunk
//   warp            every fourth chunk of 64 columns; two chunks of two tiles of 16 rows in flight
//   block           32 rows, whose sums its warps exchange at the end, and one or two groups of eight tokens
//
// Blocks of the same rows for further tokens run side by side: they find the codes in level 2. x stays in L1, which the
// codes pass by. Rows that are not aligned to 16 bytes are loaded byte by byte: right, and slow.
//
// Bounds: bytes of the codes.
#include <type_traits>

#include "common.cuh"
#include "mma.cuh"
#include "rows_linear.h"

namespace bitinfer::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTiles = 2, kTileRows = 16, kRows = kTiles * kTileRows;
constexpr int kGroup = 8;  // tokens of a product
constexpr int kLaneColumns = 16, kChunkColumns = 4 * kLaneColumns;
constexpr int kAhead = 2;  // chunks that a warp has in flight

template <typename T>
using Factor = std::conditional_t<std::is_same_v<T, float>, __nv_bfloat16, T>;
template <typename T>
constexpr int kPieces = std::is_same_v<T, float> ? 3 : 1;

// Blocks of a multiprocessor. Those of one group have 32 to 64 KB of codes under way; 4.2 TB/s for a latency of 0.8 us
// are 25 KB to each of 132.
template <int kGroups, bool kAligned>
constexpr int kBlocks = kAligned && kGroups == 1 ? 4 : 3;

// d += A * B as mma.cuh has it for halves; the last argument only names the type.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  multiply_f16(d, a, b0, b1);
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename Pair>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  const Pair difference = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}

// Four codes as two pairs of numbers. 0x6400 | u is 1024 + u in halves, for u = code + 128.
__device__ __forceinline__ void to_pairs(uint32_t codes, uint32_t& first, uint32_t& second, __half) {
  const uint32_t shifted = codes ^ 0x80808080u;
  first = subtract<__half2>(__byte_perm(shifted, 0x64646464u, 0x4140), 0x64806480u);
  second = subtract<__half2>(__byte_perm(shifted, 0x64646464u, 0x4342), 0x64806480u);
}

// A bfloat16 holds seven bits behind its first: 0x4300 | u is 128 + u for u < 128, and with the sign of the code there,
// which weighs -128, 256. So a code is (128 + its lower seven bits) - (128, or 256 if it is negative).
__device__ __forceinline__ void to_pairs(uint32_t codes, uint32_t& first, uint32_t& second, __nv_bfloat16) {
  const auto pair = [](uint32_t both) { return subtract<__nv_bfloat162>(both & 0xff7fff7fu, both & 0xff80ff80u); };
  first = pair(__byte_perm(codes, 0x43434343u, 0x4140));
  second = pair(__byte_perm(codes, 0x43434343u, 0x4342));
}

__device__ __forceinline__ uint4 load_past_l1(const void* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// The 16 codes of a lane; zeros past k.
template <bool kAligned>
__device__ __forceinline__ void load_codes(const int8_t* row, int column, int k, uint32_t (&words)[4]) {
  if constexpr (kAligned) {
    const uint4 v = column < k ? load_past_l1(row + column) : uint4{};
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      words[word] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column + 4 * word + i;
        if (at < k) words[word] |= uint32_t{static_cast<uint8_t>(row[at])} << 8 * i;
      }
    }
  }
}

// Eight columns of x in pairs, each of a float's pieces by itself; zeros past k, and for tokens that there are not.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_x(const T* row, bool there, int column, int k,
                                       uint32_t (&pairs)[kPieces<T>][kGroup / 2]) {
  constexpr int kWords = 8 * sizeof(T) / 4;
  uint32_t words[kWords] = {};
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = there && column < k ? *reinterpret_cast<const uint4*>(row + column + i * 4 / sizeof(T)) : uint4{};
      words[i] = v.x;
      words[i + 1] = v.y;
      words[i + 2] = v.z;
      words[i + 3] = v.w;
    }
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const auto* bits = reinterpret_cast<const Bits*>(row);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (there && column + j < k) words[j * sizeof(T) / 4] |= uint32_t{bits[column + j]} << (j * sizeof(T) % 4 * 8);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (kPieces<T> == 1) {
      pairs[0][j] = words[j];
    } else {
#pragma unroll
      for (int piece = 0; piece < kPieces<T>; ++piece) {  // the upper half of what is left
        pairs[piece][j] = __byte_perm(words[2 * j], words[2 * j + 1], 0x7632);
#pragma unroll
        for (int i = 2 * j; i < 2 * j + 2; ++i) {
          words[i] = __float_as_uint(__uint_as_float(words[i]) - __uint_as_float(words[i] & 0xffff0000u));
        }
      }
    }
  }
}

template <typename T, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<kGroups, kAligned>)
    rows_linear_kernel(const __grid_constant__ RowsLinear p) {
  constexpr int kTokens = kGroups * kGroup;
  constexpr int kProducts = kGroups * kTiles;
  __shared__ float parts[kWarps][kProducts][4][32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4, k = static_cast<int>(p.k);
  const auto passes = static_cast<uint32_t>((p.m + kTokens - 1) / kTokens);
  const int64_t first_row = int64_t{blockIdx.x / passes} * kRows, first_token = int64_t{blockIdx.x % passes} * kTokens;
  const int8_t* rows[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    rows[i / 2][i % 2] = p.codes + min(first_row + i * 8 + g, p.n - 1) * p.k;  // rows past the last do its work again
  }
  const T* const x_row = static_cast<const T*>(p.x.data) + (first_token + g) * p.stride;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, p.m - first_token));
  float sums[kProducts][4] = {};
  allow_next_kernel();
  wait_for_previous_kernel();

  uint32_t codes[kAhead][kTiles][2][4];
  const auto load = [&](int ahead, int chunk) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      load_codes<kAligned>(rows[i / 2][i % 2], chunk + t * kLaneColumns, k, codes[ahead][i / 2][i % 2]);
    }
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) load(ahead, (warp + ahead * kWarps) * kChunkColumns);
  for (int first = warp * kChunkColumns; first < k; first += kAhead * kWarps * kChunkColumns) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int chunk = first + ahead * kWarps * kChunkColumns;
      if (chunk >= k) break;
      float chunk_sums[kProducts][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[kGroups][kPieces<T>][4];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int token = group * kGroup;
          load_x<kAligned>(x_row + token * p.stride, token + g < tokens, chunk + t * kLaneColumns + half * 8, k,
                           pairs[group]);
        }
#pragma unroll
        for (int word = 0; word < 2; ++word) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t a[4];
            to_pairs(codes[ahead][tile][0][2 * half + word], a[0], a[2], Factor<T>{});
            to_pairs(codes[ahead][tile][1][2 * half + word], a[1], a[3], Factor<T>{});
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
#pragma unroll
              for (int piece = kPieces<T>; piece-- > 0;) {  // the smallest first
                const auto& x = pairs[group][piece];
                multiply(chunk_sums[group * kTiles + tile], a, x[2 * word], x[2 * word + 1], Factor<T>{});
              }
            }
          }
        }
      }
      load(ahead, chunk + kAhead * kWarps * kChunkColumns);
#pragma unroll
      for (int i = 0; i < 4 * kProducts; ++i) sums[i / 4][i % 4] += chunk_sums[i / 4][i % 4];
    }
  }

  const int64_t row = first_row + lane;
  const float scale = row < p.n ? p.scale[row] : 0;  // on its way while the warps meet
#pragma unroll
  for (int i = 0; i < 4 * kProducts; ++i) parts[warp][i / 4][i % 4][lane] = sums[i / 4][i % 4];
  __syncthreads();
  if (row >= p.n) return;
  for (int token = warp; token < tokens; token += kWarps) {
    // this thread's row is lane % 16 of a tile: what of the product, and in which lane
    const int product = token / kGroup * kTiles + lane / kTileRows;
    const int place = lane % kTileRows / 8 * 2 + token % 2, holder = lane % 8 * 4 + token % kGroup / 2;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += parts[i][product][place][holder];
    static_cast<T*>(p.y)[(first_token + token) * p.n + row] = from_float<T>(scale * sum);
  }
}

template <typename T, int kGroups, bool kAligned>
cudaError_t launch_groups(const RowsLinear& p, const Launch& on) {
  const int64_t blocks = (p.n + kRows - 1) / kRows, passes = (p.m + kGroups * kGroup - 1) / (kGroups * kGroup);
  return launch(rows_linear_kernel<T, kGroups, kAligned>, on, dim3(static_cast<unsigned>(blocks * passes)),
                dim3(kThreads), 0, true, p);
}

template <typename T>
cudaError_t launch_type(const RowsLinear& p, const Launch& on) {
  const auto aligned = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0;
  };
  if (!aligned(p.codes, p.k) || !aligned(p.x.data, p.stride * int64_t{sizeof(T)})) {
    return launch_groups<T, 1, false>(p, on);
  }
  return p.m <= kGroup ? launch_groups<T, 1, true>(p, on) : launch_groups<T, 2, true>(p, on);
}

}  // namespace

cudaError_t rows_linear(const RowsLinear& p, const Launch& on) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  switch (p.x.dtype) {
    case Dtype::kFloat16:
      return launch_type<__half>(p, on);
    case Dtype::kBFloat16:
      return launch_type<__nv_bfloat16>(p, on);
    default:
      return launch_type<float>(p, on);
  }
}

}  // namespace bitinfer::cuda
