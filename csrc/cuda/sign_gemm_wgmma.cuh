// What the kernels of sign_gemm_wgmma.cu share: the rings through which z and packed words come, the products with
// words that are expanded in registers, and the terms that finish a sum.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "hopper.cuh"
#include "wgmma_f16.cuh"

namespace bitinfer::cuda::sign_gemm_detail {

constexpr int kStageColumns = 128;  // of K in one stage of z: two boxes of 64
constexpr int kStageWords = kStageColumns / kWordBits;
constexpr int kBoxStages = 8;  // whose weights come in one box: 128 bytes of every row
constexpr int kGroup = 128;    // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kBlockRows = 64;  // of one product
// Words of in_scale that a lane needs for a stage, two columns each; and from one lane's to the next, so that the four
// lanes of a row read different banks.
constexpr int kColumnWords = kStageColumns / 8, kColumnPitch = kColumnWords + 4;

struct Problem {
  int m, n, k;
  Floats scale;          // [n, groups], or absent
  int groups;            // with one group, the scale is applied to the sums
  int group_stages;      // stages of a group
  const void* in_scale;  // [k] in the dtype of z, or absent; with one group only
  Floats bias;           // [n]
  const float* shift;    // [m], or absent
  Output y;
  bool stores_vectors;  // four neighbouring outputs at once

  __host__ __device__ int stages() const { return (k + kStageColumns - 1) / kStageColumns; }
};

constexpr int kWideTokens = 128, kWideRows = 256;  // of a tile of the wide kernel

// Tokens of a box of z, for tiles of some tokens.
__host__ __device__ constexpr int box_tokens(int tokens) { return tokens < 32 ? tokens : 32; }

// Boxes of a tile of kTokens tokens, the first of which is `token`, that hold any of the m.
template <int kTokens>
__host__ __device__ int box_count(int m, int token) {
  constexpr int kBox = box_tokens(kTokens);
  return (min(kTokens, m - token) + kBox - 1) / kBox;
}

struct Tile {
  bool whole;
  int row, token;
};

// What the wide kernel works through: whole tiles, then halves of tiles.
struct Tiles {
  int rows, whole, units;  // tiles from top to bottom of a column of tokens; whole tiles; those and halves

  __host__ __device__ Tile at(int unit) const {
    const int half = unit - whole, index = half < 0 ? unit : whole + half / 2;
    const int row = index % rows * kWideRows + (half < 0 ? 0 : half % 2 * (kWideRows / 2));
    return {half < 0, row, index / rows * kWideTokens};
  }
};

// Where things lie in shared memory.
template <int kTokens, int kBoxRows, int kStageSlots, int kBoxes>
struct Layout {
  static constexpr int kRows = kBoxRows, kStages = kStageSlots;
  static constexpr int kStageBytes = kTokens * kStageColumns * 2;
  static constexpr int kBoxBytes = kRows * 128;
  // of the groups of one box, or in_scale of its columns
  static constexpr int kScales = std::max(kRows, 4 * kColumnPitch * 2) * kBoxStages;

  static constexpr int kStageStart = 0;
  static constexpr int kBoxStart = kStageStart + kStages * kStageBytes;
  static constexpr int kScaleStart = kBoxStart + kBoxes * kBoxBytes;
  static constexpr int kConstantStart = kScaleStart + kBoxes * kScales * 2;  // of the rows, then of the tokens
  static constexpr int kBarrierStart =
      kConstantStart + kRows * static_cast<int>(sizeof(float2)) + kTokens * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kBarrierStart + (kStages + kBoxes + 1) * 16;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A ring of slots in shared memory that one side fills and the other empties; `i` counts fillings.
template <int kSlots>
struct Ring {
  uint32_t barriers;

