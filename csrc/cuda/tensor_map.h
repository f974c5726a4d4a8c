// Descriptions of matrices for the tensor copy engine (TMA) of sm_90. No link to libcuda: the encoder is asked for at
// run time.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace bitinfer::cuda {

struct TensorMapAxis {
  int64_t size;    // elements
  int64_t stride;  // bytes from one index to the next, a multiple of 16; ignored for the innermost axis
  int box;         // elements copied at a time
};

// Describes a tensor of up to five axes, innermost first; the innermost box is as many bytes as the swizzle says.
// `data` must be aligned to 16 bytes. Boxes that reach outside read zeros and write nothing.
cudaError_t make_tensor_map(CUtensorMap& map, CUtensorMapDataType type, const void* data,
                            std::initializer_list<TensorMapAxis> axes,
                            CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);

}  // namespace bitinfer::cuda
