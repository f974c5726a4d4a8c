// y[t, n] = sum_p sum_g scale[p, n, g] * (S_p z[t])_g + group_shift[n, g] * (sum of z[t] over g) + in_shift . x[t]
//           + bias[n],   z = in_scale * x
//
// with float16 tensor cores and float32 sums, for any shape, type and alignment. Two kernels.
//
// prepare_kernel, a block for a token, writes what multiplies: z scaled by a power of two that brings the token's
// largest |z| to [2^14, 2^15), as one float16 number or as the sum of two. One is exact for float16 and bfloat16 x,
// down to 2^-32 of the largest; with an in_scale, bfloat16 x gets one too, rounded to 11 bits, an eighth of that type's
// own rounding. float32 x, and float16 x with an in_scale, get two: 22 bits. A token that holds an infinity or a NaN
// gets the factor NaN, and zeros to multiply, so that it spoils its own outputs only. Bound by memory.
//
// multiply_kernel: a block of four warps makes 128 rows of 64 tokens, a warp 64 by 32. The left operand is +1 and -1
// made of packed words in registers, two operations for two weights, used for four tiles of tokens. Sums of 512 columns
// are added up with rounding, since the tensor cores truncate. Bound by the tensor cores and their feed from shared
// memory.
//
// The order of columns inside a product is free. Lane t of a quad supplies columns of word t of four, which is 128
// columns in eight products: product u takes columns 2u, 2u + 16 and 2u + 1, 2u + 17 of each word. A pair of columns
// (s, s + 16) is two bits of a word that lie where a pair of halves has its signs, after a shift. Operands in memory
// have that order: for each 128 columns 16-byte units (s / 4, word), each the four pairs from s = 4 * unit on.
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "sign_gemm_tiled.h"
#include "tiled.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kUnitColumns = 128, kStageWords = 4;  // of a stage
constexpr int kStages = 3, kFlushStages = 4;        // stages between two additions with rounding
constexpr int kWarpRows = 64, kWarpTokens = 32;
constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;
// words of a token's 128 halves in shared memory, and 16 that let the lanes of two tokens read from different banks
constexpr int kTokenPitch = kUnitColumns / 2 + 16;
constexpr int kPrepareThreads = 256;

// float16 numbers that each z is the sum of
int parts_of(const SignGemm& p) {
  return p.x.dtype == Dtype::kFloat32 || (p.x.dtype == Dtype::kFloat16 && p.in_scale) ? 2 : 1;
}

Cut cut_of(const SignGemm& p) { return make_cut(p.weight, 0, kStageWords, kStageWords, parts_of(p)); }

struct Workspace {
  __half* z;         // [m, parts, units, 128], segments padded to whole units
  float* factor;     // [m]: what the scaling is undone with
  float* shift;      // [m]: in_shift . x
  float* unit_sum;   // [m, units]: sums of scaled z, with a group_shift
  float* group_sum;  // [m, segments], with a group_shift
  size_t bytes;
};

Workspace workspace_of(const SignGemm& p, void* memory) {
  const Cut cut = cut_of(p);
  const int64_t units = int64_t{cut.segments} * cut.chunks;
  Workspace w{};
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<std::byte*>(memory) + w.bytes);
    w.bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  take(w.z, p.m * cut.parts * units * kUnitColumns);
  take(w.factor, p.m);
  take(w.shift, p.m);
  if (p.weight.group_shift) {
    take(w.unit_sum, p.m * units);
    take(w.group_sum, p.m * cut.segments);
  }
  return w;
}

struct TokenSummary {
  float largest;  // of |z|
  float shift;    // in_shift . x
  int bad;        // something is not finite

  __device__ void add(const TokenSummary& other) {
    largest = fmaxf(largest, other.largest);
    shift += other.shift;
    bad |= other.bad;
  }
};

