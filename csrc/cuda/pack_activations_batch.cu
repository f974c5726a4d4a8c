// pack_activations for batches of 16-bit activations with one scale a token:
//
//   z[t, k] = in_scale[k] * x[t, k];  q = rint(z * h / max |z|);  planes[t, b, w] = bit b of q[t, 32*w ... 32*w + 31]
//
// Shapes: x [M, K] float16 or bfloat16 in aligned rows, in_scale and in_shift alike, M from a few dozen tokens on, K %
// 128 == 0 up to 16,384, 8, 4 or 2 bits. A block makes one row and holds it in registers as it came, 16 bits a column:
// a thread eight octets, so that about 14 rows of 4,096 columns are under way on a multiprocessor, which hides the way
// from memory to the row's maximum and back. Four neighbouring lanes read the four octets of a word, in four successive
// words: after the transpositions of pack_row.cuh a lane holds four words of one plane, which it stores at once.
// Bounds: about 9 instructions a column (13 with in_scale); conversions to double for in_shift, 16 a cycle.
#include "integer_format.cuh"
#include "pack_activations_batch.h"

namespace bitinfer::cuda {
namespace {

constexpr int kWords = 4;               // that a lane makes of a plane: 4 * 32 columns of its quad
constexpr int kSpan = 8 * kWords * 32;  // columns of a warp: 1,024
constexpr int kSpans = 2;               // spans that a thread holds
constexpr int kMaxWarps = 8;

constexpr int warps_for(int64_t k) { return static_cast<int>((k + kSpans * kSpan - 1) / (kSpans * kSpan)); }

__device__ __forceinline__ uint32_t max_magnitudes(uint32_t largest, uint32_t pair, __half) {
  const __half2 magnitudes = __habs2(reinterpret_cast<const __half2&>(pair));
  const __half2 result = __hmax2_nan(reinterpret_cast<const __half2&>(largest), magnitudes);
  return reinterpret_cast<const uint32_t&>(result);
}

__device__ __forceinline__ uint32_t max_magnitudes(uint32_t largest, uint32_t pair, __nv_bfloat16) {
  const __nv_bfloat162 magnitudes = __habs2(reinterpret_cast<const __nv_bfloat162&>(pair));
  const __nv_bfloat162 result = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(largest), magnitudes);
  return reinterpret_cast<const uint32_t&>(result);
}

// Column constants, from L1 where other rows have brought them. Volatile: loaded where they stand, or all of them would
// be at once, in registers that other rows' loads need.
__device__ __forceinline__ uint4 load_constants(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

template <typename T, int kBits, bool kScaled>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    pack_batch_kernel(const IntegerFormat p, const T* x, int64_t stride) {
  __shared__ uint32_t largest_of[kMaxWarps];
  __shared__ int sum_of_warp[kMaxWarps];
  __shared__ double shift_of[kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, quad = lane / 4, place = lane % 4;
  const int k = static_cast<int>(p.k), words = k / 32;
  const int64_t row = blockIdx.x;
  const auto column_of = [&](int span, int i) {
    return (warp + span * warps) * kSpan + (quad * kWords + i) * 32 + place * kOctet;
  };
  allow_next_kernel();
  wait_for_previous_kernel();

  uint4 raw[kSpans][kWords];
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int column = column_of(span, i);
      raw[span][i] =
          column < k ? __ldcg(reinterpret_cast<const uint4*>(x + row * stride + column)) : make_uint4(0, 0, 0, 0);
    }
  }
  const T* in_scale = static_cast<const T*>(p.in_scale.data);
  const T* in_shift = static_cast<const T*>(p.in_shift.data);
  const auto load_z = [&](int span, int i, float (&z)[kOctet]) {
    unpack<T>(raw[span][i], z);
    if constexpr (kScaled) {
      const int column = column_of(span, i);
      if (column < k) {
        float scale[kOctet];
        unpack<T>(load_constants(in_scale + column), scale);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], scale[j]);
      }
    }
  };

  // ---- the scale
  uint32_t largest;  // the bits of the largest magnitude, which order as it does; those of NaN are larger still
  if constexpr (kScaled) {
    float maximum = 0;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float z[kOctet];
        load_z(span, i, z);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) maximum = max_magnitude(maximum, z[j]);
      }
    }
    largest = __float_as_uint(maximum);
  } else {
    uint32_t pair = 0;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4& v = raw[span][i];
        pair = max_magnitudes(max_magnitudes(pair, v.x, T{}), v.y, T{});
        pair = max_magnitudes(max_magnitudes(pair, v.z, T{}), v.w, T{});
      }
    }
    float first, second;
    unpack(pair, first, second, T{});
    largest = max(__float_as_uint(first), __float_as_uint(second));
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) largest_of[warp] = largest;
  double shift = 0;
  if (p.in_shift) {
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int column = column_of(span, i);
        if (column >= k) continue;
        float values[kOctet], factors[kOctet];
        unpack<T>(raw[span][i], values);
        unpack<T>(load_constants(in_shift + column), factors);
        // products of 16-bit numbers are exact in float32: one slow conversion instead of two
#pragma unroll
        for (int j = 0; j < kOctet; ++j) shift += static_cast<double>(__fmul_rn(values[j], factors[j]));
      }
    }
    shift = warp_sum(shift);
    if (lane == 0) shift_of[warp] = shift;
  }
  __syncthreads();
  for (int i = 0; i < warps; ++i) largest = max(largest, largest_of[i]);
  const Quantiser quantiser = p.from_largest(largest);
  if constexpr (kScaled) {
    // makes z anew: kept since the first time, it would take the registers that other rows' loads need
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (uint4& v : raw[span]) asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
    }
    asm volatile("" : "+l"(in_scale));
  }

  // ---- the integers and their planes
  int sum = 0;
  uint32_t* const planes = p.planes + (row * kBits + place) * words;
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
    uint32_t lower[kWords], upper[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float z[kOctet];
      load_z(span, i, z);
      uint32_t q[kOctet];
      // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        q[j] = __float_as_uint(__fadd_rn(__fmul_rn(z[j], quantiser.factor), 12582912.0f));
      }
      uint32_t low = quantiser.zero ? 0 : gather_bytes<0>(q[0], q[1], q[2], q[3]);
      uint32_t high = quantiser.zero ? 0 : gather_bytes<0>(q[4], q[5], q[6], q[7]);
      sum = __dp4a(static_cast<int>(low), 0x01010101, __dp4a(static_cast<int>(high), 0x01010101, sum));
      transpose_bits(low, high);
      lower[i] = transpose_bytes(low);
      if constexpr (kBits == 8) upper[i] = transpose_bytes(high);
    }
    const int word = column_of(span, 0) / 32;
    if (word < words && place < kBits) {
      *reinterpret_cast<uint4*>(planes + word) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
      if constexpr (kBits == 8) {
        *reinterpret_cast<uint4*>(planes + int64_t{4} * words + word) =
            make_uint4(upper[0], upper[1], upper[2], upper[3]);
      }
    }
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane == 0) sum_of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < warps; ++i) {
      sum += sum_of_warp[i];
      if (p.in_shift) shift += shift_of[i];
    }
    p.scale[row] = quantiser.scale;
    p.sum[row] = sum;
    if (p.in_shift) p.shift[row] = static_cast<float>(shift);
  }
}

