// popcount_gemm for every problem on every GPU from sm_80 on. Without the norm: the caller then passes a float32 y and
// no bias, and applies both.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// With binary tensor cores: for GPUs whose Device::has_binary_mma() holds. Elsewhere these are emulated, slowly.
cudaError_t popcount_gemm_tiled(const PopcountGemm& problem, const Launch& on);

// With int8 tensor cores.
cudaError_t popcount_gemm_int8(const PopcountGemm& problem, const Launch& on);

}  // namespace bitinfer::cuda
