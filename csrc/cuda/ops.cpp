// The torch side of the CUDA ops: device and stream, scratch memory, and the launch of the kernel that select.h names.
#include <cstdlib>

#include "on_device.h"
#include "popcount_gemm_tiled.h"
#include "popcount_gemm_wgmma.h"
#include "sign_gemm_decode.h"
#include "sign_gemm_tiled.h"
#include "sign_gemm_wgmma.h"

namespace {

using namespace bitinfer;
using bitinfer::cuda::check;
using bitinfer::cuda::Device;
using bitinfer::cuda::device_of;
using bitinfer::cuda::Kernel;
using bitinfer::cuda::OnDevice;

std::string_view forced_kernel() {
  static const char* const name = std::getenv("BITINFER_CUDA_KERNEL");
  return name == nullptr ? std::string_view() : std::string_view(name);
}

// The kernel for a problem; an error if the forced one does not take it.
template <typename Problem>
Kernel kernel_for(const Call& call, const Problem& problem, const Device& device) {
  const auto kernel = cuda::select_kernel(problem, device, forced_kernel());
  STD_TORCH_CHECK(kernel, call.op, ": BITINFER_CUDA_KERNEL=", std::string(forced_kernel()),
                  " names no kernel that runs M=", problem.m, " N=", problem.weight.n, " K=", problem.weight.k,
                  " here; known are decode, wgmma, tiled and int8, and unset lets bitinfer choose");
  return *kernel;
}

Tensor pack_signs(Tensor weight) {
  const OnDevice on("pack_signs", weight);
  const PackSignsCall call(on.call, weight);
  check(on.call, cuda::pack_signs(call.problem, call.rows.m, on.launch));
  return call.words;
}

template <bool kSettled>
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_activations(Tensor x, OptionalTensor in_scale, OptionalTensor in_shift,
                                                            int64_t bits, int64_t block_size, int64_t group_size) {
  const OnDevice on("pack_activations", x, kSettled);
  const PackActivationsCall call(on.call, x, in_scale, in_shift, bits, block_size, group_size);
  check(on.call, cuda::pack_activations(call.problem, call.rows.m, on.launch));
  return call.results();
}

// What must look like x: [m, k] rows of its dtype.
Rows rows_like(const Call& call, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), call.op, ": ", name, " must have the dtype of the others");
  check_shape(call, name, tensor, sizes_of(x));
  return Rows(call, name, tensor);
}

template <bool kSettled>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_pack_activations(Tensor x, OptionalTensor residual,
                                                                             Tensor norm_weight, double eps,
                                                                             OptionalTensor in_scale,
                                                                             OptionalTensor in_shift, int64_t bits,
                                                                             int64_t block_size, int64_t group_size) {
  const OnDevice on("rms_norm_pack_activations", x, kSettled);
  const PackActivationsCall call(on.call, x, in_scale, in_shift, bits, block_size, group_size);
  const int64_t m = call.rows.m, k = call.rows.k;
  OptionalTensor weight = norm_weight;
  STD_TORCH_CHECK(norm_weight.scalar_type() == x.scalar_type(), on.call.op, ": norm_weight must have the dtype of x");
  cuda::RmsNormPack problem{.packed = call.problem, .x = call.rows.data, .stride = call.rows.stride};
  problem.weight = floats(on.call, "norm_weight", weight, {k});
  problem.eps = static_cast<float>(eps);
  std::optional<Rows> added;
  Tensor hidden = empty(on.call, residual ? sizes_of(x) : Sizes{0}, x.scalar_type());
  if (residual) {
    added.emplace(rows_like(on.call, "residual", *residual, x));
    problem.residual = added->data;
    problem.residual_stride = added->stride;
    problem.hidden = hidden.mutable_data_ptr();
    problem.hidden_stride = k;
  }
  check(on.call, cuda::rms_norm_pack_activations(problem, m, on.launch));
  return std::tuple_cat(call.results(), std::make_tuple(hidden));
}

template <bool kSettled>
std::tuple<Tensor, Tensor, Tensor, Tensor> silu_mul_pack_activations(Tensor gate, Tensor up, OptionalTensor in_scale,
                                                                     OptionalTensor in_shift, int64_t bits,
                                                                     int64_t block_size, int64_t group_size) {
  const OnDevice on("silu_mul_pack_activations", gate, kSettled);
  const PackActivationsCall call(on.call, gate, in_scale, in_shift, bits, block_size, group_size);
  const Rows factors = rows_like(on.call, "up", up, gate);
  const cuda::SiluMulPack problem{call.problem, call.rows.data, factors.data, call.rows.stride, factors.stride};
  check(on.call, cuda::silu_mul_pack_activations(problem, call.rows.m, on.launch));
  return call.results();
}

