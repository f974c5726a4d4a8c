// The integers of pack_activations: 8, 4 or 2 bits in two's complement, or the sign, exactly as bitinfer/ops.py says.
// No product may be fused with an addition.
#pragma once

#include "pack_row.cuh"

namespace bitinfer::cuda {

struct IntegerFormat : PackActivations {
  using Sum = int32_t;
  static constexpr bool kWide = false;

  __device__ bool takes_mean() const { return bits == 1; }
  __device__ bool has_blocks() const { return block_size != 0; }
  __device__ int segment() const { return static_cast<int>(segment_size(block_size, group_size)); }

  __device__ float highest() const { return static_cast<float>((1 << (bits - 1)) - 1); }

  // Of a row or block, from the bits of its largest magnitude: the scale, and the factor, zero if all integers are.
  __device__ float scale_from(uint32_t largest) const {
    const float absmax = __uint_as_float(largest);
    if (largest >= kInfinityBits) return __uint_as_float(kNaNBits);
    return absmax < kSmallestAbsmax ? 0 : __fdiv_rn(absmax, highest());
  }
  __device__ float factor_from(uint32_t largest) const {
    const float absmax = __uint_as_float(largest);
    return largest >= kInfinityBits || absmax < kSmallestAbsmax ? 0 : __fdiv_rn(highest(), absmax);
  }

  __device__ Quantiser from_largest(uint32_t largest) const {
    const float factor = factor_from(largest);
    return {scale_from(largest), factor, factor == 0};
  }

  __device__ Quantiser from_mean(double total, int count) const {
    const float mean = static_cast<float>(total / count);
    const bool bad = !(mean <= 3.402823466e+38f);
    return {bad ? __uint_as_float(kNaNBits) : mean, 0, bad};
  }

  __device__ int store(int64_t row, int column, const float (&z)[kOctet], const Quantiser& quantiser) const {
    uint32_t q[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
      q[j] = bits == 1 ? z[j] < 0 : __float_as_uint(__fadd_rn(__fmul_rn(z[j], quantiser.factor), 12582912.0f));
    }
    const uint32_t low = quantiser.zero ? 0 : gather_bytes<0>(q[0], q[1], q[2], q[3]);
    const uint32_t high = quantiser.zero ? 0 : gather_bytes<0>(q[4], q[5], q[6], q[7]);
    const int words = static_cast<int>(words_per_row(k));
    store_planes(low, high, static_cast<int>(bits), planes + row * bits * words, words, column);
    const int sum = __dp4a(static_cast<int>(low), 0x01010101, __dp4a(static_cast<int>(high), 0x01010101, 0));
    return bits == 1 ? min(max(static_cast<int>(k) - column, 0), kOctet) - 2 * sum : sum;
  }
};

}  // namespace bitinfer::cuda
