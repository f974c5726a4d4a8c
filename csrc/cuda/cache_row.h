// What the kernels that put keys and values into a static cache have in common; see cache_row.cuh for its rows.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace bitinfer::cuda {

// The bytes of a key or value of `dim` numbers of 16 bits, or rounded to 8 or 4.
constexpr int cache_row_bytes(int dim, int bits) { return bits == 16 ? 2 * dim : dim * bits / 8 + 8; }

// New queries, keys and values, rows of heads, and the cache of a layer. All are of one 16-bit type but a rounded
// cache, at addresses and strides that are multiples of 16 bytes.
struct CachedHeads {
  Dtype dtype = Dtype::kFloat16;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;
  const void* v = nullptr;                          // [rows, kv_heads * dim]
  void *keys = nullptr, *values = nullptr;          // [batch, kv_heads, capacity, cache_row_bytes(dim, cache_bits)]
  const void *cos = nullptr, *sin = nullptr;        // the rotary embedding
  const void *q_norm = nullptr, *k_norm = nullptr;  // [dim], or absent
  float q_eps = 0, k_eps = 0;
  int batch = 0, heads = 0, kv_heads = 0, dim = 0, capacity = 0;
  int cache_bits = 16;  // of keys and values: 16, of the type of the others, or 8 or 4
};

}  // namespace bitinfer::cuda
