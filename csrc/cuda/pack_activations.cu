// planes, scale, sum, shift of z[t, k] = in_scale[k] * x[t, k], x [M, K] of any float type, as bitinfer.ops documents.
//
// Any shape; how rows map to blocks and what bounds them: pack_row.cuh. The plan of a row, which all kernels over rows
// share, is made here: few tokens spread over clusters, since a multiprocessor's issue slots are the longest part of
// one token's way; many tokens take one block each, small enough that several rows are under way on a multiprocessor.
#include "integer_format.cuh"
#include "pack_activations_batch.h"

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

cudaError_t pack_activations(const PackActivations& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  if (plan == nullptr && pack_activations_batch_takes(problem, m)) return pack_activations_batch(problem, m, on);
  return with_dtype(problem.x.dtype, [&]<Dtype kDtype>() {
    const MatrixRows<kDtype> rows{problem.x.data, problem.stride};
    return launch_pack_row(rows, IntegerFormat{problem}, m, on, plan);
  });
}

}  // namespace bitinfer::cuda
