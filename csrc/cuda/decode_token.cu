// All layers of a LLaMA-shaped model for one token, in one launch that stays: blocks, one a multiprocessor, go through
// the stages of every layer together and meet at a barrier of the whole grid behind each.
//
//   q, k, v     h += down;  n = RMSNorm(h) * input_norm;  q, k, v = each its product of n in integers
//   attention   rotary embedding, cache, softmax: a head, or a part of its slots, a block
//   output      o = its product
//   gate, up    h += o;  n = RMSNorm(h) * post_norm;  m = silu(gate) * up
//   down        its product of m
//
// with the integers of pack_activations, the epilogue of popcount_gemm, and the roundings of transformers. For int8,
// int4 and int2 activations (fewer bits go in eight planes too), one scale a row and a token, as many keys as queries,
// hidden sizes up to 4,096, and models of which a layer's weights fit the shared memory of all multiprocessors; sm_90.
//
// Kernels of their own for these stages lose most of their time between one another: about 1 us from the end of one to
// the first instruction of the next, cold instructions, and blocks that share a multiprocessor while others have none.
// Here a block owns rows of every matrix and a place in shared memory for each; as soon as a stage has used its
// weights, the copy engine puts the next layer's there (copies by threads would stand in the way of their loads), and
// all else that a stage will read is fetched to L2 before: memory never waits for the chain. What is left is the chain:
// five barriers a layer, activations from L2 behind each, and the instructions in between.
//
//   block      rows of all matrices, a part of a head; every block packs the token anew, in 16 warps
//   warps      two share a chunk of 512 columns: each packs a half, then takes every other tile of rows, or one of gate
//              and up, for the whole chunk; partial sums [chunk of 8, row] meet in shared memory
//   registers  h, eight columns a lane, through all layers
#include <algorithm>

#include "attention_row.cuh"
#include "decode_token.h"
#include "gemm_decode.cuh"
#include "hopper.cuh"
#include "pack_row.cuh"

namespace bitinfer::cuda {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kChunkColumns = 32 * kChunkWords, kPlaneBytes = kChunkColumns;  // of the eight planes of a chunk
constexpr int kMaxHidden = kKWarps * kChunkColumns, kMaxInnerRounds = 3;
constexpr int kMaxSplits = 8, kUnroll = 4;  // slots that a lane has under way

constexpr int part_size(int dim) { return dim + 4; }  // floats: sum of p * v, largest score, sum of p

constexpr int tiles_for(int n) { return (n + kTileRows - 1) / kTileRows; }

// Memory of the grid: the barrier and a count for each head, then activations between stages, then parts of heads.
struct Memory {
  uint32_t* barrier;  // and behind it how many blocks have left
  uint32_t* heads_done;
  unsigned char* rows;  // of 16-bit numbers: q, k, v, attended, output, inner, down
  float* parts;
};

constexpr int64_t kRowAlignment = 256;

constexpr int64_t row_bytes(int columns) {
  return (2 * int64_t{columns} + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// Tiles of a block.
struct Share {
  int first, count;

  Share() = default;
  __device__ Share(int tiles, int block, int blocks) {
    first = block * (tiles / blocks) + min(block, tiles % blocks);
    count = tiles / blocks + (block < tiles % blocks);
  }
};

struct Scratch {
  float squares[kWarps];
  uint32_t largest[2][kWarps];
  alignas(16) int sum[2][kWarps];
  alignas(16) float shift[2][kWarps];
};

__device__ __forceinline__ uint32_t add(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ void fetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// A barrier of the grid whose two halves have other work between them. It counts up from zero, and the last block to
// leave the kernel sets it back.
struct GridBarrier {
  uint32_t *count, *left;
  uint32_t target;

  __device__ __forceinline__ void arrive() {
    target += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      uint32_t now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
      } while (now < target);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void leave() {
    if (threadIdx.x == 0 && add(left, 1) == gridDim.x - 1) *count = *left = 0;
  }
};

// The bits of a number, converted where it is used: that waits for memory.
__device__ __forceinline__ uint32_t load_bits(const Floats& row, int i) {
  uint32_t bits;
  if (row.dtype == Dtype::kFloat32) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(static_cast<const uint32_t*>(row.data) + i));
  } else {
    unsigned short half;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(half) : "l"(static_cast<const unsigned short*>(row.data) + i));
    bits = half;
  }
  return bits;
}

__device__ __forceinline__ float to_number(const Floats& row, uint32_t bits, float absent) {
  if (!row) return absent;
  if (row.dtype == Dtype::kFloat32) return __uint_as_float(bits);
  if (row.dtype == Dtype::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// What a thread needs for the output of a row.
struct Place {
  uint32_t scale, shift, bias;

  __device__ __forceinline__ void load(const TokenMatrix& m, int row, bool valid) {
    scale = shift = bias = 0;
    if (!valid) return;
    if (m.scale) scale = load_bits(m.scale, row);
    if (m.group_shift) shift = load_bits(m.group_shift, row);
    if (m.bias) bias = load_bits(m.bias, row);
  }
};

// The columns of a lane in round r: half of a chunk's octets belong to each of two warps.
__device__ __forceinline__ int column_of(int round) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  return (warp / 2 + round * kKWarps) * kChunkColumns + (warp % 2 * 32 + lane) * kOctet;
}

template <typename T, int kRounds>
__device__ __forceinline__ void load_row(const void* row, int k, uint4 (&to)[kRounds]) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int column = column_of(r);
    to[r] = make_uint4(0, 0, 0, 0);
    if (row != nullptr && column < k) to[r] = load_quad(static_cast<const T*>(row) + column);
  }
}

