// Attention of one new token a sequence, with all that a decoder does around it: rotary embedding of q and k (RMSNorm
// of both before, where a model has it), k and v appended to the cache, softmax over the slots so far, in one kernel:
//
//   k', q' = rotary(norm(k)), rotary(norm(q));  keys[b, j, slot], values[b, j, slot] = k', v
//   out[b, h] = sum_s p[s] values[b, j, s],  p = softmax_s(scaling * q'[b, h] . keys[b, j, s]),  s = padding[b] ...
//   slot
//
// with j = h / (heads / kv_heads), sums in float32, and the roundings of transformers in front of them. For head_dim 64
// and 128, up to 8 query heads to a key, 16-bit types, any batch. Keys and values before this token's may be rounded to
// 8 or 4 bits (cache_row.cuh), and its own are rounded when they are stored.
//
//   cluster      the query heads of one key head of one sequence: keys and values are read once
//   block        an even part of the slots before the new one; block 0 of a cluster adds the new one
//   warp         of key_warps x head_groups: every key_warps-th run of slots, for 1, 2 or 4 heads
//   lanes        8 or 16 of them share a slot, 8 columns each; a lane loads kUnroll slots at a time
//
// Bounds: bytes of the cache for long contexts and many sequences, the latency of a chain of dependent kernels
// otherwise. All but q, k and v was written before the kernel ahead of this one: the slot, the tables and the first run
// of old keys and values are loaded while that still runs. What the slots of a warp, a block and a cluster give is
// combined by their largest scores; blocks send theirs to block 0 of the cluster.
#include <algorithm>

#include "attention_row.cuh"
#include "cache_row.cuh"
#include "decode_attention.h"

namespace bitinfer::cuda {
namespace {

constexpr int kMaxThreads = 256;

// Slots that a lane has under way.
constexpr int unroll_of(int dim, int heads) { return dim == 128 && heads == 1 ? 8 : 4; }

// Floats of what some slots give for a head: sum of p * v, largest score, sum of p; rows stay aligned to 16 bytes.
constexpr int part_size(int dim) { return dim + 4; }

__device__ __forceinline__ void store_to_block(const float* here, int block, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

// kHeads: of a warp. The grid is (splits, kv_heads, batch), the first of these a cluster.
template <typename T, int kDim, int kHeads, int kBits>
__global__ void __launch_bounds__(kMaxThreads, kHeads <= 2 ? 2 : 1)
    decode_attention_kernel(const __grid_constant__ DecodeAttention p, int key_warps, int head_groups) {
  constexpr int kLanes = kDim / kOctet, kSlotsOfLoad = 32 / kLanes, kUnroll = unroll_of(kDim, kHeads);
  constexpr int kPart = part_size(kDim), kColumns = kDim / 32, kRounds = 2, kRow = cache_row_bytes(kDim, kBits);
  extern __shared__ __align__(16) float shared[];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = key_warps * head_groups, key_warp = warp % key_warps, head_group = warp / key_warps;
  const int group = p.heads / p.kv_heads, rows = head_groups * kHeads;
  const int splits = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int64_t kv_head = blockIdx.y, sequence = blockIdx.z;
  float* const queries = shared;                               // [rows, kDim], then the new key
  float* const new_key = shared + rows * kDim;                 // [kDim]
  float* const of_warps = new_key + kDim;                      // [warps, kHeads, kPart]
  float* const of_blocks = of_warps + warps * kHeads * kPart;  // [splits, rows, kPart], used in block 0
  allow_next_kernel();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (splits > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif

  // ---- all that does not depend on the kernel before us
  const int slot = static_cast<int>(min(load_long(p.slot), static_cast<int64_t>(p.capacity - 1)));
  const int first =
      p.padding == nullptr ? 0 : static_cast<int>(min(load_long(p.padding + sequence), static_cast<int64_t>(slot)));
  const int share = (slot - first + splits - 1) / splits;
  const int begin = min(first + rank * share, slot), end = min(begin + share, slot);
  const int64_t cache_row = (sequence * p.kv_heads + kv_head) * p.capacity;
  auto* const keys = static_cast<unsigned char*>(p.keys) + cache_row * kRow;
  auto* const values = static_cast<unsigned char*>(p.values) + cache_row * kRow;
  const int column = lane % kLanes * kOctet, lane_slot = key_warp * kSlotsOfLoad + lane / kLanes;
  const int step = key_warps * kSlotsOfLoad;  // slots that a block loads at a time
  CacheOctet<kBits, kDim> k_raw[kUnroll], v_raw[kUnroll];
  const auto load_slots = [&](int at) {
    const auto load = [&](CacheOctet<kBits, kDim>(&to)[kUnroll], const unsigned char* rows) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int s = at + u * step + lane_slot;
        to[u].clear();
        if (s < end) to[u].load(rows + static_cast<int64_t>(s) * kRow, column);
      }
    };
    load(k_raw, keys);
    load(v_raw, values);
  };
  load_slots(begin);
  float cos[kColumns], sin[kColumns], weight[kRounds][kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t at = static_cast<int64_t>(slot - first) * kDim + lane + 32 * i;
    cos[i] = load_number(static_cast<const T*>(p.cos) + at);
    sin[i] = load_number(static_cast<const T*>(p.sin) + at);
  }
  // rows of q and, after them, k: a warp makes one or two of them
  const auto norm_of = [&](int row) { return static_cast<const T*>(row == rows ? p.k_norm : p.q_norm); };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int row = warp + round * warps;
    const T* const norm = norm_of(row);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      weight[round][i] = row <= rows && norm != nullptr ? load_number(norm + lane + 32 * i) : 1;
    }
  }
  wait_for_previous_kernel();

