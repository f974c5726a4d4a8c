// The choice of a table: forced by name, refused with the names that would do.
#include <cstdlib>
#include <stdexcept>

#include "check.h"

using namespace bitinfer;
using namespace bitinfer::cpu;

namespace {

std::string message_of(const std::string& forced) {
  setenv("BITINFER_CPU_ISA", forced.c_str(), 1);
  try {
    active_kernels();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  const auto all = instruction_sets();
  CHECK(!all.empty() && all.back().name == "scalar" && all.back().supported);

  const std::string message = message_of("mmx");
  context = message;
  CHECK(message.find("mmx") != std::string::npos && message.find("BITINFER_CPU_ISA") != std::string::npos);
  for (const auto& isa : all) {
    CHECK(isa.supported == isa.reason.empty());
    CHECK(isa.supported == (message.find(isa.name) != std::string::npos));
    if (!isa.supported) CHECK(message_of(isa.name).find(isa.reason) != std::string::npos);
  }

  // a failed choice is not remembered, the first good one is
  CHECK(message_of("scalar").empty());
  CHECK(active_name() == "scalar" && &active_kernels() == &kernels_named("scalar"));
  CHECK(message_of("mmx").empty() && active_name() == "scalar");
  return report();
}
