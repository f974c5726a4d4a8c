// A step of decoding against plain double loops written from decoder.h, in every instruction set, on one thread and on
// three. Weights and caches are allocated to the byte, so that the address sanitizer sees any read past them.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <thread>

#include "check.h"
#include "cpu/decoder.h"
#include "cpu/numbers.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

using Row = std::vector<double>;

// Floats that are handed over in some type, whose values they have.
class Numbers : public std::vector<float> {
 public:
  using vector::vector;

  Floats as(Dtype dtype) {
    if (dtype == Dtype::kFloat32) return {data(), dtype};
    const bool half = dtype == Dtype::kFloat16;
    halves_.clear();
    for (float& value : *this) {
      halves_.push_back(half ? float_to_half(value) : float_to_bfloat16(value));
      value = half ? half_to_float(halves_.back()) : bfloat16_to_float(halves_.back());
    }
    return {halves_.data(), dtype};
  }
  void* as_output(Dtype dtype) { return const_cast<void*>(as(dtype).data); }
  // what was written where as() said
  float written(size_t i, Dtype dtype) const {
    if (dtype == Dtype::kFloat32) return (*this)[i];
    return dtype == Dtype::kFloat16 ? half_to_float(halves_[i]) : bfloat16_to_float(halves_[i]);
  }
  bool same(const Numbers& other) const {
    return static_cast<const vector&>(*this) == other && halves_ == other.halves_;
  }

 private:
  std::vector<uint16_t> halves_;
};

constexpr int64_t kThreads = 3;

// Not torch's: as many threads as asked for, each with an equal share.
void three_threads(int64_t count, int64_t, const Body& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { body(count * i / kThreads, count * (i + 1) / kThreads); });
  }
  for (std::thread& thread : threads) thread.join();
}

struct Shape {
  int64_t layers, d, queries, keys, dim, between, vocabulary;
  bool head_norms, layer_norms;
};

// Odd numbers of columns leave a part of a word.
constexpr Shape kShapes[] = {{2, 72, 3, 1, 26, 130, 300, false, false},
                             {1, 129, 4, 2, 16, 77, 31, true, true},
                             {1, 80, 2, 2, 80, 64, 20, false, false}};
constexpr int64_t kSequences = 2, kCapacity = 530;  // of which the second part of a tile of attention has a few

struct Linear {
  int64_t n, k;
  Numbers in_scale, in_shift, bias;
  std::vector<uint32_t> signs;
  PackedLinear packed;

  Linear(int64_t outputs, int64_t inputs, bool norm, Random& random) : n(outputs), k(inputs) {
    for (int64_t i = 0; i < k; ++i) in_scale.push_back((1 + 0.3f * random.normal()) / std::sqrt(static_cast<float>(k)));
    for (int64_t i = 0; i < k; ++i) in_shift.push_back(0.01f * random.normal());
    for (int64_t i = 0; i < n; ++i) bias.push_back(0.1f * random.normal());
    for (int64_t i = 0; i < n * words_per_row(k); ++i) {
      signs.push_back(random.word() & ((i + 1) % words_per_row(k) == 0 ? last_word_mask(k) : 0xffffffff));
    }
    packed.in_scale = {in_scale.data()};
    packed.in_shift = {in_shift.data()};
    packed.weight = {signs.data(), 1, n, k};
    packed.weight.bias = {bias.data()};
    if (norm) packed.norm_eps = 1e-5;
  }

  Row operator()(const Row& x) const {
    Row y(static_cast<size_t>(n));
    double mean = 0, square = 0;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        const double z = in_scale[i] * x[i];
        y[r] += (is_negative(signs.data() + r * words_per_row(k), i) ? -z : z) + in_shift[i] * x[i];
      }
      mean += y[r] / static_cast<double>(n);
    }
    for (const double value : y) square += (value - mean) * (value - mean) / static_cast<double>(n);
    for (int64_t r = 0; r < n; ++r) {
      if (packed.norm_eps) y[r] = (y[r] - mean) / std::sqrt(square + *packed.norm_eps);
      y[r] += bias[r];
    }
    return y;
  }
};

