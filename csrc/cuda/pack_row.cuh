// The kernel that turns rows of activations into bit planes; pack_activations.cu, pack_fused.cu and pack_fixed_point.cu
// say where rows come from (a Source) and what integers they become (a Format).
//
//   z[t, k] = in_scale[k] * x[t, k];  planes[t, b, w] = bit b of q(z[t, 32*w ... 32*w + 31])
//   scale[t], sum[t, s] of q over segments of columns;  shift[t] = in_shift . x[t]
//
// Shapes: one token of a few thousand columns inside a chain of dependent kernels, where latency is all; thousands of
// tokens, where memory bounds it (x read once); and anything else. Mapping: a team (one block, or a cluster of up to
// eight for few tokens) makes one row; a warp takes 256 columns at a time, a lane eight of them, held in registers.
// An octet of integers becomes plane bytes by an 8 x 8 bit transposition in two registers (21 instructions), and four
// neighbouring lanes exchange bytes until each holds a word of one plane (8 instructions): about 4 instructions a
// column with nothing in shared memory, and stores that fill sectors. Column constants are loaded before the wait for
// the kernel ahead. Conversions to double are slow, 16 a cycle: for few tokens helper warps make the sum of in_shift
// beside the others; without helpers it is made while the parts of absmax are under way.
#pragma once

#include "octet.cuh"
#include "pack_activations.h"
#include "reduce.cuh"

namespace bitinfer::cuda {

// Threads of a block at most: registers for what they hold, or for the octets that a loop keeps under way.
constexpr int max_row_threads(int held) { return held == 1 ? 1024 : held == 2 ? 768 : 512; }

// How one row, or one block of its columns, becomes integers.
struct Quantiser {
  float scale = 0, factor = 0;
  bool zero = true;  // all integers are zeros
};

constexpr uint32_t kInfinityBits = 0x7f800000u, kNaNBits = 0x7fc00000u;
constexpr float kSmallestAbsmax = 0x1p-96f;  // smaller rows become zeros: factors must stay finite

// The larger magnitude; NaN if one is.
__device__ __forceinline__ float max_magnitude(float largest, float value) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(fabsf(value)));
  return largest;
}

// Writes words of the first `count` planes that byte c of (low, high), the integer of column c of the octet, holds.
__device__ __forceinline__ void store_planes(uint32_t low, uint32_t high, int count, uint32_t* planes, int words,
                                             int column) {
  transpose_bits(low, high);
  const int plane = static_cast<int>(threadIdx.x) % 4, word = column / 32;
  uint32_t* target = planes + static_cast<int64_t>(plane) * words + word;
  low = transpose_bytes(low);
  if (word < words && plane < count) target[0] = low;
  if (count > 4) {
    high = transpose_bytes(high);
    if (word < words) target[static_cast<int64_t>(words) * 4] = high;
  }
}

// Adds the sum over an octet to that of its segment. Segments that divide a chunk stay within a warp; the others are
// `added` in memory, which holds zeros, 32 columns at a time; segment 0 is the whole row.
template <typename Sum>
__device__ __forceinline__ void add_to_segments(int sum, int segment, bool added, int column, int k, Sum* segments,
                                                Sum& total) {
  if (segment == 0) {
    total += __reduce_add_sync(kAllLanes, sum);
    return;
  }
  const unsigned lanes = added ? 4 : static_cast<unsigned>(segment) / kOctet;
  for (unsigned distance = 1; distance < lanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (threadIdx.x % 32 & (lanes - 1) || column >= k) return;
  if (!added) {
    segments[column >> (__ffs(segment) - 1)] = sum;
    return;
  }
  Sum* target = segments + static_cast<unsigned>(column) / static_cast<unsigned>(segment);
  if constexpr (sizeof(Sum) == 8) {
    atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(Sum{sum}));
  } else {
    atomicAdd(target, sum);
  }
}

