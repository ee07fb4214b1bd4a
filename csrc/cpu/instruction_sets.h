// The instruction sets of the processor that the program runs on.
#pragma once

#include <string>
#include <vector>

namespace savl::cpu {

// Returns the instruction sets that the kernels use and that both the processor and the operating system support, in a
// fixed order: "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq" on x86;
// "neon" on 64-bit Arm. Empty where the compiler has no way to find out.
std::vector<std::string> instruction_sets();

}  // namespace savl::cpu
