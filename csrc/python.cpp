// bitinfer._native: the torch-free kernel library on numpy arrays. It packs without torch, reaches every instruction
// set's table in one process for tests, and tells doctor what was built. It holds its own copy of the static library;
// what the torch library uses it reads from the same environment variable.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/run.h"

namespace py = pybind11;

namespace {

using namespace bitinfer;
using namespace bitinfer::cpu;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using OptionalArray = std::optional<Array<float>>;

const Kernels& table(const std::optional<std::string>& isa) { return isa ? kernels_named(*isa) : active_kernels(); }

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename T>
void check_shape(const char* name, const Array<T>& array, const std::vector<int64_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (same) return;
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  throw std::invalid_argument(std::string(name) + " must have shape (" + expected + ")");
}

Floats floats(const char* name, const OptionalArray& array, const std::vector<int64_t>& shape) {
  if (!array) return {};
  check_shape(name, *array, shape);
  return {array->data(), Dtype::kFloat32};
}

Weight checked_weight(const Array<uint32_t>& words, int64_t k, const OptionalArray& scale, const OptionalArray& shift,
                      const OptionalArray& bias, int64_t group_size) {
  check(group_size >= 0 && group_size % kWordBits == 0, "group_size must be 0 or a multiple of 32");
  check(k >= 0 && (words.ndim() == 2 || words.ndim() == 3), "weight must be [N, words] or [P, N, words]");
  const bool planes = words.ndim() == 3;
  const int64_t p = planes ? words.shape(0) : 1, n = words.shape(words.ndim() - 2), groups = group_count(k, group_size);
  check(words.shape(words.ndim() - 1) == words_per_row(k), "weight does not have the words of in_features columns");
  const std::vector<int64_t> scale_shape =
      planes ? std::vector<int64_t>{p, n, groups} : std::vector<int64_t>{n, groups};
  return {words.data(),
          p,
          n,
          k,
          floats("weight_scale", scale, scale_shape),
          floats("group_shift", shift, {n, groups}),
          floats("bias", bias, {n}),
          group_size};
}

py::array_t<uint32_t> pack_signs_numpy(const Array<float>& weight, const std::optional<std::string>& isa) {
  check(weight.ndim() >= 1, "weight must have at least one dimension");
  std::vector<py::ssize_t> shape(weight.shape(), weight.shape() + weight.ndim());
  const int64_t k = shape.back();
  int64_t rows = 1;
  for (py::ssize_t d = 0; d < weight.ndim() - 1; ++d) rows *= weight.shape(d);
  shape.back() = words_per_row(k);
  py::array_t<uint32_t> words(shape);
  cpu::pack_signs(table(isa), {{weight.data(), Dtype::kFloat32}, k, k, words.mutable_data()}, rows, serial);
  return words;
}

py::tuple pack_activations_numpy(const Array<float>& x, const OptionalArray& in_scale, const OptionalArray& in_shift,
                                 int64_t bits, int64_t block_size, int64_t group_size,
                                 const std::optional<std::string>& isa) {
  check(x.ndim() == 2, "x must be [M, K]");
  check(bits == 8 || bits == 4 || bits == 2 || bits == 1, "bits must be 8, 4, 2 or 1");
  check(block_size % kWordBits == 0 && group_size % kWordBits == 0, "block_size and group_size are multiples of 32");
  const int64_t m = x.shape(0), k = x.shape(1);
  py::array_t<uint32_t> planes({m, bits, words_per_row(k)});
  py::array_t<float> scale({m, group_count(k, block_size)}), shift({m, static_cast<int64_t>(in_shift ? 1 : 0)});
  py::array_t<int32_t> sum({m, group_count(k, segment_size(block_size, group_size))});
  const PackActivations problem{{x.data(), Dtype::kFloat32},
                                k,
                                k,
                                floats("in_scale", in_scale, {k}),
                                floats("in_shift", in_shift, {k}),
                                bits,
                                block_size,
                                group_size,
                                planes.mutable_data(),
                                scale.mutable_data(),
                                sum.mutable_data(),
                                shift.mutable_data()};
  cpu::pack_activations(table(isa), problem, m, serial);
  return py::make_tuple(planes, scale, sum, shift);
}

py::array_t<float> sign_gemm_numpy(const Array<float>& x, const Array<uint32_t>& weight, int64_t in_features,
                                   const OptionalArray& weight_scale, const OptionalArray& in_scale,
                                   const OptionalArray& in_shift, const OptionalArray& group_shift,
                                   const OptionalArray& bias, int64_t group_size, std::optional<double> norm_eps,
                                   const std::optional<std::string>& isa) {
  check_shape("x", x, {x.ndim() == 2 ? x.shape(0) : -1, in_features});
  SignGemm problem{{x.data(), Dtype::kFloat32}, x.shape(0), in_features};
  problem.in_scale = floats("in_scale", in_scale, {in_features});
  problem.in_shift = floats("in_shift", in_shift, {in_features});
  problem.weight = checked_weight(weight, in_features, weight_scale, group_shift, bias, group_size);
  py::array_t<float> y({problem.m, problem.weight.n});
  problem.y = {y.mutable_data(), Dtype::kFloat32, problem.weight.n};
  cpu::sign_gemm(table(isa), problem, norm_eps, serial);
  return y;
}

py::array_t<float> popcount_gemm_numpy(const Array<uint32_t>& planes, const Array<float>& act_scale,
                                       const Array<int32_t>& act_sum, const OptionalArray& act_shift,
                                       const Array<uint32_t>& weight, int64_t in_features,
                                       const OptionalArray& weight_scale, const OptionalArray& group_shift,
                                       const OptionalArray& bias, int64_t group_size, int64_t block_size,
                                       std::optional<double> norm_eps, const std::optional<std::string>& isa) {
  check(planes.ndim() == 3, "planes must be [M, bits, words]");
  check(block_size % kWordBits == 0, "block_size must be a multiple of 32");
  PopcountGemm problem{};
  problem.weight = checked_weight(weight, in_features, weight_scale, group_shift, bias, group_size);
  problem.m = planes.shape(0);
  problem.bits = planes.shape(1);
  problem.block_size = block_size;
  check(problem.bits == 8 || problem.bits == 4 || problem.bits == 2 || problem.bits == 1, "bits must be 8, 4, 2 or 1");
  check_shape("planes", planes, {problem.m, problem.bits, words_per_row(in_features)});
  check_shape("act_scale", act_scale, {problem.m, problem.blocks()});
  check_shape("act_sum", act_sum, {problem.m, problem.segments()});
  problem.planes = planes.data();
  problem.act_scale = act_scale.data();
  problem.act_sum = act_sum.data();
  problem.act_shift = static_cast<const float*>(floats("act_shift", act_shift, {problem.m, 1}).data);
  py::array_t<float> y({problem.m, problem.weight.n});
  problem.y = {y.mutable_data(), Dtype::kFloat32, problem.weight.n};
  cpu::popcount_gemm(table(isa), problem, norm_eps, serial);
  return y;
}

py::list isas() {
  py::list all;
  for (const InstructionSetState& isa : instruction_sets()) {
    py::dict entry;
    entry["name"] = isa.name;
    entry["supported"] = isa.supported;
    entry["reason"] = isa.reason;
    all.append(entry);
  }
  return all;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#if defined(NDEBUG)
  info["assertions"] = false;
#else
  info["assertions"] = true;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  using namespace py::literals;
  const py::none none;
  m.doc() = "The compiled CPU kernels on numpy arrays, without torch; isa names a table, None takes the active one.";
  m.def("isas", &isas, "Every instruction set in order of preference: name, supported, and the reason if it is not.");
  m.def("active_isa", &active_name, "The instruction set in use (BITINFER_CPU_ISA forces one).");
  m.def("build_info", &build_info, "Compiler and versions of the build.");
  m.def("pack_signs", &pack_signs_numpy, "weight"_a, "isa"_a = none, "Signs of [..., K] to uint32 [..., ceil(K/32)].");
  m.def("pack_activations", &pack_activations_numpy, "x"_a, "in_scale"_a = none, "in_shift"_a = none, "bits"_a = 8,
        "block_size"_a = 0, "group_size"_a = 0, "isa"_a = none, "Float32 [M, K] to (planes, scale, sum, shift).");
  m.def("sign_gemm", &sign_gemm_numpy, "x"_a, "weight"_a, "in_features"_a, "weight_scale"_a = none, "in_scale"_a = none,
        "in_shift"_a = none, "group_shift"_a = none, "bias"_a = none, "group_size"_a = 0, "norm_eps"_a = none,
        "isa"_a = none, "bitinfer.ops.sign_gemm in float32.");
  m.def("popcount_gemm", &popcount_gemm_numpy, "planes"_a, "act_scale"_a, "act_sum"_a, "act_shift"_a, "weight"_a,
        "in_features"_a, "weight_scale"_a = none, "group_shift"_a = none, "bias"_a = none, "group_size"_a = 0,
        "block_size"_a = 0, "norm_eps"_a = none, "isa"_a = none, "bitinfer.ops.popcount_gemm in float32.");
}