__device__ TokenSummary reduce_block(TokenSummary value) {
  __shared__ TokenSummary of_warp[kPrepareThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    TokenSummary other;
    other.largest = __shfl_xor_sync(~0u, value.largest, distance);
    other.shift = __shfl_xor_sync(~0u, value.shift, distance);
    other.bad = __shfl_xor_sync(~0u, value.bad, distance);
    value.add(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
  for (int i = 1; i < kPrepareThreads / 32; ++i) value.add(of_warp[i]);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ SignGemm p, const __grid_constant__ Cut cut,
                   const __grid_constant__ Workspace workspace) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, k = p.weight.k;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* x = static_cast<const T*>(p.x.data) + token * p.stride;
  const bool scales = p.in_scale.data != nullptr;

  TokenSummary summary{};
  for (int64_t i = threadIdx.x; i < k; i += kPrepareThreads) {
    const float value = to_float(__ldcg(x + i)), z = scales ? value * load_float(p.in_scale, i) : value;
    summary.largest = fmaxf(summary.largest, fabsf(z));
    summary.bad |= !isfinite(z);
    if (p.in_shift.data != nullptr) summary.shift = fmaf(value, load_float(p.in_shift, i), summary.shift);
  }
  summary = reduce_block(summary);
  const bool bad = summary.bad != 0;
  // both powers of two are normal numbers; tokens below 2^-112 lose accuracy
  const int exponent = bad || summary.largest == 0 ? 0 : max(-126, min(126, 14 - ilogbf(summary.largest)));
  if (threadIdx.x == 0) {
    workspace.factor[token] = bad ? NAN : ldexpf(1, -exponent);
    workspace.shift[token] = summary.shift;
  }
  const float power = ldexpf(1, exponent);

  const int64_t segment_columns = int64_t{cut.segment_words} * kWordBits;
  const int units = cut.segments * cut.chunks;
  __half* out = workspace.z + token * cut.parts * units * kUnitColumns;
  for (int unit = warp; unit < units; unit += kPrepareThreads / 32) {
    const int segment = unit / cut.chunks, chunk = unit % cut.chunks;
    float z[kStageWords], sum = 0;
#pragma unroll
    for (int word = 0; word < kStageWords; ++word) {
      const int64_t offset = (int64_t{chunk} * kStageWords + word) * kWordBits + lane;
      const int64_t column = segment * segment_columns + offset;
      z[word] = 0;
      if (!bad && offset < segment_columns && column < k) {
        z[word] = to_float(__ldcg(x + column));
        if (scales) z[word] *= load_float(p.in_scale, column);
        z[word] *= power;
      }
      sum += z[word];
    }
    for (int part = 0; part < cut.parts; ++part) {
      __half* to = out + (static_cast<int64_t>(part) * units + unit) * kUnitColumns;
#pragma unroll
      for (int word = 0; word < kStageWords; word += 2) {
        // the lower lanes pair up columns of this word, the upper ones those of the next
        const __half first = __float2half_rn(z[word]), second = __float2half_rn(z[word + 1]);
        const __half other = __shfl_xor_sync(~0u, lane < 16 ? second : first, 16);
        const __half2 pair = lane < 16 ? __halves2half2(first, other) : __halves2half2(other, second);
        const int place = lane % 16 / 4 * kStageWords + word + lane / 16;
        *reinterpret_cast<__half2*>(to + place * 8 + lane % 4 * 2) = pair;
        z[word] -= __half2float(first);
        z[word + 1] -= __half2float(second);
      }
    }
    if (p.weight.group_shift.data != nullptr) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane == 0) workspace.unit_sum[token * units + unit] = sum;
    }
  }
  if (p.weight.group_shift.data == nullptr) return;
  __syncthreads();
  for (int segment = threadIdx.x; segment < cut.segments; segment += kPrepareThreads) {
    float sum = 0;
    for (int i = 0; i < cut.chunks; ++i) sum += __ldcg(workspace.unit_sum + token * units + segment * cut.chunks + i);
    workspace.group_sum[token * cut.segments + segment] = sum;
  }
}

// Where things lie in a stage, in words of 4 bytes.
struct StageLayout {
  int rows, tokens;

  __host__ __device__ explicit StageLayout(const Warps& warps)
      : rows(kWarpRows * warps.down), tokens(kWarpTokens * warps.across) {}
  __host__ __device__ int z() const { return rows * row_pitch(kStageWords); }
  __host__ __device__ int scale() const { return z() + tokens * kTokenPitch; }
  __host__ __device__ int shift() const { return scale() + rows; }
  __host__ __device__ int group_sum() const { return shift() + rows; }
  __host__ __device__ int size() const { return group_sum() + tokens; }
};

// +1 and -1 as halves, for columns s and s + 16 of a word.
__device__ __forceinline__ uint32_t sign_pair(uint32_t word, int s) {
  return (word << (15 - s) & 0x80008000) | 0x3c003c00;
}