// z = in_scale * x in 24-bit fixed point, then the product on binary tensor cores.
void fixed_point_gemm(const OnDevice& on, const SignGemm& p, Kernel kernel) {
  const int64_t m = p.m, words = p.weight.words(), groups = p.weight.groups();
  Tensor planes = on.bytes(m * cuda::kFixedPointBits * words * 4), sums = on.bytes(m * groups * 8);
  Tensor scale = on.bytes(m * 4), shift = on.bytes(m * 4);
  cuda::FixedPoint pack{.x = p.x,
                        .k = p.weight.k,
                        .stride = p.stride,
                        .in_scale = p.in_scale,
                        .in_shift = p.in_shift,
                        .group_size = p.weight.group_size,
                        .planes = static_cast<uint32_t*>(planes.mutable_data_ptr()),
                        .scale = static_cast<float*>(scale.mutable_data_ptr()),
                        .sum = static_cast<int64_t*>(sums.mutable_data_ptr()),
                        .shift = static_cast<float*>(shift.mutable_data_ptr())};
  check(on.call, cuda::pack_fixed_point(pack, m, on.launch));
  cuda::FixedPointGemm gemm = cuda::as_fixed_point(p);
  gemm.planes = pack.planes;
  gemm.act_scale = pack.scale;
  gemm.act_sum = pack.sum;
  gemm.act_shift = p.in_shift ? pack.shift : nullptr;
  const Device& device = on.launch.device;
  check(on.call,
        kernel == Kernel::kDecode
            ? cuda::fixed_gemm_decode(gemm, cuda::fixed_gemm_decode_plan(gemm, device), on.launch)
            : cuda::fixed_gemm_decode_grouped(gemm, cuda::fixed_gemm_decode_grouped_plan(gemm, device), on.launch));
}

}  // namespace

namespace bitinfer::cuda {

Kernel kernel_for(const OnDevice& on, const PopcountGemm& problem) {
  return ::kernel_for(on.call, problem, on.launch.device);
}

Kernel kernel_for(const OnDevice& on, const SignGemm& problem) {
  return ::kernel_for(on.call, problem, on.launch.device);
}

void multiply(const OnDevice& on, const SignGemm& problem, std::optional<double> norm_eps) {
  with_norm(on, problem, norm_eps, [&](const SignGemm& p) {
    const Kernel kernel = kernel_for(on, p);
    if (kernel == Kernel::kDecode || kernel == Kernel::kGrouped) return fixed_point_gemm(on, p, kernel);
    const Device& device = on.launch.device;
    if (kernel == Kernel::kSignDecode) {
      return check(on.call, sign_gemm_decode(p, sign_gemm_decode_plan(p, device), on.launch));
    }
    const bool wgmma = kernel == Kernel::kWgmma;
    const size_t bytes = wgmma ? sign_gemm_wgmma_workspace(p) : sign_gemm_tiled_workspace(p);
    Tensor workspace = on.bytes(static_cast<int64_t>(bytes));
    check(on.call, wgmma ? sign_gemm_wgmma(p, workspace.mutable_data_ptr(), on.launch)
                         : sign_gemm_tiled(p, workspace.mutable_data_ptr(), on.launch));
  });
}

void multiply(const OnDevice& on, const PopcountGemm& problem, std::optional<double> norm_eps) {
  with_norm(on, problem, norm_eps, [&](const PopcountGemm& p) {
    const Device& device = on.launch.device;
    switch (kernel_for(on, p)) {
      case Kernel::kDecode:
        return check(on.call, popcount_gemm_decode(p, popcount_gemm_decode_plan(p, device), on.launch));
      case Kernel::kGrouped:
        return check(on.call, popcount_gemm_decode_grouped(p, popcount_gemm_decode_grouped_plan(p, device), on.launch));
      case Kernel::kWgmma:
        return check(on.call, popcount_gemm_wgmma(p, on.launch));
      case Kernel::kTiled:
        return check(on.call, popcount_gemm_tiled(p, on.launch));
      default:
        return check(on.call, popcount_gemm_int8(p, on.launch));
    }
  });
}

}  // namespace bitinfer::cuda

