// Tokens as rows of signed bytes, for tables that multiply bytes by unpacked bits. Included like activations.h, after
// sign_gemm.h.
//
//   z[t, k] ~ scale[t] * q[t, k],   q = 256 * q_0 + q_1   or   65536 * q_0 + 256 * q_1 + q_2,   each digit a signed
//   byte
//
// An integer activation is one digit. A floating point one becomes a fixed-point number of its token's largest
// magnitude: three digits, 24 bits, which is what float32 sums resolve. Two are enough for bfloat16, whose own rounding
// is 64 times as coarse, unless a few values of a token tower above all others (kCrest). A product of a token is then
// as many columns of an exact integer product.
//
// Columns of the weight are taken 64 at a time, a unit: eight bytes of packed signs. Byte 8*j + i of a unit's digits
// belongs to weight column 8*i + j, since bit j of all eight bytes comes out of one instruction. A segment (the
// columns that share a scale) starts with a unit of its own; digits past its end are zero.
//
// Isa provides: load_floats, digits_of_floats, digits_of_planes, sum_digits, tiled(), kPassColumns.
namespace bitinfer::cpu {
namespace {

constexpr int64_t kUnit = 64, kTileColumns = 16;
constexpr int64_t kFewColumns = 32;  // whose sums stay in tiles: faster, up to eight passes over the weight

// The memory of prepared tokens: digits, then base[column][segment] = sum of the digits there, then what is per token.
// The third digits of all tokens come last, so that they can be left out where no token uses them.
struct DigitRecord {
  int64_t m, digits, columns, words, segments, segment_words, segment_units, units;
  bool tiled;  // 16 columns side by side, unit by unit, as matrix tiles want them; or else column by column

  DigitRecord(const Weight& w, int64_t tokens, int64_t digits_per_token, int64_t segment, bool in_tiles)
      : m(tokens), digits(digits_per_token), columns(tokens * digits_per_token), words(w.words()), tiled(in_tiles) {
    segments = group_count(w.k, segment);
    segment_words = segment ? segment / kWordBits : words;
    segment_units = (segment_words + 1) / 2;
    units = segments * segment_units;
  }
  int64_t words_of(int64_t segment) const {
    const int64_t left = words - segment * segment_words;
    return left < segment_words ? left : segment_words;
  }
  int64_t column_tiles() const { return (columns + kTileColumns - 1) / kTileColumns; }
  int64_t padded_columns() const { return tiled ? column_tiles() * kTileColumns : columns; }
  int64_t column(int64_t token, int64_t digit) const {
    return digits == 1 ? token : digit < 2 ? 2 * token + digit : 2 * m + token;
  }
  // where the digits of a unit are, and how far from those of the next unit
  int64_t place(int64_t column, int64_t unit) const {
    if (!tiled) return (column * units + unit) * kUnit;
    return ((column / kTileColumns * units + unit) * kTileColumns + column % kTileColumns) * kUnit;
  }
  int64_t unit_stride() const { return tiled ? kTileColumns * kUnit : kUnit; }

  int64_t base_offset() const { return padded_columns() * units * kUnit; }
  int64_t scale_offset() const { return base_offset() + columns * segments * int64_t{sizeof(int32_t)}; }
  int64_t used_offset() const { return scale_offset() + m * int64_t{sizeof(float)}; }
  int64_t shift_offset() const { return used_offset() + m * int64_t{sizeof(int32_t)}; }
  int64_t sums_offset() const { return shift_offset() + m * int64_t{sizeof(float)}; }
  size_t bytes() const { return static_cast<size_t>(sums_offset() + m * segments * int64_t{sizeof(float)}); }

  template <typename T>
  static T* at(std::byte* prepared, int64_t offset) {
    return reinterpret_cast<T*>(prepared + offset);
  }
  template <typename T>
  static const T* at(const std::byte* prepared, int64_t offset) {
    return reinterpret_cast<const T*>(prepared + offset);
  }
  int8_t* digits_at(std::byte* p, int64_t column, int64_t unit) const { return at<int8_t>(p, place(column, unit)); }
  int32_t* base(std::byte* p) const { return at<int32_t>(p, base_offset()); }
  float* scale(std::byte* p) const { return at<float>(p, scale_offset()); }
  int32_t* used(std::byte* p) const { return at<int32_t>(p, used_offset()); }
  float* shift(std::byte* p) const { return at<float>(p, shift_offset()); }
  float* sums(std::byte* p) const { return at<float>(p, sums_offset()); }
  const int32_t* base(const std::byte* p) const { return at<int32_t>(p, base_offset()); }
  const float* scale(const std::byte* p) const { return at<float>(p, scale_offset()); }
  const int32_t* used(const std::byte* p) const { return at<int32_t>(p, used_offset()); }
  const float* shift(const std::byte* p) const { return at<float>(p, shift_offset()); }
  const float* sums(const std::byte* p) const { return at<float>(p, sums_offset()); }

