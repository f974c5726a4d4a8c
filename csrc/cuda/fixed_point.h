// Activations in 24-bit fixed point: how floating point reaches the binary tensor cores.
//
// z = in_scale * x is q * 2^e with one exponent a token and |q| < 2^23. The largest |q| has 23 bits, so the rounding is
// at most 2^-23 of the token's largest |z|: as fine as float32. The bits of q are 24 planes, which multiply as those of
// int8.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace bitinfer::cuda {

inline constexpr int kFixedPointBits = 24;

struct FixedPointGemm {
  const uint32_t* planes = nullptr;  // [m, 24, words]
  const float* act_scale = nullptr;  // [m], powers of two
  const int64_t* act_sum = nullptr;  // [m, groups], sums of q
  const float* act_shift = nullptr;  // [m], or absent
  int64_t m = 0;
  Weight weight = {};
  Output y = {};
};

}  // namespace bitinfer::cuda
