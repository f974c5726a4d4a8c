// sign_gemm for one token of 16-bit activations and weights with one scale a row, in one kernel:
//
//   y[n] = weight_scale[n] * sum_k s[n, k] z[k] + group_shift[n] * sum_k z[k] + in_shift . x + bias[n],   z = in_scale
//   * x
//
// The product is that of gemm_decode.cu, on binary tensor cores and the bit planes of fixed point numbers, but each
// warp makes the planes of its own chunks of 512 columns: q = rint(z * 2^s) with |q| <= 2^21, s from the chunk's
// largest |z|, in two's complement of 24 bits. The error is at most 2^-21 of that largest number, far below the
// rounding of y. No warp waits for another before the partial sums [k_warp, low 16 bits and high 8, row] meet in shared
// memory.
//
//   block        a run of 16-row tiles, one block a multiprocessor; all its weights in shared memory before the wait
//   warp         every eighth chunk, its 24 planes in registers as three operands of 8 columns, for all tiles
//
// Bounds: bytes of the weights for wide layers, latency for small ones; making the planes takes about 280 instructions
// a chunk, in every block anew, which is still faster than a kernel of its own before this one.
#include <algorithm>

#include "gemm_decode.cuh"
#include "octet.cuh"
#include "reduce.cuh"
#include "sign_gemm_decode.h"

namespace bitinfer::cuda {
namespace {

constexpr int kGroups = 3, kPlanes = 24;
constexpr int kPlaneInts = kPlanes * kChunkWords;  // of a warp: 1,536 bytes of shared memory
constexpr uint32_t kSignPlane = 22;                // where the sign of q lies; plane 23 repeats it

struct Arguments {
  const uint32_t* signs;
  const void *x, *in_scale, *in_shift;  // of one 16-bit type
  Floats scale, group_shift, bias;
  Output y;
  int64_t n;
  int k;
  int tiles, larger_blocks;  // of a block; so many blocks, the first, have one more
  int pitch;                 // bytes from one row of weights to the next in shared memory
  int rows_all;              // that a block has room for
};

// What a warp knows of its chunks: z = scale * q.
struct Chunks {
  int64_t q_sum;
  float scale, shift;  // shift: its part of in_shift . x
};

// kRounds: chunks of a warp.
template <typename T, int kRounds>
__global__ void __launch_bounds__(32 * kKWarps, kRounds <= 2 ? 2 : 1) sign_decode_kernel(const Arguments a) {
  constexpr int kOctets = 2;  // of a lane in a chunk: columns 8 * lane ... + 7 of each half
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Chunks of_warps[kKWarps];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x & 31, k_warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_tile = blockIdx.x * a.tiles + min(static_cast<int>(blockIdx.x), a.larger_blocks);
  const int tiles = a.tiles + (static_cast<int>(blockIdx.x) < a.larger_blocks), rows = tiles * kTileRows;
  const int64_t row0 = static_cast<int64_t>(first_tile) * kTileRows;
  const int last_chunk = (a.k - 1) / (kChunkWords * 32);
  // a warp's planes lie where its partial sums come later
  int* const slots = reinterpret_cast<int*>(shared + a.rows_all * a.pitch);
  const int slot_stride = max(kPlaneInts, 2 * rows);
  uint32_t* const planes = reinterpret_cast<uint32_t*>(slots + k_warp * slot_stride);
  allow_next_kernel();

  // ---- all that does not depend on the kernel before us
  copy_rows(base, a.pitch, a.signs, row0, rows, a.n, a.k / 32);
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
  const auto column_of = [&](int round, int i) {
    return (k_warp + round * kKWarps) * kChunkWords * 32 + i * kChunk + lane * kOctet;
  };
  const auto load = [&](const void* row, int column) {
    return column < a.k ? __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(row) + column))
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

