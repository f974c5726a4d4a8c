// popcount_gemm of one-bit activations at prefill, on the binary tensor cores of Hopper:
//
//   I[t, n] = sum(q[t]) - 2|w[n]| + 4 popcount(w[n] & plane[t])        (the plane stands for +-1, not for 0 and 1)
//   y[t, n] = (act_scale[t] * scale[n]) * I + (act_scale[t] * group_shift[n]) * sum(q[t]) + act_shift[t] + bias[n]
//
// with w [N, W] and plane [M, W] in words of 32 columns, rounded as bitinfer.ops.popcount_gemm says, and |w| counted on
// the way. It takes what popcount_gemm_wgmma.cu takes, at one bit and with 16-bit outputs.
//
// A block takes tiles of 128 rows of the weight by 256 tokens, one after another: two warpgroups of 64 rows each, wgmma
// m64n256k256, and a warp that loads six stages of 512 columns of K of both operands ahead.
//
// One bit makes eight times as many outputs as eight bits do for the same products: a tile of K = 8192 is 8,192 cycles
// of tensor cores and 64 KB of y, which level 2 takes as slowly as it gives operands. So y leaves while the next tile
// is multiplied: a warpgroup writes its 32 KB to shared memory, hands them to the copy engine half by half and goes on;
// it has a whole tile's time before it needs that memory again.
//
// What bounds it: making the outputs, some 800 instructions a thread that the tensor cores wait for (2,900 cycles a
// tile on H200; without them 8192 x 8192 runs at 12,000 TOPS), then operands from level 2, 48 bytes a cycle and
// multiprocessor.
#include <algorithm>

#include "popcount_gemm_one_bit.h"
#include "popcount_gemm_wgmma.cuh"
#include "tensor_map.h"
#include "wgmma_b1.cuh"

namespace bitinfer::cuda {

namespace popcount_wgmma {

struct OneBit {
  static constexpr int kBits = 1, kColumns = 256, kTokens = 256, kTokenBlocks = kTokens / 8, kRows = 128;
  static constexpr int kThreads = 2 * 128 + 32;
  static constexpr int kStages = 6, kStageRowBytes = 64, kStageColumns = 8 * kStageRowBytes;
  static constexpr int kParts = 2, kPartTokens = kTokens / kParts;  // of y that are stored at a time

  // Shared memory: stages; per warpgroup its y, then what applies to tokens and rows; barriers.
  static constexpr int kStageBytes = (kRows + kTokens) * kStageRowBytes;
  static constexpr int kOutputBytes = kTokens * 64 * 2;
  static constexpr int kParameterBytes = kTokens * 12 + 64 * 16 + 16;
  static constexpr int kOutputsAt = kStages * kStageBytes;
  static constexpr int kParametersAt = kOutputsAt + 2 * kOutputBytes;
  static constexpr int kBarriersAt = kParametersAt + 2 * kParameterBytes;
  static constexpr int kSharedBytes = 1024 + kBarriersAt + 16 * kStages;
  static_assert(kSharedBytes <= 232448);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <>
struct Shared<OneBit> {
  uint8_t* generic;
  uint32_t base;

