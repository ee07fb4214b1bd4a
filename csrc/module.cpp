// The Python module savl._C. The only file that includes pybind11, and with it the only one tied to a Python
// version; ops register themselves with torch's dispatcher from files of their own and need no line here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_facts.h"
#include "cpu/instruction_sets.h"

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
  result["cuda"] = facts.cuda;
  result["instruction_sets"] = py::tuple(py::cast(savl::cpu::instruction_sets()));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "savl's C++ extension: build facts. Import torch first; savl.build_info reads it for you.";
  module.def("build_facts", &build_facts, "How this library was built, and what this processor offers.");
}
