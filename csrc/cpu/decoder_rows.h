// The kernels of decoder_kernels.h for any instruction set. Each decoder_<isa>.cpp includes this header inside its
// target region, so that the plain loops below are vectorised for that set; standard headers come before.
//
// Isa provides: load_floats, store_floats (conversions), dot (of floats), dot_of (of any type and floats, asking for
// the memory so many numbers ahead), score and add_weighted (of cached rows: those below, or better ones).
namespace bitinfer::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSlots = 8;   // of the cache, converted to floats at a time
constexpr int64_t kAhead = 16;  // slots between those that are read and those that are asked for

// The sum, or the largest, of the lanes of a loop over lanes.
inline float total(const float* part) {
  float sum[8];
  for (int j = 0; j < 8; ++j) sum[j] = part[j] + part[j + 8];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

inline float sum_of(const float* x, int64_t n) {
  float part[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) part[j] += x[i + j];
  }
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) part[i % kLanes] += x[i];
  return total(part);
}

// Passes over NaN; -infinity for no numbers.
inline float largest_of(const float* x, int64_t n) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  float part[kLanes], largest = kLeast;
  for (int j = 0; j < kLanes; ++j) part[j] = kLeast;
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) part[j] = x[i + j] > part[j] ? x[i + j] : part[j];
  }
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (int j = 0; j < kLanes; ++j) largest = part[j] > largest ? part[j] : largest;
  return largest;
}

// e^x to one unit in the last place or two; 0 below -87, and finite above 88
inline float exponential(float x) {
  const float inside = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const float shifted = inside * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  const float r = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = (p * r * r + r) + 1.0f;
  const float power = bits_float((float_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : value * power;
}

template <class Isa>
void round_floats(float* x, int64_t n, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return;
  uint16_t rounded[512];
  for (int64_t i = 0; i < n; i += 512) {
    const int64_t count = n - i < 512 ? n - i : 512;
    Isa::store_floats(x + i, count, dtype, rounded);
    Isa::load_floats({rounded, dtype}, count, x + i);
  }
}

// In place, to values of dtype.
template <class Isa>
void normalise(const RmsNorm& norm, float* x, int64_t n, Dtype dtype) {
  Buffer<float> weight(n);
  Isa::load_floats(norm.weight, n, weight.data());
  const float factor = 1 / std::sqrt(Isa::dot(x, x, n) / static_cast<float>(n) + norm.eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  round_floats<Isa>(x, n, dtype);
  for (int64_t i = 0; i < n; ++i) x[i] *= weight[i];
  round_floats<Isa>(x, n, dtype);
}

template <class Isa>
void rms_norm(const RmsNorm& norm, Floats x, int64_t n, void* y) {
  Buffer<float> row(n);
  Isa::load_floats(x, n, row.data());
  normalise<Isa>(norm, row.data(), n, x.dtype);
  Isa::store_floats(row.data(), n, x.dtype, y);
}

// x * cos + (-x[second half], x[first half]) * sin
template <class Isa>
void rotate(float* x, const float* cos, const float* sin, float* turned, int64_t dim, Dtype dtype) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    turned[i] = -x[half + i] * sin[i];
    turned[half + i] = x[i] * sin[half + i];
  }
  for (int64_t i = 0; i < dim; ++i) x[i] *= cos[i];
  round_floats<Isa>(turned, dim, dtype);
  round_floats<Isa>(x, dim, dtype);
  for (int64_t i = 0; i < dim; ++i) x[i] += turned[i];
  round_floats<Isa>(x, dim, dtype);
}

// Asks for memory that will be read soon; it may lie outside of any allocation.
inline void ask_for(Floats x, int64_t n) {
  const auto first = reinterpret_cast<uintptr_t>(x.data), bytes = static_cast<uintptr_t>(n * element_size(x.dtype));
  for (uintptr_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(first + at), 0, 2);
}

// Cached keys or values of one head, [slots, dim], and the queries that share them. A core follows several streams of
// memory, each in pages of its own, faster than one; so quarters of the slots, but for a few at the end, take turns.
struct Rows {
  Floats data;
  int64_t slots, dim, group;

  int64_t quarter() const { return slots / 16 * 4; }
  void ask_for_first() const {
    for (int64_t i = 0; i < 4; ++i) ask_for(data + i * quarter() * dim, std::min(quarter(), kAhead) * dim);
  }
};

// scores[h, s] = scaling * q[h] . keys[s]
template <class Isa>
void score_rows(const Rows& keys, const float* q, float scaling, float* scores) {
  Buffer<float> rows(kSlots * keys.dim);
  for (int64_t s = 0; s < keys.slots; s += kSlots) {
    const int64_t count = keys.slots - s < kSlots ? keys.slots - s : kSlots;
    ask_for(keys.data + (s + kAhead) * keys.dim, kSlots * keys.dim);
    Isa::load_floats(keys.data + s * keys.dim, count * keys.dim, rows.data());
    for (int64_t h = 0; h < keys.group; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        scores[h * keys.slots + s + i] = scaling * Isa::dot(q + h * keys.dim, rows.data() + i * keys.dim, keys.dim);
      }
    }
  }
}

