// The products of one token by a block of decode_token.cu: the token's norm, its integers and their planes, and rows of
// weights in shared memory times these.
#pragma once

#include "decode_token.h"
#include "gemm_decode.cuh"
#include "pack_row.cuh"

namespace bitinfer::cuda {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kChunkColumns = 32 * kChunkWords, kPlaneBytes = kChunkColumns;  // of the eight planes of a chunk

// Tiles of a block.
struct Share {
  int first, count;

  Share() = default;
  __device__ Share(int tiles, int block, int blocks) {
    first = block * (tiles / blocks) + min(block, tiles % blocks);
    count = tiles / blocks + (block < tiles % blocks);
  }
};

struct Scratch {
  float squares[kWarps];
  uint32_t largest[2][kWarps];
  alignas(16) int sum[2][kWarps];
  alignas(16) float shift[2][kWarps];
};

// The bits of a number, converted where it is used: that waits for memory.
__device__ __forceinline__ uint32_t load_bits(const Floats& row, int i) {
  uint32_t bits;
  if (row.dtype == Dtype::kFloat32) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(static_cast<const uint32_t*>(row.data) + i));
  } else {
    unsigned short half;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(half) : "l"(static_cast<const unsigned short*>(row.data) + i));
    bits = half;
  }
  return bits;
}

__device__ __forceinline__ float to_number(const Floats& row, uint32_t bits, float absent) {
  if (!row) return absent;
  if (row.dtype == Dtype::kFloat32) return __uint_as_float(bits);
  if (row.dtype == Dtype::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// What a thread needs for the output of a row.
struct Place {
  uint32_t scale, shift, bias;

  __device__ __forceinline__ void load(const TokenMatrix& m, int row, bool valid) {
    scale = shift = bias = 0;
    if (!valid) return;
    if (m.scale) scale = load_bits(m.scale, row);
    if (m.group_shift) shift = load_bits(m.group_shift, row);
    if (m.bias) bias = load_bits(m.bias, row);
  }
};

// The columns of a lane in round r: half of a chunk's octets belong to each of two warps.
__device__ __forceinline__ int column_of(int round) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  return (warp / 2 + round * kKWarps) * kChunkColumns + (warp % 2 * 32 + lane) * kOctet;
}

template <typename T, int kRounds>
__device__ __forceinline__ void load_row(const void* row, int k, uint4 (&to)[kRounds]) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int column = column_of(r);
    to[r] = make_uint4(0, 0, 0, 0);
    if (row != nullptr && column < k) to[r] = load_quad(static_cast<const T*>(row) + column);
  }
}

// Bytes of a share of a matrix, which lie together in memory, and in shared memory too: rows without padding cost some
// bank conflicts, but a copy of its own for each would cost the copy engine more.
__device__ __forceinline__ uint32_t share_bytes(int n, int k, Share share) {
  const int rows = min(share.count * kTileRows, n - share.first * kTileRows);
  return static_cast<uint32_t>(max(rows, 0) * (k / 8));
}

// Has the copy engine bring a share; `barrier` gets the bytes.
__device__ __forceinline__ void copy_share(uint32_t to, const TokenMatrix& m, int n, int k, Share share,
                                           uint32_t barrier) {
  const uint32_t bytes = share_bytes(n, k, share);
  if (bytes == 0) return;
  const auto* const from = reinterpret_cast<const unsigned char*>(m.signs) + int64_t{share.first} * kTileRows * (k / 8);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// h += added and n = RMSNorm(h) * weight, each step rounded to T.
template <typename T>
__device__ __forceinline__ uint4 normalise(uint4& h, const uint4& added, const uint4& weight, int k, float eps,
                                           Scratch& s) {
  float z[kOctet], others[kOctet];
  unpack<T>(h, z);
  unpack<T>(added, others);
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fadd_rn(z[j], others[j]);
  h = round_octet(z, T{});
#pragma unroll
  for (float value : z) squares += value * value;
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) s.squares[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = s.squares[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(kAllLanes, squares, distance);
  const float factor = rsqrtf(squares / static_cast<float>(k) + eps);
  unpack<T>(weight, others);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], factor);
  round_octet(z, T{});
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], others[j]);
  return round_octet(z, T{});
}

