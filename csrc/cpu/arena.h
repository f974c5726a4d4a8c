// Memory that is allocated once and handed out again for every layer of every step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace bitinfer::cpu {

class Arena {
 public:
  // Returns `bytes` bytes aligned to a cache line, valid until they are handed out again after rewind().
  std::byte* take(int64_t bytes) {
    const size_t size = (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine;
    while (block_ < blocks_.size() && used_ + size > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const size_t count = std::max(size, kLeast);
      blocks_.push_back({Memory(static_cast<std::byte*>(::operator new(count, std::align_val_t{kLine}))), count});
    }
    std::byte* memory = blocks_[block_].data.get() + used_;
    used_ += size;
    return memory;
  }

  template <typename T>
  T* take_array(int64_t count) {
    return reinterpret_cast<T*>(take(count * static_cast<int64_t>(sizeof(T))));
  }

  void rewind() { block_ = used_ = 0; }

 private:
  static constexpr size_t kLine = 64, kLeast = 1 << 20;

  struct Free {
    void operator()(std::byte* block) const { ::operator delete(block, std::align_val_t{kLine}); }
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  struct Block {
    Memory data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

}  // namespace bitinfer::cpu
