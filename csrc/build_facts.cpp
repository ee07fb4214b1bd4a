#include "build_facts.h"

#include <torch/csrc/stable/version.h>

#ifndef SAVL_VERSION
#error "SAVL_VERSION is not defined: build through setup.py, which reads it from pyproject.toml"
#endif
#ifndef TORCH_TARGET_VERSION
#error "TORCH_TARGET_VERSION is not defined: without it the library would load in the newest torch only"
#endif

// A bare token from the command line becomes a string here, so that no shell has to carry quotes.
#define SAVL_STRING(token) #token
#define SAVL_EXPANDED_STRING(token) SAVL_STRING(token)

namespace savl {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " SAVL_EXPANDED_STRING(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

long cxx_standard() {
#if defined(_MSVC_LANG)
  return _MSVC_LANG;  // MSVC keeps __cplusplus at 199711 unless told otherwise
#else
  return __cplusplus;
#endif
}

// Torch packs a version as one byte each of major, minor and patch, from the top of 64 bits.
std::string stable_abi() {
  constexpr unsigned long long packed = TORCH_FEATURE_VERSION;
  return std::to_string(packed >> 56 & 0xff) + "." + std::to_string(packed >> 48 & 0xff);
}

}  // namespace

BuildFacts build_facts() {
  BuildFacts facts;
  facts.version = SAVL_EXPANDED_STRING(SAVL_VERSION);
  facts.compiler = compiler();
  facts.cxx_standard = cxx_standard();
  facts.stable_abi = stable_abi();
  facts.torch = TORCH_VERSION;
  return facts;
}

}  // namespace savl
