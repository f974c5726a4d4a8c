// z[t, k] = in_scale[k] * x[t, k] as 24-bit integers times a power of two for each token, in 24 bit planes [M, 24, W].
//
// For the decoding sign_gemm of few tokens, which multiplies planes on binary tensor cores: scaling by a power of two
// is exact, so the only error is the last rounding, 2^-23 of the largest |z|. Mapping and bounds as in pack_row.cuh;
// the three bytes of the integers are transposed one after the other.
#include "pack_row.cuh"

namespace bitinfer::cuda {
namespace {

struct FixedPointFormat : FixedPoint {
  using Sum = int64_t;
  static constexpr bool kWide = true;
  static constexpr int kBytes = 3;

  __device__ bool takes_mean() const { return false; }
  __device__ bool has_blocks() const { return false; }
  __device__ int segment() const { return static_cast<int>(group_size); }
  __device__ Quantiser from_mean(double, int) const { return {}; }

  __device__ Quantiser from_largest(uint32_t largest) const {
    if (largest >= kInfinityBits) return {__uint_as_float(kNaNBits), 0, true};
    if (__uint_as_float(largest) < kSmallestAbsmax) return {0, 0, true};
    // 2^22 <= |z| / scale < 2^23; only a fraction of all ones would round to 2^23, and takes the next power
    const uint32_t exponent = (largest + 1) >> 23;
    return {__uint_as_float((exponent - 22) << 23), __uint_as_float((2 * 127 + 22 - exponent) << 23), false};
  }

  __device__ int store(int64_t row, int column, const float (&z)[kOctet], const Quantiser& quantiser) const {
    uint32_t q[kOctet];
    int sum = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const int rounded = quantiser.zero ? 0 : __float2int_rn(__fmul_rn(z[j], quantiser.factor));
      sum += rounded;  // 256 of them stay below 2^31
      q[j] = static_cast<uint32_t>(rounded);
    }
    const int words = static_cast<int>(words_per_row(k));
    uint32_t* target = planes + row * (8 * kBytes) * words;
    store_byte<0>(q, target, words, column);
    store_byte<1>(q, target, words, column);
    store_byte<2>(q, target, words, column);
    return sum;
  }

 private:
  template <int kByte>
  __device__ void store_byte(const uint32_t (&q)[kOctet], uint32_t* target, int words, int column) const {
    const uint32_t low = gather_bytes<kByte>(q[0], q[1], q[2], q[3]),
                   high = gather_bytes<kByte>(q[4], q[5], q[6], q[7]);
    store_planes(low, high, 8, target + static_cast<int64_t>(8 * kByte) * words, words, column);
  }
};

}  // namespace

cudaError_t pack_fixed_point(const FixedPoint& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  return with_dtype(problem.x.dtype, [&]<Dtype kDtype>() {
    const MatrixRows<kDtype> rows{problem.x.data, problem.stride};
    return launch_pack_row(rows, FixedPointFormat{problem}, m, on, plan);
  });
}

}  // namespace bitinfer::cuda
