// sign_gemm for one token of 16-bit activations and weights with one scale a row, in one kernel:
//
//   y[n] = weight_scale[n] * sum_k s[n, k] z[k] + group_shift[n] * sum_k z[k] + in_shift . x + bias[n],   z = in_scale
//   * x
//
// The product is that of gemm_decode.cu, on binary tensor cores and the bit planes of fixed point numbers, but each
// warp makes the planes of its own chunks of 512 columns: q = rint(z * 2^s) with |q| < 2^22, s from the largest |z| of
// these chunks, in two's complement of 23 bits. The error is at most 2^-22 of that largest number, far below the
// rounding of y. No warp waits for another before the partial sums [k_warp, low 16 bits and high 8, row] meet in shared
// memory.
//
//   block        a run of 16-row tiles, one block a multiprocessor; all its weights in shared memory before the wait
//   warp         every eighth chunk, its planes in registers as three operands of 8 columns, for all tiles
//
// Several products of one x (q, k and v; gate and up) go in one launch, each with column factors and blocks of its own.
//
// Bounds: bytes of the weights for wide layers, latency for small ones; making the planes takes about 200 instructions
// a chunk, in every block anew, and most of them at half rate. That is still faster than a kernel of its own before
// this one, and than a cluster whose blocks share the columns and then exchange sums.
#include <algorithm>

#include "gemm_decode.cuh"
#include "octet.cuh"
#include "reduce.cuh"
#include "sign_gemm_decode.h"

