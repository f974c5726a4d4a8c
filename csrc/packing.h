// THE bit layout of packed signs; bitinfer/packing.py states the same for Python.
//
//   column 32*w + j of a row  =  bit j of word w, least significant bit first
//   a set bit                 =  -1 (the sign bit in the IEEE sense), a clear bit = +1
//   bits past the last column =  0
#pragma once

#include <cstdint>

namespace bitinfer {

inline constexpr int64_t kWordBits = 32;

static_assert(sizeof(uint32_t) * 8 == kWordBits, "a word holds 32 signs");
#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "checkpoints hold little-endian words, and kernels read bytes");
#endif

// Number of words that hold one row of k signs.
constexpr int64_t words_per_row(int64_t k) { return (k + kWordBits - 1) / kWordBits; }

// Number of groups of `size` columns in k of them, the last one possibly shorter; size 0 stands for one group of all.
constexpr int64_t group_count(int64_t k, int64_t size) { return size == 0 ? 1 : (k + size - 1) / size; }

// Columns whose integers are summed before a scale applies: the smaller of the two sizes, 0 for all columns.
constexpr int64_t segment_size(int64_t block_size, int64_t group_size) {
  if (block_size == 0 || group_size == 0) return block_size + group_size;
  return block_size < group_size ? block_size : group_size;
}

// The bits of the last word of a row that stand for columns; all of them if k is a multiple of 32.
constexpr uint32_t last_word_mask(int64_t k) {
  return k % kWordBits == 0 ? ~uint32_t{0} : (uint32_t{1} << (k % kWordBits)) - 1;
}

// Whether the sign of a column is -1.
constexpr bool is_negative(const uint32_t* row, int64_t column) {
  return (row[column / kWordBits] >> (column % kWordBits)) & 1;
}

static_assert(words_per_row(0) == 0 && words_per_row(1) == 1 && words_per_row(32) == 1 && words_per_row(33) == 2);
static_assert(last_word_mask(33) == 1 && last_word_mask(31) == 0x7fffffff && last_word_mask(64) == 0xffffffff);
static_assert(segment_size(256, 0) == 256 && segment_size(256, 128) == 128 && segment_size(0, 0) == 0);

}  // namespace bitinfer
