// The portable table: plain C++ for any processor, and the generic twin of every SIMD function.
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

// clang-format off: the templates need each other and the headers above in this order
#include "activations.h"
#include "scalar.h"
#include "sign_gemm.h"
#include "popcount_gemm.h"
// clang-format on

namespace bitinfer::cpu {
namespace {

// A tile that leaves the words where they are.
struct RowTile {
  static constexpr int64_t kRowTile = 8, kRows = 64, kWords = 16;

  const uint32_t* first = nullptr;
  int64_t stride = 0;

  void load(const uint32_t* words, int64_t row_stride, int64_t, int64_t) {
    first = words;
    stride = row_stride;
  }
};

struct ScalarActivations : ScalarFloats {
  static void pack_signs(const float* x, int64_t words, uint32_t* out) {
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = 0;
      for (int j = 0; j < kWordBits; ++j) word |= static_cast<uint32_t>(x[w * kWordBits + j] < 0) << j;
      out[w] = word;
    }
  }

  static void pack_plane(const int8_t* q, int64_t words, int bit, uint32_t* plane) {
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = 0;
      for (int part = 0; part < 4; ++part) {
        uint64_t octets;
        std::memcpy(&octets, q + w * kWordBits + part * 8, sizeof octets);
        // the multiplication moves bit 0 of byte j to bit 56 + j
        octets = ((octets >> bit) & 0x0101010101010101u) * 0x0102040810204080u >> 56;
        word |= static_cast<uint32_t>(octets) << (8 * part);
      }
      plane[w] = word;
    }
  }
};

// Four columns to a table of their sixteen signed sums.
struct ScalarSigns : ScalarFloats, RowTile {
  using Tile = RowTile;
  static constexpr int64_t kTableFloats = 8 * 16;

  static void build_tables(const float* z, int64_t words, float* tables) {
    for (int64_t i = 0; i < words * 8; ++i) {
      const float *c = z + 4 * i, low[4] = {c[0] + c[1], c[1] - c[0], c[0] - c[1], -c[0] - c[1]};
      const float high[4] = {c[2] + c[3], c[3] - c[2], c[2] - c[3], -c[2] - c[3]};
      for (int j = 0; j < 16; ++j) tables[16 * i + j] = low[j % 4] + high[j / 4];
    }
  }

  static void lookup(const Tile& tile, int64_t offset, int64_t rows, int64_t words, const float* tables,
                     int64_t token_stride, int64_t tokens, Ahead&, float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        const uint32_t* row = tile.first + r * tile.stride + offset;
        const float* table = tables + t * token_stride;
        float sum0 = 0, sum1 = 0;
        for (int64_t w = 0; w < words; ++w, table += kTableFloats) {
          const uint32_t word = row[w];
          sum0 += (table[word & 15] + table[16 + (word >> 4 & 15)]) +
                  (table[32 + (word >> 8 & 15)] + table[48 + (word >> 12 & 15)]);
          sum1 += (table[64 + (word >> 16 & 15)] + table[80 + (word >> 20 & 15)]) +
                  (table[96 + (word >> 24 & 15)] + table[112 + (word >> 28)]);
        }
        sums[t * kRows + r] += sum0 + sum1;
      }
    }
  }
};

// Four columns to a table of their sixteen subset sums, as int16.
struct ScalarCounts : ScalarFloats, RowTile {
  using Tile = RowTile;

  static constexpr int64_t table_bytes(int64_t) { return 8 * 16 * sizeof(int16_t); }
  static constexpr int32_t offset(int64_t) { return 0; }

  static void add_plane(const uint32_t* plane, int64_t words, int8_t weight, int8_t* q) {
    for (int64_t w = 0; w < words; ++w) {
      for (int j = 0; j < kWordBits; ++j) {
        q[w * kWordBits + j] = static_cast<int8_t>(q[w * kWordBits + j] + ((plane[w] >> j & 1) ? weight : 0));
      }
    }
  }

  static void build_tables(const int8_t* q, int64_t words, int64_t, std::byte* out) {
    auto* tables = reinterpret_cast<int16_t*>(out);
    for (int64_t i = 0; i < words * 8; ++i) {
      const int8_t* c = q + 4 * i;
      const int low[4] = {0, c[0], c[1], c[0] + c[1]}, high[4] = {0, c[2], c[3], c[2] + c[3]};
      for (int j = 0; j < 16; ++j) tables[16 * i + j] = static_cast<int16_t>(low[j % 4] + high[j / 4]);
    }
  }

  static void lookup(const Tile& tile, int64_t offset, int64_t rows, int64_t words, int64_t, const std::byte* tables,
                     int64_t token_stride, int64_t tokens, Ahead&, int32_t* counts) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        const uint32_t* row = tile.first + r * tile.stride + offset;
        const auto* table = reinterpret_cast<const int16_t*>(tables + t * token_stride);
        int32_t even = 0, odd = 0;  // two chains of additions run side by side
        for (int64_t w = 0; w < words; ++w, table += 8 * 16) {
          const uint32_t word = row[w];
          even += (table[word & 15] + table[32 + (word >> 8 & 15)]) +
                  (table[64 + (word >> 16 & 15)] + table[96 + (word >> 24 & 15)]);
          odd += (table[16 + (word >> 4 & 15)] + table[48 + (word >> 12 & 15)]) +
                 (table[80 + (word >> 20 & 15)] + table[112 + (word >> 28)]);
        }
        counts[t * kRows + r] += even + odd;
      }
    }
  }
};

constexpr Kernels kKernels = {pack_signs<ScalarActivations>, pack_activations<ScalarActivations>,
                              sign_gemm_kernel<ScalarSigns>(), popcount_gemm_kernel<ScalarCounts>(),
                              layer_norm<ScalarFloats>};

}  // namespace

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace bitinfer::cpu
