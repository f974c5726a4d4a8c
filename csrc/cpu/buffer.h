// Uninitialised scratch memory, aligned to a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace bitinfer::cpu {
namespace {  // one copy per file: an instance compiled for AVX2 must not be the one that the linker keeps for all

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T) + 1, kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace
}  // namespace bitinfer::cpu
