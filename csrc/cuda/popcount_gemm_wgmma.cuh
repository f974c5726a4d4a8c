// The parts of popcount_gemm_wgmma.cu, which tells how the whole works: tiles, shared memory, the loader of operands,
// what applies to the tokens and rows of a tile, and how a warpgroup turns its accumulators into outputs.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "hopper.cuh"

namespace bitinfer::cuda::popcount_wgmma {

constexpr int kRowBytes = 128;                // of one operand row in a stage: a swizzled row of the copy engine
constexpr int kStageColumns = 8 * kRowBytes;  // of K
constexpr int kSteps = 4;                     // instructions of 256 columns a stage
constexpr int kChunkBytes = 4096;             // of y that a warpgroup stores at a time: 32 tokens of 64 halves, or
                                              // 16 tokens of 64 floats
constexpr int kTokenTilesTogether = 8;        // tiles that share their rows of the weight run at the same time

// float(i) of an integer |i| < 2^22 is its sum with these bits, read as a float, minus this float.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

template <int bits, int warpgroups, int columns>
struct Tile {
  static constexpr int kBits = bits, kWarpgroups = warpgroups, kColumns = columns;
  static constexpr int kTokens = columns / bits, kTokenBlocks = kTokens / 8, kRows = 64 * warpgroups;
  static constexpr int kThreads = 128 * warpgroups;
  static constexpr int kBlocks = warpgroups == 1 ? 2 : 1;  // a multiprocessor

  // Shared memory: stages; per warpgroup chunks of y and what applies to tokens and rows; barriers.
  static constexpr int kStageBytes = (kRows + columns) * kRowBytes;
  static constexpr int kParameterBytes = kTokens * 12 + 64 * 16 + 16;
  static constexpr int kStagingBytes = warpgroups * 2 * kChunkBytes;
  static constexpr int kLimit = (233472 - 1024 * kBlocks) / kBlocks - 1024 - 192;
  static constexpr int kStages = std::min((kLimit - kStagingBytes - warpgroups * kParameterBytes) / kStageBytes, 6);
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kParametersAt = kStagingAt + kStagingBytes;
  static constexpr int kBarriersAt = kParametersAt + warpgroups * kParameterBytes;
  static constexpr int kBarrierBytes = 3 * 8 * kStages + 16;
  static constexpr int kSharedBytes = 1024 + kBarriersAt + kBarrierBytes;
  static_assert(kStages >= 2 && kTokens % 16 == 0 && kRows <= 256 && kBarrierBytes <= 192);
};

struct Arguments {
  const float* act_scale;
  const int32_t* act_sum;
  const float* act_shift;
  Floats scale, group_shift, bias;
  int m, n, stages, row_tiles, token_tiles;
  Output y;
  bool extras;  // whether any term but the product is there

  __device__ int tiles() const { return row_tiles * token_tiles; }
};

template <class Tile>
Arguments arguments_of(const PopcountGemm& p) {
  const Weight& weight = p.weight;
  Arguments arguments{};
  arguments.act_scale = p.act_scale;
  arguments.act_sum = p.act_sum;
  arguments.act_shift = p.act_shift;
  arguments.scale = weight.scale;
  arguments.group_shift = weight.group_shift;
  arguments.bias = weight.bias;
  arguments.m = static_cast<int>(p.m);
  arguments.n = static_cast<int>(weight.n);
  arguments.stages = static_cast<int>((weight.k + kStageColumns - 1) / kStageColumns);
  arguments.row_tiles = static_cast<int>((weight.n + Tile::kRows - 1) / Tile::kRows);
  arguments.token_tiles = static_cast<int>((p.m + Tile::kTokens - 1) / Tile::kTokens);
  arguments.y = p.y;
  arguments.extras = weight.group_shift || weight.bias || p.act_shift != nullptr;
  return arguments;
}

struct Origin {
  int row, token;
};

// Tiles of neighbouring numbers share their rows of the weight.
template <class Tile>
__device__ Origin origin_of(int tile, const Arguments& p) {
  const int group = tile / (kTokenTilesTogether * p.row_tiles);
  const int first = group * kTokenTilesTogether, together = min(kTokenTilesTogether, p.token_tiles - first);
  const int rest = tile - first * p.row_tiles, row = rest / together;
  return {row * Tile::kRows, (first + rest - row * together) * Tile::kTokens};
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A position in a ring of shared memory, and the parity of the barriers there.
template <int size>
struct Ring {
  int at = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++at == size) {
      at = 0;
      phase ^= 1;
    }
  }
};

