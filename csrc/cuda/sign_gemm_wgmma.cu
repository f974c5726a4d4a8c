// y[t, n] = sum over groups g of scale[n, g] * sum over k in g of s[n, k] * in_scale[k] * x[t, k]  +  shift[t] +
// bias[n] signs s [N, K/32] words, x [M, K], scale [N, groups], in_scale [K], shift [M]: in_shift . x from
// shift_activations, which also copies x where TMA cannot read it (z)
//
// For batches and prefill on Hopper. Weights are the left operand of wgmma, expanded from packed words to +1 and -1 in
// registers; tokens are its columns and come through TMA. Two warpgroups multiply, one warp loads z and one the words.
//
//   wide    one persistent block per multiprocessor; a tile is 256 rows of weights (128 a warpgroup) times 128 tokens.
//           Packed rows are nearly free to load, so tiles are tall: half the traffic of 128 x 256. The last, partial
//           wave is cut into tiles of 128 rows. Bound by the tensor cores, and by power.
//   narrow  a block is 128 rows times 16 or 32 tokens, or 64 rows times 64 or 128, and shares K: with the other blocks
//           of its cluster, and its warpgroups with each other. For few tokens; bound by latency, then by reading z
//           from L2.
//
// The expanded weight is +1 or -1, or with in_scale that number and the sign: both factors of a product are then as
// they came, as in a dense layer, and no z = in_scale * x is ever rounded or stored. With groups it is their scale,
// rounded to the 16 bits of x; without, the scale is applied to the sums.
#include <algorithm>
#include <limits>

#include "shift_activations.h"
#include "sign_gemm_wgmma.cuh"
#include "sign_gemm_wgmma.h"
#include "tensor_map.h"

namespace bitinfer::cuda {
namespace {

using namespace sign_gemm_detail;

constexpr int kWideThreads = 3 * kGroup;  // so that registers can move to the warpgroups that multiply
constexpr int kWideStages = 4, kWideBoxes = 2;

using WideLayout = Layout<kWideTokens, kWideRows, kWideStages, kWideBoxes>;

constexpr int kNarrowThreads = kConsumers + 64;
constexpr int narrow_stages(int tokens) { return tokens == 128 ? 5 : tokens == 64 ? 4 : tokens == 32 ? 6 : 8; }
constexpr int narrow_resident(int tokens) { return tokens == 128 ? 1 : 2; }  // blocks of a multiprocessor
constexpr int narrow_rows(int tokens) { return tokens >= 64 ? kBlockRows : 2 * kBlockRows; }

template <int kTokens>
using NarrowLayout = Layout<kTokens, narrow_rows(kTokens), narrow_stages(kTokens), 2>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- clusters
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four floats at `address` of the shared memory of that block.
__device__ __forceinline__ float4 load_cluster(uint32_t address, int rank) {
  float4 four;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
      : "r"(address), "r"(rank));
  return four;
}

// Scales, biases and tokens of a tile, for its epilogue; a warp calls it.
__device__ __forceinline__ void load_constants(const Ring<1>& ring, float2* constants, const Problem& p, uint32_t i,
                                               const Tile& tile) {
  ring.wait_empty(i);
  const int lane = threadIdx.x % 32;
  for (int at = lane; at < (tile.whole ? kWideRows : kWideRows / 2); at += 32) {
    constants[at] = row_constants(p, tile.row + at);
  }
  float* shifts = reinterpret_cast<float*>(constants + kWideRows);
  for (int at = lane; at < kWideTokens; at += 32) shifts[at] = token_shift(p, tile.token + at);
  barrier_arrive(ring.full(i));  // every lane for what it wrote itself
}

// Writes what a warpgroup has of a tile; row_values are those of the thread's first row, which is `row`.
template <typename Out, int kBlocks>
__device__ __forceinline__ void store_tile(const float (&sums)[kBlocks][kWideTokens / 2], const Problem& p,
                                           const float2* row_values, const float* shifts, int row, int token,
                                           bool vectors) {
  constexpr int kRows = 2 * kBlocks;
  float2 rows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[i] = row_values[i];
  const int first = token + threadIdx.x % 4 * 2, tokens_left = p.m - first;
  Out* to[2] = {static_cast<Out*>(p.y.data) + first * p.y.stride + row};
  to[1] = to[0] + p.y.stride;
#pragma unroll
  for (int i = 0; i < kWideTokens / 4; ++i) {
    const float shift = shifts[i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2];
    float values[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      values[j] = finish(sums[j / 2][i / 2 * 4 + j % 2 * 2 + i % 2], rows[j], shift);
    }
    store_rows<Out>(to[i % 2], values, i / 2 * 8 + i % 2 < tokens_left ? p.n - row : 0, vectors);
    to[i % 2] += 8 * p.y.stride;
  }
}

struct WideRings {
  Ring<kWideStages> stages;
  Ring<kWideBoxes> boxes;
  Ring<1> constants;