// Bytes of a share of a matrix, which lie together in memory, and in shared memory too: rows without padding cost some
// bank conflicts, but a copy of its own for each would cost the copy engine more.
__device__ __forceinline__ uint32_t share_bytes(int n, int k, Share share) {
  const int rows = min(share.count * kTileRows, n - share.first * kTileRows);
  return static_cast<uint32_t>(max(rows, 0) * (k / 8));
}

// Has the copy engine bring a share; `barrier` gets the bytes.
__device__ __forceinline__ void copy_share(uint32_t to, const TokenMatrix& m, int n, int k, Share share,
                                           uint32_t barrier) {
  const uint32_t bytes = share_bytes(n, k, share);
  if (bytes == 0) return;
  const auto* const from = reinterpret_cast<const unsigned char*>(m.signs) + int64_t{share.first} * kTileRows * (k / 8);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// h += added and n = RMSNorm(h) * weight, each step rounded to T.
template <typename T>
__device__ __forceinline__ uint4 normalise(uint4& h, const uint4& added, const uint4& weight, int k, float eps,
                                           Scratch& s) {
  float z[kOctet], others[kOctet];
  unpack<T>(h, z);
  unpack<T>(added, others);
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fadd_rn(z[j], others[j]);
  h = round_octet(z, T{});
#pragma unroll
  for (float value : z) squares += value * value;
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) s.squares[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = s.squares[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(kAllLanes, squares, distance);
  const float factor = rsqrtf(squares / static_cast<float>(k) + eps);
  unpack<T>(weight, others);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], factor);
  round_octet(z, T{});
#pragma unroll
  for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], others[j]);
  return round_octet(z, T{});
}

// The columns' factors of one product.
template <int kRounds>
struct Factors {
  uint4 scale[kRounds], shift[kRounds];
  bool scales, shifts;

  template <typename T>
  __device__ __forceinline__ void load(const TokenMatrix& m, int k) {
    scales = m.in_scale != nullptr;
    shifts = m.in_shift != nullptr;
    load_row<T>(m.in_scale, k, scale);
  }
  // later: registers are few
  template <typename T>
  __device__ __forceinline__ void load_shift(const TokenMatrix& m, int k) {
    load_row<T>(m.in_shift, k, shift);
  }
};

// Quantises the token for each product and leaves its planes [product, round, chunk] in shared memory.
template <typename T, int kRounds, int kProducts>
__device__ __forceinline__ void make_planes(const uint4 (&n)[kRounds], const Factors<kRounds> (&factors)[kProducts],
                                            float highest, uint32_t planes, Scratch& s, float (&act_scale)[kProducts]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto z_of = [&](int p, int r, float (&z)[kOctet]) {
    unpack<T>(n[r], z);
    if (!factors[p].scales) return;
    float scale[kOctet];
    unpack<T>(factors[p].scale[r], scale);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) z[j] = __fmul_rn(z[j], scale[j]);
  };
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    float maximum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float z[kOctet];
      z_of(p, r, z);
#pragma unroll
      for (float value : z) maximum = max_magnitude(maximum, value);
    }
    const uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(maximum));
    if (lane == 0) s.largest[p][warp] = largest;
  }
  __syncthreads();
  // lanes 2h' and 2h' + 1 together have 16 columns, half a word of each plane: the even lane stores planes 0 to 3 of
  // them, the odd one 4 to 7. See popcount's operand in gemm_decode.cu: half h of a chunk is half h % 2 of word h / 2 =
  // 4t + i, a row of eight planes at row 2t + h % 2 of matrix i.
  const bool odd = lane & 1;
  const int half = 16 * (warp % 2) + lane / 2, matrix = half / 2 % 4, row = half / 8 * 2 + half % 2;
  const uint32_t to = planes + 16 * (8 * matrix + (row ^ 2 * matrix)) + 8 * odd;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, s.largest[p][lane % kWarps]);
    const bool bad = largest >= kInfinityBits, zero = bad || __uint_as_float(largest) < kSmallestAbsmax;
    const float factor = __fdiv_rn(highest, __uint_as_float(largest));
    act_scale[p] = bad ? __uint_as_float(kNaNBits) : zero ? 0 : __fdiv_rn(__uint_as_float(largest), highest);
    int sum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float z[kOctet];
      z_of(p, r, z);
      uint32_t q[kOctet];
      // adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits
#pragma unroll
      for (int j = 0; j < kOctet; ++j) q[j] = __float_as_uint(__fadd_rn(__fmul_rn(z[j], factor), 12582912.0f));
      uint32_t low = zero ? 0 : gather_bytes<0>(q[0], q[1], q[2], q[3]);
      uint32_t high = zero ? 0 : gather_bytes<0>(q[4], q[5], q[6], q[7]);
      sum = __dp4a(static_cast<int>(low), 0x01010101, __dp4a(static_cast<int>(high), 0x01010101, sum));
      transpose_bits(low, high);
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
      const uint32_t first = odd ? other : low, second = odd ? high : other;
      asm volatile(
          "st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + ((p * kRounds + r) * kKWarps + warp / 2) * kPlaneBytes),
          "r"(__byte_perm(first, second, 0x5140)), "r"(__byte_perm(first, second, 0x7362))
          : "memory");
    }
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane == 0) s.sum[p][warp] = sum;
  }
  __syncthreads();
}

// in_shift . n of this warp's columns, for one product.
template <typename T, int kRounds>
__device__ __forceinline__ void add_shift(const uint4 (&n)[kRounds], const Factors<kRounds>& factors, float& of_warp) {
  if (!factors.shifts) return;
  float total[kOctet] = {};
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    // products of 16-bit numbers are exact in float32
    float values[kOctet], shift[kOctet];
    unpack<T>(n[r], values);
    unpack<T>(factors.shift[r], shift);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) total[j] = fmaf(values[j], shift[j], total[j]);
  }
#pragma unroll
  for (int distance = kOctet / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < distance; ++j) total[j] += total[j + distance];
  }
  const float shift = warp_sum(total[0]);
  if (threadIdx.x % 32 == 0) of_warp = shift;
}

// Multiplies tiles first, first + step, ... of `weights` by planes, into the partial sums of this warp's chunk.
template <int kRounds>
__device__ __forceinline__ void multiply(uint32_t weights, int k, int tiles, int first, int step, uint32_t planes,
                                         int* slot) {
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = static_cast<int>(threadIdx.x) / 64;
  const int g = lane / 4, t = lane % 4, pitch = k / 8;
  const int last_chunk = (k - 1) / kChunkColumns;
  uint4 x[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[r].x), "=r"(x[r].y), "=r"(x[r].z), "=r"(x[r].w)
                 : "r"(planes + (r * kKWarps + chunk) * kPlaneBytes + 16 * (lane ^ lane / 8 * 2))
                 : "memory");
  }
  const uint32_t at_lane = weights + g * pitch + 16 * t;
  constexpr int kBatch = 2;  // tiles at a time, to have independent work
  for (int tile0 = first; tile0 < tiles; tile0 += kBatch * step) {
    int c[kBatch][1][4] = {};
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      // chunks past the end of a row have planes of zero, whatever weights those meet
      const int at_chunk = 64 * min(chunk + r * kKWarps, last_chunk);
      uint4 upper[kBatch], lower[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t at = at_lane + min(tile0 + b * step, tiles - 1) * (kTileRows * pitch) + at_chunk;
        upper[b] = load_shared(at);
        lower[b] = load_shared(at + 8 * pitch);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        multiply_b1_k256(c[b][0], {upper[b].x, lower[b].x, upper[b].y, lower[b].y}, x[r].x, x[r].y);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        multiply_b1_k256(c[b][0], {upper[b].z, lower[b].z, upper[b].w, lower[b].w}, x[r].z, x[r].w);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int tile = tile0 + b * step;
      if (tile >= tiles) break;
      combine_groups<8, 1>(c[b], g, t, [&](int, int row, int value) { slot[tile * kTileRows + row] = value; });
    }
  }
}

// An output, in the order that popcount_gemm prescribes.
__device__ __forceinline__ float output_of(const int* slots, int stride, int row, const Scratch& s, int p, bool shifts,
                                           float act_scale, const Place& place, const TokenMatrix& m) {
  int counted = 0, q_sum = 0;
#pragma unroll
  for (int w = 0; w < kKWarps; ++w) counted += slots[w * stride + row];
  float shift = 0;
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i) {
    const int4 four = reinterpret_cast<const int4*>(s.sum[p])[i];
    q_sum += (four.x + four.y) + (four.z + four.w);
    if (shifts) {
      const float4 of_warps = reinterpret_cast<const float4*>(s.shift[p])[i];
      shift += (of_warps.x + of_warps.y) + (of_warps.z + of_warps.w);
    }
  }
  const float scale = to_number(m.scale, place.scale, 1);
  float y = __fmul_rn(__fmul_rn(act_scale, scale), static_cast<float>(q_sum - 2 * counted));
  if (m.group_shift) {
    const float of_group = to_number(m.group_shift, place.shift, 0);
    y = __fadd_rn(y, __fmul_rn(__fmul_rn(act_scale, of_group), static_cast<float>(q_sum)));
  }
  return __fadd_rn(__fadd_rn(y, shift), to_number(m.bias, place.bias, 0));
}

