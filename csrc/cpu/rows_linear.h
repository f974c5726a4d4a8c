// A head in 8 bits: y[m, v] = scale[v] * sum_k codes[v, k] * x[m, k]. No torch here.
#pragma once

#include <string>

#include "../problem.h"
#include "run.h"

namespace bitinfer::cpu {

struct RowsLinear {
  Floats x;  // [m, k]
  int64_t m = 0, k = 0, stride = 0;
  const int8_t* codes = nullptr;  // [n, k]
  const float* scale = nullptr;   // [n]
  int64_t n = 0;
  Output y = {};  // [m, n]
};

// Sums are float32. `isa` names an instruction set as dispatch.h does.
void rows_linear(const RowsLinear& problem, const std::string& isa, ParallelFor parallel_for);

}  // namespace bitinfer::cpu
