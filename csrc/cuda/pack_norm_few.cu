// rms_norm_packs: RMSNorm(x + residual) * weight in bit planes, for one to three projections with column factors of
// their own (q, k and v of FBI-LLM and OneBit), inside a chain of dependent kernels:
//
//   n[t] = RMSNorm(x[t] + residual[t]) * weight;  planes_i[t], scale_i[t], sum_i[t], shift_i[t] of n[t], i < count
//
// Shapes: x [M, K] float16 or bfloat16 in aligned rows, K % 128 == 0 up to 8,192, 8, 4 or 2 bits, one scale a token, a
// few tokens. More of them the op norms first and packs from memory (rms_norm_comes_first); all else goes through the
// kernel of pack_fused.cu, a launch a projection. No block waits for another, as in pack_activations_few.cu: each norms
// a whole row, 16 columns a thread, and then makes the planes of a half of it (8 columns a thread), or the sum of q and
// the scale, or in_shift . n.
// Bounds: latency, as there, and that of one more sum over the block. The blocks of the first projection write x +
// residual, each its half, and not over x or the residual, which other blocks may still have to read.
#include "decoder_rows.h"
#include "integer_format.cuh"
#include "pack_activations.h"
#include "pack_halves.h"

namespace bitinfer::cuda {
namespace {

constexpr int kOctets = 2;                    // that a thread reads; the first one is its own
constexpr int kSpan = 32 * kOctets * kOctet;  // columns of a warp
constexpr int kMaxWarps = static_cast<int>(kMaxRowColumns) / kSpan, kQuads = kMaxWarps / 4;
constexpr int kParts = kOctets + 2;  // blocks of a row: its planes, the sum of q, and the last for in_shift . n

struct Arguments {
  RmsNorm norm;
  IntegerFormat of[kMaxPacks];
};

// The grid is (parts, projections, tokens).
template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) norm_pack_kernel(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) float squares_of[kMaxWarps];
  __shared__ __align__(16) uint32_t largest_of[kMaxWarps];
  __shared__ __align__(16) int sum_of[kMaxWarps];
  __shared__ double shift_of[kMaxWarps];
  const RmsNorm& norm = a.norm;
  const IntegerFormat& p = a.of[blockIdx.y];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, part = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.z;
  const int k = static_cast<int>(norm.k), words = k / 32, bits = static_cast<int>(p.bits);
  const bool makes_planes = part < kOctets;
  allow_next_kernel();

  // ---- constants
  const auto column_of = [&](int i) { return ((part + i) % kOctets * static_cast<int>(blockDim.x) + thread) * kOctet; };
  const auto load_constants = [&](const Floats& constants, int i) {
    const int column = column_of(i);
    return constants && column < k ? load_quad(static_cast<const T*>(constants.data) + column) : make_uint4(0, 0, 0, 0);
  };
  const Floats& factors_of_columns = part == kParts - 1 ? p.in_shift : p.in_scale;
  uint4 weight[kOctets], constants[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    weight[i] = load_constants(norm.weight, i);
    constants[i] = load_constants(factors_of_columns, i);
  }
  if (thread < kMaxWarps) {
    squares_of[thread] = 0;
    largest_of[thread] = 0;
    sum_of[thread] = 0;
  }
  __syncthreads();
  wait_for_previous_kernel();

  // ---- the norm; columns past the last are zeros all along
  const auto load = [&](const Floats& rows, int64_t stride, int i) {
    const int column = column_of(i);
    return column < k ? __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(rows.data) + row * stride + column))
                      : make_uint4(0, 0, 0, 0);
  };
  uint4 raw[kOctets], added[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    raw[i] = load(norm.x, norm.stride, i);
    if (norm.residual) added[i] = load(norm.residual, norm.residual_stride, i);
  }
  // a sum an octet: blocks have these in another order, and must find the same total
  float z[kOctets][kOctet], squares_of_octet[kOctets] = {};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    unpack<T>(raw[i], z[i]);
    if (norm.residual) {
      float others[kOctet];
      unpack<T>(added[i], others);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) z[i][j] = __fadd_rn(z[i][j], others[j]);
      raw[i] = round_octet(z[i], T{});
    }
#pragma unroll
    for (float value : z[i]) squares_of_octet[i] += value * value;
  }
  static_assert(kOctets == 2);
  float squares = warp_sum(squares_of_octet[0] + squares_of_octet[1]);
  if (lane == 0) squares_of[warp] = squares;
  const int column = column_of(0);
  if (norm.residual && makes_planes && blockIdx.y == 0 && column < k) {
    *reinterpret_cast<uint4*>(static_cast<T*>(norm.hidden) + row * k + column) = raw[0];
  }
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const float4 four = reinterpret_cast<const float4*>(squares_of)[i];
    squares += (four.x + four.y) + (four.z + four.w);
  }
  const float norm_factor = rsqrtf(squares / static_cast<float>(k) + norm.eps);
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    float factors[kOctet];
    unpack<T>(weight[i], factors);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) z[i][j] = __fmul_rn(z[i][j], norm_factor);
    round_octet(z[i], T{});