struct Arguments {
  DecodeToken p;
  TokenPlan plan;
  Memory memory;
  float highest;
};

// What a block knows for all layers, in shared memory, since registers are few.
template <typename T>
struct Common {
  T *q, *k, *v, *attended, *o, *m, *down;  // activations between stages
  T* projected;                            // q, k or v: no block has some of two
  int projection;
  Share qkv, out, gate, of_down;
  int head, rank, slot, begin, end;  // of attention; slots before the new one

  __device__ void fill(const Arguments& a, int block, int blocks) {
    const TokenShape& shape = a.p.shape;
    const int width = shape.heads * shape.dim;
    unsigned char* rows = a.memory.rows;
    const auto take = [&rows](int columns) {
      T* const row = reinterpret_cast<T*>(rows);
      rows += row_bytes(columns);
      return row;
    };
    q = take(width), k = take(width), v = take(width), attended = take(width);
    o = take(shape.hidden), m = take(shape.inner), down = take(shape.hidden);
    const int qkv_blocks = (tiles_for(width) + a.plan.qkv_tiles - 1) / a.plan.qkv_tiles, which = block / qkv_blocks;
    projection = kQuery + min(which, 2);
    projected = which == 0 ? q : which == 1 ? k : v;
    qkv = which < 3 ? Share(tiles_for(width), block % qkv_blocks, qkv_blocks) : Share(0, 0, 1);
    out = Share(tiles_for(shape.hidden), block, blocks);
    gate = Share(tiles_for(shape.inner), block, blocks);
    of_down = Share(tiles_for(shape.hidden), block, blocks);
    head = block / a.plan.splits;
    rank = block % a.plan.splits;
    slot = static_cast<int>(min(load_long(a.p.slot), static_cast<int64_t>(a.p.capacity - 1)));
    const int share = (slot + a.plan.splits - 1) / a.plan.splits;
    begin = min(rank * share, slot);
    end = min(begin + share, slot);
  }
};

