// sign_gemm for every problem on every GPU from sm_80 on. Without the norm: the caller then passes a float32 y and no
// bias, and applies both.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

// Bytes of device memory, aligned to 256, that sign_gemm_tiled uses on the stream.
size_t sign_gemm_tiled_workspace(const SignGemm& problem);

cudaError_t sign_gemm_tiled(const SignGemm& problem, void* workspace, const Launch& on);

}  // namespace bitinfer::cuda
