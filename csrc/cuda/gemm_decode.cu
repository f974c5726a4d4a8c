// popcount_gemm, and sign_gemm in fixed point, for one or a few tokens and weights with one scale a row:
//
//   y[m, n] = act_scale * weight_scale * (sum(q) - 2 * sum_b c_b * popcount(w[n] & plane_b[m])) + ...    (K % 128 == 0)
//
// The matrix product is mma.m16n8k256 b1 AND.POPC: 16 rows of packed words as they lie in memory times 8 columns of the
// planes matrix [C = M * bits, W]; column 8j + i is plane (8j + i) % bits of token (8j + i) / bits. One int8 token
// fills 8 columns, one of 24-bit fixed point three times 8.
//
//   block        a run of 16-row tiles, about N / 16 / multiprocessors of them: one block a multiprocessor
//   warp         k_warp takes every kKWarps-th chunk of 512 columns, whose planes stay in its registers, for every
//                tile_warps-th tile
//   shared       all weights of the block, then the partial sums of the k_warps [k_warp, result, row]
//
// Bounds: the bytes of the weights (N * K / 8) for wide layers, the latency of a chain of dependent kernels for small
// ones. Both overlap: a block copies all its weights to shared memory, and whatever else it can know, before it waits
// for the kernel ahead of it in the stream, and leaves room on its multiprocessor for a block of the next kernel to do
// the same. What is left is latency: from the end of that kernel to ours about 0.5 us until the wait ends, 0.35 us for
// the planes from L2, then products and epilogue, whose dependent instructions are therefore kept few.
//
// Several products of tokens of one number and width (q, k and v; gate and up) go in one launch, each with planes,
// scales and blocks of its own: together they fill the multiprocessors as one matrix would.
//
// gemm_decode_grouped.cu has the rest: group scales, activation blocks, several planes of weights.
#include <algorithm>

#include "gemm_decode.cuh"
#include "gemm_decode.h"

namespace bitinfer::cuda {
namespace {

// Registers allow this many warps in each of two blocks of a multiprocessor.
constexpr int max_warps(int column_groups, int rounds) {
  return column_groups * rounds <= 2 || (column_groups == 3 && rounds == 1) ? 16 : 8;
}

// Chunks whose planes fit a warp's registers.
constexpr int max_rounds(int column_groups) { return column_groups == 1 ? 3 : column_groups <= 4 ? 2 : 1; }

// Tiles that a warp multiplies at a time, to have independent work.
constexpr int batch_of(int column_groups) { return column_groups == 1 ? 2 : 1; }

struct Product {
  const uint32_t* signs;
  const uint32_t* planes;
  const float* act_scale;
  const void* act_sum;  // int32, int64 for fixed point
  const float* act_shift;
  Floats scale, group_shift, bias;
  Output y;
  int64_t n;
  int tiles, larger_blocks;  // of a block; so many blocks, the first, have one more
};

// What all products of a launch have in common.
struct Shape {
  int words, m, tile_warps;
  int pitch;     // bytes from one row of weights to the next in shared memory
  int rows_all;  // that a block has room for
};

// What the epilogue needs of a token.
template <bool kFixed>
struct Token {
  std::conditional_t<kFixed, int64_t, int> q_sum;
  float scale, shift;
};

// kBits: of an activation, or 24 for fixed point. kRounds: chunks of a k_warp whose planes it holds at a time.
template <int kBits, int kGroups, int kRounds, class Work>
__global__ void __launch_bounds__(max_warps(kGroups, kRounds) * 32, kGroups <= 6 ? 2 : 1)
    decode_kernel(const __grid_constant__ Work work) {
  int block = blockIdx.x;
  const Product& a = work.product(block);
  const Shape& shape = work.shape;
  constexpr bool kFixed = kBits == kFixedPointBits, kOnes = kBits == 1;
  constexpr int kBatch = batch_of(kGroups);
  using Sum = decltype(Token<kFixed>::q_sum);
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Token<kFixed> of_tokens[8];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int k_warp = warp % kKWarps, tile_warp = warp / kKWarps, words = shape.words, m = shape.m, columns = m * kBits;
  const int results = result_count(m, kBits), last_chunk = (words - 1) / kChunkWords;
  const int first_tile = block * a.tiles + min(block, a.larger_blocks);
  const int tiles = a.tiles + (block < a.larger_blocks), rows = tiles * kTileRows;
  const int64_t row0 = static_cast<int64_t>(first_tile) * kTileRows;
  const int* slots = reinterpret_cast<const int*>(shared + shape.rows_all * shape.pitch);
  const int slot_stride = results * rows;
  allow_next_kernel();
  copy_rows(base, shape.pitch, a.signs, row0, rows, a.n, words);

  // ---- all that does not depend on the kernel before us
  struct Place {
    int token, slot;  // of the output, and where its sums start
    int64_t at;       // index in y, or negative
    float scale, shift, bias;
  };
  const auto locate = [&](int item) {
    Place p{};
    p.token = m == 1 ? 0 : item / rows;
    const int row = item - p.token * rows;
    const int64_t n = row0 + row;
    p.slot = (kFixed ? 2 * p.token : p.token) * rows + row;
    p.at = item < rows * m && n < a.n ? p.token * a.y.stride + n : -1;
    p.scale = 1;
    if (p.at >= 0) {
      if (a.scale) p.scale = load_float(a.scale, n);
      if (a.group_shift) p.shift = load_float(a.group_shift, n);
      if (a.bias) p.bias = load_float(a.bias, n);
    }
    return p;
  };
  const Place mine = locate(threadIdx.x);
  const uint32_t* x_from[kGroups];  // where this lane's column of each group starts
  int x_words[kGroups];             // how far it may read: columns past the last are zero
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int column = 8 * j + g;
    x_from[j] = a.planes + static_cast<int64_t>(column) * words;
    x_words[j] = column < columns ? words : 0;
  }
  const auto load_planes = [&](int j, int chunk) {
    const int word = chunk * kChunkWords + 4 * t;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (word < x_words[j]) v = __ldcg(reinterpret_cast<const uint4*>(x_from[j] + word));
    // the column after the last is all ones for one-bit activations: its product counts the set bits of the weights
    if (kOnes && 8 * j + g == columns && word < words) v = make_uint4(~0u, ~0u, ~0u, ~0u);
    return v;
  };
  const uint32_t at_lane = base + g * shape.pitch + 16 * t;
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  wait_for_previous_kernel();