  explicit __device__ WideRings(uint32_t barriers)
      : stages{barriers}, boxes{barriers + kWideStages * 16}, constants{barriers + (kWideStages + kWideBoxes) * 16} {}
};

// One tile of the wide kernel for one warpgroup.
template <typename T, bool kByColumn, int kBlocks>
__device__ __forceinline__ void wide_tile(const Problem& p, const WideRings& rings, uint8_t* shared, const Tile& tile,
                                          uint32_t stage_fill, uint32_t box_fill, uint32_t constant_fill) {
  using Shape = WideLayout;
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kGroup, 0);
  const int own_row = group * kBlocks * kBlockRows, row = tile.row + own_row + first_row<kBlocks>();
  float sums[kBlocks][kWideTokens / 2];
  multiply<T, Shape, kByColumn, kBlocks, 2 / kBlocks, kWideTokens, kWideRows>(
      sums, rings.stages, rings.boxes, shared, own_row, 0, 1, p.stages(), stage_fill, box_fill);
  rings.constants.wait_full(constant_fill);
  const float2* constants = reinterpret_cast<const float2*>(shared + Shape::kConstantStart);
  const float2* row_values = constants + own_row + first_row<kBlocks>();
  const float* shifts = reinterpret_cast<const float*>(constants + kWideRows);
  if (p.y.dtype != Dtype::kFloat32 && p.stores_vectors) {
    store_tile<T>(sums, p, row_values, shifts, row, tile.token, true);
  } else if (p.y.dtype != Dtype::kFloat32) {
    store_tile<T>(sums, p, row_values, shifts, row, tile.token, false);
  } else if (p.stores_vectors) {
    store_tile<float>(sums, p, row_values, shifts, row, tile.token, true);
  } else {
    store_tile<float>(sums, p, row_values, shifts, row, tile.token, false);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(rings.constants.empty(constant_fill));
}

#endif

template <typename T, bool kByColumn>
__global__ void __launch_bounds__(kWideThreads, 1)
    wide_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap sign_map,
                const __grid_constant__ Problem p, const __grid_constant__ Tiles tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  using Shape = WideLayout;
  const WideRings rings(shared_address(shared) + Shape::kBarrierStart);
  allow_next_kernel();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&z_map);
    prefetch_tensor_map(&sign_map);
    rings.stages.init(1, kConsumers / 32);
    rings.boxes.init(box_arrivals(p), kConsumers / 32);
    rings.constants.init(32, kConsumers / 32);
    barrier_init_fence();
  }
  fill_scales<T, Shape>(shared, p);
  __syncthreads();

  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0) - kConsumers / 32;
  const int stages = p.stages(), boxes = (stages + kBoxStages - 1) / kBoxStages, step = gridDim.x;
  uint32_t stage_fill = 0, box_fill = 0, constant_fill = 0;
  if (warp < 0) {
    take_registers<232>();
    wait_for_previous_kernel();
    for (int unit = blockIdx.x; unit < tiles.units; unit += step) {
      const Tile tile = tiles.at(unit);
      if (tile.whole) {
        wide_tile<T, kByColumn, 2>(p, rings, shared, tile, stage_fill, box_fill, constant_fill);
      } else {
        wide_tile<T, kByColumn, 1>(p, rings, shared, tile, stage_fill, box_fill, constant_fill);
      }
      stage_fill += stages;
      box_fill += boxes;
      ++constant_fill;
    }
  } else {
    give_registers<40>();
    if (warp == 0 && threadIdx.x % 32 == 0) {
      wait_for_previous_kernel();
      for (int unit = blockIdx.x; unit < tiles.units; unit += step, stage_fill += stages) {
        const int token = tiles.at(unit).token, boxes_of_z = box_count<kWideTokens>(p.m, token);
        for (int i = 0; i < stages; ++i) {
          load_stage<Shape, box_tokens(kWideTokens)>(rings.stages, shared_address(shared), &z_map, stage_fill + i, i,
                                                     token, boxes_of_z);
        }
      }
    } else if (warp == 1) {
      for (int unit = blockIdx.x; unit < tiles.units; unit += step, box_fill += boxes) {
        const Tile tile = tiles.at(unit);
        for (int i = 0; i < boxes; ++i) {
          load_box<T, Shape, kWideRows, kWideRows / 2>(rings.boxes, shared, &sign_map, box_fill + i, p, i * kBoxStages,
                                                       tile.row, tile.whole ? kWideRows : kWideRows / 2);
        }
      }
    } else if (warp == 2) {
      wait_for_previous_kernel();
      for (int unit = blockIdx.x; unit < tiles.units; unit += step, ++constant_fill) {
        float2* constants = reinterpret_cast<float2*>(shared + Shape::kConstantStart);
        load_constants(rings.constants, constants, p, constant_fill, tiles.at(unit));
      }
    }
  }
