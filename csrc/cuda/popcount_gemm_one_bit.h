// popcount_gemm of one-bit activations at prefill, on the binary tensor cores of Hopper (sm_90a).
#pragma once

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// Of what popcount_gemm_wgmma_takes: one bit, 16-bit outputs, and a tile of 128 rows by 256 tokens for every
// multiprocessor.
bool popcount_gemm_one_bit_takes(const PopcountGemm& p, const Device& device);

cudaError_t popcount_gemm_one_bit(const PopcountGemm& p, const Launch& on);

}  // namespace bitinfer::cuda