  // ---- the new token
  Row<T, kDim> row_of[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int row = warp + round * warps;
    if (row > rows) break;
    // a group whose heads are no multiple of kHeads has its last head more than once, and uses it once
    const T* const from = row == rows ? static_cast<const T*>(p.k) + sequence * p.k_stride + kv_head * kDim
                                      : static_cast<const T*>(p.q) + sequence * p.q_stride +
                                            (kv_head * group + min(row, group - 1)) * kDim;
    row_of[round].load(from, lane);
  }
  const bool has_new = rank == 0 && key_warp == 0 && lane < kLanes;
  uint4 new_value = make_uint4(0, 0, 0, 0);
  if (has_new) new_value = load_quad(static_cast<const T*>(p.v) + sequence * p.v_stride + kv_head * kDim + column);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int row = warp + round * warps;
    if (row > rows) break;
    if (norm_of(row) != nullptr) row_of[round].normalise(weight[round], row == rows ? p.k_eps : p.q_eps);
    row_of[round].rotate(cos, sin);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int at = lane + 32 * i;
      const float value = row_of[round].x[i];
      shared[row * kDim + at] = row == rows ? value : value * (p.scaling * kLog2E);
      if (kBits == 16 && row == rows && rank == 0) {
        reinterpret_cast<T*>(keys + static_cast<int64_t>(slot) * kRow)[at] = from_float<T>(value);
      }
    }
    if constexpr (kBits < 16) {
      if (row == rows && rank == 0) {
        store_cache_row<kBits, kDim>(keys + static_cast<int64_t>(slot) * kRow, row_of[round].x, lane);
      }
    }
  }
  if (has_new && head_group == 0) {
    unsigned char* const row = values + static_cast<int64_t>(slot) * kRow;
    if constexpr (kBits == 16) {
      *reinterpret_cast<uint4*>(row + 2 * column) = new_value;
    } else {
      float value[kOctet];
      unpack<T>(new_value, value);
      store_cache_octet<kBits, kDim>(row, column, value, (1u << kLanes) - 1);
    }
  }
  __syncthreads();

  // Every lane starts from the new slot's score as the largest, which is a number whatever slots it has; one set of
  // lanes counts that slot.
  float q[kHeads][kOctet], sum[kHeads][kOctet], largest[kHeads], total[kHeads];
  {
    float key[kOctet], value[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) key[j] = new_key[column + j];
    unpack<T>(new_value, value);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      largest[h] = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        q[h][j] = queries[(head_group * kHeads + h) * kDim + column + j];
        largest[h] += q[h][j] * key[j];
        sum[h][j] = value[j];
      }
      total[h] = has_new ? 1 : 0;
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        largest[h] += __shfl_xor_sync(kAllLanes, largest[h], distance);
      }
    }
  }

  // ---- the slots before it
  for (int at = begin; at < end; at += kUnroll * step) {
    if (at != begin) load_slots(at);
    float score[kHeads][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[kOctet];
      k_raw[u].template unpack<T>(key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        score[h][u] = 0;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) score[h][u] += q[h][j] * key[j];
        if (kBits < 16) score[h][u] *= k_raw[u].scale();
      }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) score[h][u] += __shfl_xor_sync(kAllLanes, score[h][u], distance);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float highest = largest[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (at + u * step + lane_slot >= end) score[h][u] = -INFINITY;
        highest = fmaxf(highest, score[h][u]);
      }
      const float shrink = exp2_fast(largest[h] - highest);
      largest[h] = highest;
      total[h] *= shrink;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum[h][j] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[h][u] = exp2_fast(score[h][u] - highest);
        total[h] += score[h][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float value[kOctet];
      v_raw[u].template unpack<T>(value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight_of_value = kBits < 16 ? score[h][u] * v_raw[u].scale() : score[h][u];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum[h][j] += weight_of_value * value[j];
      }
    }
  }

  // ---- what the lanes of a warp have, then its warps, then the blocks of the cluster
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest[h], distance), highest = fmaxf(largest[h], other);
      const float shrink = exp2_fast(largest[h] - highest);
      largest[h] = highest;
      total[h] *= shrink;
      total[h] += __shfl_xor_sync(kAllLanes, total[h], distance);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        sum[h][j] *= shrink;
        sum[h][j] += __shfl_xor_sync(kAllLanes, sum[h][j], distance);
      }
    }
    float* const part = of_warps + (warp * kHeads + h) * kPart;
    if (lane < kLanes) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) part[column + j] = sum[h][j];
    }
    if (lane == 0) {
      part[kDim] = largest[h];
      part[kDim + 1] = total[h];
    }
  }
  __syncthreads();
  struct Combined {
    float sum, largest, total;
  };
  // of `count` parts, `stride` floats from one to the next, for one column
  const auto combine = [](const float* parts, int count, int stride, int at) {
    Combined c{0, parts[kDim], 0};
    for (int i = 1; i < count; ++i) c.largest = fmaxf(c.largest, parts[i * stride + kDim]);
    for (int i = 0; i < count; ++i) {
      const float shrink = exp2_fast(parts[i * stride + kDim] - c.largest);
      c.total += shrink * parts[i * stride + kDim + 1];
      c.sum += shrink * parts[i * stride + at];
    }
    return c;
  };
  const auto finish = [&](int row, int at, const Combined& c) {
    T* const out = static_cast<T*>(p.out) + (sequence * p.heads + kv_head * group + row) * kDim;
    out[at] = from_float<T>(__fdiv_rn(c.sum, c.total));
  };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // every block of the cluster runs from here on, and has shared memory to write to
  if (splits > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  for (int i = static_cast<int>(threadIdx.x); i < group * kDim; i += static_cast<int>(blockDim.x)) {
    const int row = i / kDim, at = i % kDim;
    const float* const parts = of_warps + (row / kHeads * key_warps * kHeads + row % kHeads) * kPart;
    const Combined c = combine(parts, key_warps, kHeads * kPart, at);
    if (splits == 1) {
      finish(row, at, c);
    } else {
      float* const part = of_blocks + (rank * rows + row) * kPart;
      store_to_block(part + at, 0, c.sum);
      if (at == 0) {
        store_to_block(part + kDim, 0, c.largest);
        store_to_block(part + kDim + 1, 0, c.total);
      }
    }
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (splits == 1) return;
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (rank != 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < group * kDim; i += static_cast<int>(blockDim.x)) {
    const int row = i / kDim, at = i % kDim;
    finish(row, at, combine(of_blocks + row * kPart, splits, rows * kPart, at));
  }
#endif
}

template <typename T, int kDim, int kBits>
cudaError_t run(const DecodeAttention& p, const AttentionPlan& plan, const Launch& on) {
  const auto kernel = plan.heads == 1   ? decode_attention_kernel<T, kDim, 1, kBits>
                      : plan.heads == 2 ? decode_attention_kernel<T, kDim, 2, kBits>
                                        : decode_attention_kernel<T, kDim, 4, kBits>;
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.splits), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  config.blockDim = dim3(static_cast<unsigned>(32 * plan.key_warps * plan.head_groups));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = on.device.architecture < 90 ? 0 : on.settled ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, p, plan.key_warps, plan.head_groups);
}

}  // namespace