template <typename T, int kDim, int kInnerRounds>
__global__ void __launch_bounds__(kThreads, 1) decode_token_kernel(const __grid_constant__ Arguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kLanes = kDim / kOctet, kSlotsOfLoad = 32 / kLanes, kStep = kWarps * kSlotsOfLoad;
  constexpr int kColumns = kDim / 32, kPart = part_size(kDim);
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Scratch s;
  __shared__ uint4 layer_words[2][sizeof(TokenLayer) / 16];  // this one and the next
  __shared__ Common<T> common;
  __shared__ bool is_last_part;
  const DecodeToken& p = a.p;
  const TokenPlan& plan = a.plan;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int hidden = p.shape.hidden, inner = p.shape.inner, width = p.shape.heads * kDim;
  GridBarrier grid{a.memory.barrier, a.memory.barrier + 1, 0};

  if (thread == 0) common.fill(a, block, blocks);
  const auto layer_at = [&](int layer) -> const TokenLayer& {
    return *reinterpret_cast<const TokenLayer*>(layer_words[layer % 2]);
  };
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), planes = base + plan.scratch_at;
  int* const slots =
      reinterpret_cast<int*>(shared + plan.scratch_at + std::max(2, kInnerRounds) * kKWarps * kPlaneBytes);
  const int chunk = warp / 2;

  const auto load_layer = [&](int layer) {
    constexpr int kQuads = static_cast<int>(sizeof(TokenLayer) / 16);
    if (thread < kQuads && layer < p.layer_count) {
      layer_words[layer % 2][thread] = reinterpret_cast<const uint4*>(p.layers + layer)[thread];
    }
  };
  // copies of a layer's weights for a stage, behind which its barrier turns, by a thread that no other waits for;
  // `layer` may be one past the last
  enum Stage { kQkv, kOut, kGated, kDowned, kStages };
  __shared__ uint64_t ready[kStages];
  const auto announce = [&](Stage stage, uint32_t bytes) {
    const uint32_t barrier = shared_address(ready + stage);
    barrier_arrive_expecting(barrier, bytes);
    return barrier;
  };
  const auto copies = [&](int layer) { return thread == kThreads - 1 && layer < p.layer_count; };
  const auto copy_qkv = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kQkv, share_bytes(width, hidden, common.qkv));
    copy_share(base, layer_at(layer).of[common.projection], width, hidden, common.qkv, barrier);
  };
  const auto copy_out = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kOut, share_bytes(hidden, width, common.out));
    copy_share(base + plan.out_at, layer_at(layer).of[kOutput], hidden, width, common.out, barrier);
  };
  const auto copy_gated = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kGated, 2 * share_bytes(inner, hidden, common.gate));
    copy_share(base + plan.gate_at, layer_at(layer).of[kGate], inner, hidden, common.gate, barrier);
    copy_share(base + plan.up_at, layer_at(layer).of[kUp], inner, hidden, common.gate, barrier);
  };
  const auto copy_down = [&](int layer) {
    if (!copies(layer)) return;
    const uint32_t barrier = announce(kDowned, share_bytes(hidden, inner, common.of_down));
    copy_share(base + plan.down_at, layer_at(layer).of[kDown], hidden, inner, common.of_down, barrier);
  };

  if (thread == 0) {
    for (uint64_t& barrier : ready) barrier_init(shared_address(&barrier), 1);
    barrier_init_fence();
  }
  load_layer(0);
  __syncthreads();
  copy_qkv(0);
  copy_out(0);
  copy_gated(0);
  copy_down(0);
  uint4 h[1];
  load_row<T>(p.x, hidden, h);

  // a product of one input: outputs [share of n] go to y
  const auto project = [&]<int kRounds>(Stage stage, int layer, const uint4(&n)[kRounds], Factors<kRounds>(&factors)[1],
                                        const TokenMatrix& matrix, const Place& place, int weights_at, int columns,
                                        Share tiles, int count, T* y) {
    float act_scale[1];
    make_planes<T, kRounds, 1>(n, factors, a.highest, planes, s, act_scale);
    factors[0].template load_shift<T>(matrix, columns);
    barrier_wait(shared_address(ready + stage), layer & 1);
    const int stride = tiles.count * kTileRows;
    multiply<kRounds>(base + weights_at, columns, tiles.count, warp % 2, 2, planes, slots + chunk * stride);
    add_shift<T>(n, factors[0], s.shift[0][warp]);
    __syncthreads();
    const int row = tiles.first * kTileRows + thread;
    if (thread < stride && row < count) {
      y[row] = from_float<T>(output_of(slots, stride, thread, s, 0, factors[0].shifts, act_scale[0], place, matrix));
    }
  };
  // what the next layer's stages read of columns: a warp a vector, a lane a line
  const auto fetch_columns = [&](int layer) {
    if (layer == p.layer_count) return;
    const TokenLayer& l = layer_at(layer);
    const int which = warp % kTokenProjections;
    const TokenMatrix& matrix = l.of[which];
    const void* const row = warp < kTokenProjections       ? matrix.in_scale
                            : warp < 2 * kTokenProjections ? matrix.in_shift
                            : warp % 2 == 0                ? l.input_norm
                                                           : l.post_norm;
    const int columns = warp >= 2 * kTokenProjections ? hidden
                        : which == kOutput            ? width
                        : which == kDown              ? inner
                                                      : hidden;
    const int column = (block * 32 + lane) * 64;
    if (row != nullptr && column < columns) fetch_to_l2(static_cast<const T*>(row) + column);
  };

  for (int layer = 0; layer < p.layer_count; ++layer) {
    const TokenLayer& l = layer_at(layer);
    const int head = common.head, rank = common.rank, begin = common.begin, end = common.end, splits = plan.splits;
    const bool attends = head < p.shape.heads;
    const int64_t cache_row = (static_cast<int64_t>(layer) * p.shape.heads + head) * p.capacity;
    T* const keys = static_cast<T*>(p.keys) + cache_row * kDim;
    T* const values = static_cast<T*>(p.values) + cache_row * kDim;

    // ---- q, k, v
    if (attends) {  // which the next stage reads
      for (int i = begin * kDim + thread * 64; i < end * kDim; i += kThreads * 64) {
        fetch_to_l2(keys + i);
        fetch_to_l2(values + i);
      }
    }
    {
      uint4 weight[1], added[1];
      Factors<1> factors[1];
      Place place;
      const Share qkv = common.qkv;
      const TokenMatrix& matrix = l.of[common.projection];
      load_row<T>(l.input_norm, hidden, weight);
      factors[0].template load<T>(matrix, hidden);
      place.load(matrix, qkv.first * kTileRows + thread,
                 thread < qkv.count * kTileRows && qkv.first * kTileRows + thread < width);
      if (layer > 0) grid.wait();
      load_row<T>(layer > 0 ? common.down : nullptr, hidden, added);
      const uint4 n[1] = {normalise<T>(h[0], added[0], weight[0], hidden, l.input_eps, s)};
      load_layer(layer + 1);  // whose place the layer before has left
      project(kQkv, layer, n, factors, matrix, place, 0, hidden, qkv, width, common.projected);
    }
    grid.arrive();
    copy_qkv(layer + 1);

    // ---- attention
    {
      const int column = lane % kLanes * kOctet, lane_slot = warp * kSlotsOfLoad + lane / kLanes;
      uint4 k_raw[kUnroll], v_raw[kUnroll];
      const auto load_slots = [&](int at) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int i = at + u * kStep + lane_slot;
          k_raw[u] = v_raw[u] = make_uint4(0, 0, 0, 0);
          if (attends && i < end) {
            k_raw[u] = load_quad(keys + static_cast<int64_t>(i) * kDim + column);
            v_raw[u] = load_quad(values + static_cast<int64_t>(i) * kDim + column);
          }
        }
      };
      float* const query = reinterpret_cast<float*>(shared + plan.scratch_at);  // [kDim], then the new key, then parts
      float *const new_key = query + kDim, *const parts = new_key + kDim;
      float cos[kColumns], sin[kColumns], weight[kColumns];
      const void* const norm = warp == 0 ? l.q_norm : l.k_norm;
      if (attends) {
        load_slots(begin);
        if (warp < 2) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            const int64_t at = static_cast<int64_t>(common.slot) * kDim + lane + 32 * i;
            cos[i] = load_number(static_cast<const T*>(p.cos) + at);
            sin[i] = load_number(static_cast<const T*>(p.sin) + at);
            weight[i] = norm != nullptr ? load_number(static_cast<const T*>(norm) + lane + 32 * i) : 1;
          }
        }
      }
      grid.wait();
      if (attends) {
        const bool has_new = rank == 0 && warp == 0 && lane < kLanes;
        uint4 new_value = make_uint4(0, 0, 0, 0);
        if (has_new) {
          new_value = load_quad(common.v + head * kDim + column);
          *reinterpret_cast<uint4*>(values + static_cast<int64_t>(common.slot) * kDim + column) = new_value;
        }
        if (warp < 2) {
          Row<T, kDim> row;
          row.load((warp == 0 ? common.q : common.k) + head * kDim, lane);
          if (norm != nullptr) row.normalise(weight, warp == 0 ? l.q_eps : l.k_eps);
          row.rotate(cos, sin);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            const int at = lane + 32 * i;
            (warp == 0 ? query : new_key)[at] = warp == 0 ? row.x[i] * (p.scaling * kLog2E) : row.x[i];
            if (warp == 1 && rank == 0) keys[static_cast<int64_t>(common.slot) * kDim + at] = from_float<T>(row.x[i]);
          }
        }
        __syncthreads();
        // every lane starts from the new slot's score as the largest; one set of lanes counts that slot
        float at_query[kOctet], sum[kOctet], largest = 0, total = has_new ? 1 : 0;
        unpack<T>(new_value, sum);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          at_query[j] = query[column + j];
          largest += at_query[j] * new_key[column + j];
        }
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          largest += __shfl_xor_sync(kAllLanes, largest, distance);
        }
        for (int at = begin; at < end; at += kUnroll * kStep) {
          if (at != begin) load_slots(at);
          float score[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            float key[kOctet];
            unpack<T>(k_raw[u], key);
            score[u] = 0;
#pragma unroll
            for (int j = 0; j < kOctet; ++j) score[u] += at_query[j] * key[j];
          }
#pragma unroll
          for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) score[u] += __shfl_xor_sync(kAllLanes, score[u], distance);
          }
          float highest = largest;
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (at + u * kStep + lane_slot >= end) score[u] = -INFINITY;
            highest = fmaxf(highest, score[u]);
          }
          const float shrink = exp2_fast(largest - highest);
          largest = highest;
          total *= shrink;