using Sums = float[kRowTiles][kTokenTiles][4];

// sums += signs of the warp's rows * z of its tokens, over 128 columns
__device__ __forceinline__ void multiply_stage(Sums& sums, const uint32_t* rows, const uint32_t* z) {
  const int lane = threadIdx.x % 32;
  uint32_t words[kRowTiles / 2][4];  // word t of rows g, g + 8, ... g + 56
#pragma unroll
  for (int i = 0; i < kRowTiles / 2; ++i) load_matrices(words[i], rows + (i * 32 + lane) * row_pitch(kStageWords));
  z += lane / 4 * kTokenPitch + lane % 4 * 4;
#pragma unroll
  for (int unit = 0; unit < 4; ++unit) {
    uint4 b[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      b[j] = *reinterpret_cast<const uint4*>(z + j * 8 * kTokenPitch + unit * 16);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = sign_pair(words[i / 2][i % 2 * 2 + r % 2], unit * 4 + half * 2 + r / 2);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          multiply_f16(sums[i][j], a, half == 0 ? b[j].x : b[j].z, half == 0 ? b[j].y : b[j].w);
        }
      }
    }
  }
}

// a += row_scale * sums; sums = 0
__device__ __forceinline__ void flush(Sums& a, Sums& sums, const float* row_scale) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const float scale[2] = {row_scale[i * 16], row_scale[i * 16 + 8]};
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[i][j][e] = fmaf(scale[e / 2], sums[i][j][e], a[i][j][e]);
        sums[i][j][e] = 0;
      }
    }
  }
}

// a += row_shift * group_sum
__device__ __forceinline__ void add_group_shift(Sums& a, const float* row_shift, const float* group_sum) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const float2 sum = *reinterpret_cast<const float2*>(group_sum + j * 8);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][j][e] = fmaf(row_shift[i * 16 + e / 2 * 8], e % 2 ? sum.y : sum.x, a[i][j][e]);
    }
  }
}

__global__ void __launch_bounds__(128, 2)
    multiply_kernel(const __grid_constant__ SignGemm p, const __grid_constant__ Cut cut,
                    const __grid_constant__ Workspace workspace, Warps warps, bool weight_units) {
  constexpr int kAhead = kStages - 1;
  extern __shared__ uint4 shared[];
  uint32_t* const memory = reinterpret_cast<uint32_t*>(shared);
  const StageLayout layout(warps);
  const Weight& w = p.weight;
  const int64_t row_tiles = (w.n + layout.rows - 1) / layout.rows;
  const int64_t row0 = blockIdx.x % row_tiles * layout.rows, token0 = blockIdx.x / row_tiles * layout.tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / warps.across * kWarpRows, warp_token = warp % warps.across * kWarpTokens;
  const int items = cut.items(), units = cut.segments * cut.chunks;
  const bool group_shift = w.group_shift.data != nullptr;
  allow_next_kernel();

  const auto flushes = [&](const Item& item) { return item.ends || item.pass % kFlushStages == kFlushStages - 1; };
  const auto copy_weight = [&](int index) {
    const Item item = get_item<kStageWords>(cut, index);
    const int64_t first = item.plane * w.n + row0;
    uint32_t* stage = memory + index % kStages * layout.size();
    copy_words<kStageWords, false>(stage, layout.rows, w.signs + first * cut.words, w.n - row0, weight_units, cut,
                                   item);
    if (!flushes(item)) return;
    copy_row_scales(reinterpret_cast<float*>(stage + layout.scale()), layout.rows, w.scale, first, w.n - row0,
                    cut.segments, cut, item);
    if (group_shift) {
      copy_row_scales(reinterpret_cast<float*>(stage + layout.shift()), layout.rows, w.group_shift, row0, w.n - row0,
                      cut.segments, cut, item);
    }
  };
  const auto copy_tokens = [&](int index) {
    const Item item = get_item<kStageWords>(cut, index);
    uint32_t* stage = memory + index % kStages * layout.size();
    const int unit = item.segment * cut.chunks + item.chunk;
    const int place = threadIdx.x % 16;
#pragma unroll 4
    for (int token = threadIdx.x / 16; token < layout.tokens; token += blockDim.x / 16) {
      uint32_t* target = stage + layout.z() + token * kTokenPitch + place * 4;
      const int64_t row = (token0 + token) * cut.parts + item.part;
      if (token0 + token < p.m) {
        copy_async_16(target, workspace.z + (row * units + unit) * kUnitColumns + place * 8);
      } else {
        *reinterpret_cast<uint4*>(target) = uint4{};
      }
    }
    if (!group_shift || !item.ends) return;
    float* sum = reinterpret_cast<float*>(stage + layout.group_sum());
    for (int token = threadIdx.x; token < layout.tokens; token += blockDim.x) {
      sum[token] =
          token0 + token < p.m ? __ldcg(workspace.group_sum + (token0 + token) * cut.segments + item.segment) : 0;
    }
  };

  for (int i = 0; i < kAhead && i < items; ++i) copy_weight(i);
  wait_for_previous_kernel();
  for (int i = 0; i < kAhead; ++i) {
    if (i < items) copy_tokens(i);
    copy_async_commit();
  }

  Sums a = {}, sums = {};
  for (int index = 0; index < items; ++index) {
    copy_async_wait<kAhead - 1>();
    __syncthreads();
    if (index + kAhead < items) {
      copy_weight(index + kAhead);
      copy_tokens(index + kAhead);
    }
    copy_async_commit();

    const Item item = get_item<kStageWords>(cut, index);
    const uint32_t* stage = memory + index % kStages * layout.size();
    multiply_stage(sums, stage + warp_row * row_pitch(kStageWords), stage + layout.z() + warp_token * kTokenPitch);
    if (!flushes(item)) continue;
    const int row = warp_row + lane / 4;
    flush(a, sums, reinterpret_cast<const float*>(stage + layout.scale()) + row);
    if (group_shift && item.ends && item.plane == cut.planes - 1) {
      add_group_shift(a, reinterpret_cast<const float*>(stage + layout.shift()) + row,
                      reinterpret_cast<const float*>(stage + layout.group_sum()) + warp_token + lane % 4 * 2);
    }
  }

  __syncthreads();
  float* tile = reinterpret_cast<float*>(memory);
  put_results(tile + warp_token * result_pitch(layout.rows) + warp_row, layout.rows, a);
  __syncthreads();
  store_results(tile, layout.rows, layout.tokens, p.y, token0, p.m, row0, w.n,
                [&](float value, int64_t token, int64_t row) {
                  value = fmaf(value, __ldcg(workspace.factor + token), __ldcg(workspace.shift + token));
                  return w.bias.data != nullptr ? value + load_float(w.bias, row) : value;
                });
}

