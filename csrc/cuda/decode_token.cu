// All layers of a LLaMA-shaped model for one token, in one launch that stays: blocks, one a multiprocessor, go through
// the stages of every layer together and meet at a barrier of the whole grid behind each.
//
//   q, k, v     h += down;  n = RMSNorm(h) * input_norm;  q, k, v = each its product of n in integers
//   attention   rotary embedding, cache, softmax: a head, or a part of its slots, a block
//   output      o = its product
//   gate, up    h += o;  n = RMSNorm(h) * post_norm;  m = silu(gate) * up
//   down        its product of m
//
// with the integers of pack_activations, the epilogue of popcount_gemm, and the roundings of transformers. For int8,
// int4 and int2 activations (fewer bits go in eight planes too), one scale a row and a token, as many keys as queries,
// hidden sizes up to 4,096, and models of which a layer's weights fit the shared memory of all multiprocessors; sm_90.
//
// Kernels of their own for these stages lose most of their time between one another: about 1 us from the end of one to
// the first instruction of the next, cold instructions, and blocks that share a multiprocessor while others have none.
// Here a block owns rows of every matrix and a place in shared memory for each; as soon as a stage has used its
// weights, the copy engine puts the next layer's there (copies by threads would stand in the way of their loads), and
// all else that a stage will read is fetched to L2 before: memory never waits for the chain. What is left is the chain:
// five barriers a layer, activations from L2 behind each, and the instructions in between.
//
//   block      rows of all matrices, a part of a head; every block packs the token anew, in 16 warps
//   warps      two share a chunk of 512 columns: each packs a half, then takes every other tile of rows, or one of gate
//              and up, for the whole chunk; partial sums [chunk of 8, row] meet in shared memory
//   registers  h, eight columns a lane, through all layers
#include <algorithm>

#include "decode_token.h"
#include "hopper.cuh"
#include "token_attention.cuh"
#include "token_product.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kMaxHidden = kKWarps * kChunkColumns, kMaxInnerRounds = 3;

constexpr int tiles_for(int n) { return (n + kTileRows - 1) / kTileRows; }

// Memory of the grid: the barrier and a count for each head, then activations between stages, then parts of heads.
struct Memory {
  uint32_t* barrier;  // and behind it how many blocks have left
  uint32_t* heads_done;
  unsigned char* rows;  // of 16-bit numbers: q, k, v, attended, output, inner, down
  float* parts;
};

constexpr int64_t kRowAlignment = 256;