  __device__ Shared(uint8_t* memory) {
    const uint32_t address = shared_address(memory);
    base = (address + 1023) & ~1023u;
    generic = memory + (base - address);
  }
  __device__ uint32_t weight(int stage) const { return base + stage * OneBit::kStageBytes; }
  __device__ uint32_t plane(int stage) const { return weight(stage) + OneBit::kRows * OneBit::kStageRowBytes; }
  __device__ const uint8_t* rows_of_warp(int stage) const {
    return generic + stage * OneBit::kStageBytes + threadIdx.x / 32 * 16 * OneBit::kStageRowBytes;
  }
  __device__ uint32_t full(int stage) const { return base + OneBit::kBarriersAt + 8 * stage; }  // landed
  __device__ uint32_t empty(int stage) const { return full(OneBit::kStages + stage); }          // read by all warps
  __device__ uint32_t outputs(int warpgroup) const {
    return base + OneBit::kOutputsAt + warpgroup * OneBit::kOutputBytes;
  }
  __device__ float* act_scale(int warpgroup) const {
    return reinterpret_cast<float*>(generic + OneBit::kParametersAt + warpgroup * OneBit::kParameterBytes);
  }
  __device__ int* act_sum(int warpgroup) const {
    return reinterpret_cast<int*>(act_scale(warpgroup) + OneBit::kTokens);
  }
  __device__ float* act_shift(int warpgroup) const { return act_scale(warpgroup) + 2 * OneBit::kTokens; }
  __device__ Row* rows(int warpgroup) const {
    return reinterpret_cast<Row*>(act_scale(warpgroup) + 3 * OneBit::kTokens);
  }
  __device__ Origin* origin(int warpgroup) const { return reinterpret_cast<Origin*>(rows(warpgroup) + 64); }
};

#endif

}  // namespace popcount_wgmma

namespace {

using namespace popcount_wgmma;

struct Maps {
  CUtensorMap weight, plane, y;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Describes a K-major operand with 64-byte swizzle: rows of 64 bytes, eight rows an atom of 512 aligned bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{32} << 32 | uint64_t{2} << 62;
}

// One warp: the set bits in half of each of its 16 rows of a stage. Lane i counts in row i / 2.
__device__ __forceinline__ int count_half_rows(const uint8_t* rows) {
  const int lane = threadIdx.x % 32;
  int count = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int chunk = lane % 2 * 2 + (lane / 4 + i) % 2;
    const uint4 w = *reinterpret_cast<const uint4*>(rows + lane / 2 * OneBit::kStageRowBytes + chunk * 16);
    count += (__popc(w.x) + __popc(w.y)) + (__popc(w.z) + __popc(w.w));
  }
  return count;
}

// One thread: loads the stages of all tiles of the block, as the warpgroups release them.
__device__ __forceinline__ void load_stages(const Shared<OneBit>& shared, const Maps& maps, const Arguments& p) {
  Ring<OneBit::kStages> ring;
  const auto load_weight = [&](int stage, Origin at, int k) {
    barrier_arrive_expecting(shared.full(stage), OneBit::kStageBytes);
    tma_load(shared.weight(stage), &maps.weight, shared.full(stage), k * OneBit::kStageColumns / 32, at.row);
  };
  const Origin first = origin_of<OneBit>(blockIdx.x, p);
  const int ahead = min(OneBit::kStages, p.stages);
  for (int k = 0; k < ahead; ++k) load_weight(k, first, k);  // weights do not depend on the previous kernel
  wait_for_previous_kernel();
  for (int tile = blockIdx.x; tile < p.tiles(); tile += gridDim.x) {
    const Origin at = origin_of<OneBit>(tile, p);
    for (int k = 0; k < p.stages; ++k) {
      if (tile != static_cast<int>(blockIdx.x) || k >= ahead) {
        barrier_wait(shared.empty(ring.at), ring.phase ^ 1);
        load_weight(ring.at, at, k);
      }
      tma_load(shared.plane(ring.at), &maps.plane, shared.full(ring.at), k * OneBit::kStageColumns / 32, at.token);
      ring.advance();
    }
  }
}

// One warpgroup: makes the outputs of its 64 rows in shared memory and has the copy engine store them. `count` is the
// number of set bits in half a row, as count_half_rows() deals them out.
template <bool half, bool extras>
__device__ __forceinline__ void store_outputs(int (&acc)[OneBit::kColumns / 2], const Shared<OneBit>& shared,
                                              int warpgroup, const CUtensorMap& y, const Arguments& p, int count,
                                              Origin at) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  // what the instances of this function have in common must not be computed ahead of them all: no registers for that
#pragma unroll
  for (int& value : acc) asm volatile("" : "+r"(value) : "n"(2 * half + extras));
  Rows rows;
  count += __shfl_xor_sync(~0u, count, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Row row = shared.rows(warpgroup)[16 * warp + lane / 4 + 8 * h];
    rows.scale[h] = row.scale;
    if (extras) rows.group_shift[h] = row.group_shift, rows.bias[h] = row.bias;
    rows.offset[h] = static_cast<float>(-2 * __shfl_sync(~0u, count, lane / 4 * 2 + 16 * h)) - kMagic;
  }
#pragma unroll
  for (int part = 0; part < OneBit::kParts; ++part) {
    if (part > 0 && at.token + part * OneBit::kPartTokens >= p.m) break;
    const uint32_t to = shared.outputs(warpgroup) + part * OneBit::kPartTokens * kRowBytes;
#pragma unroll
    for (int i = 0; i < OneBit::kPartTokens / 8; i += 2) {
      float value[2][2][2];
      outputs<OneBit, extras>(value[0], acc, part * OneBit::kPartTokens / 8 + i, shared, warpgroup, rows);
      outputs<OneBit, extras>(value[1], acc, part * OneBit::kPartTokens / 8 + i + 1, shared, warpgroup, rows);
      uint32_t pair[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) pair[e] = pack_two<half>(value[e / 2][e % 2][0], value[e / 2][e % 2][1]);
      // transposed on the way: a row of each 8 x 8 matrix is a token
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + swizzled(8 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)),
                   "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3]));
    }
    fence_async_proxy();
    named_barrier(1 + warpgroup, 128);
    if (thread == 0) {
      tma_store(&y, to, at.row + 64 * warpgroup, at.token + part * OneBit::kPartTokens);
      tma_store_commit();
    }
  }
}

