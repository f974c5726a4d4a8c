// One step of decoding through all layers of a model of the LLaMA kind: one token of each of m sequences.
//
//   h += o(attention(q(n), k(n), v(n))),   n = RMSNorm(h)         h [m, d]
//   h += down(silu(gate(n)) * up(n)),      n = RMSNorm(h)
//
// Queries and keys may have norms of their own (Qwen3), and turn by their position (rotary embedding). Every result
// that transformers' modules hand on is rounded to the dtype of h. Free of torch.
#pragma once

#include <vector>

#include "arena.h"
#include "decoder_product.h"
#include "run.h"

namespace bitinfer::cpu {

struct RmsNorm {
  Floats weight = {};  // in the dtype of h; absent: no norm
  float eps = 0;
};

struct DecoderLayer {
  PackedLinear q, k, v, o, gate, up, down;
  RmsNorm input_norm, post_norm;  // [d]
  RmsNorm q_norm, k_norm;         // [head_dim] or absent
};

struct Heads {
  int64_t queries = 0, keys = 0;  // queries in groups of equal size share keys
  int64_t dim = 0;
  float scaling = 1;
};

// Sequences are padded on the left, so all of them write the same slot of the cache.
struct DecodeStep {
  int64_t m = 0;
  Dtype dtype = Dtype::kFloat32;            // of all that follows
  void* hidden = nullptr;                   // [m, d], in place
  void *keys = nullptr, *values = nullptr;  // [layers, m, heads.keys, capacity, heads.dim]
  void* logits = nullptr;                   // [m, vocabulary], or absent
  int64_t capacity = 0, slot = 0;
  Floats cos = {}, sin = {};         // [capacity, heads.dim], of each position
  const int64_t* padding = nullptr;  // [m], slots before the first token; absent: none
};

// All layers, and the norm behind them.
struct Decoder {
  Heads heads;
  int64_t columns = 0;  // d
  RmsNorm norm;         // [d]
  Floats head = {};     // [vocabulary, d] in the dtype of h, or absent
  int64_t vocabulary = 0;
  std::vector<DecoderLayer> layers = {};
  Arena arena = {};  // one step at a time
};

// Makes of step.hidden what the head multiplies, and step.logits of that.
void decode(const Kernels& kernels, Decoder& decoder, const DecodeStep& step, int64_t threads,
            ParallelFor parallel_for);

}  // namespace bitinfer::cpu