// Copies `count` values to shared memory, past level 1, and zeros after them up to four. All but the last tokens come
// in fours, asynchronously; asking the same copy for part of 16 bytes is an access past the end to memory checkers.
template <typename T>
__device__ __forceinline__ void copy_four(T* to, const T* from, int count) {
  if (count >= 4) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? __ldcg(from + i) : T{0};
  }
}

struct Loader;

// What applies to the outputs of a weight row.
struct Row {
  float scale, group_shift, bias, unused;
};

template <class Tile>
struct Shared {
  uint8_t* generic;
  uint32_t base;

  __device__ Shared(uint8_t* memory) {
    const uint32_t address = shared_address(memory);
    base = (address + 1023) & ~1023u;
    generic = memory + (base - address);
  }
  __device__ uint32_t weight(int stage) const { return base + stage * Tile::kStageBytes; }
  __device__ uint32_t planes(int stage) const { return weight(stage) + Tile::kRows * kRowBytes; }
  __device__ uint32_t full(int stage) const { return base + Tile::kBarriersAt + 8 * stage; }  // landed
  __device__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }          // read by all warps
  // Of the tile of a stage, as the loader of the stage knows it.
  __device__ Origin* stage_origin(int stage) const {
    return reinterpret_cast<Origin*>(generic + Tile::kBarriersAt) + 2 * Tile::kStages + stage;
  }
  __device__ Loader* loader() const { return reinterpret_cast<Loader*>(stage_origin(Tile::kStages)); }
  __device__ uint32_t chunk(int warpgroup, int buffer) const {
    return base + Tile::kStagingAt + (warpgroup * 2 + buffer) * kChunkBytes;
  }
  // Per warpgroup, of a tile's tokens and of its own rows.
  __device__ float* act_scale(int warpgroup) const {
    return reinterpret_cast<float*>(generic + Tile::kParametersAt + warpgroup * Tile::kParameterBytes);
  }
  __device__ int* act_sum(int warpgroup) const { return reinterpret_cast<int*>(act_scale(warpgroup) + Tile::kTokens); }
  __device__ float* act_shift(int warpgroup) const { return act_scale(warpgroup) + 2 * Tile::kTokens; }
  __device__ Row* rows(int warpgroup) const { return reinterpret_cast<Row*>(act_scale(warpgroup) + 3 * Tile::kTokens); }
  __device__ Origin* origin(int warpgroup) const { return reinterpret_cast<Origin*>(rows(warpgroup) + 64); }
};

// One thread: what to load next. In shared memory, since the accumulators leave few registers.
struct Loader {
  int tile, k;
  Origin at;

  template <class Tile>
  __device__ void load_weight(const Shared<Tile>& shared, int stage, const CUtensorMap& map) const {
    *shared.stage_origin(stage) = at;
    barrier_arrive_expecting(shared.full(stage), Tile::kStageBytes);
    tma_load(shared.weight(stage), &map, shared.full(stage), k * kStageColumns / 32, at.row);
  }
  template <class Tile>
  __device__ void load_planes(const Shared<Tile>& shared, int stage, const CUtensorMap& map) const {
    tma_load(shared.planes(stage), &map, shared.full(stage), k * kStageColumns / 32, at.token, 0);
  }
  template <class Tile>
  __device__ void advance(const Arguments& p) {
    if (++k < p.stages) return;
    k = 0;
    tile += gridDim.x;
    if (tile < p.tiles()) at = origin_of<Tile>(tile, p);
  }
};

// What applies to the tokens and rows of a tile. It is asked for early and used late: loads go through a level 2 cache
// that is busy with operands, and can take as long as a stage.
struct Parameters {
  uint32_t scale, group_shift, bias;  // of one row, in the bits of their types

