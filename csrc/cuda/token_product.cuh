// The products of one token by a block of decode_token.cu: the token's norm, its integers and their planes, and rows of
// weights in shared memory times these.
#pragma once

#include <type_traits>

#include "token_exchange.cuh"

namespace bitinfer::cuda {

constexpr int kChunkColumns = 32 * kChunkWords, kPlaneBytes = kChunkColumns;  // of the eight planes of a chunk
constexpr int kPairs = kKWarps / 2, kPairColumns = 2 * kChunkColumns;         // of chunks, four warps each

struct Scratch {
  alignas(16) float squares[kWarps];
  uint32_t largest[2][kWarps];
  float act_scale[2];
  alignas(16) int sum[2][kWarps], sum_high[2][kWarps];  // the lower 16 bits and the rest, where there are 24
  alignas(16) float shift[2][kWarps];
};

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

// What a thread needs for the output of a row: loaded, and settled before the token comes.
struct Place {
  float scale, shift, bias;
  bool scales, shifts;

  // of the thread's row in a share of n
  __device__ __forceinline__ void load(const TokenMatrix& m, const Share& share, int n) {
    const int row = share.row_of_thread();
    const bool valid = share.has_thread(n);
    scale = 1;
    shift = bias = 0;
    scales = static_cast<bool>(m.scale);
    shifts = static_cast<bool>(m.group_shift);
    if (!m.has_rows) return;
    const auto number = [&](const Floats& of, float absent) {
      return valid && of ? to_number(of, load_bits(of, row), absent) : absent;
    };
    scale = number(m.scale, 1);
    shift = number(m.group_shift, 0);
    bias = number(m.bias, 0);
  }
};

// Whether the warp's chunks are part of a row of k; where not, it only comes to the barriers.
__device__ __forceinline__ bool has_columns(int k) { return thread_index() / 128 * kPairColumns < k; }

// The columns of a lane in round r: half of a chunk's octets belong to each of two warps.
__device__ __forceinline__ int column_of(int round) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
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

template <int kRounds>
__device__ __forceinline__ void receive_row(const uint32_t* row, int k, uint32_t tag, uint4 (&to)[kRounds]) {
  int columns[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) columns[r] = column_of(r);
  receive(row, columns, k, tag, to);
}

// a + b and a * b of eight numbers, each rounded to T: what rounding the float32 results would give.
template <typename T, class Op>
__device__ __forceinline__ uint4 each_pair(const uint4& a, const uint4& b, const Op& op) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto word = [&](uint32_t x, uint32_t y) {
    const Pair result = op(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
    return reinterpret_cast<const uint32_t&>(result);
  };
  return make_uint4(word(a.x, b.x), word(a.y, b.y), word(a.z, b.z), word(a.w, b.w));
}

template <typename T>
__device__ __forceinline__ uint4 add_octets(const uint4& a, const uint4& b) {
  return each_pair<T>(a, b, [](auto x, auto y) { return __hadd2_rn(x, y); });
}

template <typename T>
__device__ __forceinline__ uint4 multiply_octets(const uint4& a, const uint4& b) {
  return each_pair<T>(a, b, [](auto x, auto y) { return __hmul2_rn(x, y); });
}

// The sum of what the warps left, for all threads: broadcasts take less than shuffles would.
template <typename Number>
__device__ __forceinline__ Number sum_of_warps(const Number (&of_warp)[kWarps]) {
  Number total[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total[i % 4] += of_warp[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// RMSNorm(h) * weight, each step rounded to T.
template <typename T>
__device__ __forceinline__ uint4 normalise(const uint4& h, const uint4& weight, int k, float eps, Scratch& s) {
  const bool active = has_columns(k);
  float z[kOctet], squares = 0;
  if (active) {
    unpack<T>(h, z);
#pragma unroll
    for (float value : z) squares += value * value;
    squares = warp_sum(squares);
  }
  if (thread_index() % 32 == 0) s.squares[thread_index() / 32] = squares;
  sync_threads();
  if (!active) return make_uint4(0, 0, 0, 0);
  squares = sum_of_warps(s.squares);
  const float factor = rsqrtf(squares / static_cast<float>(k) + eps);
#pragma unroll
  for (float& value : z) value = __fmul_rn(value, factor);
  return multiply_octets<T>(round_octet(z, T{}), weight);
}

// The columns' factors of one product.
template <int kRounds>
struct Factors {
  uint4 scale[kRounds], shift[kRounds];
  bool scales, shifts;

  // before the token comes
  template <typename T>
  __device__ __forceinline__ void load(const TokenMatrix& m, int k) {
    scales = m.in_scale != nullptr;
    shifts = m.in_shift != nullptr;
    load_row<T>(m.in_scale, k, scale);
    if (kRounds == 1) load_row<T>(m.in_shift, k, shift);
  }
  // and after: registers are few
  template <typename T>
  __device__ __forceinline__ void load_rest(const TokenMatrix& m, int k) {
    if (kRounds > 1) load_row<T>(m.in_shift, k, shift);
  }
};

// How a token becomes integers of kBytes bytes, q = rint(z * factor) and z = q * scale, from its largest magnitude: one
// byte as pack_activations makes it, up to `highest`; or three, fixed_point.h's, of which z uses 23 bits.
template <int kBytes>
struct TokenFormat {
  float factor, scale;  // NaN where the token has a number that is not finite
  bool zero;

  __device__ __forceinline__ TokenFormat(uint32_t largest, float highest) {
    const bool bad = largest >= kInfinityBits;
    if constexpr (kBytes == 1) {
      zero = bad || __uint_as_float(largest) < kSmallestAbsmax;
      factor = __fdiv_rn(highest, __uint_as_float(largest));
      scale = bad ? __uint_as_float(kNaNBits) : zero ? 0 : __fdiv_rn(__uint_as_float(largest), highest);
    } else {
      // |q| stays below 2^22, since a product of two 16-bit numbers has at most 22 bits and does not round up to that
      const uint32_t exponent = largest >> 23;
      zero = bad || exponent < 31;  // below 2^-96
      factor = __uint_as_float((275 - exponent) << 23);
      scale = bad ? __uint_as_float(kNaNBits) : zero ? 0 : __uint_as_float((exponent - 21) << 23);
    }
  }
};

// Where planes of a round and a byte of the integers begin, behind those of a product: [byte, round, chunk].
template <int kRounds>
__device__ __forceinline__ uint32_t planes_at(int byte, int round, int chunk) {
  return static_cast<uint32_t>(((byte * kRounds + round) * kKWarps + chunk) * kPlaneBytes);
}

// Quantises the token for each product, leaves its planes in shared memory, and returns the sums of the integers of a
// lane.
template <int kBytes, typename T, int kRounds, int kProducts>
__device__ __forceinline__ void make_planes(const uint4 (&n)[kRounds], const Factors<kRounds> (&factors)[kProducts],
                                            int k, float highest, const uint32_t (&planes)[kProducts], Scratch& s,
                                            int (&sums)[kProducts]) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const bool active = has_columns(k);
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
    if (active) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        float z[kOctet];
        z_of(p, r, z);
#pragma unroll
        for (float value : z) maximum = max_magnitude(maximum, value);
      }
      maximum = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(maximum)));
    }
    if (lane == 0) s.largest[p][warp] = __float_as_uint(maximum);
  }
  sync_threads();
  // lanes 2h' and 2h' + 1 together have 16 columns, half a word of each plane: the even lane stores planes 0 to 3 of
  // them, the odd one 4 to 7. See popcount's operand in gemm_decode.cu: half h of a chunk is half h % 2 of word h / 2 =
  // 4t + i, a row of eight planes at row 2t + h % 2 of matrix i.
  const bool odd = lane & 1;
  const int half = 16 * (warp % 2) + lane / 2, matrix = half / 2 % 4, row = half / 8 * 2 + half % 2;
  const uint32_t to = 16 * (8 * matrix + (row ^ 2 * matrix)) + 8 * odd;
  const auto store = [&](uint32_t low, uint32_t high, uint32_t at) {
    transpose_bits(low, high);
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
    const uint32_t first = odd ? other : low, second = odd ? high : other;
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(__byte_perm(first, second, 0x5140)),
                 "r"(__byte_perm(first, second, 0x7362))
                 : "memory");
  };
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    sums[p] = 0;
    if (!active) continue;
    const uint32_t largest = __reduce_max_sync(kAllLanes, s.largest[p][lane % kWarps]);
    const TokenFormat<kBytes> format(largest, highest);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float z[kOctet];
      z_of(p, r, z);
      uint32_t q[kOctet];
      // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        q[j] = __float_as_uint(__fadd_rn(__fmul_rn(z[j], format.factor), 12582912.0f)) - 0x4b400000u;
        if (format.zero) q[j] = 0;
        if (kBytes > 1) sums[p] += static_cast<int>(q[j]);
      }
      const auto store_byte = [&]<int kByte>() {
        const uint32_t low = gather_bytes<kByte>(q[0], q[1], q[2], q[3]);
        const uint32_t high = gather_bytes<kByte>(q[4], q[5], q[6], q[7]);
        if (kBytes == 1) {
          sums[p] = __dp4a(static_cast<int>(low), 0x01010101, __dp4a(static_cast<int>(high), 0x01010101, sums[p]));
        }
        store(low, high, planes[p] + to + planes_at<kRounds>(kByte, r, warp / 2));
      };
      store_byte.template operator()<0>();
      if constexpr (kBytes > 1) {
        store_byte.template operator()<1>();
        store_byte.template operator()<2>();
      }
    }
  }
  sync_threads();
}

