// The AVX-512 table: digits of activations times unpacked bits with VNNI, for any number of tokens.
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")
#endif

// clang-format off: the templates need each other and the headers above in this order
#include "activations.h"
#include "sign_gemm.h"
#include "digits.h"
#include "digit_gemm.h"
#include "avx512.h"
// clang-format on

namespace bitinfer::cpu {
namespace {

struct Vnni : Avx512Digits {
  static constexpr bool tiled(int64_t) { return false; }
  static constexpr int64_t panel_tiles(const DigitRecord&) { return 1; }
  static void tiles_of_columns(const int8_t*, int64_t, int64_t, std::byte*) {}

  struct Session {
    const DigitRecord& record;

    explicit Session(const DigitRecord& r) : record(r) {}
    void count(const Panel& panel, int64_t segment, const std::byte* prepared, int32_t* counts) {
      count_tile(panel, record, segment, prepared, counts);
    }
  };
};

constexpr Kernels kKernels = {
    pack_signs<Vnni>,
    pack_activations<Vnni>,
    {16, digit_prepared_bytes<Vnni, SignGemm>, sign_digits<Vnni>, sign_digit_multiply<Vnni>},
    {16, digit_prepared_bytes<Vnni, PopcountGemm>, popcount_digits<Vnni>, popcount_digit_multiply<Vnni>},
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
