// The ops that put the keys and values of a token or a prompt into a static cache, and attend to it.
#include "decode_attention.h"
#include "decoder_rows.h"
#include "on_device.h"
#include "rotate_cache.h"

namespace {

using namespace bitinfer;
using bitinfer::cuda::check;
using bitinfer::cuda::OnDevice;

// New rows of heads and a layer's cache, checked and described: keys and values are [B, kv_heads, capacity, dim] of the
// type of the others, or rounded rows of cache_row.cuh as bytes.
struct CacheCall {
  const Call& call;
  ScalarType dtype;
  cuda::CachedHeads heads;

  CacheCall(const Call& call, const Tensor& q, const Tensor& keys, const Tensor& values, int64_t dim)
      : call(call), dtype(q.scalar_type()) {
    STD_TORCH_CHECK(keys.dim() == 4 && keys.size(0) > 0 && keys.size(1) > 0 && keys.size(2) < int64_t{1} << 31, call.op,
                    ": keys must be [B, kv_heads, capacity, head_dim], got ", to_string(sizes_of(keys)));
    check_shape(call, "values", values, sizes_of(keys));
    const ScalarType type = keys.scalar_type();
    for (const auto& [name, tensor] : {std::pair{"keys", &keys}, {"values", &values}}) {
      call.check_device(name, *tensor);
      STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && is_aligned(*tensor), call.op, ": ",
                      name, " must be contiguous, aligned and of one dtype");
    }
    const auto rows_of = [&](int bits) { return keys.size(3) == cuda::cache_row_bytes(static_cast<int>(dim), bits); };
    heads.cache_bits = type == ScalarType::Byte               ? (rows_of(8)   ? 8
                                                                 : rows_of(4) ? 4
                                                                              : 0)
                       : type == dtype && keys.size(3) == dim ? 16
                                                              : 0;
    STD_TORCH_CHECK(heads.cache_bits != 0, call.op, ": keys must have the dtype of q and rows of ", dim,
                    ", or be torch.uint8 with rows of 8 or 4 bits a number, got rows of ", keys.size(3));
    STD_TORCH_CHECK(q.dim() == 2 && q.size(1) % (keys.size(1) * dim) == 0 && q.size(1) / dim < 65536, call.op,
                    ": q must be rows of heads * head_dim with heads a multiple of ", keys.size(1), ", got ",
                    to_string(sizes_of(q)));
    heads.keys = keys.mutable_data_ptr();
    heads.values = values.mutable_data_ptr();
    heads.batch = static_cast<int>(keys.size(0));
    heads.heads = static_cast<int>(q.size(1) / dim);
    heads.kv_heads = static_cast<int>(keys.size(1));
    heads.capacity = static_cast<int>(keys.size(2));
    heads.dim = static_cast<int>(dim);
  }

  static bool is_aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  }

  void take_rows(const Rows& q, const Rows& k, const Rows& v) {
    heads.dtype = q.data.dtype;
    heads.q_stride = q.stride;
    heads.k_stride = k.stride;
    heads.v_stride = v.stride;
    heads.v = v.data.data;
  }
  void take_angles(const Tensor& cos, const Tensor& sin) {
    for (const auto& [name, tensor] : {std::pair{"cos", &cos}, {"sin", &sin}}) {
      call.check_device(name, *tensor);
      STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->is_contiguous() && is_aligned(*tensor), call.op, ": ",
                      name, " must be contiguous, aligned and have the dtype of q");
    }
    heads.cos = cos.const_data_ptr();
    heads.sin = sin.const_data_ptr();
  }
  void take_norms(OptionalTensor& q_norm, OptionalTensor& k_norm, double q_eps, double k_eps) {
    for (const auto& [name, tensor] : {std::pair{"q_norm", &q_norm}, {"k_norm", &k_norm}}) {
      STD_TORCH_CHECK(!*tensor || ((*tensor)->scalar_type() == dtype && is_aligned(**tensor)), call.op, ": ", name,
                      " must be aligned and have the dtype of q");
    }
    heads.q_norm = floats(call, "q_norm", q_norm, {heads.dim}).data;
    heads.k_norm = floats(call, "k_norm", k_norm, {heads.dim}).data;
    heads.q_eps = static_cast<float>(q_eps);
    heads.k_eps = static_cast<float>(k_eps);
  }
};

