// The torch side of the CPU ops: checks for memory safety, allocation, threads. The arithmetic is in kernels_<isa>.cpp.
//
// bitinfer/checks.py has checked the same arguments with the same care for words; the checks here stand alone, because
// torch.ops.bitinfer_native can be called by anyone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "run.h"

namespace {

using bitinfer::group_count;
using bitinfer::segment_size;
using bitinfer::words_per_row;
using bitinfer::Dtype;
using bitinfer::Floats;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// sums of integers and their offsets stay within int32 up to here
constexpr int64_t kMaxIntegerColumns = int64_t{1} << 22;

void parallel_for(int64_t count, int64_t grain, const bitinfer::cpu::Body& body) {
  torch::stable::parallel_for(0, count, grain, [&body](int64_t begin, int64_t end) { body(begin, end); });
}

std::string to_string(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The leading dimensions with others in place of the last `dropped`.
Sizes shape_like(const Tensor& tensor, size_t dropped, std::initializer_list<int64_t> last) {
  Sizes sizes = sizes_of(tensor);
  sizes.resize(sizes.size() - dropped);
  sizes.insert(sizes.end(), last);
  return sizes;
}

// A new contiguous CPU tensor, by the C function: torch::stable::new_empty looks the operator up by its name each time.
Tensor empty(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Sizes& expected) {
  STD_TORCH_CHECK(sizes_of(tensor) == expected, op, ": ", name, " must have shape ", to_string(expected), ", got ",
                  to_string(sizes_of(tensor)));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected, const char* spelled) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must be ", spelled);
}

Dtype float_dtype(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": ",
                  name, " must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float ? Dtype::kFloat32 : dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

bool is_contiguous(const Tensor& tensor) { return tensor.is_contiguous(); }

// Makes the tensor contiguous, checks that it holds floats on the CPU, and returns a view of it.
Floats floats(const char* op, const char* name, Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  const Dtype dtype = float_dtype(op, name, tensor.scalar_type());
  if (!is_contiguous(tensor)) tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), dtype};
}

// The same for an optional tensor of a given shape, or of any shape with leading ones for a vector of columns.
Floats floats(const char* op, const char* name, OptionalTensor& tensor, const Sizes& shape) {
  if (!tensor) return {};
  check_shape(op, name, *tensor, shape);
  return floats(op, name, *tensor);
}

Floats columns(const char* op, const char* name, OptionalTensor& tensor, int64_t k) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->dim() > 0 && tensor->size(-1) == k && tensor->numel() == k, op, ": ", name,
                  " must have shape (1, ", k, "), got ", to_string(sizes_of(*tensor)));
  return floats(op, name, *tensor);
}

// A matrix of rows that are contiguous each: two dimensions keep their row stride, all else is made contiguous.
struct Rows {
  Tensor tensor;
  Floats data;
  int64_t m, k, stride;

  Rows(const char* op, const char* name, const Tensor& x) : tensor(x) {
    STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU");
    const Dtype dtype = float_dtype(op, name, x.scalar_type());
    STD_TORCH_CHECK(x.dim() > 0, op, ": ", name, " must have at least one dimension, got a scalar");
    k = x.size(-1);
    m = 1;
    for (int64_t d = 0; d < x.dim() - 1; ++d) m *= x.size(d);
    const bool rows = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= 0;
    if (!rows && !is_contiguous(x)) tensor = torch::stable::contiguous(x);
    stride = rows ? x.stride(0) : k;
    data = {tensor.const_data_ptr(), dtype};
  }
};

void check_sizes(const char* op, int64_t block_size, int64_t group_size) {
  STD_TORCH_CHECK(group_size >= 0 && group_size % 32 == 0, op, ": group_size must be 0 or a multiple of 32, got ",
                  group_size);
  STD_TORCH_CHECK(block_size == 0 || block_size == 256, op, ": block_size must be 0 or 256, got ", block_size);
  STD_TORCH_CHECK(block_size == 0 || group_size == 0 || block_size % group_size == 0 || group_size % block_size == 0,
                  op, ": block_size=", block_size, " and group_size=", group_size,
                  " overlap unevenly: one must divide the other");
}

