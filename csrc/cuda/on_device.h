// The torch side of every CUDA op: the device and its stream, errors, and products as ops.cpp runs them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <optional>

#include "../checked_tensors.h"
#include "launch.h"
#include "pack_activations.h"
#include "select.h"

// torch's headers declare it only where they are compiled for CUDA
#ifndef USE_CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace bitinfer::cuda {

inline constexpr int kMaxDevices = 64;

inline void check(const Call& call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next call would find it
  STD_TORCH_CHECK(false, call.op, ": CUDA says: ", cudaGetErrorString(error));
}

inline const Device& device_of(const Call& call, int32_t index) {
  static std::once_flag asked[kMaxDevices];
  static Device devices[kMaxDevices];
  STD_TORCH_CHECK(index >= 0 && index < kMaxDevices, call.op, ": GPU index ", index, " is past ", kMaxDevices - 1);
  std::call_once(asked[index], [&] {
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      check(call, cudaDeviceGetAttribute(&value, name, index));
      return value;
    };
    devices[index] = {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  return devices[index];
}

// A call on the device of a tensor, current while this lives, and torch's stream there.
struct OnDevice {
  Call call;
  torch::stable::accelerator::DeviceGuard guard;
  Launch launch;

  OnDevice(const char* op, const Tensor& tensor, bool settled = true)
      : call{op, aoti_torch_device_type_cuda(), tensor.get_device_index()}, guard(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.device_index, &stream));
    launch = {static_cast<cudaStream_t>(stream), device_of(call, call.device_index), settled};
  }

  // Memory for as long as the tensor lives, and afterwards until the stream has got so far.
  Tensor bytes(int64_t count) const { return empty(call, {count}, ScalarType::Byte); }
};

// Runs multiply(problem), with the LayerNorm behind it if there is one: its statistics need all outputs of a token, so
// these wait in float32.
template <typename Problem, typename Multiply>
void with_norm(const OnDevice& on, Problem problem, std::optional<double> norm_eps, Multiply multiply) {
  if (!norm_eps) return multiply(problem);
  const int64_t n = problem.weight.n;
  Tensor sums = empty(on.call, {problem.m, n}, ScalarType::Float);
  const LayerNorm norm{static_cast<const float*>(sums.const_data_ptr()), n, *norm_eps, problem.weight.bias, problem.y};
  problem.y = {sums.mutable_data_ptr(), Dtype::kFloat32, n};
  problem.weight.bias = {};
  multiply(problem);
  check(on.call, layer_norm(norm, problem.m, on.launch));
}

// What select.h names, or BITINFER_CUDA_KERNEL; an error if that does not take the problem.
Kernel kernel_for(const OnDevice& on, const PopcountGemm& problem);
Kernel kernel_for(const OnDevice& on, const SignGemm& problem);

// Run by that kernel, the LayerNorm behind it included.
void multiply(const OnDevice& on, const PopcountGemm& problem, std::optional<double> norm_eps);
void multiply(const OnDevice& on, const SignGemm& problem, std::optional<double> norm_eps);

}  // namespace bitinfer::cuda
