// Objects that Python holds by number: torch's ops take and return tensors and numbers alone.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "checked_tensors.h"

namespace bitinfer {

// Safe to call from any thread. An object lives until it has been removed and whoever got it has let it go.
template <typename Value>
class Handles {
 public:
  // `what` names such an object in messages.
  explicit Handles(const char* what) : what_(what) {}

  int64_t add(std::shared_ptr<Value> value) {
    const std::lock_guard lock(mutex_);
    values_.emplace(++last_, std::move(value));
    return last_;
  }
  std::shared_ptr<Value> at(const Call& call, int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(handle);
    STD_TORCH_CHECK(found != values_.end(), call.op, ": there is no ", what_, " ", handle);
    return found->second;
  }
  void remove(int64_t handle) {
    const std::lock_guard lock(mutex_);
    values_.erase(handle);
  }

 private:
  const char* what_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Value>> values_;
  int64_t last_ = 0;
};

}  // namespace bitinfer
