// What the tiled GEMM kernels share: how K is cut into stages of a pipeline, copies of packed words and of scales into
// shared memory, and the way of the results to y.
//
// A block makes `rows` outputs of `tokens` tokens. Each warp holds its part as tiles of 16 rows by 8 tokens, laid out
// over the lanes as mma.cuh says, for the whole length of K: whatever multiplies, lane 4*g + t owns rows g and g + 8
// and tokens 2t and 2t + 1 of a tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common.cuh"
#include "launch.h"
#include "mma.cuh"

namespace bitinfer::cuda {

// How K is cut. A segment is what one scale applies to: results are scaled and added up after each, for each weight
// plane. In shared memory a segment starts at a whole step of the matrix product and ends in words of zero, so that
// products need no mask. Short segments of a weight with one plane share a stage.
struct Cut {
  int words = 0;          // of a row
  int segments = 0;       // of a row
  int segment_words = 1;  // the last segment may have fewer
  int per_stage = 1;      // segments that share a stage, a power of two
  int chunks = 1;         // stages that a longer segment takes
  int planes = 1;         // of the weight
  int parts = 1;          // terms that the other operand is the sum of; each chunk is multiplied with all of them
  int per_group = 1;      // segments that share the scales of a row
  int per_block = 1;      // segments that share the scale of a token

