// The AVX2 table of what stands between the products of a decoder layer, as decoder_rows.h has it.
#include "decoder_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "avx2.h"
#include "decoder_rows.h"

namespace bitinfer::cpu {
namespace {

struct Avx2 : Avx2Floats {
  static float dot(const float* x, const float* y, int64_t n) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      for (int j = 0; j < 2; ++j) {
        sum[j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * j), _mm256_loadu_ps(y + i + 8 * j), sum[j]);
      }
    }
    const __m256 eight = _mm256_add_ps(sum[0], sum[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    float result = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    for (; i < n; ++i) result += x[i] * y[i];
    return result;
  }

  // Pieces are made floats in the first-level cache.
  static float dot_of(Floats x, const float* y, int64_t n, int64_t ahead) {
    if (x.dtype == Dtype::kFloat32) return dot(static_cast<const float*>(x.data), y, n);
    constexpr int64_t kPiece = 64;
    float piece[kPiece], sum = 0;
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t count = n - i < kPiece ? n - i : kPiece;
      ask_for(x + (i + ahead), count);
      load_floats(x + i, count, piece);
      sum += dot(piece, y + i, count);
    }
    return sum;
  }

  static constexpr auto score = score_rows<Avx2>;
  static constexpr auto add_weighted = add_weighted_rows<Avx2>;
};

constexpr DecoderKernels kKernels = decoder_kernels<Avx2>();

}  // namespace
}  // namespace bitinfer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bitinfer::cpu::DecoderKernels* bitinfer::cpu::decoder_avx2() { return &kKernels; }

#else

const bitinfer::cpu::DecoderKernels* bitinfer::cpu::decoder_avx2() { return nullptr; }

#endif
