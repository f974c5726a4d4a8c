// Sums of integers over the set bits of 32 rows by byte look-ups, for the AVX2 table. Included like activations.h,
// after digits.h.
//
//   C[n] = sum over nibbles i of s_i[nibble i of row n],   s_i[j] = raise + sum of the q whose bits are set in j
//
// Four columns have sixteen subset sums. `raise` makes them unsigned, and cut into pieces of `Bits` bits,
//
//   s = sum over d of 2^(Bits * d) * piece_d,
//
// they are one table of sixteen bytes a piece, which vpshufb looks up for 32 rows at once. Pieces of five bits add up
// in bytes eight nibbles long, those of six four, before 16-bit sums take them over.
//
//   popcount_gemm: 8 bits of q make 2 pieces of 5, 4 bits one of 6, fewer one of 5
//   sign_gemm:     a bfloat16 token is a fixed-point number of its largest magnitude, 16 bits in 3 pieces of 6, or 22
//   in
//                  4 where a few values tower over the token (digits.h); float sums of 3 columns (Avx2Signs) would take
//                  half as long again
//
// The bytes of 32 rows are transposed on the way. For one token they go from memory straight to the look-ups; several
// share a tile in the first-level cache. Bound by instructions.
namespace bitinfer::cpu {
namespace {

// 64 rows of a chunk of words, which stay where they are until several tokens want them transposed.
struct ByteTile {
  static constexpr int64_t kRows = 64, kWords = 32;

  const uint32_t* first;
  int64_t stride, rows, count;
  bool transposed;
  alignas(32) uint32_t edge[32][kWords];
  alignas(32) uint8_t nibbles[kWords * 8][kRows];  // [i][r]: nibble i (columns 4*i ... 4*i+3) of row r

  void load(const uint32_t* words, int64_t row_stride, int64_t row_count, int64_t word_count) {
    first = words;
    stride = row_stride;
    rows = row_count;
    count = word_count;
    transposed = false;
  }

  void transpose() {
    if (transposed) return;
    for (int64_t r = 0; r < rows; r += 32) {
      each_half_word(
          r, 0, count, [] {},
          [&](int64_t w, int half, const __m256i* index) {
            auto* out = &nibbles[8 * w + 4 * half][r];
            for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * kRows), index[i]);
          });
    }
    transposed = true;
  }

  // Calls body(word, half, the four nibbles of rows r ... r+31 there) for the words [offset, offset + words), and
  // before() with each four of them.
  template <typename Before, typename Body>
  void each_half_word(int64_t r, int64_t offset, int64_t words, const Before& before, const Body& body) {
    const __m256i low = _mm256_set1_epi8(15);
    const uint32_t* from = first + r * stride + offset;
    int64_t step = stride;
    if (rows - r < 32 || words % 4 != 0) {
      from = pad(from, rows - r < 32 ? rows - r : 32, words);
      step = kWords;
    }
    for (int64_t w = 0; w < words; w += 4, from += 4) {
      before();
      for (int64_t i = 0, row = w / 4 % 4 * 8; i < 8; ++i) {  // each row's next line: 32 streams are too many to guess
        _mm_prefetch(reinterpret_cast<const char*>(from + (row + i) * step + 16), _MM_HINT_T0);
      }
      // each lane is a 16 x 16 transpose of bytes: rows r ... r+15 in the lower, r+16 ... r+31 in the upper
      __m256i mid[16];
      const uint32_t* row = from;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, row += step) {
        __m256i in[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const uint32_t* lower = row + 4 * j * step;
          in[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(lower)), load128(lower + 16 * step), 1);
        }
        interleave(in, mid + 4 * i);
      }
      for (int i = 0; i < 4 && w + i < words; ++i) {
        const __m256i in[4] = {mid[i], mid[i + 4], mid[i + 8], mid[i + 12]};
        __m256i bytes[4];
        interleave(in, bytes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i first_byte = bytes[2 * half], second_byte = bytes[2 * half + 1];
          const __m256i index[4] = {
              _mm256_and_si256(first_byte, low), _mm256_and_si256(_mm256_srli_epi16(first_byte, 4), low),
              _mm256_and_si256(second_byte, low), _mm256_and_si256(_mm256_srli_epi16(second_byte, 4), low)};
          body(w + i, half, index);
        }
      }
    }
  }

 private:
  // A copy of a block at the edge of the weight, with zeros for what is past it.
  const uint32_t* pad(const uint32_t* from, int64_t row_count, int64_t words) {
    std::memset(edge, 0, sizeof edge);
    for (int64_t r = 0; r < row_count; ++r) {
      std::memcpy(edge[r], from + r * stride, static_cast<size_t>(words) * sizeof(uint32_t));
    }
    return edge[0];
  }

  // Merges the bytes of four registers: out holds byte 0 of in[0], in[1], in[2], in[3], byte 1 of each, and so on.
  // Done to rows i, i+4, i+8, i+12 and then to four of the results, this transposes with few registers in use.
  static void interleave(const __m256i* in, __m256i* out) {
    const __m256i low02 = _mm256_unpacklo_epi8(in[0], in[2]), high02 = _mm256_unpackhi_epi8(in[0], in[2]);
    const __m256i low13 = _mm256_unpacklo_epi8(in[1], in[3]), high13 = _mm256_unpackhi_epi8(in[1], in[3]);
    out[0] = _mm256_unpacklo_epi8(low02, low13);
    out[1] = _mm256_unpackhi_epi8(low02, low13);
    out[2] = _mm256_unpacklo_epi8(high02, high13);
    out[3] = _mm256_unpackhi_epi8(high02, high13);
  }
};