struct Norm {
  Numbers weight;

  Norm(int64_t n, Random& random) {
    for (int64_t i = 0; i < n; ++i) weight.push_back(1 + 0.2f * random.normal());
  }
  RmsNorm packed(Dtype dtype) { return {weight.as(dtype), 1e-6f}; }
  void apply(double* x) const {
    double square = 0;
    for (size_t i = 0; i < weight.size(); ++i) square += x[i] * x[i] / static_cast<double>(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) x[i] *= weight[i] / std::sqrt(square + 1e-6f);
  }
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  Norm input, post, q_norm, k_norm;

  Layer(const Shape& s, Random& random)
      : q(s.queries * s.dim, s.d, s.layer_norms, random),
        k(s.keys * s.dim, s.d, s.layer_norms, random),
        v(s.keys * s.dim, s.d, s.layer_norms, random),
        o(s.d, s.queries * s.dim, s.layer_norms, random),
        gate(s.between, s.d, s.layer_norms, random),
        up(s.between, s.d, s.layer_norms, random),
        down(s.d, s.between, s.layer_norms, random),
        input(s.d, random),
        post(s.d, random),
        q_norm(s.dim, random),
        k_norm(s.dim, random) {}
};

// A model, what it is given, and what the formula makes of it.
struct Model {
  Shape shape;
  Random random;
  std::vector<Layer> layers;
  Norm norm;
  Numbers head, cos, sin, keys, values;
  std::vector<Row> exact_keys, exact_values;  // [layer * sequences + sequence][slot, head, dim]