  __device__ void init(int fill_arrivals, int empty_arrivals) const {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(full(i), fill_arrivals);
      barrier_init(empty(i), empty_arrivals);
    }
  }
  __device__ static int slot(uint32_t i) { return static_cast<int>(i % kSlots); }
  __device__ uint32_t full(uint32_t i) const { return barriers + slot(i) * 16; }
  __device__ uint32_t empty(uint32_t i) const { return full(i) + 8; }
  __device__ void wait_full(uint32_t i) const { barrier_wait(full(i), i / kSlots & 1); }
  __device__ void wait_empty(uint32_t i) const { barrier_wait(empty(i), (i / kSlots & 1) ^ 1); }
};

// z of one stage, in boxes of `kBoxTokens` tokens, of which `boxes` hold any; one thread calls it. TMA takes longer to
// fill rows that do not exist with zeros than to fetch others, so that boxes of such rows are left out: what lies there
// instead only reaches the sums of tokens that are not stored.
template <typename Shape, int kBoxTokens, int kSlots>
__device__ __forceinline__ void load_stage(const Ring<kSlots>& ring, uint32_t shared, const CUtensorMap* map,
                                           uint32_t i, int stage, int token, int boxes) {
  ring.wait_empty(i);
  const uint32_t to = shared + Shape::kStageStart + ring.slot(i) * Shape::kStageBytes;
  barrier_arrive_expecting(ring.full(i), boxes * kBoxTokens * kStageColumns * 2);
  for (int box = 0; box < boxes; ++box) {
    for (int half = 0; half < 2; ++half) {
      tma_load(to + half * (Shape::kStageBytes / 2) + box * (kBoxTokens * 128), map, ring.full(i),
               stage * kStageColumns + half * 64, token + box * kBoxTokens);
    }
  }
}

// Scales of the groups of some stages, as [stage][row] in 16 bits; a warp calls it. Rows past the last one repeat it.
template <typename T, int kRows, typename S>
__device__ __forceinline__ void load_scales(T* to, const S* scale, const Problem& p, int stage, int row, int rows) {
  constexpr int kBatch = 16;  // loads in flight
  const int lane = threadIdx.x % 32, of_box = lane % kBoxStages;
  const int group = min((stage + of_box) / p.group_stages, p.groups - 1);
  for (int start = lane / kBoxStages; start < rows; start += kBatch * (32 / kBoxStages)) {
    float values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = min(row + start + i * (32 / kBoxStages), p.n - 1);
      values[i] = to_float(scale[at * p.groups + group]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[of_box * kRows + start + i * (32 / kBoxStages)] = from_float<T>(values[i]);
    }
  }
}

template <typename T>
__device__ constexpr uint32_t two_ones() {
  return std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
}

// in_scale of the 1024 columns of a box, as [stage][lane % 4][word]: lane t needs columns 2t and 2t + 1 of each eight.
// A warp calls it.
__device__ __forceinline__ void load_columns(uint32_t* to, const Problem& p, int column) {
  constexpr int kBatch = 8;  // loads in flight
  const uint16_t* from = static_cast<const uint16_t*>(p.in_scale);
  for (int start = threadIdx.x % 32; start < kBoxStages * kStageColumns / 2; start += kBatch * 32) {
    uint32_t values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int first = column + (start + i * 32) * 2;
      values[i] = first < p.k ? from[first] : 0;
      values[i] |= (first + 1 < p.k ? uint32_t{from[first + 1]} : 0) << 16;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pair = start + i * 32, stage = pair / (kStageColumns / 2), word = pair / 4 % kColumnWords;
      to[(stage * 4 + pair % 4) * kColumnPitch + word] = values[i];
    }
  }
}

// Without groups and in_scale the scales of all stages are one; all threads call it, once.
template <typename T, typename Shape>
__device__ __forceinline__ void fill_scales(uint8_t* shared, const Problem& p) {
  if (p.groups > 1 || p.in_scale != nullptr) return;
  uint32_t* to = reinterpret_cast<uint32_t*>(shared + Shape::kScaleStart);
  for (int i = threadIdx.x; i < (Shape::kConstantStart - Shape::kScaleStart) / 4; i += blockDim.x)
    to[i] = two_ones<T>();
}

// Who fills a box: the copy of its words, and every lane of the warp that writes scales of groups or columns.
__device__ __forceinline__ int box_arrivals(const Problem& p) { return p.groups > 1 || p.in_scale != nullptr ? 33 : 1; }

// The words of eight stages; a warp calls it.
template <typename T, typename Shape, int kRows, int kBoxRows, int kSlots>
__device__ __forceinline__ void load_box(const Ring<kSlots>& ring, uint8_t* shared, const CUtensorMap* map, uint32_t i,
                                         const Problem& p, int stage, int row, int rows) {
  ring.wait_empty(i);
  const int slot = ring.slot(i);
  if (threadIdx.x % 32 == 0) {
    const uint32_t to = shared_address(shared) + Shape::kBoxStart + slot * Shape::kBoxBytes;
    barrier_arrive_expecting(ring.full(i), rows * 128);
    for (int part = 0; part < rows; part += kBoxRows) {
      tma_load(to + part * 128, map, ring.full(i), stage * kStageWords, row + part);
    }
  }
  T* scales = reinterpret_cast<T*>(shared + Shape::kScaleStart) + slot * Shape::kScales;
  if (p.in_scale != nullptr) {
    load_columns(reinterpret_cast<uint32_t*>(scales), p, stage * kStageColumns);
    barrier_arrive(ring.full(i));  // every lane for what it wrote itself
  } else if (p.groups > 1) {
    switch (p.scale.dtype) {
      case Dtype::kFloat32:
        load_scales<T, kRows>(scales, static_cast<const float*>(p.scale.data), p, stage, row, rows);
        break;
      case Dtype::kFloat16:
        load_scales<T, kRows>(scales, static_cast<const __half*>(p.scale.data), p, stage, row, rows);
        break;
      case Dtype::kBFloat16:
        load_scales<T, kRows>(scales, static_cast<const __nv_bfloat16*>(p.scale.data), p, stage, row, rows);
    }
    barrier_arrive(ring.full(i));
  }
}