  __host__ __device__ int passes() const { return chunks * parts; }
  __host__ __device__ int items() const { return passes() * planes * ((segments + per_stage - 1) / per_stage); }
};

inline Cut make_cut(const Weight& w, int64_t block_size, int stage_words, int step_words, int parts) {
  const int64_t segment = segment_size(block_size, w.group_size), words = std::max<int64_t>(w.words(), 1);
  const int64_t segments = group_count(w.k, segment);
  Cut cut;
  cut.words = static_cast<int>(w.words());
  cut.segments = static_cast<int>(segments);
  cut.segment_words = static_cast<int>(segment == 0 ? words : std::min(segment / kWordBits, words));
  cut.planes = static_cast<int>(w.planes);
  cut.parts = parts;
  const int padded = (cut.segment_words + step_words - 1) / step_words * step_words;
  if (cut.planes == 1 && parts == 1) {
    while (cut.per_stage * 2 * padded <= stage_words) cut.per_stage *= 2;
  }
  cut.chunks = (cut.segment_words + stage_words - 1) / stage_words;
  const auto ratio = [&](int64_t size) {  // with no size all segments share a scale
    return static_cast<int>(size == 0 ? std::max<int64_t>(segments, 1) : size / segment);
  };
  cut.per_group = ratio(w.group_size);
  cut.per_block = ratio(block_size);
  return cut;
}

// What a stage holds.
struct Item {
  int segment, count;  // the first segment, and how many
  int plane, chunk, part;
  int pass;   // counts the stages of a segment
  int words;  // of each segment, the padding left out
  bool ends;  // with this stage its segments are complete
};

template <int kStageWords>
__device__ __forceinline__ Item get_item(const Cut& cut, int index) {
  const int passes = cut.chunks * cut.parts, turn = index / passes;
  Item item;
  item.pass = index % passes;
  item.part = item.pass % cut.parts;
  item.chunk = item.pass / cut.parts;
  item.plane = turn % cut.planes;
  item.segment = turn / cut.planes * cut.per_stage;
  item.count = min(cut.per_stage, cut.segments - item.segment);
  item.words = min(kStageWords / cut.per_stage, cut.segment_words - item.chunk * kStageWords);
  item.ends = item.pass == passes - 1;
  return item;
}

// Words from one row to the next in shared memory: an odd number of 16-byte units, which spreads eight rows over all
// banks.
__host__ __device__ constexpr int row_pitch(int stage_words) {
  return stage_words % 8 == 0 ? stage_words + 4 : stage_words;
}

// Whether rows of packed words can be copied 16 bytes at a time.
inline bool copies_units(const uint32_t* words, const Cut& cut) {
  return reinterpret_cast<uintptr_t>(words) % 16 == 0 && cut.words % 4 == 0 && cut.segment_words % 4 == 0;
}

// Copies the item's words of `tile_rows` rows from `from` on, of which `rows` exist, to shared memory. kFresh: the
// previous kernel may have written them.
template <int kStageWords, bool kFresh>
__device__ __forceinline__ void copy_words(uint32_t* to, int tile_rows, const uint32_t* from, int64_t rows, bool units,
                                           const Cut& cut, const Item& item) {
  const int width = units ? 4 : 1, threads_per_row = kStageWords / width;
  const int at = threadIdx.x % threads_per_row * width;  // the same in all rows
  const int slot = kStageWords / cut.per_stage, local = at / slot;
  const int offset = at % slot + item.chunk * kStageWords;
  const int word = (item.segment + local) * cut.segment_words + offset;
  const bool valid = offset < cut.segment_words && word < cut.words;
  const int step = blockDim.x / threads_per_row;
#pragma unroll 4
  for (int row = threadIdx.x / threads_per_row; row < tile_rows; row += step) {
    uint32_t* target = to + row * row_pitch(kStageWords) + at;
    const uint32_t* source = from + static_cast<int64_t>(row) * cut.words + word;
    const bool inside = valid && row < rows;
    if (units) {
      if (inside) {
        copy_async_16(target, source);
      } else {
        *reinterpret_cast<uint4*>(target) = uint4{};
      }
    } else if (!inside) {
      *target = 0;
    } else if constexpr (kFresh) {
      *target = __ldcg(source);
    } else {
      copy_async_4(target, source);
    }
  }
}

// Copies the item's scales of rows, or ones if there are none: to[segment of the item][row of the tile]. `first` counts
// rows of `values`.
__device__ __forceinline__ void copy_row_scales(float* to, int tile_rows, const Floats& values, int64_t first,
                                                int64_t rows, int64_t groups, const Cut& cut, const Item& item) {
#pragma unroll 2
  for (int i = threadIdx.x; i < tile_rows * cut.per_stage; i += blockDim.x) {
    const int local = i % cut.per_stage, row = i / cut.per_stage;
    float value = 1;
    if (values.data != nullptr && local < item.count && row < rows) {
      value = load_float(values, (first + row) * groups + (item.segment + local) / cut.per_group);
    }
    to[local * tile_rows + row] = value;
  }
}

// Words from one token to the next in the tile of results; the lanes of a warp then write to different banks.
__host__ __device__ constexpr int result_pitch(int tile_rows) { return tile_rows + 4; }

// Writes a warp's results to the block's tile in shared memory; `tile` is where those of lane 0 begin.
template <int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void put_results(float* tile, int tile_rows, const float (&a)[kRowTiles][kTokenTiles][4]) {
  const int lane = threadIdx.x % 32, pitch = result_pitch(tile_rows);
  tile += lane % 4 * 2 * pitch + lane / 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[(j * 8 + e % 2) * pitch + i * 16 + e / 2 * 8] = a[i][j][e];
    }
  }
}

// Stores y[token0 ..., row0 ...] = finish(result, token, row) where these exist.
template <class Finish>
__device__ __forceinline__ void store_results(const float* tile, int tile_rows, int tile_tokens, const Output& y,
                                              int64_t token0, int64_t tokens, int64_t row0, int64_t rows,
                                              Finish finish) {
  for (int i = threadIdx.x; i < tile_rows * tile_tokens; i += blockDim.x) {
    const int row = i % tile_rows, token = i / tile_rows;
    if (row0 + row >= rows || token0 + token >= tokens) continue;
    store_float(y, token0 + token, row0 + row,
                finish(tile[token * result_pitch(tile_rows) + row], token0 + token, row0 + row));
  }
}

// How warps share a block's tile.
struct Warps {
  int down = 1, across = 1;  // over rows, over tokens
};

}  // namespace bitinfer::cuda
