// What the processor under us can do, asked at run time.
#pragma once

#include <string>
#include <vector>

namespace savl::cpu {

// The instruction sets that the kernels care about and that both the processor and the operating system
// support, in a fixed order: "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq" on x86;
// "neon" on 64-bit Arm. Empty where the compiler offers no way to ask.
std::vector<std::string> instruction_sets();

}  // namespace savl::cpu
