#include "cpu/instruction_sets.h"

namespace savl::cpu {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  // The builtin also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.emplace_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.emplace_back("avx512dq");
#elif defined(__aarch64__) || defined(_M_ARM64)
  found.emplace_back("neon");  // part of the base architecture
#endif
  return found;
}

}  // namespace savl::cpu