// The columns' factors of one product.
template <int kRounds>
struct Factors {
  uint4 scale[kRounds], shift[kRounds];
  bool scales, shifts;

  template <typename T>
  __device__ __forceinline__ void load(const TokenMatrix& m, int k) {
    scales = m.in_scale != nullptr;
    shifts = m.in_shift != nullptr;
    load_row<T>(m.in_scale, k, scale);
  }
  // later: registers are few
  template <typename T>
  __device__ __forceinline__ void load_shift(const TokenMatrix& m, int k) {
    load_row<T>(m.in_shift, k, shift);
  }
};

// Quantises the token for each product and leaves its planes [product, round, chunk] in shared memory.
template <typename T, int kRounds, int kProducts>
__device__ __forceinline__ void make_planes(const uint4 (&n)[kRounds], const Factors<kRounds> (&factors)[kProducts],
                                            float highest, uint32_t planes, Scratch& s, float (&act_scale)[kProducts]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto z_of = [&](int p, int r, float (&z)[kOctet]) {
    unpack<T>(n[r], z);
    if (!factors[p].scales) return;
    float scale[kOctet];
    unpack<T>(factors[p].scale[r], scale);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], scale[j]);
  };
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    float maximum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float z[kOctet];
      z_of(p, r, z);
#pragma unroll
      for (float value : z) maximum = max_magnitude(maximum, value);
    }
    const uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(maximum));
    if (lane == 0) s.largest[p][warp] = largest;
  }
  __syncthreads();
  // lanes 2h' and 2h' + 1 together have 16 columns, half a word of each plane: the even lane stores planes 0 to 3 of
  // them, the odd one 4 to 7. See popcount's operand in gemm_decode.cu: half h of a chunk is half h % 2 of word h / 2 =
  // 4t + i, a row of eight planes at row 2t + h % 2 of matrix i.
  const bool odd = lane & 1;
  const int half = 16 * (warp % 2) + lane / 2, matrix = half / 2 % 4, row = half / 8 * 2 + half % 2;
  const uint32_t to = planes + 16 * (8 * matrix + (row ^ 2 * matrix)) + 8 * odd;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, s.largest[p][lane % kWarps]);
    const bool bad = largest >= kInfinityBits, zero = bad || __uint_as_float(largest) < kSmallestAbsmax;
    const float factor = __fdiv_rn(highest, __uint_as_float(largest));
    act_scale[p] = bad ? __uint_as_float(kNaNBits) : zero ? 0 : __fdiv_rn(__uint_as_float(largest), highest);
    int sum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float z[kOctet];
      z_of(p, r, z);
      uint32_t q[kOctet];
      // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
#pragma unroll
      for (int j = 0; j < kOctet; ++j) q[j] = __float_as_uint(__fadd_rn(__fmul_rn(z[j], factor), 12582912.0f));
      uint32_t low = zero ? 0 : gather_bytes<0>(q[0], q[1], q[2], q[3]);
      uint32_t high = zero ? 0 : gather_bytes<0>(q[4], q[5], q[6], q[7]);
      sum = __dp4a(static_cast<int>(low), 0x01010101, __dp4a(static_cast<int>(high), 0x01010101, sum));
      transpose_bits(low, high);
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
      const uint32_t first = odd ? other : low, second = odd ? high : other;
      asm volatile(
          "st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + ((p * kRounds + r) * kKWarps + warp / 2) * kPlaneBytes),
          "r"(__byte_perm(first, second, 0x5140)), "r"(__byte_perm(first, second, 0x7362))
          : "memory");
    }
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane == 0) s.sum[p][warp] = sum;
  }
  __syncthreads();
}

