// y[t, n] = power[t] * sum over groups g of scale[n, g] * sum over k in g of s[n, k] * z[t, k]  +  shift[t] + bias[n]
// signs s [N, K/32] words, z [M, K] (x itself, or what scale_activations made of it), scale [N, groups], power, shift
// [M]
//
// For batches and prefill on Hopper. Weights are the left operand of wgmma, expanded from packed words to +1 and -1 in
// registers; tokens are its columns and come through TMA. Two warpgroups multiply, one warp loads z and one the words.
//
//   wide    one persistent block per multiprocessor; a tile is 256 rows of weights (128 a warpgroup) times 128 tokens.
//           Packed rows are nearly free to load, so tiles are tall: half the traffic of 128 x 256. The last, partial
//           wave is cut into tiles of 128 rows. Bound by the tensor cores, and by power.
//   narrow  a block is 64 rows times 16, 32, 64 or 128 tokens and shares K: with the other blocks of its cluster, and
//           its warpgroups with each other. For few tokens; bound by latency, then by reading z from L2.
//
// With groups, the expanded weight is the scale, rounded to the 16 bits of x, instead of one; otherwise the scale is
// applied to the sums.
#include <algorithm>

#include "scale_activations.h"
#include "sign_gemm_wgmma.cuh"
#include "sign_gemm_wgmma.h"
#include "tensor_map.h"

namespace bitinfer::cuda {
namespace {

using namespace sign_gemm_detail;

constexpr int kMaxSplit = 8;  // blocks of a cluster
constexpr int kWideTokens = 128, kWideRows = 256;
constexpr int kWideThreads = 3 * kGroup;  // so that registers can move to the warpgroups that multiply
constexpr int kPieceTokens = 32;          // of one store of the output

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

// wide: for each warpgroup scale and bias of its 128 rows, power and shift of the tokens; two pieces of staged output
using WideLayout = Layout<kWideTokens, kWideRows, 4, 2, 2 * (kWideRows / 2 + kWideTokens), 2 * 2 * kPieceTokens * 128>;

constexpr int kNarrowThreads = kConsumers + 64;
constexpr int narrow_stages(int tokens) { return tokens == 128 ? 5 : tokens == 64 ? 4 : tokens == 32 ? 6 : 8; }
constexpr int narrow_blocks(int tokens) { return tokens == 128 ? 1 : 2; }  // of a multiprocessor

template <int kTokens>
using NarrowLayout = Layout<kTokens, kBlockRows, narrow_stages(kTokens), 2, kBlockRows + kTokens, 0>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

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
      : "r"(address), "r"(rank)
      : "memory");
  return four;
}

template <typename T>
__device__ __forceinline__ void store_one(const Output& y, int64_t token, int row, float value) {
  const int64_t at = token * y.stride + row;
  if (y.dtype == Dtype::kFloat32) {
    static_cast<float*>(y.data)[at] = value;
  } else {
    static_cast<T*>(y.data)[at] = from_float<T>(value);
  }
}

// Outputs of rows row ... row + 3 for one token.
template <typename T>
__device__ __forceinline__ void store_four(const Problem& p, int token, int row, float4 values) {
  if (token >= p.m || row >= p.n) return;
  if (p.stores_tensor) {  // then rows come in eights
    *reinterpret_cast<uint2*>(static_cast<T*>(p.y.data) + token * p.y.stride + row) = {pack_two<T>(values.x, values.y),
                                                                                       pack_two<T>(values.z, values.w)};
    return;
  }
  store_one<T>(p.y, token, row, values.x);
  if (row + 1 < p.n) store_one<T>(p.y, token, row + 1, values.y);
  if (row + 2 < p.n) store_one<T>(p.y, token, row + 2, values.z);
  if (row + 3 < p.n) store_one<T>(p.y, token, row + 3, values.w);
}

