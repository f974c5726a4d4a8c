// Attention of the new token by the blocks of decode_token.cu, one head or a part of its slots each: rotary embedding,
// cache and softmax as in decode_attention.cu. Blocks of a head send each other their parts, and each of them combines
// some columns.
#pragma once

#include "attention_row.cuh"
#include "cache_row.cuh"
#include "token_exchange.cuh"

namespace bitinfer::cuda {

constexpr int kMaxSplits = 8;

constexpr int part_size(int dim) { return dim + 4; }  // floats: sum of p * v, largest score, sum of p

// A float on its way to the other blocks of a head, with a tag above it.
__device__ __forceinline__ void send_part(uint64_t* to, float value, uint32_t tag) {
  const uint64_t word = static_cast<uint64_t>(tag) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ uint64_t poll_part(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

// The numbers of a row that a lane of a warp has, l, l + 32, ...
template <typename T, int kDim>
__device__ __forceinline__ void receive_lanes(Row<T, kDim>& row, const uint32_t* from, int lane, uint32_t tag) {
  uint32_t words[kDim / 32], wrong;
  do {
    wrong = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[i]) : "l"(from + lane + 32 * i) : "memory");
      wrong |= words[i] ^ tag;
    }
  } while (wrong >> 16 != 0);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const auto bits = static_cast<unsigned short>(words[i]);
    row.x[i] = to_float(reinterpret_cast<const T&>(bits));
  }
}

// Eight floats at a multiple of 16 bytes.
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// What parts of a softmax make together: of each the sum of a column of values, the largest score and the total weight.
template <int kCount>
__device__ __forceinline__ void combine(const float (&sums)[kCount], const float (&largest_of)[kCount],
                                        const float (&totals)[kCount], float& sum, float& largest, float& total) {
  // in four chains, since each step waits for the one before
  float highest[4] = {largest_of[0], largest_of[1], largest_of[2], largest_of[3]}, of_sum[4] = {}, of_total[4] = {};
#pragma unroll
  for (int i = 4; i < kCount; ++i) highest[i % 4] = fmaxf(highest[i % 4], largest_of[i]);
  largest = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float shrink = exp2_fast(largest_of[i] - largest);
    of_total[i % 4] += shrink * totals[i];
    of_sum[i % 4] += shrink * sums[i];
  }
  total = (of_total[0] + of_total[1]) + (of_total[2] + of_total[3]);
  sum = (of_sum[0] + of_sum[1]) + (of_sum[2] + of_sum[3]);
}

