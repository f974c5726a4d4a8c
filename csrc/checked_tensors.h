// What the torch sides of the CPU and CUDA ops share: checks for memory safety, and allocation.
//
// They stand alone: torch.ops.bitinfer_native can be called by anyone, and on a CPU bitinfer.ops asks
// bitinfer/checks.py only for the words of an error, once these have refused a call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

namespace bitinfer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// sums of integers and their offsets stay within int32 up to here
inline constexpr int64_t kMaxIntegerColumns = int64_t{1} << 22;

// The op that is called, and the device that all its tensors must be on.
struct Call {
  const char* op;
  int32_t device_type = aoti_torch_device_type_cpu();
  int32_t device_index = 0;

  void check_device(const char* name, const Tensor& tensor) const {
    if (device_type == aoti_torch_device_type_cpu()) {
      STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
    } else {
      STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_index, op, ": ", name, " must be on GPU ",
                      device_index, ", where the other tensors are");
    }
  }
};

inline std::string to_string(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The leading dimensions with others in place of the last `dropped`.
inline Sizes shape_like(const Tensor& tensor, size_t dropped, std::initializer_list<int64_t> last) {
  Sizes sizes = sizes_of(tensor);
  sizes.resize(sizes.size() - dropped);
  sizes.insert(sizes.end(), last);
  return sizes;
}

// A new contiguous tensor, by the C function: torch::stable::new_empty looks the operator up by its name each time.
inline Tensor empty(const Call& call, const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), call.device_type,
                               call.device_index, &handle));
  return Tensor(handle);
}

inline void check_shape(const Call& call, const char* name, const Tensor& tensor, const Sizes& expected) {
  STD_TORCH_CHECK(sizes_of(tensor) == expected, call.op, ": ", name, " must have shape ", to_string(expected), ", got ",
                  to_string(sizes_of(tensor)));
}

inline void check_dtype(const Call& call, const char* name, const Tensor& tensor, ScalarType expected,
                        const char* spelled) {
  call.check_device(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == expected, call.op, ": ", name, " must be ", spelled);
}

inline Dtype float_dtype(const Call& call, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, call.op,
                  ": ", name, " must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float ? Dtype::kFloat32 : dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// Makes the tensor contiguous, checks that it holds floats on the right device, and returns a view of it.
inline Floats floats(const Call& call, const char* name, Tensor& tensor) {
  call.check_device(name, tensor);
  const Dtype dtype = float_dtype(call, name, tensor.scalar_type());
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), dtype};
}

// The same for an optional tensor of a given shape, or of any shape with leading ones for a vector of columns.
inline Floats floats(const Call& call, const char* name, OptionalTensor& tensor, const Sizes& shape) {
  if (!tensor) return {};
  check_shape(call, name, *tensor, shape);
  return floats(call, name, *tensor);
}

inline Floats columns(const Call& call, const char* name, OptionalTensor& tensor, int64_t k) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->dim() > 0 && tensor->size(-1) == k && tensor->numel() == k, call.op, ": ", name,
                  " must have shape (1, ", k, "), got ", to_string(sizes_of(*tensor)));
  return floats(call, name, *tensor);
}

inline void check_norm(const Call& call, std::optional<double> norm_eps) {
  STD_TORCH_CHECK(!norm_eps || (*norm_eps >= 0 && std::isfinite(*norm_eps)), call.op,
                  ": norm_eps must be None or a finite number from 0, got ", norm_eps.value_or(0));
}

// A matrix of rows that are contiguous each: two dimensions keep their row stride, all else is made contiguous.
struct Rows {
  Tensor tensor;
  Floats data;
  int64_t m, k, stride;

  Rows(const Call& call, const char* name, const Tensor& x) : tensor(x) {
    call.check_device(name, x);
    const Dtype dtype = float_dtype(call, name, x.scalar_type());
    STD_TORCH_CHECK(x.dim() > 0, call.op, ": ", name, " must have at least one dimension, got a scalar");
    k = x.size(-1);
    m = 1;
    for (int64_t d = 0; d < x.dim() - 1; ++d) m *= x.size(d);
    const bool rows = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= 0;
    if (!rows && !x.is_contiguous()) tensor = torch::stable::contiguous(x);
    stride = rows ? x.stride(0) : k;
    data = {tensor.const_data_ptr(), dtype};
  }
};

// Rows of a matrix of a given shape and type.
inline Rows matrix(const Call& call, const char* name, const Tensor& tensor, int64_t m, int64_t k, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, call.op, ": ", name, " must have the dtype of the others");
  check_shape(call, name, tensor, {m, k});
  return Rows(call, name, tensor);
}

