// What the AVX-512 tables share: conversions, sign words, and the exact product of digits by bits with VNNI. Included
// like activations.h, inside the target region of kernels_avx512.cpp and kernels_amx.cpp.
//
// A unit of 64 weights of a row is eight bytes. They are broadcast to the eight quadwords of a register, and one
// vgf2p8affineqb takes bit j of every byte in quadword j to a byte of 0 or 1; vpdpbusd then adds digits under set bits,
// four at a time, to 32-bit sums that cannot overflow. So a unit costs one instruction, and one more for each column.
namespace bitinfer::cpu {
namespace {

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// The low `count` lanes of 16.
__mmask16 lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

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

// A 16 x 16 transpose of 32-bit lanes.
void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      t[8 * j + i] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + i + 4], 0x88);
      t[8 * j + i + 4] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

struct Avx512Floats {
  static void load_floats(Floats src, int64_t n, float* dst) {
    if (src.dtype == Dtype::kFloat32) {
      if (n > 0) std::memcpy(dst, src.data, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    const auto* values = static_cast<const uint16_t*>(src.data);
    const bool half = src.dtype == Dtype::kFloat16;
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i bits = _mm256_maskz_loadu_epi16(lanes(n - i), values + i);
      const __m512 brain = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      _mm512_mask_storeu_ps(dst + i, lanes(n - i), half ? _mm512_cvtph_ps(bits) : brain);
    }
  }

  static void store_floats(const float* src, int64_t n, Dtype dtype, void* dst) {
    if (dtype == Dtype::kFloat32) {
      if (n > 0) std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    auto* values = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(lanes(n - i), src + i);
      const __m256i bits = dtype == Dtype::kFloat16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                                    : _mm512_cvtepi32_epi16(to_bfloat16_bits(value));
      _mm256_mask_storeu_epi16(values + i, lanes(n - i), bits);
    }
  }

  // Round to nearest even on the upper half of each float; NaN stays NaN. (vcvtneps2bf16 flushes subnormals.)
  static __m512i to_bfloat16_bits(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
  }

  static void pack_signs(const float* x, int64_t words, uint32_t* out) {
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t w = 0; w < words; ++w) {
      const __mmask16 low = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + w * kWordBits), zero, _CMP_LT_OQ);
      const __mmask16 high = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + w * kWordBits + 16), zero, _CMP_LT_OQ);
      out[w] = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
    }
  }

  static void pack_plane(const int8_t* q, int64_t words, int bit, uint32_t* plane) {
    const __m256i wanted = _mm256_set1_epi8(static_cast<char>(1 << bit));
    for (int64_t w = 0; w < words; ++w) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + w * kWordBits));
      plane[w] = _mm256_test_epi8_mask(bytes, wanted);
    }
  }
};

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
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t row = row0 + r < panel.rows ? row0 + r : panel.rows - 1;
      rows[r] = reinterpret_cast<const uint8_t*>(panel.first + row * panel.words + word);
    }
  }
};

// C columns of a tile, R rows at a time: R * C sums stay in registers over the whole segment. Digits of a column are
// `stride` bytes from those of the next. Where sums are few, kChains of each run side by side to hide latency.
template <int R, int C>
void count_columns(const uint8_t* const* rows, int64_t units, bool half, const int8_t* digits, int64_t stride,
                   Ahead& ahead, int32_t* counts) {
  constexpr int kChains = R * C >= 10 ? 1 : R * C >= 5 ? 2 : 4;
  __m512i sums[C][16];
  for (int r0 = 0; r0 < 16; r0 += R) {
    __m512i acc[kChains][R][C];
    for (int i = 0; i < kChains; ++i) {
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) acc[i][r][c] = _mm512_setzero_si512();
      }
    }
    const int64_t whole = units - half;
    int64_t u = 0;
    for (; u + 8 <= whole; u += 8) {
      ahead.lines(R);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m512i q[C];
        for (int c = 0; c < C; ++c) q[c] = load512(digits + c * stride + (u + i) * kUnit);
        for (int r = 0; r < R; ++r) {
          const __m512i bits = load_unit(rows[r0 + r] + 8 * (u + i));
          for (int c = 0; c < C; ++c) {
            acc[i % kChains][r][c] = _mm512_dpbusd_epi32(acc[i % kChains][r][c], bits, q[c]);
          }
        }
      }
    }
    for (; u < units; ++u) {
      for (int r = 0; r < R; ++r) {
        const uint8_t* bytes = rows[r0 + r] + 8 * u;
        const __m512i bits = u < whole ? load_unit(bytes) : load_half_unit(bytes);
        for (int c = 0; c < C; ++c) {
          acc[0][r][c] = _mm512_dpbusd_epi32(acc[0][r][c], bits, load512(digits + c * stride + u * kUnit));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        __m512i sum = acc[0][r][c];
        for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i][r][c]);
        sums[c][r0 + r] = sum;
      }
    }
  }
  for (int c = 0; c < C; ++c) _mm512_storeu_si512(counts + c * 16, sum_rows(sums[c]));
}

constexpr int64_t kAhead = 1280;  // words

// All columns of one tile, digits column by column.
void count_tile(const Panel& panel, const DigitRecord& record, int64_t columns, int64_t segment,
                const std::byte* prepared, int32_t* counts) {
  const int64_t word = segment * record.segment_words, words = record.words_of(segment), units = (words + 1) / 2;
  const int64_t stride = record.units * kUnit;
  const bool half = word + 2 * units > panel.words;
  const auto* digits = reinterpret_cast<const int8_t*>(prepared) + segment * record.segment_units * kUnit;
  const uint8_t* rows[16];
  Avx512Digits::row_bytes(panel, 0, word, rows);
  Ahead ahead(panel.first + 16 * word + kAhead);
  int64_t c = 0;
  for (; c + 6 <= columns; c += 6)
    count_columns<4, 6>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
  switch (columns - c) {
    case 1:
      return count_columns<1, 1>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
    case 2:
      return count_columns<2, 2>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
    case 3:
      return count_columns<4, 3>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
    case 4:
      return count_columns<4, 4>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
    case 5:
      return count_columns<4, 5>(rows, units, half, digits + c * stride, stride, ahead, counts + c * 16);
    default:
      return;
  }
}

}  // namespace
}  // namespace bitinfer::cpu
