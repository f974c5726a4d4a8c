// The torch side of decode_token.h: models by handle, which hold the tensors of their packed layers and norms.
#include <memory>
#include <mutex>

#include "../handles.h"
#include "cache_row.h"
#include "decode_token.h"
#include "on_device.h"

namespace {

using namespace bitinfer;
using bitinfer::cuda::check;
using bitinfer::cuda::OnDevice;
using bitinfer::cuda::TokenLayer;
using bitinfer::cuda::TokenMatrix;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

struct Held {
  std::mutex busy;  // its memory serves one step at a time
  cuda::TokenShape shape;
  cuda::TokenPlan plan;
  float eps = 0, scaling = 1;
  Tensor norm;
  Tensors tensors;  // that the layers point into
  std::vector<TokenLayer> layers;
  std::optional<Tensor> on_device, memory;

  explicit Held(const Tensor& norm) : norm(norm) {}
};

Handles<Held> models("model");

cuda::TokenShape shape_of(const Call& call, const Tensor& norm, int64_t heads, int64_t head_dim, int64_t inner,
                          int64_t bits, int64_t cache_bits) {
  STD_TORCH_CHECK(norm.dim() == 1 && norm.is_contiguous(), call.op, ": norm must be contiguous, of one dimension");
  for (const int64_t size : {heads, head_dim, inner, norm.size(0)}) {
    STD_TORCH_CHECK(size > 0 && size < int64_t{1} << 20, call.op, ": sizes must be from 1 to 2^20, got ", size);
  }
  if (bits != 0) check_bits(call, bits);
  return {static_cast<int>(norm.size(0)),
          static_cast<int>(inner),
          static_cast<int>(heads),
          static_cast<int>(head_dim),
          bits == 0 ? cuda::kFixedPointBits : bits,
          float_dtype(call, "norm", norm.scalar_type()),
          static_cast<int>(cache_bits)};
}

bool token_model_takes(Tensor norm, int64_t heads, int64_t head_dim, int64_t inner, int64_t bits, int64_t cache_bits) {
  const OnDevice on("token_model_takes", norm);
  const auto shape = shape_of(on.call, norm, heads, head_dim, inner, bits, cache_bits);
  return static_cast<bool>(cuda::decode_token_plan(shape, on.launch.device));
}

int64_t token_model_new(Tensor norm, double eps, int64_t heads, int64_t head_dim, double scaling, int64_t inner,
                        int64_t bits, int64_t cache_bits) {
  const OnDevice on("token_model_new", norm);
  auto made = std::make_shared<Held>(norm);
  made->shape = shape_of(on.call, norm, heads, head_dim, inner, bits, cache_bits);
  made->plan = cuda::decode_token_plan(made->shape, on.launch.device);
  STD_TORCH_CHECK(made->plan, on.call.op, ": no kernel here takes such a model; token_model_takes tells beforehand");
  made->eps = static_cast<float>(eps);
  made->scaling = static_cast<float>(scaling);
  return models.add(std::move(made));
}

void token_model_free(int64_t handle) { models.remove(handle); }

// Numbers [count] of the model's type at an address that is a multiple of 16, which `to` keeps; null if absent.
const void* row(const Call& call, Held& to, const char* name, OptionalTensor& tensor, int64_t count) {
  if (!tensor) return nullptr;
  const Floats values = columns(call, name, tensor, count);
  STD_TORCH_CHECK(values.dtype == to.shape.dtype && reinterpret_cast<uintptr_t>(values.data) % 16 == 0, call.op, ": ",
                  name, " must have the dtype of the norm and start at a multiple of 16 bytes");
  to.tensors.push_back(*tensor);
  return values.data;
}

void token_model_layer(int64_t handle, Tensors weight, OptionalTensors weight_scale, OptionalTensors in_scale,
                       OptionalTensors in_shift, OptionalTensors group_shift, OptionalTensors bias, Tensor input_norm,
                       double input_eps, Tensor post_norm, double post_eps, OptionalTensor q_norm, double q_eps,
                       OptionalTensor k_norm, double k_eps) {
  const auto to = models.at(Call{"token_model_layer"}, handle);
  const OnDevice on("token_model_layer", to->norm);
  const Call& call = on.call;
  const size_t count = cuda::kTokenProjections;
  STD_TORCH_CHECK(weight.size() == count && weight_scale.size() == count && in_scale.size() == count &&
                      in_shift.size() == count && group_shift.size() == count && bias.size() == count,
                  call.op, ": expected 7 projections (q, k, v, o, gate, up, down), got ", weight.size());
  STD_TORCH_CHECK(!to->on_device, call.op, ": the model has been run, and takes no more layers");
  const cuda::TokenShape& shape = to->shape;
  const int64_t d = shape.hidden, inner = shape.inner, width = int64_t{shape.heads} * shape.dim;
  const int64_t rows[] = {width, width, width, d, inner, inner, d}, ks[] = {d, d, d, width, d, d, inner};
  TokenLayer layer{};
  for (size_t i = 0; i < count; ++i) {
    const Weight w = checked_weight(call, weight[i], ks[i], weight_scale[i], group_shift[i], bias[i], 0);
    STD_TORCH_CHECK(w.n == rows[i] && w.planes == 1 && reinterpret_cast<uintptr_t>(w.signs) % 16 == 0, call.op,
                    ": projection ", i, " must be one plane of ", rows[i], " x ", ks[i], ", got ", w.planes, " of ",
                    w.n, " x ", w.k);
    layer.of[i] = {w.signs,
                   row(call, *to, "in_scale", in_scale[i], ks[i]),
                   row(call, *to, "in_shift", in_shift[i], ks[i]),
                   w.scale,
                   w.group_shift,
                   w.bias,
                   w.scale || w.group_shift || w.bias};
    to->tensors.push_back(weight[i]);
    for (const OptionalTensor* tensor : {&weight_scale[i], &group_shift[i], &bias[i]}) {
      if (*tensor) to->tensors.push_back(**tensor);
    }
  }
  OptionalTensor input(input_norm), post(post_norm);
  layer.input_norm = row(call, *to, "input_norm", input, d);
  layer.post_norm = row(call, *to, "post_norm", post, d);
  layer.q_norm = row(call, *to, "q_norm", q_norm, shape.dim);
  layer.k_norm = row(call, *to, "k_norm", k_norm, shape.dim);
  layer.input_eps = static_cast<float>(input_eps);
  layer.post_eps = static_cast<float>(post_eps);
  layer.q_eps = static_cast<float>(q_eps);
  layer.k_eps = static_cast<float>(k_eps);
  to->layers.push_back(layer);
}

// A contiguous tensor of a given type and shape.
void* memory(const Call& call, const char* name, const Tensor& tensor, const Sizes& sizes, ScalarType type) {
  call.check_device(name, tensor);
  check_shape(call, name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  call.op, ": ", name, " must be contiguous and have the dtype of the norm, or for a rounded cache",
                  " torch.uint8");
  return tensor.mutable_data_ptr();
}

Tensor token_model_step(int64_t handle, Tensor x, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor slot) {
  const auto model = models.at(Call{"token_model_step"}, handle);
  const OnDevice on("token_model_step", model->norm);
  const Call& call = on.call;
  const std::lock_guard lock(model->busy);
  const cuda::TokenShape& shape = model->shape;
  const auto count = static_cast<int64_t>(model->layers.size());
  STD_TORCH_CHECK(count > 0, call.op, ": the model has no layers");
  STD_TORCH_CHECK(keys.dim() == 5 && keys.size(3) > 0 && keys.size(3) < int64_t{1} << 31, call.op,
                  ": keys must be [layers, 1, heads, capacity, head_dim], got ", to_string(sizes_of(keys)));
  const int64_t capacity = keys.size(3);
  const auto bytes_of = [&](int64_t bytes) { return std::optional<Tensor>(on.bytes(bytes)); };
  if (!model->on_device) {  // a first run, which no graph can record
    const size_t bytes = count * sizeof(TokenLayer), memory_bytes = cuda::decode_token_bytes(shape, model->plan);
    model->memory = bytes_of(static_cast<int64_t>(memory_bytes));
    check(call, cudaMemsetAsync(model->memory->mutable_data_ptr(), 0, memory_bytes, on.launch.stream));
    std::optional<Tensor> layers = bytes_of(static_cast<int64_t>(bytes));
    check(call, cudaMemcpyAsync(layers->mutable_data_ptr(), model->layers.data(), bytes, cudaMemcpyHostToDevice,
                                on.launch.stream));
    model->on_device = layers;
  }
  check_dtype(call, "slot", slot, ScalarType::Long, "torch.int64");
  STD_TORCH_CHECK(slot.numel() == 1, call.op, ": slot must be one number");
  Tensor y = empty(call, {1, shape.hidden}, x.scalar_type());
  cuda::DecodeToken p;
  p.shape = shape;
  p.layers = static_cast<const TokenLayer*>(model->on_device->const_data_ptr());
  p.layer_count = static_cast<int>(count);
  p.capacity = static_cast<int>(capacity);
  const ScalarType type = model->norm.scalar_type(), cached = shape.cache_bits == 16 ? type : ScalarType::Byte;
  p.x = memory(call, "x", x, {1, shape.hidden}, type);
  p.norm = memory(call, "norm", model->norm, {shape.hidden}, type);
  p.y = memory(call, "y", y, {1, shape.hidden}, type);
  const int row = shape.cache_bits == 16 ? shape.dim : cuda::cache_row_bytes(shape.dim, shape.cache_bits);
  STD_TORCH_CHECK(shape.cache_bits == 16 || capacity % 2 == 0, call.op, ": a rounded cache must have an even capacity");
  p.keys = memory(call, "keys", keys, {count, 1, shape.heads, capacity, row}, cached);
  p.values = memory(call, "values", values, {count, 1, shape.heads, capacity, row}, cached);
  p.cos = memory(call, "cos", cos, {capacity, shape.dim}, type);
  p.sin = memory(call, "sin", sin, {capacity, shape.dim}, type);
  p.slot = static_cast<const int64_t*>(slot.const_data_ptr());
  p.eps = model->eps;
  p.scaling = model->scaling;
  p.memory = model->memory->mutable_data_ptr();
  check(call, cuda::decode_token(p, model->plan, on.launch));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  // Models whose layers all run in one launch for one token; see decode_token.cu for which. `inner` is the size between
  // gate, up and down, `bits` those of activations, 0 for floating point, `cache_bits` those of keys and values; lists
  // are of q, k, v, o, gate, up and down. A step writes keys and values of its slot, reads those before it, and returns
  // what the norm behind the last layer gives. Steps of one model must not overlap.
  m.def("token_model_takes(Tensor norm, int heads, int head_dim, int inner, int bits, int cache_bits) -> bool");
  m.def(
      "token_model_new(Tensor norm, float eps, int heads, int head_dim, float scaling, int inner, int bits, int "
      "cache_bits) -> int");
  m.def("token_model_free(int handle) -> ()");
  m.def(
      "token_model_layer(int handle, Tensor[] weight, Tensor?[] weight_scale, Tensor?[] in_scale, Tensor?[] in_shift,"
      " Tensor?[] group_shift, Tensor?[] bias, Tensor input_norm, float input_eps, Tensor post_norm, float post_eps,"
      " Tensor? q_norm, float q_eps, Tensor? k_norm, float k_eps) -> ()");
  m.def(
      "token_model_step(int handle, Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin, Tensor slot)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CUDA, m) {
  m.impl("token_model_takes", TORCH_BOX(&token_model_takes));
  m.impl("token_model_new", TORCH_BOX(&token_model_new));
  m.impl("token_model_layer", TORCH_BOX(&token_model_layer));
  m.impl("token_model_step", TORCH_BOX(&token_model_step));
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CompositeExplicitAutograd, m) {
  m.impl("token_model_free", TORCH_BOX(&token_model_free));
}