constexpr int64_t row_bytes(int columns) {
  return (2 * int64_t{columns} + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

__device__ __forceinline__ void fetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// A barrier of the grid whose two halves have other work between them. It counts up from zero, and the last block to
// leave the kernel sets it back.
struct GridBarrier {
  uint32_t *count, *left;
  uint32_t target;

  __device__ __forceinline__ void arrive() {
    target += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      uint32_t now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
      } while (now < target);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void leave() {
    if (threadIdx.x == 0 && add(left, 1) == gridDim.x - 1) *count = *left = 0;
  }
};

struct Arguments {
  DecodeToken p;
  TokenPlan plan;
  Memory memory;
  float highest;
};

// What a block knows for all layers, in shared memory, since registers are few.
template <typename T>
struct Common {
  T *q, *k, *v, *attended, *o, *m, *down;  // activations between stages
  T* projected;                            // q, k or v: no block has some of two
  int projection;
  Share qkv, out, gate, of_down;
  AttentionShare attention;

  __device__ void fill(const Arguments& a, int block, int blocks) {
    const TokenShape& shape = a.p.shape;
    const int width = shape.heads * shape.dim;
    unsigned char* rows = a.memory.rows;
    const auto take = [&rows](int columns) {
      T* const row = reinterpret_cast<T*>(rows);
      rows += row_bytes(columns);
      return row;
    };
    q = take(width), k = take(width), v = take(width), attended = take(width);
    o = take(shape.hidden), m = take(shape.inner), down = take(shape.hidden);
    const int qkv_blocks = (tiles_for(width) + a.plan.qkv_tiles - 1) / a.plan.qkv_tiles, which = block / qkv_blocks;
    projection = kQuery + min(which, 2);
    projected = which == 0 ? q : which == 1 ? k : v;
    qkv = which < 3 ? Share(tiles_for(width), block % qkv_blocks, qkv_blocks) : Share(0, 0, 1);
    out = Share(tiles_for(shape.hidden), block, blocks);
    gate = Share(tiles_for(shape.inner), block, blocks);
    of_down = Share(tiles_for(shape.hidden), block, blocks);
    const int splits = a.plan.splits, rank = block % splits;
    const int slot = static_cast<int>(min(load_long(a.p.slot), static_cast<int64_t>(a.p.capacity - 1)));
    const int part = (slot + splits - 1) / splits, begin = min(rank * part, slot);
    attention = {block / splits, rank, splits, slot, begin, min(begin + part, slot)};
  }
};

template <typename T, int kDim, int kInnerRounds>
__global__ void __launch_bounds__(kThreads, 1) decode_token_kernel(const __grid_constant__ Arguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Scratch s;
  __shared__ uint4 layer_words[2][sizeof(TokenLayer) / 16];  // this one and the next
  __shared__ Common<T> common;
  const DecodeToken& p = a.p;
  const TokenPlan& plan = a.plan;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int hidden = p.shape.hidden, inner = p.shape.inner, width = p.shape.heads * kDim;
  GridBarrier grid{a.memory.barrier, a.memory.barrier + 1, 0};

  if (thread == 0) common.fill(a, block, blocks);
  const auto layer_at = [&](int layer) -> const TokenLayer& {
    return *reinterpret_cast<const TokenLayer*>(layer_words[layer % 2]);
  };
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), planes = base + plan.scratch_at;
  int* const slots =
      reinterpret_cast<int*>(shared + plan.scratch_at + std::max(2, kInnerRounds) * kKWarps * kPlaneBytes);
  const int chunk = warp / 2;

  const auto load_layer = [&](int layer) {
    constexpr int kQuads = static_cast<int>(sizeof(TokenLayer) / 16);
    if (thread < kQuads && layer < p.layer_count) {
      layer_words[layer % 2][thread] = reinterpret_cast<const uint4*>(p.layers + layer)[thread];
    }
  };
  // copies of a layer's weights for a stage, behind which its barrier turns, by a thread that no other waits for;
  // `layer` may be one past the last
  enum Stage { kQkv, kOut, kGated, kDowned, kStages };
  __shared__ uint64_t ready[kStages];
  const auto announce = [&](Stage stage, uint32_t bytes) {
    const uint32_t barrier = shared_address(ready + stage);
    barrier_arrive_expecting(barrier, bytes);
    return barrier;
  };
  const auto copies = [&](int layer) { return thread == kThreads - 1 && layer < p.layer_count; };
  const auto copy_qkv = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kQkv, share_bytes(width, hidden, common.qkv));
    copy_share(base, layer_at(layer).of[common.projection], width, hidden, common.qkv, barrier);
  };
  const auto copy_out = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kOut, share_bytes(hidden, width, common.out));
    copy_share(base + plan.out_at, layer_at(layer).of[kOutput], hidden, width, common.out, barrier);
  };
  const auto copy_gated = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kGated, 2 * share_bytes(inner, hidden, common.gate));
    copy_share(base + plan.gate_at, layer_at(layer).of[kGate], inner, hidden, common.gate, barrier);
    copy_share(base + plan.up_at, layer_at(layer).of[kUp], inner, hidden, common.gate, barrier);
  };
  const auto copy_down = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kDowned, share_bytes(hidden, inner, common.of_down));
    copy_share(base + plan.down_at, layer_at(layer).of[kDown], hidden, inner, common.of_down, barrier);
  };

  if (thread == 0) {
    for (uint64_t& barrier : ready) barrier_init(shared_address(&barrier), 1);
    barrier_init_fence();
  }
  load_layer(0);
  __syncthreads();
  copy_qkv(0);
  copy_out(0);
  copy_gated(0);
  copy_down(0);
  uint4 h[1];
  load_row<T>(p.x, hidden, h);

  // a product of one input: outputs [share of n] go to y
  const auto project = [&]<int kRounds>(Stage stage, int layer, const uint4(&n)[kRounds], Factors<kRounds>(&factors)[1],
                                        const TokenMatrix& matrix, const Place& place, int weights_at, int columns,
                                        Share tiles, int count, T* y) {
    float act_scale[1];
    make_planes<T, kRounds, 1>(n, factors, a.highest, planes, s, act_scale);
    factors[0].template load_shift<T>(matrix, columns);
    barrier_wait(shared_address(ready + stage), layer & 1);
    const int stride = tiles.count * kTileRows;
    multiply<kRounds>(base + weights_at, columns, tiles.count, warp % 2, 2, planes, slots + chunk * stride);
    add_shift<T>(n, factors[0], s.shift[0][warp]);
    __syncthreads();
    const int row = tiles.first * kTileRows + thread;
    if (thread < stride && row < count) {
      y[row] = from_float<T>(output_of(slots, stride, thread, s, 0, factors[0].shifts, act_scale[0], place, matrix));
    }
  };
  // what the next layer's stages read of columns: a warp a vector, a lane a line
  const auto fetch_columns = [&](int layer) {
    if (layer == p.layer_count) return;
    const TokenLayer& l = layer_at(layer);
    const int which = warp % kTokenProjections;
    const TokenMatrix& matrix = l.of[which];
    const void* const row = warp < kTokenProjections       ? matrix.in_scale
                            : warp < 2 * kTokenProjections ? matrix.in_shift
                            : warp % 2 == 0                ? l.input_norm
                                                           : l.post_norm;
    const int columns = warp >= 2 * kTokenProjections ? hidden
                        : which == kOutput            ? width
                        : which == kDown              ? inner
                                                      : hidden;
    const int column = (block * 32 + lane) * 64;
    if (row != nullptr && column < columns) fetch_to_l2(static_cast<const T*>(row) + column);
  };

  for (int layer = 0; layer < p.layer_count; ++layer) {
    const TokenLayer& l = layer_at(layer);
    const int head = common.attention.head, begin = common.attention.begin, end = common.attention.end;
    const int64_t cache_row = (static_cast<int64_t>(layer) * p.shape.heads + head) * p.capacity;
    T* const keys = static_cast<T*>(p.keys) + cache_row * kDim;
    T* const values = static_cast<T*>(p.values) + cache_row * kDim;

    // ---- q, k, v
    if (head < p.shape.heads) {  // which the next stage reads
      for (int i = begin * kDim + thread * 64; i < end * kDim; i += kThreads * 64) {
        fetch_to_l2(keys + i);
        fetch_to_l2(values + i);
      }
    }
    {
      uint4 weight[1], added[1];
      Factors<1> factors[1];
      Place place;
      const Share qkv = common.qkv;
      const TokenMatrix& matrix = l.of[common.projection];
      load_row<T>(l.input_norm, hidden, weight);
      factors[0].template load<T>(matrix, hidden);
      place.load(matrix, qkv.first * kTileRows + thread,
                 thread < qkv.count * kTileRows && qkv.first * kTileRows + thread < width);
      if (layer > 0) grid.wait();
      load_row<T>(layer > 0 ? common.down : nullptr, hidden, added);
      const uint4 n[1] = {normalise<T>(h[0], added[0], weight[0], hidden, l.input_eps, s)};
      load_layer(layer + 1);  // whose place the layer before has left
      project(kQkv, layer, n, factors, matrix, place, 0, hidden, qkv, width, common.projected);
    }
    grid.arrive();
    copy_qkv(layer + 1);

    // ---- attention
    attend<T, kDim>(p, l, common.attention, common.q, common.k, common.v, common.attended, keys, values,
                    reinterpret_cast<float*>(shared + plan.scratch_at), a.memory.parts, a.memory.heads_done,
                    [&grid] { grid.wait(); });
    grid.arrive();

    // ---- output
    fetch_columns(layer + 1);
    {
      uint4 n[1];
      Factors<1> factors[1];
      Place place;
      const Share out = common.out;
      factors[0].template load<T>(l.of[kOutput], width);
      place.load(l.of[kOutput], out.first * kTileRows + thread,
                 thread < out.count * kTileRows && out.first * kTileRows + thread < hidden);
      grid.wait();
      load_row<T>(common.attended, width, n);
      project(kOut, layer, n, factors, l.of[kOutput], place, plan.out_at, width, out, hidden, common.o);
    }
    grid.arrive();
    copy_out(layer + 1);

    // ---- gate, up
    {
      uint4 weight[1], added[1];
      Factors<1> factors[2];
      Place gate_place, up_place;
      const Share gate = common.gate;
      load_row<T>(l.post_norm, hidden, weight);
      factors[0].template load<T>(l.of[kGate], hidden);
      factors[1].template load<T>(l.of[kUp], hidden);
      const int stride = gate.count * kTileRows, row = gate.first * kTileRows + thread;
      const bool valid = thread < stride && row < inner;
      gate_place.load(l.of[kGate], row, valid);
      up_place.load(l.of[kUp], row, valid);
      grid.wait();
      load_row<T>(common.o, hidden, added);
      const uint4 n[1] = {normalise<T>(h[0], added[0], weight[0], hidden, l.post_eps, s)};
      float act_scale[2];
      make_planes<T, 1, 2>(n, factors, a.highest, planes, s, act_scale);
      factors[0].template load_shift<T>(l.of[kGate], hidden);
      factors[1].template load_shift<T>(l.of[kUp], hidden);
      barrier_wait(shared_address(ready + kGated), layer & 1);
      const int which_of_two = warp % 2;
      multiply<1>(base + (which_of_two == 0 ? plan.gate_at : plan.up_at), hidden, gate.count, 0, 1,
                  planes + which_of_two * kKWarps * kPlaneBytes, slots + (which_of_two * kKWarps + chunk) * stride);
      add_shift<T>(n, factors[0], s.shift[0][warp]);
      add_shift<T>(n, factors[1], s.shift[1][warp]);
      __syncthreads();
      if (valid) {
        const auto value = [&](int i, const Place& place, const TokenMatrix& matrix) {
          const float y = output_of(slots + i * kKWarps * stride, stride, thread, s, i, factors[i].shifts, act_scale[i],
                                    place, matrix);
          return to_float(from_float<T>(y));
        };
        const float gated = value(0, gate_place, l.of[kGate]), factor = value(1, up_place, l.of[kUp]);
        const float silu = to_float(from_float<T>(gated / (1.0f + expf(-gated))));
        common.m[row] = from_float<T>(__fmul_rn(silu, factor));
      }
    }
    grid.arrive();
    copy_gated(layer + 1);

    // ---- down
    {
      uint4 n[kInnerRounds];
      Factors<kInnerRounds> factors[1];
      Place place;
      const Share of_down = common.of_down;
      factors[0].template load<T>(l.of[kDown], inner);
      place.load(l.of[kDown], of_down.first * kTileRows + thread,
                 thread < of_down.count * kTileRows && of_down.first * kTileRows + thread < hidden);
      grid.wait();
      load_row<T>(common.m, inner, n);
      project(kDowned, layer, n, factors, l.of[kDown], place, plan.down_at, inner, of_down, hidden, common.down);
    }
    grid.arrive();
    copy_down(layer + 1);
  }

  uint4 weight[1], added[1];
  load_row<T>(p.norm, hidden, weight);
  grid.wait();
  load_row<T>(common.down, hidden, added);
  const uint4 normed = normalise<T>(h[0], added[0], weight[0], hidden, p.eps, s);
  if (block == 0 && column_of(0) < hidden) *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + column_of(0)) = normed;
  grid.leave();
