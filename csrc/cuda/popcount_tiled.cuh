// The kernel behind popcount_gemm_tiled and popcount_gemm_int8, apart from the product itself, which `Multiplier`
// makes.
//
//   y[t, n] = sum_s (sum_p (act_scale * scale[p, n, s]) * I[p, s] + (act_scale * group_shift[n, s]) * act_sum[t, s])
//             + act_shift[t] + bias[n]
//   I[p, s] = act_sum[t, s] - 2 * sum of q[t, k] over the k in s whose bit is set
//
// in the order, and with the roundings, that bitinfer.ops.popcount_gemm fixes. A block makes 32*down rows of 64*across
// columns of the multiplier's second operand, which stand for kTokens tokens in each warp; it runs over K in a pipeline
// of kStages stages. Each result belongs to one lane from the first segment to the last: see tiled.cuh.
//
// A Multiplier M has:
//   kStepWords, kStageWords, kStages    words of K that a step takes, words in a stage, stages
//   kTokens                             of a warp
//   kMaxThreads, kMinBlocks             of a block, and blocks that share a multiprocessor: they bound registers
//   kPitch                              words of shared memory for a column of the second operand in one stage
//   Context(lane, cut)                  what a lane keeps over all of K
//   Sums, and start(sums)               integers of 32 rows x kTokens tokens under way
//   copy(...)                           planes to shared memory
//   step(sums, rows, columns, step)     adds a step of kStepWords; rows and columns are the warp's in shared memory
//   integers(out, context, sums, i, j, x0, x1)  float(I) of row tile i and token tile j; x0, x1: act_sum of two tokens
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiled.cuh"

namespace bitinfer::cuda {

inline constexpr int kWarpRows = 32, kWarpColumns = 64;  // of the popcount kernels

// Where things lie in a stage, in words of 4 bytes.
template <class M>
struct StageLayout {
  static constexpr int kSegments = M::kStageWords / M::kStepWords;  // at most
  int rows, columns, tokens;