  // Element `i` of a row, or what stands in its place; nothing here waits for the load.
  __device__ static uint32_t load_bits(const Floats& row, int i, uint32_t absent) {
    if (row.data == nullptr) return absent;
    if (row.dtype == Dtype::kFloat32) return static_cast<const uint32_t*>(row.data)[i];
    return static_cast<const uint16_t*>(row.data)[i];
  }
  __device__ static float value(const Floats& row, uint32_t bits) {
    if (row.data == nullptr || row.dtype == Dtype::kFloat32) return __uint_as_float(bits);
    if (row.dtype == Dtype::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }

  template <class Tile>
  __device__ __forceinline__ void load(const Shared<Tile>& shared, int warpgroup, Origin at, const Arguments& p) {
    const int thread = threadIdx.x % 128, token = 4 * thread;
    if (thread == 0) *shared.origin(warpgroup) = at;
    if (token < Tile::kTokens) {
      const int first = at.token + token, count = p.m - first;
      copy_four(shared.act_scale(warpgroup) + token, p.act_scale + first, count);
      copy_four(shared.act_sum(warpgroup) + token, p.act_sum + first, count);
      if (p.extras) copy_four(shared.act_shift(warpgroup) + token, p.act_shift + first, p.act_shift ? count : 0);
    }
    const int row = min(at.row + 64 * warpgroup + thread % 64, p.n - 1);
    scale = load_bits(p.scale, row, 0x3f800000);
    group_shift = load_bits(p.group_shift, row, 0);
    bias = load_bits(p.bias, row, 0);
  }

  // A barrier of the warpgroup must follow.
  template <class Tile>
  __device__ __forceinline__ void store(const Shared<Tile>& shared, int warpgroup, const Arguments& p) const {
    const int thread = threadIdx.x % 128;
    if (thread < 64) {
      shared.rows(warpgroup)[thread] = {value(p.scale, scale), value(p.group_shift, group_shift), value(p.bias, bias)};
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (Tile::kBits == 1 && thread < Tile::kTokens / 4) {
      int4& four = reinterpret_cast<int4*>(shared.act_sum(warpgroup))[thread];
      four = {four.x + kMagicBits, four.y + kMagicBits, four.z + kMagicBits, four.w + kMagicBits};
    }
  }
};

// One warp: the set bits in half of each of its 16 rows of a stage. Lane i counts in row i / 2, in chunks of 16 bytes
// that differ among eight lanes, which then read from all banks.
__device__ __forceinline__ int count_bits(const uint8_t* rows) {
  const int lane = threadIdx.x % 32;
  int count = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = lane % 2 * 4 + (lane / 2 + i) % 4;
    const uint4 w = *reinterpret_cast<const uint4*>(rows + lane / 2 * kRowBytes + chunk * 16);
    count += (__popc(w.x) + __popc(w.y)) + (__popc(w.z) + __popc(w.w));
  }
  return count;
}

// sum(q) - 2 * sum_b c_b popcount_b as a float. For one bit sum(q) - 2|w| + 4 popcount: there `sum` is sum(q) +
// kMagicBits and `offset` -2|w| - kMagic.
template <class Tile>
__device__ __forceinline__ float integer(const int (&acc)[Tile::kColumns / 2], int block, int element, int sum,
                                         float offset) {
  if constexpr (Tile::kBits == 1) return __fadd_rn(__int_as_float(4 * acc[4 * block + element] + sum), offset);
  int total = -acc[4 * ((Tile::kBits - 1) * Tile::kTokenBlocks + block) + element];
#pragma unroll
  for (int b = Tile::kBits - 2; b >= 0; --b) {
    total = 2 * total + acc[4 * (b * Tile::kTokenBlocks + block) + element];
  }
  return static_cast<float>(sum - 2 * total);
}

template <typename T>
__device__ __forceinline__ void load_two(T (&to)[2], const T* shared) {
  const float2 two = *reinterpret_cast<const float2*>(shared);
  to[0] = reinterpret_cast<const T&>(two.x);
  to[1] = reinterpret_cast<const T&>(two.y);
}

// Two 16-bit floats of the type that `half` tells, without a branch.
__device__ __forceinline__ uint32_t pack_two(float low, float high, bool half) {
  uint32_t both;
  asm("{\n.reg .pred half;\nsetp.ne.b32 half, %3, 0;\ncvt.rn.bf16x2.f32 %0, %2, %1;\n"
      "@half cvt.rn.f16x2.f32 %0, %2, %1;\n}"
      : "=&r"(both)
      : "f"(low), "f"(high), "r"(static_cast<int>(half)));
  return both;
}

// The same of a type that is known.
template <bool half>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  uint32_t both;
  if constexpr (half) {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  }
  return both;
}

// What a thread knows of its two rows.
struct Rows {
  float scale[2], offset[2], group_shift[2], bias[2];
};

// The thread's outputs of eight tokens, from token 8 * block of the tile: of both rows, of both of its tokens.
template <class Tile, bool extras>
__device__ __forceinline__ void outputs(float (&value)[2][2], const int (&acc)[Tile::kColumns / 2], int block,
                                        const Shared<Tile>& shared, int warpgroup, const Rows& rows) {
  const int token = 8 * block + 2 * (threadIdx.x % 4);
  float scale[2], shift[2];
  int sum[2];
  load_two(scale, shared.act_scale(warpgroup) + token);
  load_two(sum, shared.act_sum(warpgroup) + token);
  if (extras) load_two(shift, shared.act_shift(warpgroup) + token);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int h = e / 2, b = e % 2;
    float v = __fmul_rn(__fmul_rn(scale[b], rows.scale[h]), integer<Tile>(acc, block, e, sum[b], rows.offset[h]));
    if (extras) {
      const auto total = static_cast<float>(Tile::kBits == 1 ? sum[b] - kMagicBits : sum[b]);
      v = __fadd_rn(v, __fmul_rn(__fmul_rn(scale[b], rows.group_shift[h]), total));
      v = __fadd_rn(__fadd_rn(v, shift[b]), rows.bias[h]);
    }
    value[h][b] = v;
  }
}