// What remains of each product but the weights: the sum of the integers, by how much it is multiplied, and in_shift .
// n.
template <int kBytes, typename T, int kRounds, int kProducts>
__device__ __forceinline__ void add_up(const uint4 (&n)[kRounds], const Factors<kRounds> (&factors)[kProducts], int k,
                                       float highest, int (&sums)[kProducts], Scratch& s) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const bool active = has_columns(k);
  float shift[kProducts] = {};
  int sums_high[kProducts] = {};
  if (active) {
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      if (kBytes > 1) sums_high[p] = __reduce_add_sync(kAllLanes, sums[p] >> 16);
      sums[p] = __reduce_add_sync(kAllLanes, kBytes > 1 ? sums[p] & 0xffff : sums[p]);
      if (!factors[p].shifts) continue;
      float total[kOctet] = {};
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        // products of 16-bit numbers are exact in float32
        float values[kOctet], of_columns[kOctet];
        unpack<T>(n[r], values);
        unpack<T>(factors[p].shift[r], of_columns);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) total[j] = fmaf(values[j], of_columns[j], total[j]);
      }
#pragma unroll
      for (int distance = kOctet / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int j = 0; j < distance; ++j) total[j] += total[j + distance];
      }
      shift[p] = total[0];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
      for (int p = 0; p < kProducts; ++p) shift[p] += __shfl_xor_sync(kAllLanes, shift[p], distance);
    }
  }
  if (lane == 0) {
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      s.sum[p][warp] = sums[p];  // zero where a warp has no columns
      if (kBytes > 1) s.sum_high[p][warp] = sums_high[p];
      s.shift[p][warp] = shift[p];
    }
  }
  if (warp != kWarps - 1) return;  // the one with the least to do
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, s.largest[p][lane % kWarps]);
    if (lane == 0) s.act_scale[p] = TokenFormat<kBytes>(largest, highest).scale;
  }
}