// kWide: more than 64 registers hold two octets. Source: Weights, Raw; weights(column, k), fetch(row,
// column, k), values(raw, x), and if it kNormalises also keep(row, column, k, x), eps and normalise(weights, factor,
// x). Format: Sum; k, in_scale, in_shift, planes, scale, sum, shift; row_bits, segment(), takes_mean(), has_blocks(),
// from_largest(bits), from_mean(total, count), store(row, column, z, quantiser) -> sum of the octet.
template <class Source, class Format, int kHeld>
__global__ void __launch_bounds__(kHeld == 2 && !Source::kWide && !Format::kWide ? 1024 : max_row_threads(kHeld))
    pack_row_kernel(const __grid_constant__ Source source, const __grid_constant__ Format format, int row_warps) {
  using Sum = typename Format::Sum;
  __shared__ struct {
    Parts<float> squares;
    Parts<uint32_t> largest;
    Parts<double> magnitudes, shifts;
    Parts<Sum> totals;
    uint64_t barriers[kExchanges];
  } parts;
  constexpr int kNorm = 0, kScale = 1, kEnd = 2;  // exchanges
  constexpr int kSlots = kHeld > 0 ? kHeld : 1;
  constexpr bool kEarly = kHeld == 1;  // registers are left for constants loaded before the wait
  const Team team(row_warps, parts.barriers);
  allow_next_kernel();
  const bool has_helpers = row_warps * 32 < static_cast<int>(blockDim.x);
  const bool shifts = format.in_shift && team.helps == has_helpers;
  const int64_t row = blockIdx.x / static_cast<unsigned>(team.blocks);
  const int k = static_cast<int>(format.k), chunks = (k + kChunk - 1) / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % 32, octet = lane * kOctet;
  const int segment = format.segment(), segments = static_cast<int>(group_count(k, segment));
  const bool segments_are_added = segment != 0 && kChunk % segment != 0;
  const int first_column = team.warp * kChunk + octet, column_step = team.warps * kChunk;

  const int totals_bytes = segment == 0 ? sizeof(Sum) : 0, shifts_bytes = format.in_shift ? sizeof(double) : 0;
  team.start({static_cast<int>(team.warps * sizeof(float)), team.warps * (format.takes_mean() ? 8 : 4),
              team.warps * (totals_bytes + shifts_bytes)});
  typename Source::Weights weights[kSlots];
  Octet in_scale[kSlots], in_shift[kSlots];
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = first_column + i * column_step;
      if (kEarly) weights[i] = source.weights(column, k);
      if (format.in_scale) in_scale[i] = load_octet<true>(format.in_scale, column, k);
      if (kEarly && shifts) in_shift[i] = load_octet<true>(format.in_shift, column, k);
    }
  }
  team.wait_for_start();
  wait_for_previous_kernel();

  float x[kSlots][kOctet], z[kSlots][kOctet];
  if constexpr (kHeld > 0) {
    typename Source::Raw raw[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) raw[i] = source.fetch(row, first_column + i * column_step, k);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) source.values(raw[i], x[i]);
  }

  // body(column, x, z, in_shift) for the octets of this thread, the warp being together; before the norm, or after it
  float norm_factor = 0;
  const auto scale_columns = [&](const Octet& scales, const float (&from)[kOctet], float (&to)[kOctet]) {
    float factors[kOctet];
    if (format.in_scale) to_floats(scales, format.in_scale.dtype, factors);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) to[j] = format.in_scale ? __fmul_rn(from[j], factors[j]) : from[j];
  };
  const auto each_octet = [&](bool normed, auto body) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int column = first_column + i * column_step;
        if (column - octet < k) body(column, x[i], z[i], in_shift[i]);
      }
    } else {
      for (int64_t at = first_column; at - octet < k; at += column_step) {
        const int column = static_cast<int>(at);
        float values[kOctet], scaled[kOctet];
        source.values(source.fetch(row, column, k), values);
        if constexpr (Source::kNormalises) {
          if (normed) source.normalise(source.weights(column, k), norm_factor, values);
        }
        scale_columns(format.in_scale ? load_octet<true>(format.in_scale, column, k) : Octet{}, values, scaled);
        const Octet shifts_here = shifts ? load_octet<true>(format.in_shift, column, k) : Octet{};
        body(column, values, scaled, shifts_here);
      }
    }
  };

  if constexpr (Source::kNormalises) {
    float squares = 0;
    each_octet(false, [&](int, const float (&values)[kOctet], const auto&, const auto&) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) squares += values[j] * values[j];
    });
    // helpers publish if there are some: the rows may be written to only after they, too, have read them
    squares = warp_sum(squares);
    if (team.helps || !has_helpers) team.publish(kNorm, parts.squares, squares);
    team.settle(kNorm, static_cast<int>(blockDim.x));
    if constexpr (kHeld > 0) {
      if (!team.helps) {
        each_octet(false, [&](int column, const float (&values)[kOctet], const auto&, const auto&) {
          source.keep(row, column, k, values);
        });
      }
    }
    norm_factor = rsqrtf(sum_of(parts.squares, team.warps) / static_cast<float>(k) + source.eps);
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (!kEarly) weights[i] = source.weights(first_column + i * column_step, k);
        source.normalise(weights[i], norm_factor, x[i]);
      }
    }
  }

  double shift = 0;
  const auto add_shift = [&](const float (&values)[kOctet], const Octet& shifts_here) {
    float factors[kOctet];
    to_floats(shifts_here, format.in_shift.dtype, factors);
#pragma unroll
    for (int j = 0; j < kOctet; ++j)
      shift = fma(static_cast<double>(values[j]), static_cast<double>(factors[j]), shift);
  };
  const bool add_shift_now = kHeld == 0 && shifts;  // while the values are there
  if constexpr (kHeld > 0) {
    if (!kEarly && shifts) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        add_shift(x[i], load_octet<true>(format.in_shift, first_column + i * column_step, k));
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) scale_columns(in_scale[i], x[i], z[i]);
  }

  // the scale of the row, unless each chunk is a block with its own
  Quantiser quantiser;
  if (!format.has_blocks() && !team.helps) {
    if (segments_are_added) {
#pragma unroll 1
      for (int s = team.warp * 32 + lane; s < segments; s += team.warps * 32) format.sum[row * segments + s] = 0;
    }
    float largest = 0;
    double magnitudes = 0;
    each_octet(true, [&](int, const float (&values)[kOctet], const float (&scaled)[kOctet], const Octet& shifts_here) {
      if (format.takes_mean()) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) magnitudes += static_cast<double>(fabsf(scaled[j]));
      } else {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) largest = max_magnitude(largest, scaled[j]);
      }
      if (add_shift_now) add_shift(values, shifts_here);
    });
    if (format.takes_mean()) {
      team.publish(kScale, parts.magnitudes, warp_sum(magnitudes));
    } else {
      team.publish(kScale, parts.largest, __reduce_max_sync(kAllLanes, __float_as_uint(largest)));
    }
  }
  if (kEarly && shifts) {
    each_octet(true, [&](int, const float (&values)[kOctet], const auto&, const Octet& shifts_here) {
      add_shift(values, shifts_here);
    });
    shift = warp_sum(shift);
  }
  if (segments_are_added) team.order_memory();
  if (!format.has_blocks() && !team.helps) {
    team.settle(kScale, row_warps * 32);
    quantiser = format.takes_mean() ? format.from_mean(sum_of(parts.magnitudes, team.warps), k)
                                    : format.from_largest(max_of(parts.largest, team.warps));
    if (team.warp == 0 && lane == 0) format.scale[row] = quantiser.scale;
  }

  Sum total = 0;
  const auto quantise = [&](int column, const float (&values)[kOctet], const float (&scaled)[kOctet],
                            const Octet& shifts_here) {
    if (format.has_blocks()) {
      if (format.takes_mean()) {
        double magnitudes = 0;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) magnitudes += static_cast<double>(fabsf(scaled[j]));
        quantiser = format.from_mean(warp_sum(magnitudes), min(kChunk, k - (column - octet)));
      } else {
        float largest = 0;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) largest = max_magnitude(largest, scaled[j]);
        quantiser = format.from_largest(__reduce_max_sync(kAllLanes, __float_as_uint(largest)));
      }
      if (lane == 0) format.scale[row * chunks + column / kChunk] = quantiser.scale;
      if (add_shift_now) add_shift(values, shifts_here);
    }
    const int sum = format.store(row, column, scaled, quantiser);
    add_to_segments(sum, segment, segments_are_added, column, k, format.sum + row * segments, total);
    if constexpr (Source::kNormalises && kHeld == 0) {
      float before[kOctet];
      source.values(source.fetch(row, column, k), before);
      source.keep(row, column, k, before);
    }
  };
  if (!team.helps) each_octet(true, quantise);

  if (segment != 0 && !format.in_shift) return;
  if (!kEarly) shift = warp_sum(shift);
  if (segment == 0 && !team.helps) team.publish_to_first(kEnd, parts.totals, total);
  if (shifts) team.publish_to_first(kEnd, parts.shifts, shift);
  if (team.rank != 0) return;
  team.settle(kEnd, static_cast<int>(blockDim.x));
  if (team.warp != 0) return;
  if (segment == 0 && !team.helps) {
    total = sum_of(parts.totals, team.warps);
    if (lane == 0) format.sum[row] = total;
  }
  if (shifts) {
    shift = sum_of(parts.shifts, team.warps);
    if (lane == 0) format.shift[row] = static_cast<float>(shift);
  }
}

