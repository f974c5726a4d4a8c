// pack_activations for batches of 16-bit activations with one scale a token:
//
//   z[t, k] = in_scale[k] * x[t, k];  q = rint(z * h / max |z|);  planes[t, b, w] = bit b of q[t, 32*w ... 32*w + 31]
//
// Shapes: x [M, K] float16 or bfloat16 in aligned rows, in_scale and in_shift alike, M from a few dozen tokens on, K %
// 128 == 0 up to 16,384, 8, 4 or 2 bits. A block makes rows blockIdx.x, + gridDim.x, ... one after another; all blocks
// run at the same time and take as many rows each. A warp makes 1,024 columns, a lane 32 neighbouring ones: a word of
// every plane. Rows come by asynchronous copies, each warp its own part, the next ones while one is made. Copies are
// coalesced, but a lane reads 64 bytes: shared memory transposes between the two, with 16-byte pieces in an order that
// spreads both over all banks. With 32 columns in a lane, planes are an 8 x 8 transposition of bits over eight
// registers, 43 instructions, which needs no other lane.
// Bounds: memory, x once and planes once, behind a product whose outputs fill level 2 also the writing back of these;
// the instructions, about 9 a column (14 with in_scale and in_shift), hide behind it but for their last part.
#include <algorithm>
#include <type_traits>

#include "integer_format.cuh"
#include "pack_halves.h"

namespace bitinfer::cuda {
namespace {

constexpr int kSpan = 1024;  // columns of a warp
constexpr int kOctets = 4;   // of a lane
constexpr int kMaxWarps = static_cast<int>(kMaxHalvesColumns) / kSpan, kStages = 2;
constexpr int kSpanBytes = kSpan * 2;

__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The bits of `set` where the mask has ones, else of `clear`; inverted if kInvert.
template <uint32_t kMask, bool kInvert = false>
__device__ __forceinline__ uint32_t select_bits(uint32_t set, uint32_t clear) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(set), "r"(clear), "n"(kMask), "n"(kInvert ? 0x1b : 0xe4));
  return result;
}

template <int kDistance, uint32_t kMask, bool kInvert = false>
__device__ __forceinline__ void exchange_bits(uint32_t& lower, uint32_t& upper) {
  const uint32_t moved = __funnelshift_l(upper, upper, kDistance), kept = lower;
  lower = select_bits<kMask>(kept, moved);
  upper = select_bits<kMask, kInvert>(moved, kept);
}

// Transposes 8 x 8 bits four times over: bit b of byte c of word i becomes bit i of byte c of word b. Upper words stay
// rotated instead of being shifted back after each exchange, which makes these three instructions each.
template <bool kInvertLast>
__device__ __forceinline__ void transpose_words(uint32_t (&r)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) exchange_bits<4, 0x0f0f0f0fu>(r[i], r[i + 4]);
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    exchange_bits<2, 0x33333333u>(r[i], r[i + 2]);
    exchange_bits<2, 0x33333333u>(r[i + 1], r[i + 3]);
  }
#pragma unroll
  for (int i = 0; i < 6; i += 2) exchange_bits<1, 0x55555555u>(r[i], r[i + 1]);
  exchange_bits<1, 0x55555555u, kInvertLast>(r[6], r[7]);
#pragma unroll
  for (int i = 1; i < 8; ++i) r[i] = __funnelshift_r(r[i], r[i], i);
}