inline void check_sizes(const Call& call, int64_t block_size, int64_t group_size) {
  STD_TORCH_CHECK(group_size >= 0 && group_size % 32 == 0, call.op, ": group_size must be 0 or a multiple of 32, got ",
                  group_size);
  STD_TORCH_CHECK(block_size == 0 || block_size == 256, call.op, ": block_size must be 0 or 256, got ", block_size);
  STD_TORCH_CHECK(block_size == 0 || group_size == 0 || block_size % group_size == 0 || group_size % block_size == 0,
                  call.op, ": block_size=", block_size, " and group_size=", group_size,
                  " overlap unevenly: one must divide the other");
}

inline void check_bits(const Call& call, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 2 || bits == 1, call.op, ": bits must be 8, 4, 2 or 1, got ", bits);
}

// The packed matrix and what applies to its rows. The tensors are made contiguous in place and must outlive the result.
inline Weight checked_weight(const Call& call, Tensor& weight, int64_t k, OptionalTensor& scale,
                             OptionalTensor& group_shift, OptionalTensor& bias, int64_t group_size) {
  check_dtype(call, "weight", weight, ScalarType::UInt32, "torch.uint32 sign words");
  STD_TORCH_CHECK(k >= 0 && (weight.dim() == 2 || weight.dim() == 3) && weight.size(-1) == words_per_row(k), call.op,
                  ": weight must be [N, ", words_per_row(k), "] or [P, N, ", words_per_row(k),
                  "] words for in_features=", k, ", got ", to_string(sizes_of(weight)));
  if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
  const int64_t n = weight.size(-2), planes = weight.dim() == 3 ? weight.size(0) : 1;
  const int64_t groups = group_count(k, group_size);
  const Sizes shift_shape = weight.dim() == 3 ? Sizes{1, n, groups} : Sizes{n, groups};
  return {static_cast<const uint32_t*>(weight.const_data_ptr()),
          planes,
          n,
          k,
          floats(call, "weight_scale", scale, shape_like(weight, 1, {groups})),
          floats(call, "group_shift", group_shift, shift_shape),
          floats(call, "bias", bias, {n}),
          group_size};
}

// ---- the arguments of each op, checked, with room for its results. The problems point into the tensors beside them.

struct PackSignsCall {
  Rows rows;
  Tensor words;
  PackSigns problem;

  PackSignsCall(const Call& call, const Tensor& weight)
      : rows(call, "weight", weight),
        words(empty(call, shape_like(weight, 1, {words_per_row(rows.k)}), ScalarType::UInt32)),
        problem{rows.data, rows.k, rows.stride, static_cast<uint32_t*>(words.mutable_data_ptr())} {}
};

struct PackActivationsCall {
  Rows rows;
  OptionalTensor in_scale, in_shift;
  std::optional<Tensor> planes, scale, sum, shift;
  PackActivations problem;

  PackActivationsCall(const Call& call, const Tensor& x, OptionalTensor in_scale_, OptionalTensor in_shift_,
                      int64_t bits, int64_t block_size, int64_t group_size)
      : rows(call, "x", x), in_scale(std::move(in_scale_)), in_shift(std::move(in_shift_)) {
    check_bits(call, bits);
    check_sizes(call, block_size, group_size);
    STD_TORCH_CHECK(rows.k <= kMaxIntegerColumns, call.op, ": x has ", rows.k,
                    " columns, but sums in int32 hold at most ", kMaxIntegerColumns);
    const int64_t segments = group_count(rows.k, segment_size(block_size, group_size));
    planes = empty(call, shape_like(x, 1, {bits, words_per_row(rows.k)}), ScalarType::UInt32);
    scale = empty(call, shape_like(x, 1, {group_count(rows.k, block_size)}), ScalarType::Float);
    sum = empty(call, shape_like(x, 1, {segments}), ScalarType::Int);
    shift = empty(call, shape_like(x, 1, {in_shift ? 1 : 0}), ScalarType::Float);
    problem.x = rows.data;
    problem.k = rows.k;
    problem.stride = rows.stride;
    problem.in_scale = columns(call, "in_scale", in_scale, rows.k);
    problem.in_shift = columns(call, "in_shift", in_shift, rows.k);
    problem.bits = bits;
    problem.block_size = block_size;
    problem.group_size = group_size;
    problem.planes = static_cast<uint32_t*>(planes->mutable_data_ptr());
    problem.scale = static_cast<float*>(scale->mutable_data_ptr());
    problem.sum = static_cast<int32_t*>(sum->mutable_data_ptr());
    problem.shift = static_cast<float*>(shift->mutable_data_ptr());
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {*planes, *scale, *sum, *shift}; }
};

struct SignGemmCall {
  Rows rows;
  Tensor weight;
  OptionalTensor weight_scale, in_scale, in_shift, group_shift, bias;
  std::optional<Tensor> y;
  SignGemm problem;