#else
  __trap();
#endif
}

// Block (rank in its cluster, rows, tokens). The sums of all warpgroups of a cluster meet in shared memory.
template <typename T, bool kByColumn, int kTokens>
__global__ void __launch_bounds__(kNarrowThreads, narrow_resident(kTokens))
    narrow_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap sign_map,
                  const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  using Shape = NarrowLayout<kTokens>;
  constexpr int kStages = Shape::kStages;
  constexpr int kRows = Shape::kRows, kBlocks = kRows / kBlockRows;
  constexpr int kPitch = kRows + 4;  // of a token's sums: rows of fragments fall into different banks
  static_assert(2 * kTokens * kPitch * 4 <= kStages * Shape::kStageBytes);
  const Ring<kStages> stage_ring{shared_address(shared) + Shape::kBarrierStart};
  const Ring<2> box_ring{stage_ring.barriers + kStages * 16};
  const int split = gridDim.x, rank = blockIdx.x;
  const int row = blockIdx.y * kRows, token = blockIdx.z * kTokens;
  float2* row_values = reinterpret_cast<float2*>(shared + Shape::kConstantStart);
  float* shifts = reinterpret_cast<float*>(row_values + kRows);
  allow_next_kernel();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&z_map);
    prefetch_tensor_map(&sign_map);
    stage_ring.init(1, kGroup / 32);
    box_ring.init(box_arrivals(p), kConsumers / 32);
    barrier_init_fence();
  }
  fill_scales<T, Shape>(shared, p);
  __syncthreads();

  const int all = p.stages(), begin = all * rank / split, stages = all * (rank + 1) / split - begin;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  if (warp < kConsumers / 32) {
    if (threadIdx.x < kRows) row_values[threadIdx.x] = row_constants(p, row + threadIdx.x);
    wait_for_previous_kernel();
    if (threadIdx.x < kTokens) shifts[threadIdx.x] = token_shift(p, token + threadIdx.x);
    float sums[kBlocks][kTokens / 2];
    const int group = warp / 4;
    multiply<T, Shape, kByColumn, kBlocks, 2 / kBlocks, kTokens, kRows>(sums, stage_ring, box_ring, shared, 0, group, 2,
                                                                        stages, 0, 0);
    named_barrier(1, kConsumers);  // no stage is in use any more
    float* to = reinterpret_cast<float*>(shared) + (group * kTokens + lane % 4 * 2) * kPitch + first_row<kBlocks>();
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      struct alignas(8 * kBlocks) {
        float at[2 * kBlocks];
      } rows;
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) rows.at[j] = sums[j / 2][i / 2 * 4 + j % 2 * 2 + i % 2];
      *reinterpret_cast<decltype(rows)*>(to + (i / 2 * 8 + i % 2) * kPitch) = rows;
    }
  } else if (warp == kConsumers / 32) {
    wait_for_previous_kernel();
    if (lane == 0) {
      for (int i = 0; i < stages; ++i) {
        load_stage<Shape, box_tokens(kTokens)>(stage_ring, shared_address(shared), &z_map, i, begin + i, token,
                                               box_count<kTokens>(p.m, token));
      }
    }
  } else {
    for (int box = 0; box * kBoxStages < stages; ++box) {
      load_box<T, Shape, kRows, kRows>(box_ring, shared, &sign_map, box, p, begin + box * kBoxStages, row, kRows);
    }
  }
  __syncwarp();
  cluster_barrier();

  // each block of the cluster finishes a share of the tokens, four rows a thread
  const int first = kTokens * rank / split, share = kTokens * (rank + 1) / split - first;
  for (int i = threadIdx.x; i < share * (kRows / 4); i += kNarrowThreads) {
    const int column = first + i / (kRows / 4), at = i % (kRows / 4) * 4;
    const uint32_t from = shared_address(shared) + (column * kPitch + at) * 4;
    float4 sum{};
#pragma unroll 2
    for (int peer = 0; peer < split; ++peer) {
      const float4 a = load_cluster(from, peer), b = load_cluster(from + kTokens * kPitch * 4, peer);
      sum = {sum.x + (a.x + b.x), sum.y + (a.y + b.y), sum.z + (a.z + b.z), sum.w + (a.w + b.w)};
    }
    const float shift = shifts[column];
    const float values[4] = {finish(sum.x, row_values[at], shift), finish(sum.y, row_values[at + 1], shift),
                             finish(sum.z, row_values[at + 2], shift), finish(sum.w, row_values[at + 3], shift)};
    const int left = token + column < p.m ? p.n - row - at : 0;
    const int64_t to = (token + column) * p.y.stride + row + at;
    if (p.y.dtype == Dtype::kFloat32) {
      store_rows(static_cast<float*>(p.y.data) + to, values, left, p.stores_vectors);
    } else {
      store_rows(static_cast<T*>(p.y.data) + to, values, left, p.stores_vectors);
    }
  }
  cluster_barrier();  // the others have read this block's sums