template <typename T, int kBits, bool kScaled>
__global__ void __launch_bounds__(32 * kMaxWarps, kScaled ? 1 : 2)
    pack_batch_kernel(const IntegerFormat p, const T* x, int64_t stride, int m) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ uint32_t largest_of[2][kMaxWarps];  // of each warp, in turns for even and odd rows
  __shared__ int sum_of[2][kMaxWarps];
  __shared__ double shift_of[4][kMaxWarps];  // written before a barrier, read after the next one
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, word = static_cast<int>(threadIdx.x);
  const int k = static_cast<int>(p.k), words = k / 32, step = static_cast<int>(gridDim.x);
  constexpr int kWarpBytes = (kStages + kScaled) * kSpanBytes;  // with a span of in_shift
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * kWarpBytes;
  const uint32_t to = base + (lane ^ (lane / 8)) * 16, from = base + lane * (kOctets * 16);
  const uint32_t order = lane / 2 % 4 * 16;
  const int first_column = warp * kSpan + lane * kOctet;  // of this lane's copies
  allow_next_kernel();

  const auto copy_span = [&](const T* source, uint32_t at) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (first_column + i * (32 * kOctet) < k) copy_async(to + at + i * 512, source + i * (32 * kOctet));
    }
  };
  const auto load_piece = [&](uint32_t at, int c) { return load_shared(from + at + ((c * 16) ^ order)); };
  if (threadIdx.x < kMaxWarps) largest_of[0][threadIdx.x] = largest_of[1][threadIdx.x] = 0;
  if (warp == warps - 1) {  // what no copy fills
    for (int at = 0; at < kWarpBytes; at += 512) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(base + at + lane * 16), "r"(0) : "memory");
    }
    __syncwarp();
  }
  uint4 in_scale[kScaled ? kOctets : 1];
  if constexpr (kScaled) {
    const uint32_t one = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll
    for (int c = 0; c < kOctets; ++c) {
      const int column = word * 32 + c * kOctet;
      in_scale[c] = make_uint4(one, one, one, one);
      if (p.in_scale && column < k) {
        in_scale[c] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.in_scale.data) + column));
      }
    }
    if (p.in_shift) copy_span(static_cast<const T*>(p.in_shift.data) + first_column, kStages * kSpanBytes);
  }
  __syncthreads();
  wait_for_previous_kernel();

  const T* source = x + static_cast<int64_t>(blockIdx.x) * stride + first_column;
  int next_row = static_cast<int>(blockIdx.x);
  uint32_t next_at = 0, at = 0;  // stages, in bytes
  const auto advance = [](uint32_t& stage) { stage = stage == (kStages - 1) * kSpanBytes ? 0 : stage + kSpanBytes; };
  const auto fetch = [&] {
    if (next_row < m) copy_span(source, next_at);
    copy_async_commit();
    source += step * stride;
    next_row += step;
    advance(next_at);
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch();

  // What the warps found of a row, which are there after the barrier of the next one.
  const auto write_sums = [&](int row, unsigned turn) {
    const int sum = __reduce_add_sync(kAllLanes, lane < warps ? sum_of[turn % 2][lane] : 0);
    if (lane == 0) p.sum[row] = sum;
    if (kScaled && p.in_shift && lane == 0) {
      double shift = 0;
      for (int i = 0; i < warps; ++i) shift += shift_of[turn % 4][i];
      p.shift[row] = static_cast<float>(shift);
    }
  };
  unsigned turn = 0;
  for (int row = static_cast<int>(blockIdx.x); row < m; row += step, ++turn) {
    __syncwarp();  // all lanes have read what is filled next
    fetch();
    copy_async_wait<kStages - 1>();
    __syncwarp();
    uint4 raw[kOctets];
#pragma unroll
    for (int c = 0; c < kOctets; ++c) raw[c] = load_piece(at, c);
    advance(at);

    // ---- the scale
    float z[kScaled ? kOctets : 1][kOctet];
    uint32_t largest;
    if constexpr (kScaled) {
      float maximum[kOctets] = {};
#pragma unroll
      for (int c = 0; c < kOctets; ++c) {
        float scale[kOctet];
        unpack<T>(raw[c], z[c]);
        unpack<T>(in_scale[c], scale);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          z[c][j] = __fmul_rn(z[c][j], scale[j]);
          maximum[c] = max_magnitude(maximum[c], z[c][j]);
        }
      }
      largest =
          __float_as_uint(max_magnitude(max_magnitude(maximum[0], maximum[1]), max_magnitude(maximum[2], maximum[3])));
    } else {
      largest = largest_magnitude<T>(raw);
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) largest_of[turn % 2][warp] = largest;
    if constexpr (kScaled) {
      if (p.in_shift) {
        // Products of 16-bit numbers are exact in float32. The first sums are made there, since conversions to double
        // are slow: six roundings at most.
        float total[kOctet] = {};
#pragma unroll
        for (int c = 0; c < kOctets; ++c) {
          float values[kOctet], factors[kOctet];
          unpack<T>(raw[c], values);
          unpack<T>(load_piece(kStages * kSpanBytes, c), factors);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) total[j] = fmaf(values[j], factors[j], total[j]);
        }
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) {
#pragma unroll
          for (int j = 0; j < distance; ++j) total[j] += total[j + distance];
        }
        const double shift = warp_sum(static_cast<double>(total[0]));
        if (lane == 0) shift_of[turn % 4][warp] = shift;
      }
    }
    __syncthreads();
    if (warp == 0 && row >= step) write_sums(row - step, turn - 1);
    largest = __reduce_max_sync(kAllLanes, largest_of[turn % 2][lane % kMaxWarps]);
    const float factor = p.factor_from(largest);
    if (threadIdx.x == blockDim.x - 32) p.scale[row] = p.scale_from(largest);
    uint32_t* target = p.planes + row * static_cast<int64_t>(kBits * words) + word;
    const auto store = [&](const uint32_t (&r)[8]) {
      if (word >= words) return;
#pragma unroll
      for (int b = 0; b < kBits; ++b) target[b * words] = r[b];
    };
    if (factor == 0) {  // integers of zero, whatever z holds
      constexpr uint32_t kZeros[8] = {};
      store(kZeros);
      if (lane == 0) sum_of[turn % 2][warp] = 0;
      continue;
    }

    // ---- the integers and their planes
    uint32_t r[kOctet];  // those of column i of each octet, one a byte, plus 128
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      uint32_t q[kOctets][2];
#pragma unroll
      for (int c = 0; c < kOctets; ++c) {
        float values[2];
        if constexpr (kScaled) {
          values[0] = z[c][i];
          values[1] = z[c][i + 1];
        } else {
          unpack(i == 0 ? raw[c].x : i == 2 ? raw[c].y : i == 4 ? raw[c].z : raw[c].w, values[0], values[1], T{});
        }
        // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits; 128 keeps it positive
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          q[c][j] = __float_as_uint(__fadd_rn(__fmul_rn(values[j], factor), 12582912.0f + 128.0f));
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        r[i + j] = __byte_perm(q[1][j] * 256 + q[0][j], q[3][j] * 256 + q[2][j], 0x5410);
      }
    }
    uint32_t sum = 0u - 128 * 32;
