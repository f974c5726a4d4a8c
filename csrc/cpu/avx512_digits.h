// Digits times unpacked bits with VNNI, exact. Included like activations.h, after digit_gemm.h and avx512.h.
//
// A unit of 64 weights of a row is eight bytes. They are broadcast to the eight quadwords of a register, and one
// vgf2p8affineqb takes bit j of every byte in quadword j to a byte of 0 or 1; vpdpbusd then adds digits under set bits,
// four at a time, to 32-bit sums that cannot overflow. So a unit costs one instruction, and one more for each column.
namespace bitinfer::cpu {
namespace {

// Quadword j of the matrix moves bit j of each byte to bit 0: 64 weights to 64 bytes of 0 and 1.
__m512i unpack_bits(__m512i bytes) {
  const __m512i bit = _mm512_setr_epi64(1ll << 56, 2ll << 56, 4ll << 56, 8ll << 56, 16ll << 56, 32ll << 56, 64ll << 56,
                                        static_cast<long long>(128ull << 56));
  return _mm512_gf2p8affine_epi64_epi8(bytes, bit, 0);
}

uint64_t load_eight(const void* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// The unit of a row at `bytes`; the last of a row with an odd number of words has four.
__m512i load_unit(const void* bytes) { return unpack_bits(_mm512_set1_epi64(static_cast<int64_t>(load_eight(bytes)))); }

__m512i load_half_unit(const void* bytes) {
  uint32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return unpack_bits(_mm512_set1_epi64(four));
}

// rows[i] lane i summed: lane r of the result is the sum of the lanes of rows[r].
__m512i sum_rows(const __m512i* rows) {
  __m512i a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]),
                            _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    b[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xdd));
  }
  return _mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

// Digits in, sums of 16 rows out.
struct Avx512Digits : Avx512Floats {
  static constexpr int64_t kTile = 16;

