// The binary matrix product of sm_90a's tensor cores, on the operands that wgmma_descriptor() (hopper.cuh) describes:
//   wgmma_b1      d[row, column]  = popcount(a[row] & b[column]) over 256 bits, for 64 rows and 64, 128 or 256 columns
//   wgmma_b1_add  d[row, column] += ...
//
// A warpgroup calls it together. Thread t of the warpgroup holds, in element e of d,
//   row 16 * (t / 32) + (t % 32) / 4 + 8 * (e / 2 % 2),  column 8 * (e / 4) + 2 * (t % 4) + e % 2.
// Only AND exists; the instruction has no modifiers but the predicate that adds to d. It is a constant here: an
// instruction that does not read d lets the compiler use its registers for something else before.
#pragma once

#include <cstdint>

namespace bitinfer::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Operands of inline assembly are numbered in the text, so the text has to name them.
#define BITINFER_D0                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BITINFER_D1                                                                  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BITINFER_D2                                                                  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BITINFER_D3                                                                              \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BITINFER_REGISTERS4(io, i) io "r"(d[i]), io "r"(d[i + 1]), io "r"(d[i + 2]), io "r"(d[i + 3])
#define BITINFER_REGISTERS16(io, i)                                                           \
  BITINFER_REGISTERS4(io, i), BITINFER_REGISTERS4(io, i + 4), BITINFER_REGISTERS4(io, i + 8), \
      BITINFER_REGISTERS4(io, i + 12)
#define BITINFER_REGISTERS64(io, i)                                                                \
  BITINFER_REGISTERS16(io, i), BITINFER_REGISTERS16(io, i + 16), BITINFER_REGISTERS16(io, i + 32), \
      BITINFER_REGISTERS16(io, i + 48)
#define BITINFER_WGMMA(name, add, columns, names, a_name, b_name, ...)                                       \
  __device__ __forceinline__ void name(int (&d)[columns / 2], uint64_t a, uint64_t b) {                      \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add                                                 \
                 ", 0;\n"                                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k256.s32.b1.b1.and.popc {" names "}, " a_name \
                 ", " b_name ", add;\n}"                                                                     \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b));                                                                          \
  }
#define BITINFER_WGMMA_BOTH(columns, names, a_name, b_name, registers)          \
  BITINFER_WGMMA(wgmma_b1, "0", columns, names, a_name, b_name, registers("=")) \
  BITINFER_WGMMA(wgmma_b1_add, "1", columns, names, a_name, b_name, registers("+"))

#define BITINFER_REGISTERS_N64(io) BITINFER_REGISTERS16(io, 0), BITINFER_REGISTERS16(io, 16)
#define BITINFER_REGISTERS_N128(io) BITINFER_REGISTERS64(io, 0)
#define BITINFER_REGISTERS_N256(io) BITINFER_REGISTERS64(io, 0), BITINFER_REGISTERS64(io, 64)
BITINFER_WGMMA_BOTH(64, BITINFER_D0, "%32", "%33", BITINFER_REGISTERS_N64)
BITINFER_WGMMA_BOTH(128, BITINFER_D0 ", " BITINFER_D1, "%64", "%65", BITINFER_REGISTERS_N128)
BITINFER_WGMMA_BOTH(256, BITINFER_D0 ", " BITINFER_D1 ", " BITINFER_D2 ", " BITINFER_D3, "%128", "%129",
                    BITINFER_REGISTERS_N256)

#undef BITINFER_REGISTERS_N256
#undef BITINFER_REGISTERS_N128
#undef BITINFER_REGISTERS_N64
#undef BITINFER_WGMMA_BOTH
#undef BITINFER_WGMMA
#undef BITINFER_REGISTERS64
#undef BITINFER_REGISTERS16
#undef BITINFER_REGISTERS4
#undef BITINFER_D3
#undef BITINFER_D2
#undef BITINFER_D1
#undef BITINFER_D0

#endif

}  // namespace bitinfer::cuda
