// pack_activations for a few tokens of 16-bit activations with one scale a token, inside a chain of dependent kernels:
//
//   z[t, k] = in_scale[k] * x[t, k];  q = rint(z * h / max |z|);  planes[t, b, w] = bit b of q[t, 32*w ... 32*w + 31]
//
// Shapes: x [M, K] float16 or bfloat16 in aligned rows, in_scale and in_shift alike, K % 128 == 0 up to 16,384, 8, 4 or
// 2 bits, M as long as the blocks fit the multiprocessors. No block waits for another: four blocks of a row each read
// all of it for max |z|, 32 columns a thread, and make the planes of a quarter, 8 columns a thread. A fifth block makes
// the sum of q and the scale, a sixth in_shift . x, which are as long as making planes.
// Bounds: latency. From the end of the kernel ahead to ours about 0.5 us, 0.35 us for the row from L2, then dependent
// instructions, which are kept few: one warp a scheduler, one barrier, all that is known before in registers.
#include "integer_format.cuh"
#include "pack_halves.h"

namespace bitinfer::cuda {
namespace {

constexpr int kOctets = 4;                    // that a thread reads; the first one is its own
constexpr int kSpan = 32 * kOctets * kOctet;  // columns of a warp
constexpr int kMaxWarps = static_cast<int>(kMaxHalvesColumns) / kSpan, kQuad = 4;
constexpr int kSumPart = kOctets, kShiftPart = kOctets + 1;

// Has the compiler make these numbers here: it would make them where they are used, after the wait for the kernel
// ahead.
template <typename... T>
__device__ __forceinline__ void compute_now(T... values) {
  if (((reinterpret_cast<uintptr_t>(values)) ^ ...) == ~uintptr_t{0}) __trap();  // which they never are
}

// kQuads: of warps, that a block may have.
template <typename T, bool kScaled, int kQuads>
__global__ void __launch_bounds__(32 * kQuad * kQuads, 1)
    pack_few_kernel(const IntegerFormat p, const T* x, int64_t stride) {
  __shared__ __align__(16) uint32_t largest_of[kQuad * kQuads];
  __shared__ __align__(16) int sum_of[kQuad * kQuads];
  __shared__ double shift_of[kQuad * kQuads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, part = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.y;
  const int k = static_cast<int>(p.k), words = k / 32, bits = static_cast<int>(p.bits);
  const int quarter = static_cast<int>(blockDim.x) * kOctet;
  allow_next_kernel();
  const auto column_of = [&](int i) { return (part + i) % kOctets * quarter + thread * kOctet; };
  float factors[kScaled ? kOctets : 1][kOctet];
  if constexpr (kScaled) {
    const Floats& constants = part == kShiftPart ? p.in_shift : p.in_scale;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int column = column_of(i);
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (constants && column < k) {
        raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(constants.data) + column));
      }
      unpack<T>(raw, factors[i]);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) factors[i][j] = constants ? factors[i][j] : 1;
    }
  }
  if (thread < kQuad * kQuads) {
    largest_of[thread] = 0;
    sum_of[thread] = 0;
  }
  // where columns would lie past the last one, the first ones do no harm
  const T* from[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    from[i] = x + row * stride + (column_of(i) < k ? column_of(i) : 0);
  }
  const int word = column_of(0) / 32, plane = lane % 4;
  uint32_t* const lower = p.planes + (row * bits + plane) * words + word;
  uint32_t* const upper = lower + int64_t{4} * words;
  const float highest = p.highest();
  compute_now(from[0], from[1], from[2], from[3], lower, upper);
  __syncthreads();
  wait_for_previous_kernel();

  uint4 raw[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) raw[i] = __ldcg(reinterpret_cast<const uint4*>(from[i]));
  float z[kOctets][kOctet];
  uint32_t largest;
  if constexpr (kScaled) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) unpack<T>(raw[i], z[i]);
    if (part == kShiftPart) {
      // Products of 16-bit numbers are exact in float32. The first sums are made there, since conversions to double
      // are slow: six roundings at most.
      float total[kOctet] = {};
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) total[j] = fmaf(z[i][j], factors[i][j], total[j]);
      }
