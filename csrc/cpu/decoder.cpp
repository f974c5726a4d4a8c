// The stages of a decoder layer, in the order in which a team of threads goes through them:
//
//   norm and prepare for q, k, v | products | attention, in parts of kPart slots | combine and prepare for o | product
//   and sum | norm and prepare for gate, up | products | silu, product and prepare for down | product and sum
//
// and one more behind every set of products that has a LayerNorm over its outputs. For one token, every product is
// bound by reading its weight; what stands between them is short, so what matters is that nothing is allocated, no
// thread sleeps, and no stage waits for more than the last tile.
#include "decoder.h"

#include <algorithm>
#include <array>
#include <vector>

#include "decoder_kernels.h"
#include "dispatch.h"
#include "team.h"

namespace bitinfer::cpu {
namespace {

constexpr int64_t kPart = 512;      // slots of the cache to a tile of attention
constexpr int64_t kStages = 13;     // most of a layer
constexpr int64_t kHeadRows = 256;  // of a tile

// A layer in a step: products over memory that the layers take turns in using.
class LayerStep {
 public:
  LayerStep(const Kernels& table, const DecoderKernels& between, Decoder& decoder, int64_t index,
            const DecodeStep& step, int64_t threads)
      : between_(&between), layer_(&decoder.layers[static_cast<size_t>(index)]), heads_(decoder.heads), step_(&step) {
    decoder.arena.rewind();
    const auto product = [&](const PackedLinear& linear) {
      return Product(table, linear, step.m, step.dtype, threads, decoder.arena);
    };
    qkv_ = {product(layer_->q), product(layer_->k), product(layer_->v)};
    o_ = product(layer_->o);
    gate_up_ = {product(layer_->gate), product(layer_->up)};
    down_ = product(layer_->down);
    parts_ = step.slot / kPart + 1;
    part_ = decoder.arena.take_array<float>(step.m * heads_.queries * parts_ * (heads_.dim + 2));
    hidden_ = {step.hidden, step.dtype, layer_->q.weight.k};
    cache_ = index * step.m * heads_.keys * step.capacity * heads_.dim * element_size(step.dtype);
  }

  void run(Team::Member& member) const {
    prepare(member, layer_->input_norm, qkv_);
    multiply(member, qkv_);
    member.stage(step_->m * heads_.keys * parts_, [&](int64_t tile) { attend(tile); });
    member.stage(step_->m, [&](int64_t token) {
      const float* part = part_ + token * heads_.queries * parts_ * (heads_.dim + 2);
      between_->combine(part, heads_.queries, parts_, heads_.dim, step_->dtype, o_.x(token));
      o_.prepare(token);
    });
    add_product(member, o_);
    prepare(member, layer_->post_norm, gate_up_);
    multiply(member, gate_up_);
    member.stage(step_->m, [&](int64_t token) {
      between_->silu_mul(gate_up_[0].y(token), gate_up_[1].y(token), layer_->down.weight.k, down_.x(token));
      down_.prepare(token);
    });
    add_product(member, down_);
  }

 private:
  // Each product has its own copy of the normalised token: that costs less than one more stage.
  template <size_t kCount>
  void prepare(Team::Member& member, const RmsNorm& norm, const std::array<Product, kCount>& products) const {
    constexpr auto kProducts = static_cast<int64_t>(kCount);
    member.stage(step_->m * kProducts, [&](int64_t tile) {
      const int64_t token = tile / kProducts;
      const Product& product = products[static_cast<size_t>(tile % kProducts)];
      between_->rms_norm(norm, hidden(token), hidden_.stride, product.x(token));
      product.prepare(token);
    });
  }

  template <size_t kCount>
  void multiply(Team::Member& member, const std::array<Product, kCount>& products) const {
    int64_t tiles = 0;
    bool norms = false;
    for (const Product& product : products) {
      tiles += product.tiles();
      norms = norms || product.has_norm();
    }
    member.stage(tiles, [&](int64_t tile) {
      for (const Product& product : products) {
        if (tile < product.tiles()) return product.multiply(tile, [](int64_t, int64_t, int64_t) {});
        tile -= product.tiles();
      }
    });
    if (!norms) return;
    constexpr auto kProducts = static_cast<int64_t>(kCount);
    member.stage(step_->m * kProducts, [&](int64_t tile) {
      const Product& product = products[static_cast<size_t>(tile % kProducts)];
      if (product.has_norm()) product.normalise(tile / kProducts);
    });
  }