namespace bitinfer::cuda {
namespace {

constexpr int kGroups = 3;
constexpr int kLaneColumns = 16;  // of a lane in a chunk
constexpr int kChunkColumns = 32 * kLaneColumns;
constexpr int kStagedBytes = 2 * kChunkColumns;      // a chunk of activations
constexpr int kPlaneBytes = 24 * kChunkColumns / 8;  // and of planes

// Of a warp's shared memory: the activations of all its chunks, later the planes of one, then its partial sums.
constexpr int slot_bytes(int rounds, int rows) { return std::max({rounds * kStagedBytes, kPlaneBytes, 8 * rows}); }

struct Product {
  const uint32_t* signs;
  const void *in_scale, *in_shift;  // of the type of x
  Floats scale, group_shift, bias;
  Output y;
  int64_t n;
  int tiles, larger_blocks;  // of a block; so many blocks, the first, have one more
};

// What all products of a launch have in common.
struct Shape {
  const void* x;  // of a 16-bit type
  int k;
  int pitch;     // bytes from one row of weights to the next in shared memory
  int rows_all;  // that a block has room for
};

// What a warp knows of its chunks.
struct alignas(16) Sums {
  int q_low, q_high;  // of q: its lower 16 bits, and the rest
  float scale;        // z = scale * q
  float z;
};

// Exchanges the bits of `a` that `mask` leaves out with those of `b` that it covers, which are `by` lower.
__device__ __forceinline__ void exchange_bits(uint32_t& a, uint32_t& b, uint32_t mask, int by) {
  const uint32_t low = (a & mask) | ((b << by) & ~mask);
  b = ((a >> by) & mask) | (b & ~mask);
  a = low;
}

// Transposes the lower 24 bits of 16 integers. Afterwards low[i] holds planes i and 8 + i, high[i] planes 16 + i and
// 20 + i, the first of two in its lower half. Each step exchanges an index of words with one of bits, for it takes half
// the instructions that exchanging bits within a word would.
__device__ __forceinline__ void transpose_planes(const uint32_t (&q)[kLaneColumns], uint32_t (&low)[8],
                                                 uint32_t (&high)[4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = __byte_perm(q[i], q[i + 8], 0x5410);
#pragma unroll
  for (int i = 0; i < 8; i += 2) exchange_bits(low[i], low[i + 1], 0x55555555u, 1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if ((i & 2) == 0) exchange_bits(low[i], low[i + 2], 0x33333333u, 2);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) exchange_bits(low[i], low[i + 4], 0x0f0f0f0fu, 4);
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = __byte_perm(low[i], 0, 0x3120);

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = 4 * (i & 1) + (i & 2);
    high[i] = __byte_perm(__byte_perm(q[j], q[j + 8], 0x0062), __byte_perm(q[j + 1], q[j + 9], 0x0062), 0x5410);
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    exchange_bits(high[i], high[i + 1], 0x0f0f0f0fu, 4);
    const uint32_t lower_halves = __byte_perm(high[i], high[i + 1], 0x5410);
    high[i + 1] = __byte_perm(high[i], high[i + 1], 0x7632);
    high[i] = lower_halves;
    exchange_bits(high[i], high[i + 1], 0x55555555u, 1);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) exchange_bits(high[i], high[i + 2], 0x33333333u, 2);
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Four transposed matrices of eight rows of eight halves; lane l names row l % 8 of matrix l / 8. Word i is elements 2t
// and 2t + 1 of column g of matrix i.
__device__ __forceinline__ uint4 load_transposed(uint32_t row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(row)
               : "memory");
  return v;
}

// kRounds: chunks of a warp.
template <typename T, int kRounds, class Work>
__global__ void __launch_bounds__(32 * kKWarps, kRounds <= 2 ? 2 : 1)
    sign_decode_kernel(const __grid_constant__ Work work) {
  int block = blockIdx.x;
  const Product& a = work.product(block);
  const Shape& shape = work.shape;
  constexpr int kOctets = kLaneColumns / kOctet;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Sums sums_of[kKWarps];
  __shared__ float shift_of[kKWarps];  // of in_shift . x
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x & 31, k_warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_tile = block * a.tiles + min(block, a.larger_blocks);
  const int tiles = a.tiles + (block < a.larger_blocks), rows = tiles * kTileRows;
  const int64_t row0 = static_cast<int64_t>(first_tile) * kTileRows;
  const int last_chunk = (shape.k - 1) / kChunkColumns;
  const int slot_stride = slot_bytes(kRounds, rows) / static_cast<int>(sizeof(int));
  int* const slots = reinterpret_cast<int*>(shared + shape.rows_all * shape.pitch);
  const uint32_t scratch = base + shape.rows_all * shape.pitch + k_warp * slot_stride * static_cast<int>(sizeof(int));
  allow_next_kernel();
  if (tiles == 0) {  // a place taken on this multiprocessor keeps two blocks of the next kernel from sharing another
    wait_for_previous_kernel();
    return;
  }

  // ---- all that does not depend on the kernel before us
  copy_rows(base, shape.pitch, a.signs, row0, rows, a.n, shape.k / 32);
  struct Place {
    int row;
    int64_t n;  // or negative
    float scale, shift, bias;
  };
  const auto locate = [&](int row) {
    Place p{row, row < rows && row0 + row < a.n ? row0 + row : -1, 1, 0, 0};
    if (p.n >= 0) {
      if (a.scale) p.scale = load_float(a.scale, p.n);
      if (a.group_shift) p.shift = load_float(a.group_shift, p.n);
      if (a.bias) p.bias = load_float(a.bias, p.n);
    }
    return p;
  };
  const Place mine = locate(threadIdx.x);
  const auto chunk_of = [&](int round) { return k_warp + round * kKWarps; };
  const auto column_of = [&](int round, int i) {
    return chunk_of(round) * kChunkColumns + lane * kLaneColumns + i * kOctet;
  };
  const auto load = [&](const void* row, int column) {
    return column < shape.k ? __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(row) + column))
                            : make_uint4(0, 0, 0, 0);
  };
  uint4 in_scale[kRounds][kOctets], in_shift[kRounds][kOctets];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (a.in_scale != nullptr) in_scale[round][i] = load(a.in_scale, column_of(round, i));
      if (a.in_shift != nullptr) in_shift[round][i] = load(a.in_shift, column_of(round, i));
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  wait_for_previous_kernel();

