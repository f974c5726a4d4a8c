// Matrix products of one warp (mma.sync) and asynchronous copies to shared memory (cp.async): what every GPU from sm_80
// on has.
//
// All products are 16 rows by 8 columns. Lane 4*g + t holds, of the result, rows g and g + 8, columns 2t and 2t + 1, as
// d[0], d[1] (row g) and d[2], d[3] (row g + 8).
#pragma once

#include <cstdint>

namespace bitinfer::cuda {

// ---- copies
__device__ __forceinline__ uint32_t shared_space(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past L1; both addresses aligned to 16.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_space(to)), "l"(from) : "memory");
}

// 4 bytes, through L1: not for what the previous kernel wrote.
__device__ __forceinline__ void copy_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_space(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups of copies are under way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of eight rows of 16 bytes; lane l names row l % 8 of matrix l / 8. r[i] is word t of row g of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_space(row))
               : "memory");
}

// ---- products. Of A, lane 4*g + t holds rows g (a[0], a[2]) and g + 8 (a[1], a[3]); of B, column g.

// d = c + popcount(A & B), or d += popcount(A & B), over 128 bits; word t of each row and column.
__device__ __forceinline__ void multiply_b1_k128(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, int c) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c));
}

__device__ __forceinline__ void multiply_b1_k128(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// d += popcount(A & B) over 256 bits; words t (a[0], a[1], b0) and t + 4 (a[2], a[3], b1) of each row and column.
__device__ __forceinline__ void multiply_b1_k256(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += A * B over 32 bytes: bytes 4t to 4t + 3 (a[0], a[1], b0) and 16 more than these (a[2], a[3], b1).
__device__ __forceinline__ void multiply_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += A * B over 16 halves: 2t and 2t + 1 (a[0], a[1], b0), 2t + 8 and 2t + 9 (a[2], a[3], b1). Accumulates in
// float32, with truncation instead of rounding.
__device__ __forceinline__ void multiply_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace bitinfer::cuda
