#include "cpu/kernel_table.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace savl::cpu {
namespace {

#if defined(__x86_64__)

// The registers EAX and EDX of leaf 7 of CPUID.
struct ExtendedFeatures {
  unsigned eax = 0, edx = 0;
  explicit ExtendedFeatures(unsigned subleaf) {
    unsigned ebx = 0, ecx = 0;
    if (__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx) == 0) eax = edx = 0;
  }
};

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512f") && (ExtendedFeatures(1).eax >> 5 & 1) != 0; }

// Whether this process can use AMX with bfloat16. Linux grants the registers to a process that asks for them.
bool has_amx_bf16() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const unsigned edx = ExtendedFeatures(0).edx;
  const bool amx_bf16 = (edx >> 22 & 1) != 0, amx_tile = (edx >> 24 & 1) != 0;
  return amx_bf16 && amx_tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether vdpbf16ps multiplies no more numbers in a cycle than fused multiply-add does in float32. This is so on
// Intel's processors since Sapphire Rapids, the first with AVX512-FP16: they multiply bfloat16 fast with AMX only.
bool pairs_are_slow() { return __builtin_cpu_is("intel") && (ExtendedFeatures(0).edx >> 23 & 1) != 0; }

// The kernels of avx512 with others for products in bfloat16.
KernelTable with_products(const char* instruction_set, const BFloat16Products& products) {
  constexpr int kStorage = static_cast<int>(Storage::kBFloat16);
  KernelTable table = avx512::kKernels;
  table.instruction_set = instruction_set;
  table.attention.forward[kStorage] = products.attention_forward;
  table.attention.backward[kStorage] = products.attention_backward;
  table.convolution[kStorage] = products.convolution;
  return table;
}

#endif

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
  // This build compiles the kernels of these instruction sets for AVX2, so that any machine can test them.
  const bool avx512 = avx2, avx512_bf16 = avx2, amx = avx2;
#else
  const bool avx512 = avx2 && has({"avx512f", "avx512bw", "avx512vl", "avx512dq"});
  const bool avx512_bf16 = avx512 && has({"avx512_bf16"});
  const bool amx = avx512_bf16 && has({"amx_bf16"});
#endif
  static const KernelTable amx_table = with_products("amx", amx::kProducts);
  static const KernelTable pairs_table = with_products("avx512_bf16", avx512_bf16::kProducts);
  const bool pairs_last = pairs_are_slow();
  if (amx) tables.push_back(&amx_table);
  if (avx512_bf16 && !pairs_last) tables.push_back(&pairs_table);
  if (avx512) tables.push_back(&avx512::kKernels);
  if (avx512_bf16 && pairs_last) tables.push_back(&pairs_table);
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
  if (has_avx512_bf16()) found.emplace_back("avx512_bf16");
  if (has_amx_bf16()) found.emplace_back("amx_bf16");
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