  // ---- the activations: a lane's 16 columns are 32 bytes, but a warp reads runs of 512, half as many sectors
  const auto staged = [&](int round, int octet) {
    return scratch + round * kStagedBytes + 16 * (octet ^ (octet >> 3 & 1));  // without bank conflicts
  };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = i * 32 + lane, column = chunk_of(round) * kChunkColumns + octet * kOctet;
      if (column < shape.k) copy_async(staged(round, octet), static_cast<const T*>(shape.x) + column);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint4 raw[kRounds][kOctets];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      raw[round][i] =
          column_of(round, i) < shape.k ? load_shared(staged(round, lane * kOctets + i)) : make_uint4(0, 0, 0, 0);
    }
  }

  // ---- the planes
  float largest = 0, shift = 0;
  const auto z_of = [&](int round, int i, float (&z)[kOctet]) {
    unpack<T>(raw[round][i], z);
    if (a.in_scale != nullptr) {
      float factors[kOctet];
      unpack<T>(in_scale[round][i], factors);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) z[j] *= factors[j];
    }
  };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float z[kOctet];
      z_of(round, i, z);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(z[j])));
      }
      if (a.in_shift != nullptr) {
        float x[kOctet], factors[kOctet];
        unpack<T>(raw[round][i], x);
        unpack<T>(in_shift[round][i], factors);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) shift += x[j] * factors[j];
      }
    }
  }
  const uint32_t exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
  // below 2^-96 all is zero; infinities and NaN show in the scale
  const bool zero = exponent < 31;
  const float factor = zero ? 0.0f : __uint_as_float((exponent < 255 ? 275 - exponent : 0) << 23);
  const float scale = zero ? 0.0f : __uint_as_float(exponent < 255 ? (exponent - 21) << 23 : 0x7fc00000u);
  if (a.in_shift != nullptr) shift = warp_sum(shift);

  // Each lane stores the planes of its columns as rows of eight halves, and loads columns of such rows. Lane 8t + 2i +
  // h has half h of word 4t + i: it stores row 2t + h of matrix i, where neither stores nor loads meet bank conflicts.
  const int of_matrix = lane >> 1 & 3, row_of_matrix = lane >> 3 << 1 | (lane & 1);
  const uint32_t to = scratch + 16 * (8 * of_matrix + (row_of_matrix ^ (2 * of_matrix)));
  const uint32_t from = scratch + 16 * (lane ^ (lane >> 3 << 1));
  uint4 x[kRounds][kGroups];
  int q_sum = 0;  // of a lane
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    uint32_t q[kLaneColumns], sum = 0;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float z[kOctet];
      z_of(round, i, z);
      // Adding 1.5 * 2^23 leaves the rounded integer in the low 23 bits, with bit 22 inverted, and bit 23 zero. It is
      // below 2^22, since a product of two 16-bit numbers has at most 22 bits and does not round up to that.
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const uint32_t bits = __float_as_uint(fmaf(z[j], factor, 12582912.0f));
        q[i * kOctet + j] = bits;
        sum += bits;
      }
    }
    q_sum += static_cast<int>(sum - kLaneColumns * 0x4b400000u);
    uint32_t low[8], high[4];
    transpose_planes(q, low, high);
    __syncwarp();
    store_shared(to, low[0], low[1], low[2], low[3]);
    store_shared(to + 512, low[4], low[5], low[6], low[7]);
    store_shared(to + 1024, high[0], high[1], high[2] ^ 0xffff0000u, high[3]);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kGroups; ++j) x[round][j] = load_transposed(from + 512 * j);
  }
  __syncwarp();
  const int q_low = __reduce_add_sync(kAllLanes, q_sum & 0xffff), q_high = __reduce_add_sync(kAllLanes, q_sum >> 16);
  if (lane == 0) {
    sums_of[k_warp] = {q_low, q_high, scale, scaled(scale, q_low, q_high)};
    shift_of[k_warp] = shift;
  }

  // ---- the products
  const uint32_t at_lane = base + g * shape.pitch + 16 * t;
  for (int tile = 0; tile < tiles; ++tile) {
    int c[kGroups][4] = {};
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      // chunks past the end of a row have planes of zero, whatever weights those meet
      const uint32_t at = at_lane + tile * (kTileRows * shape.pitch) + min(chunk_of(round), last_chunk) * 64;
      const uint4 upper = load_shared(at), lower = load_shared(at + 8 * shape.pitch);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        multiply_b1_k256(c[j], {upper.x, lower.x, upper.y, lower.y}, x[round][j].x, x[round][j].y);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        multiply_b1_k256(c[j], {upper.z, lower.z, upper.w, lower.w}, x[round][j].z, x[round][j].w);
      }
    }
    // columns 2t and 2t + 1 are planes t and 8 + t of the first group, 4 + t and 12 + t of the second, 16 + t and 20 +
    // t of the third; plane 22 counts negative
    const int top = t == 2 ? -64 : 16 << t;
    int low16[2], top8[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * half;
      low16[half] = (c[0][i] + (c[1][i] << 4) + ((c[0][i + 1] + (c[1][i + 1] << 4)) << 8)) << t;
      top8[half] = (c[2][i] << t) + c[2][i + 1] * top;
    }
    sum_of_lanes(low16, top8, g, t, [&](int result, int row, int value) {
      slots[k_warp * slot_stride + result * rows + tile * kTileRows + row] = value;
    });
  }
  __syncthreads();

  // ---- scales, shifts and bias
  const auto finish = [&](const Place& p) {
    if (p.n < 0) return;
    float product = 0, z_sum = 0, shift_sum = 0;
#pragma unroll
    for (int w = 0; w < kKWarps; ++w) {
      const int* const slot = slots + w * slot_stride + p.row;
      const Sums sums = sums_of[w];
      product += scaled(sums.scale, sums.q_low - 2 * slot[0], sums.q_high - 2 * slot[rows]);
      z_sum += sums.z;
      shift_sum += shift_of[w];
    }
    store_float(a.y, 0, p.n, p.scale * product + p.shift * z_sum + shift_sum + p.bias);
  };
  if (threadIdx.x < rows) finish(mine);
  for (int row = threadIdx.x + blockDim.x; row < rows; row += blockDim.x) finish(locate(row));
}

