// sign_gemm with AVX-512: a table of sixteen sums for each four columns, in one register. Included like activations.h,
// after sign_gemm.h and avx512_digits.h.
//
// Bits 4*i ... 4*i+3 of a word index table i, and vpermps looks at no other bit: one lookup, one addition and one shift
// for four weights of sixteen rows, and the shift serves all tokens. Bound by the one port that permutes.
namespace bitinfer::cpu {
namespace {

struct Avx512Signs : Avx512Floats {
  static constexpr int64_t kRowTile = 64, kRows = 64, kWords = 64, kTables = 8, kTableFloats = kTables * 16;

  static void build_tables(const float* z, int64_t words, float* tables) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i flip[4];  // the sign of column j in the sums where bit j of their number is set
    for (int j = 0; j < 4; ++j) {
      flip[j] = _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(lane, j), _mm512_set1_epi32(1)), 31);
    }
    const auto signed_column = [&](const float* column, int j) {
      return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(column[j])), flip[j]));
    };
    for (int64_t i = 0; i < words * kTables; ++i, z += 4, tables += 16) {
      _mm512_storeu_ps(tables, _mm512_add_ps(_mm512_add_ps(signed_column(z, 0), signed_column(z, 1)),
                                             _mm512_add_ps(signed_column(z, 2), signed_column(z, 3))));
    }
  }

  // words[w][r]: the words of neighbouring rows lie side by side
  struct Tile {
    alignas(64) uint32_t words[kWords][kRows];

    void load(const uint32_t* first, int64_t stride, int64_t rows, int64_t count) {
      for (int64_t r = 0; r < rows; r += 16) {
        for (int64_t w = 0; w < count; w += 16) {
          __m512i v[16];
          for (int64_t i = 0; i < 16; ++i) {
            const int64_t row = r + i < rows ? r + i : rows - 1;
            v[i] = _mm512_maskz_loadu_epi32(lanes(count - w), first + row * stride + w);
          }
          transpose(v);
          for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(&words[w + i][r], v[i]);
        }
      }
    }
  };

  // 16*R rows and T tokens from row r on; R*T sums stay in registers over the whole chunk
  template <int R, int T>
  static void block(const Tile& tile, int64_t offset, int64_t r, int64_t words, const float* tables,
                    int64_t token_stride, Ahead& ahead, float* sums) {
    __m512 acc[R][T];
    for (int i = 0; i < R; ++i) {
      for (int t = 0; t < T; ++t) acc[i][t] = _mm512_setzero_ps();
    }
    for (int64_t w = 0; w < words; ++w, tables += kTableFloats) {
      ahead.lines(R);
      __m512i index[R];
      for (int i = 0; i < R; ++i) index[i] = _mm512_load_si512(&tile.words[offset + w][r + 16 * i]);
#pragma GCC unroll 4
      for (int pair = 0; pair < kTables / 2; ++pair) {
        __m512i next[R];
        for (int i = 0; i < R; ++i) next[i] = _mm512_srli_epi32(index[i], 4);
        for (int t = 0; t < T; ++t) {
          const __m512 table0 = _mm512_loadu_ps(tables + t * token_stride + 32 * pair);
          const __m512 table1 = _mm512_loadu_ps(tables + t * token_stride + 32 * pair + 16);
          for (int i = 0; i < R; ++i) {
            const __m512 two =
                _mm512_add_ps(_mm512_permutexvar_ps(index[i], table0), _mm512_permutexvar_ps(next[i], table1));
            acc[i][t] = _mm512_add_ps(acc[i][t], two);
          }
        }
        for (int i = 0; i < R; ++i) index[i] = _mm512_srli_epi32(next[i], 4);
      }
    }
    for (int i = 0; i < R; ++i) {
      for (int t = 0; t < T; ++t) {
        float* sum = sums + t * kRows + r + 16 * i;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), acc[i][t]));
      }
    }
  }

  static void lookup(const Tile& tile, int64_t offset, int64_t rows, int64_t words, const float* tables,
                     int64_t token_stride, int64_t tokens, Ahead& ahead, float* sums) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) rows_of<4>(tile, offset, rows, words, tables, token_stride, t, ahead, sums);
    for (; t + 2 <= tokens; t += 2) rows_of<2>(tile, offset, rows, words, tables, token_stride, t, ahead, sums);
    for (; t < tokens; ++t) rows_of<1>(tile, offset, rows, words, tables, token_stride, t, ahead, sums);
  }

 private:
  template <int T>
  static void rows_of(const Tile& tile, int64_t offset, int64_t rows, int64_t words, const float* tables,
                      int64_t token_stride, int64_t t, Ahead& ahead, float* sums) {
    if (rows > 32) {
      block<4, T>(tile, offset, 0, words, tables + t * token_stride, token_stride, ahead, sums + t * kRows);
    } else {
      block<2, T>(tile, offset, 0, words, tables + t * token_stride, token_stride, ahead, sums + t * kRows);
    }
  }
};

// sign_gemm by look-ups or by digits, whichever serves a weight better: look-ups where many short groups have an
// epilogue each, and without matrix tiles for all that needs three digits. It does not depend on the number of tokens,
// so that a token's result does not either.
template <class Digits>
struct Avx512SignGemm {
  static bool looks_up(const SignGemm& p) {
    const DigitRecord record = record_of<Digits>(p);
    return (record.segments > 1 && record.segment_units <= kShortUnits) ||
           (Digits::kPassColumns == 0 && p.x.dtype != Dtype::kBFloat16);
  }
  static int64_t pass(const SignGemm& p) {
    return looks_up(p) ? sign_pass<Avx512Signs>(p) : digit_pass<Digits, SignGemm>(p);
  }
  static size_t prepared_bytes(const SignGemm& p) {
    return looks_up(p) ? sign_prepared_bytes<Avx512Signs>(p) : digit_prepared_bytes<Digits, SignGemm>(p);
  }
  static void prepare(const SignGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
    return looks_up(p) ? sign_prepare<Avx512Signs>(p, prepared, token_begin, token_end)
                       : sign_digits<Digits>(p, prepared, token_begin, token_end);
  }
  static void multiply(const SignGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
    return looks_up(p) ? sign_multiply<Avx512Signs>(p, prepared, row_begin, row_end)
                       : sign_digit_multiply<Digits>(p, prepared, row_begin, row_end);
  }
  static constexpr Gemm<SignGemm> kernel() { return {Avx512Signs::kRowTile, pass, prepared_bytes, prepare, multiply}; }
};

}  // namespace
}  // namespace bitinfer::cpu
