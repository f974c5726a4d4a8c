// The torch side of decoder.h: decoders by handle, which hold the tensors of a model's packed layers and norms.
#include <memory>
#include <mutex>

#include "../checked_tensors.h"
#include "../handles.h"
#include "decoder.h"
#include "dispatch.h"

namespace {

using bitinfer::Call;
using bitinfer::Floats;
using bitinfer::OptionalTensor;
using bitinfer::sizes_of;
using bitinfer::Tensor;
using bitinfer::to_string;
using bitinfer::cpu::PackedLinear;
using bitinfer::cpu::RmsNorm;

// A decoder with what its pointers point into, and the linear layers that no decoder layer has taken yet.
struct Held {
  std::mutex busy;  // its memory serves one step at a time
  bitinfer::cpu::Decoder decoder;
  std::vector<Tensor> tensors;
  std::vector<PackedLinear> linears;
  bitinfer::Dtype dtype = bitinfer::Dtype::kFloat32;
};

bitinfer::Handles<Held> decoders("decoder");

// A norm's weight [n], which `held` keeps; absent if there is none.
RmsNorm norm_of(const Call& call, Held& held, const char* name, OptionalTensor weight, int64_t n, double eps) {
  if (!weight) return {};
  const Floats values = floats(call, name, weight, {n});
  STD_TORCH_CHECK(values.dtype == held.dtype, call.op, ": ", name, " must have the dtype of the model's last norm");
  held.tensors.push_back(*weight);
  return {values, static_cast<float>(eps)};
}

int64_t decoder_new(int64_t heads, int64_t kv_heads, int64_t head_dim, double scaling, Tensor norm, double eps,
                    OptionalTensor head) {
  const Call call{"decoder_new"};
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, call.op, ": heads=", heads,
                  " must be a multiple of kv_heads=", kv_heads);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, call.op, ": head_dim must be even, got ", head_dim);
  STD_TORCH_CHECK(norm.dim() == 1, call.op, ": norm must have one dimension, got ", to_string(sizes_of(norm)));
  auto made = std::make_shared<Held>();
  made->decoder.heads = {heads, kv_heads, head_dim, static_cast<float>(scaling)};
  made->decoder.columns = norm.size(0);
  made->dtype = bitinfer::float_dtype(call, "norm", norm.scalar_type());
  made->decoder.norm = norm_of(call, *made, "norm", norm, norm.size(0), eps);
  if (head) {
    STD_TORCH_CHECK(head->dim() == 2, call.op, ": head must be a matrix, got ", to_string(sizes_of(*head)));
    made->decoder.vocabulary = head->size(0);
    made->decoder.head = floats(call, "head", head, {made->decoder.vocabulary, norm.size(0)});
    STD_TORCH_CHECK(made->decoder.head.dtype == made->dtype, call.op, ": head must have the dtype of norm");
    made->tensors.push_back(*head);
  }
  return decoders.add(std::move(made));
}

void decoder_free(int64_t handle) { decoders.remove(handle); }

void decoder_linear(int64_t handle, Tensor weight, int64_t in_features, OptionalTensor weight_scale,
                    OptionalTensor in_scale, OptionalTensor in_shift, OptionalTensor group_shift, OptionalTensor bias,
                    int64_t group_size, std::optional<double> norm_eps, int64_t bits, int64_t block_size) {
  const Call call{"decoder_linear"};
  const auto to = decoders.at(call, handle);
  bitinfer::check_sizes(call, block_size, group_size);
  if (bits != 0) bitinfer::check_bits(call, bits);
  STD_TORCH_CHECK(bits == 0 || in_features <= bitinfer::kMaxIntegerColumns, call.op, ": in_features=", in_features,
                  ", but sums in int32 hold at most ", bitinfer::kMaxIntegerColumns);
  PackedLinear linear;
  linear.weight = checked_weight(call, weight, in_features, weight_scale, group_shift, bias, group_size);
  linear.in_scale = columns(call, "in_scale", in_scale, in_features);
  linear.in_shift = columns(call, "in_shift", in_shift, in_features);
  linear.norm_eps = norm_eps;
  linear.bits = bits;
  linear.block_size = block_size;
  to->tensors.push_back(weight);
  for (const OptionalTensor& tensor : {weight_scale, in_scale, in_shift, group_shift, bias}) {
    if (tensor) to->tensors.push_back(*tensor);
  }
  to->linears.push_back(linear);
}

void decoder_layer(int64_t handle, Tensor input_norm, double input_eps, Tensor post_norm, double post_eps,
                   OptionalTensor q_norm, double q_eps, OptionalTensor k_norm, double k_eps) {
  const Call call{"decoder_layer"};
  const auto to = decoders.at(call, handle);
  STD_TORCH_CHECK(to->linears.size() == 7, call.op, ": expected 7 linear layers (q, k, v, o, gate, up, down), got ",
                  to->linears.size());
  const auto& heads = to->decoder.heads;
  const std::vector<PackedLinear>& l = to->linears;
  const int64_t d = l[0].weight.k, inner = l[4].weight.n;
  const int64_t rows[] = {
      heads.queries * heads.dim, heads.keys * heads.dim, heads.keys * heads.dim, d, inner, inner, d};
  const int64_t ks[] = {d, d, d, heads.queries * heads.dim, d, d, inner};
  for (size_t i = 0; i < 7; ++i) {
    STD_TORCH_CHECK(l[i].weight.n == rows[i] && l[i].weight.k == ks[i], call.op, ": linear layer ", i, " must be ",
                    rows[i], " x ", ks[i], ", got ", l[i].weight.n, " x ", l[i].weight.k);
  }
  STD_TORCH_CHECK(d == to->decoder.columns, call.op, ": the model's last norm takes ", to->decoder.columns,
                  " columns, this layer ", d);
  const auto norm = [&](const char* name, const OptionalTensor& tensor, int64_t n, double eps) {
    return norm_of(call, *to, name, tensor, n, eps);
  };
  to->decoder.layers.push_back({l[0], l[1], l[2], l[3], l[4], l[5], l[6], norm("input_norm", input_norm, d, input_eps),
                                norm("post_norm", post_norm, d, post_eps), norm("q_norm", q_norm, heads.dim, q_eps),
                                norm("k_norm", k_norm, heads.dim, k_eps)});
  to->linears.clear();
}

