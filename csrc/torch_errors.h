// The error that a failed call into torch's stable ABI throws. The message of torch's own macro is the text of the call
// and the path of a header on the machine that compiled it; it does not say why the call failed. Include this header
// before every other header of torch, because their functions expand the macro.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// A function of torch from 2.13 on, null before: the library is built for every release from 2.10 on. Returns the
// message of the last error of the calling thread.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace savl {

[[noreturn]] __attribute__((noinline)) inline void throw_torch_error(const char* call) {
  const char* reason =
      torch_exception_get_what_without_backtrace == nullptr ? nullptr : torch_exception_get_what_without_backtrace();
  if (reason != nullptr && *reason != '\0') throw std::runtime_error(reason);
  // The ops check their arguments before they call torch, so lack of memory is the likely reason.
  const std::string text = call;
  const std::string name = text.substr(0, text.find(','));
  throw std::runtime_error("most likely out of memory: " + name + (name.size() < text.size() ? ", ...)" : "") +
                           " failed, and torch before 2.13 does not say why");
}

}  // namespace savl

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    savl::throw_torch_error(#call);  \
  }