  // ---- the products
  uint4 x[kRounds][kGroups];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) x[i][j] = load_planes(j, k_warp + i * kKWarps);
  }
  Token<kFixed> of_token{};
  if (threadIdx.x < m) {
    of_token = {__ldcg(static_cast<const Sum*>(a.act_sum) + threadIdx.x), __ldcg(a.act_scale + threadIdx.x),
                a.act_shift == nullptr ? 0.0f : __ldcg(a.act_shift + threadIdx.x)};
  }
  for (int chunk0 = k_warp;;) {
    for (int tile0 = tile_warp; tile0 < tiles; tile0 += kBatch * shape.tile_warps) {
      int c[kBatch][kGroups][4] = {};
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        // chunks past the end of a row have planes of zero, whatever weights those meet
        const uint32_t at_chunk = at_lane + min(chunk0 + i * kKWarps, last_chunk) * 64;
        uint4 upper[kBatch], lower[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const uint32_t at = at_chunk + min(tile0 + b * shape.tile_warps, tiles - 1) * (kTileRows * shape.pitch);
          upper[b] = load_shared(at);
          lower[b] = load_shared(at + 8 * shape.pitch);
        }
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            multiply_b1_k256(c[b][j], {upper[b].x, lower[b].x, upper[b].y, lower[b].y}, x[i][j].x, x[i][j].y);
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            multiply_b1_k256(c[b][j], {upper[b].z, lower[b].z, upper[b].w, lower[b].w}, x[i][j].z, x[i][j].w);
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int tile = tile0 + b * shape.tile_warps;
        if (tile >= tiles) break;
        int* slot = const_cast<int*>(slots) + k_warp * slot_stride + tile * kTileRows;
        combine_groups<kBits, kGroups>(c[b], g, t, [&](int result, int row, int value) {
          if (kBits < 8 || kGroups > 1) {
            if (result >= results) return;
          }
          int& sum = slot[result * rows + row];
          sum = chunk0 == k_warp ? value : sum + value;
        });
      }
    }
    chunk0 += kRounds * kKWarps;
    if (chunk0 * kChunkWords >= words) break;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) x[i][j] = load_planes(j, chunk0 + i * kKWarps);
    }
  }
  if (threadIdx.x < m) of_tokens[threadIdx.x] = of_token;
  __syncthreads();

  // ---- scales, shifts and bias, in the order that popcount_gemm prescribes
  const auto finish = [&](const Place& p) {
    const auto count = [&](int at) {
      int total = 0;
#pragma unroll
      for (int s = 0; s < kKWarps; ++s) total += slots[s * slot_stride + at];
      return total;
    };
    const Token<kFixed> token = of_tokens[p.token];
    float product;
    if constexpr (kFixed) {
      const int64_t counted = count(p.slot) + (int64_t{count(p.slot + rows)} << 16);
      product = static_cast<float>(token.q_sum - 2 * counted);
    } else if constexpr (kOnes) {
      product = static_cast<float>(token.q_sum - 2 * count(p.slot + (m - p.token) * rows) + 4 * count(p.slot));
    } else {
      product = static_cast<float>(token.q_sum - 2 * count(p.slot));
    }
    float sum = __fmul_rn(__fmul_rn(token.scale, p.scale), product);
    if (a.group_shift) {
      sum = __fadd_rn(sum, __fmul_rn(__fmul_rn(token.scale, p.shift), static_cast<float>(token.q_sum)));
    }
    sum = __fadd_rn(__fadd_rn(sum, token.shift), p.bias);
    if (p.at >= 0) store_float(a.y, 0, p.at, sum);
  };
  if (threadIdx.x < rows * m) finish(mine);
  for (int item = threadIdx.x + blockDim.x; item < rows * m; item += blockDim.x) finish(locate(item));
}

