#include "cpu/kernel_table.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace savl::cpu {
namespace {

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  const std::vector<std::string> found = processor_features();
  const auto has = [&](std::initializer_list<const char*> wanted) {
    return std::all_of(wanted.begin(), wanted.end(), [&](const char* feature) {
      return std::find(found.begin(), found.end(), feature) != found.end();
    });
  };
  const bool avx2 = has({"avx2", "fma"});
#if defined(SAVL_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && has({"avx512f", "avx512bw", "avx512vl", "avx512dq"});
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

std::vector<std::string> processor_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // the builtins also check that the operating system saves the wide registers
  if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.emplace_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.emplace_back("avx512dq");
#elif defined(__aarch64__)
  found.emplace_back("neon");  // part of the base architecture
#endif
  return found;
}

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
