// pack_signs, pack_activations and layer_norm for any instruction set. Each kernels_<isa>.cpp includes this header
// inside its target region, so that the plain loops below are vectorised for that set; standard headers come before.
//
// Isa provides: load_floats, store_floats (conversions), pack_signs (whole words of floats), pack_plane (one bit of
// each of 32*words integers).
namespace bitinfer::cpu {
namespace {

// Asks for memory that will be read soon, into the second-level cache; it may lie outside of any allocation. Four
// quarters go side by side: a processor follows several streams, each in pages of its own, faster than one.
class Ahead {
 public:
  Ahead() : Ahead(nullptr, 0, 0) {}
  // `bytes` of memory, of which so many have been asked for
  Ahead(const void* first, int64_t bytes, int64_t done)
      : next_(reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(done / kStreams)),
        stride_(static_cast<uintptr_t>(bytes / kStreams)) {}
  void lines(int64_t count) {
    for (due_ += count; due_ >= kStreams; due_ -= kStreams, next_ += 64) {
      for (uintptr_t i = 0; i < kStreams; ++i) {
        __builtin_prefetch(reinterpret_cast<const void*>(next_ + i * stride_), 0, 2);
      }
    }
  }

 private:
  static constexpr int64_t kStreams = 4;
  uintptr_t next_, stride_;
  int64_t due_ = 0;
};

constexpr float kSmallestAbsmax = 0x1p-96f;  // smaller blocks become zeros: 127 / absmax must stay finite

template <class Isa>
void pack_signs(const PackSigns& p, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kPiece = 512;
  alignas(64) float piece[kPiece];
  const int64_t words = words_per_row(p.k);
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t k = 0; k < p.k; k += kPiece) {
      const int64_t count = p.k - k < kPiece ? p.k - k : kPiece, whole = words_per_row(count);
      Isa::load_floats(p.x + (row * p.stride + k), count, piece);
      for (int64_t i = count; i < whole * kWordBits; ++i) piece[i] = 0;
      Isa::pack_signs(piece, whole, p.words + row * words + k / kWordBits);
    }
  }
}

// z = in_scale * x, and what an in_shift adds to all outputs: in_shift . x, summed in double in an order that does not
// depend on the instruction set. All that is read is read once, side by side.
template <class Isa>
float scale_token(Floats x, Floats in_scale, Floats in_shift, int64_t k, float* z) {
  constexpr int64_t kPiece = 512;
  alignas(64) float columns[kPiece];
  double part[8] = {};
  for (int64_t begin = 0; begin < k; begin += kPiece) {
    const int64_t count = k - begin < kPiece ? k - begin : kPiece;
    float* piece = z + begin;
    Isa::load_floats(x + begin, count, piece);
    if (in_shift) {
      Isa::load_floats(in_shift + begin, count, columns);
      for (int64_t i = 0; i + 8 <= count; i += 8) {
        for (int j = 0; j < 8; ++j) part[j] += static_cast<double>(piece[i + j]) * columns[i + j];
      }
      for (int64_t i = count / 8 * 8; i < count; ++i) part[i % 8] += static_cast<double>(piece[i]) * columns[i];
    }
    if (in_scale) {
      Isa::load_floats(in_scale + begin, count, columns);
      for (int64_t i = 0; i < count; ++i) piece[i] *= columns[i];
    }
  }
  return static_cast<float>(((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7])));
}

inline double sum(const float* x, int64_t n) {
  double part[8] = {};
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += x[i + j];
  }
  for (int64_t i = n / 8 * 8; i < n; ++i) part[i % 8] += x[i];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// sum of (x - mean)^2
inline double squares(const float* x, double mean, int64_t n) {
  double part[8] = {};
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += (x[i + j] - mean) * (x[i + j] - mean);
  }
  for (int64_t i = n / 8 * 8; i < n; ++i) part[i % 8] += (x[i] - mean) * (x[i] - mean);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// One block of a token: returns the scale and writes the integers.