// part[h] += weights[h] x values, for parts that are `stride` numbers apart
template <class Isa>
void add_weighted_rows(const Rows& values, const float* weights, int64_t stride, float* part) {
  const int64_t dim = values.dim;
  Buffer<float> rows(kSlots * dim);
  for (int64_t s = 0; s < values.slots; s += kSlots) {
    const int64_t count = values.slots - s < kSlots ? values.slots - s : kSlots;
    ask_for(values.data + (s + kAhead) * dim, kSlots * dim);
    Isa::load_floats(values.data + s * dim, count * dim, rows.data());
    for (int64_t h = 0; h < values.group; ++h) {
      const float* w = weights + h * values.slots + s;
      float* sum = part + h * stride;
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
        const float* v = rows.data() + i * dim;
        for (int64_t c = 0; c < dim; ++c) {
          sum[c] += (w[i] * v[c] + w[i + 1] * v[dim + c]) + (w[i + 2] * v[2 * dim + c] + w[i + 3] * v[3 * dim + c]);
        }
      }
      for (; i < count; ++i) {
        for (int64_t c = 0; c < dim; ++c) sum[c] += w[i] * rows[i * dim + c];
      }
    }
  }
}

template <class Isa>
void attend(const Attend& a) {
  const int64_t dim = a.heads.dim, group = a.heads.queries / a.heads.keys;
  const int64_t slots = a.end > a.begin ? a.end - a.begin : 0;
  Buffer<float> scratch((group + 4) * dim + group * slots);
  float *cos = scratch.data(), *sin = cos + dim, *turned = sin + dim, *key = turned + dim;
  float *q = key + dim, *scores = q + group * dim;
  const Rows keys{Floats{a.keys, a.dtype} + a.begin * dim, slots, dim, group};
  const Rows values{Floats{a.values, a.dtype} + a.begin * dim, slots, dim, group};
  keys.ask_for_first();
  Isa::load_floats(a.cos, dim, cos);
  Isa::load_floats(a.sin, dim, sin);
  if (a.k) {
    Isa::load_floats(a.k, dim, key);
    if (a.k_norm.weight) normalise<Isa>(a.k_norm, key, dim, a.dtype);
    rotate<Isa>(key, cos, sin, turned, dim, a.dtype);
    const Output new_keys{a.keys, a.dtype, dim}, new_values{a.values, a.dtype, dim};
    Isa::store_floats(key, dim, a.dtype, new_keys.at(a.slot, 0));
    std::memcpy(new_values.at(a.slot, 0), a.v.data, static_cast<size_t>(dim * element_size(a.dtype)));
  }
  Isa::load_floats(a.q, group * dim, q);
  for (int64_t h = 0; h < group; ++h) {
    float* head = q + h * dim;
    if (a.q_norm.weight) normalise<Isa>(a.q_norm, head, dim, a.dtype);
    rotate<Isa>(head, cos, sin, turned, dim, a.dtype);
  }
  Isa::score(keys, q, a.heads.scaling, scores);
  values.ask_for_first();
  for (int64_t h = 0; h < group; ++h) {
    float *score = scores + h * slots, *part = a.part + h * a.parts * (dim + 2);
    const float largest = largest_of(score, slots);
    for (int64_t s = 0; s < slots; ++s) score[s] = exponential(score[s] - largest);
    for (int64_t i = 0; i < dim; ++i) part[i] = 0;
    part[dim] = sum_of(score, slots);
    part[dim + 1] = largest;
  }
  Isa::add_weighted(values, scores, a.parts * (dim + 2), a.part);
}