// Multiplies tiles first, first + step, ... of `weights` by planes, into the partial sums of this warp's pair of
// chunks, `stride` rows to a result: one, or two of 24-bit integers, see combine_fixed_point().
template <int kBytes, int kRounds>
__device__ __forceinline__ void multiply(uint32_t weights, int k, int tiles, int first, int step, uint32_t planes,
                                         int* slots, int stride) {
  if (first >= tiles || !has_columns(k)) return;
  const int lane = thread_index() % 32, pair = thread_index() / 128, chunk = 2 * pair;
  const int g = lane / 4, t = lane % 4, pitch = k / 8;
  const int last_chunk = (k - 1) / kChunkColumns;
  // where rows start at the same bank, odd ones load the pair's other chunk first, which is in the other banks
  const int turned = g % 2 != 0 && pitch % 128 == 0 ? 1 : 0;
  constexpr bool kHeld = kRounds * kBytes <= 3;  // planes in registers for all tiles; else a warp has one tile
  constexpr int kHeldRounds = kHeld ? kRounds : 1;
  uint4 x[kHeldRounds][2][kBytes];
  const auto load_planes = [&](int r, uint4(&to)[2][kBytes]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kBytes; ++j) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[i][j].x), "=r"(to[i][j].y), "=r"(to[i][j].z), "=r"(to[i][j].w)
                     : "r"(planes + planes_at<kRounds>(j, r, chunk + i) + 16 * (lane ^ lane / 8 * 2))
                     : "memory");
      }
    }
  };
  if constexpr (kHeld) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) load_planes(r, x[r]);
  }
  const uint32_t at_lane = weights + g * pitch + 16 * t;
  for (int tile = first; tile < tiles; tile += step) {
    int c[2][kBytes][4] = {};
    const uint32_t at_tile = at_lane + tile * (kTileRows * pitch);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if constexpr (!kHeld) load_planes(r, x[0]);
      uint4 upper[2], lower[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // chunks past the end of a row have planes of zero, whatever weights those meet
        const uint32_t at = at_tile + 64 * min(chunk + (i ^ turned) + r * kKWarps, last_chunk);
        upper[i] = load_shared(at);
        lower[i] = load_shared(at + 8 * pitch);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto of_chunk = [&](const uint4(&loaded)[2]) {
          return make_uint4(turned ? loaded[1 - i].x : loaded[i].x, turned ? loaded[1 - i].y : loaded[i].y,
                            turned ? loaded[1 - i].z : loaded[i].z, turned ? loaded[1 - i].w : loaded[i].w);
        };
        const uint4 up = of_chunk(upper), low = of_chunk(lower);
#pragma unroll
        for (int j = 0; j < kBytes; ++j) {
          const uint4& of_byte = x[kHeld ? r : 0][i][j];
          multiply_b1_k256(c[i][j], {up.x, low.x, up.y, low.y}, of_byte.x, of_byte.y);
          multiply_b1_k256(c[i][j], {up.z, low.z, up.w, low.w}, of_byte.z, of_byte.w);
        }
      }
    }
    int sums[kBytes][4];
