// A whole op on one table of kernels: passes over the tokens, their steps, and how each step spreads over threads.
// Free of torch, so that the torch library, the numpy module and the C++ tests run the same code.
#pragma once

#include <functional>
#include <optional>

#include "kernels.h"

namespace bitinfer::cpu {

// Calls body(begin, end) on pieces of [0, count), each of at least `grain` units but for the last, and waits for them.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t count, int64_t grain, const Body& body);

void serial(int64_t count, int64_t grain, const Body& body);

void pack_signs(const Kernels& kernels, const PackSigns& problem, int64_t rows, ParallelFor parallel_for);
void pack_activations(const Kernels& kernels, const PackActivations& problem, int64_t m, ParallelFor parallel_for);
void sign_gemm(const Kernels& kernels, const SignGemm& problem, std::optional<double> norm_eps,
               ParallelFor parallel_for);
void popcount_gemm(const Kernels& kernels, const PopcountGemm& problem, std::optional<double> norm_eps,
                   ParallelFor parallel_for);

}  // namespace bitinfer::cpu
