#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bitinfer::cpu {
namespace {

constexpr const char* kVariable = "BITINFER_CPU_ISA";

bool always() { return true; }

bool has_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // also checks that the operating system saves the registers
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
#else
  return false;
#endif
}

// The tiles' 8 KB of registers are a process's only after it has asked the kernel, which may refuse.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kTile) == 0 || (edx & kInt8) == 0) return false;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// In order of preference. To add an instruction set: kernels_<isa>.cpp, its declaration in dispatch.h and a line here.
constexpr InstructionSet kInstructionSets[] = {
    {"amx", "AMX (INT8), or the system's permission for it, or what avx512 needs", amx_kernels, has_amx},
    {"avx512", "AVX-512 (F, BW, VL, DQ, VNNI, VBMI) and GFNI", avx512_kernels, has_avx512},
    {"avx2", "AVX2, FMA and F16C", avx2_kernels, has_avx2},
    {"scalar", "nothing", scalar_kernels, always},
};

std::string why_not(const InstructionSet& isa) {
  if (isa.kernels() == nullptr) return "it was not compiled for this kind of processor";
  if (!isa.supported()) return std::string("this processor lacks ") + isa.needs;
  return "";
}

const InstructionSet& find(const std::string& name, const std::string& origin) {
  std::string known, reason = "it is unknown";
  for (const InstructionSet& isa : kInstructionSets) {
    const std::string obstacle = why_not(isa);
    if (name == isa.name) {
      if (obstacle.empty()) return isa;
      reason = obstacle;
    }
    if (obstacle.empty()) known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error(origin + ": instruction set '" + name + "' cannot be used: " + reason +
                           ". This processor supports: " + known);
}

const InstructionSet& choose() {
  const char* forced = std::getenv(kVariable);
  if (forced != nullptr && *forced != '\0') return find(forced, kVariable);
  for (const InstructionSet& isa : kInstructionSets) {
    if (why_not(isa).empty()) return isa;
  }
  throw std::logic_error("the scalar table runs everywhere");
}

const InstructionSet& active() {
  static const InstructionSet& chosen = choose();  // after an exception the next call tries again
  return chosen;
}

}  // namespace

std::vector<InstructionSetState> instruction_sets() {
  std::vector<InstructionSetState> all;
  for (const InstructionSet& isa : kInstructionSets) all.push_back({isa.name, why_not(isa).empty(), why_not(isa)});
  return all;
}

const Kernels& active_kernels() { return *active().kernels(); }

const std::string& active_name() {
  static const std::string name = active().name;
  return name;
}

const Kernels& kernels_named(const std::string& name) { return *find(name, "isa").kernels(); }

}  // namespace bitinfer::cpu
