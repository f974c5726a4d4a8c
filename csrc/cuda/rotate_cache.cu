// Queries and keys of a prompt get their norm, if they have one, and their rotary embedding, and keys and values go to
// the cache, in one pass:
//
//   x = RMSNorm(x) * weight                   of a head, in q and k, Qwen3 alone
//   q, k = x * cos + turned(x) * sin          turned(x) = -second half, first half; q where it is, and k too if
//                                             the cache is rounded, for attention to read
//   keys, values [b, h, start + t] = k, v     rounded to 8 or 4 bits where the cache is (cache_row.cuh)
//
// each step rounded as transformers does it.
//
// Mapping: a thread has eight columns of a head's first half and the eight that they turn with in its second; a block
// row is a token. Bounds: memory, each number is read once and written once.
#include "cache_row.cuh"
#include "octet.cuh"
#include "reduce.cuh"
#include "rotate_cache.h"

namespace bitinfer::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ __forceinline__ void store(void* row, int64_t at, const uint4& octet) {
  *reinterpret_cast<uint4*>(static_cast<T*>(row) + at) = octet;
}

template <typename T, int kDim, int kBits>
__global__ void __launch_bounds__(kThreads) rotate_cache_kernel(const __grid_constant__ RotateCache p) {
  constexpr int kHalf = kDim / 2, kLanes = kHalf / kOctet;
  const int unit = static_cast<int>(blockIdx.y * kThreads + threadIdx.x), all = p.heads + 2 * p.kv_heads;
  const int column = unit % kLanes * kOctet, row = static_cast<int>(blockIdx.x);
  // threads past the last head repeat it, and store nothing: shuffles take whole warps
  const bool valid = unit / kLanes < all;
  int head = min(unit / kLanes, all - 1);
  const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
  head -= is_q ? 0 : is_v ? p.heads + p.kv_heads : p.heads;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);  // of the head
  const int sequence = row / p.tokens, token = row % p.tokens;
  const int64_t angle = (static_cast<int64_t>(p.shared_angles ? 0 : sequence) * p.tokens + token) * kDim + column;
  allow_next_kernel();
  wait_for_previous_kernel();

  const T* const from = static_cast<const T*>(is_q   ? p.q
                                              : is_v ? p.v
                                                     : p.k) +
                        row * (is_q   ? p.q_stride
                               : is_v ? p.v_stride
                                      : p.k_stride) +
                        head * kDim + column;
  uint4 low = load_quad(from), high = load_quad(from + kHalf);
  if (!is_v) {
    uint4 angles[4];  // cos of low and high, sin of them
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      angles[i] = load_quad(static_cast<const T*>(i < 2 ? p.cos : p.sin) + angle + i % 2 * kHalf);
    }
    const void* const norm = is_q ? p.q_norm : p.k_norm;
    float x[2][kOctet];
    unpack<T>(low, x[0]);
    unpack<T>(high, x[1]);
    if (norm != nullptr) {
      float squares = 0, weight[kOctet];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) squares += x[0][j] * x[0][j] + x[1][j] * x[1][j];
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(lanes, squares, distance);
      const float factor = rsqrtf(squares / kDim + (is_q ? p.q_eps : p.k_eps));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unpack<T>(load_quad(static_cast<const T*>(norm) + column + i * kHalf), weight);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) x[i][j] = __fmul_rn(x[i][j], factor);
        round_octet(x[i], T{});
#pragma unroll
        for (int j = 0; j < kOctet; ++j) x[i][j] = __fmul_rn(x[i][j], weight[j]);
        round_octet(x[i], T{});
      }
    }
    float turned[2][kOctet], cos[kOctet], sin[kOctet];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unpack<T>(angles[i], cos);
      unpack<T>(angles[2 + i], sin);
      float straight[kOctet], across[kOctet];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        straight[j] = __fmul_rn(x[i][j], cos[j]);
        across[j] = __fmul_rn(i == 0 ? -x[1][j] : x[0][j], sin[j]);
      }
      round_octet(straight, T{});
      round_octet(across, T{});
#pragma unroll
      for (int j = 0; j < kOctet; ++j) turned[i][j] = __fadd_rn(straight[j], across[j]);
    }
    low = round_octet(turned[0], T{});
    high = round_octet(turned[1], T{});
  }
  if (!valid) return;
  if (is_q || (kBits < 16 && !is_v)) {
    void* const row_of_x = is_q ? p.q : p.k;
    const int64_t at = row * (is_q ? p.q_stride : p.k_stride) + head * kDim + column;
    store<T>(row_of_x, at, low);
    store<T>(row_of_x, at + kHalf, high);
    if (is_q) return;
  }
  const int64_t slot = (static_cast<int64_t>(sequence) * p.kv_heads + head) * p.capacity + p.start + token;
  unsigned char* const cached =
      static_cast<unsigned char*>(is_v ? p.values : p.keys) + slot * cache_row_bytes(kDim, kBits);
  if constexpr (kBits == 16) {
    store<T>(cached, column, low);
    store<T>(cached, column + kHalf, high);
  } else {
    float x[kOctet];
    unpack<T>(low, x);
    store_cache_octet<kBits, kDim>(cached, column, x, lanes);
    unpack<T>(high, x);
    store_cache_octet<kBits, kDim>(cached, column + kHalf, x, lanes);
  }
}

}  // namespace

cudaError_t rotate_cache(const RotateCache& p, const Launch& on) {
  if (p.batch == 0 || p.tokens == 0) return cudaSuccess;
  const int units = (p.heads + 2 * p.kv_heads) * (p.dim / 2 / kOctet);
  const dim3 grid(static_cast<unsigned>(p.batch) * static_cast<unsigned>(p.tokens),
                  static_cast<unsigned>((units + kThreads - 1) / kThreads));
  const auto run = [&](auto kernel) { return launch(kernel, on, grid, dim3(kThreads), 0, true, p); };
  const auto bits = [&]<typename T, int kDim>() {
    return p.cache_bits == 16  ? run(rotate_cache_kernel<T, kDim, 16>)
           : p.cache_bits == 8 ? run(rotate_cache_kernel<T, kDim, 8>)
                               : run(rotate_cache_kernel<T, kDim, 4>);
  };
  const auto dims = [&]<typename T>(T) {
    return p.dim == 64 ? bits.template operator()<T, 64>() : bits.template operator()<T, 128>();
  };
  return p.dtype == Dtype::kFloat16 ? dims(__half{}) : dims(__nv_bfloat16{});
}

}  // namespace bitinfer::cuda