  explicit Model(const Shape& s) : shape(s), random(static_cast<uint64_t>(s.d)), norm(s.d, random) {
    for (int64_t i = 0; i < s.layers; ++i) layers.emplace_back(s, random);
    for (int64_t i = 0; i < s.vocabulary * s.d; ++i) head.push_back(random.normal());
    for (int64_t p = 0; p < kCapacity; ++p) {
      for (int64_t i = 0; i < s.dim; ++i) {
        const double angle = static_cast<double>(p) / std::pow(100.0, 2.0 * (i % (s.dim / 2)) / s.dim);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    for (int64_t i = 0; i < s.layers * kSequences * s.keys * kCapacity * s.dim; ++i) {
      keys.push_back(random.normal());
      values.push_back(random.normal());
    }
  }

  size_t cached(int64_t layer, int64_t sequence, int64_t head_index, int64_t slot) const {
    return static_cast<size_t>((((layer * kSequences + sequence) * shape.keys + head_index) * kCapacity + slot) *
                               shape.dim);
  }

  void turn(double* x, int64_t position) const {
    const int64_t half = shape.dim / 2;
    const float *c = cos.data() + position * shape.dim, *s = sin.data() + position * shape.dim;
    for (int64_t i = 0; i < half; ++i) {
      const double low = x[i], high = x[half + i];
      x[i] = low * c[i] - high * s[i];
      x[half + i] = high * c[half + i] + low * s[half + i];
    }
  }

  // The logits behind one token, whose keys and values come into `k` and `v`, copies of the caches.
  Row exact(Row h, int64_t sequence, int64_t slot, int64_t padding, Row& k_cache, Row& v_cache) const {
    const Shape& s = shape;
    for (int64_t index = 0; index < s.layers; ++index) {
      const Layer& layer = layers[index];
      Row n = h;
      layer.input.apply(n.data());
      Row q = layer.q(n), k = layer.k(n), v = layer.v(n), attended(q.size());
      for (int64_t head_index = 0; head_index < s.keys; ++head_index) {
        double* key = k.data() + head_index * s.dim;
        if (s.head_norms) layer.k_norm.apply(key);
        turn(key, slot - padding);
        const size_t at = cached(index, sequence, head_index, slot);
        for (int64_t i = 0; i < s.dim; ++i) {
          k_cache[at + i] = key[i];
          v_cache[at + i] = v[head_index * s.dim + i];
        }
      }
      for (int64_t head_index = 0; head_index < s.queries; ++head_index) {
        double* query = q.data() + head_index * s.dim;
        if (s.head_norms) layer.q_norm.apply(query);
        turn(query, slot - padding);
        Row weights;
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        const int64_t key_head = head_index / (s.queries / s.keys);
        for (int64_t p = padding; p <= slot; ++p) {
          double score = 0;
          for (int64_t i = 0; i < s.dim; ++i) score += query[i] * k_cache[cached(index, sequence, key_head, p) + i];
          weights.push_back(score / std::sqrt(static_cast<double>(s.dim)));
          largest = std::fmax(largest, weights.back());
        }
        for (double& weight : weights) sum += weight = std::exp(weight - largest);
        for (int64_t p = padding; p <= slot; ++p) {
          for (int64_t i = 0; i < s.dim; ++i) {
            attended[head_index * s.dim + i] +=
                weights[p - padding] / sum * v_cache[cached(index, sequence, key_head, p) + i];
          }
        }
      }
      const Row o = layer.o(attended);
      for (int64_t i = 0; i < s.d; ++i) h[i] += o[i];
      n = h;
      layer.post.apply(n.data());
      Row gate = layer.gate(n);
      const Row up = layer.up(n);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      const Row down = layer.down(gate);
      for (int64_t i = 0; i < s.d; ++i) h[i] += down[i];
    }
    norm.apply(h.data());
    Row logits(static_cast<size_t>(s.vocabulary));
    for (int64_t r = 0; r < s.vocabulary; ++r) {
      for (int64_t i = 0; i < s.d; ++i) logits[r] += h[i] * head[r * s.d + i];
    }
    return logits;
  }
};

void decodes(const Shape& shape, const std::vector<int64_t>& padding, int64_t bits, Dtype dtype) {
  Model model(shape);
  Decoder decoders[2];
  for (Decoder& decoder : decoders) {
    decoder.heads = {shape.queries, shape.keys, shape.dim, 1 / std::sqrt(static_cast<float>(shape.dim))};
    decoder.columns = shape.d;
    decoder.norm = model.norm.packed(dtype);
    decoder.head = model.head.as(dtype);
    decoder.vocabulary = shape.vocabulary;
    for (Layer& layer : model.layers) {
      DecoderLayer one{layer.q.packed,
                       layer.k.packed,
                       layer.v.packed,
                       layer.o.packed,
                       layer.gate.packed,
                       layer.up.packed,
                       layer.down.packed,
                       layer.input.packed(dtype),
                       layer.post.packed(dtype),
                       {},
                       {}};
      if (shape.head_norms) {
        one.q_norm = layer.q_norm.packed(dtype);
        one.k_norm = layer.k_norm.packed(dtype);
      }
      for (PackedLinear* linear : {&one.q, &one.k, &one.v, &one.o, &one.gate, &one.up, &one.down}) linear->bits = bits;
      decoder.layers.push_back(one);
    }
  }
  Floats cos = model.cos.as(dtype), sin = model.sin.as(dtype);
  model.keys.as(dtype);
  model.values.as(dtype);
  Row k_exact(model.keys.begin(), model.keys.end()), v_exact(model.values.begin(), model.values.end());
  Numbers keys[2] = {model.keys, model.keys}, values[2] = {model.values, model.values};
  void* caches[2][2];
  for (int which = 0; which < 2; ++which) {
    caches[which][0] = keys[which].as_output(dtype);
    caches[which][1] = values[which].as_output(dtype);
  }
  // each result is rounded to the type a dozen times on the way
  const double allowed = dtype == Dtype::kFloat32 ? 2e-4 : dtype == Dtype::kFloat16 ? 0.03 : 0.25;
  for (const int64_t slot : {int64_t{5}, int64_t{6}, int64_t{511}, int64_t{512}, kCapacity - 1}) {
    context = active_name() + " d=" + std::to_string(shape.d) + " bits=" + std::to_string(bits) +
              " dtype=" + std::to_string(static_cast<int>(dtype)) + " slot=" + std::to_string(slot);
    Numbers hidden;
    for (int64_t i = 0; i < kSequences * shape.d; ++i) hidden.push_back(model.random.normal());
    hidden.as(dtype);
    const int64_t outputs = kSequences * shape.vocabulary * element_size(dtype);
    Guarded<uint8_t> results[2] = {Guarded<uint8_t>(outputs), Guarded<uint8_t>(outputs)};
    for (int which = 0; which < 2; ++which) {
      Numbers in_place = hidden;
      DecodeStep step;
      step.m = kSequences;
      step.dtype = dtype;
      step.hidden = in_place.as_output(dtype);
      step.keys = caches[which][0];
      step.values = caches[which][1];
      step.logits = results[which].data();
      step.capacity = kCapacity;
      step.slot = slot;
      step.cos = cos;
      step.sin = sin;
      step.padding = padding.empty() ? nullptr : padding.data();
      decode(active_kernels(), decoders[which], step, which == 0 ? 1 : kThreads, which == 0 ? serial : three_threads);
    }
    CHECK(std::memcmp(results[0].data(), results[1].data(), static_cast<size_t>(outputs)) == 0);
    CHECK(keys[0].same(keys[1]) && values[0].same(values[1]));
    if (bits != 0) continue;  // rounded on purpose; their products have tests of their own
    for (int64_t t = 0; t < kSequences; ++t) {
      const Row h(hidden.begin() + t * shape.d, hidden.begin() + (t + 1) * shape.d);
      const Row logits = model.exact(h, t, slot, padding.empty() ? 0 : padding[t], k_exact, v_exact);
      double scale = 0;
      for (const double logit : logits) scale = std::fmax(scale, std::fabs(logit));
      for (int64_t r = 0; r < shape.vocabulary; ++r) {
        const int64_t at = t * shape.vocabulary + r;
        const void* result = results[0].data() + at * element_size(dtype);
        float y;
        uint16_t half;
        std::memcpy(dtype == Dtype::kFloat32 ? static_cast<void*>(&y) : &half, result, element_size(dtype));
        if (dtype != Dtype::kFloat32) y = dtype == Dtype::kFloat16 ? half_to_float(half) : bfloat16_to_float(half);
        CHECK(std::fabs(y - logits[r]) <= allowed * scale);
      }
    }
    if (dtype != Dtype::kFloat32) {  // later steps start from what was rounded
      for (size_t i = 0; i < k_exact.size(); ++i) {
        CHECK(std::fabs(keys[0].written(i, dtype) - k_exact[i]) <= allowed * 5);
        k_exact[i] = keys[0].written(i, dtype);
        v_exact[i] = values[0].written(i, dtype);
      }
      continue;
    }
    for (size_t i = 0; i < k_exact.size(); ++i) {
      CHECK(std::fabs(keys[0][i] - k_exact[i]) <= 1e-4 && std::fabs(values[0][i] - v_exact[i]) <= 1e-4);
    }
  }
}

void all() {
  for (const Shape& shape : kShapes) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      for (const int64_t bits : {0, 8}) {
        decodes(shape, {}, bits, dtype);
        decodes(shape, {3, 0}, bits, dtype);
      }
    }
  }
}

}  // namespace

// What stands between the products follows the instruction set in use, which a process chooses once.
int main() {
  int result = 0;
  for (const std::string& isa : supported_isas()) {
    setenv("BITINFER_CPU_ISA", isa.c_str(), 1);
    const pid_t child = fork();
    if (child == 0) {
      all();
      std::exit(report());
    }
    int status = 1;
    waitpid(child, &status, 0);
    result |= status;
  }
  return result != 0;
}
