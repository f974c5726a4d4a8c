// popcount_gemm, and sign_gemm in fixed point, for one or a few tokens and weights with group scales, activation blocks
// or several planes:
//
//   y[m, n] = sum_s sum_p act_scale[m, s] * weight_scale[p, n, s] * (S_p[n] q[m])_s + ...    (segments s of 128 columns
//   * i)
//
// gemm_decode.cu tells how the products come about; here they are m16n8k128, which end where segments end. What
// differs:
//
//   unit         the columns of one product sum: a segment, or 512 columns if there is only one
//   warp         takes every k_warps-th unit for every tile_warps-th tile; weights and planes both from shared memory
//   epilogue     first all scaled terms [segment, plane, row] at once, then each output's sum in the order that
//                popcount_gemm prescribes
//
// Bounds: latency, of the copies and of the ordered sums (K / 128 dependent additions).
#include <algorithm>

#include "gemm_decode.cuh"
#include "gemm_decode.h"

namespace bitinfer::cuda {
namespace {

struct Arguments {
  Weight weight;
  const uint32_t* planes;
  const float* act_scale;
  const void* act_sum;  // int32, int64 for fixed point
  const float* act_shift;
  Output y;
  int m = 0, bits = 0, block_size = 0, blocks = 0;
  int segments = 0, segment_words = 0;
  int units = 0, unit_words = 0;
  int k_warps = 0, tile_warps = 0;
  int tiles = 0, larger_blocks = 0;  // of a block; so many blocks, the first, have one more
};

// Registers allow this many warps in each of two blocks of a multiprocessor.
constexpr int max_warps(int column_groups) { return column_groups <= 2 ? 16 : 8; }

// What the epilogue needs of a token in a segment.
struct alignas(16) TokenSegment {
  int64_t q_sum;
  float scale;
  float shift;  // of the whole token
};

// Where things lie in a block's shared memory, in bytes. 32 lanes read 4 bytes each of eight rows without bank
// conflicts if the pitch is 16 more than a multiple of 128.
struct Layout {
  int pitch, planes, scales, shifts, tokens, slots, end;