// A contiguous tensor of the decoder's dtype, of a given shape, as memory to write.
void* memory(const Call& call, const Held& held, const char* name, const Tensor& tensor, const bitinfer::Sizes& sizes) {
  call.check_device(name, tensor);
  bitinfer::check_shape(call, name, tensor, sizes);
  STD_TORCH_CHECK(bitinfer::float_dtype(call, name, tensor.scalar_type()) == held.dtype && tensor.is_contiguous(),
                  call.op, ": ", name, " must be contiguous and of the norms' dtype");
  return tensor.mutable_data_ptr();
}

void decoder_step(int64_t handle, Tensor hidden, Tensor keys, Tensor values, Tensor cos, Tensor sin, int64_t slot,
                  OptionalTensor padding, OptionalTensor logits) {
  const Call call{"decoder_step"};
  const auto with = decoders.at(call, handle);
  const auto& heads = with->decoder.heads;
  STD_TORCH_CHECK(hidden.dim() == 2 && keys.dim() == 5, call.op, ": hidden must be [m, d], keys [layers, m, kv_heads, ",
                  "capacity, head_dim], got ", to_string(sizes_of(hidden)), " and ", to_string(sizes_of(keys)));
  const int64_t m = hidden.size(0), capacity = keys.size(3);
  const auto layers = static_cast<int64_t>(with->decoder.layers.size());
  STD_TORCH_CHECK(slot >= 0 && slot < capacity, call.op, ": slot=", slot, " is outside of a cache of ", capacity);
  bitinfer::cpu::DecodeStep step;
  step.m = m;
  step.dtype = with->dtype;
  step.hidden = memory(call, *with, "hidden", hidden, {m, with->decoder.columns});
  step.keys = memory(call, *with, "keys", keys, {layers, m, heads.keys, capacity, heads.dim});
  step.values = memory(call, *with, "values", values, {layers, m, heads.keys, capacity, heads.dim});
  step.cos = {memory(call, *with, "cos", cos, {capacity, heads.dim}), with->dtype};
  step.sin = {memory(call, *with, "sin", sin, {capacity, heads.dim}), with->dtype};
  if (logits) {
    STD_TORCH_CHECK(with->decoder.head, call.op, ": there are no logits without a head: decoder_new takes one");
    step.logits = memory(call, *with, "logits", *logits, {m, with->decoder.vocabulary});
  }
  step.capacity = capacity;
  step.slot = slot;
  if (padding) {
    bitinfer::check_dtype(call, "padding", *padding, bitinfer::ScalarType::Long, "torch.int64");
    bitinfer::check_shape(call, "padding", *padding, {m});
    STD_TORCH_CHECK(padding->is_contiguous(), call.op, ": padding must be contiguous");
    step.padding = static_cast<const int64_t*>(padding->const_data_ptr());
    for (int64_t t = 0; t < m; ++t) {
      STD_TORCH_CHECK(step.padding[t] >= 0 && step.padding[t] <= slot, call.op, ": padding of sequence ", t, " is ",
                      step.padding[t], ", past slot ", slot);
    }
  }
  const std::lock_guard lock(with->busy);
  bitinfer::cpu::decode(bitinfer::cpu::active_kernels(), with->decoder, step, torch::stable::get_num_threads(),
                        [](int64_t count, int64_t grain, const bitinfer::cpu::Body& body) {
                          torch::stable::parallel_for(0, count, grain,
                                                      [&body](int64_t begin, int64_t end) { body(begin, end); });
                        });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  m.def(
      "decoder_new(int heads, int kv_heads, int head_dim, float scaling, Tensor norm, float eps,"
      " Tensor? head) -> int");
  m.def("decoder_free(int decoder) -> ()");
  m.def(
      "decoder_linear(int decoder, Tensor weight, int in_features, Tensor? weight_scale, Tensor? in_scale,"
      " Tensor? in_shift, Tensor? group_shift, Tensor? bias, int group_size, float? norm_eps, int bits, int block_size)"
      " -> ()");
  m.def(
      "decoder_layer(int decoder, Tensor input_norm, float input_eps, Tensor post_norm, float post_eps, Tensor? q_norm,"
      " float q_eps, Tensor? k_norm, float k_eps) -> ()");
  m.def(
      "decoder_step(int decoder, Tensor(a!) hidden, Tensor(b!) keys, Tensor(c!) values, Tensor cos, Tensor sin,"
      " int slot, Tensor? padding, Tensor(d!)? logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CompositeExplicitAutograd, m) {
  m.impl("decoder_new", TORCH_BOX(&decoder_new));
  m.impl("decoder_free", TORCH_BOX(&decoder_free));
  m.impl("decoder_linear", TORCH_BOX(&decoder_linear));
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
}