// What `Pieces` tables a nibble, of `Bits` bits an entry, add up to for `Blocks` times 32 rows of one token.
template <int Pieces, int Bits, int Blocks>
class ByteSums {
 public:
  static constexpr int64_t kTableBytes = 8 * 16 * Pieces;  // of a word: for each nibble its pieces

  // Rows from r on, words [offset, offset + words) of a tile. The tables of a word are `stride` bytes from the last's.
  ByteSums(ByteTile& tile, int64_t r, int64_t offset, int64_t words, const std::byte* tables, int64_t stride,
           Ahead& ahead) {
    if (Blocks == 1 && !tile.transposed) {
      tile.each_half_word(
          r, offset, words, [&] { ahead.lines(8); },
          [&](int64_t w, int half, const __m256i* index) { look_up(tables + w * stride, half, index, All()); });
      return;
    }
    for (int64_t w = 0; w < words; ++w) {
      ahead.lines(2 * Blocks);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i index[4 * Blocks];
        for (int i = 0; i < 4 * Blocks; ++i) {
          index[i] = load256(&tile.nibbles[8 * (offset + w) + 4 * half + i % 4][r + i / 4 * 32]);
        }
        look_up(tables + w * stride, half, index, All());
      }
    }
  }

  // piece d + 2^Bits * piece d+1 of a block, or piece d alone if it is the last: rows 8*i ... 8*i+7 in out[i]
  void pair(int block, int d, __m256i* out) const {
    const __m256i weights = _mm256_set1_epi32(1 | 1 << (16 + Bits));
    const Sum &low = sums_[block][d], high = d + 1 < Pieces ? sums_[block][d + 1] : Sum();
    const __m256i low_even = low.even(), high_even = high.even();
    for (int half = 0; half < 2; ++half) {  // rows 0 ... 7 and 16 ... 23, then 8 ... 15 and 24 ... 31
      const __m256i l = half ? _mm256_unpackhi_epi16(low_even, low.odd) : _mm256_unpacklo_epi16(low_even, low.odd);
      const __m256i h = half ? _mm256_unpackhi_epi16(high_even, high.odd) : _mm256_unpacklo_epi16(high_even, high.odd);
      const __m256i low_quads = _mm256_madd_epi16(_mm256_unpacklo_epi16(l, h), weights);
      const __m256i high_quads = _mm256_madd_epi16(_mm256_unpackhi_epi16(l, h), weights);
      out[half] = _mm256_permute2x128_si256(low_quads, high_quads, 0x20);
      out[half + 2] = _mm256_permute2x128_si256(low_quads, high_quads, 0x31);
    }
  }

 private:
  static constexpr bool kWholeWords = Bits <= 5;  // eight entries fit a byte, or else four
  static_assert((kWholeWords ? 8 : 4) * ((1 << Bits) - 1) < 256);
  static_assert(ByteTile::kWords * 8 * ((1 << Bits) - 1) < 1 << 15);
  using All = std::make_integer_sequence<int, Pieces>;  // array indices are constants, so that arrays are registers

  // Bytes added up in 16 bits, in whole lanes and of upper bytes only: one addition each, and no unpacking.
  struct Sum {
    __m256i both, odd;

    Sum() : both(_mm256_setzero_si256()), odd(_mm256_setzero_si256()) {}
    void add(__m256i bytes) {
      both = _mm256_add_epi16(both, bytes);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    __m256i even() const { return _mm256_sub_epi16(both, _mm256_slli_epi16(odd, 8)); }
  };

  template <int... D>
  void look_up(const std::byte* tables, int half, const __m256i* index, std::integer_sequence<int, D...>) {
    (look_up<D>(tables + 64 * Pieces * half, half, index), ...);
  }

  template <int D>
  void look_up(const std::byte* tables, int half, const __m256i* index) {
    __m256i table[4];
    for (int i = 0; i < 4; ++i) table[i] = _mm256_broadcastsi128_si256(load128(tables + 16 * (Pieces * i + D)));
#pragma GCC unroll 2
    for (int block = 0; block < Blocks; ++block, index += 4) {
      const __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(table[0], index[0]),  //
                                          _mm256_shuffle_epi8(table[1], index[1]));
      const __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(table[2], index[2]),  //
                                           _mm256_shuffle_epi8(table[3], index[3]));
      const __m256i four = _mm256_add_epi8(low, high);
      if (kWholeWords && half == 0) {
        first_half_[block][D] = four;
      } else {
        sums_[block][D].add(kWholeWords ? _mm256_add_epi8(first_half_[block][D], four) : four);
      }
    }
  }

  Sum sums_[Blocks][Pieces];
  __m256i first_half_[Blocks][Pieces];
};

