/* The table of one instruction-set level. */
#include "cpu/cpu.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)

const struct ee_ops EE_LEVEL_NAME(ee_cpu_ops) = {.name = "cpu" STRING(EE_ISA_SUFFIX),
#define ENTRY(op) .op = EE_KERNEL(op),
                                                 EE_OPS(ENTRY)};
