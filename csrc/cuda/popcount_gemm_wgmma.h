// popcount_gemm for batches and prefill, on the binary tensor cores of Hopper (sm_90a).
#pragma once

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// One weight plane, one segment, rows of words and of outputs that the copy engine takes: K % 128 == 0, 16-byte
// aligned.
bool popcount_gemm_wgmma_takes(const PopcountGemm& p, const Device& device);

cudaError_t popcount_gemm_wgmma(const PopcountGemm& p, const Launch& on);

// The part of y that a block computes at a time: 64 * warpgroups rows of the weight by columns / bits tokens.
struct WgmmaTile {
  int warpgroups, columns;

  friend bool operator==(const WgmmaTile&, const WgmmaTile&) = default;
};

// The tile that popcount_gemm_wgmma takes.
WgmmaTile choose_wgmma_tile(const PopcountGemm& p, const Device& device);

}  // namespace bitinfer::cuda
