// What the AVX-512 files share: conversions, sign words, transposes. Included like activations.h, inside the target
// region of each.
namespace bitinfer::cpu {
namespace {

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// The low `count` lanes of 16; none for a negative count.
__mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

// A 16 x 16 transpose of 32-bit lanes.
inline __attribute__((always_inline)) void transpose(__m512i* v) {
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

  // out[column * stride + row] = in[row * columns + column]
  static void transpose_floats(const float* in, int64_t rows, int64_t columns, int64_t stride, float* out) {
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t count = rows - r < 16 ? rows - r : 16;
      for (int64_t c = 0; c < columns; c += 16) {
        const __mmask16 inside = lanes(columns - c);
        __m512i v[16];
        for (int64_t i = 0; i < 16; ++i) {
          v[i] = i < count ? _mm512_maskz_loadu_epi32(inside, in + (r + i) * columns + c) : _mm512_setzero_si512();
        }
        transpose(v);
        for (int64_t i = 0; i < 16 && c + i < columns; ++i) {
          _mm512_mask_storeu_epi32(out + (c + i) * stride + r, lanes(count), v[i]);
        }
      }
    }
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

}  // namespace
}  // namespace bitinfer::cpu
