// RMSNorm(x + residual) * weight, and silu(gate) * up, for floating point activations:
//
//   hidden = x + residual;  y = hidden / sqrt(mean(hidden^2) + eps) * weight        x, residual [M, K]
//   y = silu(gate) * up                                                             gate, up [M, K]
//
// with the roundings of transformers' LlamaRMSNorm and LlamaMLP, 16-bit types, K % 8 == 0 up to 8,192 for the norm.
// Mapping: a thread has eight columns; a block a row of the norm, or 2,048 columns of the product. Bounds: the latency
// of a chain of dependent kernels at a few tokens, memory at many.
#include "decoder_rows.h"
#include "octet.cuh"
#include "reduce.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kMaxWarps = static_cast<int>(kMaxRowColumns) / kChunk;
constexpr int kProductThreads = 256;

template <Dtype kDtype>
__global__ void __launch_bounds__(32 * kMaxWarps) rms_norm_kernel(const __grid_constant__ RmsNorm p, void* y) {
  __shared__ float squares_of[kMaxWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int column = static_cast<int>(threadIdx.x) * kOctet, k = static_cast<int>(p.k);
  const int64_t row = blockIdx.x;
  allow_next_kernel();
  float weight[kOctet], values[kOctet];
  to_floats(load_octet<true>(p.weight, column, k), kDtype, weight);
  squares_of[lane] = 0;  // of warps that there are not
  __syncthreads();
  wait_for_previous_kernel();

  const Octet x = load_octet<false>(row_of(p.x.data, kDtype, row, p.stride), column, k);
  to_floats(x, kDtype, values);
  if (p.residual) {
    float added[kOctet];
    to_floats(load_octet<false>(row_of(p.residual.data, kDtype, row, p.residual_stride), column, k), kDtype, added);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = round_to(kDtype, __fadd_rn(values[j], added[j]));
    store_octet(static_cast<unsigned char*>(p.hidden) + row * p.k * element_size(kDtype), kDtype, column, k, values);
  }
  float squares = 0;
#pragma unroll
  for (float value : values) squares += value * value;
  squares = warp_sum(squares);
  if (lane == 0) squares_of[warp] = squares;
  __syncthreads();
  const float factor = rsqrtf(warp_sum(squares_of[lane]) / static_cast<float>(k) + p.eps);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    values[j] = __fmul_rn(round_to(kDtype, __fmul_rn(values[j], factor)), weight[j]);
  }
  store_octet(static_cast<unsigned char*>(y) + row * p.k * element_size(kDtype), kDtype, column, k, values);
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kProductThreads) silu_mul_kernel(const __grid_constant__ SiluMul p, void* y) {
  const int column = static_cast<int>(blockIdx.x * kProductThreads + threadIdx.x) * kOctet, k = static_cast<int>(p.k);
  const int64_t row = blockIdx.y;
  allow_next_kernel();
  wait_for_previous_kernel();
  const Octet gates = load_octet<false>(row_of(p.gate.data, kDtype, row, p.gate_stride), column, k);
  const Octet ups = load_octet<false>(row_of(p.up.data, kDtype, row, p.up_stride), column, k);
  float gate[kOctet], up[kOctet];
  to_floats(gates, kDtype, gate);
  to_floats(ups, kDtype, up);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    gate[j] = __fmul_rn(round_to(kDtype, gate[j] / (1.0f + expf(-gate[j]))), up[j]);
  }
  store_octet(static_cast<unsigned char*>(y) + row * p.k * element_size(kDtype), kDtype, column, k, gate);
}

}  // namespace

bool takes_rows(const void* data, int64_t stride, Dtype dtype, int64_t k) {
  return dtype != Dtype::kFloat32 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kOctet == 0 && k > 0 &&
         k % kOctet == 0;
}

cudaError_t rms_norm(const RmsNorm& p, void* y, int64_t m, const Launch& on) {
  if (m == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(m)), block(static_cast<unsigned>((p.k + kChunk - 1) / kChunk * 32));
  return p.x.dtype == Dtype::kFloat16 ? launch(rms_norm_kernel<Dtype::kFloat16>, on, grid, block, 0, true, p, y)
                                      : launch(rms_norm_kernel<Dtype::kBFloat16>, on, grid, block, 0, true, p, y);
}

cudaError_t silu_mul(const SiluMul& p, void* y, int64_t m, const Launch& on) {
  if (m == 0) return cudaSuccess;
  constexpr int64_t kColumns = kProductThreads * kOctet;
  const dim3 grid(static_cast<unsigned>((p.k + kColumns - 1) / kColumns), static_cast<unsigned>(m));
  return p.gate.dtype == Dtype::kFloat16
             ? launch(silu_mul_kernel<Dtype::kFloat16>, on, grid, dim3(kProductThreads), 0, true, p, y)
             : launch(silu_mul_kernel<Dtype::kBFloat16>, on, grid, dim3(kProductThreads), 0, true, p, y);
}

}  // namespace bitinfer::cuda
