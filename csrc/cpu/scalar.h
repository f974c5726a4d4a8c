// Conversions that the portable files share. Included like activations.h.
namespace bitinfer::cpu {
namespace {

struct ScalarFloats {
  static void load_floats(Floats src, int64_t n, float* dst) {
    if (n == 0) return;
    if (src.dtype == Dtype::kFloat32) {
      std::memcpy(dst, src.data, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    const auto* values = static_cast<const uint16_t*>(src.data);
    if (src.dtype == Dtype::kFloat16) {
      for (int64_t i = 0; i < n; ++i) dst[i] = half_to_float(values[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = bfloat16_to_float(values[i]);
    }
  }

  static void store_floats(const float* src, int64_t n, Dtype dtype, void* dst) {
    if (n == 0) return;
    if (dtype == Dtype::kFloat32) {
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    auto* values = static_cast<uint16_t*>(dst);
    if (dtype == Dtype::kFloat16) {
      for (int64_t i = 0; i < n; ++i) values[i] = float_to_half(src[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) values[i] = float_to_bfloat16(src[i]);
    }
  }
};

}  // namespace
}  // namespace bitinfer::cpu
