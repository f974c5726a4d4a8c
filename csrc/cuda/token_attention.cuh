// Attention of the new token by the blocks of decode_token.cu, one head or a part of its slots each: rotary embedding,
// cache and softmax as in decode_attention.cu, parts of a head meeting in memory.
#pragma once

#include "attention_row.cuh"
#include "token_product.cuh"

namespace bitinfer::cuda {

constexpr int kMaxSplits = 8, kUnroll = 4;  // slots that a lane has under way

constexpr int part_size(int dim) { return dim + 4; }  // floats: sum of p * v, largest score, sum of p

__device__ __forceinline__ uint32_t add(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// What a block attends to: its head, and its slots before the new one.
struct AttentionShare {
  int head, rank, splits, slot, begin, end;
};

// Old keys and values are loaded, then wait() is for q, k and v. Reads and writes [heads, kDim] rows; `query` is shared
// memory for it, the new key and the parts of all warps.
template <typename T, int kDim, class Wait>
__device__ __forceinline__ void attend(const DecodeToken& p, const TokenLayer& l, const AttentionShare& share,
                                       const T* q, const T* k, const T* v, T* attended, T* keys, T* values,
                                       float* query, float* parts_of_heads, uint32_t* heads_done, const Wait& wait) {
  constexpr int kLanes = kDim / kOctet, kSlotsOfLoad = 32 / kLanes, kStep = kWarps * kSlotsOfLoad;
  constexpr int kColumns = kDim / 32, kPart = part_size(kDim);
  __shared__ bool is_last_part;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int head = share.head, rank = share.rank, splits = share.splits, begin = share.begin, end = share.end;
  const bool attends = head < p.shape.heads;
  const int column = lane % kLanes * kOctet, lane_slot = warp * kSlotsOfLoad + lane / kLanes;
  uint4 k_raw[kUnroll], v_raw[kUnroll];
  const auto load_slots = [&](int at) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = at + u * kStep + lane_slot;
      k_raw[u] = v_raw[u] = make_uint4(0, 0, 0, 0);
      if (attends && i < end) {
        k_raw[u] = load_quad(keys + static_cast<int64_t>(i) * kDim + column);
        v_raw[u] = load_quad(values + static_cast<int64_t>(i) * kDim + column);
      }
    }
  };
  float *const new_key = query + kDim, *const parts = new_key + kDim;
  float cos[kColumns], sin[kColumns], weight[kColumns];
  const void* const norm = warp == 0 ? l.q_norm : l.k_norm;
  if (attends) {
    load_slots(begin);
    if (warp < 2) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int64_t at = static_cast<int64_t>(share.slot) * kDim + lane + 32 * i;
        cos[i] = load_number(static_cast<const T*>(p.cos) + at);
        sin[i] = load_number(static_cast<const T*>(p.sin) + at);
        weight[i] = norm != nullptr ? load_number(static_cast<const T*>(norm) + lane + 32 * i) : 1;
      }
    }
  }
  wait();
  if (!attends) return;
  const bool has_new = rank == 0 && warp == 0 && lane < kLanes;
  uint4 new_value = make_uint4(0, 0, 0, 0);
  if (has_new) {
    new_value = load_quad(v + head * kDim + column);
    *reinterpret_cast<uint4*>(values + static_cast<int64_t>(share.slot) * kDim + column) = new_value;
  }
  if (warp < 2) {
    Row<T, kDim> row;
    row.load((warp == 0 ? q : k) + head * kDim, lane);
    if (norm != nullptr) row.normalise(weight, warp == 0 ? l.q_eps : l.k_eps);
    row.rotate(cos, sin);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int at = lane + 32 * i;
      (warp == 0 ? query : new_key)[at] = warp == 0 ? row.x[i] * (p.scaling * kLog2E) : row.x[i];
      if (warp == 1 && rank == 0) keys[static_cast<int64_t>(share.slot) * kDim + at] = from_float<T>(row.x[i]);
    }
  }
  __syncthreads();
  // every lane starts from the new slot's score as the largest; one set of lanes counts that slot
  float at_query[kOctet], sum[kOctet], largest = 0, total = has_new ? 1 : 0;
  unpack<T>(new_value, sum);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    at_query[j] = query[column + j];
    largest += at_query[j] * new_key[column + j];
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    largest += __shfl_xor_sync(kAllLanes, largest, distance);
  }
  for (int at = begin; at < end; at += kUnroll * kStep) {
    if (at != begin) load_slots(at);
    float score[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[kOctet];
      unpack<T>(k_raw[u], key);
      score[u] = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) score[u] += at_query[j] * key[j];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) score[u] += __shfl_xor_sync(kAllLanes, score[u], distance);
    }
    float highest = largest;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u * kStep + lane_slot >= end) score[u] = -INFINITY;
      highest = fmaxf(highest, score[u]);
    }
    const float shrink = exp2_fast(largest - highest);
    largest = highest;
    total *= shrink;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) sum[j] *= shrink;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float weight_of_slot = exp2_fast(score[u] - highest);
      total += weight_of_slot;
      float value[kOctet];
      unpack<T>(v_raw[u], value);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum[j] += weight_of_slot * value[j];
    }
  }
  // what the lanes of a warp have, then its warps, then the blocks of the head
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, largest, distance), highest = fmaxf(largest, other);
    const float shrink = exp2_fast(largest - highest);
    largest = highest;
    total *= shrink;
    total += __shfl_xor_sync(kAllLanes, total, distance);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      sum[j] *= shrink;
      sum[j] += __shfl_xor_sync(kAllLanes, sum[j], distance);
    }
  }
  float* const part = parts + warp * kPart;
  if (lane < kLanes) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) part[column + j] = sum[j];
  }
  if (lane == 0) {
    part[kDim] = largest;
    part[kDim + 1] = total;
  }
  __syncthreads();
  // of up to kCount parts, what thread i makes of column i
  const auto combine = [&]<int kCount>(int count, auto part_at, float& all, float& most, float& counted) {
    float largest_of[kCount], total_of[kCount], sum_of[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool there = i < count;
      largest_of[i] = there ? part_at(i, kDim) : -INFINITY;
      total_of[i] = there ? part_at(i, kDim + 1) : 0;
      sum_of[i] = there ? part_at(i, thread) : 0;
    }
    most = largest_of[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) most = fmaxf(most, largest_of[i]);
    all = counted = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float shrink = exp2_fast(largest_of[i] - most);
      counted += shrink * total_of[i];
      all += shrink * sum_of[i];
    }
  };
  float all = 0, most = 0, counted = 1;
  if (thread < kDim) {
    const auto of_warp = [&](int i, int at) { return parts[i * kPart + at]; };
    combine.template operator()<kWarps>(kWarps, of_warp, all, most, counted);
  }
  if (splits > 1) {
    float* const of_head = parts_of_heads + static_cast<int64_t>(head) * splits * kPart;
    if (thread < kDim) {
      of_head[rank * kPart + thread] = all;
      if (thread == 0) {
        of_head[rank * kPart + kDim] = most;
        of_head[rank * kPart + kDim + 1] = counted;
      }
    }
    __syncthreads();
    if (thread == 0) {
      is_last_part = add(heads_done + head, 1) % splits == static_cast<unsigned>(splits - 1);
    }
    __syncthreads();
    if (!is_last_part) return;
    if (thread < kDim) {
      const auto of_block = [&](int i, int at) { return __ldcg(of_head + i * kPart + at); };
      combine.template operator()<kMaxSplits>(splits, of_block, all, most, counted);
    }
  }
  if (thread < kDim) attended[head * kDim + thread] = from_float<T>(__fdiv_rn(all, counted));
}

}  // namespace bitinfer::cuda
