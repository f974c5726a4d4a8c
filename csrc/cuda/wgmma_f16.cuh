// Hopper's matrix product of 16-bit floats with the left operand in registers:
//
//   d[64, N] += a[64, 16] * b[N, 16]^T,  float32 sums
//
// A warpgroup of four warps issues it. With lane = 4 * g + t, warp w of the warpgroup holds rows 16 * w + g and + 8:
//   a[0] row g, columns 2t and 2t + 1 (the first in the low half); a[1] row g + 8; a[2] and a[3] the same, 8 columns on
//   d[4 * j + 2 * h + i]: row g + 8 * h, column 8 * j + 2 * t + i
// b lies in shared memory, K-major with 128-byte swizzle; see wgmma_descriptor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace bitinfer::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The operands of d, and their places in the text of an instruction.
#define BITINFER_D8(d, i)                                                                               \
  "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), \
      "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define BITINFER_D16(d, i) BITINFER_D8(d, i), BITINFER_D8(d, (i) + 8)
#define BITINFER_D32(d, i) BITINFER_D16(d, i), BITINFER_D16(d, (i) + 16)
#define BITINFER_D64(d, i) BITINFER_D32(d, i), BITINFER_D32(d, (i) + 32)
#define BITINFER_LIST8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BITINFER_LIST16 BITINFER_LIST8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BITINFER_LIST32 \
  BITINFER_LIST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BITINFER_LIST64                                                              \
  BITINFER_LIST32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define BITINFER_WGMMA(TYPE, N, LIST, OPERANDS, A0, A1, A2, A3, B)                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, {" A0 ", " A1 ", " A2 \
               ", " A3 "}, " B ", 1, 1, 1, 0;"                                                                    \
               : OPERANDS                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// One function for each N, told apart by the size of d.
#define BITINFER_DEFINE_WGMMA(N, D, A0, A1, A2, A3, B)                                       \
  template <typename T>                                                                      \
  __device__ __forceinline__ void wgmma(float (&d)[D], const uint32_t (&a)[4], uint64_t b) { \
    if constexpr (std::is_same_v<T, __half>) {                                               \
      BITINFER_WGMMA("f16", N, BITINFER_LIST##D, BITINFER_D##D(d, 0), A0, A1, A2, A3, B);    \
    } else {                                                                                 \
      BITINFER_WGMMA("bf16", N, BITINFER_LIST##D, BITINFER_D##D(d, 0), A0, A1, A2, A3, B);   \
    }                                                                                        \
  }

BITINFER_DEFINE_WGMMA("16", 8, "%8", "%9", "%10", "%11", "%12")
BITINFER_DEFINE_WGMMA("32", 16, "%16", "%17", "%18", "%19", "%20")
BITINFER_DEFINE_WGMMA("64", 32, "%32", "%33", "%34", "%35", "%36")
BITINFER_DEFINE_WGMMA("128", 64, "%64", "%65", "%66", "%67", "%68")

#undef BITINFER_DEFINE_WGMMA
#undef BITINFER_WGMMA

// Keeps the compiler from moving reads of d up over a wait for the products that write it.
template <int size>
__device__ __forceinline__ void wgmma_fence_sums(float (&d)[size]) {
#pragma unroll
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#endif

}  // namespace bitinfer::cuda