cudaError_t prepare(const SignGemm& p, const Cut& cut, const Workspace& workspace, const Launch& on) {
  const dim3 grid(static_cast<unsigned>(p.m)), block(kPrepareThreads);
  switch (p.x.dtype) {
    case Dtype::kFloat16:
      return launch(prepare_kernel<__half>, on, grid, block, 0, true, p, cut, workspace);
    case Dtype::kBFloat16:
      return launch(prepare_kernel<__nv_bfloat16>, on, grid, block, 0, true, p, cut, workspace);
    default:
      return launch(prepare_kernel<float>, on, grid, block, 0, true, p, cut, workspace);
  }
}

}  // namespace

size_t sign_gemm_tiled_workspace(const SignGemm& problem) { return workspace_of(problem, nullptr).bytes; }

cudaError_t sign_gemm_tiled(const SignGemm& p, void* memory, const Launch& on) {
  if (p.m == 0 || p.weight.n == 0) return cudaSuccess;
  const Cut cut = cut_of(p);
  const Workspace workspace = workspace_of(p, memory);
  const cudaError_t error = prepare(p, cut, workspace, on);
  if (error != cudaSuccess) return error;

  const auto blocks = [&](const StageLayout& tile) {
    return (p.weight.n + tile.rows - 1) / tile.rows * ((p.m + tile.tokens - 1) / tile.tokens);
  };
  constexpr Warps kLarge{2, 2};
  const Warps warps = blocks(StageLayout(kLarge)) >= on.device.multiprocessors ? kLarge : Warps{};
  const StageLayout tile(warps);
  const int words = std::max(kStages * tile.size(), tile.tokens * result_pitch(tile.rows));
  return launch(multiply_kernel, on, dim3(static_cast<unsigned>(blocks(tile))), dim3(32 * warps.down * warps.across),
                words * sizeof(uint32_t), true, p, cut, workspace, warps, copies_units(p.weight.signs, cut));
}

}  // namespace bitinfer::cuda
