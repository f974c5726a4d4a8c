// Attention of one new token a sequence over a static cache; see decode_attention.cu.
#pragma once

#include <cstdint>

#include "cache_row.h"
#include "launch.h"

namespace bitinfer::cuda {

inline constexpr int kMaxHeadsOfKey = 8;  // query heads that share a key

// Rows are sequences; cos and sin [capacity, dim] by position.
struct DecodeAttention : CachedHeads {
  const void *q = nullptr, *k = nullptr;  // [batch, heads or kv_heads * dim]
  const int64_t* slot = nullptr;          // of the new token in the cache, the same for all sequences
  const int64_t* padding = nullptr;       // [batch] slots ahead of a sequence's first token, or absent
  float scaling = 1;
  void* out = nullptr;  // [batch, heads * dim]
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
