// The AVX-512 table of what stands between the products of a decoder layer, as decoder_rows.h has it.
#include "decoder_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in gcc 12's own headers: its bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")
#endif

#include "avx512.h"
#include "decoder_rows.h"

namespace bitinfer::cpu {
namespace {

struct Avx512 : Avx512Floats {
  static float dot(const float* x, const float* y, int64_t n) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32) {
      for (int64_t j = 0; j < 2; ++j) {
        const __mmask16 inside = lanes(n - i - 16 * j);
        const __m512 factor = _mm512_maskz_loadu_ps(inside, y + i + 16 * j);
        sum[j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(inside, x + i + 16 * j), factor, sum[j]);
      }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  }

  template <bool kHalf>
  static __m512 widen(__m256i bits) {
    if constexpr (kHalf) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  template <bool kHalf>
  static float dot_of_halves(const uint16_t* x, const float* y, int64_t n, int64_t ahead) {
    __m512 sum[4];
    for (__m512& s : sum) s = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t at = i + 16 * j;
        if (j % 2 == 0) _mm_prefetch(x + at + ahead, _MM_HINT_T1);
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + at));
        sum[j] = _mm512_fmadd_ps(widen<kHalf>(bits), _mm512_loadu_ps(y + at), sum[j]);
      }
    }
    for (; i < n; i += 16) {
      const __m512 left = widen<kHalf>(_mm256_maskz_loadu_epi16(lanes(n - i), x + i));
      sum[0] = _mm512_fmadd_ps(left, _mm512_maskz_loadu_ps(lanes(n - i), y + i), sum[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }

  static float dot_of(Floats x, const float* y, int64_t n, int64_t ahead) {
    if (x.dtype == Dtype::kFloat32) return dot(static_cast<const float*>(x.data), y, n);
    const auto* halves = static_cast<const uint16_t*>(x.data);
    const bool half = x.dtype == Dtype::kFloat16;
    return half ? dot_of_halves<true>(halves, y, n, ahead) : dot_of_halves<false>(halves, y, n, ahead);
  }
};

constexpr DecoderKernels kKernels = decoder_kernels<Avx512>();

}  // namespace
}  // namespace bitinfer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bitinfer::cpu::DecoderKernels* bitinfer::cpu::decoder_avx512() { return &kKernels; }

#else

const bitinfer::cpu::DecoderKernels* bitinfer::cpu::decoder_avx512() { return nullptr; }

#endif
