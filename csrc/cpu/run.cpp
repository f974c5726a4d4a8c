#include "run.h"

#include <algorithm>

#include "buffer.h"

namespace bitinfer::cpu {
namespace {

constexpr int64_t kGrain = 1 << 17;  // elementary steps (about 10 us) below which a thread is not worth waking

int64_t grain_for(int64_t steps_per_unit) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, steps_per_unit));
}

// The part of a problem that computes the tokens [begin, begin + m).
SignGemm tokens(SignGemm p, int64_t begin, int64_t m) {
  p.x = p.x + begin * p.stride;
  p.y.data = p.y.at(begin, 0);
  p.m = m;
  return p;
}

PopcountGemm tokens(PopcountGemm p, int64_t begin, int64_t m) {
  p.planes += begin * p.bits * p.weight.words();
  p.act_scale += begin * p.blocks();
  p.act_sum += begin * p.segments();
  if (p.act_shift != nullptr) p.act_shift += begin;
  p.y.data = p.y.at(begin, 0);
  p.m = m;
  return p;
}

template <typename Problem>
void run_gemm(const Gemm<Problem>& gemm, void (*layer_norm)(const LayerNorm&, int64_t, int64_t), const Problem& problem,
              std::optional<double> norm_eps, ParallelFor parallel_for) {
  const int64_t n = problem.weight.n, k = problem.weight.k;
  if (problem.m == 0 || n == 0) return;
  // passes of about the same size, by eights
  const int64_t most = gemm.pass(problem), passes = (problem.m + most - 1) / most;
  const int64_t pass = std::min(problem.m, ((problem.m + passes - 1) / passes + 7) / 8 * 8);
  const int64_t last = (problem.m - 1) % pass + 1;
  Buffer<std::byte> prepared(static_cast<int64_t>(
      std::max(gemm.prepared_bytes(tokens(problem, 0, pass)), gemm.prepared_bytes(tokens(problem, 0, last)))));
  Buffer<float> sums(norm_eps ? pass * n : 0);
  for (int64_t begin = 0; begin < problem.m; begin += pass) {
    Problem part = tokens(problem, begin, std::min(pass, problem.m - begin));
    const LayerNorm norm{sums.data(), n, norm_eps.value_or(0), part.weight.bias, part.y};
    if (norm_eps) {  // the statistics need all outputs of a token, so they wait in float32
      part.y = {sums.data(), Dtype::kFloat32, n};
      part.weight.bias = {};
    }
    parallel_for(part.m, grain_for(8 * k),
                 [&](int64_t t0, int64_t t1) { gemm.prepare(part, prepared.data(), t0, t1); });
    const int64_t tile = gemm.row_tile, tiles = (n + tile - 1) / tile;
    parallel_for(tiles, grain_for(tile * k * part.weight.planes * part.m / 4), [&](int64_t i0, int64_t i1) {
      gemm.multiply(part, prepared.data(), i0 * tile, std::min(n, i1 * tile));
    });
    if (norm_eps) parallel_for(part.m, grain_for(4 * n), [&](int64_t t0, int64_t t1) { layer_norm(norm, t0, t1); });
  }
}

}  // namespace

void serial(int64_t count, int64_t, const Body& body) {
  if (count > 0) body(0, count);
}

void pack_signs(const Kernels& kernels, const PackSigns& problem, int64_t rows, ParallelFor parallel_for) {
  if (rows == 0 || problem.k == 0) return;
  parallel_for(rows, grain_for(problem.k), [&](int64_t r0, int64_t r1) { kernels.pack_signs(problem, r0, r1); });
}

void pack_activations(const Kernels& kernels, const PackActivations& problem, int64_t m, ParallelFor parallel_for) {
  if (m == 0) return;
  parallel_for(m, grain_for(8 * problem.k), [&](int64_t t0, int64_t t1) { kernels.pack_activations(problem, t0, t1); });
}

void sign_gemm(const Kernels& kernels, const SignGemm& problem, std::optional<double> norm_eps,
               ParallelFor parallel_for) {
  run_gemm(kernels.sign_gemm, kernels.layer_norm, problem, norm_eps, parallel_for);
}

void popcount_gemm(const Kernels& kernels, const PopcountGemm& problem, std::optional<double> norm_eps,
                   ParallelFor parallel_for) {
  run_gemm(kernels.popcount_gemm, kernels.layer_norm, problem, norm_eps, parallel_for);
}

}  // namespace bitinfer::cpu
