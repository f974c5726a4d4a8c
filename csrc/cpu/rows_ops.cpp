// The torch side of rows_linear.
#include "../checked_tensors.h"
#include "dispatch.h"
#include "rows_linear.h"

namespace bitinfer::cpu {
namespace {

void parallel_for(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, [&body](int64_t begin, int64_t end) { body(begin, end); });
}

Tensor rows_linear_op(Tensor x, Tensor codes, Tensor scale) {
  const Call call{"rows_linear"};
  const Rows rows(call, "x", x);
  check_dtype(call, "codes", codes, ScalarType::Char, "torch.int8 codes");
  check_dtype(call, "scale", scale, ScalarType::Float, "torch.float32 scales of rows");
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == rows.k, "rows_linear: codes must be [V, ", rows.k, "], got ",
                  to_string(sizes_of(codes)));
  const int64_t n = codes.size(0);
  STD_TORCH_CHECK(scale.numel() == n, "rows_linear: scale must have ", n, " elements, got ", scale.numel());
  if (!codes.is_contiguous()) codes = torch::stable::contiguous(codes);
  if (!scale.is_contiguous()) scale = torch::stable::contiguous(scale);
  Tensor y = empty(call, shape_like(x, 1, {n}), x.scalar_type());
  RowsLinear problem{rows.data, rows.m, rows.k, rows.stride};
  problem.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  problem.scale = static_cast<const float*>(scale.const_data_ptr());
  problem.n = n;
  problem.y = {y.mutable_data_ptr(), rows.data.dtype, n};
  rows_linear(problem, active_name(), parallel_for);
  return y;
}

}  // namespace
}  // namespace bitinfer::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  m.def("rows_linear(Tensor x, Tensor codes, Tensor scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CPU, m) { m.impl("rows_linear", TORCH_BOX(&bitinfer::cpu::rows_linear_op)); }
