// All layers of a LLaMA-shaped model for one token, in one launch that stays: blocks, one a multiprocessor, go through
// the stages of every layer, and each waits for the numbers of the others that it needs.
//
//   q, k, v     h += down;  n = RMSNorm(h) * input_norm;  q, k, v = each its product of n in integers
//   attention   rotary embedding, cache, softmax: a head, or a part of its slots, a block
//   output      o = its product
//   gate, up    h += o;  n = RMSNorm(h) * post_norm;  m = silu(gate) * up
//   down        its product of m
//
// with the integers of pack_activations, the epilogue of popcount_gemm, and the roundings of transformers; floating
// point activations as integers of 24 bits (fixed_point.h). For these, int8, int4 and int2 (fewer bits go in eight
// planes too), one scale a row and a token, as many keys as queries, hidden sizes up to 4,096, and models of which a
// layer's weights fit the shared memory of all multiprocessors; sm_90a.
//
// Kernels of their own for these stages lose most of their time between one another: about 1 us from the end of one to
// the first instruction of the next, cold instructions, and blocks that share a multiprocessor while others have none.
// Here a block owns rows of every matrix and a place in shared memory for each, which a warp fills again for the next
// layer as soon as a stage has left it (token_copies.cuh), and all else that a stage will read is fetched to L2 before:
// memory never waits for the chain. What is left is the chain: five trips through L2 a layer (token_exchange.cuh), and
// the instructions in between. Registers must not spill: beside so much shared memory there is hardly an L1.
//
//   block      rows of all matrices, a part of a head; every block packs the token anew, in 16 warps
//   warps      two share a chunk of 512 columns to pack; four share two chunks to multiply, a quarter of the tiles of
//   rows
//              each, or half of those of gate or up; partial sums [pair of chunks, row] meet in shared memory
//   registers  h, eight columns a lane, through all layers
#include <algorithm>

#include "decode_token.h"
#include "hopper.cuh"
#include "token_attention.cuh"
#include "token_copies.cuh"
#include "token_product.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kMaxHidden = kKWarps * kChunkColumns, kMaxInnerRounds = 3;
constexpr int kFixedShared = 2048;  // bytes of shared memory, about, whose size no model changes
// Registers move between groups of four warps: the copying one needs few, and the others get what it leaves.
constexpr int kCopyThreads = 128;
[[maybe_unused]] constexpr int kCopyRegisters = 32, kRegisters = 112;

constexpr int tiles_for(int n) { return (n + kTileRows - 1) / kTileRows; }

// Memory of the grid, zeros before the first launch.
struct Memory {
  uint32_t *layers, *left;  // done by earlier launches; blocks of this one that have left
  unsigned char* rows;      // of words: q, k, v, attended, output, inner, down
  uint64_t* parts;          // of heads
};

constexpr int64_t kRowAlignment = 256;