// Two neighbouring weights of a fragment: `value` twice, with the top bits of byte kByte of `even` and `odd` as signs.
template <int kByte>
__device__ __forceinline__ uint32_t signed_pair(uint32_t even, uint32_t odd, uint32_t value) {
  constexpr uint32_t kSelector = kByte | kByte << 4 | kByte << 8 | (4 + kByte) << 12;
  return (__byte_perm(even, odd, kSelector) & 0x80008000u) ^ value;
}

// Fragments of two groups of products, each of some steps of 16 columns: those in flight, and those in the making.
template <int kBlocks, int kSteps>
using Fragments = uint32_t[2][kSteps][kBlocks][4];

// sums += the weights of a stage times z, 16 columns a step. Lane 4g + t of a warp needs columns 2t, 2t + 1, 2t + 8 and
// 2t + 9 of each 16: shifted by t, a word has them at the top of its bytes, where one PRMT and one LOP3 make a register
// of two weights. While the tensor cores work on one group of products, the fragments of the next are made; `released`
// is called once when the products of the stage before have ended. values(step, block, half, eight) are the magnitudes
// of a register's two weights, those of columns 8 * eight + 2t and + 1 of the step.
template <typename T, int kBlocks, int kSteps, int kTokens, typename Values, typename Released>
__device__ __forceinline__ void multiply_stage(float (&sums)[kBlocks][kTokens / 2],
                                               Fragments<kBlocks, kSteps>& fragments, const uint4 (&words)[kBlocks][2],
                                               Values values, uint64_t z, Released released) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int group = 0; group < kStageColumns / 16 / kSteps; ++group) {
    auto& of_group = fragments[group % 2];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = group * kSteps + i;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& four = words[block][half];
          const uint32_t word = step < 2 ? four.x : step < 4 ? four.y : step < 6 ? four.z : four.w;
          const uint32_t even = word << (7 - 2 * t), odd = word << (6 - 2 * t);
          const uint32_t first = values(step, block, half, 0), second = values(step, block, half, 1);
          of_group[i][block][half] =
              step % 2 == 0 ? signed_pair<0>(even, odd, first) : signed_pair<2>(even, odd, first);
          of_group[i][block][half + 2] =
              step % 2 == 0 ? signed_pair<1>(even, odd, second) : signed_pair<3>(even, odd, second);
        }
      }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = group * kSteps + i;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        wgmma<T>(sums[block], of_group[i][block], z + step / 4 * (kTokens * 128 >> 4) + step % 4 * 2);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (group == 0) released();
  }
}

// Rows of weights may go to any rows of the products. Here a thread has 2 * kBlocks neighbouring ones, this the first,
// so that it can write its outputs without going through shared memory: block b, half h of a fragment is row 2 * b + h.
template <int kBlocks>
__device__ __forceinline__ int first_row() {
  return threadIdx.x % kGroup / 4 * (2 * kBlocks);
}

// kByColumn: with in_scale. The part of a warpgroup in a tile: stages first, first + step ... of the `stages` from the
// tile's first one on, whose fillings of the rings began at stage_fill and box_fill. `row` is the warpgroup's first row
// in the box.
template <typename T, typename Shape, bool kByColumn, int kBlocks, int kSteps, int kTokens, int kRows, int kStages,
          int kBoxes>
