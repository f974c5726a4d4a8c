// The AVX2 table. Eight (sign_gemm) or 32 (popcount_gemm) weight rows sit in the lanes of a register, the tables of a
// token are registers too, and a lookup is one vpermps or vpshufb with the packed bits as the index.
#include "dispatch.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

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

// Four columns to a table of their sixteen subset sums, in unsigned bytes. Eight bits need two tables: q = 16*high +
// low, low unsigned. Signed sums are raised by 4 * 2^(bits-1) (no subset sum of four is smaller than minus that).
struct Avx2Counts : Avx2Floats {
  static constexpr int64_t kRowTile = 64, kRows = 64, kWords = 32;
  static constexpr bool kStreams = true;

  static constexpr int64_t table_bytes(int64_t bits) { return 8 * 16 * (bits == 8 ? 2 : 1); }
  static constexpr int32_t raise(int64_t bits) { return 4 << ((bits == 8 ? 4 : bits == 1 ? 1 : bits) - 1); }
  static constexpr int32_t offset(int64_t bits) { return 8 * raise(bits) * (bits == 8 ? 16 : 1); }

  static void add_plane(const uint32_t* plane, int64_t words, int8_t weight, int8_t* q) {
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    for (int64_t w = 0; w < words; ++w) {
      auto* values = reinterpret_cast<__m256i*>(q + w * kWordBits);
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(plane[w])), spread);
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
      const __m256i added = _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(weight)));
      _mm256_storeu_si256(values, _mm256_add_epi8(load256(values), added));
    }
  }

  static void build_tables(const int8_t* q, int64_t words, int64_t bits, std::byte* tables) {
    const __m256i byte0 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0));  // -1: not in the subset, selects 0
    const __m256i byte1 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1));
    const __m256i byte2 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, 2, 2, 2, 2, -1, -1, -1, -1, 2, 2, 2, 2));
    const __m256i byte3 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 3, 3, 3, 3, 3, 3, 3, 3));
    const auto up = static_cast<char>(raise(bits));
    // lower lane: the low (or only) table; upper lane: the high one
    const __m256i raised = bits == 8 ? _mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi8(up)) : _mm256_set1_epi8(up);
    for (int64_t i = 0; i < words * 8; ++i) {
      int32_t four;
      std::memcpy(&four, q + 4 * i, sizeof four);
      __m256i values = _mm256_set1_epi32(four);
      if (bits == 8) {
        const __m128i narrow = _mm256_castsi256_si128(values);
        const __m128i low = _mm_and_si128(narrow, _mm_set1_epi8(15));
        // high = q >> 4 with its sign: (q >> 4 & 15 ^ 8) - 8
        const __m128i high =
            _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(_mm_srli_epi16(narrow, 4), _mm_set1_epi8(15)), _mm_set1_epi8(8)),
                         _mm_set1_epi8(8));
        values = _mm256_setr_m128i(low, high);
      }
      const __m256i sums =
          _mm256_add_epi8(_mm256_add_epi8(_mm256_add_epi8(raised, _mm256_shuffle_epi8(values, byte0)),
                                          _mm256_shuffle_epi8(values, byte1)),
                          _mm256_add_epi8(_mm256_shuffle_epi8(values, byte2), _mm256_shuffle_epi8(values, byte3)));
      if (bits == 8) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32 * i), sums);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + 16 * i), _mm256_castsi256_si128(sums));
      }
    }
  }

  // nibbles[i][r]: nibble i of the chunk (columns 4*i ... 4*i+3) of row r
  struct Tile {
    alignas(32) uint8_t nibbles[kWords * 8][kRows];

    void load(const uint32_t* first, int64_t stride, int64_t rows, int64_t count) {
      const __m256i low = _mm256_set1_epi8(15);
      for (int64_t r = 0; r < (rows + 63) / 64 * 64; r += 32) {
        const uint32_t* row[32];
        row_pointers<32>(first, stride, r, rows, row);
        for (int64_t w = 0; w < count; w += 4) {
          // each lane is a 16 x 16 transpose of bytes: rows r ... r+15 in the lower, r+16 ... r+31 in the upper
          __m256i half[16], bytes[4];
          for (int i = 0; i < 4; ++i) {
            __m256i in[4];
            for (int j = 0; j < 4; ++j) in[j] = four_words(row[i + 4 * j], row[i + 4 * j + 16], w, count);
            interleave(in, half + 4 * i);
          }
          for (int i = 0; i < 4; ++i) {
            const __m256i in[4] = {half[i], half[i + 4], half[i + 8], half[i + 12]};
            interleave(in, bytes);
            for (int j = 0; j < 4; ++j) {
              auto* out = reinterpret_cast<__m256i*>(&nibbles[8 * w + 8 * i + 2 * j][r]);
              _mm256_store_si256(out, _mm256_and_si256(bytes[j], low));
              _mm256_store_si256(out + kRows / 32, _mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), low));
            }
          }
        }
      }
    }

    // Merges the bytes of four registers: out holds byte 0 of in[0], in[1], in[2], in[3], byte 1 of each, and so on.
    // Done to rows i, i+4, i+8, i+12 and then to four of the results, this transposes with few registers in use.
    static void interleave(const __m256i* in, __m256i* out) {
      const __m256i low02 = _mm256_unpacklo_epi8(in[0], in[2]), high02 = _mm256_unpackhi_epi8(in[0], in[2]);
      const __m256i low13 = _mm256_unpacklo_epi8(in[1], in[3]), high13 = _mm256_unpackhi_epi8(in[1], in[3]);
      out[0] = _mm256_unpacklo_epi8(low02, low13);
      out[1] = _mm256_unpackhi_epi8(low02, low13);
      out[2] = _mm256_unpacklo_epi8(high02, high13);
      out[3] = _mm256_unpackhi_epi8(high02, high13);
    }
  };

  // Sums of bytes, kept as 16-bit sums of whole lanes and of their upper bytes: one addition each, and no unpacking.
  struct Accumulator {
    __m256i both, odd;

    void clear() { both = odd = _mm256_setzero_si256(); }
    void add(__m256i bytes) {
      both = _mm256_add_epi16(both, bytes);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    __m256i even() const { return _mm256_sub_epi16(both, _mm256_slli_epi16(odd, 8)); }
  };

  // Adds low + 16 * high of 32 rows to counts.
  static void flush(const Accumulator& low, const Accumulator& high, int32_t* counts) {
    const __m256i weights = _mm256_set1_epi32(1 | 16 << 16);
    const __m256i low_even = low.even(), high_even = high.even();
    for (int half = 0; half < 2; ++half) {  // rows 0 ... 7 and 16 ... 23, then 8 ... 15 and 24 ... 31
      const __m256i l = half ? _mm256_unpackhi_epi16(low_even, low.odd) : _mm256_unpacklo_epi16(low_even, low.odd);
      const __m256i h = half ? _mm256_unpackhi_epi16(high_even, high.odd) : _mm256_unpacklo_epi16(high_even, high.odd);
      const __m256i quads[2] = {_mm256_madd_epi16(_mm256_unpacklo_epi16(l, h), weights),
                                _mm256_madd_epi16(_mm256_unpackhi_epi16(l, h), weights)};
      for (int i = 0; i < 2; ++i) {
        auto* lower = reinterpret_cast<__m128i*>(counts + 8 * half + 4 * i);
        auto* upper = reinterpret_cast<__m128i*>(counts + 8 * half + 4 * i + 16);
        _mm_storeu_si128(lower, _mm_add_epi32(load128(lower), _mm256_castsi256_si128(quads[i])));
        _mm_storeu_si128(upper, _mm_add_epi32(load128(upper), _mm256_extracti128_si256(quads[i], 1)));
      }
    }
  }

  // 64 rows from row r on, one token. kTables per nibble; kRun lookups fit a byte together.
  template <int kTables, int kRun>
  static void block(const Tile& tile, int64_t offset, int64_t r, int64_t words, const std::byte* tables, Ahead& ahead,
                    int32_t* counts) {
    Accumulator low[2], high[2];
    for (int v = 0; v < 2; ++v) {
      low[v].clear();
      high[v].clear();
    }
    for (int64_t i = 0; i < words * 8; i += kRun) {
      if (i % 8 == 0) ahead.lines(kRows / 16);
      __m256i low_bytes[2] = {}, high_bytes[2] = {};
      for (int j = 0; j < kRun; ++j) {
        const __m256i low_table = _mm256_broadcastsi128_si256(load128(tables + 16 * kTables * (i + j)));
        const __m256i high_table = _mm256_broadcastsi128_si256(load128(tables + 16 * kTables * (i + j + 1) - 16));
        for (int v = 0; v < 2; ++v) {
          const __m256i index = load256(&tile.nibbles[8 * offset + i + j][r + 32 * v]);
          low_bytes[v] = _mm256_add_epi8(low_bytes[v], _mm256_shuffle_epi8(low_table, index));
          if (kTables == 2) high_bytes[v] = _mm256_add_epi8(high_bytes[v], _mm256_shuffle_epi8(high_table, index));
        }
      }
      for (int v = 0; v < 2; ++v) {
        low[v].add(low_bytes[v]);
        if (kTables == 2) high[v].add(high_bytes[v]);
      }
    }
    for (int v = 0; v < 2; ++v) flush(low[v], high[v], counts + r + 32 * v);
  }

  // One token: 32 rows at a time go from memory through the transpose of Tile::load straight to the lookups.
  template <int kTables, int kRun>
  static void stream(const uint32_t* first, int64_t stride, int64_t rows, int64_t words, const std::byte* tables,
                     Ahead& ahead, int32_t* counts) {
    static_assert(kRun == 4 || kRun == 8);
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t r = 0; r < rows; r += 32) {
      const uint32_t* row[32];
      row_pointers<32>(first, stride, r, rows, row);
      Accumulator low, high;
      low.clear();
      high.clear();
      const std::byte* table = tables;
      for (int64_t w = 0; w < words; w += 4) {
        ahead.lines(8);
        __m256i half[16];
        for (int i = 0; i < 4; ++i) {
          __m256i in[4];
          for (int j = 0; j < 4; ++j) in[j] = four_words(row[i + 4 * j], row[i + 4 * j + 16], w, words);
          Tile::interleave(in, half + 4 * i);
        }
        for (int i = 0; i < 4 && w + i < words; ++i, table += 8 * 16 * kTables) {
          const __m256i in[4] = {half[i], half[i + 4], half[i + 8], half[i + 12]};
          __m256i bytes[4], low_bytes = {}, high_bytes = {};
          Tile::interleave(in, bytes);
          const auto look_up = [&](__m256i index, int n) {
            const __m256i low_table = _mm256_broadcastsi128_si256(load128(table + 16 * kTables * n));
            low_bytes = _mm256_add_epi8(low_bytes, _mm256_shuffle_epi8(low_table, index));
            if (kTables == 1) return;
            const __m256i high_table = _mm256_broadcastsi128_si256(load128(table + 16 * kTables * n + 16));
            high_bytes = _mm256_add_epi8(high_bytes, _mm256_shuffle_epi8(high_table, index));
          };
          for (int j = 0; j < 4; ++j) {
            look_up(_mm256_and_si256(bytes[j], nibble), 2 * j);
            look_up(_mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), nibble), 2 * j + 1);
            if ((2 * j + 2) % kRun) continue;
            low.add(low_bytes);
            low_bytes = _mm256_setzero_si256();
            if (kTables == 1) continue;
            high.add(high_bytes);
            high_bytes = _mm256_setzero_si256();
          }
        }
      }
      flush(low, high, counts + r);
    }
  }

  static void stream(const uint32_t* first, int64_t stride, int64_t rows, int64_t words, int64_t bits,
                     const std::byte* tables, Ahead& ahead, int32_t* counts) {
    if (bits == 8) return stream<2, 4>(first, stride, rows, words, tables, ahead, counts);
    if (bits == 4) return stream<1, 4>(first, stride, rows, words, tables, ahead, counts);
    stream<1, 8>(first, stride, rows, words, tables, ahead, counts);
  }

  static void lookup(const Tile& tile, int64_t offset, int64_t rows, int64_t words, int64_t bits,
                     const std::byte* tables, int64_t token_stride, int64_t tokens, Ahead& ahead, int32_t* counts) {
    // A table entry is at most 60 (eight and four bits) or 12: four or eight fit a byte. 16-bit sums: words * 8 * 60.
    static_assert(kWords * 8 * 60 < 1 << 15);
    for (int64_t t = 0; t < tokens; ++t, tables += token_stride, counts += kRows) {
      for (int64_t r = 0; r < rows; r += 64) {
        if (bits == 8) {
          block<2, 4>(tile, offset, r, words, tables, ahead, counts);
        } else if (bits == 4) {
          block<1, 4>(tile, offset, r, words, tables, ahead, counts);
        } else {
          block<1, 8>(tile, offset, r, words, tables, ahead, counts);
        }
      }
    }
  }
};

constexpr Kernels kKernels = {pack_signs<Avx2Activations>, pack_activations<Avx2Activations>,
                              sign_gemm_kernel<Avx2Signs>(), popcount_gemm_kernel<Avx2Counts>(),
                              layer_norm<Avx2Floats>};

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