void check_bits(const char* op, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 2 || bits == 1, op, ": bits must be 8, 4, 2 or 1, got ", bits);
}

// The packed matrix and what applies to its rows. The tensors are made contiguous in place and must outlive the result.
bitinfer::Weight checked_weight(const char* op, Tensor& weight, int64_t k, OptionalTensor& scale,
                                     OptionalTensor& group_shift, OptionalTensor& bias, int64_t group_size) {
  check_dtype(op, "weight", weight, ScalarType::UInt32, "torch.uint32 sign words");
  STD_TORCH_CHECK(k >= 0 && (weight.dim() == 2 || weight.dim() == 3) && weight.size(-1) == words_per_row(k), op,
                  ": weight must be [N, ", words_per_row(k), "] or [P, N, ", words_per_row(k),
                  "] words for in_features=", k, ", got ", to_string(sizes_of(weight)));
  if (!is_contiguous(weight)) weight = torch::stable::contiguous(weight);
  const int64_t n = weight.size(-2), planes = weight.dim() == 3 ? weight.size(0) : 1;
  const int64_t groups = group_count(k, group_size);
  const Sizes shift_shape = weight.dim() == 3 ? Sizes{1, n, groups} : Sizes{n, groups};
  return {static_cast<const uint32_t*>(weight.const_data_ptr()),
          planes,
          n,
          k,
          floats(op, "weight_scale", scale, shape_like(weight, 1, {groups})),
          floats(op, "group_shift", group_shift, shift_shape),
          floats(op, "bias", bias, {n}),
          group_size};
}