// The instances: their column groups.
constexpr int kGroupsOf1[] = {1, 2}, kGroupsOf2[] = {1, 2}, kGroupsOf4[] = {1, 2, 4}, kGroupsOf8[] = {1, 2, 4, 8};
constexpr int kGroupsOf24[] = {3, 6, 12};

int column_groups_for(int64_t m, int64_t bits) {
  const int64_t needed = (m * bits + (bits == 1) + 7) / 8;
  const auto least = [needed](const auto& instances) {
    for (int groups : instances) {
      if (groups >= needed) return groups;
    }
    return 0;
  };
  switch (bits) {
    case 1:
      return least(kGroupsOf1);
    case 2:
      return least(kGroupsOf2);
    case 4:
      return least(kGroupsOf4);
    case 8:
      return least(kGroupsOf8);
    default:
      return least(kGroupsOf24);
  }
}

DecodePlan plan_for(const Weight& w, const uint32_t* planes, int64_t m, int64_t bits, int64_t segments,
                    const Device& device) {
  DecodePlan plan;
  if (!is_aligned(w.signs) || !is_aligned(planes)) return plan;
  if (!device.has_binary_mma() || w.k == 0 || w.n == 0 || m == 0 || m > 8) return plan;
  if (segments > 1 || w.planes > 1 || w.k % 128 != 0) return plan;
  if (w.k > (bits == kFixedPointBits ? 1 << 17 : 1 << 20)) return plan;  // counts of a k_warp fit an int
  const int groups = column_groups_for(m, bits), pitch = pitch_of(static_cast<int>(w.words()));
  if (groups == 0) return plan;
  const int64_t tiles = (w.n + kTileRows - 1) / kTileRows;
  const int64_t tile_bytes =
      kTileRows * (pitch + 4 * kKWarps * result_count(static_cast<int>(m), static_cast<int>(bits)));
  // one block a multiprocessor, small enough that a block of the next kernel fits beside it
  const int64_t room = (device.shared_bytes_all / 2 - 2048) / tile_bytes;
  const int64_t wanted = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  const int64_t of_block = std::min(wanted, std::max<int64_t>(room, 1));
  if (of_block * tile_bytes > device.shared_bytes - 1024) return plan;
  plan.blocks = static_cast<int>(of_block == wanted ? std::min<int64_t>(tiles, device.multiprocessors)
                                                    : (tiles + of_block - 1) / of_block);
  plan.tiles = static_cast<int>(of_block);
  const int chunks = static_cast<int>((w.words() + kChunkWords - 1) / kChunkWords);
  plan.rounds = std::min((chunks + kKWarps - 1) / kKWarps, max_rounds(groups));
  // more warps pay where there are many tiles
  plan.tile_warps = of_block > 4 ? max_warps(groups, plan.rounds) / kKWarps : 1;
  plan.shared_bytes = static_cast<int>(of_block * tile_bytes);
  plan.column_groups = groups;
  return plan;
}

template <int kBits, int kGroups, class Work>
cudaError_t run_groups(const Work& work, const DecodePlan& plan, const Launch& on) {
  const dim3 grid(plan.blocks), block(32 * kKWarps * plan.tile_warps);
  const auto go = [&](auto kernel) { return launch(kernel, on, grid, block, plan.shared_bytes, true, work); };
  if constexpr (max_rounds(kGroups) >= 3) {
    if (plan.rounds == 3) return go(decode_kernel<kBits, kGroups, 3, Work>);
  }
  if constexpr (max_rounds(kGroups) >= 2) {
    if (plan.rounds == 2) return go(decode_kernel<kBits, kGroups, 2, Work>);
  }
  return go(decode_kernel<kBits, kGroups, 1, Work>);
}