  // h += product
  void add_product(Team::Member& member, const Product& product) const {
    const auto add = [&](int64_t token, int64_t column, int64_t count) {
      between_->add(product.y(token, column), count, hidden_.at(token, column));
    };
    if (!product.has_norm()) {
      member.stage(product.tiles(), [&](int64_t tile) { product.multiply(tile, add); });
      return;
    }
    member.stage(product.tiles(), [&](int64_t tile) { product.multiply(tile, [](int64_t, int64_t, int64_t) {}); });
    member.stage(step_->m, [&](int64_t token) {
      product.normalise(token);
      add(token, 0, hidden_.stride);
    });
  }

  void attend(int64_t tile) const {
    const int64_t part = tile % parts_, head = tile / parts_ % heads_.keys, token = tile / parts_ / heads_.keys;
    const int64_t group = heads_.queries / heads_.keys, dim = heads_.dim, slot = step_->slot;
    const int64_t first = step_->padding == nullptr ? 0 : step_->padding[token];
    const int64_t at = cache_ + (token * heads_.keys + head) * step_->capacity * dim * element_size(step_->dtype);
    Attend a;
    a.heads = heads_;
    a.dtype = step_->dtype;
    a.q = qkv_[0].y(token, head * group * dim);
    if (part == parts_ - 1) {
      a.k = qkv_[1].y(token, head * dim);
      a.v = qkv_[2].y(token, head * dim);
    }
    a.q_norm = layer_->q_norm;
    a.k_norm = layer_->k_norm;
    a.cos = step_->cos + (slot - first) * dim;
    a.sin = step_->sin + (slot - first) * dim;
    a.keys = static_cast<std::byte*>(step_->keys) + at;
    a.values = static_cast<std::byte*>(step_->values) + at;
    a.begin = std::max(first, part * kPart);
    a.end = std::min(slot + 1, (part + 1) * kPart);
    a.slot = slot;
    a.part = part_ + ((token * heads_.queries + head * group) * parts_ + part) * (dim + 2);
    a.parts = parts_;
    between_->attend(a);
  }

  Floats hidden(int64_t token) const { return {hidden_.at(token, 0), hidden_.dtype}; }

  const DecoderKernels* between_;
  const DecoderLayer* layer_;
  Heads heads_;
  const DecodeStep* step_;
  std::array<Product, 3> qkv_;
  std::array<Product, 2> gate_up_;
  Product o_, down_;
  int64_t parts_;
  float* part_;
  Output hidden_;
  int64_t cache_;  // bytes of keys, and of values, of the layers before
};

}  // namespace

const DecoderKernels& active_decoder_kernels() {
  const std::string& name = active_name();
  const bool x86 = decoder_avx512() != nullptr;
  if (!x86 || name == "scalar") return *decoder_scalar();
  return name == "avx2" ? *decoder_avx2() : *decoder_avx512();
}

void decode(const Kernels& kernels, Decoder& decoder, const DecodeStep& step, int64_t threads,
            ParallelFor parallel_for) {
  if (step.m == 0) return;
  const DecoderKernels& between = active_decoder_kernels();
  const auto count = static_cast<int64_t>(decoder.layers.size());
  std::vector<LayerStep> layers;
  layers.reserve(decoder.layers.size());
  for (int64_t i = 0; i < count; ++i) layers.emplace_back(kernels, between, decoder, i, step, threads);
  Head head{decoder.head,       nullptr,         step.m,
            decoder.vocabulary, decoder.columns, {step.logits, step.dtype, decoder.vocabulary}};
  float* normed = decoder.arena.take_array<float>(step.m * decoder.columns);
  head.x = normed;
  const int64_t head_tiles = step.logits == nullptr ? 0 : (head.n + kHeadRows - 1) / kHeadRows;
  Team team(count * kStages + 2);
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    Team::Member member(team);
    for (const LayerStep& layer : layers) layer.run(member);
    member.stage(step.m, [&](int64_t token) {
      const Output hidden{step.hidden, step.dtype, decoder.columns};
      const Floats row{hidden.at(token, 0), step.dtype};
      between.rms_norm(decoder.norm, row, hidden.stride, hidden.at(token, 0));
      between.widen(row, hidden.stride, normed + token * hidden.stride);
    });
    member.stage(head_tiles,
                 [&](int64_t tile) { between.head(head, tile * kHeadRows, std::min(head.n, (tile + 1) * kHeadRows)); });
  });
}

}  // namespace bitinfer::cpu