#pragma unroll
    for (uint32_t bytes : r) sum = __dp4a(bytes, 0x01010101u, sum);
    transpose_words<kBits == 8>(r);
    store(r);
    const int total = __reduce_add_sync(kAllLanes, static_cast<int>(sum));
    if (lane == 0) sum_of[turn % 2][warp] = total;
  }
  __syncthreads();
  const int rows = (m - static_cast<int>(blockIdx.x) + step - 1) / step;
  if (warp == 0) write_sums(static_cast<int>(blockIdx.x) + (rows - 1) * step, turn - 1);
}

struct BatchPlan {
  int warps = 0, blocks = 0, shared_bytes = 0;
};

// All blocks run at the same time, and take as many rows each. Where they are few, they ask for so much shared memory
// that they spread: started while the kernel ahead still runs, they would gather where it leaves first.
BatchPlan plan_batch(int64_t m, int64_t k, bool scaled, const Device& device) {
  BatchPlan plan;
  plan.warps = static_cast<int>((k + kSpan - 1) / kSpan);
  const int64_t together = int64_t{scaled ? 16 : 32} / plan.warps * device.multiprocessors;  // of 128 or 64 registers
  const int64_t rows = (m + together - 1) / together;
  plan.blocks = static_cast<int>((m + rows - 1) / rows);
  const int side_by_side = (plan.blocks + device.multiprocessors - 1) / device.multiprocessors;
  const int share = std::min(device.shared_bytes_all / (side_by_side + 1), device.shared_bytes - 2048);
  plan.shared_bytes = std::max(plan.warps * (kStages + scaled) * kSpanBytes, share / 1024 * 1024);
  return plan;
}

template <typename T, int kBits, bool kScaled>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  const BatchPlan plan = plan_batch(m, p.k, kScaled, on.device);
  return launch(pack_batch_kernel<T, kBits, kScaled>, on, dim3(plan.blocks), dim3(32 * plan.warps), plan.shared_bytes,
                true, IntegerFormat{p}, static_cast<const T*>(p.x.data), p.stride, static_cast<int>(m));
}

template <typename T, int kBits>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  return p.in_scale || p.in_shift ? run<T, kBits, true>(p, m, on) : run<T, kBits, false>(p, m, on);
}

template <typename T>
cudaError_t run(const PackActivations& p, int64_t m, const Launch& on) {
  return p.bits == 8 ? run<T, 8>(p, m, on) : p.bits == 4 ? run<T, 4>(p, m, on) : run<T, 2>(p, m, on);
}

}  // namespace

cudaError_t pack_activations_batch(const PackActivations& p, int64_t m, const Launch& on) {
  return p.x.dtype == Dtype::kFloat16 ? run<__half>(p, m, on) : run<__nv_bfloat16>(p, m, on);
}

}  // namespace bitinfer::cuda