#else
  __trap();
#endif
}

// ---- how problems are run

enum class Variant { kWide, kNarrow };

struct Plan {
  Variant variant;
  int tokens;  // of a tile
  int split;   // narrow: blocks that share K
  Tiles tiles;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiles wide_tiles(int64_t m, int64_t n, const Device& device) {
  const int64_t rows = ceil_div(n, kWideRows), all = rows * ceil_div(m, kWideTokens);
  const int64_t rest = all % device.multiprocessors;
  // in halves the last wave takes half the time, if they fit into it
  const int64_t whole = 2 * rest <= device.multiprocessors ? all - rest : all;
  return {static_cast<int>(rows), static_cast<int>(whole), static_cast<int>(whole + 2 * (all - whole))};
}

// The cheapest way in cycles, by a model fitted to measurements on an H200: waves of narrow blocks, each of which costs
// `fixed` cycles and `stage` cycles a stage. Clusters of more than two blocks leave some multiprocessors unused.
Plan plan(int64_t m, int64_t n, int64_t k, const Device& device) {
  const int64_t blocks = device.multiprocessors, stages = ceil_div(k, kStageColumns);
  const int tokens = m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : 128;
  const int64_t stage = tokens == 128 ? 470 : tokens == 64 ? 725 : 600, fixed = tokens == 128 ? 9000 : 5000;
  const int64_t tiles = ceil_div(n, narrow_rows(tokens)) * ceil_div(m, tokens);
  const int64_t resident = blocks * narrow_resident(tokens);

  Plan best{Variant::kNarrow, tokens, 1, wide_tiles(m, n, device)};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int split : {1, 2, 3, 4, 6, 8}) {
    if (split > 1 && split * 4 > stages) break;
    const int64_t waves = ceil_div(tiles * split, split > 2 ? resident * 9 / 10 : resident);
    const int64_t cycles = waves * (stage * ceil_div(stages, split) + fixed) + 2500;
    if (cycles < least) {
      least = cycles;
      best.split = split;
    }
  }
  const int64_t wholes = ceil_div(best.tiles.whole, blocks);
  const int64_t halves = ceil_div(best.tiles.units - best.tiles.whole, blocks);
  if (m > 64 && stages * 1024 * (2 * wholes + halves) + 6000 < least) {
    best.variant = Variant::kWide;
    best.tokens = kWideTokens;
  }
  return best;
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether TMA can read x as it is; else the product reads a copy.
bool reads_x(const SignGemm& p) { return aligned(p.x.data, 16) && p.stride % 8 == 0 && p.stride >= p.weight.k; }

int64_t pitch(const SignGemm& p) { return ceil_div(p.weight.k, 8) * 8; }

int64_t padded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

template <typename T>
cudaError_t launch_wide(const Problem& p, const CUtensorMap& z, const CUtensorMap& signs, const Plan& plan,
                        const Launch& on) {
  const auto kernel = p.in_scale != nullptr ? wide_kernel<T, true> : wide_kernel<T, false>;
  const int grid = std::min(plan.tiles.units, on.device.multiprocessors);
  return launch(kernel, on, grid, kWideThreads, WideLayout::kBytes, true, z, signs, p, plan.tiles);
}

template <typename T, int kTokens>
cudaError_t launch_narrow(const Problem& p, const CUtensorMap& z, const CUtensorMap& signs, const Plan& plan,
                          const Launch& on) {
  constexpr int kBytes = NarrowLayout<kTokens>::kBytes;
  const auto kernel = p.in_scale != nullptr ? narrow_kernel<T, true, kTokens> : narrow_kernel<T, false, kTokens>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.split, ceil_div(p.n, narrow_rows(kTokens)), ceil_div(p.m, kTokens));
  config.blockDim = kNarrowThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = on.settled ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, z, signs, p);
}

