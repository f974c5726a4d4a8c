// sign_gemm for one token of 16-bit activations; see sign_gemm_decode.cu.
#pragma once

#include "gemm_decode.h"

namespace bitinfer::cuda {

DecodePlan sign_gemm_decode_plan(const SignGemm& problem, const Device& device);
cudaError_t sign_gemm_decode(const SignGemm& problem, const DecodePlan& plan, const Launch& on);

// Up to kMaxProducts products of the same x in one launch.
DecodePlan sign_gemm_decode_plan(std::span<const SignGemm> products, const Device& device);
cudaError_t sign_gemm_decode(std::span<const SignGemm> products, const DecodePlan& plan, const Launch& on);

}  // namespace bitinfer::cuda
