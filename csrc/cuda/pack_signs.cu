// words[r, w] = signs of x[r, 32*w ... 32*w + 31], x [rows, K] of any float type; bit = (x < 0), so zeros and NaN are
// 0.
//
// For whole weight matrices, bound by memory. Where rows follow one another without gaps they are taken as one long
// row. A block makes 1024 bytes of a row's words; a thread loads four octets of columns before it converts the first,
// and stores a byte for each, 32 neighbouring bytes a warp.
#include "octet.cuh"
#include "pack_row.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kThreads = 256, kOctets = 4, kBytesOfBlock = kThreads * kOctets;

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    pack_signs_kernel(const void* x, int64_t rows, int64_t k, int64_t stride, unsigned char* bytes, int64_t row_bytes) {
  wait_for_previous_kernel();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBytesOfBlock;
  const int count = static_cast<int>(min(row_bytes - first, static_cast<int64_t>(kBytesOfBlock)));
  const int columns =
      static_cast<int>(max(min(k - first * kOctet, static_cast<int64_t>(kBytesOfBlock * kOctet)), int64_t{0}));
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Floats part = row_of(x, kDtype, 1, row * stride + first * kOctet);
    Octet octets[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      octets[i] = load_octet<false>(part, (i * kThreads + static_cast<int>(threadIdx.x)) * kOctet, columns);
    }
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      float values[kOctet];
      to_floats(octets[i], kDtype, values);
      uint32_t signs = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) signs |= values[j] < 0 ? 1u << j : 0u;
      if (at < count) bytes[row * row_bytes + first + at] = static_cast<unsigned char>(signs);
    }
  }
}

}  // namespace

cudaError_t pack_signs(const PackSigns& problem, int64_t rows, const Launch& on) {
  int64_t k = problem.k;
  if (rows == 0 || k == 0) return cudaSuccess;
  if (problem.stride == k && k % kWordBits == 0) {
    k *= rows;
    rows = 1;
  }
  const int64_t row_bytes = words_per_row(k) * (kWordBits / 8),
                blocks = (row_bytes + kBytesOfBlock - 1) / kBytesOfBlock;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows < 65535 ? rows : 65535));
  return with_dtype(problem.x.dtype, [&]<Dtype kDtype>() {
    return launch(pack_signs_kernel<kDtype>, on, grid, dim3(kThreads), 0, true, problem.x.data, rows, k, problem.stride,
                  reinterpret_cast<unsigned char*>(problem.words), row_bytes);
  });
}

}  // namespace bitinfer::cuda