#endif

template <bool half, bool extras>
__global__ void __launch_bounds__(OneBit::kThreads, 1)
    popcount_gemm_one_bit_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  const Shared<OneBit> shared(memory);
  // through a shuffle, so that the compiler knows that a warp agrees, and keeps descriptors in uniform registers
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  allow_next_kernel();
  if (threadIdx.x == 0) {
    for (int i = 0; i < OneBit::kStages; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 2) {
    if (lane == 0) load_stages(shared, maps, p);
    return;
  }
  wait_for_previous_kernel();
  int acc[OneBit::kColumns / 2];
  Ring<OneBit::kStages> ring;
  for (int tile = blockIdx.x; tile < p.tiles(); tile += gridDim.x) {
    const Origin at = origin_of<OneBit>(tile, p);
    Parameters parameters;
    parameters.load(shared, warpgroup, at, p);
    int count = 0, previous = 0;
    const auto multiply = [&](auto first) {
      barrier_wait(shared.full(ring.at), ring.phase);
      const uint64_t a = descriptor(shared.weight(ring.at) + warpgroup * 64 * OneBit::kStageRowBytes);
      const uint64_t b = descriptor(shared.plane(ring.at));
      wgmma_fence();
      if (first) {
        wgmma_b1(acc, a, b);
      } else {
        wgmma_b1_add(acc, a, b);
      }
      wgmma_b1_add(acc, a + 2, b + 2);  // the next 32 bytes
      wgmma_commit();
      count += count_half_rows(shared.rows_of_warp(ring.at));
      if (!first) {
        wgmma_wait<1>();
        if (lane == 0) barrier_arrive(shared.empty(previous));
      }
      previous = ring.at;
      ring.advance();
    };
    multiply(std::true_type{});
    for (int k = 1; k < p.stages; ++k) multiply(std::false_type{});
    if (thread == 0) tma_store_wait_read<0>();  // of the tile before
    parameters.store(shared, warpgroup, p);
    named_barrier(1 + warpgroup, 128);
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(shared.empty(previous));
    store_outputs<half, extras>(acc, shared, warpgroup, maps.y, p, count, at);
  }
  if (thread == 0) tma_store_wait<0>();
#else
  __trap();
#endif
}

}  // namespace

bool popcount_gemm_one_bit_takes(const PopcountGemm& p, const Device& device) {
  const int64_t tiles =
      (p.weight.n + OneBit::kRows - 1) / OneBit::kRows * ((p.m + OneBit::kTokens - 1) / OneBit::kTokens);
  return p.bits == 1 && element_size(p.y.dtype) == 2 && tiles >= device.multiprocessors;
}

cudaError_t popcount_gemm_one_bit(const PopcountGemm& p, const Launch& on) {
  const Weight& weight = p.weight;
  Arguments arguments = arguments_of<OneBit>(p);
  arguments.stages = static_cast<int>((weight.k + OneBit::kStageColumns - 1) / OneBit::kStageColumns);
  Maps maps;
  const int64_t pitch = weight.words() * 4;
  const int words = OneBit::kStageRowBytes / 4;
  cudaError_t error =
      make_tensor_map(maps.weight, CU_TENSOR_MAP_DATA_TYPE_UINT32, weight.signs,
                      {{weight.words(), 0, words}, {weight.n, pitch, OneBit::kRows}}, CU_TENSOR_MAP_SWIZZLE_64B);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(maps.plane, CU_TENSOR_MAP_DATA_TYPE_UINT32, p.planes,
                          {{weight.words(), 0, words}, {p.m, pitch, OneBit::kTokens}}, CU_TENSOR_MAP_SWIZZLE_64B);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(maps.y, CU_TENSOR_MAP_DATA_TYPE_UINT16, p.y.data,
                          {{weight.n, 0, 64}, {p.m, p.y.stride * 2, OneBit::kPartTokens}});
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel) {
    const auto grid =
        static_cast<unsigned>(std::min(arguments.row_tiles * arguments.token_tiles, on.device.multiprocessors));
    return launch(kernel, on, grid, OneBit::kThreads, OneBit::kSharedBytes, true, maps, arguments);
  };
  if (p.y.dtype == Dtype::kFloat16) {
    return arguments.extras ? run(popcount_gemm_one_bit_kernel<true, true>)
                            : run(popcount_gemm_one_bit_kernel<true, false>);
  }
  return arguments.extras ? run(popcount_gemm_one_bit_kernel<false, true>)
                          : run(popcount_gemm_one_bit_kernel<false, false>);
}

}  // namespace bitinfer::cuda