__device__ __forceinline__ void multiply(float (&sums)[kBlocks][kTokens / 2], const Ring<kStages>& stage_ring,
                                         const Ring<kBoxes>& box_ring, const uint8_t* shared, int row, int first,
                                         int step, int stages, uint32_t stage_fill, uint32_t box_fill) {
  const int lane = threadIdx.x % 32;
  const int my_row = row + first_row<kBlocks>();
  Fragments<kBlocks, kSteps> fragments;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[block][i] = 0.0f;
  }
  int box = -1, previous = -1;
  for (int stage = first; stage < stages; stage += step) {
    if (stage / kBoxStages != box) {
      box = stage / kBoxStages;
      box_ring.wait_full(box_fill + box);
    }
    const int slot = box_ring.slot(box_fill + box), of_box = stage % kBoxStages;
    const uint8_t* words_at = shared + Shape::kBoxStart + slot * Shape::kBoxBytes;
    const T* scales = reinterpret_cast<const T*>(shared + Shape::kScaleStart) + slot * Shape::kScales;
    uint4 words[kBlocks][2];
    uint32_t row_scales[kBlocks][2];
    uint4 column_scales[kColumnWords / 4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int at = my_row + block * 2;
      words[block][0] = *reinterpret_cast<const uint4*>(words_at + swizzled(at, of_box));
      words[block][1] = *reinterpret_cast<const uint4*>(words_at + swizzled(at + 1, of_box));
      if constexpr (!kByColumn) {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(scales + of_box * kRows + at);
        row_scales[block][0] = __byte_perm(both, 0, 0x1010);
        row_scales[block][1] = __byte_perm(both, 0, 0x3232);
      }
    }
    if constexpr (kByColumn) {
      const uint4* from =
          reinterpret_cast<const uint4*>(scales) + (of_box * 4 + static_cast<int>(threadIdx.x) % 4) * kColumnPitch / 4;
#pragma unroll
      for (int i = 0; i < kColumnWords / 4; ++i) column_scales[i] = from[i];
    }
    const auto values = [&](int step_of_stage, int block, int half, int eight) {
      if constexpr (kByColumn) {
        const uint4& four = column_scales[step_of_stage / 2];
        return step_of_stage % 2 == 0 ? (eight == 0 ? four.x : four.y) : (eight == 0 ? four.z : four.w);
      } else {
        return row_scales[block][half];
      }
    };
    const uint32_t fill = stage_fill + stage;
    stage_ring.wait_full(fill);
    const uint32_t z = shared_address(shared) + Shape::kStageStart + stage_ring.slot(fill) * Shape::kStageBytes;
    multiply_stage<T, kBlocks, kSteps, kTokens>(sums, fragments, words, values, wgmma_descriptor(z), [&] {
      if (previous >= 0 && lane == 0) barrier_arrive(stage_ring.empty(stage_fill + previous));
    });
    previous = stage;
    // the last stage of a box that this warpgroup has: its words are in registers
    if ((stage + step) / kBoxStages != box || stage + step >= stages) {
      __syncwarp();
      if (lane == 0) barrier_arrive(box_ring.empty(box_fill + box));
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) wgmma_fence_sums(sums[block]);
  if (previous >= 0 && lane == 0) barrier_arrive(stage_ring.empty(stage_fill + previous));
}

// Scale and bias of a row, shift of a token; zeros past the last one.
__device__ __forceinline__ float2 row_constants(const Problem& p, int row) {
  if (row >= p.n) return {0.0f, 0.0f};
  return {p.scale.data != nullptr && p.groups == 1 ? load_float(p.scale, row) : 1.0f,
          p.bias.data != nullptr ? load_float(p.bias, row) : 0.0f};
}

__device__ __forceinline__ float token_shift(const Problem& p, int token) {
  return p.shift != nullptr && token < p.m ? __ldcg(p.shift + token) : 0.0f;
}

__device__ __forceinline__ float finish(float sum, float2 row, float shift) { return fmaf(sum, row.x, shift + row.y); }

template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  const T two[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<const uint16_t*>(&two[0]) | uint32_t{*reinterpret_cast<const uint16_t*>(&two[1])} << 16;
}

// Stores that are predicated in the assembly: for an if the compiler makes a branch, and moves what leads to the values
// behind it, where nothing hides its latency.
__device__ __forceinline__ void store_if(bool condition, void* to, const uint32_t (&words)[1]) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"(int{condition}), "l"(to),
               "r"(words[0])
               : "memory");
}
__device__ __forceinline__ void store_if(bool condition, void* to, const uint32_t (&words)[2]) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}" ::"r"(int{condition}),
               "l"(to), "r"(words[0]), "r"(words[1])
               : "memory");
}
__device__ __forceinline__ void store_if(bool condition, void* to, const uint32_t (&words)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(int{condition}),
      "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// Writes neighbouring outputs of a token, of which `left` exist; all or none at once if `vectors`.
template <typename Out, int kCount>
__device__ __forceinline__ void store_rows(Out* to, const float (&values)[kCount], int left, bool vectors) {
  if (vectors) {
    uint32_t words[kCount * sizeof(Out) / 4];
#pragma unroll
    for (int i = 0; i < kCount * static_cast<int>(sizeof(Out)) / 4; ++i) {
      if constexpr (sizeof(Out) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = pack_two<Out>(values[2 * i], values[2 * i + 1]);
      }
    }
    store_if(left > 0, to, words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) to[i] = from_float<Out>(values[i]);
    }
  }
}

#endif

}  // namespace bitinfer::cuda::sign_gemm_detail