constexpr int64_t row_bytes(int columns) {
  return (4 * int64_t{columns} + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

struct Arguments {
  DecodeToken p;
  TokenPlan plan;
  Memory memory;
  float highest;
};

[[maybe_unused]] __device__ Common common_of(const Arguments& a, int block, int blocks) {
  const TokenShape& shape = a.p.shape;
  const int width = shape.heads * shape.dim;
  unsigned char* rows = a.memory.rows;
  const auto take = [&rows](int columns) {
    auto* const row = reinterpret_cast<uint32_t*>(rows);
    rows += row_bytes(columns);
    return row;
  };
  Common c;
  c.layers = *a.memory.layers;
  c.q = take(width), c.k = take(width), c.v = take(width), c.attended = take(width);
  c.o = take(shape.hidden), c.m = take(shape.inner), c.down = take(shape.hidden);
  const int qkv_blocks = (tiles_for(width) + a.plan.qkv_tiles - 1) / a.plan.qkv_tiles, which = block / qkv_blocks;
  c.projection = kQuery + min(which, 2);
  c.projected = which == 0 ? c.q : which == 1 ? c.k : c.v;
  c.qkv = which < 3 ? Share(tiles_for(width), block % qkv_blocks, qkv_blocks) : Share(0, 0, 1);
  c.out = Share(tiles_for(shape.hidden), block, blocks);
  c.gate = Share(tiles_for(shape.inner), block, blocks);
  c.of_down = Share(tiles_for(shape.hidden), block, blocks);
  const int splits = a.plan.splits, rank = block % splits;
  const int slot = static_cast<int>(min(load_long(a.p.slot), static_cast<int64_t>(a.p.capacity - 1)));
  // parts begin at even slots, for the copies, and may be empty
  const int part = ((slot + splits - 1) / splits + 1) / 2 * 2, begin = min(rank * part, slot);
  c.attention = {block / splits, rank, splits, slot, begin, min(begin + part, slot)};
  return c;
}

template <typename T, int kDim, int kInnerRounds, int kBytes, int kCacheBits>
__global__ void __launch_bounds__(kThreads + kCopyThreads, 1) decode_token_kernel(const __grid_constant__ Arguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Scratch s;
  __shared__ uint4 layer_words[2][sizeof(TokenLayer) / 16];  // this one and the next
  __shared__ Common common;
  __shared__ TokenBarriers barriers;
  const DecodeToken& p = a.p;
  const TokenPlan& plan = a.plan;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int hidden = p.shape.hidden, inner = p.shape.inner, width = p.shape.heads * kDim;

  if (thread == 0) common = common_of(a, block, blocks);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int* const slots = reinterpret_cast<int*>(shared + plan.sums_at);

  const auto load_layer = [&](int layer) {
    if (thread < static_cast<int>(sizeof(TokenLayer) / 16) && layer < p.layer_count) {
      layer_words[layer % 2][thread] = reinterpret_cast<const uint4*>(p.layers + layer)[thread];
    }
  };
  if (thread == 0) barriers.init();
  load_layer(0);
  __syncthreads();
  // blocks that send nothing leave; those that need h keep it up to date
  const bool has_qkv = common.qkv.count > 0, has_out = common.out.count > 0, has_gate = common.gate.count > 0;
  const bool has_down = common.of_down.count > 0, needs_h = has_qkv || has_gate;
  const int head = common.attention.head;
  const bool attends = head < p.shape.heads, stays = needs_h || has_out || has_down || attends;
  if (thread >= kThreads) {
    give_registers<kCopyRegisters>();
    if (stays && warp == kWarps) Copies<T, kDim, kCacheBits>{p, plan, common, barriers, base}.run();
    return;
  }
  take_registers<kRegisters>();
  uint4 h[1];
  load_row<T>(p.x, hidden, h);

  // a product of one input: outputs [share of n] are sent to y
  const auto project = [&]<int kRounds>(const uint4(&n)[kRounds], Factors<kRounds>(&factors)[1],
                                        const TokenMatrix& matrix, const Place& place, int weights_at, int columns,
                                        Share share, int count, uint32_t* y, uint32_t tag) {
    int sums[1];
    const uint32_t planes[1] = {base + (kRounds == 1 ? plan.planes_at : plan.down_planes_at)};
    factors[0].template load_rest<T>(matrix, columns);
    make_planes<kBytes, T>(n, factors, columns, a.highest, planes, s, sums);
    add_up<kBytes, T>(n, factors, columns, a.highest, sums, s);
    const int stride = share.count * kTileRows;
    multiply<kBytes, kRounds>(base + weights_at, columns, share.count, thread_index() / 32 % 4, 4, planes[0], slots,
                              stride);
    sync_threads();
    if (!share.has_thread(count)) return;
    send<T>(y + share.row_of_thread(), output_of<kBytes>(slots, stride, thread_index(), s, columns, 0, place), tag);
  };
  // Barriers between stages keep what the next one loads, and its polls, out of the way of what this one has to send.
  for (int layer = 0; stays && layer < p.layer_count; ++layer) {
    const TokenLayer& l = *reinterpret_cast<const TokenLayer*>(layer_words[layer % 2]);
    const uint32_t tag = (common.layers + layer + 1) << 16;
    const int64_t cache_row = (static_cast<int64_t>(layer) * p.shape.heads + head) * p.capacity;
    constexpr int kRow = cache_row_bytes(kDim, kCacheBits);
    unsigned char* const keys = static_cast<unsigned char*>(p.keys) + cache_row * kRow;
    unsigned char* const values = static_cast<unsigned char*>(p.values) + cache_row * kRow;

    // ---- q, k, v
    load_layer(layer + 1);  // whose place the layer before has left
    const AttentionShare& attention = common.attention;
    const int there = slots_there(attention, plan);
    if (attends) {  // the slots that the next stage reads from memory
      const int64_t end = static_cast<int64_t>(attention.end) * kRow;
      for (int64_t i = int64_t{attention.begin + there} * kRow + thread_index() * 128; i < end; i += kThreads * 128) {
        fetch_to_l2(keys + i);
        fetch_to_l2(values + i);
      }
    }
    {
      uint4 weight[1], added[1];
      Factors<1> factors[1];
      Place place;
      const TokenMatrix& matrix = l.of[common.projection];
      load_row<T>(l.input_norm, hidden, weight);
      factors[0].template load<T>(matrix, hidden);
      place.load(matrix, common.qkv, width);
      if (has_qkv) barriers.wait_for(kQkvCopy, layer);
      if (needs_h && layer > 0) {
        receive_row(common.down, hidden, tag - (1u << 16), added);
        h[0] = add_octets<T>(h[0], added[0]);
      }
      if (has_qkv) {
        const uint4 n[1] = {normalise<T>(h[0], weight[0], hidden, l.input_eps, s)};
        project(n, factors, matrix, place, 0, hidden, common.qkv, width, common.projected, tag);
      }
    }
    barriers.leave(kQkvStage);

    // ---- attention
    if (attends) {
      barriers.wait_for(kCacheCopy, layer);
      const uint32_t keys_there = base + plan.cache_at;
      attend<T, kDim, kCacheBits>(p, l, attention, common.q, common.k, common.v, common.attended, keys, values,
                                  keys_there, keys_there + plan.cache_slots * kRow, there,
                                  reinterpret_cast<float*>(shared + plan.scratch_at), a.memory.parts, tag);
    }
    barriers.leave(kAttentionStage);

    // ---- output
    if (has_out) {
      uint4 n[1];
      Factors<1> factors[1];
      Place place;
      factors[0].template load<T>(l.of[kOutput], width);
      place.load(l.of[kOutput], common.out, hidden);
      barriers.wait_for(kOutCopy, layer);
      receive_row(common.attended, width, tag, n);
      project(n, factors, l.of[kOutput], place, plan.out_at, width, common.out, hidden, common.o, tag);
    }
    sync_threads();

    // ---- gate, up
    {
      uint4 weight[1], added[1];
      Factors<1> factors[2];
      Place gate_place, up_place;
      const Share gate = common.gate;
      load_row<T>(l.post_norm, hidden, weight);
      factors[0].template load<T>(l.of[kGate], hidden);
      factors[1].template load<T>(l.of[kUp], hidden);
      gate_place.load(l.of[kGate], gate, inner);
      up_place.load(l.of[kUp], gate, inner);
      if (has_gate) {
        barriers.wait_for(kGateCopy, layer);
        barriers.wait_for(kUpCopy, layer);
      }
      if (needs_h) {
        receive_row(common.o, hidden, tag, added);
        h[0] = add_octets<T>(h[0], added[0]);
      }
      if (has_gate) {
        const uint4 n[1] = {normalise<T>(h[0], weight[0], hidden, l.post_eps, s)};
        int sums[2];
        const uint32_t planes[2] = {base + plan.planes_at, base + plan.up_planes_at};
        make_planes<kBytes, T>(n, factors, hidden, a.highest, planes, s, sums);
        add_up<kBytes, T>(n, factors, hidden, a.highest, sums, s);
        const int which = thread_index() / 32 % 2, stride = gate.count * kTileRows;
        const int of_up = (kBytes == 1 ? 1 : 2) * kPairs * stride;  // where the sums of the second product begin
        multiply<kBytes, 1>(base + (which == 0 ? plan.gate_at : plan.up_at), hidden, gate.count,
                            thread_index() / 32 % 4 / 2, 2, which == 0 ? planes[0] : planes[1], slots + which * of_up,
                            stride);
        sync_threads();
        if (gate.has_thread(inner)) {
          const auto value = [&](int i, const Place& place) {
            const float y = output_of<kBytes>(slots + i * of_up, stride, thread_index(), s, hidden, i, place);
            return to_float(from_float<T>(y));
          };
          const float gated = value(0, gate_place), factor = value(1, up_place);
          const float silu = to_float(from_float<T>(gated / (1.0f + expf(-gated))));
          send<T>(common.m + gate.row_of_thread(), __fmul_rn(silu, factor), tag);
        }
      }
    }
    barriers.leave(kGateStage);

    // ---- down
    if (has_down) {
      uint4 n[kInnerRounds];
      Factors<kInnerRounds> factors[1];
      Place place;
      factors[0].template load<T>(l.of[kDown], inner);
      place.load(l.of[kDown], common.of_down, hidden);
      barriers.wait_for(kDownCopy, layer);
      receive_row(common.m, inner, tag, n);
      project(n, factors, l.of[kDown], place, plan.down_at, inner, common.of_down, hidden, common.down, tag);
    }
    barriers.leave(kDownStage);
  }

  if (block == 0) {
    uint4 weight[1], added[1];
    load_row<T>(p.norm, hidden, weight);
    receive_row(common.down, hidden, (common.layers + p.layer_count) << 16, added);
    const uint4 normed = normalise<T>(add_octets<T>(h[0], added[0]), weight[0], hidden, p.eps, s);
    if (column_of(0) < hidden) *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + column_of(0)) = normed;
  }
  if (thread == 0 && atomicAdd(a.memory.left, 1) == gridDim.x - 1) {  // all have read what is written here
    *a.memory.left = 0;
    *a.memory.layers = common.layers + p.layer_count;
  }
#endif
}

}  // namespace

