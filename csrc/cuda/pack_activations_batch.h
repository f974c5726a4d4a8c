// pack_activations for batches of 16-bit activations; pack_activations() asks and calls it.
#pragma once

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

bool pack_activations_batch_takes(const PackActivations& problem, int64_t m);
cudaError_t pack_activations_batch(const PackActivations& problem, int64_t m, const Launch& on);

}  // namespace bitinfer::cuda