// Receives q, k and v and sends what it attends to, all of them [heads, kDim]; for blocks that have a head. Keys and
// values of the first slots are in shared memory, `there` of them; `query` is shared memory for it, the new key and the
// parts of all warps.
template <typename T, int kDim, int kBits>
__device__ __forceinline__ void attend(const DecodeToken& p, const TokenLayer& l, const AttentionShare& share,
                                       const uint32_t* q, const uint32_t* k, const uint32_t* v, uint32_t* attended,
                                       unsigned char* keys, unsigned char* values, uint32_t keys_there,
                                       uint32_t values_there, int there, float* query, uint64_t* parts_of_heads,
                                       uint32_t tag) {
  constexpr int kLanes = kDim / kOctet, kSlotsOfLoad = 32 / kLanes, kStep = kWarps * kSlotsOfLoad;
  constexpr int kColumns = kDim / 32, kPart = part_size(kDim), kRow = cache_row_bytes(kDim, kBits);
  constexpr int kUnroll = kDim / 32;  // slots that a lane has under way
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int head = share.head, rank = share.rank, splits = share.splits, begin = share.begin, end = share.end;
  const int column = lane % kLanes * kOctet, lane_slot = warp * kSlotsOfLoad + lane / kLanes;
  float *const new_key = query + kDim, *const parts = new_key + kDim;
  float cos[kColumns], sin[kColumns], weight[kColumns];
  const void* const norm = warp == 0 ? l.q_norm : l.k_norm;
  if (warp < 2) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t at = static_cast<int64_t>(share.slot) * kDim + lane + 32 * i;
      cos[i] = load_number(static_cast<const T*>(p.cos) + at);
      sin[i] = load_number(static_cast<const T*>(p.sin) + at);
      weight[i] = norm != nullptr ? load_number(static_cast<const T*>(norm) + lane + 32 * i) : 1;
    }
  }
  const bool has_new = rank == 0 && warp == 2 && lane < kLanes;
  uint4 new_value[1] = {};
  if (has_new) {
    const int columns[1] = {column};
    receive(v + head * kDim, columns, kDim, tag, new_value);
    unsigned char* const stored = values + static_cast<int64_t>(share.slot) * kRow;
    if constexpr (kBits == 16) {
      *reinterpret_cast<uint4*>(stored + 2 * column) = new_value[0];
    } else {
      float value[kOctet];
      unpack<T>(new_value[0], value);
      store_cache_octet<kBits, kDim>(stored, column, value, (1u << kLanes) - 1);
    }
  }
  if (warp < 2) {
    Row<T, kDim> row;
    receive_lanes(row, (warp == 0 ? q : k) + head * kDim, lane, tag);
    if (norm != nullptr) row.normalise(weight, warp == 0 ? l.q_eps : l.k_eps);
    row.rotate(cos, sin);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int at = lane + 32 * i;
      (warp == 0 ? query : new_key)[at] = warp == 0 ? row.x[i] * (p.scaling * kLog2E) : row.x[i];
    }
    if (warp == 1 && rank == 0) {
      unsigned char* const stored = keys + static_cast<int64_t>(share.slot) * kRow;
      if constexpr (kBits == 16) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) reinterpret_cast<T*>(stored)[lane + 32 * i] = from_float<T>(row.x[i]);
      } else {
        store_cache_row<kBits, kDim>(stored, row.x, lane);
      }
    }
  }
  sync_threads();
  // every lane starts from the new slot's score as the largest; one set of lanes counts that slot
  float at_query[kOctet], at_key[kOctet], sum[kOctet], largest = 0, total = has_new ? 1 : 0;
  unpack<T>(new_value[0], sum);
  load_floats(query + column, at_query);
  load_floats(new_key + column, at_key);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) largest += at_query[j] * at_key[j];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    largest += __shfl_xor_sync(kAllLanes, largest, distance);
  }
  using Octet = CacheOctet<kBits, kDim>;
  const auto take = [&](const Octet(&k_raw)[kUnroll], const Octet(&v_raw)[kUnroll], int left) {
    float score[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[kOctet];
      k_raw[u].template unpack<T>(key);
      score[u] = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) score[u] += at_query[j] * key[j];
      if (kBits < 16) score[u] *= k_raw[u].scale();
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) score[u] += __shfl_xor_sync(kAllLanes, score[u], distance);
    }
    float highest = largest;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * kStep >= left) score[u] = -INFINITY;
      highest = fmaxf(highest, score[u]);
    }
    const float shrink = exp2_fast(largest - highest);
    largest = highest;
    total *= shrink;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) sum[j] *= shrink;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float weight_of_slot = exp2_fast(score[u] - highest);
      total += weight_of_slot;
      if (kBits < 16) weight_of_slot *= v_raw[u].scale();
      float value[kOctet];
      v_raw[u].template unpack<T>(value);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum[j] += weight_of_slot * value[j];
    }
  };
  // loads past the last slot repeat it
  Octet k_raw[kUnroll], v_raw[kUnroll];
  for (int at = 0; at < there; at += kUnroll * kStep) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t row = min(at + u * kStep + lane_slot, there - 1) * kRow;
      k_raw[u].load_shared(keys_there + row, column);
      v_raw[u].load_shared(values_there + row, column);
    }
    take(k_raw, v_raw, there - at - lane_slot);
  }
  for (int at = begin + there; at < end; at += kUnroll * kStep) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = static_cast<int64_t>(min(at + u * kStep + lane_slot, end - 1)) * kRow;
      k_raw[u].load(keys + row, column);
      v_raw[u].load(values + row, column);
    }
    take(k_raw, v_raw, end - at - lane_slot);
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
  sync_threads();
  float all = 0, most = 0, counted = 1;
  if (thread < kDim) {
    float sums[kWarps], largest_of[kWarps], totals[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float* const of_warp = parts + i * kPart;
      sums[i] = of_warp[thread], largest_of[i] = of_warp[kDim], totals[i] = of_warp[kDim + 1];
    }
    combine(sums, largest_of, totals, all, most, counted);
  }
  if (splits == 1) {
    if (thread < kDim) send<T>(attended + head * kDim + thread, __fdiv_rn(all, counted), tag);
    return;
  }
  uint64_t* const of_head = parts_of_heads + static_cast<int64_t>(head) * splits * kPart;
  if (thread < kDim) {
    send_part(of_head + rank * kPart + thread, all, tag);
    if (thread == 0) send_part(of_head + rank * kPart + kDim, most, tag);
    if (thread == 1) send_part(of_head + rank * kPart + kDim + 1, counted, tag);
  }
  if (thread >= kDim / splits) return;
  const int combined = rank * (kDim / splits) + thread;
  float sums[kMaxSplits], largest_of[kMaxSplits], totals[kMaxSplits];
  bool complete;
  do {
    complete = true;
    const auto poll = [&](const uint64_t* from) {
      const uint64_t word = poll_part(from);
      complete = complete && static_cast<uint32_t>(word >> 32) == tag;
      return __uint_as_float(static_cast<uint32_t>(word));
    };
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {  // all under way at once: those that are not there repeat the last
      const uint64_t* const of_block = of_head + min(i, splits - 1) * kPart;
      sums[i] = poll(of_block + combined), largest_of[i] = poll(of_block + kDim), totals[i] = poll(of_block + kDim + 1);
    }
  } while (!complete);
#pragma unroll
  for (int i = 1; i < kMaxSplits; ++i) {
    if (i >= splits) largest_of[i] = -INFINITY;
  }
  combine(sums, largest_of, totals, all, most, counted);
  send<T>(attended + head * kDim + combined, __fdiv_rn(all, counted), tag);
}

}  // namespace bitinfer::cuda