#pragma unroll
    for (int j = 0; j < kOctet; ++j) z[i][j] = __fmul_rn(z[i][j], factors[j]);
    round_octet(z[i], T{});
  }

  // ---- in_shift . n: products of 16-bit numbers are exact in float32, and so nearly are sums of a few
  if (part == kParts - 1) {
    float total[kOctet] = {};
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float factors[kOctet];
      unpack<T>(constants[i], factors);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) total[j] = fmaf(z[i][j], factors[j], total[j]);
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
    if (p.in_shift) p.shift[row] = static_cast<float>(shift);
    return;
  }

  // ---- the integers
  float maximum = 0;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    float factors[kOctet];
    unpack<T>(constants[i], factors);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (p.in_scale) z[i][j] = __fmul_rn(z[i][j], factors[j]);
      maximum = max_magnitude(maximum, z[i][j]);
    }
  }
  uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(maximum));
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(largest_of)[i];
    largest = max(max(max(largest, four.x), max(four.y, four.z)), four.w);
  }
  const bool zero = largest >= kInfinityBits || __uint_as_float(largest) < kSmallestAbsmax;
  const float factor = __fdiv_rn(p.highest(), __uint_as_float(largest));
  // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
  const auto quantise = [&](float value) { return __float_as_uint(__fadd_rn(__fmul_rn(value, factor), 12582912.0f)); };

  if (makes_planes) {
    uint32_t q[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) q[j] = quantise(z[0][j]);
    const uint32_t low = gather_bytes<0>(q[0], q[1], q[2], q[3]), high = gather_bytes<0>(q[4], q[5], q[6], q[7]);
    store_planes(zero ? 0 : low, zero ? 0 : high, bits, p.planes + row * bits * words, words, column);
    return;
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
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

// Blocks of one multiprocessor that are under way together, or soon after one another: more tokens take less time when
// each is read once.
constexpr int64_t kBlocksOfMultiprocessor = 8;

// Whether the kernel takes the rows, be they few or many.
bool are_halves(const RmsNormPacks& p) {
  const RmsNorm& norm = p.norm;
  const bool aligned = !norm.residual || takes_rows(norm.residual.data, norm.residual_stride, norm.x.dtype, norm.k);
  bool fits = aligned && norm.k <= kMaxRowColumns && reinterpret_cast<uintptr_t>(norm.weight.data) % 16 == 0;
  for (int i = 0; i < p.count; ++i) {
    PackActivations packed = p.packed[i];
    packed.x = norm.x;
    packed.stride = norm.stride;
    fits = fits && is_halves(packed);
  }
  return fits;
}

bool are_few(const RmsNormPacks& p, int64_t m, const Device& device) {
  return m * kParts * p.count <= kBlocksOfMultiprocessor * device.multiprocessors;
}

// One launch a projection; the first adds the residual.
cudaError_t one_by_one(const RmsNormPacks& p, int64_t m, const Launch& on) {
  const RmsNorm& norm = p.norm;
  RmsNormPack problem{};
  problem.x = norm.x;
  problem.stride = norm.stride;
  problem.residual = norm.residual;
  problem.residual_stride = norm.residual_stride;
  problem.hidden = norm.hidden;
  problem.hidden_stride = norm.k;
  problem.weight = norm.weight;
  problem.eps = norm.eps;
  for (int i = 0; i < p.count; ++i) {
    problem.packed = p.packed[i];
    const cudaError_t error = rms_norm_pack_activations(problem, m, on);
    if (error != cudaSuccess) return error;
    if (problem.residual) {
      problem.x.data = norm.hidden;
      problem.stride = norm.k;
      problem.residual = {};
    }
  }
  return cudaSuccess;
}

}  // namespace

bool rms_norm_comes_first(const RmsNormPacks& p, int64_t m, const Device& device) {
  return are_halves(p) && !are_few(p, m, device);
}

cudaError_t rms_norm_packs(const RmsNormPacks& p, int64_t m, const Launch& on) {
  if (m == 0 || p.count == 0) return cudaSuccess;
  if (!are_halves(p) || !are_few(p, m, on.device)) return one_by_one(p, m, on);
  Arguments a{.norm = p.norm, .of = {}};
  bool shifts = false;
  for (int i = 0; i < p.count; ++i) {
    a.of[i] = IntegerFormat{p.packed[i]};
    shifts = shifts || p.packed[i].in_shift;
  }
  const auto parts = static_cast<unsigned>(shifts ? kParts : kParts - 1);
  const dim3 grid(parts, static_cast<unsigned>(p.count), static_cast<unsigned>(m));
  const dim3 block(static_cast<unsigned>((p.norm.k + kSpan - 1) / kSpan * 32));
  return p.norm.x.dtype == Dtype::kFloat16 ? launch(norm_pack_kernel<__half>, on, grid, block, 0, true, a)
                                           : launch(norm_pack_kernel<__nv_bfloat16>, on, grid, block, 0, true, a);
}

}  // namespace bitinfer::cuda
