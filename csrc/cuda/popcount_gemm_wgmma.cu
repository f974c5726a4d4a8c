// popcount_gemm for batches and prefill, on the binary tensor cores of Hopper:
//
//   I[t, n] = sum(q[t]) - 2 * sum_b c_b popcount(w[n] & plane_b[t])     c_b = 2^b, the top one negative
//   y[t, n] = (act_scale[t] * scale[n]) * I + (act_scale[t] * group_shift[n]) * sum(q[t]) + act_shift[t] + bias[n]
//
// with w [N, W] and planes [M, bits, W] in words of 32 columns, rounded as bitinfer.ops.popcount_gemm says. The plane
// of one bit stands for +-1, not for 0 and 1: I = sum(q) - 2|w| + 4 popcount(w & plane), and |w| is counted on the way.
// For M > 8 tokens, right for any. One weight plane, one segment, K % 128 == 0, aligned to 16 bytes.
//
// A block takes tiles of y one after another (block i those numbered i, i + blocks, ...): 64 rows of the weight for
// each of its warpgroups, by columns / bits tokens. The weight is operand A and the planes are operand B of wgmma
// m64n<columns>k256: column j + tokens * b is plane b of token j, which one box of the copy engine brings about, so
// that a thread holds all planes of its outputs and combines them by shifts and additions. The largest tile has three
// warpgroups by 256 columns: 384 threads leave 168 registers for 128 accumulators, and no room for a warp that only
// loads. A stage of shared memory holds 1,024 columns of K of both operands.
//
// The warpgroups take turns, a stage each (S: storing outputs, +: loads the stage that all have just read):
//
//   warpgroup 0  [stage 0]                  [stage 1+]                  S S S   [stage 0+]
//   warpgroup 1           [stage 0]                   [stage 1]                  S S S   [stage 0]
//   warpgroup 2                    [stage 0]                   [stage 1]                  S S S   [stage 0]
//
// so the tensor cores always have work queued, and a warpgroup has the time of two turns, 1,024 cycles, to store its
// part of a tile while the others multiply. Without turns all would store at the same time and the tensor cores wait.
// Tiles of one warpgroup, for few tokens, run two blocks on a multiprocessor instead.
//
// What bounds it: at 8 bits the tensor cores (65,536 bit operations a cycle and multiprocessor, at a clock that falls
// from 1.8 to 1.6 GHz when the GPU is short of power), with 37 bytes a cycle of operands from level 2, which gives 44;
// fewer bits have more outputs for the same work, and at one bit storing takes as long as multiplying. For few tokens
// it is the latency of one pass through memory.
#include <algorithm>
#include <type_traits>

#include "popcount_gemm_one_bit.h"
#include "popcount_gemm_wgmma.cuh"
#include "popcount_gemm_wgmma.h"
#include "tensor_map.h"
#include "wgmma_b1.cuh"

namespace bitinfer::cuda {
namespace {

using namespace popcount_wgmma;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    popcount_gemm_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                               const __grid_constant__ CUtensorMap planes_map, const __grid_constant__ Arguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kTurns = Tile::kWarpgroups > 1;
  extern __shared__ uint8_t memory[];
  const Shared<Tile> shared(memory);
  // through a shuffle, so that the compiler knows that a warp agrees, and keeps descriptors in uniform registers
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int lane = threadIdx.x % 32;
  const bool loads = threadIdx.x == 0;
  const int turn = 4 + warpgroup, next_turn = 4 + (warpgroup + 1) % Tile::kWarpgroups;