// One tile of the wide kernel for one warpgroup: products, then the output in pieces of 64 rows and 32 tokens.
template <typename T, int kBlocks>
__device__ __forceinline__ void wide_tile(const Problem& p, const CUtensorMap* y_map, const Ring<4>& stage_ring,
                                          const Ring<2>& box_ring, uint8_t* shared, const Tile& tile,
                                          uint32_t stage_fill, uint32_t box_fill) {
  using Shape = WideLayout;
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kGroup, 0), barrier = 1 + group;
  const int thread = threadIdx.x % kGroup, lane = thread % 32, warp = thread / 32;
  const int own_row = group * kBlocks * kBlockRows, row = tile.row + own_row, token = tile.token;
  float2* row_values = reinterpret_cast<float2*>(shared + Shape::kConstantStart) + group * 2 * kGroup;
  float2* token_values = row_values + kGroup;
  named_barrier(barrier, kGroup);  // the tile before is written
  if (thread < kBlocks * kBlockRows) row_values[thread] = row_constants(p, row + thread);
  token_values[thread] = token_constants(p, token + thread);

  float sums[kBlocks][kWideTokens / 2];
  multiply<T, Shape, kBlocks, kWideTokens, kWideRows>(sums, stage_ring, box_ring, shared, p.groups > 1, own_row, 0, 1,
                                                      p.stages(), stage_fill, box_fill);
  const uint32_t staging = shared_address(shared) + Shape::kStagingStart + group * (Shape::kStagingBytes / 2);
  if (!p.stores_tensor) named_barrier(barrier, kGroup);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int piece = 0; piece < kWideTokens / kPieceTokens; ++piece) {
      const uint32_t to = staging + piece % 2 * (kPieceTokens * 128);
      if (p.stores_tensor) {
        if (thread == 0) tma_store_wait_read<1>();
        named_barrier(barrier, kGroup);
      }
      const int my_row = block * kBlockRows + warp * 16 + lane / 4;
      const float2 row_value[2] = {row_values[my_row], row_values[my_row + 8]};
#pragma unroll
      for (int pair = 0; pair < kPieceTokens / 16; ++pair) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int column = piece * kPieceTokens + pair * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
          values[i] = finish(sums[block][piece * (kPieceTokens / 2) + pair * 8 + i], row_value[i / 2 % 2],
                             token_values[column]);
          if (!p.stores_tensor) {
            const int at = row + my_row + i / 2 % 2 * 8;
            if (at < p.n && token + column < p.m) store_one<T>(p.y, token + column, at, values[i]);
          }
        }
        if (p.stores_tensor) {
          // matrix j of four: tokens 8 * (j / 2) and on, rows 8 * (j % 2) and on; lane 8j + i has the address of token
          // i
          const int at = pair * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
          store_transposed(to + swizzled(at, chunk), pack_two<T>(values[0], values[1]),
                           pack_two<T>(values[2], values[3]), pack_two<T>(values[4], values[5]),
                           pack_two<T>(values[6], values[7]));
        }
      }
      if (p.stores_tensor) {
        fence_async_proxy();
        named_barrier(barrier, kGroup);
        if (thread == 0) {
          tma_store(y_map, to, row + block * kBlockRows, token + piece * kPieceTokens);
          tma_store_commit();
        }
      }
    }
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(kWideThreads, 1)
    wide_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap sign_map,
                const __grid_constant__ CUtensorMap y_map, const __grid_constant__ Problem p,
                const __grid_constant__ Tiles tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  using Shape = WideLayout;
  const Ring<4> stage_ring{shared_address(shared) + Shape::kBarrierStart};
  const Ring<2> box_ring{stage_ring.barriers + 4 * 16};
  allow_next_kernel();
  if (threadIdx.x == 0) {
    stage_ring.init(1, kConsumers / 32);
    box_ring.init(p.groups > 1 ? 2 : 1, kConsumers / 32);
    barrier_init_fence();
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int stages = p.stages(), boxes = (stages + kBoxStages - 1) / kBoxStages;
  uint32_t stage_fill = 0, box_fill = 0;
  if (warp < kConsumers / 32) {
    take_registers<232>();
    wait_for_previous_kernel();
    for (int unit = blockIdx.x; unit < tiles.units; unit += gridDim.x, stage_fill += stages, box_fill += boxes) {
      const Tile tile = tiles.at(unit);
      if (tile.whole) {
        wide_tile<T, 2>(p, &y_map, stage_ring, box_ring, shared, tile, stage_fill, box_fill);
      } else {
        wide_tile<T, 1>(p, &y_map, stage_ring, box_ring, shared, tile, stage_fill, box_fill);
      }
    }
    if (threadIdx.x % kGroup == 0) tma_store_wait<0>();
  } else {
    give_registers<40>();
    if (warp == kConsumers / 32 && threadIdx.x % 32 == 0) {
      wait_for_previous_kernel();
      for (int unit = blockIdx.x; unit < tiles.units; unit += gridDim.x, stage_fill += stages) {
        const int token = tiles.at(unit).token;
        for (int i = 0; i < stages; ++i) {
          load_stage<Shape>(stage_ring, shared_address(shared), &z_map, stage_fill + i, i, token);
        }
      }
    } else if (warp == kConsumers / 32 + 1) {
      for (int unit = blockIdx.x; unit < tiles.units; unit += gridDim.x, box_fill += boxes) {
        const Tile tile = tiles.at(unit);
        for (int i = 0; i < boxes; ++i) {
          load_box<T, Shape, kWideRows, kWideRows / 2>(box_ring, shared, &sign_map, box_fill + i, p, i * kBoxStages,
                                                       tile.row, tile.whole ? kWideRows : kWideRows / 2);
        }
      }
    }
  }
#else
  __trap();
#endif
}