#pragma unroll
    for (int j = 0; j < kBytes; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = c[0][j][i] + c[1][j][i];
    }
    combine_groups<8 * kBytes, kBytes>(sums, g, t, [&](int result, int row, int value) {
      slots[(result * kPairs + pair) * stride + tile * kTileRows + row] = value;
    });
  }
}

// An output: of integers in the order that popcount_gemm prescribes.
template <int kBytes>
__device__ __forceinline__ float output_of(const int* slots, int stride, int row, const Scratch& s, int k, int p,
                                           const Place& place) {
  constexpr int kResults = kBytes == 1 ? 1 : 2;
  int counted[kResults] = {};
#pragma unroll
  for (int result = 0; result < kResults; ++result) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int of_pair = slots[(result * kPairs + pair) * stride + row];  // all loads at once, used or not
      counted[result] += pair * kPairColumns < k ? of_pair : 0;
    }
  }
  const int q_sum = sum_of_warps(s.sum[p]);
  const float shift = sum_of_warps(s.shift[p]), act_scale = s.act_scale[p];
  float y;
  if constexpr (kBytes == 1) {
    const float scale = place.scales ? __fmul_rn(act_scale, place.scale) : act_scale;
    y = __fmul_rn(scale, static_cast<float>(q_sum - 2 * counted[0]));
    if (place.shifts) y = __fadd_rn(y, __fmul_rn(__fmul_rn(act_scale, place.shift), static_cast<float>(q_sum)));
  } else {
    const int q_high = sum_of_warps(s.sum_high[p]);
    y = place.scale * scaled(act_scale, q_sum - 2 * counted[0], q_high - 2 * counted[1]);
    y += place.shift * scaled(act_scale, q_sum, q_high);
  }
  return __fadd_rn(__fadd_rn(y, shift), place.bias);
}

}  // namespace bitinfer::cuda