  __host__ __device__ explicit StageLayout(const Warps& warps)
      : rows(kWarpRows * warps.down), columns(kWarpColumns * warps.across), tokens(M::kTokens * warps.across) {}
  __host__ __device__ int planes() const { return rows * row_pitch(M::kStageWords); }
  __host__ __device__ int scale() const { return planes() + columns * M::kPitch; }
  __host__ __device__ int shift() const { return scale() + kSegments * rows; }
  __host__ __device__ int token_scale() const { return shift() + kSegments * rows; }
  __host__ __device__ int token_sum() const { return token_scale() + kSegments * tokens; }
  __host__ __device__ int size() const { return token_sum() + kSegments * tokens; }
};

// to[segment of the item][token of the tile]
__device__ __forceinline__ void copy_token_scales(float* scale, int32_t* sum, int tile_tokens, const PopcountGemm& p,
                                                  int64_t token0, const Cut& cut, const Item& item) {
  const int64_t blocks = (cut.segments + cut.per_block - 1) / cut.per_block;
  for (int i = threadIdx.x; i < tile_tokens * cut.per_stage; i += blockDim.x) {
    const int local = i % cut.per_stage, token = i / cut.per_stage, segment = item.segment + local;
    const bool inside = local < item.count && token0 + token < p.m;
    scale[local * tile_tokens + token] =
        inside ? __ldcg(p.act_scale + (token0 + token) * blocks + segment / cut.per_block) : 0;
    sum[local * tile_tokens + token] = inside ? __ldcg(p.act_sum + (token0 + token) * cut.segments + segment) : 0;
  }
}

template <class M>
__global__ void __launch_bounds__(M::kMaxThreads, M::kMinBlocks)
    popcount_gemm_kernel(const __grid_constant__ PopcountGemm p, const __grid_constant__ Cut cut, Warps warps,
                         bool weight_units, bool plane_units) {
  constexpr int kTokenTiles = M::kTokens / 8, kAhead = M::kStages - 1;
  extern __shared__ uint4 shared[];
  uint32_t* const memory = reinterpret_cast<uint32_t*>(shared);
  const StageLayout<M> layout(warps);
  const Weight& w = p.weight;
  const int64_t row_tiles = (w.n + layout.rows - 1) / layout.rows;
  const int64_t row0 = blockIdx.x % row_tiles * layout.rows, token0 = blockIdx.x / row_tiles * layout.tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / warps.across * kWarpRows, warp_across = warp % warps.across;
  const int items = cut.items();
  const int64_t groups = (cut.segments + cut.per_group - 1) / cut.per_group;
  allow_next_kernel();

  const auto copy_weight = [&](int index) {
    const Item item = get_item<M::kStageWords>(cut, index);
    const int64_t first = item.plane * w.n + row0;
    uint32_t* stage = memory + index % M::kStages * layout.size();
    copy_words<M::kStageWords, false>(stage, layout.rows, w.signs + first * cut.words, w.n - row0, weight_units, cut,
                                      item);
    if (!item.ends) return;
    copy_row_scales(reinterpret_cast<float*>(stage + layout.scale()), layout.rows, w.scale, first, w.n - row0, groups,
                    cut, item);
    if (w.group_shift.data != nullptr && item.plane == cut.planes - 1) {
      copy_row_scales(reinterpret_cast<float*>(stage + layout.shift()), layout.rows, w.group_shift, row0, w.n - row0,
                      groups, cut, item);
    }
  };
  const auto copy_tokens = [&](int index) {
    const Item item = get_item<M::kStageWords>(cut, index);
    uint32_t* stage = memory + index % M::kStages * layout.size();
    M::copy(stage + layout.planes(), layout.columns, p, token0, plane_units, cut, item);
    if (!item.ends) return;
    copy_token_scales(reinterpret_cast<float*>(stage + layout.token_scale()),
                      reinterpret_cast<int32_t*>(stage + layout.token_sum()), layout.tokens, p, token0, cut, item);
  };

  for (int i = 0; i < kAhead && i < items; ++i) copy_weight(i);
  wait_for_previous_kernel();
  for (int i = 0; i < kAhead; ++i) {
    if (i < items) copy_tokens(i);
    copy_async_commit();
  }

  const typename M::Context context(lane, cut);
  float a[2][kTokenTiles][4] = {};
  typename M::Sums sums;
  M::start(sums);
  for (int index = 0; index < items; ++index) {
    copy_async_wait<kAhead - 1>();
    __syncthreads();
    if (index + kAhead < items) {
      copy_weight(index + kAhead);
      copy_tokens(index + kAhead);
    }
    copy_async_commit();

    const Item item = get_item<M::kStageWords>(cut, index);
    const uint32_t* stage = memory + index % M::kStages * layout.size();
    const uint32_t* rows = stage + warp_row * row_pitch(M::kStageWords);
    const uint32_t* columns = stage + layout.planes() + warp_across * kWarpColumns * M::kPitch;
    const int steps = (item.words + M::kStepWords - 1) / M::kStepWords;
    const bool shifts = w.group_shift.data != nullptr && item.plane == cut.planes - 1;
    for (int local = 0; local < item.count; ++local) {
      // the steps of a segment follow each other, and shared segments fill a stage
      for (int step = 0; step < steps; ++step) M::step(sums, rows, columns, local * steps + step);
      if (!item.ends) break;

      const float* row_scale = reinterpret_cast<const float*>(stage + layout.scale()) + local * layout.rows;
      const float* row_shift = reinterpret_cast<const float*>(stage + layout.shift()) + local * layout.rows;
      const int row = warp_row + lane / 4, token = local * layout.tokens + warp_across * M::kTokens + lane % 4 * 2;
      const float* token_scale = reinterpret_cast<const float*>(stage + layout.token_scale()) + token;
      const int32_t* token_sum = reinterpret_cast<const int32_t*>(stage + layout.token_sum()) + token;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(token_scale + j * 8);
        const int2 sum = *reinterpret_cast<const int2*>(token_sum + j * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float integers[4];
          M::integers(integers, context, sums, i, j, sum.x, sum.y);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float factor = __fmul_rn(e % 2 ? scale.y : scale.x, row_scale[row + i * 16 + e / 2 * 8]);
            a[i][j][e] = __fadd_rn(a[i][j][e], __fmul_rn(factor, integers[e]));
          }
          if (shifts) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float factor = __fmul_rn(e % 2 ? scale.y : scale.x, row_shift[row + i * 16 + e / 2 * 8]);
              a[i][j][e] = __fadd_rn(a[i][j][e], __fmul_rn(factor, static_cast<float>(e % 2 ? sum.y : sum.x)));
            }
          }
        }
      }
      M::start(sums);
    }
  }

  __syncthreads();
  float* tile = reinterpret_cast<float*>(memory);
  put_results(tile + warp_across * M::kTokens * result_pitch(layout.rows) + warp_row, layout.rows, a);
  __syncthreads();
  store_results(tile, layout.rows, layout.tokens, p.y, token0, p.m, row0, w.n,
                [&](float value, int64_t token, int64_t row) {
                  if (p.act_shift != nullptr) value = __fadd_rn(value, __ldcg(p.act_shift + token));
                  return w.bias.data != nullptr ? __fadd_rn(value, load_float(w.bias, row)) : value;
                });
}

// `large` is the block for problems that fill the device with it; others take one warp a block.
template <class M>
cudaError_t launch_popcount_gemm(const PopcountGemm& p, const Launch& on, const Warps& large) {
  if (p.m == 0 || p.weight.n == 0) return cudaSuccess;
  const Cut cut = make_cut(p.weight, p.block_size, M::kStageWords, M::kStepWords, 1);
  const auto blocks = [&](const StageLayout<M>& tile) {
    return (p.weight.n + tile.rows - 1) / tile.rows * ((p.m + tile.tokens - 1) / tile.tokens);
  };
  const Warps warps = blocks(StageLayout<M>(large)) >= on.device.multiprocessors ? large : Warps{};
  const StageLayout<M> tile(warps);
  const int words = std::max(M::kStages * tile.size(), tile.tokens * result_pitch(tile.rows));
  return launch(popcount_gemm_kernel<M>, on, dim3(static_cast<unsigned>(blocks(tile))),
                dim3(32 * warps.down * warps.across), words * sizeof(uint32_t), true, p, cut, warps,
                copies_units(p.weight.signs, cut), copies_units(p.planes, cut));
}

}  // namespace bitinfer::cuda
