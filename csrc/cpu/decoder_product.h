// A packed layer in a step of decoding: its tokens prepared one at a time, its outputs computed tile by tile.
#pragma once

#include <algorithm>
#include <optional>

#include "arena.h"
#include "kernels.h"

namespace bitinfer::cpu {

// y = norm(W x) + bias, as bitinfer.BinaryLinear computes it.
struct PackedLinear {
  Weight weight = {};
  Floats in_scale = {}, in_shift = {};  // [k]
  std::optional<double> norm_eps = {};
  int64_t bits = 0, block_size = 0;  // of activations; 0 bits: floating point
};

inline constexpr int64_t kWorthwhile = 1 << 16;   // weights times tokens below which one thread does it all
inline constexpr int64_t kTileWeights = 1 << 21;  // and those that make up for starting on a tile
inline constexpr int64_t kTilesPerThread = 4;     // what one thread is late by, others take

// A packed layer and its m tokens, cut into passes of tokens and ranges of rows.
template <typename Problem>
struct Cut {
  const Gemm<Problem>* gemm;
  int64_t pass, passes, rows;  // tokens of a pass, passes, rows of a tile
  size_t stride;               // bytes of a prepared pass
  std::byte* prepared;

  Cut() = default;
  Cut(const Gemm<Problem>& table, const Problem& all, int64_t threads, Arena& arena) : gemm(&table) {
    pass = std::max<int64_t>(1, std::min(all.m, table.pass(all)));
    passes = (all.m + pass - 1) / pass;
    Problem first = all, last = all;
    first.m = pass;
    last.m = all.m - (passes - 1) * pass;
    stride = (std::max(table.prepared_bytes(first), table.prepared_bytes(last)) + 63) / 64 * 64;
    prepared = arena.take(static_cast<int64_t>(stride) * passes);
    const Weight& w = all.weight;
    const int64_t work = w.n * w.k * w.planes * pass;
    const int64_t turns = std::clamp<int64_t>(work / (kTileWeights * threads), 1, kTilesPerThread);
    const int64_t tiles = work < kWorthwhile ? 1 : threads * turns;
    rows = ((w.n + tiles - 1) / tiles + table.row_tile - 1) / table.row_tile * table.row_tile;
  }
  int64_t row_tiles(int64_t n) const { return (n + rows - 1) / rows; }
  std::byte* prepared_pass(int64_t index) const { return prepared + static_cast<int64_t>(stride) * index; }
};

// One packed layer in a step: its input x [m, k], its output y [m, n], and all memory between them.
class Product {
 public:
  Product() = default;
  Product(const Kernels& table, const PackedLinear& linear, int64_t m, Dtype dtype, int64_t threads, Arena& arena)
      : kernels_(&table), linear_(&linear), m_(m) {
    const int64_t k = linear.weight.k, n = linear.weight.n;
    x_ = {arena.take(m * k * element_size(dtype)), dtype, k};
    y_ = {arena.take(m * n * element_size(dtype)), dtype, n};
    sums_ = y_;
    if (linear.norm_eps) sums_ = {arena.take(m * n * element_size(Dtype::kFloat32)), Dtype::kFloat32, n};
    if (linear.bits == 0) {
      floats_ = Cut<SignGemm>(table.sign_gemm, floats(0, m), threads, arena);
      return;
    }
    const PopcountGemm shape = integers(0, m);
    pack_.k = pack_.stride = k;
    pack_.in_scale = linear.in_scale;
    pack_.in_shift = linear.in_shift;
    pack_.bits = linear.bits;
    pack_.block_size = linear.block_size;
    pack_.group_size = linear.weight.group_size;
    pack_.x = {x_.data, dtype};
    pack_.planes = arena.take_array<uint32_t>(m * linear.bits * linear.weight.words());
    pack_.scale = arena.take_array<float>(m * shape.blocks());
    pack_.sum = arena.take_array<int32_t>(m * shape.segments());
    pack_.shift = arena.take_array<float>(m);
    integers_ = Cut<PopcountGemm>(table.popcount_gemm, shape, threads, arena);
  }