  // The digits of `count` floats of a unit, the last of them first in line; the rest of the 64 bytes are zero, and so
  // are digits past `used`.
  static void digits_of_floats(const float* z, int64_t count, float factor, int32_t used, int8_t* const* out) {
    // byte 8*i + j of a unit goes to byte 8*j + i
    alignas(64) static constexpr uint8_t kOrder[64] = {0, 8,  16, 24, 32, 40, 48, 56, 1, 9,  17, 25, 33, 41, 49, 57,
                                                       2, 10, 18, 26, 34, 42, 50, 58, 3, 11, 19, 27, 35, 43, 51, 59,
                                                       4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29, 37, 45, 53, 61,
                                                       6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63};
    const __m512i order = _mm512_load_si512(kOrder), half = _mm512_set1_epi32(128);
    __m512i q[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 part =
          count > 16 * i ? _mm512_maskz_loadu_ps(lanes(count - 16 * i), z + 16 * i) : _mm512_setzero_ps();
      q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(factor)));  // halves to even
    }
    if (used < 3) _mm512_storeu_si512(out[2], _mm512_setzero_si512());
    for (int32_t d = used == 3 ? 2 : 1; d >= 0; --d) {
      __m512i bytes = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(q[0]));
      bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(q[1]), 1);
      bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(q[2]), 2);
      bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(q[3]), 3);
      _mm512_storeu_si512(out[d], _mm512_permutexvar_epi8(order, bytes));
      // the byte is signed: what is left of q is (q - byte) / 256
      for (int i = 0; i < 4; ++i) q[i] = _mm512_srai_epi32(_mm512_add_epi32(q[i], half), 8);
    }
  }

  // The integers of `count` columns from their bit planes, `words` apart: each plane lands in its bit of the bytes, the
  // top one in all bits above too, since it counts negative; a set bit of the only plane turns +1 into -1.
  static void digits_of_planes(const uint32_t* planes, int64_t words, int64_t bits, int64_t count, int8_t* out) {
    const __m512i shifts = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const uint64_t valid = count >= kUnit ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    __m512i bytes = bits == 1 ? _mm512_set1_epi8(1) : _mm512_setzero_si512();
    for (int64_t b = 0; b < bits && count > 0; ++b) {
      const uint64_t plane = count > kWordBits ? load_eight(planes + b * words) : planes[b * words];
      // Row 7 - i of a matrix makes bit i of its result. For quadword 0, the rows that pick bit 0:
      const int lowest = bits == 1 ? 1 : static_cast<int>(b), rows = b == bits - 1 ? 8 - lowest : 1;
      const uint64_t targets = 0x0101010101010101u >> (64 - 8 * rows) << (8 * (8 - lowest - rows));
      const __m512i matrix = _mm512_sllv_epi64(_mm512_set1_epi64(static_cast<int64_t>(targets)), shifts);
      const __m512i source = _mm512_set1_epi64(static_cast<int64_t>(plane));
      bytes = _mm512_or_si512(bytes, _mm512_gf2p8affine_epi64_epi8(source, matrix, 0));
    }
    const __m512i inside = unpack_bits(_mm512_set1_epi64(static_cast<int64_t>(valid)));
    _mm512_storeu_si512(out, _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(inside, inside), bytes));
  }

  static int32_t sum_digits(const int8_t* digits, int64_t units, int64_t stride) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t u = 0; u < units; ++u) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), load512(digits + u * stride));
    }
    return _mm512_reduce_add_epi32(sum);
  }

  // a[r] += scale[r] * (token * sum_d 256^(digits - 1 - d) (base_d - 2 * count_d[r])) for the 16 rows of a tile
  static void add_digits(const int32_t* const* count, const int32_t* base, int32_t digits, float token,
                         const float* scale, float* a) {
    __m512 value = _mm512_setzero_ps();
    for (int32_t d = 0; d < digits; ++d) {
      const __m512i integers = _mm512_sub_epi32(_mm512_set1_epi32(base[d]), _mm512_slli_epi32(load512(count[d]), 1));
      value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(integers));
    }
    value = _mm512_mul_ps(value, _mm512_set1_ps(token));
    const __m512 row_scale = scale ? _mm512_loadu_ps(scale) : _mm512_set1_ps(1);
    _mm512_storeu_ps(a, _mm512_fmadd_ps(row_scale, value, _mm512_loadu_ps(a)));
  }

  // a[r] += (token * scale[r]) * float(base - 2 * count[r]), each step rounded
  static void add_integers(float token, const float* scale, int32_t base, const int32_t* count, float* a) {
    const __m512i integers = _mm512_sub_epi32(_mm512_set1_epi32(base), _mm512_slli_epi32(load512(count), 1));
    __m512 factor = _mm512_set1_ps(token);
    if (scale) factor = _mm512_mul_ps(factor, _mm512_loadu_ps(scale));
    const __m512 product = _mm512_mul_ps(factor, _mm512_cvtepi32_ps(integers));
    _mm512_storeu_ps(a, _mm512_add_ps(_mm512_loadu_ps(a), product));
  }

  // The bytes of 16 rows from a word on; rows past the last are the last.
  static void row_bytes(const Panel& panel, int64_t row0, int64_t word, const uint8_t** rows) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(panel.first + row0 * panel.words + word);
    const int64_t stride = panel.words * kWordBytes, last = panel.rows - 1 - row0;
    if (last >= kTile - 1) [[likely]] {
      for (int64_t r = 0; r < kTile; ++r) rows[r] = bytes + r * stride;
    } else {
      for (int64_t r = 0; r < kTile; ++r) rows[r] = bytes + (r < last ? r : last) * stride;
    }
  }
};

constexpr int64_t kShortUnits = 8;  // of a segment that is better summed row by lane
constexpr int kStreams = 4;         // tiles of a panel otherwise

// All columns of the tiles of a panel, digits column by column.
//
// A processor follows several streams of memory at a time, each in pages of its own, and so hides more of what a page
// costs. Hence the rows that are multiplied together are the r-th ones of four tiles, and each tile is a stream.
class TileCounter {
 public:
  static int64_t panel_tiles(const DigitRecord& record, const std::byte*) {
    return record.segment_units <= kShortUnits ? 1 : kStreams;
  }

