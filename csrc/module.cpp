// The Python module savl._C: facts about the build, and the choice of the instruction set. No other file includes
// pybind11 or depends on the version of Python. Ops need no line here: each registers itself with torch's dispatcher in
// a file of its own.
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
#error "TORCH_TARGET_VERSION is not defined: without it the library would load in the newest torch only"
#endif

// SAVL_VERSION is a bare token on the command line, so that no shell has to carry quotes.
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

// The oldest torch whose stable ABI is enough. Torch packs a version as one byte each of major, minor and patch, from
// the top of 64 bits.
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
  result["torch"] = TORCH_VERSION;  // whose headers were compiled
  result["instruction_sets"] = py::tuple(py::cast(savl::cpu::processor_features()));
  result["kernel_instruction_set"] = savl::cpu::kernels().instruction_set;
  return result;
}

// The instruction sets that the CPU kernels can use here, the fastest first.
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
  module.doc() = "savl's C++ extension: its kernels, build facts, and the instruction set to use. savl.ops imports it.";
  module.def("build_facts", &build_facts, "How this library was built, and what this processor offers.");
  module.def("kernel_instruction_sets", &kernel_instruction_sets,
             "The instruction sets that the CPU kernels can use here, the fastest first.");
  module.def("use_kernel_instruction_set", &use_kernel_instruction_set, py::arg("name"),
             "Make the CPU kernels use another instruction set.");
}