struct Avx2Counts : Avx2Floats {
  static constexpr int64_t kRowTile = 64, kRows = ByteTile::kRows, kWords = ByteTile::kWords;
  using Tile = ByteTile;

  static constexpr int64_t table_bytes(int64_t bits) { return 8 * 16 * (bits == 8 ? 2 : 1); }
  static constexpr int32_t raise(int64_t bits) { return 4 << (bits - 1); }
  static constexpr int32_t offset(int64_t bits) { return 8 * raise(bits); }

  static void add_plane(const uint32_t* plane, int64_t words, int8_t weight, int8_t* q) {
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    for (int64_t w = 0; w < words; ++w) {
      auto* values = reinterpret_cast<__m256i*>(q + w * kWordBits);
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(plane[w])), spread);
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
      const __m256i added = _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(weight)));
      _mm256_storeu_si256(values, _mm256_add_epi8(load256(values), added));
    }
  }

  static void build_tables(const int8_t* q, int64_t words, int64_t bits, std::byte* tables) {
    // column c where it is in the subset, and a zero (-1) elsewhere; 16-bit values are chosen by two bytes
    alignas(32) int8_t chosen[4][32];
    for (int i = 0; i < 4 * 32; ++i) {
      const int c = i / 32, j = i % 32 / 2;
      chosen[c][i % 32] = static_cast<int8_t>(j >> c & 1 ? 2 * c + i % 2 : -1);
    }
    const __m256i raised = _mm256_set1_epi16(static_cast<int16_t>(raise(bits)));
    const __m256i low = _mm256_set1_epi16(bits == 8 ? 31 : 255);
    for (int64_t i = 0; i < words * 8; ++i) {
      int32_t four;
      std::memcpy(&four, q + 4 * i, sizeof four);
      const __m256i values = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
      const __m256i sums =
          _mm256_add_epi16(_mm256_add_epi16(_mm256_add_epi16(raised, _mm256_shuffle_epi8(values, load256(chosen[0]))),
                                            _mm256_shuffle_epi8(values, load256(chosen[1]))),
                           _mm256_add_epi16(_mm256_shuffle_epi8(values, load256(chosen[2])),
                                            _mm256_shuffle_epi8(values, load256(chosen[3]))));
      const __m256i pieces = _mm256_packus_epi16(_mm256_and_si256(sums, low), _mm256_srli_epi16(sums, 5));
      const __m256i in_order = _mm256_permute4x64_epi64(pieces, 0xd8);
      if (bits == 8) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32 * i), in_order);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + 16 * i), _mm256_castsi256_si128(in_order));
      }
    }
  }

  static void lookup(Tile& tile, int64_t offset, int64_t rows, int64_t words, int64_t bits, const std::byte* tables,
                     int64_t token_stride, int64_t tokens, Ahead& ahead, int32_t* counts) {
    if (tokens > 1) tile.transpose();
    for (int64_t t = 0; t < tokens; ++t, tables += token_stride, counts += kRows) {
      if (bits == 8) {
        count<2, 5>(tile, offset, rows, words, tables, ahead, counts);
      } else if (bits == 4) {
        count<1, 6>(tile, offset, rows, words, tables, ahead, counts);
      } else {
        count<1, 5>(tile, offset, rows, words, tables, ahead, counts);
      }
    }
  }

 private:
  template <int Pieces, int Bits>
  static void count(Tile& tile, int64_t offset, int64_t rows, int64_t words, const std::byte* tables, Ahead& ahead,
                    int32_t* counts) {
    if (tile.transposed && rows > 32) {  // twice as many rows to a table
      add<Pieces, Bits, 2>(tile, 0, offset, words, tables, ahead, counts);
    } else {
      for (int64_t r = 0; r < rows; r += 32) add<Pieces, Bits, 1>(tile, r, offset, words, tables, ahead, counts + r);
    }
  }

  template <int Pieces, int Bits, int Blocks>
  static void add(Tile& tile, int64_t r, int64_t offset, int64_t words, const std::byte* tables, Ahead& ahead,
                  int32_t* counts) {
    using Sums = ByteSums<Pieces, Bits, Blocks>;
    const Sums sums(tile, r, offset, words, tables, Sums::kTableBytes, ahead);
    for (int block = 0; block < Blocks; ++block) {
      __m256i counted[4];
      sums.pair(block, 0, counted);
      for (int i = 0; i < 4; ++i) {
        auto* out = reinterpret_cast<__m256i*>(counts + 32 * block + 8 * i);
        _mm256_storeu_si256(out, _mm256_add_epi32(load256(out), counted[i]));
      }
    }
  }
};

