#include "select.h"

#include "popcount_gemm_wgmma.h"
#include "sign_gemm_decode.h"
#include "sign_gemm_wgmma.h"

namespace bitinfer::cuda {
namespace {

// Tokens up to which the decode kernels beat those for batches on H200, where both take a problem. They read the planes
// of `columns` = tokens * bits once for every 16 rows; with many rows a block, that outweighs their shorter latency.
bool prefers_decode(int64_t m, int64_t bits, const DecodePlan& plan) {
  const int64_t columns = m * bits;
  return columns <= 16 || (columns <= 32 && plan.tiles <= 2);
}

bool allows(std::string_view forced, Kernel kernel) { return forced.empty() || forced == kernel_name(kernel); }

}  // namespace

const char* kernel_name(Kernel kernel) {
  switch (kernel) {
    case Kernel::kDecode:
    case Kernel::kGrouped:
    case Kernel::kSignDecode:
      return "decode";
    case Kernel::kWgmma:
      return "wgmma";
    case Kernel::kTiled:
      return "tiled";
    default:
      return "int8";
  }
}

std::optional<Kernel> select_kernel(const PopcountGemm& p, const Device& device, std::string_view forced) {
  const bool wgmma = allows(forced, Kernel::kWgmma) && popcount_gemm_wgmma_takes(p, device);
  if (allows(forced, Kernel::kDecode)) {
    const DecodePlan plan = popcount_gemm_decode_plan(p, device);
    if (plan && (!wgmma || prefers_decode(p.m, p.bits, plan))) return Kernel::kDecode;
    if (!wgmma && popcount_gemm_decode_grouped_plan(p, device)) return Kernel::kGrouped;
  }
  if (wgmma) return Kernel::kWgmma;
  if (allows(forced, Kernel::kTiled) && (device.has_binary_mma() || !forced.empty())) return Kernel::kTiled;
  if (allows(forced, Kernel::kInt8)) return Kernel::kInt8;
  return std::nullopt;
}

std::optional<Kernel> select_kernel(const SignGemm& p, const Device& device, std::string_view forced) {
  const bool wgmma = allows(forced, Kernel::kWgmma) && sign_gemm_wgmma_takes(p, device);
  if (allows(forced, Kernel::kDecode)) {
    if (sign_gemm_decode_plan(p, device)) return Kernel::kSignDecode;
    const FixedPointGemm fixed = as_fixed_point(p);
    if (!wgmma || p.m <= 2) {
      if (fixed_gemm_decode_plan(fixed, device)) return Kernel::kDecode;
      if (fixed_gemm_decode_grouped_plan(fixed, device)) return Kernel::kGrouped;
    }
  }
  if (wgmma) return Kernel::kWgmma;
  if (allows(forced, Kernel::kTiled)) return Kernel::kTiled;
  return std::nullopt;
}

FixedPointGemm as_fixed_point(const SignGemm& p) {
  FixedPointGemm fixed;
  fixed.m = p.m;
  fixed.weight = p.weight;
  fixed.y = p.y;
  return fixed;
}

}  // namespace bitinfer::cuda
