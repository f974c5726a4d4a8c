// Queries, keys and values of a prompt on their way to attention; see rotate_cache.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// All matrices are of one 16-bit type at addresses and strides that are multiples of 16 bytes. Rows are tokens, those
// of a sequence one behind the other.
struct RotateCache {
  Dtype dtype = Dtype::kFloat16;
  void* q = nullptr;        // [batch * tokens, heads * dim], turned where it is
  void* k = nullptr;        // [batch * tokens, kv_heads * dim], turned where it is if the cache is rounded
  const void* v = nullptr;  // [batch * tokens, kv_heads * dim]
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;
  void *keys = nullptr, *values = nullptr;          // [batch, kv_heads, capacity, row of cache_row.cuh]
  const void *cos = nullptr, *sin = nullptr;        // [batch or 1, tokens, dim]
  const void *q_norm = nullptr, *k_norm = nullptr;  // [dim], or absent
  float q_eps = 0, k_eps = 0;
  int batch = 0, tokens = 0, heads = 0, kv_heads = 0, dim = 0, capacity = 0;
  int start = 0;              // the slot of each sequence's first row
  int cache_bits = 16;        // of keys and values: 16, of the type of the others, or 8 or 4
  bool shared_angles = true;  // cos and sin serve all sequences
};

// dim must be 64 or 128.
cudaError_t rotate_cache(const RotateCache& problem, const Launch& on);

}  // namespace bitinfer::cuda