  allow_next_kernel();
  if (loads) {
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), 4 * Tile::kWarpgroups);
    }
    barrier_init_fence();
    prefetch_tensor_map(&planes_map);
    const Loader first{static_cast<int>(blockIdx.x), 0, origin_of<Tile>(blockIdx.x, p)};
    Loader next = first;  // weights do not depend on the previous kernel
    for (int i = 0; i < Tile::kStages && next.tile < p.tiles(); ++i, next.advance<Tile>(p)) {
      next.load_weight(shared, i, weight_map);
    }
    wait_for_previous_kernel();
    next = first;
    for (int i = 0; i < Tile::kStages && next.tile < p.tiles(); ++i, next.advance<Tile>(p)) {
      next.load_planes(shared, i, planes_map);
    }
    *shared.loader() = next;
  }
  wait_for_previous_kernel();
  __syncthreads();
  if (kTurns && warpgroup == Tile::kWarpgroups - 1) named_barrier_arrive(next_turn, 256);

  int acc[Tile::kColumns / 2];
  Ring<Tile::kStages> ring;
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(shared.empty(stage));
  };
  // Fills a stage again that all warpgroups release about now. A warpgroup does so after it has issued instructions,
  // not when its last ones are done: then it stores outputs, and that time is short.
  const auto refill = [&](const Ring<Tile::kStages>& stage) {
    if (loads && shared.loader()->tile < p.tiles()) {
      Loader next = *shared.loader();
      barrier_wait(shared.empty(stage.at), stage.phase);
      next.load_weight(shared, stage.at, weight_map);
      next.load_planes(shared, stage.at, planes_map);
      next.advance<Tile>(p);
      *shared.loader() = next;
    }
    __syncwarp();
  };
  Ring<Tile::kStages> previous;
  for (int tile = blockIdx.x; tile < p.tiles(); tile += gridDim.x) {
    Parameters parameters;
    int count = 0;
    const auto multiply = [&](int k, auto first) {
      barrier_wait(shared.full(ring.at), ring.phase);
      const uint64_t a = wgmma_descriptor(shared.weight(ring.at) + warpgroup * 64 * kRowBytes);
      const uint64_t b = wgmma_descriptor(shared.planes(ring.at));
      if (kTurns) named_barrier(turn, 256);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {  // 32 bytes each
        if (first && i == 0) {
          wgmma_b1(acc, a, b);
        } else {
          wgmma_b1_add(acc, a + 2 * i, b + 2 * i);
        }
      }
      wgmma_commit();
      if (kTurns) named_barrier_arrive(next_turn, 256);
      // what there is time for while the tensor cores work
      if (kTurns) {
        if (!first || tile != static_cast<int>(blockIdx.x)) refill(previous);
      } else if (!first) {
        wgmma_wait<1>();
        release(previous.at);
        refill(previous);
      }
      if (kTurns && first) parameters.load(shared, warpgroup, *shared.stage_origin(ring.at), p);
      if (Tile::kBits == 1) {
        count += count_bits(shared.generic + ring.at * Tile::kStageBytes + threadIdx.x / 32 * 16 * kRowBytes);
      }
      if (k == p.stages - 1) {
        parameters.store(shared, warpgroup, p);
        named_barrier(1 + warpgroup, 128);
      }
      if (kTurns) {
        wgmma_wait<0>();  // the others keep the tensor cores busy meanwhile
        release(ring.at);
      }
      previous = ring;
      ring.advance();
    };
    if (!kTurns) {
      named_barrier(1 + warpgroup, 128);  // all have read the parameters of the tile before
      parameters.load(shared, warpgroup, *shared.stage_origin(ring.at), p);
    }
    multiply(0, std::true_type{});
    for (int k = 1; k < p.stages; ++k) multiply(k, std::false_type{});
    if (!kTurns) {
      wgmma_wait<0>();
      release(previous.at);
      refill(previous);
    }
    if (p.y.dtype == Dtype::kFloat32) {
      p.extras ? store_tile<Tile, float, true>(acc, shared, warpgroup, p, count)
               : store_tile<Tile, float, false>(acc, shared, warpgroup, p, count);
    } else {
      p.extras ? store_tile<Tile, uint16_t, true>(acc, shared, warpgroup, p, count)
               : store_tile<Tile, uint16_t, false>(acc, shared, warpgroup, p, count);
    }
  }
  if (kTurns && warpgroup == 0) named_barrier(turn, 256);  // takes the last turn, which nobody needs
#else
  __trap();
#endif
}