// sign_gemm: the sums of a chunk are exact integers, and become float32 numbers in one rounding.
struct Avx2FixedPoint : Avx2Floats {
  // A word of a prepared token. Of the integer sum of all columns, sum(q) + 2 * 8 * raise = 4096 * high + low.
  struct Word {
    int32_t low, high;
    float unit;      // what an integer stands for
    int32_t pieces;  // none: `bytes` are the floats themselves
    std::byte bytes[ByteSums<4, 6, 1>::kTableBytes];
  };
  static constexpr int64_t kRowTile = 64, kRows = ByteTile::kRows, kWords = ByteTile::kWords;
  static constexpr int64_t kTableFloats = sizeof(Word) / sizeof(float);
  using Tile = ByteTile;

  static void build_tables(const float* z, int64_t words, float* tables) {
    const float absmax = largest_magnitude(z, words * kWordBits);
    const int32_t digits = digits_for(z, words * kWordBits, absmax, Dtype::kBFloat16);
    auto* out = reinterpret_cast<Word*>(tables);
    if (digits == 2) return build<3>(z, words, absmax, out);
    if (digits == 3) return build<4>(z, words, absmax, out);
    for (int64_t w = 0; w < words; ++w) {
      out[w].pieces = 0;
      std::memcpy(out[w].bytes, z + w * kWordBits, kWordBits * sizeof(float));
    }
  }

  static void lookup(Tile& tile, int64_t offset, int64_t rows, int64_t words, const float* tables, int64_t token_stride,
                     int64_t tokens, Ahead& ahead, float* sums) {
    if (tokens > 1) tile.transpose();
    for (int64_t t = 0; t < tokens; ++t, tables += token_stride, sums += kRows) {
      const auto* token = reinterpret_cast<const Word*>(tables);
      if (token->pieces == 3) {
        add<3>(tile, offset, rows, words, token, ahead, sums);
      } else if (token->pieces == 4) {
        add<4>(tile, offset, rows, words, token, ahead, sums);
      } else {
        add_floats(tile, offset, rows, words, token, sums);
      }
    }
  }