  __host__ __device__ Layout(const Arguments& a, int tiles, int column_groups) {
    const int words = static_cast<int>(a.weight.words()), rows = tiles * kTileRows;
    const int weight_rows = rows * static_cast<int>(a.weight.planes), groups = static_cast<int>(a.weight.groups());
    pitch = (4 * words + 127) / 128 * 128 + 16;
    planes = weight_rows * pitch;
    tokens = planes + 8 * column_groups * pitch;
    scales = tokens + a.m * a.segments * static_cast<int>(sizeof(TokenSegment));
    shifts = scales + (a.weight.scale ? 4 * groups * weight_rows : 0);
    slots = shifts + (a.weight.group_shift ? 4 * groups * rows : 0);
    end = slots + 4 * a.units * result_count(a.m, a.bits) * weight_rows;
  }
};

// kBits: of an activation, or 24 for fixed point.
template <int kBits, int kGroups>
__global__ void __launch_bounds__(max_warps(kGroups) * 32, kGroups <= 6 ? 2 : 1) grouped_kernel(const Arguments a) {
  constexpr bool kFixed = kBits == kFixedPointBits, kOnes = kBits == 1;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Weight& weight = a.weight;
  const int words = static_cast<int>(weight.words()), groups = static_cast<int>(weight.groups());
  const int weight_planes = static_cast<int>(weight.planes), results = result_count(a.m, kBits);
  const int first_tile = blockIdx.x * a.tiles + min(static_cast<int>(blockIdx.x), a.larger_blocks);
  const int tiles = a.tiles + (static_cast<int>(blockIdx.x) < a.larger_blocks);
  const int rows = tiles * kTileRows, weight_rows = rows * weight_planes, columns = a.m * kBits;
  const int64_t row0 = static_cast<int64_t>(first_tile) * kTileRows;
  const Layout layout(a, tiles, kGroups);
  float* const scales = reinterpret_cast<float*>(shared + layout.scales);  // [group, plane, row]
  float* const shifts = reinterpret_cast<float*>(shared + layout.shifts);  // [group, row]
  auto* const of_tokens = reinterpret_cast<TokenSegment*>(shared + layout.tokens);
  int* const slots = reinterpret_cast<int*>(shared + layout.slots);  // [unit, result, plane, row]
  allow_next_kernel();

  // ---- all that does not depend on the kernel before us
  for (int p = 0; p < weight_planes; ++p) {
    copy_rows(base + p * rows * layout.pitch, layout.pitch, weight.signs + p * weight.n * words, row0, rows, weight.n,
              words);
  }
  for (int i = threadIdx.x; weight.scale && i < weight_rows * groups; i += blockDim.x) {
    const int r = i / groups, p = r / rows;
    const int64_t n = row0 + r - p * rows;
    if (n < weight.n) {
      scales[(i - r * groups) * weight_rows + r] =
          load_float(weight.scale, (p * weight.n + n) * groups + i - r * groups);
    }
  }
  for (int i = threadIdx.x; weight.group_shift && i < rows * groups; i += blockDim.x) {
    const int r = i / groups;
    if (row0 + r < weight.n) shifts[(i - r * groups) * rows + r] = load_float(weight.group_shift, row0 * groups + i);
  }
  // Columns that the planes matrix does not have, and words past its last, are zero. With one-bit activations the
  // column after the last is all ones: its product counts the set bits of the weights.
  const int pieces = words / 4;
  for (int column = warp; column < 8 * kGroups; column += blockDim.x / 32) {
    const uint32_t fill = kOnes && column == columns ? ~0u : 0u;
    for (int i = (column < columns ? pieces : 0) + lane; i < layout.pitch / 16; i += 32) {
      const uint32_t value = i < pieces ? fill : 0u;
      *reinterpret_cast<uint4*>(shared + layout.planes + column * layout.pitch + 16 * i) =
          make_uint4(value, value, value, value);
    }
  }
  wait_for_previous_kernel();

  copy_rows(base + layout.planes, layout.pitch, a.planes, 0, columns, columns, words);
  for (int i = threadIdx.x; i < a.m * a.segments; i += blockDim.x) {
    const int token = i / a.segments, column = (i - token * a.segments) * a.segment_words * 32;
    TokenSegment& s = of_tokens[i];
    if constexpr (kFixed) {
      s.q_sum = __ldcg(static_cast<const int64_t*>(a.act_sum) + i);
    } else {
      s.q_sum = __ldcg(static_cast<const int*>(a.act_sum) + i);
    }
    s.scale = __ldcg(a.act_scale + token * a.blocks + (a.block_size == 0 ? 0 : column / a.block_size));
    s.shift = a.act_shift == nullptr ? 0.0f : __ldcg(a.act_shift + token);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  // ---- the products
  const int k_warp = warp % a.k_warps, tile_warp = warp / a.k_warps, virtual_tiles = tiles * weight_planes;
  const uint32_t at_weights = base + g * layout.pitch + 4 * t,
                 at_planes = base + layout.planes + g * layout.pitch + 4 * t;
  for (int unit = k_warp; unit < a.units; unit += a.k_warps) {
    const int begin = unit * a.unit_words, end = min(begin + a.unit_words, words);
    for (int tile = tile_warp; tile < virtual_tiles; tile += a.tile_warps) {
      const uint32_t at = at_weights + tile * kTileRows * layout.pitch;
      int c[kGroups][4] = {};
      for (int word = begin; word < end; word += 4) {
        const uint32_t upper = load_shared_word(at + 4 * word);
        const uint32_t lower = load_shared_word(at + 4 * word + 8 * layout.pitch);
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          multiply_b1_k128(c[j], upper, lower, load_shared_word(at_planes + 8 * j * layout.pitch + 4 * word));
        }
      }
      int* const slot = slots + unit * results * weight_rows + tile * kTileRows;
      combine_groups<kBits, kGroups>(c, g, t, [&](int result, int row, int value) {
        if (result < results) slot[result * weight_rows + row] = value;
      });
    }
  }
  __syncthreads();

  // ---- the scaled terms, each in the place of its first count
  const int units_of_segment = a.segments == 1 ? a.units : 1;
  for (int i = threadIdx.x; i < a.segments * weight_rows; i += blockDim.x) {
    const int segment = i / weight_rows, r = i - segment * weight_rows;
    const int group = weight.group_size == 0 ? 0 : segment * a.segment_words * 32 / static_cast<int>(weight.group_size);
    const float row_scale = weight.scale ? scales[group * weight_rows + r] : 1.0f;
    int* const first = slots + segment * units_of_segment * results * weight_rows + r;
    const auto count = [&](int result) {
      int total = 0;
      for (int u = 0; u < units_of_segment; ++u) total += first[(u * results + result) * weight_rows];
      return total;
    };
    const int set_bits = kOnes ? count(a.m) : 0;
    for (int token = 0; token < a.m; ++token) {
      const TokenSegment s = of_tokens[token * a.segments + segment];
      float product;
      if constexpr (kFixed) {
        product = static_cast<float>(s.q_sum - 2 * (count(2 * token) + (int64_t{count(2 * token + 1)} << 16)));
      } else if constexpr (kOnes) {
        product = static_cast<float>(static_cast<int>(s.q_sum) - 2 * set_bits + 4 * count(token));
      } else {
        product = static_cast<float>(static_cast<int>(s.q_sum) - 2 * count(token));
      }
      first[(kFixed ? 2 : 1) * token * weight_rows] = __float_as_int(__fmul_rn(__fmul_rn(s.scale, row_scale), product));
    }
  }
  __syncthreads();

  // ---- their sums, in order
  for (int i = threadIdx.x; i < rows * a.m; i += blockDim.x) {
    const int token = i / rows, row = i - token * rows;
    const int64_t n = row0 + row;
    if (n >= weight.n) continue;
    const int* term = slots + (kFixed ? 2 : 1) * token * weight_rows + row;
    float sum = 0;
#pragma unroll 4
    for (int segment = 0; segment < a.segments; ++segment) {
      for (int p = 0; p < weight_planes; ++p) sum = __fadd_rn(sum, __int_as_float(term[p * rows]));
      if (weight.group_shift) {
        const TokenSegment& s = of_tokens[token * a.segments + segment];
        const int group =
            weight.group_size == 0 ? 0 : segment * a.segment_words * 32 / static_cast<int>(weight.group_size);
        const float shift = __fmul_rn(s.scale, shifts[group * rows + row]);
        sum = __fadd_rn(sum, __fmul_rn(shift, static_cast<float>(s.q_sum)));
      }
      term += units_of_segment * results * weight_rows;
    }
    if (a.act_shift != nullptr) sum = __fadd_rn(sum, of_tokens[token * a.segments].shift);
    if (weight.bias) sum = __fadd_rn(sum, load_float(weight.bias, n));
    store_float(a.y, token, n, sum);
  }
}

// The instances: those column groups of a kernel's bits that suffice for m tokens; 0 if none does.
int column_groups_for(int m, int bits) {
  const int needed = (m * bits + (bits == 1) + 7) / 8;
  if (bits == kFixedPointBits) return m <= 4 ? (m == 1 ? 3 : m == 2 ? 6 : 12) : 0;
  return needed <= 1 ? 1 : needed <= 2 ? 2 : needed <= 8 ? 8 : 0;
}

template <typename Problem>
Arguments arguments(const Problem& p) {
  constexpr bool kFixed = std::is_same_v<Problem, FixedPointGemm>;
  Arguments a{p.weight, p.planes, p.act_scale, p.act_sum, p.act_shift, p.y};
  const auto words = static_cast<int>(p.weight.words());
  a.m = static_cast<int>(p.m);
  if constexpr (kFixed) {
    a.bits = kFixedPointBits;
    a.blocks = 1;
    a.segments = static_cast<int>(p.weight.groups());
    a.segment_words = a.segments > 1 ? static_cast<int>(p.weight.group_size / kWordBits) : words;
  } else {
    a.bits = static_cast<int>(p.bits);
    a.block_size = static_cast<int>(p.block_size);
    a.blocks = static_cast<int>(p.blocks());
    a.segments = static_cast<int>(p.segments());
    a.segment_words = a.segments > 1 ? static_cast<int>(p.segment() / kWordBits) : words;
  }
  a.unit_words = a.segments > 1 ? a.segment_words : kChunkWords;
  a.units = (words + a.unit_words - 1) / a.unit_words;
  return a;
}

template <typename Problem>
DecodePlan plan_for(const Problem& p, const Device& device) {
  DecodePlan plan;
  const Weight& w = p.weight;
  if (!device.has_binary_mma() || w.k == 0 || w.n == 0 || p.m == 0 || p.m > 8) return plan;
  if (w.k % 128 != 0 || w.k > (1 << 17) || w.planes > 4) return plan;
  if (!is_aligned(w.signs) || !is_aligned(p.planes)) return plan;
  Arguments a = arguments(p);
  const int groups = column_groups_for(a.m, a.bits);
  // counts of a longer unit would not fit the fixed point's results
  if (groups == 0 || a.segment_words % 4 != 0 || a.unit_words > 128) return plan;
  a.k_warps = std::min(a.units, 8);
  const int64_t tiles = (w.n + kTileRows - 1) / kTileRows;
  const auto shared_bytes = [&](int64_t of_block) { return Layout(a, static_cast<int>(of_block), groups).end; };
  const int64_t wanted = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  // one block a multiprocessor, small enough that a block of the next kernel fits beside it
  int64_t of_block = std::min<int64_t>(wanted, 64);
  while (of_block > 1 && shared_bytes(of_block) > device.shared_bytes_all / 2 - 1024) --of_block;
  if (shared_bytes(of_block) > device.shared_bytes) return plan;
  plan.blocks = static_cast<int>(of_block == wanted ? std::min<int64_t>(tiles, device.multiprocessors)
                                                    : (tiles + of_block - 1) / of_block);
  plan.tiles = static_cast<int>(of_block);
  plan.rounds = a.k_warps;
  plan.tile_warps = static_cast<int>(std::min<int64_t>(of_block * w.planes, max_warps(groups) / a.k_warps));
  plan.shared_bytes = shared_bytes(of_block);
  plan.column_groups = groups;
  return plan;
}

template <typename Problem>
cudaError_t run(const Problem& p, const DecodePlan& plan, const Launch& on) {
  Arguments a = arguments(p);
  const auto tiles = static_cast<int>((a.weight.n + kTileRows - 1) / kTileRows);
  a.k_warps = plan.rounds;
  a.tile_warps = plan.tile_warps;
  a.tiles = tiles / plan.blocks;
  a.larger_blocks = tiles % plan.blocks;
  const dim3 grid(plan.blocks), block(32 * a.k_warps * a.tile_warps);
  const auto go = [&](auto kernel) { return launch(kernel, on, grid, block, plan.shared_bytes, true, a); };
  const int groups = plan.column_groups;
  switch (a.bits) {
    case 1:
      return go(groups == 1 ? grouped_kernel<1, 1> : grouped_kernel<1, 2>);
    case 2:
      return go(groups == 1 ? grouped_kernel<2, 1> : grouped_kernel<2, 2>);
    case 4:
      return go(groups == 1 ? grouped_kernel<4, 1> : groups == 2 ? grouped_kernel<4, 2> : grouped_kernel<4, 8>);
    case 8:
      return go(groups == 1 ? grouped_kernel<8, 1> : groups == 2 ? grouped_kernel<8, 2> : grouped_kernel<8, 8>);
    default:
      return go(groups == 3   ? grouped_kernel<kFixedPointBits, 3>
                : groups == 6 ? grouped_kernel<kFixedPointBits, 6>
                              : grouped_kernel<kFixedPointBits, 12>);
  }
}

}  // namespace

DecodePlan popcount_gemm_decode_grouped_plan(const PopcountGemm& p, const Device& device) {
  return plan_for(p, device);
}

cudaError_t popcount_gemm_decode_grouped(const PopcountGemm& p, const DecodePlan& plan, const Launch& on) {
  return run(p, plan, on);
}

DecodePlan fixed_gemm_decode_grouped_plan(const FixedPointGemm& p, const Device& device) { return plan_for(p, device); }

cudaError_t fixed_gemm_decode_grouped(const FixedPointGemm& p, const DecodePlan& plan, const Launch& on) {
  return run(p, plan, on);
}

}  // namespace bitinfer::cuda
