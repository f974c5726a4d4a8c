// The AVX2 table. Eight (sums of floats) or 32 (of integers) weight rows sit in the lanes of a register, the tables of
// a token are registers too, and a lookup is one vpermps or vpshufb with the packed bits as the index.
#include "dispatch.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "buffer.h"
#include "kernels.h"

// Everything from here on is compiled for AVX2; nothing of it may be reached before dispatch.cpp has asked the
// processor. All standard headers are above, so that no function shared with other files is compiled so.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

// clang-format off: the templates need each other and the headers above in this order
#include "activations.h"
#include "avx2.h"
#include "sign_gemm.h"
#include "popcount_gemm.h"
#include "digits.h"
#include "avx2_bytes.h"
// clang-format on

namespace bitinfer::cpu {
namespace {

struct Avx2Activations : Avx2Floats {
  static void pack_signs(const float* x, int64_t words, uint32_t* out) {
    const __m256 zero = _mm256_setzero_ps();
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = 0;
      for (int part = 0; part < 4; ++part) {
        const __m256 below = _mm256_cmp_ps(_mm256_loadu_ps(x + w * kWordBits + part * 8), zero, _CMP_LT_OQ);
        word |= static_cast<uint32_t>(_mm256_movemask_ps(below)) << (8 * part);
      }
      out[w] = word;
    }
  }

  static void pack_plane(const int8_t* q, int64_t words, int bit, uint32_t* plane) {
    const __m128i to_top = _mm_cvtsi32_si128(7 - bit);  // bits that cross into the next byte are below its top one
    for (int64_t w = 0; w < words; ++w) {
      const __m256i moved = _mm256_sll_epi16(load256(q + w * kWordBits), to_top);
      plane[w] = static_cast<uint32_t>(_mm256_movemask_epi8(moved));
    }
  }
};

// Pointers to `Count` consecutive rows from row r on; rows past the last one are the last one again, so that kernels
// always work on whole blocks.
template <int Count>
void row_pointers(const uint32_t* first, int64_t stride, int64_t r, int64_t rows, const uint32_t** out) {
  for (int i = 0; i < Count; ++i) out[i] = first + (r + i < rows ? r + i : rows - 1) * stride;
}

// Reads the words [w, w + 4) of two rows into the lanes of a register. Words at `available` and beyond count as 0 and
// are not touched in memory.
__m256i four_words(const uint32_t* lower, const uint32_t* upper, int64_t w, int64_t available) {
  if (w + 4 <= available) [[likely]] {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(lower + w)), load128(upper + w), 1);
  }
  alignas(32) uint32_t padded[8] = {};
  for (int64_t i = 0; i < available - w; ++i) {
    padded[i] = lower[w + i];
    padded[i + 4] = upper[w + i];
  }
  return load256(padded);
}

// Three columns to a table of their eight signed sums: bits 3*i ... 3*i+2 of a word index table i, and vpermps looks at
// no other bit. The last of a word's eleven tables stands for two columns.
struct Avx2Signs : Avx2Floats {
  static constexpr int64_t kRowTile = 32, kRows = 32, kWords = 64, kTables = 11, kTableFloats = kTables * 8;

  static void build_tables(const float* z, int64_t words, float* tables) {
    const __m256 flip0 = _mm256_setr_ps(0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f);
    const __m256 flip1 = _mm256_setr_ps(0.f, 0.f, -0.f, -0.f, 0.f, 0.f, -0.f, -0.f);
    const __m256 flip2 = _mm256_setr_ps(0.f, 0.f, 0.f, 0.f, -0.f, -0.f, -0.f, -0.f);
    for (int64_t w = 0; w < words; ++w, z += kWordBits, tables += kTableFloats) {
      for (int i = 0; i < kTables; ++i) {
        const __m256 a = _mm256_xor_ps(_mm256_broadcast_ss(z + 3 * i), flip0);
        const __m256 b = _mm256_xor_ps(_mm256_broadcast_ss(z + 3 * i + 1), flip1);
        __m256 sum = _mm256_add_ps(a, b);
        if (i < kTables - 1) sum = _mm256_add_ps(sum, _mm256_xor_ps(_mm256_broadcast_ss(z + 3 * i + 2), flip2));
        _mm256_storeu_ps(tables + 8 * i, sum);
      }
    }
  }

  // words[w][r]: the words of neighbouring rows lie side by side
  struct Tile {
    alignas(32) uint32_t words[kWords][kRows];

