// The torch side of rows_linear, whose schema csrc/cpu/rows_ops.cpp holds.
#include "on_device.h"
#include "rows_linear.h"

namespace {

using namespace bitinfer;

constexpr int64_t kMaxColumns = int64_t{1} << 30;

Tensor rows_linear(Tensor x, Tensor codes, Tensor scale) {
  const cuda::OnDevice on("rows_linear", x);
  const Rows rows(on.call, "x", x);
  check_dtype(on.call, "codes", codes, ScalarType::Char, "torch.int8 codes");
  check_dtype(on.call, "scale", scale, ScalarType::Float, "torch.float32 scales of rows");
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == rows.k, on.call.op, ": codes must be [V, ", rows.k, "], got ",
                  to_string(sizes_of(codes)));
  STD_TORCH_CHECK(rows.k < kMaxColumns, on.call.op, ": x has ", rows.k, " columns, but must have fewer than ",
                  kMaxColumns);
  const int64_t n = codes.size(0);
  STD_TORCH_CHECK(scale.numel() == n, on.call.op, ": scale must have ", n, " elements, got ", scale.numel());
  if (!codes.is_contiguous()) codes = torch::stable::contiguous(codes);
  if (!scale.is_contiguous()) scale = torch::stable::contiguous(scale);
  Tensor y = empty(on.call, shape_like(x, 1, {n}), x.scalar_type());
  cuda::RowsLinear problem{rows.data, rows.m, rows.k, rows.stride};
  problem.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  problem.scale = static_cast<const float*>(scale.const_data_ptr());
  problem.n = n;
  problem.y = y.mutable_data_ptr();
  cuda::check(on.call, cuda::rows_linear(problem, on.launch));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CUDA, m) { m.impl("rows_linear", TORCH_BOX(&rows_linear)); }
