// sign_gemm for any instruction set: the loops around a table lookup. Included like activations.h.
//
//   y[t, n] = sum_p sum_g scale[p, n, g] * sum_{k in g} S[p, n, k] * z[t, k] + ... ,   z = in_scale * x
//
// A few neighbouring columns have few sign patterns: three columns have the eight sums +-a+-b+-c. `prepare` computes
// all of them for every token, and a row's product is then one lookup and one addition for each few weights, with the
// packed bits as the index: no multiplication, and no unpacked weight anywhere.
//
//   row block (kRows)  x  chunk of columns (kWords words, or the part of them in one group)  x  all tokens of the pass
//
// The words of a chunk are copied to a tile that suits the lookups. Meanwhile the next row block is asked for, a few
// lines with each word, in the order of memory, which is what the processor's own prefetchers go along with. Sums of a
// chunk start at zero and are then added to the group's, so float32 rounding errors grow with the chunk's length and
// not with k. Bound by instructions, not by memory.
//
// Isa provides: kRows, kWords, kTableFloats (per word), build_tables, Tile with load(), lookup().
namespace bitinfer::cpu {
namespace {

constexpr int64_t kWordBytes = sizeof(uint32_t);

// A prepared token: tables [words * kTableFloats], sums of z per group [groups], the in_shift product [1].
template <class Isa>
struct SignRecord {
  int64_t words, groups, stride;

  explicit SignRecord(const Weight& w) : words(w.words()), groups(w.groups()) {
    stride = (words * Isa::kTableFloats + groups + 1 + 15) / 16 * 16;
  }
  int64_t group_sums() const { return words * Isa::kTableFloats; }
  int64_t shift() const { return group_sums() + groups; }
};

template <class Isa>
size_t sign_prepared_bytes(const SignGemm& p) {
  return static_cast<size_t>(p.m * SignRecord<Isa>(p.weight).stride) * sizeof(float);
}

template <class Isa>
int64_t sign_pass(const SignGemm& p) {
  return pass_in_cache(static_cast<size_t>(SignRecord<Isa>(p.weight).stride) * sizeof(float));
}

template <class Isa>
void sign_prepare(const SignGemm& p, std::byte* prepared, int64_t token_begin, int64_t token_end) {
  const SignRecord<Isa> record(p.weight);
  const int64_t k = p.weight.k, padded = record.words * kWordBits;
  const int64_t group = p.weight.group_size ? p.weight.group_size : k;
  Buffer<float> z(padded);
  for (int64_t t = token_begin; t < token_end; ++t) {
    float* out = reinterpret_cast<float*>(prepared) + t * record.stride;
    out[record.shift()] = scale_token<Isa>(p.x + t * p.stride, p.in_scale, p.in_shift, k, z.data());
    for (int64_t i = k; i < padded; ++i) z[i] = 0;
    if (p.weight.group_shift) {
      for (int64_t g = 0; g < record.groups; ++g) {
        const int64_t count = k - g * group < group ? k - g * group : group;
        out[record.group_sums() + g] = static_cast<float>(sum(z.data() + g * group, count));
      }
    }
    Isa::build_tables(z.data(), record.words, out);
  }
}

// Converts source[row, g] of `rows` rows from row0 on to out[g * stride + row]. An Isa may transpose faster.
template <class Isa>
void load_row_scales(Floats source, int64_t row0, int64_t rows, int64_t groups, int64_t stride, float* staging,
                     float* out) {
  Isa::load_floats(source + row0 * groups, rows * groups, staging);
  if constexpr (requires { Isa::transpose_floats(staging, rows, groups, stride, out); }) {
    Isa::transpose_floats(staging, rows, groups, stride, out);
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < rows; ++r) out[g * stride + r] = staging[r * groups + g];
    }
  }
}

template <class Isa>
void sign_multiply(const SignGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kRows = Isa::kRows, kWords = Isa::kWords;
  const Weight& w = p.weight;
  const SignRecord<Isa> record(w);
  const auto* tokens = reinterpret_cast<const float*>(prepared);
  const int64_t words = record.words, groups = record.groups;
  const int64_t group_words = w.group_size ? w.group_size / kWordBits : words;
  const int64_t scale_floats = w.scale || w.group_shift ? groups * kRows : 0;
  Buffer<float> total(p.m * kRows), sums(p.m * kRows), scale(scale_floats), staging(scale_floats), bias(kRows);
  typename Isa::Tile tile;
  Ahead ahead;
  for (int64_t n0 = row_begin; n0 < row_end; n0 += kRows) {
    const int64_t rows = row_end - n0 < kRows ? row_end - n0 : kRows;
    for (int64_t i = 0; i < p.m * kRows; ++i) total[i] = 0;
    for (int64_t plane = 0; plane < w.planes; ++plane) {
      if (w.scale) {
        load_row_scales<Isa>(w.scale + plane * w.n * groups, n0, rows, groups, kRows, staging.data(), scale.data());
      }
      const uint32_t* signs = w.signs + (plane * w.n + n0) * words;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t word_end = (g + 1) * group_words < words ? (g + 1) * group_words : words;
        float* target = w.scale ? sums.data() : total.data();
        if (w.scale) {
          for (int64_t i = 0; i < p.m * kRows; ++i) sums[i] = 0;
        }
        for (int64_t w0 = g * group_words; w0 < word_end;) {
          const int64_t offset = w0 % kWords, tile_begin = w0 - offset, tile_end = tile_begin + kWords;
          const int64_t count = (word_end < tile_end ? word_end : tile_end) - w0;
          if (offset == 0) {
            tile.load(signs + w0, words, rows, words - w0 < kWords ? words - w0 : kWords);
            ahead = Ahead(signs + kRows * words, kRows * words * kWordBytes, kRows * tile_begin * kWordBytes);
          }
          Isa::lookup(tile, offset, rows, count, tokens + w0 * Isa::kTableFloats, record.stride, p.m, ahead, target);
          w0 += count;
        }
        if (w.scale) {
          for (int64_t t = 0; t < p.m; ++t) {
            for (int64_t r = 0; r < rows; ++r) total[t * kRows + r] += scale[g * kRows + r] * sums[t * kRows + r];
          }
        }
      }
    }
    if (w.group_shift) {
      load_row_scales<Isa>(w.group_shift, n0, rows, groups, kRows, staging.data(), scale.data());
      for (int64_t t = 0; t < p.m; ++t) {
        const float* group_sum = tokens + t * record.stride + record.group_sums();
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t r = 0; r < rows; ++r) total[t * kRows + r] += scale[g * kRows + r] * group_sum[g];
        }
      }
    }
    if (w.bias) Isa::load_floats(w.bias + n0, rows, bias.data());
    for (int64_t t = 0; t < p.m; ++t) {
      float* row = total.data() + t * kRows;
      const float shift = tokens[t * record.stride + record.shift()];
      if (p.in_shift) {
        for (int64_t r = 0; r < rows; ++r) row[r] += shift;
      }
      if (w.bias) {
        for (int64_t r = 0; r < rows; ++r) row[r] += bias[r];
      }
      Isa::store_floats(row, rows, p.y.dtype, p.y.at(t, n0));
    }
  }
}

template <class Isa>
constexpr Gemm<SignGemm> sign_gemm_kernel() {
  return {Isa::kRowTile, sign_pass<Isa>, sign_prepared_bytes<Isa>, sign_prepare<Isa>, sign_multiply<Isa>};
}

}  // namespace
}  // namespace bitinfer::cpu