  // ---- the planes
  uint4 raw[kRounds][kOctets];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) raw[round][i] = load(a.x, column_of(round, i));
  }
  Chunks chunks{};
  float largest = 0;
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
        for (int j = 0; j < kOctet; ++j) chunks.shift += x[j] * factors[j];
      }
    }
  }
  const uint32_t exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
  // below 2^-96 all is zero; infinities and NaN show in the scale
  const bool zero = exponent < 31;
  const float factor = zero ? 0.0f : __uint_as_float((exponent < 255 ? 274 - exponent : 0) << 23);
  chunks.scale = zero ? 0.0f : __uint_as_float(exponent < 255 ? (exponent - 20) << 23 : 0x7fc00000u);
  if (a.in_shift != nullptr) chunks.shift = warp_sum(chunks.shift);

  uint4 x[kRounds][kGroups];
  int q_sum = 0;  // of a lane
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float z[kOctet];
      z_of(round, i, z);
      uint32_t q[kOctet];
      // adding 1.5 * 2^23 leaves the rounded integer in the low bits, with bit 22 inverted
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        q[j] = __float_as_uint(fmaf(z[j], factor, 12582912.0f));
        q_sum += static_cast<int>(q[j] - 0x4b400000u);
      }
      uint32_t* const at = planes + (lane & 3) * kChunkWords + 8 * i + lane / 4;
      const auto store_digit = [&](int digit, uint32_t low, uint32_t high) {
        transpose_bits(low, high);
        at[8 * digit * kChunkWords] = transpose_bytes(low);
        high = transpose_bytes(high);
        if (digit == 2 && (lane & 3) == 2) high = ~high;
        at[(8 * digit + 4) * kChunkWords] = high;
      };
      store_digit(0, gather_bytes<0>(q[0], q[1], q[2], q[3]), gather_bytes<0>(q[4], q[5], q[6], q[7]));
      store_digit(1, gather_bytes<1>(q[0], q[1], q[2], q[3]), gather_bytes<1>(q[4], q[5], q[6], q[7]));
      store_digit(2, gather_bytes<2>(q[0], q[1], q[2], q[3]), gather_bytes<2>(q[4], q[5], q[6], q[7]));
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t plane = min(8u * j + g, kSignPlane);
      x[round][j] = *reinterpret_cast<const uint4*>(planes + plane * kChunkWords + 4 * t);
    }
    __syncwarp();
  }
  // a warp's sum may pass 2^31: its lanes' lower 8 bits and the rest apart
  const int low_sum = __reduce_add_sync(kAllLanes, q_sum & 255), high_sum = __reduce_add_sync(kAllLanes, q_sum >> 8);
  chunks.q_sum = int64_t{high_sum} * 256 + low_sum;
  if (lane == 0) of_warps[k_warp] = chunks;

  // ---- the products
  const uint32_t at_lane = base + g * a.pitch + 16 * t;
  for (int tile = 0; tile < tiles; ++tile) {
    int c[kGroups][4] = {};
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      // chunks past the end of a row have planes of zero, whatever weights those meet
      const uint32_t at = at_lane + tile * (kTileRows * a.pitch) + min(k_warp + round * kKWarps, last_chunk) * 64;
      const uint4 upper = load_shared(at), lower = load_shared(at + 8 * a.pitch);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        multiply_b1_k256(c[j], {upper.x, lower.x, upper.y, lower.y}, x[round][j].x, x[round][j].y);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        multiply_b1_k256(c[j], {upper.z, lower.z, upper.w, lower.w}, x[round][j].z, x[round][j].w);
      }
    }
    combine_groups<kFixedPointBits, kGroups>(c, g, t, [&](int result, int row, int value) {
      slots[k_warp * slot_stride + result * rows + tile * kTileRows + row] = value;
    });
  }
  __syncthreads();

  // ---- scales, shifts and bias
  const auto finish = [&](const Place& p) {
    if (p.n < 0) return;
    float product = 0, z_sum = 0, shift = 0;
#pragma unroll
    for (int w = 0; w < kKWarps; ++w) {
      const int* const slot = slots + w * slot_stride + p.row;
      const Chunks& of_warp = of_warps[w];
      const int64_t counted = slot[0] + (int64_t{slot[rows]} << 16);
      product += of_warp.scale * static_cast<float>(of_warp.q_sum - 2 * counted);
      z_sum += of_warp.scale * static_cast<float>(of_warp.q_sum);
      shift += of_warp.shift;
    }
    store_float(a.y, 0, p.n, p.scale * product + p.shift * z_sum + shift + p.bias);
  };
  if (threadIdx.x < rows) finish(mine);
  for (int row = threadIdx.x + blockDim.x; row < rows; row += blockDim.x) finish(locate(row));
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
  const int pitch = pitch_of(static_cast<int>(w.words()));
  plan.rounds = (static_cast<int>(w.words()) + kKWarps * kChunkWords - 1) / (kKWarps * kChunkWords);
  if (plan.rounds > 3) return plan;
  const int64_t tiles = (w.n + kTileRows - 1) / kTileRows;
  const auto shared_bytes = [&](int64_t of_block) {
    return of_block * kTileRows * pitch + 4 * kKWarps * std::max<int64_t>(kPlaneInts, 2 * kTileRows * of_block);
  };
  // one block a multiprocessor, small enough that a block of the next kernel fits beside it
  const int64_t wanted = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  int64_t of_block = std::min<int64_t>(wanted, 64);
  while (of_block > 1 && shared_bytes(of_block) > device.shared_bytes_all / 2 - 2048) --of_block;
  plan.blocks = static_cast<int>(of_block == wanted ? std::min<int64_t>(tiles, device.multiprocessors)
                                                    : (tiles + of_block - 1) / of_block);
  plan.tiles = static_cast<int>(of_block);
  plan.tile_warps = 1;
  plan.shared_bytes = static_cast<int>(shared_bytes(of_block));
  plan.column_groups = kGroups;
  return plan;
}

cudaError_t sign_gemm_decode(const SignGemm& p, const DecodePlan& plan, const Launch& on) {
  const Weight& w = p.weight;
  const auto tiles = static_cast<int>((w.n + kTileRows - 1) / kTileRows);
  const Arguments a{.signs = w.signs,
                    .x = p.x.data,
                    .in_scale = p.in_scale.data,
                    .in_shift = p.in_shift.data,
                    .scale = w.scale,
                    .group_shift = w.group_shift,
                    .bias = w.bias,
                    .y = p.y,
                    .n = w.n,
                    .k = static_cast<int>(w.k),
                    .tiles = tiles / plan.blocks,
                    .larger_blocks = tiles % plan.blocks,
                    .pitch = pitch_of(static_cast<int>(w.words())),
                    .rows_all = plan.tiles * kTileRows};
  const auto go = [&](auto kernel) {
    return launch(kernel, on, dim3(plan.blocks), dim3(32 * kKWarps), plan.shared_bytes, true, a);
  };
  const auto rounds = [&]<typename T>(T) {
    return plan.rounds == 1   ? go(sign_decode_kernel<T, 1>)
           : plan.rounds == 2 ? go(sign_decode_kernel<T, 2>)
                              : go(sign_decode_kernel<T, 3>);
  };
  return p.x.dtype == Dtype::kFloat16 ? rounds(__half{}) : rounds(__nv_bfloat16{});
}

}  // namespace bitinfer::cuda
