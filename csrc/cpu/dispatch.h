// Which tables of kernels there are, which of them this processor runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace bitinfer::cpu {

// One table; `kernels` is null where the compiler's target has no such instructions.
struct InstructionSet {
  const char* name;
  const char* needs;  // what the processor must have, for messages
  const Kernels* (*kernels)();
  bool (*supported)();
};

struct InstructionSetState {
  std::string name;
  bool supported;
  std::string reason;  // why not; empty if supported
};

// All tables in order of preference, whether they run here or not.
std::vector<InstructionSetState> instruction_sets();

// The table in use: what BITINFER_CPU_ISA names, or else the first that this processor supports. The variable is read
// once, at the first call; an unknown or unsupported name throws std::runtime_error with the names that would do.
const Kernels& active_kernels();
const std::string& active_name();

// The table of that name; throws like active_kernels.
const Kernels& kernels_named(const std::string& name);

// One function per kernels_<isa>.cpp, null if it is compiled for another processor.
const Kernels* amx_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* scalar_kernels();

}  // namespace bitinfer::cpu