TokenPlan decode_token_plan(const TokenShape& shape, const Device& device) {
  TokenPlan plan;
  const int width = shape.heads * shape.dim, blocks = device.multiprocessors;
  const auto fits = [](int columns) { return columns > 0 && columns % 128 == 0; };
  if (device.architecture != 90 || !device.has_binary_mma() || (shape.dim != 64 && shape.dim != 128)) return plan;
  if (shape.dtype == Dtype::kFloat32 ||
      (shape.bits != 8 && shape.bits != 4 && shape.bits != 2 && shape.bits != kFixedPointBits))
    return plan;
  if (!fits(shape.hidden) || !fits(shape.inner) || !fits(width) || blocks < 3 || shape.heads > blocks) return plan;
  if (shape.cache_bits != 16 && shape.cache_bits != 8) return plan;
  if (shape.hidden > kMaxHidden || width > kMaxHidden || shape.inner > kMaxInnerRounds * kMaxHidden) return plan;
  const auto most = [](int tiles, int of) { return (tiles + of - 1) / of; };
  plan.qkv_tiles = most(tiles_for(width), blocks / 3);
  plan.out_tiles = plan.down_tiles = most(tiles_for(shape.hidden), blocks);
  plan.gate_tiles = most(tiles_for(shape.inner), blocks);
  plan.inner_rounds = most(shape.inner, kMaxHidden);
  plan.splits = 1;
  while (2 * plan.splits <= kMaxSplits && shape.heads * plan.splits * 2 <= blocks) plan.splits *= 2;
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + 127) / 128 * 128;
    return begin;
  };
  const auto of_weights = [](int tiles, int k) { return tiles * kTileRows * (k / 8); };
  // in 24 planes some do not fit beside the weights of all stages
  const int groups = shape.bits == kFixedPointBits ? 3 : 1, planes = groups * kKWarps * kPlaneBytes;
  const int rows = kTileRows * std::max({plan.qkv_tiles, plan.out_tiles, 2 * plan.gate_tiles, plan.down_tiles});
  if (rows > kThreads) return {};
  const int sums = 4 * (groups == 1 ? 1 : 2) * kPairs * rows;
  const int attention = 4 * (2 * shape.dim + kWarps * part_size(shape.dim));
  take(of_weights(plan.qkv_tiles, shape.hidden));
  plan.out_at = plan.up_planes_at = take(std::max(of_weights(plan.out_tiles, width), planes));
  plan.gate_at = take(of_weights(plan.gate_tiles, shape.hidden));
  plan.scratch_at = plan.planes_at = take(std::max(planes + sums, attention));
  plan.sums_at = plan.planes_at + planes;
  plan.up_at = plan.cache_at = take(std::max(of_weights(plan.gate_tiles, shape.hidden), plan.inner_rounds * planes));
  plan.down_planes_at = plan.inner_rounds == 1 ? plan.planes_at : plan.up_at;
  plan.down_at = take(of_weights(plan.down_tiles, shape.inner));
  plan.shared_bytes = device.shared_bytes - kFixedShared;
  if (at > plan.shared_bytes) return {};
  plan.cache_slots = (plan.shared_bytes - plan.cache_at) / (2 * cache_row_bytes(shape.dim, shape.cache_bits)) / 2 * 2;
  plan.blocks = blocks;
  return plan;
}

