// Eight consecutive columns of a row: what one thread loads, 16 or 32 bytes, from any alignment.
#pragma once

#include "common.cuh"

namespace bitinfer::cuda {

constexpr int kOctet = 8;    // columns of a lane
constexpr int kChunk = 256;  // columns of a warp, which make eight words of each bit plane

// As they come from memory, so that many loads can be under way before the first is converted.
struct Octet {
  uint32_t words[kOctet];  // 16-bit types fill the first half
};

// Row `row` of a matrix of one type.
__device__ __forceinline__ Floats row_of(const void* matrix, Dtype dtype, int64_t row, int64_t stride) {
  return {static_cast<const unsigned char*>(matrix) + row * stride * (dtype == Dtype::kFloat32 ? 4 : 2), dtype};
}

// Volatile, so that they stay on their side of the wait for the kernel ahead.
__device__ __forceinline__ uint4 load_quad(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Columns past k are zeros. kWeights: the row is a constant and may stay in L1; else it comes from L2.
template <bool kWeights>
__device__ __forceinline__ Octet load_octet(const Floats& row, int column, int k) {
  const auto load = [](const auto* address) { return kWeights ? __ldg(address) : __ldcg(address); };
  const bool wide = row.dtype == Dtype::kFloat32;
  const auto* begin = static_cast<const unsigned char*>(row.data) + static_cast<int64_t>(column) * (wide ? 4 : 2);
  Octet octet;
  if (column + kOctet <= k && reinterpret_cast<uintptr_t>(begin) % 16 == 0) {
    const auto* quads = reinterpret_cast<const uint4*>(begin);
    const uint4 first = load(quads), second = wide ? load(quads + 1) : uint4{};
    octet = {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
  } else if (wide) {
    const auto* elements = reinterpret_cast<const unsigned*>(begin);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) octet.words[j] = column + j < k ? load(elements + j) : 0;
  } else {
    const auto* elements = reinterpret_cast<const unsigned short*>(begin);
#pragma unroll
    for (int j = 0; j < kOctet / 2; ++j) {
      const uint32_t low = column + 2 * j < k ? load(elements + 2 * j) : 0;
      const uint32_t high = column + 2 * j + 1 < k ? load(elements + 2 * j + 1) : 0;
      octet.words[j] = low | high << 16;
      octet.words[kOctet / 2 + j] = 0;
    }
  }
  return octet;
}

// The two numbers of 16 bits in a word; the last argument only names their type.
__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second, __half) {
  const float2 values = __half22float2(reinterpret_cast<const __half2&>(pair));
  first = values.x;
  second = values.y;
}

__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second, __nv_bfloat16) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

// The eight in four words.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[kOctet]) {
  unpack(raw.x, values[0], values[1], T{});
  unpack(raw.y, values[2], values[3], T{});
  unpack(raw.z, values[4], values[5], T{});
  unpack(raw.w, values[6], values[7], T{});
}

// Eight numbers rounded to a 16-bit type, and as they are in memory.
__device__ __forceinline__ uint4 round_octet(float (&values)[kOctet], __half) {
  uint32_t words[kOctet / 2];
#pragma unroll
  for (int j = 0; j < kOctet / 2; ++j) {
    const __half2 pair = __floats2half2_rn(values[2 * j], values[2 * j + 1]);
    words[j] = reinterpret_cast<const uint32_t&>(pair);
    unpack(words[j], values[2 * j], values[2 * j + 1], __half{});
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint4 round_octet(float (&values)[kOctet], __nv_bfloat16) {
  uint32_t words[kOctet / 2];
#pragma unroll
  for (int j = 0; j < kOctet / 2; ++j) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * j], values[2 * j + 1]);
    words[j] = reinterpret_cast<const uint32_t&>(pair);
    unpack(words[j], values[2 * j], values[2 * j + 1], __nv_bfloat16{});
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The larger of each of two pairs of numbers of 16 bits, the second's by magnitude; NaN if one is.
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

// The bits, as a float's, of the largest magnitude in some octets; they order as it does, and those of NaN are larger.
template <typename T, int kOctets>
__device__ __forceinline__ uint32_t largest_magnitude(const uint4 (&raw)[kOctets]) {
  uint32_t of_octet[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    of_octet[i] = max_magnitudes(max_magnitudes(0, raw[i].x, T{}), raw[i].y, T{});
    of_octet[i] = max_magnitudes(max_magnitudes(of_octet[i], raw[i].z, T{}), raw[i].w, T{});
  }
#pragma unroll
  for (int i = 1; i < kOctets; ++i) of_octet[0] = max_magnitudes(of_octet[0], of_octet[i], T{});
  float first, second;
  unpack(of_octet[0], first, second, T{});
  return max(__float_as_uint(first), __float_as_uint(second));
}

__device__ __forceinline__ void to_floats(const Octet& octet, Dtype dtype, float (&values)[kOctet]) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = __uint_as_float(octet.words[j]);
  } else if (dtype == Dtype::kFloat16) {
#pragma unroll
    for (int j = 0; j < kOctet / 2; ++j) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(octet.words[j]));
      values[2 * j] = pair.x;
      values[2 * j + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOctet / 2; ++j) {
      values[2 * j] = __uint_as_float(octet.words[j] << 16);
      values[2 * j + 1] = __uint_as_float(octet.words[j] & 0xffff0000u);
    }
  }
}

// The nearest number of that type.
__device__ __forceinline__ float round_to(Dtype dtype, float value) {
  if (dtype == Dtype::kFloat16) return to_float(from_float<__half>(value));
  if (dtype == Dtype::kBFloat16) return to_float(from_float<__nv_bfloat16>(value));
  return value;
}

__device__ __forceinline__ void store_octet(void* row, Dtype dtype, int column, int k, const float (&values)[kOctet]) {
  const bool wide = dtype == Dtype::kFloat32;
  auto* begin = static_cast<unsigned char*>(row) + static_cast<int64_t>(column) * (wide ? 4 : 2);
  uint32_t words[kOctet];
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const uint32_t bits = dtype == Dtype::kFloat32   ? __float_as_uint(values[j])
                          : dtype == Dtype::kFloat16 ? __half_as_ushort(__float2half_rn(values[j]))
                                                     : __bfloat16_as_ushort(__float2bfloat16_rn(values[j]));
    if (wide) {
      words[j] = bits;
    } else {
      words[j / 2] = j % 2 ? words[j / 2] | bits << 16 : bits;
    }
  }
  if (column + kOctet <= k && reinterpret_cast<uintptr_t>(begin) % 16 == 0) {
    auto* quads = reinterpret_cast<uint4*>(begin);
    quads[0] = {words[0], words[1], words[2], words[3]};
    if (wide) quads[1] = {words[4], words[5], words[6], words[7]};
    return;
  }
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (column + j >= k) break;
    if (wide) {
      reinterpret_cast<uint32_t*>(begin)[j] = words[j];
    } else {
      reinterpret_cast<unsigned short*>(begin)[j] = static_cast<unsigned short>(words[j / 2] >> (j % 2 * 16));
    }
  }
}

}  // namespace bitinfer::cuda