#pragma unroll
          for (int j = 0; j < kOctet; ++j) sum[j] *= shrink;
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const float weight_of_slot = exp2_fast(score[u] - highest);
            total += weight_of_slot;
            float value[kOctet];
            unpack<T>(v_raw[u], value);
#pragma unroll
            for (int j = 0; j < kOctet; ++j) sum[j] += weight_of_slot * value[j];
          }
        }
        // what the lanes of a warp have, then its warps, then the blocks of the head
#pragma unroll
        for (int distance = kLanes; distance < 32; distance *= 2) {
          const float other = __shfl_xor_sync(kAllLanes, largest, distance), highest = fmaxf(largest, other);
          const float shrink = exp2_fast(largest - highest);
          largest = highest;
          total *= shrink;
          total += __shfl_xor_sync(kAllLanes, total, distance);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) {
            sum[j] *= shrink;
            sum[j] += __shfl_xor_sync(kAllLanes, sum[j], distance);
          }
        }
        float* const part = parts + warp * kPart;
        if (lane < kLanes) {
#pragma unroll
          for (int j = 0; j < kOctet; ++j) part[column + j] = sum[j];
        }
        if (lane == 0) {
          part[kDim] = largest;
          part[kDim + 1] = total;
        }
        __syncthreads();
        // of up to kCount parts, what thread i makes of column i
        const auto combine = [&]<int kCount>(int count, auto part_at, float& all, float& most, float& counted) {
          float largest_of[kCount], total_of[kCount], sum_of[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const bool there = i < count;
            largest_of[i] = there ? part_at(i, kDim) : -INFINITY;
            total_of[i] = there ? part_at(i, kDim + 1) : 0;
            sum_of[i] = there ? part_at(i, thread) : 0;
          }
          most = largest_of[0];
#pragma unroll
          for (int i = 1; i < kCount; ++i) most = fmaxf(most, largest_of[i]);
          all = counted = 0;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const float shrink = exp2_fast(largest_of[i] - most);
            counted += shrink * total_of[i];
            all += shrink * sum_of[i];
          }
        };
        float all = 0, most = 0, counted = 1;
        if (thread < kDim) {
          const auto of_warp = [&](int i, int at) { return parts[i * kPart + at]; };
          combine.template operator()<kWarps>(kWarps, of_warp, all, most, counted);
        }
        if (splits > 1) {
          float* const of_head = a.memory.parts + static_cast<int64_t>(head) * splits * kPart;
          if (thread < kDim) {
            of_head[rank * kPart + thread] = all;
            if (thread == 0) {
              of_head[rank * kPart + kDim] = most;
              of_head[rank * kPart + kDim + 1] = counted;
            }
          }
          __syncthreads();
          if (thread == 0) {
            is_last_part = add(a.memory.heads_done + head, 1) % splits == static_cast<unsigned>(splits - 1);
          }
          __syncthreads();
          if (is_last_part && thread < kDim) {
            const auto of_block = [&](int i, int at) { return __ldcg(of_head + i * kPart + at); };
            combine.template operator()<kMaxSplits>(splits, of_block, all, most, counted);
          }
          if (is_last_part && thread < kDim)
            common.attended[head * kDim + thread] = from_float<T>(__fdiv_rn(all, counted));
        } else if (thread < kDim) {
          common.attended[head * kDim + thread] = from_float<T>(__fdiv_rn(all, counted));
        }
      }
    }
    grid.arrive();

    // ---- output
    fetch_columns(layer + 1);
    {
      uint4 n[1];
      Factors<1> factors[1];
      Place place;
      const Share out = common.out;
      factors[0].template load<T>(l.of[kOutput], width);
      place.load(l.of[kOutput], out.first * kTileRows + thread,
                 thread < out.count * kTileRows && out.first * kTileRows + thread < hidden);
      grid.wait();
      load_row<T>(common.attended, width, n);
      project(kOut, layer, n, factors, l.of[kOutput], place, plan.out_at, width, out, hidden, common.o);
    }
    grid.arrive();
    copy_out(layer + 1);

    // ---- gate, up
    {
      uint4 weight[1], added[1];
      Factors<1> factors[2];
      Place gate_place, up_place;
      const Share gate = common.gate;
      load_row<T>(l.post_norm, hidden, weight);
      factors[0].template load<T>(l.of[kGate], hidden);
      factors[1].template load<T>(l.of[kUp], hidden);
      const int stride = gate.count * kTileRows, row = gate.first * kTileRows + thread;
      const bool valid = thread < stride && row < inner;
      gate_place.load(l.of[kGate], row, valid);
      up_place.load(l.of[kUp], row, valid);
      grid.wait();
      load_row<T>(common.o, hidden, added);
      const uint4 n[1] = {normalise<T>(h[0], added[0], weight[0], hidden, l.post_eps, s)};
      float act_scale[2];
      make_planes<T, 1, 2>(n, factors, a.highest, planes, s, act_scale);
      factors[0].template load_shift<T>(l.of[kGate], hidden);
      factors[1].template load_shift<T>(l.of[kUp], hidden);
      barrier_wait(shared_address(ready + kGated), layer & 1);
      const int which_of_two = warp % 2;
      multiply<1>(base + (which_of_two == 0 ? plan.gate_at : plan.up_at), hidden, gate.count, 0, 1,
                  planes + which_of_two * kKWarps * kPlaneBytes, slots + (which_of_two * kKWarps + chunk) * stride);
      add_shift<T>(n, factors[0], s.shift[0][warp]);
      add_shift<T>(n, factors[1], s.shift[1][warp]);
      __syncthreads();
      if (valid) {
        const auto value = [&](int i, const Place& place, const TokenMatrix& matrix) {
          const float y = output_of(slots + i * kKWarps * stride, stride, thread, s, i, factors[i].shifts, act_scale[i],
                                    place, matrix);
          return to_float(from_float<T>(y));
        };
        const float gated = value(0, gate_place, l.of[kGate]), factor = value(1, up_place, l.of[kUp]);
        const float silu = to_float(from_float<T>(gated / (1.0f + expf(-gated))));
        common.m[row] = from_float<T>(__fmul_rn(silu, factor));
      }
    }
    grid.arrive();
    copy_gated(layer + 1);

    // ---- down
    {
      uint4 n[kInnerRounds];
      Factors<kInnerRounds> factors[1];
      Place place;
      const Share of_down = common.of_down;
      factors[0].template load<T>(l.of[kDown], inner);
      place.load(l.of[kDown], of_down.first * kTileRows + thread,
                 thread < of_down.count * kTileRows && of_down.first * kTileRows + thread < hidden);
      grid.wait();
      load_row<T>(common.m, inner, n);
      project(kDowned, layer, n, factors, l.of[kDown], place, plan.down_at, inner, of_down, hidden, common.down);
    }
    grid.arrive();
    copy_down(layer + 1);
  }

  uint4 weight[1], added[1];
  load_row<T>(p.norm, hidden, weight);
  grid.wait();
  load_row<T>(common.down, hidden, added);
  const uint4 normed = normalise<T>(h[0], added[0], weight[0], hidden, p.eps, s);
  if (block == 0 && column_of(0) < hidden) *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + column_of(0)) = normed;
  grid.leave();
