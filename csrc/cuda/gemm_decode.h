// The products for one or a few tokens on binary tensor cores (mma.sync b1).
#pragma once

#include <span>

#include "../problem.h"
#include "fixed_point.h"
#include "launch.h"

namespace bitinfer::cuda {

// How a problem is cut: a pure function of the problem and the device.
struct DecodePlan {
  int column_groups = 0;  // of 8 columns of the planes matrix; 0 if the kernel does not take the problem
  int rounds = 0;      // gemm_decode: chunks whose planes a warp holds at a time; grouped: warps that share the columns
  int tile_warps = 0;  // sets of warps, each with tiles of its own
  int blocks = 0;      // in the grid
  int tiles = 0;       // the most row tiles of one block
  int shared_bytes = 0;  // of a block

  explicit operator bool() const { return column_groups != 0; }
};

// gemm_decode.cu: one scale a row
DecodePlan popcount_gemm_decode_plan(const PopcountGemm& problem, const Device& device);
cudaError_t popcount_gemm_decode(const PopcountGemm& problem, const DecodePlan& plan, const Launch& on);
DecodePlan fixed_gemm_decode_plan(const FixedPointGemm& problem, const Device& device);
cudaError_t fixed_gemm_decode(const FixedPointGemm& problem, const DecodePlan& plan, const Launch& on);

// Up to three products of the same m, bits and k in one launch; int8 and int4.
inline constexpr int kMaxProducts = 3;
DecodePlan popcount_gemm_decode_plan(std::span<const PopcountGemm> products, const Device& device);
cudaError_t popcount_gemm_decode(std::span<const PopcountGemm> products, const DecodePlan& plan, const Launch& on);

// gemm_decode_grouped.cu: group scales, activation blocks, several planes of weights
DecodePlan popcount_gemm_decode_grouped_plan(const PopcountGemm& problem, const Device& device);
cudaError_t popcount_gemm_decode_grouped(const PopcountGemm& problem, const DecodePlan& plan, const Launch& on);
DecodePlan fixed_gemm_decode_grouped_plan(const FixedPointGemm& problem, const Device& device);
cudaError_t fixed_gemm_decode_grouped(const FixedPointGemm& problem, const DecodePlan& plan, const Launch& on);

}  // namespace bitinfer::cuda