  SignGemmCall(const Call& call, const Tensor& x, Tensor weight_, int64_t in_features, OptionalTensor weight_scale_,
               OptionalTensor in_scale_, OptionalTensor in_shift_, OptionalTensor group_shift_, OptionalTensor bias_,
               int64_t group_size)
      : rows(call, "x", x),
        weight(std::move(weight_)),
        weight_scale(std::move(weight_scale_)),
        in_scale(std::move(in_scale_)),
        in_shift(std::move(in_shift_)),
        group_shift(std::move(group_shift_)),
        bias(std::move(bias_)) {
    check_sizes(call, 0, group_size);
    STD_TORCH_CHECK(rows.k == in_features, call.op, ": weight has in_features=", in_features,
                    " but x has last dimension ", rows.k, " (x.shape=", to_string(sizes_of(x)), ")");
    problem.x = rows.data;
    problem.m = rows.m;
    problem.stride = rows.stride;
    problem.in_scale = columns(call, "in_scale", in_scale, in_features);
    problem.in_shift = columns(call, "in_shift", in_shift, in_features);
    problem.weight = checked_weight(call, weight, in_features, weight_scale, group_shift, bias, group_size);
    y = empty(call, shape_like(x, 1, {problem.weight.n}), x.scalar_type());
    problem.y = {y->mutable_data_ptr(), rows.data.dtype, problem.weight.n};
  }
};

struct PopcountGemmCall {
  Tensor planes, act_scale, act_sum;
  OptionalTensor act_shift;
  Tensor weight;
  OptionalTensor weight_scale, group_shift, bias;
  std::optional<Tensor> y;
  PopcountGemm problem;

  PopcountGemmCall(const Call& call, Tensor planes_, Tensor act_scale_, Tensor act_sum_, OptionalTensor act_shift_,
                   Tensor weight_, int64_t in_features, OptionalTensor weight_scale_, OptionalTensor group_shift_,
                   OptionalTensor bias_, int64_t group_size, int64_t block_size, ScalarType dtype)
      : planes(std::move(planes_)),
        act_scale(std::move(act_scale_)),
        act_sum(std::move(act_sum_)),
        act_shift(std::move(act_shift_)),
        weight(std::move(weight_)),
        weight_scale(std::move(weight_scale_)),
        group_shift(std::move(group_shift_)),
        bias(std::move(bias_)) {
    check_sizes(call, block_size, group_size);
    const Dtype out = float_dtype(call, "dtype", dtype);
    problem.weight = checked_weight(call, weight, in_features, weight_scale, group_shift, bias, group_size);
    STD_TORCH_CHECK(in_features <= kMaxIntegerColumns, call.op, ": in_features=", in_features,
                    ", but sums in int32 hold at most ", kMaxIntegerColumns);
    check_dtype(call, "planes", planes, ScalarType::UInt32, "torch.uint32");
    check_dtype(call, "act_scale", act_scale, ScalarType::Float, "torch.float32");
    check_dtype(call, "act_sum", act_sum, ScalarType::Int, "torch.int32");
    STD_TORCH_CHECK(planes.dim() >= 2, call.op, ": planes must be [..., bits, words], got ",
                    to_string(sizes_of(planes)));
    problem.bits = planes.size(-2);
    problem.block_size = block_size;
    check_bits(call, problem.bits);
    check_shape(call, "planes", planes, shape_like(planes, 1, {words_per_row(in_features)}));
    check_shape(call, "act_scale", act_scale, shape_like(planes, 2, {problem.blocks()}));
    check_shape(call, "act_sum", act_sum, shape_like(planes, 2, {problem.segments()}));
    for (Tensor* tensor : {&planes, &act_scale, &act_sum}) {
      if (!tensor->is_contiguous()) *tensor = torch::stable::contiguous(*tensor);
    }
    problem.m = 1;
    for (int64_t d = 0; d < planes.dim() - 2; ++d) problem.m *= planes.size(d);
    problem.planes = static_cast<const uint32_t*>(planes.const_data_ptr());
    problem.act_scale = static_cast<const float*>(act_scale.const_data_ptr());
    problem.act_sum = static_cast<const int32_t*>(act_sum.const_data_ptr());
    if (act_shift) {
      check_dtype(call, "act_shift", *act_shift, ScalarType::Float, "torch.float32");
      check_shape(call, "act_shift", *act_shift, shape_like(planes, 2, {1}));
      if (!act_shift->is_contiguous()) act_shift = torch::stable::contiguous(*act_shift);
      problem.act_shift = static_cast<const float*>(act_shift->const_data_ptr());
    }
    y = empty(call, shape_like(planes, 2, {problem.weight.n}), dtype);
    problem.y = {y->mutable_data_ptr(), out, problem.weight.n};
  }
};

}  // namespace bitinfer