#endif
}

}  // namespace

TokenPlan decode_token_plan(const TokenShape& shape, const Device& device) {
  TokenPlan plan;
  const int width = shape.heads * shape.dim, blocks = device.multiprocessors;
  const auto fits = [](int columns) { return columns > 0 && columns % 128 == 0; };
  if (device.architecture < 90 || !device.has_binary_mma() || (shape.dim != 64 && shape.dim != 128)) return plan;
  if (shape.dtype == Dtype::kFloat32 || (shape.bits != 8 && shape.bits != 4 && shape.bits != 2)) return plan;
  if (!fits(shape.hidden) || !fits(shape.inner) || !fits(width) || blocks < 3 || shape.heads > blocks) return plan;
  if (shape.hidden > kMaxHidden || width > kMaxHidden || shape.inner > kMaxInnerRounds * kMaxHidden) return plan;
  const auto most = [](int tiles, int of) { return (tiles + of - 1) / of; };
  plan.qkv_tiles = most(tiles_for(width), blocks / 3);
  plan.out_tiles = plan.down_tiles = most(tiles_for(shape.hidden), blocks);
  plan.gate_tiles = most(tiles_for(shape.inner), blocks);
  plan.inner_rounds = most(shape.inner, kMaxHidden);
  plan.splits = 1;
  while (2 * plan.splits <= kMaxSplits && shape.heads * plan.splits * 2 <= blocks) plan.splits *= 2;
  int at = 0;
  const auto region = [&at](int tiles, int k) {
    at += tiles * kTileRows * (k / 8);
    return (at = (at + 127) / 128 * 128);
  };
  plan.out_at = region(plan.qkv_tiles, shape.hidden);
  plan.gate_at = region(plan.out_tiles, width);
  plan.up_at = region(plan.gate_tiles, shape.hidden);
  plan.down_at = region(plan.gate_tiles, shape.hidden);
  plan.scratch_at = region(plan.down_tiles, shape.inner);
  const int rows = kTileRows * std::max({plan.qkv_tiles, plan.out_tiles, 2 * plan.gate_tiles, plan.down_tiles});
  if (rows > kThreads) return {};
  const int products = std::max(2, plan.inner_rounds) * kKWarps * kPlaneBytes + 4 * kKWarps * rows;
  const int attention = 4 * (2 * shape.dim + kWarps * part_size(shape.dim));
  plan.shared_bytes = plan.scratch_at + std::max(products, attention);
  if (plan.shared_bytes > device.shared_bytes - 4096) return {};
  plan.blocks = blocks;
  return plan;
}

