// Tokens as rows of signed bytes, for tables that multiply bytes by unpacked bits. Included like activations.h, after
// sign_gemm.h.
//
//   z[t, k] ~ scale[t] * q[t, k],   q = q_0 + 256 * q_1 + 65536 * q_2,   each digit q_d a signed byte
//
// An integer activation is one digit. A floating point one becomes a fixed-point number of its token's largest
// magnitude: two digits for bfloat16, whose own rounding is 64 times as coarse, and three, 24 bits, for the others,
// which is what float32 sums resolve. A product of a token is then `digits` columns of an exact integer product.
//
// Columns of the weight are taken 64 at a time, a unit: eight bytes of packed signs. Byte 8*j + i of a unit's digits
// belongs to weight column 8*i + j, since bit j of all eight bytes comes out of one instruction. A segment (the
// columns that share a scale) starts with a unit of its own; digits past its end are zero.
//
// Isa provides: load_floats, digits_of_floats, digits_of_planes, sum_digits, tiles_of_columns, kTileColumns, tiled().
namespace bitinfer::cpu {
namespace {

constexpr int64_t kUnit = 64;

// The memory of prepared tokens: digits, then base[column][segment] = sum of the digits there, then what is per token.
struct DigitRecord {
  int64_t m, digits, columns, words, segments, segment_words, segment_units, units, padded_columns;
  bool tiled;

  // padded_columns > 0: the digits of that many columns lie in tiles of kTileColumns
  DigitRecord(const Weight& w, int64_t tokens, int64_t digits_per_token, int64_t segment, int64_t tile_columns)
      : m(tokens), digits(digits_per_token), columns(tokens * digits_per_token), words(w.words()) {
    segments = group_count(w.k, segment);
    segment_words = segment ? segment / kWordBits : words;
    segment_units = (segment_words + 1) / 2;
    units = segments * segment_units;
    tiled = tile_columns > 0;
    padded_columns = tiled ? (columns + tile_columns - 1) / tile_columns * tile_columns : columns;
  }
  int64_t words_of(int64_t segment) const {
    const int64_t left = words - segment * segment_words;
    return left < segment_words ? left : segment_words;
  }
  int64_t base_offset() const { return padded_columns * units * kUnit; }
  int64_t scale_offset() const { return base_offset() + columns * segments * int64_t{sizeof(int32_t)}; }
  int64_t shift_offset() const { return scale_offset() + m * int64_t{sizeof(float)}; }
  int64_t sums_offset() const { return shift_offset() + m * int64_t{sizeof(float)}; }
  size_t bytes() const { return static_cast<size_t>(sums_offset() + m * segments * int64_t{sizeof(float)}); }