    void load(const uint32_t* first, int64_t stride, int64_t rows, int64_t count) {
      for (int64_t r = 0; r < (rows + 31) / 32 * 32; r += 8) {
        const uint32_t* row[8];
        row_pointers<8>(first, stride, r, rows, row);
        for (int64_t w = 0; w < count; w += 4) {
          // each lane is a 4 x 4 transpose: rows r ... r+3 in the lower, r+4 ... r+7 in the upper
          __m256i in[4], mid[4];
          for (int i = 0; i < 4; ++i) in[i] = four_words(row[i], row[i + 4], w, count);
          for (int i = 0; i < 2; ++i) {
            mid[2 * i] = _mm256_unpacklo_epi32(in[i], in[i + 2]);
            mid[2 * i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 2]);
          }
          for (int i = 0; i < 2; ++i) {
            const __m256i even = _mm256_unpacklo_epi32(mid[i], mid[i + 2]);
            const __m256i odd = _mm256_unpackhi_epi32(mid[i], mid[i + 2]);
            _mm256_store_si256(reinterpret_cast<__m256i*>(&words[w + 2 * i][r]), even);
            _mm256_store_si256(reinterpret_cast<__m256i*>(&words[w + 2 * i + 1][r]), odd);
          }
        }
      }
    }
  };

  // The same sum by the ports that multiply: lookups and the transpose keep the others busy.
  static __m256 add(__m256 a, __m256 b) { return _mm256_fmadd_ps(a, _mm256_set1_ps(1), b); }

  // 8*R rows and T tokens from row r on; R*T sums stay in registers over the whole chunk
  template <int R, int T>
  static void block(const Tile& tile, int64_t offset, int64_t r, int64_t words, const float* tables,
                    int64_t token_stride, Ahead& ahead, float* sums) {
    __m256 acc[R][T];
    for (int i = 0; i < R; ++i) {
      for (int t = 0; t < T; ++t) acc[i][t] = _mm256_setzero_ps();
    }
    for (int64_t w = 0; w < words; ++w, tables += kTableFloats) {
      ahead.lines(kRows / 16);
      __m256i index[R];
      for (int i = 0; i < R; ++i) index[i] = load256(&tile.words[offset + w][r + 8 * i]);
      for (int pair = 0; pair < kTables / 2; ++pair) {
        __m256i next[R];
        for (int i = 0; i < R; ++i) next[i] = _mm256_srli_epi32(index[i], 3);
        for (int t = 0; t < T; ++t) {
          const __m256 table0 = _mm256_loadu_ps(tables + t * token_stride + 16 * pair);
          const __m256 table1 = _mm256_loadu_ps(tables + t * token_stride + 16 * pair + 8);
          for (int i = 0; i < R; ++i) {
            const __m256 two = add(_mm256_permutevar8x32_ps(table0, index[i]),  //
                                   _mm256_permutevar8x32_ps(table1, next[i]));
            acc[i][t] = add(acc[i][t], two);
          }
        }
        for (int i = 0; i < R; ++i) index[i] = _mm256_srli_epi32(next[i], 3);
      }
      for (int t = 0; t < T; ++t) {
        const __m256 table = _mm256_loadu_ps(tables + t * token_stride + 8 * (kTables - 1));
        for (int i = 0; i < R; ++i) acc[i][t] = _mm256_add_ps(acc[i][t], _mm256_permutevar8x32_ps(table, index[i]));
      }
    }
    for (int i = 0; i < R; ++i) {
      for (int t = 0; t < T; ++t) {
        float* sum = sums + t * kRows + r + 8 * i;
        _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), acc[i][t]));
      }
    }
  }

  static void lookup(const Tile& tile, int64_t offset, int64_t rows, int64_t words, const float* tables,
                     int64_t token_stride, int64_t tokens, Ahead& ahead, float* sums) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      for (int64_t r = 0; r < rows; r += 16) {
        block<2, 4>(tile, offset, r, words, tables + t * token_stride, token_stride, ahead, sums + t * kRows);
      }
    }
    for (; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; r += 32) {
        block<4, 1>(tile, offset, r, words, tables + t * token_stride, token_stride, ahead, sums + t * kRows);
      }
    }
  }
};

// sign_gemm by bytes for bfloat16, whose rounding fixed-point numbers meet, unless short groups have an epilogue each.
// It does not depend on the number of tokens, so that a token's result does not either.
struct Avx2SignGemm {
  static bool in_bytes(const SignGemm& p) {
    return p.x.dtype == Dtype::kBFloat16 && (p.weight.group_size == 0 || p.weight.group_size >= 128);
  }
  static int64_t pass(const SignGemm& p) {
    return in_bytes(p) ? sign_pass<Avx2FixedPoint>(p) : sign_pass<Avx2Signs>(p);
  }
  static size_t prepared_bytes(const SignGemm& p) {
    return in_bytes(p) ? sign_prepared_bytes<Avx2FixedPoint>(p) : sign_prepared_bytes<Avx2Signs>(p);
  }
  static void prepare(const SignGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
    return in_bytes(p) ? sign_prepare<Avx2FixedPoint>(p, prepared, token_begin, token_end)
                       : sign_prepare<Avx2Signs>(p, prepared, token_begin, token_end);
  }
  static void multiply(const SignGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
    return in_bytes(p) ? sign_multiply<Avx2FixedPoint>(p, prepared, row_begin, row_end)
                       : sign_multiply<Avx2Signs>(p, prepared, row_begin, row_end);
  }
  static constexpr Gemm<SignGemm> kernel() { return {ByteTile::kRows, pass, prepared_bytes, prepare, multiply}; }
};

constexpr Kernels kKernels = {pack_signs<Avx2Activations>, pack_activations<Avx2Activations>, Avx2SignGemm::kernel(),
                              popcount_gemm_kernel<Avx2Counts>(), layer_norm<Avx2Floats>};

}  // namespace
}  // namespace bitinfer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bitinfer::cpu::Kernels* bitinfer::cpu::avx2_kernels() { return &kKernels; }

#else

const bitinfer::cpu::Kernels* bitinfer::cpu::avx2_kernels() { return nullptr; }

#endif