// One warpgroup: stores its 64 rows of a tile, a chunk at a time, through two chunks of shared memory, where fragments
// become whole lines. `count` is the number of set bits in half a row, as count_bits() deals them out.
template <class Tile, typename Out, bool extras>
__device__ __forceinline__ void store_tile(int (&acc)[Tile::kColumns / 2], const Shared<Tile>& shared, int warpgroup,
                                           const Arguments& p, int count) {
  constexpr int kMost = kChunkBytes / (64 * sizeof(Out)), kTokens = Tile::kTokens < kMost ? Tile::kTokens : kMost;
  constexpr int kElements = 16 / sizeof(Out), kUnits = 64 / kElements;  // of a token in a chunk
  constexpr int kTokensAtOnce = 128 / kUnits;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  // what the instances of this function have in common must not be computed ahead of them all: no registers for that
#pragma unroll
  for (int& value : acc) asm volatile("" : "+r"(value) : "n"(2 * sizeof(Out) + extras));
  Rows rows;
  if (Tile::kBits == 1) count += __shfl_xor_sync(~0u, count, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Row row = shared.rows(warpgroup)[16 * warp + lane / 4 + 8 * h];
    rows.scale[h] = row.scale;
    if (extras) rows.group_shift[h] = row.group_shift, rows.bias[h] = row.bias;
    if (Tile::kBits == 1) {
      rows.offset[h] = static_cast<float>(-2 * __shfl_sync(~0u, count, lane / 4 * 2 + 16 * h)) - kMagic;
    }
  }
  const int unit = thread % kUnits, line = thread / kUnits;
  const int n = shared.origin(warpgroup)->row + 64 * warpgroup + unit * kElements;
  const int first_token = shared.origin(warpgroup)->token;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kTokens / kTokens; ++chunk) {
    if (chunk > 0 && first_token + chunk * kTokens >= p.m) break;
    const uint32_t to = shared.chunk(warpgroup, chunk % 2);
#pragma unroll
    for (int i = 0; i < kTokens / 8; i += 2) {
      float value[2][2][2];
      outputs<Tile, extras>(value[0], acc, chunk * kTokens / 8 + i, shared, warpgroup, rows);
      outputs<Tile, extras>(value[1], acc, chunk * kTokens / 8 + i + 1, shared, warpgroup, rows);
      if constexpr (sizeof(Out) == 4) {  // lines of 32 rows
        const uint32_t first = warp / 2 * (kChunkBytes / 2) + swizzled(2 * (lane % 4), warp % 2 * 4 + lane / 16) +
                               lane / 4 % 4 * 4;  // of the first output, from where the swizzle is a flip of bits
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int h = e / 2 % 2, b = e % 2;
          const uint32_t address = (first ^ (32 * h + 16 * b)) + to + (8 * (i + e / 4) + b) * kRowBytes;
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "f"(value[e / 4][h][b]));
        }
      } else {  // transposed on the way: a row of each 8 x 8 matrix is a token
        uint32_t pair[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          pair[e] = pack_two(value[e / 2][e % 2][0], value[e / 2][e % 2][1], p.y.dtype == Dtype::kFloat16);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + swizzled(8 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)),
                     "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3]));
      }
    }
    named_barrier(1 + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < kTokens; i += kTokensAtOnce) {
      const int token = first_token + chunk * kTokens + line + i;
      const uint32_t from = to + unit / 8 * (kChunkBytes / 2) + swizzled(line + i, unit % 8);
      const Out* y = static_cast<const Out*>(p.y.data) + token * p.y.stride + n;
      asm volatile(
          "{\n.reg .pred inside;\n.reg .b32 v<4>;\nsetp.ne.b32 inside, %2, 0;\n"
          "ld.shared.v4.b32 {v0, v1, v2, v3}, [%1];\n@inside st.global.v4.b32 [%0], {v0, v1, v2, v3};\n}" ::"l"(y),
          "r"(from), "r"(static_cast<int>(token < p.m && n < p.n))
          : "memory");
    }
  }
}

#endif

}  // namespace bitinfer::cuda::popcount_wgmma
