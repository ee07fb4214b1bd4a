// How this library was built. This header needs neither torch nor Python.
#pragma once

#include <string>

namespace savl {

struct BuildFacts {
  std::string version;     // of the package, e.g. "0.1.0"
  std::string compiler;    // name and version, e.g. "GCC 12.2.0"
  long cxx_standard;       // the value of __cplusplus, e.g. 202002
  std::string stable_abi;  // oldest torch release whose stable ABI is enough, e.g. "2.10"
  std::string torch;       // release whose headers were compiled, e.g. "2.13.0"
};

BuildFacts build_facts();

}  // namespace savl
