// pack_activations of what a decoder computes just before it, in one kernel:
//
//   RMSNorm(x + residual) * weight, and x + residual itself     x, residual [M, K]
//   silu(gate) * up                                             gate, up [M, K]
//
// with the roundings of transformers' LlamaRMSNorm and LlamaMLP. One token is what they are for; mapping and bounds as
// in pack_row.cuh, with one more reduction over the team for the norm.
#include "integer_format.cuh"

namespace bitinfer::cuda {
namespace {

template <Dtype kDtype>
struct RmsNormRows {
  static constexpr bool kNormalises = true, kWide = true;
  using Weights = Octet;
  struct Raw {
    Octet x, residual;
  };

  const void *x, *residual, *weight;
  int64_t stride, residual_stride;
  void* hidden;
  int64_t hidden_stride;
  float eps;

  __device__ Weights weights(int column, int k) const { return load_octet<true>(Floats{weight, kDtype}, column, k); }
  __device__ Raw fetch(int64_t row, int column, int k) const {
    Raw raw = {};
    raw.x = load_octet<false>(row_of(x, kDtype, row, stride), column, k);
    if (residual) raw.residual = load_octet<false>(row_of(residual, kDtype, row, residual_stride), column, k);
    return raw;
  }
  __device__ void values(const Raw& raw, float (&values)[kOctet]) const {
    to_floats(raw.x, kDtype, values);
    if (!residual) return;
    float added[kOctet];
    to_floats(raw.residual, kDtype, added);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = round_to(kDtype, __fadd_rn(values[j], added[j]));
  }
  __device__ void keep(int64_t row, int column, int k, const float (&values)[kOctet]) const {
    if (residual == nullptr) return;
    auto* target = static_cast<std::byte*>(hidden) + row * hidden_stride * element_size(kDtype);
    store_octet(target, kDtype, column, k, values);
  }
  __device__ void normalise(const Weights& weights, float factor, float (&values)[kOctet]) const {
    float scale[kOctet];
    to_floats(weights, kDtype, scale);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      values[j] = round_to(kDtype, __fmul_rn(round_to(kDtype, __fmul_rn(values[j], factor)), scale[j]));
    }
  }
};

template <Dtype kDtype>
struct SiluMulRows {
  static constexpr bool kNormalises = false, kWide = true;
  struct Weights {};
  struct Raw {
    Octet gate, up;
  };

  const void *gate, *up;
  int64_t gate_stride, up_stride;

  __device__ Weights weights(int, int) const { return {}; }
  __device__ Raw fetch(int64_t row, int column, int k) const {
    return {load_octet<false>(row_of(gate, kDtype, row, gate_stride), column, k),
            load_octet<false>(row_of(up, kDtype, row, up_stride), column, k)};
  }
  __device__ void values(const Raw& raw, float (&values)[kOctet]) const {
    float factors[kOctet];
    to_floats(raw.gate, kDtype, values);
    to_floats(raw.up, kDtype, factors);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const float silu = round_to(kDtype, values[j] / (1.0f + expf(-values[j])));
      values[j] = round_to(kDtype, __fmul_rn(silu, factors[j]));
    }
  }
};

}  // namespace

cudaError_t rms_norm_pack_activations(const RmsNormPack& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  return with_dtype(problem.x.dtype, [&]<Dtype kDtype>() {
    const RmsNormRows<kDtype> rows{
        problem.x.data,          problem.residual.data, problem.weight.data,   problem.stride,
        problem.residual_stride, problem.hidden,        problem.hidden_stride, problem.eps};
    return launch_pack_row(rows, IntegerFormat{problem.packed}, m, on, plan);
  });
}

cudaError_t silu_mul_pack_activations(const SiluMulPack& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  return with_dtype(problem.gate.dtype, [&]<Dtype kDtype>() {
    const SiluMulRows<kDtype> rows{problem.gate.data, problem.up.data, problem.gate_stride, problem.up_stride};
    return launch_pack_row(rows, IntegerFormat{problem.packed}, m, on, plan);
  });
}

}  // namespace bitinfer::cuda
