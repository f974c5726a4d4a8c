// A key or value of one head and slot as the cache holds it: kDim numbers of 16 bits, or rounded to 8 or 4 bits.
//
// Rounded, 32 columns share a scale, as in llama.cpp's q8_0 and q4_0: code = rint(x / scale) + offset, scale the
// largest magnitude over 127 or 7, in float16. A row is codes of all columns, then the scales, and 8 bytes' padding;
// with 4 bits columns 2i and 2i + 1 of an octet are nibbles i and i + 4 of its word.
#pragma once

#include "cache_row.h"
#include "octet.cuh"
#include "reduce.cuh"

namespace bitinfer::cuda {

constexpr int kScaleColumns = 32, kScaleLanes = kScaleColumns / kOctet;

// What a lane has of a row: eight columns.
template <int kBits, int kDim>
struct CacheOctet {
  static constexpr int kCodeBytes = kDim * kBits / 8;
  uint32_t words[kBits / 4];
  unsigned short scale_bits;

  __device__ __forceinline__ void clear() {
    for (uint32_t& word : words) word = 0;
    scale_bits = 0;
  }
  __device__ __forceinline__ void load(const unsigned char* row, int column) {
    const unsigned char* const codes = row + column * kBits / 8;
    if constexpr (kBits == 8) {
      asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(codes));
    } else {
      asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(words[0]) : "l"(codes));
    }
    const unsigned char* const scales = row + kCodeBytes + column / kScaleColumns * 2;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(scale_bits) : "l"(scales));
  }
  __device__ __forceinline__ void load_shared(uint32_t row, int column) {
    const uint32_t codes = row + column * kBits / 8;
    if constexpr (kBits == 8) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(codes));
    } else {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(codes));
    }
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale_bits) : "r"(row + kCodeBytes + column / kScaleColumns * 2));
  }
  __device__ __forceinline__ float scale() const { return __half2float(__ushort_as_half(scale_bits)); }

  // The integers, as floats. A code in the low bits of 0x6400 is the half of 1,024 more.
  template <typename T>
  __device__ __forceinline__ void unpack(float (&values)[kOctet]) const {
    const __half2 offset = __float2half2_rn(1024.0f + (1 << (kBits - 1)));
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      const uint32_t pair = kBits == 8 ? __byte_perm(words[i / 2], 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342)
                                       : (words[0] >> (4 * i) & 0x000f000fu) | 0x64006400u;
      const float2 two = __half22float2(__hsub2(reinterpret_cast<const __half2&>(pair), offset));
      values[2 * i] = two.x;
      values[2 * i + 1] = two.y;
    }
  }
};

template <int kDim>
struct CacheOctet<16, kDim> {
  uint4 raw;

  __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void load(const unsigned char* row, int column) { raw = load_quad(row + 2 * column); }
  __device__ __forceinline__ void load_shared(uint32_t row, int column) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "r"(row + 2 * column));
  }
  __device__ __forceinline__ float scale() const { return 1; }
  template <typename T>
  __device__ __forceinline__ void unpack(float (&values)[kOctet]) const {
    cuda::unpack<T>(raw, values);
  }
};

// The scale of columns whose largest magnitude is given, and what numbers are multiplied by.
template <int kBits>
struct CacheScale {
  static constexpr float kLargest = (1 << (kBits - 1)) - 1;
  __half scale;
  float factor;

  __device__ __forceinline__ explicit CacheScale(float largest) {
    scale = __float2half_rn(fminf(largest / kLargest, 65504.0f));
    factor = __half2float(scale) == 0 ? 0 : 1.0f / __half2float(scale);
  }
  __device__ __forceinline__ uint32_t code(float x) const {
    return static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(x * factor, -kLargest), kLargest)) + (1 << (kBits - 1)));
  }
};

// Stores eight columns, by lanes of which four and four neighbours in `lanes` share a scale and are all here.
template <int kBits, int kDim>
__device__ __forceinline__ void store_cache_octet(unsigned char* row, int column, const float (&x)[kOctet],
                                                  unsigned lanes) {
  float largest = 0;
#pragma unroll
  for (float value : x) largest = fmaxf(largest, fabsf(value));
#pragma unroll
  for (int distance = 1; distance < kScaleLanes; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, distance));
  }
  const CacheScale<kBits> scale(largest);
  uint32_t words[kBits / 4] = {};
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const int place = kBits == 8 ? 8 * (j % 4) : 4 * (j / 2) + 16 * (j % 2);
    words[kBits == 8 ? j / 4 : 0] |= scale.code(x[j]) << place;
  }
#pragma unroll
  for (int i = 0; i < kBits / 4; ++i) reinterpret_cast<uint32_t*>(row + column * kBits / 8)[i] = words[i];
  if (column % kScaleColumns == 0) {
    *reinterpret_cast<__half*>(row + kDim * kBits / 8 + column / kScaleColumns * 2) = scale.scale;
  }
}

// Stores a row of which the lanes of a warp have columns l, l + 32, ...
template <int kBits, int kDim>
__device__ __forceinline__ void store_cache_row(unsigned char* row, const float (&x)[kDim / 32], int lane) {
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(fabsf(x[i])));
    const CacheScale<kBits> scale(__uint_as_float(largest));
    const uint32_t code = scale.code(x[i]);
    if constexpr (kBits == 8) {
      row[32 * i + lane] = static_cast<unsigned char>(code);
    } else {
      const int j = lane % kOctet;
      uint32_t word = code << (4 * (j / 2) + 16 * (j % 2));
#pragma unroll
      for (int distance = 1; distance < kOctet; distance *= 2) word |= __shfl_xor_sync(kAllLanes, word, distance);
      if (j == 0) reinterpret_cast<uint32_t*>(row)[4 * i + lane / kOctet] = word;
    }
    if (lane == 0) reinterpret_cast<__half*>(row + kDim * kBits / 8)[i] = scale.scale;
  }
}

}  // namespace bitinfer::cuda