template <typename T>
cudaError_t launch_plan(const Problem& p, const CUtensorMap& z, const CUtensorMap& signs, const Plan& plan,
                        const Launch& on) {
  if (plan.variant == Variant::kWide) return launch_wide<T>(p, z, signs, plan, on);
  switch (plan.tokens) {
    case 16:
      return launch_narrow<T, 16>(p, z, signs, plan, on);
    case 32:
      return launch_narrow<T, 32>(p, z, signs, plan, on);
    case 64:
      return launch_narrow<T, 64>(p, z, signs, plan, on);
    default:
      return launch_narrow<T, 128>(p, z, signs, plan, on);
  }
}

}  // namespace

bool sign_gemm_wgmma_takes(const SignGemm& p, const Device& device) {
  const Weight& w = p.weight;
  return device.has_wgmma() && device.shared_bytes >= WideLayout::kBytes && p.x.dtype != Dtype::kFloat32 &&
         (p.y.dtype == p.x.dtype || p.y.dtype == Dtype::kFloat32) && w.planes == 1 && !w.group_shift && w.k > 0 &&
         w.words() % 4 == 0 && aligned(w.signs, 16) && (w.groups() == 1 || w.group_size % kStageColumns == 0) &&
         (!p.in_scale || (w.groups() == 1 && p.in_scale.dtype == p.x.dtype));
}

size_t sign_gemm_wgmma_workspace(const SignGemm& p) {
  return (p.in_shift ? padded(p.m * 4) : 0) + (reads_x(p) ? 0 : p.m * pitch(p) * 2);
}

cudaError_t sign_gemm_wgmma(const SignGemm& problem, void* workspace, const Launch& on) {
  const Weight& w = problem.weight;
  if (problem.m == 0 || w.n == 0) return cudaSuccess;
  const bool is_half = problem.x.dtype == Dtype::kFloat16;
  Problem p{};
  p.m = static_cast<int>(problem.m);
  p.n = static_cast<int>(w.n);
  p.k = static_cast<int>(w.k);
  p.scale = w.scale;
  p.groups = w.scale ? static_cast<int>(w.groups()) : 1;
  p.group_stages = p.groups > 1 ? static_cast<int>(w.group_size / kStageColumns) : 1;
  p.in_scale = problem.in_scale.data;
  p.bias = w.bias;
  p.y = problem.y;
  p.stores_vectors = aligned(problem.y.data, 16) && problem.y.stride % 4 == 0 && w.n % 4 == 0;

  const void* z = problem.x.data;
  int64_t stride = problem.stride;
  if (!reads_x(problem) || problem.in_shift) {
    std::byte* memory = static_cast<std::byte*>(workspace);
    ShiftActivations prologue{problem.x, problem.m, w.k, problem.stride, problem.in_shift};
    if (problem.in_shift) {
      p.shift = prologue.shift = reinterpret_cast<float*>(memory);
      memory += padded(problem.m * 4);
    }
    if (!reads_x(problem)) {
      z = prologue.z = memory;
      stride = prologue.pitch = pitch(problem);
    }
    const cudaError_t error = shift_activations(prologue, on);
    if (error != cudaSuccess) return error;
  }

  const Plan how = plan(problem.m, w.n, w.k, on.device);
  const bool wide = how.variant == Variant::kWide;
  const auto type = is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap z_map, sign_map;
  cudaError_t error = make_tensor_map(z_map, type, z, {{w.k, 2, 64}, {problem.m, stride * 2, box_tokens(how.tokens)}});
  if (error != cudaSuccess) return error;
  error = make_tensor_map(sign_map, CU_TENSOR_MAP_DATA_TYPE_UINT32, w.signs,
                          {{w.words(), 4, 32}, {w.n, w.words() * 4, wide ? kWideRows / 2 : narrow_rows(how.tokens)}});
  if (error != cudaSuccess) return error;
  return is_half ? launch_plan<__half>(p, z_map, sign_map, how, on)
                 : launch_plan<__nv_bfloat16>(p, z_map, sign_map, how, on);
}

}  // namespace bitinfer::cuda
