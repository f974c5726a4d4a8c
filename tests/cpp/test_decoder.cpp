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

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

using Row = std::vector<double>;
using Numbers = std::vector<float>;

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
constexpr Shape kShapes[] = {{2, 72, 3, 1, 26, 130, 300, false, false}, {1, 129, 4, 2, 16, 77, 31, true, true}};
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
  RmsNorm packed() const { return {{weight.data()}, 1e-6f}; }
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

void decodes(const Shape& shape, const std::vector<int64_t>& padding, int64_t bits) {
  Model model(shape);
  Decoder decoders[2];
  for (Decoder& decoder : decoders) {
    decoder.heads = {shape.queries, shape.keys, shape.dim, 1 / std::sqrt(static_cast<float>(shape.dim))};
    decoder.columns = shape.d;
    decoder.norm = model.norm.packed();
    decoder.head = {model.head.data()};
    decoder.vocabulary = shape.vocabulary;
    for (const Layer& layer : model.layers) {
      DecoderLayer one{layer.q.packed,
                       layer.k.packed,
                       layer.v.packed,
                       layer.o.packed,
                       layer.gate.packed,
                       layer.up.packed,
                       layer.down.packed,
                       layer.input.packed(),
                       layer.post.packed(),
                       {},
                       {}};
      if (shape.head_norms) {
        one.q_norm = layer.q_norm.packed();
        one.k_norm = layer.k_norm.packed();
      }
      for (PackedLinear* linear : {&one.q, &one.k, &one.v, &one.o, &one.gate, &one.up, &one.down}) linear->bits = bits;
      decoder.layers.push_back(one);
    }
  }
  Row k_exact(model.keys.begin(), model.keys.end()), v_exact(model.values.begin(), model.values.end());
  Numbers keys[2] = {model.keys, model.keys}, values[2] = {model.values, model.values};
  for (const int64_t slot : {int64_t{5}, int64_t{6}, int64_t{511}, int64_t{512}, kCapacity - 1}) {
    context = active_name() + " d=" + std::to_string(shape.d) + " bits=" + std::to_string(bits) +
              " slot=" + std::to_string(slot);
    Numbers hidden;
    for (int64_t i = 0; i < kSequences * shape.d; ++i) hidden.push_back(model.random.normal());
    Guarded<float> results[2] = {Guarded<float>(kSequences * shape.vocabulary),
                                 Guarded<float>(kSequences * shape.vocabulary)};
    for (int which = 0; which < 2; ++which) {
      Numbers in_place = hidden;
      DecodeStep step;
      step.m = kSequences;
      step.hidden = in_place.data();
      step.keys = keys[which].data();
      step.values = values[which].data();
      step.logits = results[which].data();
      step.capacity = kCapacity;
      step.slot = slot;
      step.cos = {model.cos.data()};
      step.sin = {model.sin.data()};
      step.padding = padding.empty() ? nullptr : padding.data();
      decode(active_kernels(), decoders[which], step, which == 0 ? 1 : kThreads, which == 0 ? serial : three_threads);
    }
    CHECK(std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0);
    CHECK(keys[0] == keys[1] && values[0] == values[1]);
    if (bits != 0) continue;  // rounded on purpose; their products have tests of their own
    for (int64_t t = 0; t < kSequences; ++t) {
      const Row h(hidden.begin() + t * shape.d, hidden.begin() + (t + 1) * shape.d);
      const Row logits = model.exact(h, t, slot, padding.empty() ? 0 : padding[t], k_exact, v_exact);
      for (int64_t r = 0; r < shape.vocabulary; ++r) {
        CHECK(std::fabs(results[0][t * shape.vocabulary + r] - logits[r]) <= 2e-4 * (1 + std::fabs(logits[r])));
      }
    }
    for (size_t i = 0; i < k_exact.size(); ++i) {
      CHECK(std::fabs(keys[0][i] - k_exact[i]) <= 1e-4 && std::fabs(values[0][i] - v_exact[i]) <= 1e-4);
    }
  }
}

void all() {
  for (const Shape& shape : kShapes) {
    for (const int64_t bits : {0, 8}) {
      decodes(shape, {}, bits);
      decodes(shape, {3, 0}, bits);
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