// int64 numbers, one behind the other.
const int64_t* integers(const Call& call, const char* name, const Tensor& tensor, int64_t count) {
  check_dtype(call, name, tensor, ScalarType::Long, "torch.int64");
  STD_TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), call.op, ": ", name, " must have ", count,
                  " contiguous entries");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor slot,
                        OptionalTensor padding, OptionalTensor q_norm, OptionalTensor k_norm, double q_eps,
                        double k_eps, double scaling, bool settled) {
  const OnDevice on("decode_attention", q, settled);
  const Call& call = on.call;
  STD_TORCH_CHECK(cos.dim() == 2 && cos.size(1) > 0 && cos.size(1) <= 1024, call.op,
                  ": cos must be [capacity, head_dim], got ", to_string(sizes_of(cos)));
  CacheCall cache(call, q, keys, values, cos.size(1));
  const cuda::CachedHeads& heads = cache.heads;
  STD_TORCH_CHECK(cos.size(0) >= heads.capacity, call.op, ": cos must be [", heads.capacity,
                  " or more, head_dim], got ", to_string(sizes_of(cos)));
  check_shape(call, "sin", sin, sizes_of(cos));
  const int64_t batch = heads.batch, width = int64_t{heads.kv_heads} * heads.dim;
  const Rows queries = matrix(call, "q", q, batch, q.size(1), cache.dtype);
  const Rows new_keys = matrix(call, "k", k, batch, width, cache.dtype);
  const Rows new_values = matrix(call, "v", v, batch, width, cache.dtype);
  cache.take_rows(queries, new_keys, new_values);
  cache.take_angles(cos, sin);
  cache.take_norms(q_norm, k_norm, q_eps, k_eps);
  Tensor out = empty(call, sizes_of(q), cache.dtype);
  cuda::DecodeAttention p{heads};
  p.q = queries.data.data;
  p.k = new_keys.data.data;
  p.slot = integers(call, "slot", slot, 1);
  p.padding = padding ? integers(call, "padding", *padding, batch) : nullptr;
  p.scaling = static_cast<float>(scaling);
  p.out = out.mutable_data_ptr();
  const cuda::AttentionPlan plan = cuda::decode_attention_plan(p, on.launch.device);
  STD_TORCH_CHECK(plan, call.op, ": expected float16 or bfloat16 in aligned rows, head_dim 64 or 128 and at most ",
                  cuda::kMaxHeadsOfKey, " query heads to a key");
  check(call, cuda::decode_attention(p, plan, on.launch));
  return out;
}

void rotate_cache(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor cos, Tensor sin, int64_t start,
                  OptionalTensor q_norm, OptionalTensor k_norm, double q_eps, double k_eps) {
  const OnDevice on("rotate_cache", q);
  const Call& call = on.call;
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16, call.op,
                  ": q must be float16 or bfloat16");
  STD_TORCH_CHECK(cos.dim() == 3 && (cos.size(2) == 64 || cos.size(2) == 128), call.op,
                  ": cos must be [B or 1, T, 64 or 128], got ", to_string(sizes_of(cos)));
  CacheCall cache(call, q, keys, values, cos.size(2));
  const cuda::CachedHeads& heads = cache.heads;
  const int64_t tokens = cos.size(1), m = heads.batch * tokens, width = int64_t{heads.kv_heads} * heads.dim;
  STD_TORCH_CHECK(cos.size(0) == 1 || cos.size(0) == heads.batch, call.op, ": cos must be of 1 or ", heads.batch,
                  " sequences, got ", cos.size(0));
  check_shape(call, "sin", sin, sizes_of(cos));
  STD_TORCH_CHECK(start >= 0 && start + tokens <= heads.capacity && m < int64_t{1} << 31, call.op, ": ", tokens,
                  " tokens from slot ", start, " do not fit a cache of ", heads.capacity);
  const Rows queries = matrix(call, "q", q, m, q.size(1), cache.dtype);
  const Rows new_keys = matrix(call, "k", k, m, width, cache.dtype);
  const Rows new_values = matrix(call, "v", v, m, width, cache.dtype);
  for (const Rows* rows : {&queries, &new_keys, &new_values}) {
    STD_TORCH_CHECK(cuda::takes_rows(rows->data.data, rows->stride, rows->data.dtype, heads.dim), call.op,
                    ": rows of q, k and v must start at multiples of 16 bytes");
  }
  // Rows may have copied what it cannot read in place; what is turned must be the caller's
  STD_TORCH_CHECK(queries.data.data == q.const_data_ptr() && new_keys.data.data == k.const_data_ptr(), call.op,
                  ": rows of q and k must be contiguous");
  cache.take_rows(queries, new_keys, new_values);
  cache.take_angles(cos, sin);
  cache.take_norms(q_norm, k_norm, q_eps, k_eps);
  cuda::RotateCache p{heads};
  p.q = q.mutable_data_ptr();
  p.k = k.mutable_data_ptr();
  p.tokens = static_cast<int>(tokens);
  p.start = static_cast<int>(start);
  p.shared_angles = cos.size(0) == 1;
  check(call, cuda::rotate_cache(p, on.launch));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitinfer_native, m) {
  // With `settled` no kernel still under way on the stream writes slot, padding, cos, sin, or keys and values of slots
  // before this one.
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin,"
      " Tensor slot, Tensor? padding, Tensor? q_norm, Tensor? k_norm, float q_eps, float k_eps, float scaling,"
      " bool settled) -> Tensor");
  // Norms q and k of a prompt, if they have norms, turns them to their positions, q in place, and k too if the cache is
  // rounded, and writes k and v to slots from `start` on; rows are tokens, those of a sequence one behind the other.
  m.def(
      "rotate_cache(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) keys, Tensor(d!) values, Tensor cos, Tensor sin,"
      " int start, Tensor? q_norm, Tensor? k_norm, float q_eps, float k_eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitinfer_native, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("rotate_cache", TORCH_BOX(&rotate_cache));
}