template <class Isa>
void combine(const float* part, int64_t heads, int64_t parts, int64_t dim, Dtype dtype, void* y) {
  Buffer<float> row(dim);
  const Output out{y, dtype, dim};
  for (int64_t h = 0; h < heads; ++h) {
    const float* first = part + h * parts * (dim + 2);
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const float score = first[p * (dim + 2) + dim + 1];
      largest = score > largest ? score : largest;
    }
    for (int64_t i = 0; i < dim; ++i) row[i] = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const float* one = first + p * (dim + 2);
      const float weight = exponential(one[dim + 1] - largest);  // 0 for a part without slots
      sum += weight * one[dim];
      for (int64_t i = 0; i < dim; ++i) row[i] += weight * one[i];
    }
    for (int64_t i = 0; i < dim; ++i) row[i] /= sum;
    Isa::store_floats(row.data(), dim, dtype, out.at(h, 0));
  }
}

template <class Isa>
void silu_mul(Floats gate, Floats up, int64_t n, void* y) {
  Buffer<float> row(n), other(n);
  Isa::load_floats(gate, n, row.data());
  Isa::load_floats(up, n, other.data());
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] / (1.0f + exponential(-row[i]));
  round_floats<Isa>(row.data(), n, gate.dtype);
  for (int64_t i = 0; i < n; ++i) row[i] *= other[i];
  Isa::store_floats(row.data(), n, gate.dtype, y);
}

template <class Isa>
void add(Floats x, int64_t n, void* y) {
  Buffer<float> row(n), sum(n);
  Isa::load_floats(x, n, row.data());
  Isa::load_floats({y, x.dtype}, n, sum.data());
  for (int64_t i = 0; i < n; ++i) sum[i] += row[i];
  Isa::store_floats(sum.data(), n, x.dtype, y);
}

// Bound by memory: all tokens read a row while it is in the first-level cache.
template <class Isa>
void head(const Head& p, int64_t begin, int64_t end) {
  constexpr int64_t kAheadBytes = 4096;
  const int64_t rows = end - begin, ahead = kAheadBytes / element_size(p.weight.dtype);
  Buffer<float> sums(p.m * rows);
  const int64_t quarter = (rows + 3) / 4;  // as in Rows
  for (int64_t i = 0; i < 4 * quarter; ++i) {
    const int64_t v = i % 4 * quarter + i / 4;
    if (v >= rows) continue;
    const Floats row = p.weight + (begin + v) * p.k;
    for (int64_t t = 0; t < p.m; ++t) {
      sums[t * rows + v] = Isa::dot_of(row, p.x + t * p.k, p.k, t == 0 ? ahead : 0);
    }
  }
  for (int64_t t = 0; t < p.m; ++t) Isa::store_floats(sums.data() + t * rows, rows, p.y.dtype, p.y.at(t, begin));
}

template <class Isa>
constexpr DecoderKernels decoder_kernels() {
  return {rms_norm<Isa>, attend<Isa>, combine<Isa>, silu_mul<Isa>, add<Isa>, Isa::load_floats, head<Isa>};
}

}  // namespace
}  // namespace bitinfer::cpu
