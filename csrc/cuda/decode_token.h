// All layers of a model for one token in one launch; see decode_token.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "fixed_point.h"
#include "launch.h"

namespace bitinfer::cuda {

// A packed projection. Factors of columns are of the 16-bit type of the activations.
struct TokenMatrix {
  const uint32_t* signs = nullptr;                      // [n, k / 32]
  const void *in_scale = nullptr, *in_shift = nullptr;  // [k], or absent
  Floats scale, group_shift, bias;                      // [n], or absent
  bool has_rows = false;                                // one of these is not
};

enum TokenProjection { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kTokenProjections };

struct alignas(16) TokenLayer {
  TokenMatrix of[kTokenProjections];
  const void *input_norm, *post_norm;  // [hidden]
  const void *q_norm, *k_norm;         // [dim], or absent
  float input_eps, post_eps, q_eps, k_eps;
};

// How rows of tiles of 16 are shared by the blocks, and where each stage's weights lie in a block's shared memory: the
// same for all layers, a pure function of the model's shape and the device.
struct TokenPlan {
  int blocks = 0;  // of the grid, all at the same time; 0 if the kernel does not take the model
  int qkv_tiles = 0, out_tiles = 0, gate_tiles = 0, down_tiles = 0;  // the most of a block
  int splits = 0;                                                    // blocks that share the slots of a head
  int inner_rounds = 0;
  int out_at = 0, gate_at = 0, scratch_at = 0, up_at = 0, down_at = 0;  // bytes; q, k and v at 0
  // of activations, and their sums; some in places of weights that have been used
  int planes_at = 0, up_planes_at = 0, down_planes_at = 0, sums_at = 0;
  int cache_at = 0, cache_slots = 0;  // keys and values, which have the place of up and down before these come
  int shared_bytes = 0;

  explicit operator bool() const { return blocks != 0; }
};

struct TokenShape {
  int hidden = 0, inner = 0, heads = 0, dim = 0;
  int64_t bits = 8;  // of activations: 8, 4 or 2, or kFixedPointBits for floating point
  Dtype dtype = Dtype::kFloat16;
  int cache_bits = 16;  // of keys and values: 16, of that type, or 8
};

TokenPlan decode_token_plan(const TokenShape& shape, const Device& device);

struct DecodeToken {
  TokenShape shape;
  const TokenLayer* layers = nullptr;  // on the device
  int layer_count = 0, capacity = 0;
  const void *x = nullptr, *norm = nullptr;   // [hidden]; the norm behind the layers
  void* y = nullptr;                          // [hidden], RMSNorm of the last layer's output
  void *keys = nullptr, *values = nullptr;    // [layers, heads, capacity, row of cache_row.cuh]
  const void *cos = nullptr, *sin = nullptr;  // [capacity, dim]
  const int64_t* slot = nullptr;
  float eps = 0, scaling = 1;
  void* memory = nullptr;  // decode_token_bytes(), zeros before the first launch; launches must not overlap
};

int64_t decode_token_bytes(const TokenShape& shape, const TokenPlan& plan);
cudaError_t decode_token(const DecodeToken& problem, const TokenPlan& plan, const Launch& on);

}  // namespace bitinfer::cuda