  // Whether a column of [begin, end) holds digits that count: third ones may all be unused.
  bool in_use(const std::byte* prepared, int64_t begin, int64_t end) const {
    if (digits < 3 || begin < 2 * m) return true;
    for (int64_t t = begin - 2 * m; t < (end < columns ? end : columns) - 2 * m; ++t) {
      if (used(prepared)[t] == 3) return true;
    }
    return false;
  }
  int64_t columns_in_use(const std::byte* prepared) const {
    return digits == 3 && !in_use(prepared, 2 * m, columns) ? 2 * m : columns;
  }
};

// A third digit of a bfloat16 token is rare.
inline int64_t usual_digits(const SignGemm& p) { return p.x.dtype == Dtype::kBFloat16 ? 2 : 3; }
inline int64_t usual_digits(const PopcountGemm&) { return 1; }

template <class Isa>
DigitRecord record_of(const SignGemm& p) {
  return {p.weight, p.m, 3, p.weight.group_size, Isa::tiled(p.m * usual_digits(p))};
}

template <class Isa>
DigitRecord record_of(const PopcountGemm& p) {
  return {p.weight, p.m, 1, p.segment(), Isa::tiled(p.m)};
}

template <class Isa, typename Problem>
size_t digit_prepared_bytes(const Problem& p) {
  return record_of<Isa>(p).bytes();
}

// Tiled digits need not stay in a cache whole, only what a pass takes of them at a time.
template <class Isa, typename Problem>
int64_t digit_pass(const Problem& p) {
  if (const DigitRecord record = record_of<Isa>(p); record.tiled) {
    const int64_t each = usual_digits(p), few = p.m * each < Isa::kPassColumns;
    return (few ? kFewColumns : Isa::kPassColumns) / each / 8 * 8;
  }
  Problem one = p;
  one.m = 1;
  return pass_in_cache(digit_prepared_bytes<Isa>(one));
}

// Calls body(unit, first column, number of columns) for the units of each segment.
template <typename Body>
void for_each_unit(const DigitRecord& record, int64_t k, const Body& body) {
  for (int64_t s = 0; s < record.segments; ++s) {
    const int64_t begin = s * record.segment_words * kWordBits, last = begin + record.segment_words * kWordBits;
    const int64_t end = last < k ? last : k;
    for (int64_t u = 0; u < record.segment_units; ++u) {
      const int64_t column = begin + u * kUnit, left = end - column;
      body(s * record.segment_units + u, column, left < 0 ? 0 : left < kUnit ? left : kUnit);
    }
  }
}

// The largest |z|, or what is not finite among them: magnitudes order like their bits, NaN above infinity.
inline float largest_magnitude(const float* z, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<int32_t>(float_bits(z[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_float(static_cast<uint32_t>(largest));
}

// Two digits of a token are off by a quarter of the rounding of a bfloat16 output where the square of the largest
// magnitude is this many times the mean square.
constexpr float kCrest = 512;

inline float sum_of_squares(const float* z, int64_t n) {
  float part[32] = {};
  for (int64_t i = 0; i + 32 <= n; i += 32) {
    for (int j = 0; j < 32; ++j) part[j] += z[i + j] * z[i + j];
  }
  for (int64_t i = n / 32 * 32; i < n; ++i) part[i % 32] += z[i] * z[i];
  float total = 0;
  for (const float value : part) total += value;
  return total;
}

// Digits that represent a token; none where fixed-point numbers do not: infinite, not a number, or too small to scale.
inline int32_t digits_for(const float* z, int64_t k, float absmax, Dtype dtype) {
  if (absmax == 0) return 2;
  if (!(absmax >= kSmallestAbsmax && float_bits(absmax) < 0x7f800000u)) return 0;
  if (dtype != Dtype::kBFloat16) return 3;
  // an overflow or an underflow of the squares asks for three
  return absmax * absmax * static_cast<float>(k) < kCrest * sum_of_squares(z, k) ? 2 : 3;
}

template <class Isa>
void sum_bases(const DigitRecord& record, int64_t column, std::byte* prepared) {
  for (int64_t s = 0; s < record.segments; ++s) {
    record.base(prepared)[column * record.segments + s] = Isa::sum_digits(
        record.digits_at(prepared, column, s * record.segment_units), record.segment_units, record.unit_stride());
  }
}

template <class Isa>
void sign_digits(const SignGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const DigitRecord record = record_of<Isa>(p);
  const int64_t k = p.weight.k;
  Buffer<float> z(k);
  for (int64_t t = token_begin; t < token_end; ++t) {
    record.shift(prepared)[t] = scale_token<Isa>(p.x + t * p.stride, p.in_scale, p.in_shift, k, z.data());
    for (int64_t s = 0; p.weight.group_shift && s < record.segments; ++s) {
      const int64_t begin = s * record.segment_words * kWordBits, count = record.words_of(s) * kWordBits;
      record.sums(prepared)[t * record.segments + s] =
          static_cast<float>(sum(z.data() + begin, count < k - begin ? count : k - begin));
    }
    const float absmax = largest_magnitude(z.data(), k);
    const int32_t used = digits_for(z.data(), k, absmax, p.x.dtype);
    const float limit = used == 2 ? 127 * 256 : 127 * 65536;
    const bool zeros = used == 0 || absmax == 0;
    const float factor = zeros ? 0 : limit / absmax;
    record.used(prepared)[t] = used;
    record.scale(prepared)[t] = zeros ? 0 : absmax / limit;
    for_each_unit(record, k, [&](int64_t unit, int64_t column, int64_t count) {
      int8_t* out[3];
      for (int64_t d = 0; d < 3; ++d) out[d] = record.digits_at(prepared, record.column(t, d), unit);
      Isa::digits_of_floats(z.data() + column, zeros ? 0 : count, factor, used, out);
    });
    for (int64_t d = 0; d < 3; ++d) sum_bases<Isa>(record, record.column(t, d), prepared);
  }
}

template <class Isa>
void popcount_digits(const PopcountGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const DigitRecord record = record_of<Isa>(p);
  for (int64_t t = token_begin; t < token_end; ++t) {
    const uint32_t* planes = p.planes + t * p.bits * record.words;
    for_each_unit(record, p.weight.k, [&](int64_t unit, int64_t column, int64_t count) {
      Isa::digits_of_planes(planes + column / kWordBits, record.words, p.bits, count,
                            record.digits_at(prepared, t, unit));
    });
    sum_bases<Isa>(record, t, prepared);
  }
}

}  // namespace
}  // namespace bitinfer::cpu