Tensor pack_signs(Tensor weight) {
  const Rows x("pack_signs", "weight", weight);
  Tensor words = empty(shape_like(weight, 1, {words_per_row(x.k)}), ScalarType::UInt32);
  bitinfer::cpu::pack_signs(bitinfer::cpu::active_kernels(),
                            {x.data, x.k, x.stride, static_cast<uint32_t*>(words.mutable_data_ptr())}, x.m,
                            parallel_for);
  return words;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_activations(Tensor x, OptionalTensor in_scale, OptionalTensor in_shift,
                                                            int64_t bits, int64_t block_size, int64_t group_size) {
  const char* op = "pack_activations";
  check_bits(op, bits);
  check_sizes(op, block_size, group_size);
  const Rows rows(op, "x", x);
  STD_TORCH_CHECK(rows.k <= kMaxIntegerColumns, op, ": x has ", rows.k, " columns, but sums in int32 hold at most ",
                  kMaxIntegerColumns);
  const int64_t segments = group_count(rows.k, segment_size(block_size, group_size));
  Tensor planes = empty(shape_like(x, 1, {bits, words_per_row(rows.k)}), ScalarType::UInt32);
  Tensor scale = empty(shape_like(x, 1, {group_count(rows.k, block_size)}), ScalarType::Float);
  Tensor sum = empty(shape_like(x, 1, {segments}), ScalarType::Int);
  Tensor shift = empty(shape_like(x, 1, {in_shift ? 1 : 0}), ScalarType::Float);
  bitinfer::PackActivations problem{rows.data, rows.k, rows.stride};
  problem.in_scale = columns(op, "in_scale", in_scale, rows.k);
  problem.in_shift = columns(op, "in_shift", in_shift, rows.k);
  problem.bits = bits;
  problem.block_size = block_size;
  problem.group_size = group_size;
  problem.planes = static_cast<uint32_t*>(planes.mutable_data_ptr());
  problem.scale = static_cast<float*>(scale.mutable_data_ptr());
  problem.sum = static_cast<int32_t*>(sum.mutable_data_ptr());
  problem.shift = static_cast<float*>(shift.mutable_data_ptr());
  bitinfer::cpu::pack_activations(bitinfer::cpu::active_kernels(), problem, rows.m, parallel_for);
  return {planes, scale, sum, shift};
}

Tensor sign_gemm(Tensor x, Tensor weight, int64_t in_features, OptionalTensor weight_scale, OptionalTensor in_scale,
                 OptionalTensor in_shift, OptionalTensor group_shift, OptionalTensor bias, int64_t group_size,
                 std::optional<double> norm_eps) {
  const char* op = "sign_gemm";
  check_sizes(op, 0, group_size);
  const Rows rows(op, "x", x);
  STD_TORCH_CHECK(rows.k == in_features, op, ": weight has in_features=", in_features, " but x has last dimension ",
                  rows.k, " (x.shape=", to_string(sizes_of(x)), ")");
  bitinfer::SignGemm problem{rows.data, rows.m, rows.stride};
  problem.in_scale = columns(op, "in_scale", in_scale, in_features);
  problem.in_shift = columns(op, "in_shift", in_shift, in_features);
  problem.weight = checked_weight(op, weight, in_features, weight_scale, group_shift, bias, group_size);
  const int64_t n = problem.weight.n;
  Tensor y = empty(shape_like(x, 1, {n}), x.scalar_type());
  problem.y = {y.mutable_data_ptr(), rows.data.dtype, n};
  bitinfer::cpu::sign_gemm(bitinfer::cpu::active_kernels(), problem, norm_eps, parallel_for);
  return y;
}

Tensor popcount_gemm(Tensor planes, Tensor act_scale, Tensor act_sum, OptionalTensor act_shift, Tensor weight,
                     int64_t in_features, OptionalTensor weight_scale, OptionalTensor group_shift, OptionalTensor bias,
                     int64_t group_size, int64_t block_size, std::optional<double> norm_eps, ScalarType dtype) {
  const char* op = "popcount_gemm";
  check_sizes(op, block_size, group_size);
  const Dtype out = float_dtype(op, "dtype", dtype);
  bitinfer::PopcountGemm problem{};
  problem.weight = checked_weight(op, weight, in_features, weight_scale, group_shift, bias, group_size);
  STD_TORCH_CHECK(in_features <= kMaxIntegerColumns, op, ": in_features=", in_features,
                  ", but sums in int32 hold at most ", kMaxIntegerColumns);
  check_dtype(op, "planes", planes, ScalarType::UInt32, "torch.uint32");
  check_dtype(op, "act_scale", act_scale, ScalarType::Float, "torch.float32");
  check_dtype(op, "act_sum", act_sum, ScalarType::Int, "torch.int32");
  STD_TORCH_CHECK(planes.dim() >= 2, op, ": planes must be [..., bits, words], got ", to_string(sizes_of(planes)));
  problem.bits = planes.size(-2);
  problem.block_size = block_size;
  check_bits(op, problem.bits);
  check_shape(op, "planes", planes, shape_like(planes, 1, {words_per_row(in_features)}));
  check_shape(op, "act_scale", act_scale, shape_like(planes, 2, {problem.blocks()}));
  check_shape(op, "act_sum", act_sum, shape_like(planes, 2, {problem.segments()}));
  for (Tensor* tensor : {&planes, &act_scale, &act_sum}) {
    if (!is_contiguous(*tensor)) *tensor = torch::stable::contiguous(*tensor);
  }
  problem.m = 1;
  for (int64_t d = 0; d < planes.dim() - 2; ++d) problem.m *= planes.size(d);
  problem.planes = static_cast<const uint32_t*>(planes.const_data_ptr());
  problem.act_scale = static_cast<const float*>(act_scale.const_data_ptr());
  problem.act_sum = static_cast<const int32_t*>(act_sum.const_data_ptr());
  if (act_shift) {
    check_dtype(op, "act_shift", *act_shift, ScalarType::Float, "torch.float32");
    check_shape(op, "act_shift", *act_shift, shape_like(planes, 2, {1}));
    if (!is_contiguous(*act_shift)) act_shift = torch::stable::contiguous(*act_shift);
    problem.act_shift = static_cast<const float*>(act_shift->const_data_ptr());
  }
  const int64_t n = problem.weight.n;
  Tensor y = empty(shape_like(planes, 2, {n}), dtype);
  problem.y = {y.mutable_data_ptr(), out, n};
  bitinfer::cpu::popcount_gemm(bitinfer::cpu::active_kernels(), problem, norm_eps, parallel_for);
  return y;
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
