// The AMX table: digits of activations times unpacked bits in matrix tiles, and with VNNI where tokens are few.
//
//   counts[16 rows of the weight][16 columns] = sum over units of  A [16 columns][64 digits] x B [64 bits][16 rows]
//
// B wants four neighbours of the sum in the bytes of a word, 16 rows side by side. Word w of 16 rows, transposed into
// one register, is that already: vgf2p8affineqb takes bit j of its bytes, which is row 2*j + (w & 1) of the tile of a
// unit, for digits that lie in the order that VNNI wants too. A panel is 256 rows: kChunk units of them are unpacked at
// a time, they stay in the second-level cache and serve all columns of the pass; 2 x 2 tiles of sums stay in
// registers over a chunk. Up to kFewColumns need no panel: two tiles of rows are unpacked, and the sums stay in
// registers over a whole segment. Floating point activations are two or three columns of digits: two bytes cost the
// matrix unit what one bfloat16 would, and are exact. Bound by the matrix unit and by loads from the second-level
// cache.
#include "dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "buffer.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                      \
    __attribute__((                                                                                                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,amx-tile,amx-int8,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in gcc 12's own headers: its bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,amx-tile,amx-int8,avx2,fma,f16c")
#endif

// clang-format off: the templates need each other and the headers above in this order
#include "activations.h"
#include "sign_gemm.h"
#include "digits.h"
#include "digit_gemm.h"
#include "avx512.h"
#include "avx512_digits.h"
#include "avx512_lookup.h"
// clang-format on

namespace bitinfer::cpu {
namespace {

constexpr int64_t kPanelTiles = 16, kChunk = 8, kTileBytes = 1024;

// Palette 1: eight tiles of 16 rows of 64 bytes. Tiles 0 to 3 hold sums, 4 and 5 digits, 6 and 7 bits.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Unpacks a chunk of 16 rows from `rows` on into tiles; `words` of a segment are left there. Asks for the next chunk,
// if nothing else has.
void unpack_tiles(const uint8_t* const* rows, int64_t units, int64_t words, bool ask, uint8_t* tiles) {
  static_assert(kChunk == 8, "units of sixteen words of sixteen rows");
  __m512i v[16];
  for (int i = 0; i < 16; ++i) {
    v[i] = _mm512_maskz_loadu_epi32(lanes(words), rows[i]);
    if (ask) _mm_prefetch(rows[i] + kChunk * 8, _MM_HINT_T1);
  }
  transpose(v);
  for (int64_t u = 0; u < units; ++u, tiles += kTileBytes) {
#pragma GCC unroll 8
    for (int bit = 0; bit < 8; ++bit) {
      const __m512i matrix = _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << bit << 56));
      _mm512_store_si512(tiles + bit * 128, _mm512_gf2p8affine_epi64_epi8(v[2 * u], matrix, 0));
      _mm512_store_si512(tiles + bit * 128 + 64, _mm512_gf2p8affine_epi64_epi8(v[2 * u + 1], matrix, 0));
    }
  }
}

// Where the sums of a product come from and go to.
struct Flow {
  bool zero, load, store;
};

// C column tiles times R row tiles over `units` units. In `counts` the sums of the two row tiles are `row_stride`
// apart.
template <int C, int R>
void multiply_tiles(const std::byte* const* digits, const uint8_t* bits, int64_t bits_stride, int64_t units, Flow flow,
                    int32_t* const* counts, int64_t row_stride) {
  if (flow.zero) {
    _tile_zero(0);
    if constexpr (R == 2) _tile_zero(1);
    if constexpr (C == 2) _tile_zero(2);
    if constexpr (C == 2 && R == 2) _tile_zero(3);
  }
  if (flow.load) {
    _tile_loadd(0, counts[0], 64);
    if constexpr (R == 2) _tile_loadd(1, counts[0] + row_stride, 64);
    if constexpr (C == 2) _tile_loadd(2, counts[1], 64);
    if constexpr (C == 2 && R == 2) _tile_loadd(3, counts[1] + row_stride, 64);
  }
  for (int64_t u = 0; u < units; ++u) {
    _tile_loadd(6, bits + u * kTileBytes, 64);
    _tile_loadd(4, digits[0] + u * kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(7, bits + bits_stride + u * kTileBytes, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (C == 2) {
      _tile_loadd(5, digits[1] + u * kTileBytes, 64);
      _tile_dpbsud(2, 5, 6);
    }
    if constexpr (C == 2 && R == 2) _tile_dpbsud(3, 5, 7);
  }
  if (!flow.store) return;
  _tile_stored(0, counts[0], 64);
  if constexpr (R == 2) _tile_stored(1, counts[0] + row_stride, 64);
  if constexpr (C == 2) _tile_stored(2, counts[1], 64);
  if constexpr (C == 2 && R == 2) _tile_stored(3, counts[1] + row_stride, 64);
}

struct Amx : Avx512Digits {
  static constexpr int64_t kPassColumns = 256;
  static constexpr bool tiled(int64_t columns) { return columns > 6; }
  // Sums of at most two column tiles stay in registers over a whole segment.
  static bool resident(const DigitRecord& record, const std::byte* prepared) {
    return record.columns_in_use(prepared) <= kFewColumns;
  }

  // Many rows, so that digits which come from the third-level cache serve them all; fewer, where digits stay nearer or
  // the sums of a short segment must; two tiles for sums in registers.
  static int64_t panel_tiles(const DigitRecord& record, const std::byte* prepared) {
    if (!record.tiled) return TileCounter::panel_tiles(record, prepared);
    if (resident(record, prepared)) return 2;
    const bool near = record.padded_columns() * record.units * kUnit <= 1 << 19;
    return near || record.segment_units < kChunk ? kPanelTiles / 4 : kPanelTiles;
  }

  class Session {
   public:
    Session(const DigitRecord& record, const std::byte* prepared)
        : record_(record),
          prepared_(prepared),
          few_(record, prepared),
          panel_tiles_(panel_tiles(record, prepared)),
          tiles_(record.tiled ? record.column_tiles() : 0),
          bits_(record.tiled ? kPanelTiles * kChunk * kTileBytes : 0) {
      if (!record.tiled) return;
      for (int64_t c = 0; c < record.column_tiles(); ++c) {
        if (record.in_use(prepared, c * kTileColumns, (c + 1) * kTileColumns)) tiles_[used_++] = c;
      }
      const TileConfiguration configuration;
      _tile_loadconfig(&configuration);
    }
    ~Session() {
      if (record_.tiled) _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void count(const Panel& panel, int64_t segment, int32_t* counts) {
      if (!record_.tiled) return few_.count(panel, segment, counts);
      const int64_t word = segment * record_.segment_words, words = record_.words_of(segment);
      const int64_t units = (words + 1) / 2, row_tiles = (panel.rows + kTile - 1) / kTile;
      for (int64_t u = 0; u == 0 || u < units; u += kChunk) {
        const int64_t chunk = units - u < kChunk ? units - u : kChunk;
        // the next panel; if that is large, only what the next chunk will be
        const int64_t full = panel_tiles_ * kTile;
        Ahead ahead(panel.first + full * panel.words, full * panel.words * kWordBytes,
                    full * (word + 2 * u) * kWordBytes);
        for (int64_t r = 0; r < row_tiles; ++r) {
          const bool wide = panel_tiles_ == kPanelTiles;
          if (!wide) ahead.lines(2 * chunk);
          const uint8_t* rows[16];
          row_bytes(panel, r * kTile, word + 2 * u, rows);
          unpack_tiles(rows, chunk, words - 2 * u, wide, bits_.data() + r * kChunk * kTileBytes);
        }
        const bool first = u == 0, last = u + chunk >= units, stay = resident(record_, prepared_);
        const Flow flow{first, !first && !stay, last || !stay};
        asm volatile("" ::: "memory");  // what the tile instructions read is in memory, unknown to gcc's intrinsics
        for (int64_t c = 0; c < used_; c += 2) {
          const int64_t unit = segment * record_.segment_units + u;
          if (c + 1 < used_) {
            multiply<2>(&tiles_[c], unit, chunk, row_tiles, flow, counts);
          } else {
            multiply<1>(&tiles_[c], unit, chunk, row_tiles, flow, counts);
          }
        }
      }
    }

   private:
    const DigitRecord& record_;
    const std::byte* prepared_;
    TileCounter few_;
    int64_t panel_tiles_, used_ = 0;
    Buffer<int64_t> tiles_;  // the column tiles in use
    Buffer<uint8_t> bits_;   // [row tile][unit of the chunk]

    template <int C>
    void multiply(const int64_t* tiles, int64_t unit, int64_t units, int64_t row_tiles, Flow flow, int32_t* counts) {
      const int64_t row_stride = record_.padded_columns() * kTile;
      const std::byte* digits[C];
      int32_t* sums[C];
      for (int i = 0; i < C; ++i) {
        digits[i] = prepared_ + record_.place(tiles[i] * kTileColumns, unit);
        sums[i] = counts + tiles[i] * kTileColumns * kTile;
      }
      for (int64_t r = 0; r < row_tiles; r += 2) {
        const uint8_t* bits = bits_.data() + r * kChunk * kTileBytes;
        if (r + 1 < row_tiles) {
          multiply_tiles<C, 2>(digits, bits, kChunk * kTileBytes, units, flow, sums, row_stride);
        } else {
          multiply_tiles<C, 1>(digits, bits, kChunk * kTileBytes, units, flow, sums, row_stride);
        }
        for (int i = 0; i < C; ++i) sums[i] += 2 * row_stride;
      }
    }
  };
};

constexpr Kernels kKernels = {pack_signs<Amx>,
                              pack_activations<Amx>,
                              Avx512SignGemm<Amx>::kernel(),
                              {64, digit_pass<Amx, PopcountGemm>, digit_prepared_bytes<Amx, PopcountGemm>,
                               popcount_digits<Amx>, popcount_digit_multiply<Amx>},
                              layer_norm<Amx>};

}  // namespace
}  // namespace bitinfer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bitinfer::cpu::Kernels* bitinfer::cpu::amx_kernels() { return &kKernels; }

#else

const bitinfer::cpu::Kernels* bitinfer::cpu::amx_kernels() { return nullptr; }

#endif
