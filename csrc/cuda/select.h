// Which kernel runs a problem: pure functions of the problem, the device and what BITINFER_CUDA_KERNEL forces.
#pragma once

#include <optional>
#include <string_view>

#include "../problem.h"
#include "gemm_decode.h"
#include "launch.h"

namespace bitinfer::cuda {

// The first three, gemm_decode.cu, gemm_decode_grouped.cu and sign_gemm_decode.cu, are all called "decode".
enum class Kernel { kDecode, kGrouped, kSignDecode, kWgmma, kTiled, kInt8 };

const char* kernel_name(Kernel kernel);

// The kernel for a problem, or the one that `forced` names ("decode", "wgmma", "tiled", "int8"; empty: none): nothing
// if that one does not take the problem.
std::optional<Kernel> select_kernel(const PopcountGemm& problem, const Device& device, std::string_view forced);
std::optional<Kernel> select_kernel(const SignGemm& problem, const Device& device, std::string_view forced);

// The multiplication of a sign_gemm whose activations are in fixed point, without what packing fills in.
FixedPointGemm as_fixed_point(const SignGemm& problem);

}  // namespace bitinfer::cuda