// Block (rank in its cluster, rows, tokens). The sums of all warpgroups of a cluster meet in shared memory.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kNarrowThreads, narrow_blocks(kTokens))
    narrow_kernel(const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap sign_map,
                  const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  using Shape = NarrowLayout<kTokens>;
  constexpr int kStages = Shape::kStages;
  constexpr int kPitch = kBlockRows + 4;  // of a token's sums: rows of fragments fall into different banks
  static_assert(2 * kTokens * kPitch * 4 <= kStages * Shape::kStageBytes);
  const Ring<kStages> stage_ring{shared_address(shared) + Shape::kBarrierStart};
  const Ring<2> box_ring{stage_ring.barriers + kStages * 16};
  const int split = gridDim.x, rank = blockIdx.x;
  const int row = blockIdx.y * kBlockRows, token = blockIdx.z * kTokens;
  float2* row_values = reinterpret_cast<float2*>(shared + Shape::kConstantStart);
  float2* token_values = row_values + kBlockRows;
  allow_next_kernel();
  if (threadIdx.x == 0) {
    stage_ring.init(1, kGroup / 32);
    box_ring.init(p.groups > 1 ? 2 : 1, kConsumers / 32);
    barrier_init_fence();
  }
  __syncthreads();

  const int all = p.stages(), begin = all * rank / split, stages = all * (rank + 1) / split - begin;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  if (warp < kConsumers / 32) {
    if (threadIdx.x < kBlockRows) row_values[threadIdx.x] = row_constants(p, row + threadIdx.x);
    wait_for_previous_kernel();
    if (threadIdx.x < kTokens) token_values[threadIdx.x] = token_constants(p, token + threadIdx.x);
    float sums[1][kTokens / 2];
    const int group = warp / 4;
    multiply<T, Shape, 1, kTokens, kBlockRows>(sums, stage_ring, box_ring, shared, p.groups > 1, 0, group, 2, stages, 0,
                                               0);
    named_barrier(1, kConsumers);  // no stage is in use any more
    float* to = reinterpret_cast<float*>(shared) + (group * kTokens + lane % 4 * 2) * kPitch + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) to[(i / 4 * 8 + i % 2) * kPitch + i / 2 % 2 * 8] = sums[0][i];
  } else if (warp == kConsumers / 32) {
    wait_for_previous_kernel();
    if (lane == 0) {
      for (int i = 0; i < stages; ++i) {
        load_stage<Shape>(stage_ring, shared_address(shared), &z_map, i, begin + i, token);
      }
    }
  } else {
    for (int box = 0; box * kBoxStages < stages; ++box) {
      load_box<T, Shape, kBlockRows, kBlockRows>(box_ring, shared, &sign_map, box, p, begin + box * kBoxStages, row,
                                                 kBlockRows);
    }
  }
  __syncwarp();
  cluster_barrier();

  // each block of the cluster finishes a share of the tokens, four rows a thread
  const int first = kTokens * rank / split, share = kTokens * (rank + 1) / split - first;
  for (int i = threadIdx.x; i < share * (kBlockRows / 4); i += kNarrowThreads) {
    const int column = first + i / (kBlockRows / 4), at = i % (kBlockRows / 4) * 4;
    float4 sum{};
    for (int part = 0; part < 2 * split; ++part) {
      const uint32_t from = shared_address(shared) + ((part % 2 * kTokens + column) * kPitch + at) * 4;
      const float4 more = load_cluster(from, part / 2);
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    store_four<T>(
        p, token + column, row + at,
        {finish(sum.x, row_values[at], token_values[column]), finish(sum.y, row_values[at + 1], token_values[column]),
         finish(sum.z, row_values[at + 2], token_values[column]),
         finish(sum.w, row_values[at + 3], token_values[column])});
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

Plan plan(int64_t m, int64_t n, int64_t k, const Device& device) {
  const int64_t blocks = device.multiprocessors;
  const Tiles tiles = wide_tiles(m, n, device);
  const int tokens = m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : 128;
  const int64_t narrow = ceil_div(n, kBlockRows) * ceil_div(m, tokens);
  // cycles of the tensor cores for 16 columns; narrow tiles of 128 tokens wait for z about a fifth of their time
  const int64_t wide_cycles = 256 * ceil_div(tiles.whole, blocks) + 128 * ceil_div(tiles.units - tiles.whole, blocks);
  const int64_t narrow_cycles = 77 * ceil_div(narrow, blocks);
  if (m > 128 && wide_cycles <= narrow_cycles) return {Variant::kWide, kWideTokens, 1, tiles};
  int split = 1;
  while (split < kMaxSplit && narrow * split * 2 <= blocks * narrow_blocks(tokens) &&
         k >= int64_t{split} * 2 * 4 * kStageColumns) {
    split *= 2;
  }
  return {Variant::kNarrow, tokens, split, tiles};
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether TMA can read x as it is.
bool reads_x(const SignGemm& p) {
  return !p.in_scale && aligned(p.x.data, 16) && p.stride % 8 == 0 && p.stride >= p.weight.k;
}

int64_t pitch(const SignGemm& p) { return ceil_div(p.weight.k, 8) * 8; }

int64_t padded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

template <typename T>
cudaError_t launch_wide(const Problem& p, const CUtensorMap& z, const CUtensorMap& signs, const Plan& plan,
                        const Launch& on) {
  CUtensorMap y{};
  if (p.stores_tensor) {
    const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cudaError_t error =
        make_tensor_map(y, type, p.y.data, {{p.n, 2, kBlockRows}, {p.m, p.y.stride * 2, kPieceTokens}});
    if (error != cudaSuccess) return error;
  }
  const int grid = std::min(plan.tiles.units, on.device.multiprocessors);
  return launch(wide_kernel<T>, on, grid, kWideThreads, WideLayout::kBytes, true, z, signs, y, p, plan.tiles);
}

template <typename T, int kTokens>
cudaError_t launch_narrow(const Problem& p, const CUtensorMap& z, const CUtensorMap& signs, const Plan& plan,
                          const Launch& on) {
  constexpr int kBytes = NarrowLayout<kTokens>::kBytes;
  const auto kernel = narrow_kernel<T, kTokens>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.split), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.split, ceil_div(p.n, kBlockRows), ceil_div(p.m, kTokens));
  config.blockDim = kNarrowThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
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
         w.words() % 4 == 0 && aligned(w.signs, 16) && (w.groups() == 1 || w.group_size % kStageColumns == 0);
}

size_t sign_gemm_wgmma_workspace(const SignGemm& p) {
  const int64_t numbers = padded(p.m * 4);
  if (!reads_x(p)) return 2 * numbers + p.m * pitch(p) * 2;
  return p.in_shift ? numbers : 0;
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
  p.bias = w.bias;
  p.y = problem.y;
  p.stores_tensor =
      problem.y.dtype == problem.x.dtype && aligned(problem.y.data, 16) && problem.y.stride % 8 == 0 && w.n % 8 == 0;

  const void* z = problem.x.data;
  int64_t stride = problem.stride;
  if (!reads_x(problem) || problem.in_shift) {
    std::byte* memory = static_cast<std::byte*>(workspace);
    const int64_t numbers = padded(problem.m * 4);
    ScaleActivations prologue{problem.x, problem.m, w.k, problem.stride, problem.in_scale, problem.in_shift};
    prologue.shift = reinterpret_cast<float*>(memory);
    p.shift = problem.in_shift ? prologue.shift : nullptr;
    if (!reads_x(problem)) {
      prologue.power = reinterpret_cast<float*>(memory + numbers);
      prologue.z = memory + 2 * numbers;
      prologue.pitch = pitch(problem);
      p.power = prologue.power;
      z = prologue.z;
      stride = prologue.pitch;
    }
    const cudaError_t error = scale_activations(prologue, on);
    if (error != cudaSuccess) return error;
  }

  const Plan how = plan(problem.m, w.n, w.k, on.device);
  const bool wide = how.variant == Variant::kWide;
  const auto type = is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap z_map, sign_map;
  cudaError_t error = make_tensor_map(z_map, type, z, {{w.k, 2, 64}, {problem.m, stride * 2, how.tokens}});
  if (error != cudaSuccess) return error;
  error = make_tensor_map(sign_map, CU_TENSOR_MAP_DATA_TYPE_UINT32, w.signs,
                          {{w.words(), 4, 32}, {w.n, w.words() * 4, wide ? kWideRows / 2 : kBlockRows}});
  if (error != cudaSuccess) return error;
  return is_half ? launch_plan<__half>(p, z_map, sign_map, how, on)
                 : launch_plan<__nv_bfloat16>(p, z_map, sign_map, how, on);
}

}  // namespace bitinfer::cuda
