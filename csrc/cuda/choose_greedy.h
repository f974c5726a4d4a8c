// The likeliest token of each sequence, and what follows from it: see choose_greedy.cu.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace bitinfer::cuda {

struct ChooseGreedy {
  Floats logits;  // [m, n]
  int64_t m = 0, n = 0, stride = 0;
  float penalty = 1;              // of tokens that were seen
  bool* seen = nullptr;           // [m, n], or absent: which were; the new one becomes one
  bool* finished = nullptr;       // [m]: gets true where an end is chosen
  const int64_t* ends = nullptr;  // [end_count] tokens that end a sequence
  int64_t end_count = 0;
  const int64_t* pad = nullptr;  // what finished sequences get
  int64_t* tokens = nullptr;     // [m]
  int64_t* slot = nullptr;       // or absent: advanced by one
};

cudaError_t choose_greedy(const ChooseGreedy& problem, const Launch& on);

}  // namespace bitinfer::cuda
