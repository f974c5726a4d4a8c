// planes, scale, sum, shift of z[t, k] = in_scale[k] * x[t, k], x [M, K] of any float type, as bitinfer.ops documents.
//
// Any shape; how rows map to blocks and what bounds them: pack_row.cuh. Aligned rows of 16-bit activations with one
// scale have kernels of their own (pack_halves.h): one for as many tokens as have a multiprocessor for each of their
// blocks, one for more. The plan of a row, which all kernels over rows share, is made here: few tokens spread over
// clusters, since a multiprocessor's issue slots are the longest part of one token's way; many tokens take one block
// each, small enough that several rows are under way on a multiprocessor.
#include "integer_format.cuh"
#include "pack_halves.h"

namespace bitinfer::cuda {

RowPlan plan_rows_over(int64_t k, int blocks, int held) {
  const int64_t chunks = k > 0 ? (k + kChunk - 1) / kChunk : 1, chunks_here = (chunks + blocks - 1) / blocks;
  for (; held > 0 && held <= 2; ++held) {
    const int64_t threads = (chunks_here + held - 1) / held * 32;
    if (threads <= max_row_threads(held)) return {blocks, static_cast<int>(threads), held};
  }
  return {blocks, max_row_threads(0), 0};
}

RowPlan plan_rows(int64_t m, int64_t k, const Device& device) {
  if (device.architecture < 90) return plan_rows_over(k, 1, 2);
  if (m * kMaxTeamBlocks > device.multiprocessors) {
    RowPlan plan = plan_rows_over(k, 1, 2);
    while (plan.held == 0 && plan.blocks < kMaxTeamBlocks) plan = plan_rows_over(k, 2 * plan.blocks, 2);
    return plan;
  }
  constexpr int64_t kWarpsOfBlock = 4;  // one for each scheduler
  int blocks = 1;
  while (blocks < kMaxTeamBlocks && k > blocks * kWarpsOfBlock * kChunk) blocks *= 2;
  RowPlan plan = plan_rows_over(k, blocks, 1);
  plan.helpers = plan.held == 1 && 2 * plan.threads <= max_row_threads(1);
  return plan;
}

bool is_halves(const PackActivations& p) {
  const auto is_aligned = [](const void* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; };
  const auto fits = [&](const Floats& columns) {
    return !columns || (columns.dtype == p.x.dtype && is_aligned(columns.data));
  };
  return p.x.dtype != Dtype::kFloat32 && is_aligned(p.x.data) && p.stride % 8 == 0 && p.k > 0 && p.k % 128 == 0 &&
         p.k <= kMaxHalvesColumns && p.bits > 1 && segment_size(p.block_size, p.group_size) == 0 && fits(p.in_scale) &&
         fits(p.in_shift);
}

cudaError_t pack_activations(const PackActivations& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  if (plan == nullptr && m > 0 && m < INT64_C(1) << 30 && is_halves(problem)) {
    constexpr int kBlocksOfToken = 5;
    return m * kBlocksOfToken <= on.device.multiprocessors ? pack_activations_few(problem, m, on)
                                                           : pack_activations_batch(problem, m, on);
  }
  return with_dtype(problem.x.dtype, [&]<Dtype kDtype>() {
    const MatrixRows<kDtype> rows{problem.x.data, problem.stride};
    return launch_pack_row(rows, IntegerFormat{problem}, m, on, plan);
  });
}

}  // namespace bitinfer::cuda