static int64_t rows_bytes(const TokenShape& shape) {
  return 4 * row_bytes(shape.heads * shape.dim) + 2 * row_bytes(shape.hidden) + row_bytes(shape.inner);
}

int64_t decode_token_bytes(const TokenShape& shape, const TokenPlan& plan) {
  return kRowAlignment + rows_bytes(shape) + 8 * int64_t{shape.heads} * plan.splits * part_size(shape.dim);
}

cudaError_t decode_token(const DecodeToken& p, const TokenPlan& plan, const Launch& on) {
  const TokenShape& shape = p.shape;
  auto* const start = static_cast<unsigned char*>(p.memory);
  auto* const counts = reinterpret_cast<uint32_t*>(start);
  unsigned char *const rows = start + kRowAlignment, *const parts = rows + rows_bytes(shape);
  const Arguments arguments{p,
                            plan,
                            {counts, counts + 1, rows, reinterpret_cast<uint64_t*>(parts)},
                            static_cast<float>((1 << (shape.bits - 1)) - 1)};
  const auto launch = [&](auto kernel) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;  // all blocks at the same time, or an error
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(kThreads + kCopyThreads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = on.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments);
  };
  const auto caches = [&]<typename T, int kDim, int kInnerRounds, int kBytes>() {
    return shape.cache_bits == 16 ? launch(decode_token_kernel<T, kDim, kInnerRounds, kBytes, 16>)
                                  : launch(decode_token_kernel<T, kDim, kInnerRounds, kBytes, 8>);
  };
  const auto run = [&]<typename T, int kDim, int kInnerRounds>() {
    return shape.bits == kFixedPointBits ? caches.template operator()<T, kDim, kInnerRounds, 3>()
                                         : caches.template operator()<T, kDim, kInnerRounds, 1>();
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
