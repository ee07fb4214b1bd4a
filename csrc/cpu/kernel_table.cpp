#include "cpu/kernel_table.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace savl::cpu {
namespace {

// Returns the tables that this processor can run, the fastest first.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  const std::vector<std::string> features = processor_features();
  const auto has = [&](std::initializer_list<const char*> wanted) {
    return std::all_of(wanted.begin(), wanted.end(), [&](const char* feature) {
      return std::find(features.begin(), features.end(), feature) != features.end();
    });
  };
  const bool avx2 = has({"avx2", "fma"});
#if defined(SAVL_EMULATE_AVX512)
  const bool avx512 = avx2;  // this build compiles the AVX-512 kernels for AVX2, so that any machine can test them
#else
  const bool avx512 = avx2 && has({"avx512f", "avx512bw", "avx512vl", "avx512dq"});
#endif
  if (avx512) tables.push_back(&avx512::kKernels);
  if (avx2) tables.push_back(&avx2::kKernels);
#endif
  tables.push_back(&portable::kKernels);
  return tables;
}

// Returns the table for an instruction set, or nullptr if this processor cannot run it.
const KernelTable* find_table(const char* instruction_set) {
  for (const KernelTable* table : kernel_tables()) {
    if (std::strcmp(table->instruction_set, instruction_set) == 0) return table;
  }
  return nullptr;
}

// The table in use. An unknown value of SAVL_CPU_INSTRUCTION_SET is ignored here, because savl.ops.library reports it.
std::atomic<const KernelTable*>& current_table() {
  static std::atomic<const KernelTable*> table = [] {
    const char* wanted = std::getenv("SAVL_CPU_INSTRUCTION_SET");
    const KernelTable* found = wanted == nullptr ? nullptr : find_table(wanted);
    return found != nullptr ? found : kernel_tables().front();
  }();
  return table;
}

}  // namespace

std::vector<std::string> processor_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // needed before __builtin_cpu_supports, which also checks that the system saves AVX registers
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
  static const std::vector<const KernelTable*> tables = supported_tables();
  return tables;
}

const KernelTable& kernels() { return *current_table().load(std::memory_order_relaxed); }

bool use_kernels(const char* instruction_set) {
  const KernelTable* table = find_table(instruction_set);
  if (table != nullptr) current_table().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace savl::cpu
