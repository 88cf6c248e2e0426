/* What the CPU backend exports, and how its files are compiled.
 *
 * Every .c file of this folder is compiled once per instruction-set level, with EE_ISA_SUFFIX set
 * to _plain, _avx2 or _avx512 and the matching compiler flags. EE_KERNEL(norm) is the name that the
 * kernel of ee_norm has at the level being compiled. A kernel has the signature of the public
 * operation (ops/ops.h) and may assume that its arguments were checked. */
#ifndef EE_CPU_H
#define EE_CPU_H

#include "ops/ops.h"

EE_EXTERN_C_BEGIN

extern const struct ee_ops ee_cpu_ops_plain, ee_cpu_ops_avx2, ee_cpu_ops_avx512;

#ifdef EE_ISA_SUFFIX
#    define EE_PASTE_(a, b) a##b
#    define EE_PASTE(a, b) EE_PASTE_(a, b)
#    define EE_LEVEL_NAME(name) EE_PASTE(name, EE_ISA_SUFFIX)
#    define EE_KERNEL(op) EE_LEVEL_NAME(ee_cpu_##op)
#    define EE_KERNEL_PROTOTYPE(op) __typeof__(ee_##op) EE_KERNEL(op);
EE_OPS(EE_KERNEL_PROTOTYPE)
#endif

EE_EXTERN_C_END

#endif
