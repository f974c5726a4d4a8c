// The AVX-512 table: sums of columns looked up by the packed bits for floating point activations, digits times unpacked
// bits with VNNI for integers.
#include "dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "buffer.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in gcc 12's own headers: its bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")
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

struct Vnni : Avx512Digits {
  static constexpr int64_t kPassColumns = 0;  // no tiles
  static constexpr bool tiled(int64_t) { return false; }
  static int64_t panel_tiles(const DigitRecord& record, const std::byte* prepared) {
    return TileCounter::panel_tiles(record, prepared);
  }

  using Session = TileCounter;
};

constexpr Kernels kKernels = {pack_signs<Vnni>,
                              pack_activations<Vnni>,
                              Avx512SignGemm<Vnni>::kernel(),
                              {64, digit_pass<Vnni, PopcountGemm>, digit_prepared_bytes<Vnni, PopcountGemm>,
                               popcount_digits<Vnni>, popcount_digit_multiply<Vnni>},
                              layer_norm<Vnni>};

}  // namespace
}  // namespace bitinfer::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bitinfer::cpu::Kernels* bitinfer::cpu::avx512_kernels() { return &kKernels; }

#else

const bitinfer::cpu::Kernels* bitinfer::cpu::avx512_kernels() { return nullptr; }

#endif
