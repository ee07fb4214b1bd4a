// The Python module savl._C. No other file includes pybind11 or depends on the version of Python. Ops need no line
// here: each registers itself with torch's dispatcher in a file of its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_facts.h"
#include "cpu/instruction_sets.h"
#include "cpu/kernel_table.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  const savl::BuildFacts facts = savl::build_facts();
  py::dict result;
  result["version"] = facts.version;
  result["compiler"] = facts.compiler;
  result["cxx_standard"] = facts.cxx_standard;
  result["stable_abi"] = facts.stable_abi;
  result["torch"] = facts.torch;
  result["instruction_sets"] = py::tuple(py::cast(savl::cpu::instruction_sets()));
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