int shared_bytes_of(const Weight& w, int rounds, int tiles) {
  const int rows = tiles * kTileRows;
  return rows * pitch_of(static_cast<int>(w.words())) + kKWarps * slot_bytes(rounds, rows);
}

// The tiles of a block of a plan: one block a multiprocessor, small enough that a block of the next kernel fits beside.
int fitting_tiles(const Weight& w, int rounds, int64_t wanted, const Device& device) {
  auto tiles = static_cast<int>(std::min<int64_t>(wanted, 64));
  while (tiles > 1 && shared_bytes_of(w, rounds, tiles) > device.shared_bytes_all / 2 - 2048) --tiles;
  return tiles;
}

Shape shape_of(const SignGemm& p, const DecodePlan& plan) {
  return {p.x.data, static_cast<int>(p.weight.k), pitch_of(static_cast<int>(p.weight.words())), plan.tiles * kTileRows};
}

// A product that `blocks` blocks share.
Product product_of(const SignGemm& p, int blocks) {
  const Weight& w = p.weight;
  return {.signs = w.signs,
          .in_scale = p.in_scale.data,
          .in_shift = p.in_shift.data,
          .scale = w.scale,
          .group_shift = w.group_shift,
          .bias = w.bias,
          .y = p.y,
          .n = w.n,
          .tiles = tiles_of(w) / blocks,
          .larger_blocks = tiles_of(w) % blocks};
}