 private:
  template <int Pieces>
  static void build(const float* z, int64_t words, float absmax, Word* out) {
    constexpr int32_t kRaise = 1 << (6 * Pieces - 1);
    const float limit = kRaise / 4 - 1, factor = absmax == 0 ? 0 : limit / absmax;
    const float unit = absmax == 0 ? 0 : absmax / limit;
    const __m256i column0 = _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1);
    const __m256i column1 = _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1);
    const __m256i column2 = _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1);
    const __m256i piece = _mm256_set1_epi32(63);
    // the pieces of a sum, a byte each
    const auto cut = [&](__m256i sum) {
      __m256i bytes = _mm256_and_si256(sum, piece);
#pragma GCC unroll 3
      for (int d = 1; d < Pieces; ++d) {
        const __m256i moved = _mm256_slli_epi32(sum, 2 * d);
        bytes = _mm256_or_si256(bytes, _mm256_and_si256(moved, _mm256_slli_epi32(piece, 8 * d)));
      }
      return bytes;
    };
    const __m256i by_piece =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t w = 0; w < words; ++w, z += kWordBits, ++out) {
      alignas(32) int32_t q[kWordBits];
      __m256i total = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(z + 8 * i), _mm256_set1_ps(factor));
        const __m256i rounded = _mm256_cvtps_epi32(scaled);
        _mm256_store_si256(reinterpret_cast<__m256i*>(q + 8 * i), rounded);
        total = _mm256_add_epi32(total, rounded);
      }
      alignas(32) int32_t parts[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(parts), total);
      int32_t sum = 0;
      for (const int32_t part : parts) sum += part;
      out->low = sum & 4095;
      out->high = (sum >> 12) + (2 * 8 * kRaise >> 12);
      out->unit = unit;
      out->pieces = Pieces;
      for (int i = 0; i < 8; ++i) {
        const auto all = [&](int c) { return _mm256_set1_epi32(q[4 * i + c]); };
        const __m256i sums =
            _mm256_add_epi32(_mm256_add_epi32(_mm256_set1_epi32(kRaise), _mm256_and_si256(all(0), column0)),
                             _mm256_add_epi32(_mm256_and_si256(all(1), column1), _mm256_and_si256(all(2), column2)));
        const __m256i lower = _mm256_shuffle_epi8(cut(sums), by_piece);  // subsets without the fourth column, and with
        const __m256i upper = _mm256_shuffle_epi8(cut(_mm256_add_epi32(sums, all(3))), by_piece);
        std::byte* tables = out->bytes + 16 * Pieces * i;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables),
                            _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(lower, upper), in_order));
        const __m256i last = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(lower, upper), in_order);
        if (Pieces == 4) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32), last);
        } else {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + 32), _mm256_castsi256_si128(last));
        }
      }
    }
  }

  static __m256 rest(int32_t all, __m256i set) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(all), _mm256_slli_epi32(set, 1)));
  }

  // sums += unit * (sum(q) - 2 * C)
  template <int Pieces>
  static void add(Tile& tile, int64_t offset, int64_t rows, int64_t words, const Word* token, Ahead& ahead,
                  float* sums) {
    int32_t low = 0, high = 0;
    for (int64_t w = 0; w < words; ++w) {
      low += token[w].low;
      high += token[w].high;
    }
    for (int64_t r = 0; r < rows; r += 32) {
      const ByteSums<Pieces, 6, 1> bytes(tile, r, offset, words, token->bytes, sizeof(Word), ahead);
      __m256i low_set[4], high_set[4];
      bytes.pair(0, 0, low_set);
      bytes.pair(0, 2, high_set);
      for (int i = 0; i < 4; ++i) {
        const __m256 integer = _mm256_fmadd_ps(rest(high, high_set[i]), _mm256_set1_ps(4096), rest(low, low_set[i]));
        float* sum = sums + r + 8 * i;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(integer, _mm256_set1_ps(token->unit), _mm256_loadu_ps(sum)));
      }
    }
  }

  // A token of which an integer cannot be made: infinite, not a number, or too small to scale.
  static void add_floats(const Tile& tile, int64_t offset, int64_t rows, int64_t words, const Word* token,
                         float* sums) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t* row = tile.first + r * tile.stride + offset;
      float total = 0;
      for (int64_t w = 0; w < words; ++w) {
        float z[kWordBits];
        std::memcpy(z, token[w].bytes, sizeof z);
        for (int j = 0; j < kWordBits; ++j) total += row[w] >> j & 1 ? -z[j] : z[j];
      }
      sums[r] += total;
    }
  }
};

}  // namespace
}  // namespace bitinfer::cpu
