// How kernels are launched: the device that a launcher plans for, and programmatic dependent launch. No torch here.
//
// Programmatic dependent launch (sm_90 and later): a kernel launched with `overlap` may start before the kernel ahead
// of it in the stream has finished. It then must call wait_for_previous_kernel() before it touches anything that an
// earlier kernel may have written. The products read packed weights before that, so they are launched this way only
// where the weights are known to be settled: a block's exit, which lets the next kernel start, does not yet show what
// it wrote.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace bitinfer::cuda {

// What launch heuristics know of a device. A plain value, so that they are pure functions and can be tested anywhere.
struct Device {
  int architecture = 0;      // 10 * major + minor: 90 on H200
  int multiprocessors = 0;   // 132 on H200
  int shared_bytes = 0;      // that one block may have: 232,448 on H200
  int shared_bytes_all = 0;  // of a multiprocessor, shared by its blocks: 233,472 on H200

  bool has_binary_mma() const { return architecture >= 80 && architecture <= 90; }
  bool has_wgmma() const { return architecture == 90; }
};

struct Launch {
  cudaStream_t stream = nullptr;
  Device device = {};
  bool settled = true;  // no kernel still under way writes weights or what belongs to them
};

// Launches kernel(args...); with `overlap` it may begin before the previous kernel of the stream ends.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& on, dim3 grid, dim3 block, size_t shared_bytes,
                   bool overlap, Arguments&&... arguments) {
  // more than 48 KB in all must be asked for; up to 16 KB of them may be the kernel's static ones
  if (shared_bytes > 32 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = on.stream;
  config.attrs = &attribute;
  config.numAttrs = overlap && on.settled && on.device.architecture >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...);
}

}  // namespace bitinfer::cuda
