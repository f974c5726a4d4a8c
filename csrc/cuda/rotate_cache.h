// Queries, keys and values of a prompt on their way to attention; see rotate_cache.cu.
#pragma once

#include <cstdint>

#include "cache_row.h"
#include "launch.h"

namespace bitinfer::cuda {

// Rows are tokens, those of a sequence one behind the other; cos and sin [batch or 1, tokens, dim].
struct RotateCache : CachedHeads {
  void* q = nullptr;  // [batch * tokens, heads * dim], turned where it is
  void* k = nullptr;  // [batch * tokens, kv_heads * dim], turned where it is if the cache is rounded
  int tokens = 0;
  int start = 0;              // the slot of each sequence's first row
  bool shared_angles = true;  // cos and sin serve all sequences
};

// dim must be 64 or 128.
cudaError_t rotate_cache(const RotateCache& problem, const Launch& on);

}  // namespace bitinfer::cuda