  TileCounter(const DigitRecord& record, const std::byte* prepared)
      : record_(record),
        digits_(reinterpret_cast<const int8_t*>(prepared)),
        columns_(record.columns_in_use(prepared)),
        stride_(record.units * kUnit) {}

  void count(const Panel& panel, int64_t segment, int32_t* counts) {
    const int8_t* digits = digits_ + segment * record_.segment_units * kUnit;
    if (record_.segment_units <= kShortUnits) return count_short(panel, segment, digits, counts);
    const uint8_t* rows[kStreams][16];
    for (int t = 0; t < kStreams; ++t) {
      Avx512Digits::row_bytes(panel, t * 16, segment * record_.segment_words, rows[t]);
    }
    int64_t c = 0;
    for (; c + 6 <= columns_; c += 6) count_columns<6>(panel, segment, rows, digits + c * stride_, counts + c * 16);
    digits += c * stride_;
    counts += c * 16;
    switch (columns_ - c) {
      case 1:
        return count_columns<1>(panel, segment, rows, digits, counts);
      case 2:
        return count_columns<2>(panel, segment, rows, digits, counts);
      case 3:
        return count_columns<3>(panel, segment, rows, digits, counts);
      case 4:
        return count_columns<4>(panel, segment, rows, digits, counts);
      case 5:
        return count_columns<5>(panel, segment, rows, digits, counts);
      default:
        return;
    }
  }

 private:
  // Sixteen words of each of the 16 rows, row by lane.
  struct Block {
    const uint32_t* first = nullptr;
    alignas(64) uint32_t words[16][16];

    void load(const Panel& panel, int64_t word) {
      const uint8_t* rows[16];
      Avx512Digits::row_bytes(panel, 0, word, rows);
      const int64_t bytes = 16 * panel.words * kWordBytes;
      Ahead(panel.first + 16 * panel.words, bytes, 16 * word * kWordBytes).lines(16);
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi32(lanes(panel.words - word), rows[i]);
      transpose(v);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(words[i], v[i]);
      first = panel.first + word;
    }
  };

  static constexpr int64_t kAhead = 2048;  // bytes

  const DigitRecord& record_;
  const int8_t* digits_;
  int64_t columns_, stride_;
  Block blocks_[2];  // those of two planes, whose segments take turns
  int64_t last_ = 0;

  const Block& block_of(const Panel& panel, int64_t word) {
    const uint32_t* first = panel.first + word / 16 * 16;
    for (const Block& block : blocks_) {
      if (block.first == first) return block;
    }
    last_ = 1 - last_;
    blocks_[last_].load(panel, word / 16 * 16);
    return blocks_[last_];
  }