AttentionPlan decode_attention_plan(const DecodeAttention& p, const Device& device) {
  AttentionPlan plan;
  const auto is_aligned = [](const void* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % kOctet == 0;
  };
  if (p.batch < 1 || p.batch > 65535 || p.kv_heads < 1 || p.kv_heads > 65535 || p.capacity < 1) return plan;
  if (p.dtype == Dtype::kFloat32 || (p.dim != 64 && p.dim != 128) || p.heads % p.kv_heads != 0) return plan;
  if (p.cache_bits != 16 && p.cache_bits != 8 && p.cache_bits != 4) return plan;
  if (!is_aligned(p.v, p.v_stride) || !is_aligned(p.keys, 0) || !is_aligned(p.values, 0)) return plan;
  const int group = p.heads / p.kv_heads;
  if (group > kMaxHeadsOfKey) return plan;
  plan.heads = group == 1 ? 1 : group == 2 ? 2 : 4;
  plan.head_groups = (group + plan.heads - 1) / plan.heads;
  plan.key_warps = kMaxThreads / 32 / plan.head_groups;
  // no cluster has more than a few blocks, none is worth it for a few slots, and two of them share a multiprocessor
  plan.splits = 1;
  const int64_t clusters = int64_t{p.batch} * p.kv_heads;
  const auto more = [&](int splits) {
    return splits <= kMaxTeamBlocks && clusters * splits <= 2 * device.multiprocessors && 32 * splits <= p.capacity;
  };
  while (device.architecture >= 90 && more(2 * plan.splits)) plan.splits *= 2;
  // where there are blocks for all multiprocessors, smaller ones leave room for the kernels before and after
  if (plan.heads <= 2 && clusters * plan.splits > device.multiprocessors / 2) plan.key_warps = 4;
  const int rows = plan.head_groups * plan.heads, warps = plan.key_warps * plan.head_groups;
  const int parts = warps * plan.heads + (plan.splits > 1 ? plan.splits * rows : 0);
  plan.shared_bytes = static_cast<int>(sizeof(float)) * ((rows + 1) * p.dim + parts * part_size(p.dim));
  return plan;
}

cudaError_t decode_attention(const DecodeAttention& p, const AttentionPlan& plan, const Launch& on) {
  const auto bits = [&]<typename T, int kDim>() {
    return p.cache_bits == 16  ? run<T, kDim, 16>(p, plan, on)
           : p.cache_bits == 8 ? run<T, kDim, 8>(p, plan, on)
                               : run<T, kDim, 4>(p, plan, on);
  };
  const auto dims = [&]<typename T>(T) {
    return p.dim == 64 ? bits.template operator()<T, 64>() : bits.template operator()<T, 128>();
  };
  return p.dtype == Dtype::kFloat16 ? dims(__half{}) : dims(__nv_bfloat16{});
}

}  // namespace bitinfer::cuda
