// popcount_gemm for any instruction set: the loops around a table lookup. Included like activations.h, after
// sign_gemm.h.
//
//   I[p, s] = sum_{k in s} S[p, n, k] * q[t, k] = sum(q) - 2 * C,   C = sum of q over the columns whose sign bit is set
//
// C is a sum over groups of four columns, and four columns have sixteen subsets: `prepare` puts the integers together
// from their bit planes and tabulates the subset sums, which fit a byte (or two, for eight bits) and so a register. A
// row's C is then one in-register lookup for each four weights, with a nibble of the packed word as the index. Per
// weight that is a fraction of what counting the bits of `w & plane` costs for each of eight planes, and less than
// unpacking to bytes.
//
//   row block (kRows)  x  segment, in chunks of kWords words  x  all tokens of the pass
//
// The float32 epilogue follows bitinfer.ops.popcount_gemm to the rounding; nothing in it may be contracted or
// reordered.
//
// Isa provides: kRows, kWords, table_bytes(bits) per word, offset(bits) by which the lookups of one word come out too
// large (tables hold unsigned bytes), add_plane, build_tables, Tile with load(), lookup().
namespace bitinfer::cpu {
namespace {

// A prepared token: tables [words * table_bytes], then int32 base[segments] = sum(q) + 2 * (offsets of all lookups).
template <class Isa>
struct CountRecord {
  int64_t words, segments, segment_words, table_bytes, stride;

