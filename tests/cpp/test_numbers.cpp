// The half precision conversions against hand-written values and exhaustively against each other.
#include <cmath>
#include <limits>

#include "check.h"
#include "cpu/numbers.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

int main() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();

  CHECK(half_to_float(0x3c00) == 1.0f && half_to_float(0xc000) == -2.0f && half_to_float(0x7bff) == 65504.0f);
  CHECK(half_to_float(0x0001) == 0x1p-24f && half_to_float(0x8400) == -0x1p-14f);
  CHECK(half_to_float(0x7c00) == infinity && half_to_float(0xfc00) == -infinity && std::isnan(half_to_float(0x7e01)));
  CHECK(float_to_half(1.0f + 0x1p-11f) == 0x3c00);      // a tie goes to the even neighbour
  CHECK(float_to_half(1.0f + 3 * 0x1p-11f) == 0x3c02);  // and this one up
  CHECK(float_to_half(65519.996f) == 0x7bff && float_to_half(65520.0f) == 0x7c00 && float_to_half(-1e9f) == 0xfc00);
  CHECK(float_to_half(0x1p-25f) == 0x0000 && float_to_half(0x1.8p-24f) == 0x0002 && float_to_half(-0.0f) == 0x8000);
  CHECK((float_to_half(nan) & 0x7c00) == 0x7c00 && (float_to_half(nan) & 0x3ff) != 0);

  CHECK(bfloat16_to_float(0x3f80) == 1.0f && bfloat16_to_float(0xc000) == -2.0f);
  CHECK(float_to_bfloat16(1.0f + 0x1p-8f) == 0x3f80);      // a tie goes to the even neighbour
  CHECK(float_to_bfloat16(1.0f + 3 * 0x1p-8f) == 0x3f82);  // and this one up
  CHECK(float_to_bfloat16(3.4e38f) == 0x7f80 && float_to_bfloat16(-infinity) == 0xff80);
  CHECK((float_to_bfloat16(nan) & 0x7f80) == 0x7f80 && (float_to_bfloat16(nan) & 0x7f) != 0);

  for (uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    context = "bits " + std::to_string(i);
    const float half = half_to_float(bits), brain = bfloat16_to_float(bits);
    CHECK(std::isnan(half) ? std::isnan(half_to_float(float_to_half(half))) : float_to_half(half) == bits);
    CHECK(std::isnan(brain) ? std::isnan(bfloat16_to_float(float_to_bfloat16(brain)))
                            : float_to_bfloat16(brain) == bits);
  }
  return report();
}
