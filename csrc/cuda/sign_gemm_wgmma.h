// sign_gemm on Hopper's tensor cores, for batches and prefill; see sign_gemm_wgmma.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// Whether the kernels run this problem: float16 or bfloat16 x, one plane, rows of words that TMA can read, groups of a
// multiple of 128 columns, no group_shift, y in the dtype of x or float32, in_scale in the dtype of x and without
// groups.
bool sign_gemm_wgmma_takes(const SignGemm& problem, const Device& device);

// Bytes that the caller provides, aligned to 256: 0 if x is read as it is.
size_t sign_gemm_wgmma_workspace(const SignGemm& problem);

cudaError_t sign_gemm_wgmma(const SignGemm& problem, void* workspace, const Launch& on);

}  // namespace bitinfer::cuda
