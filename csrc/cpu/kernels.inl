// The kernels of one instruction set. Define SAVL_INSTRUCTION_SET (a name, used as a namespace), SAVL_VECTOR_BYTES and
// SAVL_TABLE (the name of the table), switch the target on, include this, switch it off. Headers of the standard
// library come before: what they define inline must not be compiled for a processor that another file does not ask for.
//
// GCC and Clang only: the vectors are their extension.

#define SAVL_STRING_OF(token) #token
#define SAVL_STRING(token) SAVL_STRING_OF(token)

namespace savl::cpu {
static_assert(SAVL_VECTOR_BYTES <= kWidestVector);
namespace SAVL_INSTRUCTION_SET {
namespace {

// The order matters: each uses what stands above.
#include "cpu/simd.h"
//
#include "modulation_math.h"
#include "posterior_math.h"
//
#include "cpu/attention_pack.h"
//
#include "cpu/attention_products.h"
//
#include "cpu/attention_logits.h"
//
#include "cpu/attention.h"
//
#include "cpu/attention_backward.h"
#include "cpu/modulation.h"
#include "cpu/norm.h"
#include "cpu/posterior.h"

}  // namespace
}  // namespace SAVL_INSTRUCTION_SET

#define SAVL_FOR_EACH_STORAGE(kernel)                                         \
  {SAVL_INSTRUCTION_SET::kernel<float>, SAVL_INSTRUCTION_SET::kernel<double>, \
   SAVL_INSTRUCTION_SET::kernel<SAVL_INSTRUCTION_SET::BFloat16>}

const KernelTable SAVL_TABLE = {
    SAVL_STRING(SAVL_INSTRUCTION_SET),
    SAVL_FOR_EACH_STORAGE(attention_kernel),
    SAVL_FOR_EACH_STORAGE(attention_backward_kernel),
    SAVL_FOR_EACH_STORAGE(posterior_kernel),
    SAVL_FOR_EACH_STORAGE(posterior_backward_kernel),
    SAVL_FOR_EACH_STORAGE(modulation_kernel),
    SAVL_FOR_EACH_STORAGE(modulation_backward_kernel),
    SAVL_FOR_EACH_STORAGE(norm_kernel),
    SAVL_FOR_EACH_STORAGE(norm_backward_kernel),
};

}  // namespace savl::cpu
