// The torch side of the CPU ops: threads, and which table of kernels. The arithmetic is in kernels_<isa>.cpp.
#include "../checked_tensors.h"
#include "dispatch.h"
#include "run.h"

namespace {

using bitinfer::Call;
using bitinfer::OptionalTensor;
using bitinfer::ScalarType;
using bitinfer::Tensor;
using bitinfer::cpu::active_kernels;

void parallel_for(int64_t count, int64_t grain, const bitinfer::cpu::Body& body) {
  torch::stable::parallel_for(0, count, grain, [&body](int64_t begin, int64_t end) { body(begin, end); });
}

Tensor pack_signs(Tensor weight) {
  const bitinfer::PackSignsCall call(Call{"pack_signs"}, weight);
  bitinfer::cpu::pack_signs(active_kernels(), call.problem, call.rows.m, parallel_for);
  return call.words;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_activations(Tensor x, OptionalTensor in_scale, OptionalTensor in_shift,
                                                            int64_t bits, int64_t block_size, int64_t group_size) {
  const bitinfer::PackActivationsCall call(Call{"pack_activations"}, x, in_scale, in_shift, bits, block_size,
                                           group_size);
  bitinfer::cpu::pack_activations(active_kernels(), call.problem, call.rows.m, parallel_for);
  return call.results();
}

Tensor sign_gemm(Tensor x, Tensor weight, int64_t in_features, OptionalTensor weight_scale, OptionalTensor in_scale,
                 OptionalTensor in_shift, OptionalTensor group_shift, OptionalTensor bias, int64_t group_size,
                 std::optional<double> norm_eps) {
  check_norm(Call{"sign_gemm"}, norm_eps);
  const bitinfer::SignGemmCall call(Call{"sign_gemm"}, x, weight, in_features, weight_scale, in_scale, in_shift,
                                    group_shift, bias, group_size);
  bitinfer::cpu::sign_gemm(active_kernels(), call.problem, norm_eps, parallel_for);
  return *call.y;
}

Tensor popcount_gemm(Tensor planes, Tensor act_scale, Tensor act_sum, OptionalTensor act_shift, Tensor weight,
                     int64_t in_features, OptionalTensor weight_scale, OptionalTensor group_shift, OptionalTensor bias,
                     int64_t group_size, int64_t block_size, std::optional<double> norm_eps, ScalarType dtype) {
  check_norm(Call{"popcount_gemm"}, norm_eps);
  const bitinfer::PopcountGemmCall call(Call{"popcount_gemm"}, planes, act_scale, act_sum, act_shift, weight,
                                        in_features, weight_scale, group_shift, bias, group_size, block_size, dtype);
  bitinfer::cpu::popcount_gemm(active_kernels(), call.problem, norm_eps, parallel_for);
  return *call.y;
}

std::string cpu_isa() { return bitinfer::cpu::active_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("pack_activations", TORCH_BOX(&pack_activations));
  m.impl("sign_gemm", TORCH_BOX(&sign_gemm));
  m.impl("popcount_gemm", TORCH_BOX(&popcount_gemm));
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
