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

  // rows[i] lane i summed: lane r of the result is the sum of the lanes of rows[r].
  static __m512 sum_rows(const __m512* rows) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
      a[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                           _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
      b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    for (int i = 0; i < 2; ++i) {
      c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  }

  // Sixteen slots at a time, four of each quarter, whose sums stay in registers: no row is written down as floats, and
  // sums over lanes cost little more than one shuffle a slot.
  template <bool kHalf>
  static void score_halves(const Rows& keys, const float* q, float scaling, float* scores) {
    const auto* data = static_cast<const uint16_t*>(keys.data.data);
    const int64_t quarter = keys.quarter();
    int64_t slots[16];
    for (int64_t s = 0; s < quarter; s += 4) {
      for (int64_t i = 0; i < 16; ++i) slots[i] = i / 4 * quarter + s + i % 4;
      for (int64_t i = 0; i < 16; i += 4) ask_for(keys.data + (slots[i] + kAhead) * keys.dim, 4 * keys.dim);
      score_sixteen<kHalf>(data, slots, keys, q, scaling, [&](int64_t h, __m512 sums) {
        float* out = scores + h * keys.slots;
        _mm_storeu_ps(out + slots[0], _mm512_castps512_ps128(sums));
        _mm_storeu_ps(out + slots[4], _mm512_extractf32x4_ps(sums, 1));
        _mm_storeu_ps(out + slots[8], _mm512_extractf32x4_ps(sums, 2));
        _mm_storeu_ps(out + slots[12], _mm512_extractf32x4_ps(sums, 3));
      });
    }
    const int64_t left = keys.slots - 4 * quarter;
    if (left == 0) return;
    for (int64_t i = 0; i < 16; ++i) slots[i] = 4 * quarter + (i < left ? i : left - 1);
    score_sixteen<kHalf>(data, slots, keys, q, scaling, [&](int64_t h, __m512 sums) {
      _mm512_mask_storeu_ps(scores + h * keys.slots + 4 * quarter, lanes(left), sums);
    });
  }

  template <bool kHalf, typename Store>
  static void score_sixteen(const uint16_t* data, const int64_t* slots, const Rows& keys, const float* q, float scaling,
                            const Store& store) {
    for (int64_t h = 0; h < keys.group; ++h) {
      __m512 sums[16];
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < keys.dim; c += 16) {
        const __m512 factor = _mm512_loadu_ps(q + h * keys.dim + c);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const auto* row = reinterpret_cast<const __m256i*>(data + slots[i] * keys.dim + c);
          sums[i] = _mm512_fmadd_ps(widen<kHalf>(_mm256_loadu_si256(row)), factor, sums[i]);
        }
      }
      store(h, _mm512_mul_ps(sum_rows(sums), _mm512_set1_ps(scaling)));
    }
  }

  // 16*J columns from `column` on, whose sums stay in registers over all slots.
  template <bool kHalf, int J>
  static void add_weighted_columns(const Rows& values, int64_t column, const float* weights, bool first, float* part) {
    const uint16_t* data = static_cast<const uint16_t*>(values.data.data) + column;
    __m512 sums[J];
    for (int j = 0; j < J; ++j) sums[j] = _mm512_loadu_ps(part + column + 16 * j);
    const auto add = [&](int64_t slot) {
      const __m512 weight = _mm512_set1_ps(weights[slot]);
      for (int j = 0; j < J; ++j) {
        const auto* row = reinterpret_cast<const __m256i*>(data + slot * values.dim + 16 * j);
        sums[j] = _mm512_fmadd_ps(widen<kHalf>(_mm256_loadu_si256(row)), weight, sums[j]);
      }
    };
    const int64_t quarter = values.quarter();
    for (int64_t s = 0; s < quarter; ++s) {
      for (int64_t slot = s; slot < 4 * quarter; slot += quarter) {
        if (first) ask_for(values.data + ((slot + kAhead) * values.dim + column), 16 * J);
        add(slot);
      }
    }
    for (int64_t slot = 4 * quarter; slot < values.slots; ++slot) add(slot);
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(part + column + 16 * j, sums[j]);
  }

  template <bool kHalf>
  static void add_weighted_halves(const Rows& values, const float* weights, int64_t stride, float* part) {
    for (int64_t h = 0; h < values.group; ++h) {
      const float* w = weights + h * values.slots;
      float* sum = part + h * stride;
      int64_t c = 0;
      for (; c + 64 <= values.dim; c += 64) add_weighted_columns<kHalf, 4>(values, c, w, h == 0, sum);
      for (; c < values.dim; c += 16) add_weighted_columns<kHalf, 1>(values, c, w, h == 0, sum);
    }
  }

  static void score(const Rows& keys, const float* q, float scaling, float* scores) {
    if (keys.data.dtype == Dtype::kFloat32 || keys.dim % 16) return score_rows<Avx512>(keys, q, scaling, scores);
    const bool half = keys.data.dtype == Dtype::kFloat16;
    return half ? score_halves<true>(keys, q, scaling, scores) : score_halves<false>(keys, q, scaling, scores);
  }

  static void add_weighted(const Rows& values, const float* weights, int64_t stride, float* part) {
    if (values.data.dtype == Dtype::kFloat32 || values.dim % 16) {
      return add_weighted_rows<Avx512>(values, weights, stride, part);
    }
    const bool half = values.data.dtype == Dtype::kFloat16;
    return half ? add_weighted_halves<true>(values, weights, stride, part)
                : add_weighted_halves<false>(values, weights, stride, part);
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