// Launches kernel(arguments...) over m teams of the plan, in the shadow of the kernel ahead.
template <typename... Parameters>
cudaError_t launch_teams(void (*kernel)(Parameters...), const Launch& on, int64_t m, const RowPlan& plan,
                         const Parameters&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(m * plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = on.device.architecture < 90 ? 0 : on.settled ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Source, class Format>
cudaError_t launch_pack_row(const Source& source, const Format& format, int64_t m, const Launch& on,
                            const RowPlan* plan) {
  if (m == 0) return cudaSuccess;
  RowPlan chosen = plan ? *plan : plan_rows(m, format.k, on.device);
  const int row_warps = chosen.threads / 32;
  if (chosen.helpers && format.in_shift) chosen.threads *= 2;
  const auto kernel = chosen.held == 1   ? pack_row_kernel<Source, Format, 1>
                      : chosen.held == 2 ? pack_row_kernel<Source, Format, 2>
                                         : pack_row_kernel<Source, Format, 0>;
  return launch_teams(kernel, on, m, chosen, source, format, row_warps);
}

// Rows of a matrix of one of the three types.
template <Dtype kDtype>
struct MatrixRows {
  static constexpr bool kNormalises = false, kWide = false;
  struct Weights {};
  using Raw = Octet;

  const void* x;
  int64_t stride;

  __device__ Weights weights(int, int) const { return {}; }
  __device__ Raw fetch(int64_t row, int column, int k) const {
    return load_octet<false>(row_of(x, kDtype, row, stride), column, k);
  }
  __device__ void values(const Raw& raw, float (&x)[kOctet]) const { to_floats(raw, kDtype, x); }
};

// Calls function.operator()<dtype>() with the dtype as a constant.
template <typename Function>
auto with_dtype(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat16:
      return function.template operator()<Dtype::kFloat16>();
    case Dtype::kBFloat16:
      return function.template operator()<Dtype::kBFloat16>();
    default:
      return function.template operator()<Dtype::kFloat32>();
  }
}

}  // namespace bitinfer::cuda
