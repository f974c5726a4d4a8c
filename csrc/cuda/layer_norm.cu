// y[t] = (a[t] - mean) / sqrt(variance + eps) + bias,  a float32 [M, N], y of any float type
//
// Statistics and the normalised value in double (two passes over registers), rounded to float32, then the bias added
// in float32, then one rounding to the type of y. For any shape: one token in a chain of dependent kernels (latency),
// thousands (memory, and the 16 conversions to double a multiprocessor makes in a cycle). Rows map to teams of blocks
// as in pack_row.cuh: a lane holds octets of columns.
#include "octet.cuh"
#include "pack_row.cuh"

namespace bitinfer::cuda {
namespace {

template <int kHeld>
__global__ void __launch_bounds__(max_row_threads(kHeld)) layer_norm_kernel(const __grid_constant__ LayerNorm problem) {
  __shared__ Parts<double> sums, squares;
  __shared__ uint64_t barriers[kExchanges];
  constexpr int kMean = 0, kVariance = 1;  // exchanges
  constexpr int kSlots = kHeld > 0 ? kHeld : 1;
  const Team team(static_cast<int>(blockDim.x) / 32, barriers);
  allow_next_kernel();
  const int64_t row = blockIdx.x / static_cast<unsigned>(team.blocks);
  const int n = static_cast<int>(problem.n), column_step = team.warps * kChunk;
  const int first_column = team.warp * kChunk + static_cast<int>(threadIdx.x) % 32 * kOctet;
  const bool biased = problem.bias.data != nullptr;
  const Floats a = row_of(problem.a, Dtype::kFloat32, row, n);

  const int bytes = team.warps * static_cast<int>(sizeof(double));
  team.start({bytes, bytes, 0});
  Octet bias[kSlots];
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (biased) bias[i] = load_octet<true>(problem.bias, first_column + i * column_step, n);
    }
  }
  team.wait_for_start();
  wait_for_previous_kernel();

  double values[kSlots][kOctet];
  const auto load = [&](int column, double (&to)[kOctet]) {
    const Octet octet = load_octet<false>(a, column, n);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) to[j] = static_cast<double>(__uint_as_float(octet.words[j]));
  };
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) load(first_column + i * column_step, values[i]);
  }
  const auto each_octet = [&](auto body) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) body(first_column + i * column_step, values[i], bias[i]);
    } else {
      for (int64_t at = first_column; at < n; at += column_step) {
        const int column = static_cast<int>(at);
        load(column, values[0]);
        body(column, values[0], biased ? load_octet<true>(problem.bias, column, n) : Octet{});
      }
    }
  };

  double sum = 0;
  each_octet([&](int, const double (&from)[kOctet], const Octet&) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) sum += from[j];
  });
  sum = warp_sum(sum);
  team.publish(kMean, sums, sum);
  team.settle(kMean, static_cast<int>(blockDim.x));
  const double mean = sum_of(sums, team.warps) / n;

  double square = 0;
  each_octet([&](int column, const double (&from)[kOctet], const Octet&) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) square += column + j < n ? (from[j] - mean) * (from[j] - mean) : 0;
  });
  team.publish(kVariance, squares, warp_sum(square));
  team.settle(kVariance, static_cast<int>(blockDim.x));
  const double factor = 1 / sqrt(sum_of(squares, team.warps) / n + problem.eps);

  const Dtype dtype = problem.y.dtype;
  auto* target =
      static_cast<unsigned char*>(problem.y.data) + row * problem.y.stride * (dtype == Dtype::kFloat32 ? 4 : 2);
  each_octet([&](int column, const double (&from)[kOctet], const Octet& added) {
    float results[kOctet], shifts[kOctet];
    if (biased) to_floats(added, problem.bias.dtype, shifts);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      results[j] = static_cast<float>((from[j] - mean) * factor);
      if (biased) results[j] = __fadd_rn(results[j], shifts[j]);
    }
    store_octet(target, dtype, column, n, results);
  });
}

}  // namespace

cudaError_t layer_norm(const LayerNorm& problem, int64_t m, const Launch& on, const RowPlan* plan) {
  if (m == 0 || problem.n == 0) return cudaSuccess;
  const RowPlan chosen = plan ? *plan : plan_rows(m, problem.n, on.device);
  const auto kernel = chosen.held == 1   ? layer_norm_kernel<1>
                      : chosen.held == 2 ? layer_norm_kernel<2>
                                         : layer_norm_kernel<0>;
  return launch_teams(kernel, on, m, chosen, problem);
}

}  // namespace bitinfer::cuda
