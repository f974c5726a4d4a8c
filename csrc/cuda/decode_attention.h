// Attention of one new token a sequence over a static cache; see decode_attention.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

inline constexpr int kMaxHeadsOfKey = 8;  // query heads that share a key

// All matrices are of one 16-bit type, their rows at addresses that are multiples of 16.
struct DecodeAttention {
  Dtype dtype = Dtype::kFloat16;
  const void *q = nullptr, *k = nullptr, *v = nullptr;  // [batch, heads * dim], [batch, kv_heads * dim] twice
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;
  void *keys = nullptr, *values = nullptr;          // [batch, kv_heads, capacity, row of cache_row.cuh]
  const void *cos = nullptr, *sin = nullptr;        // [capacity, dim], by position
  const void *q_norm = nullptr, *k_norm = nullptr;  // [dim], or absent
  const int64_t* slot = nullptr;                    // of the new token in the cache, the same for all sequences
  const int64_t* padding = nullptr;                 // [batch] slots ahead of a sequence's first token, or absent
  float q_eps = 0, k_eps = 0, scaling = 1;
  void* out = nullptr;  // [batch, heads * dim]
  int batch = 0, heads = 0, kv_heads = 0, dim = 0, capacity = 0;
  int cache_bits = 16;  // of keys and values: 16, of the type of the others, or 8 or 4
};

// How the heads of a key and the slots are cut: a pure function of the problem and the device.
struct AttentionPlan {
  int heads = 0;        // of a warp: 1, 2 or 4; 0 if the kernel does not take the problem
  int head_groups = 0;  // of warps, for the heads of one key
  int key_warps = 0;    // that share the slots of a block
  int splits = 0;       // blocks of a cluster, which share the slots of a sequence
  int shared_bytes = 0;

  explicit operator bool() const { return heads != 0; }
};

AttentionPlan decode_attention_plan(const DecodeAttention& problem, const Device& device);
cudaError_t decode_attention(const DecodeAttention& problem, const AttentionPlan& plan, const Launch& on);

}  // namespace bitinfer::cuda
