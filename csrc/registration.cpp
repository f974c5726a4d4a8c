// The schemas of the compiled ops: those of bitinfer/ops.py, in a namespace of their own. A test compares them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bitinfer_native, m) {
  m.def("pack_signs(Tensor weight) -> Tensor");
  m.def(
      "pack_activations(Tensor x, Tensor? in_scale, Tensor? in_shift, int bits, int block_size, int group_size)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sign_gemm(Tensor x, Tensor weight, int in_features, Tensor? weight_scale, Tensor? in_scale, Tensor? in_shift,"
      " Tensor? group_shift, Tensor? bias, int group_size, float? norm_eps) -> Tensor");
  m.def(
      "popcount_gemm(Tensor planes, Tensor act_scale, Tensor act_sum, Tensor? act_shift, Tensor weight,"
      " int in_features, Tensor? weight_scale, Tensor? group_shift, Tensor? bias, int group_size, int block_size,"
      " float? norm_eps, ScalarType dtype) -> Tensor");
  m.def(
      "rms_norm_pack_activations(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor? in_scale,"
      " Tensor? in_shift, int bits, int block_size, int group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "silu_mul_pack_activations(Tensor gate, Tensor up, Tensor? in_scale, Tensor? in_shift, int bits, int block_size,"
      " int group_size) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_isa() -> str");
}
