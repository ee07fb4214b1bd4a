// The Python module savl._C: functions that describe the build, and a function that selects the instruction set of the
// CPU kernels. No other file includes pybind11 or depends on the version of Python. The ops are not defined here: each
// op registers itself with PyTorch's dispatcher in a separate file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/version.h>

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

#ifndef SAVL_VERSION
#error "SAVL_VERSION is not defined: build through setup.py, which reads it from pyproject.toml"
#endif
#ifndef TORCH_TARGET_VERSION
#error "TORCH_TARGET_VERSION is not defined: without it, the library would load only in the newest torch"
#endif

// Converts SAVL_VERSION to a string literal. The compiler option defines it without quotes, which shells might remove.
#define SAVL_QUOTED(token) #token
#define SAVL_EXPANDED_QUOTED(token) SAVL_QUOTED(token)

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

// Returns the oldest version of torch whose stable ABI contains everything that this library uses. Torch encodes a
// version in 64 bits: major, minor and patch are the three most significant bytes.
std::string stable_abi() {
  constexpr unsigned long long packed = TORCH_FEATURE_VERSION;
  return std::to_string(packed >> 56 & 0xff) + "." + std::to_string(packed >> 48 & 0xff);
}

py::dict build_facts() {
  py::dict result;
  result["version"] = SAVL_EXPANDED_QUOTED(SAVL_VERSION);
  result["compiler"] = compiler();
  result["cxx_standard"] = __cplusplus;
  result["stable_abi"] = stable_abi();
  result["torch"] = TORCH_VERSION;  // the version whose headers this library was compiled with
  result["instruction_sets"] = py::tuple(py::cast(savl::cpu::processor_features()));
  result["kernel_instruction_set"] = savl::cpu::kernels().instruction_set;
  return result;
}

// Returns the instruction sets of the CPU kernels that this processor supports, the fastest first.
std::vector<std::string> kernel_instruction_sets() {
  std::vector<std::string> names;
  for (const savl::cpu::KernelTable* table : savl::cpu::kernel_tables()) names.emplace_back(table->instruction_set);
  return names;
}

void use_kernel_instruction_set(const std::string& name) {
  if (savl::cpu::use_kernels(name.c_str())) return;
  std::string accepted;
  for (const std::string& known : kernel_instruction_sets()) accepted += (accepted.empty() ? "" : ", ") + known;
  throw py::value_error("the instruction set must be one that this processor supports (" + accepted + "), got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ extension of savl. Importing it registers the CPU kernels; savl.ops does so.";
  module.def("build_facts", &build_facts,
             "Return a dict that describes the build, and the instruction sets that this processor supports.");
  module.def("kernel_instruction_sets", &kernel_instruction_sets,
             "Return the instruction sets of the CPU kernels that this processor supports, the fastest first.");
  module.def("use_kernel_instruction_set", &use_kernel_instruction_set, py::arg("name"),
             "Select the instruction set of the CPU kernels.");
}
