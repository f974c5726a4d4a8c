// The ops that bitinfer/models/cuda_layer.py makes a decoder layer of, for one token of a few sequences.
//
// All are launched in the shadow of the kernel ahead of them: no kernel still under way on the stream may write
// weights, scales, shifts, biases or norm weights.
#include <span>
#include <vector>

#include "choose_greedy.h"
#include "decoder_rows.h"
#include "on_device.h"
#include "sign_gemm_decode.h"

namespace {

using namespace bitinfer;
using bitinfer::cuda::check;
using bitinfer::cuda::Kernel;
using bitinfer::cuda::OnDevice;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// Each list must have one entry a product, up to three.
template <typename... Lists>
void check_counts(const Call& call, size_t count, const Lists&... lists) {
  STD_TORCH_CHECK(count >= 1 && count <= cuda::kMaxProducts, call.op, ": expected 1 to ", cuda::kMaxProducts,
                  " weights, got ", count);
  STD_TORCH_CHECK(((lists.size() == count) && ...), call.op, ": all lists must have one entry a weight, ", count);
}

// x [m, k] and a residual like it, with the weight of the norm behind their sum.
struct NormCall {
  Rows rows;
  std::optional<Rows> added;
  OptionalTensor weight;
  Tensor hidden;
  cuda::RmsNorm problem;

