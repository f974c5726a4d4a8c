// Both products for tables that multiply bytes by unpacked bits: the loops around an exact integer kernel. Included
// like activations.h, after digits.h.
//
//   I[d, s] = sum_{k in s} S[p, n, k] * q_d[t, k] = base[d, s] - 2 * C,   C = sum of q_d over the set sign bits of s
//
//   row panel (one or more tiles of 16 rows)  x  segment  x  plane  x  all columns (digits of tokens) of the pass
//
// Session::count computes C: counts[tile][column][16 rows]. The epilogue then works on the 16 rows of a tile at a time,
// while the counts are in cache. For sign_gemm it is sum_p sum_g scale * (token scale * sum_d 256^(last - d) I_d) in
// float32; for popcount_gemm it is fixed to the rounding by bitinfer.ops.popcount_gemm.
//
// Isa provides: kTile, panel_tiles(record, prepared), Session, add_digits, add_integers: see avx512_digits.h.
namespace bitinfer::cpu {
namespace {

// The rows of one panel of one plane. `first` is the panel's first word; rows past the last stand for the last.
struct Panel {
  const uint32_t* first;
  int64_t words, rows;
};

// Scales of a panel's rows, by group, in float32: values[(plane * groups + g) * rows + r].
template <class Isa>
class PanelScales {
 public:
  PanelScales(Floats source, int64_t planes, const Weight& w, int64_t panel_rows)
      : source_(source),
        planes_(planes),
        n_(w.n),
        groups_(w.groups()),
        rows_(panel_rows),
        values_(source ? planes * groups_ * panel_rows : 0),
        staging_(source ? groups_ * panel_rows : 0) {}

  void load(int64_t row0, int64_t rows) {
    for (int64_t plane = 0; source_ && plane < planes_; ++plane) {
      load_row_scales<Isa>(source_ + plane * n_ * groups_, row0, rows, groups_, rows_, staging_.data(),
                           values_.data() + plane * groups_ * rows_);
    }
  }
  // null if there are none
  const float* at(int64_t plane, int64_t group, int64_t row) {
    return source_ ? values_.data() + (plane * groups_ + group) * rows_ + row : nullptr;
  }

 private:
  Floats source_;
  int64_t planes_, n_, groups_, rows_;
  Buffer<float> values_, staging_;
};

// Adds the product of a token without digits, of which the float sums are computed one by one.
template <class Isa>
void add_without_digits(const SignGemm& p, int64_t t, int64_t n0, int64_t rows, PanelScales<Isa>& scales, int64_t plane,
                        float* a) {
  const Weight& w = p.weight;
  Buffer<float> z(w.k);
  scale_token<Isa>(p.x + t * p.stride, p.in_scale, {}, w.k, z.data());
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* signs = w.signs + (plane * w.n + n0 + r) * w.words();
    const int64_t group = w.group_size ? w.group_size : w.k;
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t end = (g + 1) * group < w.k ? (g + 1) * group : w.k;
      float total = 0;
      for (int64_t i = g * group; i < end; ++i) total += is_negative(signs, i) ? -z[i] : z[i];
      const float* scale = scales.at(plane, g, r);
      a[r] += scale ? *scale * total : total;
    }
  }
}

// y = a + shift + bias for the rows of a panel, tokens outermost.
template <class Isa>
void store_panel(Floats bias, const float* shift, const Output& y, int64_t m, int64_t n0, int64_t rows, int64_t stride,
                 float* bias_row, float* a) {
  if (bias) Isa::load_floats(bias + n0, rows, bias_row);
  for (int64_t t = 0; t < m; ++t) {
    float* row = a + t * stride;
    if (shift != nullptr) {
      for (int64_t r = 0; r < rows; ++r) row[r] += shift[t];
    }
    if (bias) {
      for (int64_t r = 0; r < rows; ++r) row[r] += bias_row[r];
    }
    Isa::store_floats(row, rows, y.dtype, y.at(t, n0));
  }
}

