// pack_activations for aligned rows of 16-bit activations with one scale a token; pack_activations() chooses.
#pragma once

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

constexpr int64_t kMaxHalvesColumns = 16384;

// Whether the two kernels below take a problem: K % 128 == 0, 8, 4 or 2 bits, one segment, and all rows of columns of
// one 16-bit type at addresses that are multiples of 16.
bool is_halves(const PackActivations& problem);

// For a few tokens, where latency is all.
cudaError_t pack_activations_few(const PackActivations& problem, int64_t m, const Launch& on);

// For many, where memory and instructions are; m < 2^30.
cudaError_t pack_activations_batch(const PackActivations& problem, int64_t m, const Launch& on);

}  // namespace bitinfer::cuda