#endif
}

}  // namespace

TokenPlan decode_token_plan(const TokenShape& shape, const Device& device) {
  TokenPlan plan;
  const int width = shape.heads * shape.dim, blocks = device.multiprocessors;
  const auto fits = [](int columns) { return columns > 0 && columns % 128 == 0; };
  if (device.architecture < 90 || !device.has_binary_mma() || (shape.dim != 64 && shape.dim != 128)) return plan;
  if (shape.dtype == Dtype::kFloat32 || (shape.bits != 8 && shape.bits != 4 && shape.bits != 2)) return plan;
  if (!fits(shape.hidden) || !fits(shape.inner) || !fits(width) || blocks < 3 || shape.heads > blocks) return plan;
  if (shape.hidden > kMaxHidden || width > kMaxHidden || shape.inner > kMaxInnerRounds * kMaxHidden) return plan;
  const auto most = [](int tiles, int of) { return (tiles + of - 1) / of; };
  plan.qkv_tiles = most(tiles_for(width), blocks / 3);
  plan.out_tiles = plan.down_tiles = most(tiles_for(shape.hidden), blocks);
  plan.gate_tiles = most(tiles_for(shape.inner), blocks);
  plan.inner_rounds = most(shape.inner, kMaxHidden);
  plan.splits = 1;
  while (2 * plan.splits <= kMaxSplits && shape.heads * plan.splits * 2 <= blocks) plan.splits *= 2;
  int at = 0;
  const auto region = [&at](int tiles, int k) {
    at += tiles * kTileRows * (k / 8);
    return (at = (at + 127) / 128 * 128);
  };
  plan.out_at = region(plan.qkv_tiles, shape.hidden);
  plan.gate_at = region(plan.out_tiles, width);
  plan.up_at = region(plan.gate_tiles, shape.hidden);
  plan.down_at = region(plan.gate_tiles, shape.hidden);
  plan.scratch_at = region(plan.down_tiles, shape.inner);
  const int rows = kTileRows * std::max({plan.qkv_tiles, plan.out_tiles, 2 * plan.gate_tiles, plan.down_tiles});
  if (rows > kThreads) return {};
  const int products = std::max(2, plan.inner_rounds) * kKWarps * kPlaneBytes + 4 * kKWarps * rows;
  const int attention = 4 * (2 * shape.dim + kWarps * part_size(shape.dim));
  plan.shared_bytes = plan.scratch_at + std::max(products, attention);
  if (plan.shared_bytes > device.shared_bytes - 4096) return {};
  plan.blocks = blocks;
  return plan;
}

