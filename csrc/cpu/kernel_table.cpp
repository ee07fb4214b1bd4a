#include "cpu/kernel_table.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace savl::cpu {
namespace {

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();  // the builtins also check that the operating system saves the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(SAVL_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  if (avx512) tables.push_back(&avx512::kKernels);
  if (avx2) tables.push_back(&avx2::kKernels);
#endif
  tables.push_back(&portable::kKernels);
  return tables;
}

const KernelTable* named(const char* instruction_set) {
  for (const KernelTable* table : kernel_tables()) {
    if (std::strcmp(table->instruction_set, instruction_set) == 0) return table;
  }
  return nullptr;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table = [] {
    const char* wanted = std::getenv("SAVL_CPU_INSTRUCTION_SET");
    const KernelTable* found = wanted == nullptr ? nullptr : named(wanted);
    return found != nullptr ? found : kernel_tables().front();
  }();
  return table;
}

}  // namespace

const std::vector<const KernelTable*>& kernel_tables() {
  static const std::vector<const KernelTable*> tables = runnable();
  return tables;
}

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_kernels(const char* instruction_set) {
  const KernelTable* table = named(instruction_set);
  if (table != nullptr) current().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace savl::cpu