// in_shift . n of this warp's columns, for one product.
template <typename T, int kRounds>
__device__ __forceinline__ void add_shift(const uint4 (&n)[kRounds], const Factors<kRounds>& factors, float& of_warp) {
  if (!factors.shifts) return;
  float total[kOctet] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    // products of 16-bit numbers are exact in float32
    float values[kOctet], shift[kOctet];
    unpack<T>(n[r], values);
    unpack<T>(factors.shift[r], shift);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) total[j] = fmaf(values[j], shift[j], total[j]);
  }
#pragma unroll
  for (int distance = kOctet / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < distance; ++j) total[j] += total[j + distance];
  }
  const float shift = warp_sum(total[0]);
  if (threadIdx.x % 32 == 0) of_warp = shift;
}

// Multiplies tiles first, first + step, ... of `weights` by planes, into the partial sums of this warp's chunk.
template <int kRounds>
__device__ __forceinline__ void multiply(uint32_t weights, int k, int tiles, int first, int step, uint32_t planes,
                                         int* slot) {
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = static_cast<int>(threadIdx.x) / 64;
  const int g = lane / 4, t = lane % 4, pitch = k / 8;
  const int last_chunk = (k - 1) / kChunkColumns;
  uint4 x[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[r].x), "=r"(x[r].y), "=r"(x[r].z), "=r"(x[r].w)
                 : "r"(planes + (r * kKWarps + chunk) * kPlaneBytes + 16 * (lane ^ lane / 8 * 2))
                 : "memory");
  }
  const uint32_t at_lane = weights + g * pitch + 16 * t;
  constexpr int kBatch = 2;  // tiles at a time, to have independent work
  for (int tile0 = first; tile0 < tiles; tile0 += kBatch * step) {
    int c[kBatch][1][4] = {};
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      // chunks past the end of a row have planes of zero, whatever weights those meet
      const int at_chunk = 64 * min(chunk + r * kKWarps, last_chunk);
      uint4 upper[kBatch], lower[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t at = at_lane + min(tile0 + b * step, tiles - 1) * (kTileRows * pitch) + at_chunk;
        upper[b] = load_shared(at);
        lower[b] = load_shared(at + 8 * pitch);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        multiply_b1_k256(c[b][0], {upper[b].x, lower[b].x, upper[b].y, lower[b].y}, x[r].x, x[r].y);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        multiply_b1_k256(c[b][0], {upper[b].z, lower[b].z, upper[b].w, lower[b].w}, x[r].z, x[r].w);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int tile = tile0 + b * step;
      if (tile >= tiles) break;
      combine_groups<8, 1>(c[b], g, t, [&](int, int row, int value) { slot[tile * kTileRows + row] = value; });
    }
  }
}

// An output, in the order that popcount_gemm prescribes.
__device__ __forceinline__ float output_of(const int* slots, int stride, int row, const Scratch& s, int p, bool shifts,
                                           float act_scale, const Place& place, const TokenMatrix& m) {
  int counted = 0, q_sum = 0;
#pragma unroll
  for (int w = 0; w < kKWarps; ++w) counted += slots[w * stride + row];
  float shift = 0;
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i) {
    const int4 four = reinterpret_cast<const int4*>(s.sum[p])[i];
    q_sum += (four.x + four.y) + (four.z + four.w);
    if (shifts) {
      const float4 of_warps = reinterpret_cast<const float4*>(s.shift[p])[i];
      shift += (of_warps.x + of_warps.y) + (of_warps.z + of_warps.w);
    }
  }
  const float scale = to_number(m.scale, place.scale, 1);
  float y = __fmul_rn(__fmul_rn(act_scale, scale), static_cast<float>(q_sum - 2 * counted));
  if (m.group_shift) {
    const float of_group = to_number(m.group_shift, place.shift, 0);
    y = __fadd_rn(y, __fmul_rn(__fmul_rn(act_scale, of_group), static_cast<float>(q_sum)));
  }
  return __fadd_rn(__fadd_rn(y, shift), to_number(m.bias, place.bias, 0));
}

}  // namespace bitinfer::cuda
