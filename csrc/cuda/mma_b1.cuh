// Binary matrix products of one warp (sm_80 and later): d[16 rows, 8 columns] += popcount(a & b) over 256 or 128
// columns.
//
// Lane 4g + t holds row g (a0, a2) and row g + 8 (a1, a3) of the weights and column g of the planes, words t and t + 4
// of the product's; results d0, d1 are row g, columns 2t and 2t + 1, and d2, d3 those of row g + 8. Which words of
// memory are word t and t + 4 is the caller's choice, as long as both operands agree.
#pragma once

#include <cstdint>

namespace bitinfer::cuda {

__device__ __forceinline__ void mma_b1_k256(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_b1_k128(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

}  // namespace bitinfer::cuda
