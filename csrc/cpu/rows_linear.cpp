// Every code is read once for up to kTokens tokens and made a float on the way; x lies in float32. Bound by memory: one
// conversion of 8 or 16 codes, and a multiply-add for each token.
#include "rows_linear.h"

#include <algorithm>

#include "buffer.h"
#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitinfer::cpu {
namespace {

constexpr int64_t kTokens = 4, kGrainBytes = 1 << 16;

float to_float(const Floats& x, int64_t i) {
  if (x.dtype == Dtype::kFloat32) return static_cast<const float*>(x.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(x.data)[i];
  return x.dtype == Dtype::kFloat16 ? half_to_float(half) : bfloat16_to_float(half);
}

void store(const Output& y, int64_t row, int64_t column, float value) {
  if (y.dtype == Dtype::kFloat32) {
    *static_cast<float*>(y.at(row, column)) = value;
  } else {
    *static_cast<uint16_t*>(y.at(row, column)) =
        y.dtype == Dtype::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  }
}

// sums[t] = sum_k codes[k] * x[t * k + ...]: one row of codes, M tokens whose rows of x are `k` apart.
using RowSums = void (*)(const int8_t* codes, const float* x, int64_t k, float* sums);

template <int M>
void row_sums_scalar(const int8_t* codes, const float* x, int64_t k, float* sums) {
  for (int t = 0; t < M; ++t) {
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += static_cast<float>(codes[i]) * x[t * k + i];
    sums[t] = sum;
  }
}

#if defined(__x86_64__)

template <int M>
__attribute__((target("avx2,fma"))) void row_sums_avx2(const int8_t* codes, const float* x, int64_t k, float* sums) {
  __m256 sum[M][2];
  for (int t = 0; t < M; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + 8 * half;
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at));
      const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
      for (int t = 0; t < M; ++t) {
        sum[t][half] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + t * k + at), sum[t][half]);
      }
    }
  }
  for (int t = 0; t < M; ++t) {
    const __m256 all = _mm256_add_ps(sum[t][0], sum[t][1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    sums[t] = _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    for (int64_t j = i; j < k; ++j) sums[t] += static_cast<float>(codes[j]) * x[t * k + j];
  }
}

template <int M>
__attribute__((target("avx512f,avx512bw,avx512vl"))) void row_sums_avx512(const int8_t* codes, const float* x,
                                                                          int64_t k, float* sums) {
  constexpr int64_t kChains = M == 1 ? 4 : 2, kAhead = 4096;  // sums in flight; codes asked for ahead
  __m512 sum[M][kChains];
  for (int t = 0; t < M; ++t) {
    for (__m512& chain : sum[t]) chain = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    _mm_prefetch(codes + i + kAhead, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + 16 * j;
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at));
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
      for (int t = 0; t < M; ++t) {
        sum[t][j % kChains] = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + t * k + at), sum[t][j % kChains]);
      }
    }
  }
  for (; i < k; i += 16) {
    const auto inside = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1u << (k - i)) - 1);
    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, codes + i)));
    for (int t = 0; t < M; ++t) {
      sum[t][0] = _mm512_fmadd_ps(values, _mm512_maskz_loadu_ps(inside, x + t * k + i), sum[t][0]);
    }
  }
  for (int t = 0; t < M; ++t) {
    __m512 all = sum[t][0];
    for (int64_t j = 1; j < kChains; ++j) all = _mm512_add_ps(all, sum[t][j]);
    sums[t] = _mm512_reduce_add_ps(all);
  }
}

#endif

template <int M>
RowSums row_sums(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2") return row_sums_avx2<M>;
  if (isa != "scalar") return row_sums_avx512<M>;
#endif
  return row_sums_scalar<M>;
}

RowSums row_sums(const std::string& isa, int64_t tokens) {
  switch (tokens) {
    case 1:
      return row_sums<1>(isa);
    case 2:
      return row_sums<2>(isa);
    case 3:
      return row_sums<3>(isa);
    default:
      return row_sums<4>(isa);
  }
}

}  // namespace

void rows_linear(const RowsLinear& p, const std::string& isa, ParallelFor parallel_for) {
  Buffer<float> x(std::min(p.m, kTokens) * p.k);
  for (int64_t first = 0; first < p.m; first += kTokens) {
    const int64_t tokens = std::min(kTokens, p.m - first);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < p.k; ++i) x[t * p.k + i] = to_float(p.x, (first + t) * p.stride + i);
    }
    const RowSums sums_of = row_sums(isa, tokens);
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(p.k, 1));
    parallel_for(p.n, grain, [&](int64_t begin, int64_t end) {
      float sums[kTokens];
      for (int64_t v = begin; v < end; ++v) {
        sums_of(p.codes + v * p.k, x.data(), p.k, sums);
        for (int64_t t = 0; t < tokens; ++t) store(p.y, first + t, v, p.scale[v] * sums[t]);
      }
    });
  }
}

}  // namespace bitinfer::cpu