namespace {

template <bool kSettled>
Tensor sign_gemm(Tensor x, Tensor weight, int64_t in_features, OptionalTensor weight_scale, OptionalTensor in_scale,
                 OptionalTensor in_shift, OptionalTensor group_shift, OptionalTensor bias, int64_t group_size,
                 std::optional<double> norm_eps) {
  const OnDevice on("sign_gemm", x, kSettled);
  check_norm(on.call, norm_eps);
  const SignGemmCall call(on.call, x, weight, in_features, weight_scale, in_scale, in_shift, group_shift, bias,
                          group_size);
  if (call.problem.m == 0 || call.problem.weight.n == 0) return *call.y;
  cuda::multiply(on, call.problem, norm_eps);
  return *call.y;
}

template <bool kSettled>
Tensor popcount_gemm(Tensor planes, Tensor act_scale, Tensor act_sum, OptionalTensor act_shift, Tensor weight,
                     int64_t in_features, OptionalTensor weight_scale, OptionalTensor group_shift, OptionalTensor bias,
                     int64_t group_size, int64_t block_size, std::optional<double> norm_eps, ScalarType dtype) {
  const OnDevice on("popcount_gemm", planes, kSettled);
  check_norm(on.call, norm_eps);
  const PopcountGemmCall call(on.call, planes, act_scale, act_sum, act_shift, weight, in_features, weight_scale,
                              group_shift, bias, group_size, block_size, dtype);
  if (call.problem.m == 0 || call.problem.weight.n == 0) return *call.y;
  cuda::multiply(on, call.problem, norm_eps);
  return *call.y;
}

// Names the kernel that a problem of contiguous, aligned tensors would get on the current device; bits 0 for sign_gemm
// in float16.
std::string cuda_kernel(std::string op, int64_t m, int64_t n, int64_t k, int64_t bits, int64_t group_size,
                        int64_t planes) {
  const Call call{"cuda_kernel"};
  int index = 0;
  check(call, cudaGetDevice(&index));
  const Device& device = device_of(call, index);
  Weight weight;
  weight.planes = planes;
  weight.n = n;
  weight.k = k;
  weight.group_size = group_size;
  const Output y{nullptr, Dtype::kFloat16, n};
  if (op == "sign_gemm") {
    SignGemm problem{{nullptr, Dtype::kFloat16}, m, k};
    problem.weight = weight;
    problem.y = y;
    return cuda::kernel_name(kernel_for(call, problem, device));
  }
  STD_TORCH_CHECK(op == "popcount_gemm", "cuda_kernel: op must be sign_gemm or popcount_gemm, got ", op);
  PopcountGemm problem{};
  problem.m = m;
  problem.bits = bits;
  problem.weight = weight;
  problem.y = y;
  return cuda::kernel_name(kernel_for(call, problem, device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  m.def("cuda_kernel(str op, int m, int n, int k, int bits, int group_size, int planes) -> str");
  // The same as the ops without the suffix, where the caller knows that no kernel still under way on the stream writes
  // the weight, a scale, a shift, the bias or the norm's weight: these may be read before the kernel ahead has
  // finished.
  m.def(
      "pack_activations_settled(Tensor x, Tensor? in_scale, Tensor? in_shift, int bits, int block_size,"
      " int group_size) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_pack_activations_settled(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor? in_scale,"
      " Tensor? in_shift, int bits, int block_size, int group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "silu_mul_pack_activations_settled(Tensor gate, Tensor up, Tensor? in_scale, Tensor? in_shift, int bits,"
      " int block_size, int group_size) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sign_gemm_settled(Tensor x, Tensor weight, int in_features, Tensor? weight_scale, Tensor? in_scale,"
      " Tensor? in_shift, Tensor? group_shift, Tensor? bias, int group_size, float? norm_eps) -> Tensor");
  m.def(
      "popcount_gemm_settled(Tensor planes, Tensor act_scale, Tensor act_sum, Tensor? act_shift, Tensor weight,"
      " int in_features, Tensor? weight_scale, Tensor? group_shift, Tensor? bias, int group_size, int block_size,"
      " float? norm_eps, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CUDA, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("pack_activations", TORCH_BOX(&pack_activations<false>));
  m.impl("pack_activations_settled", TORCH_BOX(&pack_activations<true>));
  m.impl("rms_norm_pack_activations", TORCH_BOX(&rms_norm_pack_activations<false>));
  m.impl("rms_norm_pack_activations_settled", TORCH_BOX(&rms_norm_pack_activations<true>));
  m.impl("silu_mul_pack_activations", TORCH_BOX(&silu_mul_pack_activations<false>));
  m.impl("silu_mul_pack_activations_settled", TORCH_BOX(&silu_mul_pack_activations<true>));
  m.impl("sign_gemm", TORCH_BOX(&sign_gemm<false>));
  m.impl("popcount_gemm", TORCH_BOX(&popcount_gemm<false>));
  m.impl("sign_gemm_settled", TORCH_BOX(&sign_gemm<true>));
  m.impl("popcount_gemm_settled", TORCH_BOX(&popcount_gemm<true>));
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernel", TORCH_BOX(&cuda_kernel));
}