template <typename T, int kBits>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  const auto go = [&](auto kernel) {
    return launch(kernel, on, dim3(static_cast<unsigned>(m)), dim3(32 * warps_for(p.k)), 0, true, IntegerFormat{p},
                  static_cast<const T*>(p.x.data), p.stride);
  };
  return p.in_scale ? go(pack_batch_kernel<T, kBits, true>) : go(pack_batch_kernel<T, kBits, false>);
}

template <typename T>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  return p.bits == 8 ? run<T, 8>(p, m, on) : p.bits == 4 ? run<T, 4>(p, m, on) : run<T, 2>(p, m, on);
}

}  // namespace

bool pack_activations_batch_takes(const PackActivations& p, int64_t m) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 && p.stride % 8 == 0;
  const auto fits = [&](const Floats& columns) {
    return !columns || (columns.dtype == p.x.dtype && reinterpret_cast<uintptr_t>(columns.data) % 16 == 0);
  };
  return m >= 48 && p.x.dtype != Dtype::kFloat32 && aligned && p.k > 0 && p.k % 128 == 0 &&
         warps_for(p.k) <= kMaxWarps && p.bits > 1 && segment_size(p.block_size, p.group_size) == 0 &&
         fits(p.in_scale) && fits(p.in_shift);
}

cudaError_t pack_activations_batch(const PackActivations& p, int64_t m, const Launch& on) {
  return p.x.dtype == Dtype::kFloat16 ? run<__half>(p, m, on) : run<__nv_bfloat16>(p, m, on);
}

}  // namespace bitinfer::cuda
