// Conversions that the AVX2 files share. Included like activations.h, inside the target region of each.
namespace bitinfer::cpu {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Round to nearest even on the upper half of each float; NaN stays NaN.
inline __m256i to_bfloat16_bits(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}

struct Avx2Floats {
  static void load_floats(Floats src, int64_t n, float* dst) {
    if (n == 0) return;
    if (src.dtype == Dtype::kFloat32) {
      std::memcpy(dst, src.data, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    const auto* values = static_cast<const uint16_t*>(src.data);
    const bool half = src.dtype == Dtype::kFloat16;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m128i bits = load128(values + i);
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
      _mm256_storeu_ps(dst + i, half ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(wide));
    }
    for (; i < n; ++i) dst[i] = half ? half_to_float(values[i]) : bfloat16_to_float(values[i]);
  }

  static void store_floats(const float* src, int64_t n, Dtype dtype, void* dst) {
    if (n == 0) return;
    if (dtype == Dtype::kFloat32) {
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    auto* values = static_cast<uint16_t*>(dst);
    const bool half = dtype == Dtype::kFloat16;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256 value = _mm256_loadu_ps(src + i);
      const __m256i wide = to_bfloat16_bits(value);
      const __m128i brain = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      const __m128i bits = half ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : brain;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), bits);
    }
    for (; i < n; ++i) values[i] = half ? float_to_half(src[i]) : float_to_bfloat16(src[i]);
  }
};

}  // namespace
}  // namespace bitinfer::cpu