int64_t decode_token_bytes(const TokenShape& shape, const TokenPlan& plan) {
  const int width = shape.heads * shape.dim;
  return kRowAlignment + 4 * int64_t{shape.heads} + kRowAlignment + 4 * row_bytes(width) + 2 * row_bytes(shape.hidden) +
         row_bytes(shape.inner) + 4 * int64_t{shape.heads} * plan.splits * part_size(shape.dim);
}

cudaError_t decode_token(const DecodeToken& p, const TokenPlan& plan, const Launch& on) {
  const TokenShape& shape = p.shape;
  auto* const start = static_cast<unsigned char*>(p.memory);
  const int64_t rows_at =
      kRowAlignment + (4 * int64_t{shape.heads} + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  const int64_t parts_at =
      rows_at + 4 * row_bytes(shape.heads * shape.dim) + 2 * row_bytes(shape.hidden) + row_bytes(shape.inner);
  const Arguments arguments{p,
                            plan,
                            {reinterpret_cast<uint32_t*>(start), reinterpret_cast<uint32_t*>(start + kRowAlignment),
                             start + rows_at, reinterpret_cast<float*>(start + parts_at)},
                            static_cast<float>((1 << (shape.bits - 1)) - 1)};
  const auto run = [&]<typename T, int kDim, int kInnerRounds>() {
    const auto kernel = decode_token_kernel<T, kDim, kInnerRounds>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;  // all blocks at the same time, or an error
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = on.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments);
  };
  const auto rounds = [&]<typename T, int kDim>() {
    switch (plan.inner_rounds) {
      case 1:
        return run.template operator()<T, kDim, 1>();
      case 2:
        return run.template operator()<T, kDim, 2>();
      default:
        return run.template operator()<T, kDim, 3>();
    }
  };
  const auto dims = [&]<typename T>() {
    return shape.dim == 64 ? rounds.template operator()<T, 64>() : rounds.template operator()<T, 128>();
  };
  return shape.dtype == Dtype::kFloat16 ? dims.template operator()<__half>()
                                        : dims.template operator()<__nv_bfloat16>();
}

}  // namespace bitinfer::cuda