  NormCall(const Call& call, const Tensor& x, const OptionalTensor& residual, const Tensor& norm_weight, double eps)
      : rows(call, "x", x), weight(norm_weight), hidden(empty(call, {0}, x.scalar_type())) {
    STD_TORCH_CHECK(x.dim() == 2, call.op, ": x must be [M, K], got ", to_string(sizes_of(x)));
    STD_TORCH_CHECK(norm_weight.scalar_type() == x.scalar_type(), call.op, ": norm_weight must have the dtype of x");
    problem.x = rows.data;
    problem.stride = rows.stride;
    problem.weight = floats(call, "norm_weight", weight, {rows.k});
    problem.eps = static_cast<float>(eps);
    problem.k = rows.k;
    if (residual) {
      added.emplace(matrix(call, "residual", *residual, rows.m, rows.k, x.scalar_type()));
      problem.residual = added->data;
      problem.residual_stride = added->stride;
      hidden = empty(call, {rows.m, rows.k}, x.scalar_type());
      problem.hidden = hidden.mutable_data_ptr();
    }
  }
};

std::tuple<Tensor, Tensor> rms_norm(Tensor x, OptionalTensor residual, Tensor norm_weight, double eps) {
  const OnDevice on("rms_norm", x);
  const NormCall call(on.call, x, residual, norm_weight, eps);
  const cuda::RmsNorm& p = call.problem;
  const bool taken = p.k <= cuda::kMaxRowColumns && cuda::takes_rows(p.x.data, p.stride, p.x.dtype, p.k) &&
                     (!p.residual || cuda::takes_rows(p.residual.data, p.residual_stride, p.x.dtype, p.k));
  STD_TORCH_CHECK(taken, on.call.op, ": x must be float16 or bfloat16 in aligned rows of at most ",
                  cuda::kMaxRowColumns, " columns, a multiple of 8");
  Tensor y = empty(on.call, sizes_of(x), x.scalar_type());
  check(on.call, cuda::rms_norm(p, y.mutable_data_ptr(), call.rows.m, on.launch));
  return {y, call.hidden};
}

Tensor silu_mul(Tensor gate, Tensor up) {
  const OnDevice on("silu_mul", gate);
  const Rows gates(on.call, "gate", gate);
  STD_TORCH_CHECK(gate.dim() == 2, on.call.op, ": gate must be [M, K], got ", to_string(sizes_of(gate)));
  const Rows ups = matrix(on.call, "up", up, gates.m, gates.k, gate.scalar_type());
  const cuda::SiluMul problem{gates.data, ups.data, gates.stride, ups.stride, gates.k};
  STD_TORCH_CHECK(cuda::takes_rows(gates.data.data, gates.stride, gates.data.dtype, gates.k) &&
                      cuda::takes_rows(ups.data.data, ups.stride, ups.data.dtype, ups.k) && gates.m <= 65535,
                  on.call.op, ": gate and up must be float16 or bfloat16 in aligned rows of a multiple of 8 columns");
  Tensor y = empty(on.call, sizes_of(gate), gate.scalar_type());
  check(on.call, cuda::silu_mul(problem, y.mutable_data_ptr(), gates.m, on.launch));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_packs(Tensor x, OptionalTensor residual, Tensor norm_weight,
                                                                  double eps, OptionalTensors in_scale,
                                                                  OptionalTensors in_shift, int64_t bits,
                                                                  int64_t block_size, int64_t group_size) {
  const OnDevice on("rms_norm_packs", x);
  const NormCall call(on.call, x, residual, norm_weight, eps);
  const int64_t m = call.rows.m, k = call.rows.k, words = words_per_row(k),
                count = static_cast<int64_t>(in_scale.size());
  check_counts(on.call, in_scale.size(), in_shift);
  check_bits(on.call, bits);
  check_sizes(on.call, block_size, group_size);
  STD_TORCH_CHECK(k <= kMaxIntegerColumns && m <= 65535, on.call.op, ": x has ", m, " rows of ", k,
                  " columns, but at most 65535 of ", kMaxIntegerColumns, " go in one call");
  const int64_t blocks = group_count(k, block_size), segments = group_count(k, segment_size(block_size, group_size));
  bool shifts = false;
  for (const OptionalTensor& tensor : in_shift) shifts = shifts || tensor.has_value();
  Tensor planes = empty(on.call, {count, m, bits, words}, ScalarType::UInt32);
  Tensor scale = empty(on.call, {count, m, blocks}, ScalarType::Float);
  Tensor sum = empty(on.call, {count, m, segments}, ScalarType::Int);
  Tensor shift = empty(on.call, {count, m, shifts ? 1 : 0}, ScalarType::Float);
  cuda::RmsNormPacks problem{.norm = call.problem, .packed = {}, .count = static_cast<int>(count)};
  for (int64_t i = 0; i < count; ++i) {
    PackActivations& packed = problem.packed[i];
    packed.k = k;
    packed.in_scale = columns(on.call, "in_scale", in_scale[i], k);
    packed.in_shift = columns(on.call, "in_shift", in_shift[i], k);
    packed.bits = bits;
    packed.block_size = block_size;
    packed.group_size = group_size;
    packed.planes = static_cast<uint32_t*>(planes.mutable_data_ptr()) + i * m * bits * words;
    packed.scale = static_cast<float*>(scale.mutable_data_ptr()) + i * m * blocks;
    packed.sum = static_cast<int32_t*>(sum.mutable_data_ptr()) + i * m * segments;
    packed.shift = static_cast<float*>(shift.mutable_data_ptr()) + i * m;
  }
  if (cuda::rms_norm_comes_first(problem, m, on.launch.device)) {
    Tensor normed = empty(on.call, {m, k}, x.scalar_type());
    check(on.call, cuda::rms_norm(problem.norm, normed.mutable_data_ptr(), m, on.launch));
    for (int i = 0; i < problem.count; ++i) {
      problem.packed[i].x = {normed.const_data_ptr(), problem.norm.x.dtype};
      problem.packed[i].stride = k;
      check(on.call, cuda::pack_activations(problem.packed[i], m, on.launch));
    }
  } else {
    check(on.call, cuda::rms_norm_packs(problem, m, on.launch));
  }
  return {planes, scale, sum, shift, call.hidden};
}

// Runs products: in one launch where all are the decode kernel's, else one by one. With a LayerNorm behind them their
// outputs wait in float32.
template <Kernel kDecode, typename Problem, typename Plan, typename Run>
void multiply_several(const OnDevice& on, std::vector<Problem> problems, std::optional<double> norm_eps, Plan plan_for,
                      Run run) {
  Tensors sums;
  std::vector<LayerNorm> norms;
  bool together = problems.size() > 1;
  for (const Problem& p : problems) {
    if (p.m == 0 || p.weight.n == 0) together = false;
    together = together && cuda::kernel_for(on, p) == kDecode;
  }
  const cuda::DecodePlan plan = together ? plan_for(problems) : cuda::DecodePlan{};
  if (!plan) {
    for (const Problem& p : problems) {
      if (p.m > 0 && p.weight.n > 0) cuda::multiply(on, p, norm_eps);
    }
    return;
  }
  if (norm_eps) {
    for (Problem& p : problems) {
      const int64_t n = p.weight.n;
      Tensor& sum = sums.emplace_back(empty(on.call, {p.m, n}, ScalarType::Float));
      norms.push_back({static_cast<const float*>(sum.const_data_ptr()), n, *norm_eps, p.weight.bias, p.y});
      p.y = {sum.mutable_data_ptr(), Dtype::kFloat32, n};
      p.weight.bias = {};
    }
  }
  check(on.call, run(problems, plan));
  for (const LayerNorm& norm : norms) check(on.call, cuda::layer_norm(norm, problems[0].m, on.launch));
}

template <typename Calls>
Tensors outputs_of(const Calls& calls) {
  Tensors outputs;
  for (const auto& call : calls) outputs.push_back(*call.y);
  return outputs;
}

Tensors popcount_gemm_several(Tensors planes, Tensors act_scale, Tensors act_sum, OptionalTensors act_shift,
                              Tensors weight, int64_t in_features, OptionalTensors weight_scale,
                              OptionalTensors group_shift, OptionalTensors bias, int64_t group_size, int64_t block_size,
                              std::optional<double> norm_eps, ScalarType dtype) {
  STD_TORCH_CHECK(!planes.empty(), "popcount_gemm_several: expected 1 to ", cuda::kMaxProducts, " weights, got 0");
  const OnDevice on("popcount_gemm_several", planes[0]);
  check_counts(on.call, weight.size(), planes, act_scale, act_sum, act_shift, weight_scale, group_shift, bias);
  std::vector<PopcountGemmCall> calls;
  std::vector<PopcountGemm> problems;
  for (size_t i = 0; i < weight.size(); ++i) {
    calls.emplace_back(on.call, planes[i], act_scale[i], act_sum[i], act_shift[i], weight[i], in_features,
                       weight_scale[i], group_shift[i], bias[i], group_size, block_size, dtype);
    problems.push_back(calls.back().problem);
  }
  multiply_several<Kernel::kDecode>(
      on, problems, norm_eps,
      [&](std::span<const PopcountGemm> p) { return cuda::popcount_gemm_decode_plan(p, on.launch.device); },
      [&](std::span<const PopcountGemm> p, const cuda::DecodePlan& plan) {
        return cuda::popcount_gemm_decode(p, plan, on.launch);
      });
  return outputs_of(calls);
}

Tensors sign_gemm_several(Tensor x, Tensors weight, int64_t in_features, OptionalTensors weight_scale,
                          OptionalTensors in_scale, OptionalTensors in_shift, OptionalTensors group_shift,
                          OptionalTensors bias, int64_t group_size, std::optional<double> norm_eps) {
  const OnDevice on("sign_gemm_several", x);
  check_counts(on.call, weight.size(), weight_scale, in_scale, in_shift, group_shift, bias);
  std::vector<SignGemmCall> calls;
  std::vector<SignGemm> problems;
  for (size_t i = 0; i < weight.size(); ++i) {
    calls.emplace_back(on.call, x, weight[i], in_features, weight_scale[i], in_scale[i], in_shift[i], group_shift[i],
                       bias[i], group_size);
    problems.push_back(calls.back().problem);
  }
  multiply_several<Kernel::kSignDecode>(
      on, problems, norm_eps,
      [&](std::span<const SignGemm> p) { return cuda::sign_gemm_decode_plan(p, on.launch.device); },
      [&](std::span<const SignGemm> p, const cuda::DecodePlan& plan) {
        return cuda::sign_gemm_decode(p, plan, on.launch);
      });
  return outputs_of(calls);
}

void choose_greedy(Tensor logits, double penalty, OptionalTensor seen, Tensor finished, OptionalTensor ends, Tensor pad,
                   Tensor tokens, OptionalTensor slot) {
  const OnDevice on("choose_greedy", logits);
  const Call& call = on.call;
  const Rows rows(call, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2 && rows.k > 0 && rows.k <= INT32_MAX && penalty > 0, call.op,
                  ": expected logits [M, V] and a penalty above 0, got ", to_string(sizes_of(logits)), " and ",
                  penalty);
  for (const auto& [name, tensor, type] : {std::tuple{"finished", &finished, ScalarType::Bool},
                                           {"pad", &pad, ScalarType::Long},
                                           {"tokens", &tokens, ScalarType::Long}}) {
    call.check_device(name, *tensor);
    STD_TORCH_CHECK(
        tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == (tensor == &pad ? 1 : rows.m),
        call.op, ": ", name, " must be contiguous, of its dtype, and have an entry a sequence");
  }
  cuda::ChooseGreedy p;
  p.logits = rows.data;
  p.m = rows.m;
  p.n = rows.k;
  p.stride = rows.stride;
  p.penalty = static_cast<float>(penalty);
  if (seen) {
    check_dtype(call, "seen", *seen, ScalarType::Bool, "torch.bool");
    check_shape(call, "seen", *seen, {rows.m, rows.k});
    STD_TORCH_CHECK(seen->is_contiguous(), call.op, ": seen must be contiguous");
    p.seen = static_cast<bool*>(seen->mutable_data_ptr());
  }
  if (ends) {
    check_dtype(call, "ends", *ends, ScalarType::Long, "torch.int64");
    STD_TORCH_CHECK(ends->is_contiguous(), call.op, ": ends must be contiguous");
    p.ends = static_cast<const int64_t*>(ends->const_data_ptr());
    p.end_count = ends->numel();
  }
  if (slot) {
    check_dtype(call, "slot", *slot, ScalarType::Long, "torch.int64");
    STD_TORCH_CHECK(slot->numel() == 1, call.op, ": slot must be one number");
    p.slot = static_cast<int64_t*>(slot->mutable_data_ptr());
  }
  p.finished = static_cast<bool*>(finished.mutable_data_ptr());
  p.pad = static_cast<const int64_t*>(pad.const_data_ptr());
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  check(call, cuda::choose_greedy(p, on.launch));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  // RMSNorm(x + residual) * norm_weight, and x + residual (empty without a residual)
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor norm_weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  // What rms_norm_pack_activations returns, once for each pair of in_scale and in_shift, stacked.
  m.def(
      "rms_norm_packs(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor?[] in_scale,"
      " Tensor?[] in_shift, int bits, int block_size, int group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "popcount_gemm_several(Tensor[] planes, Tensor[] act_scale, Tensor[] act_sum, Tensor?[] act_shift,"
      " Tensor[] weight, int in_features, Tensor?[] weight_scale, Tensor?[] group_shift, Tensor?[] bias,"
      " int group_size, int block_size, float? norm_eps, ScalarType dtype) -> Tensor[]");
  m.def(
      "sign_gemm_several(Tensor x, Tensor[] weight, int in_features, Tensor?[] weight_scale, Tensor?[] in_scale,"
      " Tensor?[] in_shift, Tensor?[] group_shift, Tensor?[] bias, int group_size, float? norm_eps) -> Tensor[]");
  // The likeliest tokens, or `pad` where a sequence has finished; advances slot, and marks ends and what was seen.
  m.def(
      "choose_greedy(Tensor logits, float penalty, Tensor(a!)? seen, Tensor(b!) finished, Tensor? ends, Tensor pad,"
      " Tensor(c!) tokens, Tensor(d!)? slot) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("rms_norm_packs", TORCH_BOX(&rms_norm_packs));
  m.impl("popcount_gemm_several", TORCH_BOX(&popcount_gemm_several));
  m.impl("sign_gemm_several", TORCH_BOX(&sign_gemm_several));
  m.impl("choose_greedy", TORCH_BOX(&choose_greedy));
}