int64_t decode_token_bytes(const TokenShape& shape, const TokenPlan& plan) {
  const int width = shape.heads * shape.dim;
  return kRowAlignment + 4 * int64_t{shape.heads} + kRowAlignment + 4 * row_bytes(width) + 2 * row_bytes(shape.hidden) +
         row_bytes(shape.inner) + 4 * int64_t{shape.heads} * plan.splits * part_size(shape.dim);
}

cudaError_t decode_token(const DecodeToken& p, const TokenPlan& plan, const Launch& on) {
  const TokenShape& shape = p.shape;
  auto* const start = static_cast<unsigned char*>(p.memory);
  const int64_t rows_at =
      kRowAlignment + (4 * int64_t{shape.heads} + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  const int64_t parts_at =
      rows_at + 4 * row_bytes(shape.heads * shape.dim) + 2 * row_bytes(shape.hidden) + row_bytes(shape.inner);
  const Arguments arguments{p,
                            plan,
                            {reinterpret_cast<uint32_t*>(start), reinterpret_cast<uint32_t*>(start + kRowAlignment),
                             start + rows_at, reinterpret_cast<float*>(start + parts_at)},
                            static_cast<float>((1 << (shape.bits - 1)) - 1)};
  const auto run = [&]<typename T, int kDim, int kInnerRounds>() {
    const auto kernel = decode_token_kernel<T, kDim, kInnerRounds>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;  // all blocks at the same time, or an error
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = on.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments);
  };
  const auto rounds = [&]<typename T, int kDim>() {
    switch (plan.inner_rounds) {
      case 1:
        return run.template operator()<T, kDim, 1>();
      case 2:
        return run.template operator()<T, kDim, 2>();
      default:
        return run.template operator()<T, kDim, 3>();
    }
  };
  const auto dims = [&]<typename T>() {
    return shape.dim == 64 ? rounds.template operator()<T, 64>() : rounds.template operator()<T, 128>();
  };
  return shape.dtype == Dtype::kFloat16 ? dims.template operator()<__half>()
                                        : dims.template operator()<__nv_bfloat16>();
}

}  // namespace bitinfer::cuda