template <class Tile>
cudaError_t run(const PopcountGemm& p, const Launch& on) {
  const Weight& weight = p.weight;
  const int64_t pitch = weight.words() * 4;
  const Arguments arguments = arguments_of<Tile>(p);
  CUtensorMap weights, planes;
  cudaError_t error = make_tensor_map(weights, CU_TENSOR_MAP_DATA_TYPE_UINT32, weight.signs,
                                      {{weight.words(), 0, kRowBytes / 4}, {weight.n, pitch, Tile::kRows}});
  if (error != cudaSuccess) return error;
  error = make_tensor_map(
      planes, CU_TENSOR_MAP_DATA_TYPE_UINT32, p.planes,
      {{weight.words(), 0, kRowBytes / 4}, {p.m, p.bits * pitch, Tile::kTokens}, {p.bits, pitch, Tile::kBits}});
  if (error != cudaSuccess) return error;
  const int64_t tiles = int64_t{arguments.row_tiles} * arguments.token_tiles;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(tiles, on.device.multiprocessors * Tile::kBlocks));
  return launch(popcount_gemm_wgmma_kernel<Tile>, on, grid, Tile::kThreads, Tile::kSharedBytes, true, weights, planes,
                arguments);
}

// The tiles there are, fastest first for large problems. A tile of 8-bit tokens needs 128 columns for its 16 tokens.
constexpr WgmmaTile kTiles[] = {{3, 256}, {2, 256}, {1, 128}, {1, 64}};

template <int bits>
cudaError_t run_bits(const PopcountGemm& p, const Launch& on) {
  const WgmmaTile tile = choose_wgmma_tile(p, on.device);
  if (tile == WgmmaTile{3, 256}) return run<Tile<bits, 3, 256>>(p, on);
  if (tile == WgmmaTile{2, 256}) return run<Tile<bits, 2, 256>>(p, on);
  if constexpr (bits < 8) {
    if (tile == WgmmaTile{1, 64}) return run<Tile<bits, 1, 64>>(p, on);
  }
  return run<Tile<bits, 1, 128>>(p, on);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

WgmmaTile choose_wgmma_tile(const PopcountGemm& p, const Device& device) {
  WgmmaTile best = kTiles[0];
  int64_t least = INT64_MAX;
  for (const WgmmaTile tile : kTiles) {
    const int64_t rows = 64 * tile.warpgroups, tokens = tile.columns / p.bits;
    if (tokens < 16) continue;
    // Cycles, fitted on H200: a stage takes as long as its instructions, or as its copies from level 2 at 40 bytes a
    // cycle; then comes what nothing hides, the start of a kernel and most of the storing of large tiles.
    const int64_t tiles = ceil_div(p.weight.n, rows) * ceil_div(p.m, tokens), sms = device.multiprocessors;
    const int64_t stage =
        std::max<int64_t>({2 * tile.warpgroups * tile.columns, (rows + tile.columns) * kRowBytes / 40, 500});
    const int64_t one = ceil_div(p.weight.k, kStageColumns) * stage + 10 * tile.warpgroups * tokens;
    int64_t cycles = 4000 + ceil_div(tiles, sms) * (one + 600);
    if (tile.warpgroups == 1) {  // two blocks share a multiprocessor
      cycles = 2200 + (tiles <= sms ? 3 * one / 2 : 2 * one * ceil_div(tiles, 2 * sms));
    }
    if (cycles < least) {
      least = cycles;
      best = tile;
    }
  }
  return best;
}

bool popcount_gemm_wgmma_takes(const PopcountGemm& p, const Device& device) {
  const Weight& weight = p.weight;
  const int64_t size = element_size(p.y.dtype);
  return device.has_wgmma() && device.shared_bytes >= 232448 && weight.planes == 1 && p.segments() == 1 &&
         (p.bits == 8 || p.bits == 4 || p.bits == 2 || p.bits == 1) && weight.k > 0 && weight.k % 128 == 0 &&
         weight.k <= 1 << 19 && aligned(weight.signs) && aligned(p.planes) && aligned(p.act_scale) &&
         aligned(p.act_sum) && aligned(p.act_shift) && aligned(p.y.data) && weight.n * size % 16 == 0 &&
         p.y.stride * size % 16 == 0;
}

cudaError_t popcount_gemm_wgmma(const PopcountGemm& p, const Launch& on) {
  if (p.m == 0 || p.weight.n == 0) return cudaSuccess;
  switch (p.bits) {
    case 8:
      return run_bits<8>(p, on);
    case 4:
      return run_bits<4>(p, on);
    case 2:
      return run_bits<2>(p, on);
    default:
      return popcount_gemm_one_bit_takes(p, on.device) ? popcount_gemm_one_bit(p, on) : run_bits<1>(p, on);
  }
}

}  // namespace bitinfer::cuda