  // C columns, one row of each stream at a time: their sums stay in registers over the whole segment. Where sums are
  // few, kChains of each run side by side to hide latency.
  template <int C>
  void count_columns(const Panel& panel, int64_t segment, const uint8_t* const (*rows)[16], const int8_t* digits,
                     int32_t* counts) {
    constexpr int kChains = C >= 3 ? 1 : C == 2 ? 2 : 4;
    const int64_t words = record_.words_of(segment), units = (words + 1) / 2;
    const int64_t whole = segment * record_.segment_words + 2 * units > panel.words ? units - 1 : units;
    const int64_t row_bytes = panel.words * kWordBytes;
    const int64_t rows_ahead = (kAhead + row_bytes - 1) / row_bytes < 16 ? (kAhead + row_bytes - 1) / row_bytes : 16;
    __m512i sums[C][kStreams][16];
    for (int64_t r = 0; r < 16; ++r) {
      const uint8_t* ahead[kStreams];  // the same columns of a later row, maybe in the next panel
      for (int t = 0; t < kStreams; ++t) {
        const int64_t later = r + rows_ahead;
        ahead[t] = rows[t][later % 16] + (later < 16 ? 0 : kStreams * 16 * row_bytes);
      }
      __m512i acc[kChains][kStreams][C];
      for (int i = 0; i < kChains; ++i) {
        for (int t = 0; t < kStreams; ++t) {
          for (int c = 0; c < C; ++c) acc[i][t][c] = _mm512_setzero_si512();
        }
      }
      int64_t u = 0;
      for (; u + 8 <= whole; u += 8) {
        for (int t = 0; t < kStreams; ++t) _mm_prefetch(ahead[t] + 8 * u, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          __m512i q[C];
          for (int c = 0; c < C; ++c) q[c] = load512(digits + c * stride_ + (u + i) * kUnit);
          for (int t = 0; t < kStreams; ++t) {
            const __m512i bits = load_unit(rows[t][r] + 8 * (u + i));
            for (int c = 0; c < C; ++c) {
              acc[i % kChains][t][c] = _mm512_dpbusd_epi32(acc[i % kChains][t][c], bits, q[c]);
            }
          }
        }
      }
      for (; u < units; ++u) {
        for (int t = 0; t < kStreams; ++t) {
          const uint8_t* bytes = rows[t][r] + 8 * u;
          const __m512i bits = u < whole ? load_unit(bytes) : load_half_unit(bytes);
          for (int c = 0; c < C; ++c) {
            acc[0][t][c] = _mm512_dpbusd_epi32(acc[0][t][c], bits, load512(digits + c * stride_ + u * kUnit));
          }
        }
      }
      for (int t = 0; t < kStreams; ++t) {
        for (int c = 0; c < C; ++c) {
          __m512i sum = acc[0][t][c];
          for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i][t][c]);
          sums[c][t][r] = sum;
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int t = 0; t < kStreams; ++t) {
        _mm512_storeu_si512(counts + (t * record_.padded_columns() + c) * 16, sum_rows(sums[c][t]));
      }
    }
  }

  // Segments of few units: sums over the lanes of a register would cost more than the products themselves. With a row
  // in each lane there are none: bit j of a word's bytes meets the same four digits in every lane.
  void count_short(const Panel& panel, int64_t segment, const int8_t* digits, int32_t* counts) {
    int64_t c = 0;
    for (; c + 3 <= columns_; c += 3) short_columns<3>(panel, segment, digits + c * stride_, counts + c * 16);
    if (columns_ - c == 2) short_columns<2>(panel, segment, digits + c * stride_, counts + c * 16);
    if (columns_ - c == 1) short_columns<1>(panel, segment, digits + c * stride_, counts + c * 16);
  }

  template <int C>
  void short_columns(const Panel& panel, int64_t segment, const int8_t* digits, int32_t* counts) {
    constexpr int kChains = C == 1 ? 8 : 4;
    const int64_t word = segment * record_.segment_words, words = record_.words_of(segment);
    __m512i acc[kChains][C];
    for (int i = 0; i < kChains; ++i) {
      for (int c = 0; c < C; ++c) acc[i][c] = _mm512_setzero_si512();
    }
    for (int64_t w = 0; w < words;) {
      const Block& block = block_of(panel, word + w);
      const int64_t end = words - w < 16 - (word + w) % 16 ? words : w + 16 - (word + w) % 16;
      for (; w < end; ++w) {
        const __m512i rows = _mm512_load_si512(block.words[(word + w) % 16]);
        const int8_t* four = digits + w / 2 * kUnit + w % 2 * 4;
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; ++bit) {
          const __m512i matrix = _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << bit << 56));
          const __m512i bits = _mm512_gf2p8affine_epi64_epi8(rows, matrix, 0);
          for (int c = 0; c < C; ++c) {
            int32_t same;
            std::memcpy(&same, four + c * stride_ + 8 * bit, sizeof same);
            acc[bit % kChains][c] = _mm512_dpbusd_epi32(acc[bit % kChains][c], bits, _mm512_set1_epi32(same));
          }
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      __m512i sum = acc[0][c];
      for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i][c]);
      _mm512_storeu_si512(counts + c * 16, sum);
    }
  }
};

}  // namespace
}  // namespace bitinfer::cpu
