// A few lines of test harness: CHECK counts failures, guarded output memory finds writes outside, a generator repeats.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

inline int failures = 0;

// Says what was being tested when a CHECK fails.
inline std::string context;

#define CHECK(condition)                                                                             \
  do {                                                                                               \
    if (!(condition)) {                                                                              \
      ++failures;                                                                                    \
      std::printf("%s:%d: CHECK(%s) failed: %s\n", __FILE__, __LINE__, #condition, context.c_str()); \
    }                                                                                                \
  } while (false)

// Memory for a kernel to write, poisoned, between two guard zones that must not change.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count), bytes_(2 * kGuard + count * sizeof(T), kPoison) {}
  ~Guarded() {
    for (size_t i = 0; i < kGuard; ++i) CHECK(bytes_[i] == kPoison && bytes_[bytes_.size() - 1 - i] == kPoison);
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data() + kGuard); }
  const T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kPoison = 0xff;  // a NaN in every floating point type
  int64_t count_;
  std::vector<uint8_t> bytes_;
};

// xorshift: the same numbers everywhere
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}
  uint32_t word() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }
  // about normal, from -6 to 6
  float normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += word() / 4294967296.0;
    return static_cast<float>(sum - 6);
  }

 private:
  uint64_t state_;
};

inline std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& isa : bitinfer::cpu::instruction_sets()) {
    if (isa.supported) names.push_back(isa.name);
  }
  return names;
}

inline int report() {
  std::printf(failures == 0 ? "passed\n" : "%d checks failed\n", failures);
  return failures != 0;
}