inline float quantise(const float* z, int64_t n, int64_t bits, int8_t* q) {
  if (bits == 1) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += bits_float(float_bits(z[i]) & 0x7fffffffu);
    const auto mean = static_cast<float>(total / static_cast<double>(n));
    const bool bad = (float_bits(mean) & 0x7fffffffu) >= 0x7f800000u;
    for (int64_t i = 0; i < n; ++i) q[i] = !bad && z[i] < 0 ? -1 : 1;
    return bad ? bits_float(0x7fc00000u) : mean;
  }
  int32_t largest = 0;  // magnitudes order like their bits, NaN above infinity
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<int32_t>(float_bits(z[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float absmax = bits_float(static_cast<uint32_t>(largest));
  if (largest >= 0x7f800000 || absmax < kSmallestAbsmax) {
    for (int64_t i = 0; i < n; ++i) q[i] = 0;
    return largest >= 0x7f800000 ? bits_float(0x7fc00000u) : 0.0f;
  }
  const auto highest = static_cast<float>((1 << (bits - 1)) - 1);
  const float factor = highest / absmax;
  for (int64_t i = 0; i < n; ++i) {
    // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
    const uint32_t rounded = float_bits(z[i] * factor + 12582912.0f);
    q[i] = static_cast<int8_t>(static_cast<int32_t>(rounded) - 0x4b400000);
  }
  return absmax / highest;
}

template <class Isa>
void pack_activations(const PackActivations& p, int64_t token_begin, int64_t token_end) {
  const int64_t k = p.k, words = words_per_row(k), blocks = group_count(k, p.block_size);
  const int64_t segment = segment_size(p.block_size, p.group_size), segments = group_count(k, segment);
  Buffer<float> z(k);
  Buffer<int8_t> q(words * kWordBits);
  for (int64_t i = k; i < words * kWordBits; ++i) q[i] = 0;
  for (int64_t t = token_begin; t < token_end; ++t) {
    const float shift = scale_token<Isa>(p.x + t * p.stride, p.in_scale, p.in_shift, k, z.data());
    if (p.in_shift) p.shift[t] = shift;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * p.block_size, end = p.block_size && begin + p.block_size < k ? begin + p.block_size : k;
      p.scale[t * blocks + b] = quantise(z.data() + begin, end - begin, p.bits, q.data() + begin);
    }
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t begin = s * segment, end = segment && begin + segment < k ? begin + segment : k;
      int32_t total = 0;
      for (int64_t i = begin; i < end; ++i) total += q[i];
      p.sum[t * segments + s] = total;
    }
    for (int64_t b = 0; b < p.bits; ++b) {  // the one plane of one bit is the sign
      Isa::pack_plane(q.data(), words, p.bits == 1 ? 7 : static_cast<int>(b), p.planes + (t * p.bits + b) * words);
    }
  }
}

template <class Isa>
void layer_norm(const LayerNorm& p, int64_t token_begin, int64_t token_end) {
  Buffer<float> row(p.n), bias(p.bias ? p.n : 0);
  if (p.bias) Isa::load_floats(p.bias, p.n, bias.data());
  for (int64_t t = token_begin; t < token_end; ++t) {
    const float* a = p.a + t * p.n;
    const double mean = sum(a, p.n) / static_cast<double>(p.n);
    const double factor = 1 / std::sqrt(squares(a, mean, p.n) / static_cast<double>(p.n) + p.eps);
    for (int64_t i = 0; i < p.n; ++i) row[i] = static_cast<float>((a[i] - mean) * factor);
    if (p.bias) {
      for (int64_t i = 0; i < p.n; ++i) row[i] += bias[i];
    }
    Isa::store_floats(row.data(), p.n, p.y.dtype, p.y.at(t, 0));
  }
}

}  // namespace
}  // namespace bitinfer::cpu