  const PackedLinear& linear() const { return *linear_; }
  bool has_norm() const { return linear_->norm_eps.has_value(); }
  void* x(int64_t token) const { return x_.at(token, 0); }
  Floats y(int64_t token, int64_t column = 0) const { return {y_.at(token, column), y_.dtype}; }
  int64_t tiles() const {
    const int64_t n = linear_->weight.n;
    return linear_->bits == 0 ? floats_.passes * floats_.row_tiles(n) : integers_.passes * integers_.row_tiles(n);
  }

  // Turns x of a token into what multiply() reads.
  void prepare(int64_t token) const {
    if (linear_->bits == 0) {
      prepare(floats_, token, &Product::floats);
    } else {
      kernels_->pack_activations(pack_, token, token + 1);
      prepare(integers_, token, &Product::integers);
    }
  }

  // Computes one tile of y, and has each part of a row of it seen: see(token, first column, columns).
  template <typename See>
  void multiply(int64_t tile, const See& see) const {
    if (linear_->bits == 0) {
      multiply(floats_, tile, &Product::floats, see);
    } else {
      multiply(integers_, tile, &Product::integers, see);
    }
  }

  void normalise(int64_t token) const {
    const LayerNorm norm{static_cast<const float*>(sums_.data), sums_.stride, linear_->norm_eps.value_or(0),
                         linear_->weight.bias, y_};
    kernels_->layer_norm(norm, token, token + 1);
  }

 private:
  Weight weight() const {
    Weight weight = linear_->weight;
    if (linear_->norm_eps) weight.bias = {};  // it comes after the norm
    return weight;
  }
  SignGemm floats(int64_t token, int64_t count) const {
    const Floats x{x_.at(token, 0), x_.dtype};
    return {x,
            count,
            x_.stride,
            linear_->in_scale,
            linear_->in_shift,
            weight(),
            {sums_.at(token, 0), sums_.dtype, sums_.stride}};
  }
  PopcountGemm integers(int64_t token, int64_t count) const {
    PopcountGemm p;
    p.bits = linear_->bits;
    p.block_size = linear_->block_size;
    p.weight = weight();
    p.m = count;
    p.planes = pack_.planes + token * p.bits * p.weight.words();
    p.act_scale = pack_.scale + token * p.blocks();
    p.act_sum = pack_.sum + token * p.segments();
    p.act_shift = linear_->in_shift ? pack_.shift + token : nullptr;
    p.y = {sums_.at(token, 0), sums_.dtype, sums_.stride};
    return p;
  }

  template <typename Problem>
  using Tokens = Problem (Product::*)(int64_t, int64_t) const;

  template <typename Problem>
  void prepare(const Cut<Problem>& cut, int64_t token, Tokens<Problem> tokens) const {
    const int64_t pass = token / cut.pass, begin = pass * cut.pass;
    const Problem part = (this->*tokens)(begin, std::min(cut.pass, m_ - begin));
    cut.gemm->prepare(part, cut.prepared_pass(pass), token - begin, token - begin + 1);
  }

  template <typename Problem, typename See>
  void multiply(const Cut<Problem>& cut, int64_t tile, Tokens<Problem> tokens, const See& see) const {
    const int64_t n = linear_->weight.n, row = tile % cut.row_tiles(n) * cut.rows, end = std::min(n, row + cut.rows);
    const int64_t pass = tile / cut.row_tiles(n), begin = pass * cut.pass;
    const Problem part = (this->*tokens)(begin, std::min(cut.pass, m_ - begin));
    cut.gemm->multiply(part, cut.prepared_pass(pass), row, end);
    for (int64_t t = begin; t < begin + part.m; ++t) see(t, row, end - row);
  }

  const Kernels* kernels_ = nullptr;
  const PackedLinear* linear_ = nullptr;
  int64_t m_ = 0;
  Output x_, y_, sums_;
  PackActivations pack_;
  Cut<SignGemm> floats_;
  Cut<PopcountGemm> integers_;
};

}  // namespace bitinfer::cpu