template <class Work>
cudaError_t run(const Work& work, Dtype dtype, const DecodePlan& plan, const Launch& on) {
  const auto go = [&](auto kernel) {
    return launch(kernel, on, dim3(plan.blocks), dim3(32 * kKWarps), plan.shared_bytes, true, work);
  };
  const auto rounds = [&]<typename T>(T) {
    return plan.rounds == 1   ? go(sign_decode_kernel<T, 1, Work>)
           : plan.rounds == 2 ? go(sign_decode_kernel<T, 2, Work>)
                              : go(sign_decode_kernel<T, 3, Work>);
  };
  return dtype == Dtype::kFloat16 ? rounds(__half{}) : rounds(__nv_bfloat16{});
}

}  // namespace

DecodePlan sign_gemm_decode_plan(const SignGemm& p, const Device& device) {
  DecodePlan plan;
  const Weight& w = p.weight;
  const auto fits = [&](const Floats& columns) {
    return !columns || (columns.dtype == p.x.dtype && reinterpret_cast<uintptr_t>(columns.data) % 16 == 0);
  };
  if (device.architecture < 80 || !device.has_binary_mma() || p.m != 1 || w.n == 0 || w.k == 0) return plan;
  if (p.x.dtype == Dtype::kFloat32 || w.planes > 1 || w.groups() > 1 || w.k % 128 != 0 || !is_aligned(w.signs))
    return plan;
  if (!fits(p.x) || !fits(p.in_scale) || !fits(p.in_shift)) return plan;
  plan.rounds = (static_cast<int>(w.words()) + kKWarps * kChunkWords - 1) / (kKWarps * kChunkWords);
  if (plan.rounds > 3) return plan;
  const int64_t wanted = (tiles_of(w) + device.multiprocessors - 1) / device.multiprocessors;
  plan.tiles = fitting_tiles(w, plan.rounds, wanted, device);
  plan.blocks = plan.tiles == wanted ? device.multiprocessors : blocks_for(w, plan.tiles);
  plan.tile_warps = 1;
  plan.shared_bytes = shared_bytes_of(w, plan.rounds, plan.tiles);
  plan.column_groups = kGroups;
  return plan;
}

cudaError_t sign_gemm_decode(const SignGemm& p, const DecodePlan& plan, const Launch& on) {
  return run(One<Shape, Product>{shape_of(p, plan), product_of(p, plan.blocks)}, p.x.dtype, plan, on);
}

DecodePlan sign_gemm_decode_plan(std::span<const SignGemm> products, const Device& device) {
  DecodePlan plan;
  if (products.size() < 2 || products.size() > kMaxProducts) return plan;
  const Weight& first = products[0].weight;
  int64_t tiles = 0;
  for (const SignGemm& p : products) {
    const bool alike = p.x.data == products[0].x.data && p.x.dtype == products[0].x.dtype && p.weight.k == first.k;
    plan = sign_gemm_decode_plan(p, device);
    if (!alike || !plan) return {};
    tiles += tiles_of(p.weight);
  }
  int64_t wanted = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  // what is left over of each product may take one block more than there are multiprocessors
  if (blocks_for(products, static_cast<int>(wanted)) > device.multiprocessors) ++wanted;
  plan.tiles = fitting_tiles(first, plan.rounds, wanted, device);
  plan.blocks = blocks_for(products, plan.tiles);
  plan.shared_bytes = shared_bytes_of(first, plan.rounds, plan.tiles);
  return plan;
}

cudaError_t sign_gemm_decode(std::span<const SignGemm> products, const DecodePlan& plan, const Launch& on) {
  const auto work = several(shape_of(products[0], plan), products, plan.tiles, product_of);
  return run(work, products[0].x.dtype, plan, on);
}

}  // namespace bitinfer::cuda