template <class Isa>
void sign_digit_multiply(const SignGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kTile = Isa::kTile;
  const Weight& w = p.weight;
  const DigitRecord record = record_of<Isa>(p);
  const int64_t tiles = Isa::panel_tiles(record, prepared), panel_rows = tiles * kTile;
  Buffer<float> a(p.m * panel_rows), bias(panel_rows);
  Buffer<int32_t> counts(tiles * record.padded_columns() * kTile);
  PanelScales<Isa> scales(w.scale, w.planes, w, panel_rows), shifts(w.group_shift, 1, w, panel_rows);
  typename Isa::Session session(record, prepared);
  for (int64_t n0 = row_begin; n0 < row_end; n0 += panel_rows) {
    const int64_t rows = row_end - n0 < panel_rows ? row_end - n0 : panel_rows;
    const int64_t used = (rows + kTile - 1) / kTile;
    scales.load(n0, rows);
    shifts.load(n0, rows);
    for (int64_t i = 0; i < p.m * panel_rows; ++i) a[i] = 0;
    for (int64_t s = 0; s < record.segments; ++s) {
      for (int64_t plane = 0; plane < w.planes; ++plane) {
        session.count({w.signs + (plane * w.n + n0) * w.words(), w.words(), rows}, s, counts.data());
        for (int64_t tile = 0; tile < used; ++tile) {
          const int32_t* tile_counts = counts.data() + tile * record.padded_columns() * kTile;
          const float* scale = scales.at(plane, s, tile * kTile);
          for (int64_t t = 0; t < p.m; ++t) {
            const int32_t digits = record.used(prepared)[t];
            int32_t base[3] = {};
            const int32_t* count[3] = {};
            for (int32_t d = 0; d < digits; ++d) {
              base[d] = record.base(prepared)[record.column(t, d) * record.segments + s];
              count[d] = tile_counts + record.column(t, d) * kTile;
            }
            Isa::add_digits(count, base, digits, record.scale(prepared)[t], scale,
                            a.data() + (t * tiles + tile) * kTile);
          }
        }
      }
    }
    for (int64_t t = 0; t < p.m; ++t) {
      float* row = a.data() + t * panel_rows;
      if (record.used(prepared)[t] == 0) {
        for (int64_t r = 0; r < rows; ++r) row[r] = 0;
        for (int64_t plane = 0; plane < w.planes; ++plane) add_without_digits(p, t, n0, rows, scales, plane, row);
      }
      for (int64_t g = 0; w.group_shift && g < record.segments; ++g) {
        const float *shift = shifts.at(0, g, 0), sum = record.sums(prepared)[t * record.segments + g];
        for (int64_t r = 0; r < rows; ++r) row[r] += shift[r] * sum;
      }
    }
    store_panel<Isa>(w.bias, p.in_shift ? record.shift(prepared) : nullptr, p.y, p.m, n0, rows, panel_rows, bias.data(),
                     a.data());
  }
}

template <class Isa>
void popcount_digit_multiply(const PopcountGemm& p, const std::byte* prepared, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kTile = Isa::kTile;
  const Weight& w = p.weight;
  const DigitRecord record = record_of<Isa>(p);
  const int64_t tiles = Isa::panel_tiles(record, prepared), panel_rows = tiles * kTile, blocks = p.blocks();
  const int64_t group = w.group_size ? w.group_size : w.k, block = p.block_size ? p.block_size : w.k;
  const int64_t segment = p.segment();
  Buffer<float> a(p.m * panel_rows), bias(panel_rows);
  Buffer<int32_t> counts(tiles * record.padded_columns() * kTile);
  PanelScales<Isa> scales(w.scale, w.planes, w, panel_rows), shifts(w.group_shift, 1, w, panel_rows);
  typename Isa::Session session(record, prepared);
  for (int64_t n0 = row_begin; n0 < row_end; n0 += panel_rows) {
    const int64_t rows = row_end - n0 < panel_rows ? row_end - n0 : panel_rows;
    const int64_t used = (rows + kTile - 1) / kTile;
    scales.load(n0, rows);
    shifts.load(n0, rows);
    for (int64_t i = 0; i < p.m * panel_rows; ++i) a[i] = 0;
    int64_t g = 0, b = 0, begin = 0;
    for (int64_t s = 0; s < record.segments; ++s, begin += segment) {
      g += begin == (g + 1) * group;  // a segment lies within one group and one block
      b += begin == (b + 1) * block;
      for (int64_t plane = 0; plane < w.planes; ++plane) {
        session.count({w.signs + (plane * w.n + n0) * w.words(), w.words(), rows}, s, counts.data());
        for (int64_t tile = 0; tile < used; ++tile) {
          const int32_t* count = counts.data() + tile * record.padded_columns() * kTile;
          const float* scale = scales.at(plane, g, tile * kTile);
          for (int64_t t = 0; t < p.m; ++t) {
            Isa::add_integers(p.act_scale[t * blocks + b], scale, record.base(prepared)[t * record.segments + s],
                              count + t * kTile, a.data() + (t * tiles + tile) * kTile);
          }
        }
      }
      for (int64_t t = 0; w.group_shift && t < p.m; ++t) {
        const float token = p.act_scale[t * blocks + b], total = static_cast<float>(p.act_sum[t * record.segments + s]);
        const float* shift = shifts.at(0, g, 0);
        for (int64_t r = 0; r < rows; ++r) a[t * panel_rows + r] += (token * shift[r]) * total;
      }
    }
    store_panel<Isa>(w.bias, p.act_shift, p.y, p.m, n0, rows, panel_rows, bias.data(), a.data());
  }
}

}  // namespace
}  // namespace bitinfer::cpu
