// The portable table of what stands between the products of a decoder layer.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "decoder_kernels.h"
#include "decoder_rows.h"
#include "scalar.h"

namespace bitinfer::cpu {
namespace {

struct Scalar : ScalarFloats {
  static float dot(const float* x, const float* y, int64_t n) {
    float part[kLanes] = {};
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) part[j] += x[i + j] * y[i + j];
    }
    for (int64_t i = n / kLanes * kLanes; i < n; ++i) part[i % kLanes] += x[i] * y[i];
    return total(part);
  }

  static float dot_of(Floats x, const float* y, int64_t n, int64_t) {
    if (x.dtype == Dtype::kFloat32) return dot(static_cast<const float*>(x.data), y, n);
    constexpr int64_t kPiece = 64;
    float piece[kPiece], sum = 0;
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t count = n - i < kPiece ? n - i : kPiece;
      load_floats(x + i, count, piece);
      sum += dot(piece, y + i, count);
    }
    return sum;
  }

  static constexpr auto score = score_rows<Scalar>;
  static constexpr auto add_weighted = add_weighted_rows<Scalar>;
};

constexpr DecoderKernels kKernels = decoder_kernels<Scalar>();

}  // namespace

const DecoderKernels* decoder_scalar() { return &kKernels; }

}  // namespace bitinfer::cpu