template <int kBits, int kGroups, int... kMore, class Work>
cudaError_t run_bits(const Work& work, const DecodePlan& plan, const Launch& on) {
  if constexpr (sizeof...(kMore) > 0) {
    if (plan.column_groups != kGroups) return run_bits<kBits, kMore...>(work, plan, on);
  }
  return run_groups<kBits, kGroups>(work, plan, on);
}

template <typename Problem>
Shape shape_of(const Problem& p, const DecodePlan& plan) {
  const auto words = static_cast<int>(p.weight.words());
  return {words, static_cast<int>(p.m), plan.tile_warps, pitch_of(words), plan.tiles * kTileRows};
}

// A product that `blocks` blocks share.
template <typename Problem>
Product product_of(const Problem& p, int blocks) {
  const Weight& w = p.weight;
  return {.signs = w.signs,
          .planes = p.planes,
          .act_scale = p.act_scale,
          .act_sum = p.act_sum,
          .act_shift = p.act_shift,
          .scale = w.scale,
          .group_shift = w.group_shift,
          .bias = w.bias,
          .y = p.y,
          .n = w.n,
          .tiles = tiles_of(w) / blocks,
          .larger_blocks = tiles_of(w) % blocks};
}

}  // namespace

DecodePlan popcount_gemm_decode_plan(const PopcountGemm& p, const Device& device) {
  return plan_for(p.weight, p.planes, p.m, p.bits, p.segments(), device);
}

cudaError_t popcount_gemm_decode(const PopcountGemm& p, const DecodePlan& plan, const Launch& on) {
  const One<Shape, Product> work{shape_of(p, plan), product_of(p, plan.blocks)};
  switch (p.bits) {
    case 1:
      return run_bits<1, 1, 2>(work, plan, on);
    case 2:
      return run_bits<2, 1, 2>(work, plan, on);
    case 4:
      return run_bits<4, 1, 2, 4>(work, plan, on);
    default:
      return run_bits<8, 1, 2, 4, 8>(work, plan, on);
  }
}

DecodePlan fixed_gemm_decode_plan(const FixedPointGemm& p, const Device& device) {
  return plan_for(p.weight, p.planes, p.m, kFixedPointBits, p.weight.groups(), device);
}

cudaError_t fixed_gemm_decode(const FixedPointGemm& p, const DecodePlan& plan, const Launch& on) {
  return run_bits<kFixedPointBits, 3, 6, 12>(One<Shape, Product>{shape_of(p, plan), product_of(p, plan.blocks)}, plan,
                                             on);
}

DecodePlan popcount_gemm_decode_plan(std::span<const PopcountGemm> products, const Device& device) {
  DecodePlan plan;
  if (products.size() < 2 || products.size() > kMaxProducts || products[0].bits < 4) return plan;
  Weight all = products[0].weight;  // as if it were one matrix
  all.n = 0;
  for (const PopcountGemm& p : products) {
    const bool alike = p.m == products[0].m && p.bits == products[0].bits && p.weight.k == all.k;
    if (!alike || !popcount_gemm_decode_plan(p, device)) return plan;
    all.n += int64_t{tiles_of(p.weight)} * kTileRows;
  }
  plan = plan_for(all, products[0].planes, products[0].m, products[0].bits, 1, device);
  if (!plan) return plan;
  // what is left over of each product may take one block more than there are multiprocessors
  const int tile_bytes = plan.shared_bytes / plan.tiles, room = device.shared_bytes_all / 2 - 2048;
  if (blocks_for(products, plan.tiles) > device.multiprocessors && plan.blocks <= device.multiprocessors &&
      (plan.tiles + 1) * tile_bytes <= room) {
    plan.tiles += 1;
    plan.shared_bytes += tile_bytes;
  }
  plan.blocks = blocks_for(products, plan.tiles);
  return plan;
}

cudaError_t popcount_gemm_decode(std::span<const PopcountGemm> products, const DecodePlan& plan, const Launch& on) {
  const auto work = several(shape_of(products[0], plan), products, plan.tiles, product_of<PopcountGemm>);
  return products[0].bits == 4 ? run_bits<4, 1, 2, 4>(work, plan, on) : run_bits<8, 1, 2, 4, 8>(work, plan, on);
}

}  // namespace bitinfer::cuda