  int32_t* base(std::byte* p) const { return reinterpret_cast<int32_t*>(p + base_offset()); }
  float* scale(std::byte* p) const { return reinterpret_cast<float*>(p + scale_offset()); }
  float* shift(std::byte* p) const { return reinterpret_cast<float*>(p + shift_offset()); }
  float* sums(std::byte* p) const { return reinterpret_cast<float*>(p + sums_offset()); }
  const int32_t* base(const std::byte* p) const { return reinterpret_cast<const int32_t*>(p + base_offset()); }
  const float* scale(const std::byte* p) const { return reinterpret_cast<const float*>(p + scale_offset()); }
  const float* shift(const std::byte* p) const { return reinterpret_cast<const float*>(p + shift_offset()); }
  const float* sums(const std::byte* p) const { return reinterpret_cast<const float*>(p + sums_offset()); }
};

template <class Isa>
DigitRecord record_of(const SignGemm& p) {
  const int64_t digits = p.x.dtype == Dtype::kBFloat16 ? 2 : 3;
  return {p.weight, p.m, digits, p.weight.group_size, Isa::tiled(p.m * digits) ? Isa::kTileColumns : 0};
}

template <class Isa>
DigitRecord record_of(const PopcountGemm& p) {
  return {p.weight, p.m, 1, p.segment(), Isa::tiled(p.m) ? Isa::kTileColumns : 0};
}

template <class Isa, typename Problem>
size_t digit_prepared_bytes(const Problem& p) {
  return record_of<Isa>(p).bytes();
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

// Puts the rows of digits of the tokens [token_begin, token_end) where the kernel wants them, and their sums beside.
// rows: [columns of these tokens][units * kUnit]; the first token is a multiple of kTileColumns if they are tiled.
template <class Isa>
void place_digits(const DigitRecord& record, const int8_t* rows, int64_t token_begin, int64_t token_end,
                  std::byte* prepared) {
  const int64_t row_bytes = record.units * kUnit, first = token_begin * record.digits;
  const int64_t columns = (token_end - token_begin) * record.digits;
  for (int64_t c = 0; c < columns; ++c) {
    int32_t* base = record.base(prepared) + (first + c) * record.segments;
    for (int64_t s = 0; s < record.segments; ++s) {
      base[s] = Isa::sum_digits(rows + c * row_bytes + s * record.segment_units * kUnit, record.segment_units);
    }
  }
  if (record.tiled) Isa::tiles_of_columns(rows, columns, record.units, prepared + first * row_bytes);
}

// A token that fixed-point numbers do not represent: infinite, not a number, or too small for their scale.
constexpr float kNoDigits = -1;

template <class Isa>
void sign_digits(const SignGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const DigitRecord record = record_of<Isa>(p);
  const int64_t k = p.weight.k, row_bytes = record.units * kUnit;
  const float limit = record.digits == 2 ? 127 * 256 : 127 * 65536;
  Buffer<float> z(k + kUnit), columns(k);
  Buffer<int8_t> staging(record.tiled ? (token_end - token_begin) * record.digits * row_bytes : 0);
  int8_t* rows =
      record.tiled ? staging.data() : reinterpret_cast<int8_t*>(prepared) + token_begin * record.digits * row_bytes;
  for (int64_t t = token_begin; t < token_end; ++t) {
    Isa::load_floats(p.x + t * p.stride, k, z.data());
    record.shift(prepared)[t] = 0;
    if (p.in_shift) {
      Isa::load_floats(p.in_shift, k, columns.data());
      record.shift(prepared)[t] = static_cast<float>(dot(z.data(), columns.data(), k));
    }
    if (p.in_scale) {
      Isa::load_floats(p.in_scale, k, columns.data());
      for (int64_t i = 0; i < k; ++i) z[i] *= columns[i];
    }
    for (int64_t s = 0; p.weight.group_shift && s < record.segments; ++s) {
      const int64_t begin = s * record.segment_words * kWordBits, count = record.words_of(s) * kWordBits;
      record.sums(prepared)[t * record.segments + s] =
          static_cast<float>(sum(z.data() + begin, count < k - begin ? count : k - begin));
    }
    const float absmax = largest_magnitude(z.data(), k);
    const bool plain = absmax >= kSmallestAbsmax && float_bits(absmax) < 0x7f800000u;
    record.scale(prepared)[t] = plain ? absmax / limit : absmax == 0 ? 0 : kNoDigits;
    const float factor = plain ? limit / absmax : 0;
    int8_t* out = rows + (t - token_begin) * record.digits * row_bytes;
    for_each_unit(record, k, [&](int64_t unit, int64_t column, int64_t count) {
      Isa::digits_of_floats(z.data() + column, plain ? count : 0, factor, record.digits, out + unit * kUnit, row_bytes);
    });
  }
  place_digits<Isa>(record, rows, token_begin, token_end, prepared);
}

template <class Isa>
void popcount_digits(const PopcountGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const DigitRecord record = record_of<Isa>(p);
  const int64_t row_bytes = record.units * kUnit;
  Buffer<int8_t> staging(record.tiled ? (token_end - token_begin) * row_bytes : 0);
  int8_t* rows = record.tiled ? staging.data() : reinterpret_cast<int8_t*>(prepared) + token_begin * row_bytes;
  for (int64_t t = token_begin; t < token_end; ++t) {
    const uint32_t* planes = p.planes + t * p.bits * record.words;
    int8_t* out = rows + (t - token_begin) * row_bytes;
    for_each_unit(record, p.weight.k, [&](int64_t unit, int64_t column, int64_t count) {
      Isa::digits_of_planes(planes + column / kWordBits, record.words, p.bits, count, out + unit * kUnit);
    });
  }
  place_digits<Isa>(record, rows, token_begin, token_end, prepared);
}

}  // namespace
}  // namespace bitinfer::cpu