  explicit CountRecord(const PopcountGemm& p)
      : words(p.weight.words()), segments(p.segments()), table_bytes(Isa::table_bytes(p.bits)) {
    segment_words = p.segment() ? p.segment() / kWordBits : words;
    stride = (words * table_bytes + segments * int64_t{sizeof(int32_t)} + 63) / 64 * 64;
  }
  int64_t base() const { return words * table_bytes; }
  int64_t end_of(int64_t segment) const {
    return (segment + 1) * segment_words < words ? (segment + 1) * segment_words : words;
  }
};

template <class Isa>
size_t count_prepared_bytes(const PopcountGemm& p) {
  return static_cast<size_t>(p.m * CountRecord<Isa>(p).stride);
}

template <class Isa>
int64_t count_pass(const PopcountGemm& p) {
  return pass_in_cache(static_cast<size_t>(CountRecord<Isa>(p).stride));
}

template <class Isa>
void count_prepare(const PopcountGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const CountRecord<Isa> record(p);
  const int64_t words = record.words, padded = words * kWordBits;
  Buffer<int8_t> q(padded);
  for (int64_t t = token_begin; t < token_end; ++t) {
    const uint32_t* planes = p.planes + t * p.bits * words;
    for (int64_t i = 0; i < padded; ++i) q[i] = p.bits == 1;
    for (int64_t b = 0; b < p.bits; ++b) {
      // the top plane counts negative; a set bit of the only plane turns +1 into -1
      const int weight = p.bits == 1 ? -2 : b == p.bits - 1 ? -(1 << b) : 1 << b;
      Isa::add_plane(planes + b * words, words, static_cast<int8_t>(weight), q.data());
    }
    for (int64_t i = p.weight.k; i < padded; ++i) q[i] = 0;
    std::byte* out = prepared + t * record.stride;
    Isa::build_tables(q.data(), words, p.bits, out);
    auto* base = reinterpret_cast<int32_t*>(out + record.base());
    for (int64_t s = 0; s < record.segments; ++s) {
      const int64_t begin = s * record.segment_words, end = record.end_of(s);
      int32_t total = 0;
      for (int64_t i = begin * kWordBits; i < end * kWordBits; ++i) total += q[i];
      base[s] = total + 2 * static_cast<int32_t>(end - begin) * Isa::offset(p.bits);
    }
  }
}

// a[r] += (token * scale[r]) * float(base - 2 * count[r])
inline void add_integers(float token, const float* scale, int32_t base, const int32_t* count, int64_t rows, float* a) {
  if (scale != nullptr) {
    for (int64_t r = 0; r < rows; ++r) a[r] += (token * scale[r]) * static_cast<float>(base - 2 * count[r]);
  } else {
    for (int64_t r = 0; r < rows; ++r) a[r] += token * static_cast<float>(base - 2 * count[r]);
  }
}

template <class Isa>
void count_multiply(const PopcountGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kRows = Isa::kRows, kWords = Isa::kWords;
  const Weight& w = p.weight;
  const CountRecord<Isa> record(p);
  const int64_t words = record.words, groups = w.groups(), blocks = p.blocks(), segments = record.segments;
  const int64_t group = w.group_size ? w.group_size : w.k, block = p.block_size ? p.block_size : w.k;
  const int64_t plane_floats = groups * kRows;
  Buffer<float> a(p.m * kRows), scale(w.scale ? w.planes * plane_floats : 0), shift(w.group_shift ? plane_floats : 0);
  Buffer<float> staging(w.scale || w.group_shift ? plane_floats : 0), bias(kRows);
  Buffer<int32_t> count(p.m * kRows);
  typename Isa::Tile tile;
  Ahead ahead;
  for (int64_t n0 = row_begin; n0 < row_end; n0 += kRows) {
    const int64_t rows = row_end - n0 < kRows ? row_end - n0 : kRows;
    for (int64_t i = 0; i < p.m * kRows; ++i) a[i] = 0;
    for (int64_t plane = 0; w.scale && plane < w.planes; ++plane) {
      load_row_scales<Isa>(w.scale + plane * w.n * groups, n0, rows, groups, kRows, staging.data(),
                           scale.data() + plane * plane_floats);
    }
    if (w.group_shift) load_row_scales<Isa>(w.group_shift, n0, rows, groups, kRows, staging.data(), shift.data());
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t begin = s * record.segment_words, end = record.end_of(s);
      const int64_t column = begin * kWordBits, g = column / (group ? group : 1), b = column / (block ? block : 1);
      for (int64_t plane = 0; plane < w.planes; ++plane) {
        const uint32_t* signs = w.signs + (plane * w.n + n0) * words;
        for (int64_t i = 0; i < p.m * kRows; ++i) count[i] = 0;
        for (int64_t w0 = begin; w0 < end;) {
          const int64_t offset = w0 % kWords, tile_begin = w0 - offset, tile_end = tile_begin + kWords;
          const int64_t chunk = (end < tile_end ? end : tile_end) - w0;
          if (offset == 0 || w.planes > 1) {  // planes of several segments take turns
            tile.load(signs + tile_begin, words, rows, words - tile_begin < kWords ? words - tile_begin : kWords);
            ahead = Ahead(signs + kRows * words, kRows * words * kWordBytes, kRows * tile_begin * kWordBytes);
          }
          Isa::lookup(tile, offset, rows, chunk, p.bits, prepared + w0 * record.table_bytes, record.stride, p.m, ahead,
                      count.data());
          w0 += chunk;
        }
        const float* row_scale = w.scale ? scale.data() + plane * plane_floats + g * kRows : nullptr;
        for (int64_t t = 0; t < p.m; ++t) {
          const auto* base = reinterpret_cast<const int32_t*>(prepared + t * record.stride + record.base());
          add_integers(p.act_scale[t * blocks + b], row_scale, base[s], count.data() + t * kRows, rows,
                       a.data() + t * kRows);
        }
      }
      for (int64_t t = 0; w.group_shift && t < p.m; ++t) {
        const float token = p.act_scale[t * blocks + b], total = static_cast<float>(p.act_sum[t * segments + s]);
        for (int64_t r = 0; r < rows; ++r) a[t * kRows + r] += (token * shift[g * kRows + r]) * total;
      }
    }
    if (w.bias) Isa::load_floats(w.bias + n0, rows, bias.data());
    for (int64_t t = 0; t < p.m; ++t) {
      float* row = a.data() + t * kRows;
      if (p.act_shift != nullptr) {
        for (int64_t r = 0; r < rows; ++r) row[r] += p.act_shift[t];
      }
      if (w.bias) {
        for (int64_t r = 0; r < rows; ++r) row[r] += bias[r];
      }
      Isa::store_floats(row, rows, p.y.dtype, p.y.at(t, n0));
    }
  }
}

template <class Isa>
constexpr Gemm<PopcountGemm> popcount_gemm_kernel() {
  return {Isa::kRowTile, count_pass<Isa>, count_prepared_bytes<Isa>, count_prepare<Isa>, count_multiply<Isa>};
}

}  // namespace
}  // namespace bitinfer::cpu