#pragma unroll
      for (int distance = kOctet / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int j = 0; j < distance; ++j) total[j] += total[j + distance];
      }
      double shift = warp_sum(static_cast<double>(total[0]));
      if (lane == 0) shift_of[warp] = shift;
      __syncthreads();
      if (thread > 0) return;
      for (int i = 1; i < warps; ++i) shift += shift_of[i];
      p.shift[row] = static_cast<float>(shift);
      return;
    }
    float maximum[kOctets] = {};
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        z[i][j] = __fmul_rn(z[i][j], factors[i][j]);
        maximum[i] = max_magnitude(maximum[i], z[i][j]);
      }
    }
    largest =
        __float_as_uint(max_magnitude(max_magnitude(maximum[0], maximum[1]), max_magnitude(maximum[2], maximum[3])));
  } else {
    largest = largest_magnitude<T>(raw);
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  uint4 of_quad[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) of_quad[i] = reinterpret_cast<const uint4*>(largest_of)[i];
#pragma unroll
  for (const uint4& v : of_quad) largest = max(max(max(largest, v.x), max(v.y, v.z)), v.w);
  const bool zero = largest >= kInfinityBits || __uint_as_float(largest) < kSmallestAbsmax;
  const float factor = __fdiv_rn(highest, __uint_as_float(largest));
  // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
  const auto quantise = [&](float value) { return __float_as_uint(__fadd_rn(__fmul_rn(value, factor), 12582912.0f)); };

  if (part != kSumPart) {
    if constexpr (!kScaled) unpack<T>(raw[0], z[0]);
    uint32_t q[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) q[j] = quantise(z[0][j]);
    uint32_t low = gather_bytes<0>(q[0], q[1], q[2], q[3]), high = gather_bytes<0>(q[4], q[5], q[6], q[7]);
    transpose_bits(low, high);
    low = transpose_bytes(low);
    high = transpose_bytes(high);
    if (word < words && plane < bits) *lower = zero ? 0 : low;
    if (word < words && bits == 8) *upper = zero ? 0 : high;
    return;
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if constexpr (!kScaled) unpack<T>(raw[i], z[i]);
    uint32_t of_octet = 0u - kOctet * __float_as_uint(12582912.0f);
#pragma unroll
    for (float value : z[i]) of_octet += quantise(value);
    sum += column_of(i) < k ? of_octet : 0;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane == 0) sum_of[warp] = static_cast<int>(sum);
  __syncthreads();
  if (thread == 0) {
    int total = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int4 four = reinterpret_cast<const int4*>(sum_of)[i];
      total += (four.x + four.y) + (four.z + four.w);
    }
    p.sum[row] = zero ? 0 : total;
  }
  if (thread == static_cast<int>(blockDim.x) - 1) p.scale[row] = p.scale_from(largest);
}

template <typename T>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  const auto warps = static_cast<unsigned>((p.k + kSpan - 1) / kSpan);
  const dim3 grid(p.in_shift ? kOctets + 2 : kOctets + 1, static_cast<unsigned>(m));
  const auto go = [&](auto kernel) {
    return launch(kernel, on, grid, dim3(32 * warps), 0, true, IntegerFormat{p}, static_cast<const T*>(p.x.data),
                  p.stride);
  };
  if (warps <= kQuad) {
    return p.in_scale || p.in_shift ? go(pack_few_kernel<T, true, 1>) : go(pack_few_kernel<T, false, 1>);
  }
  constexpr int kQuads = kMaxWarps / kQuad;
  return p.in_scale || p.in_shift ? go(pack_few_kernel<T, true, kQuads>) : go(pack_few_kernel<T, false, kQuads>);
}

}  // namespace

cudaError_t pack_activations_few(const PackActivations& p, int64_t m, const Launch& on) {
  return p.x.dtype == Dtype::kFloat16 ? run<__half>(p, m, on) : run<__nv_bfloat16>(p, m, on);
}

}  // namespace bitinfer::cuda
