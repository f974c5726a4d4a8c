#include "tensor_map.h"

namespace bitinfer::cuda {
namespace {

using Encoder = decltype(&cuTensorMapEncodeTiled);

Encoder encoder() {
  static const Encoder found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(function)
                                                                         : nullptr;
  }();
  return found;
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, CUtensorMapDataType type, const void* data,
                            std::initializer_list<TensorMapAxis> axes, CUtensorMapSwizzle swizzle) {
  if (encoder() == nullptr) return cudaErrorNotSupported;
  cuuint64_t sizes[5]{}, strides[5]{};
  cuuint32_t box[5]{}, steps[5]{};
  cuuint32_t rank = 0;
  for (const TensorMapAxis& axis : axes) {
    sizes[rank] = static_cast<cuuint64_t>(axis.size);
    strides[rank] = static_cast<cuuint64_t>(axis.stride);
    box[rank] = static_cast<cuuint32_t>(axis.box);
    steps[rank++] = 1;
  }
  const CUresult result = encoder()(&map, type, rank, const_cast<void*>(data), sizes, strides + 1, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace bitinfer::cuda
