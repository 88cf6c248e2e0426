/* Making a context, choosing the instruction set, and the scratch memory of kernels. */
#ifndef EE_CTX_H
#define EE_CTX_H

#include "ops/ops.h"

EE_EXTERN_C_BEGIN

/* Instruction-set levels of kernels/cpu, ascending. */
enum ee_isa { EE_ISA_PLAIN, EE_ISA_AVX2, EE_ISA_AVX512, EE_ISA_COUNT };

const char *ee_isa_name(enum ee_isa isa);

/* The best level that this CPU runs. */
enum ee_isa ee_isa_best(void);

/* The level of a name ("plain", "avx2", "avx512"); NULL or "" gives that of EELLM_ISA, or without
 * it the best one. An unknown name, or one that this CPU lacks, is EE_ERR_INVALID. */
EE_WARN_UNUSED enum ee_status ee_isa_from_name(enum ee_isa *isa, const char *name);

/* A CPU context with its own threads (0: as many as the process may use). */
EE_WARN_UNUSED enum ee_status ee_ctx_create(struct ee_ctx **out, enum ee_isa isa, int threads);
void ee_ctx_destroy(struct ee_ctx *ctx);

/* Scratch for one operation or one function of the model: take a mark, take memory, release the
 * mark. What does not fit comes from the heap, and the arena grows to the most ever needed when
 * the last mark is released, so that after a warm-up nothing is allocated. Not zeroed. */
struct ee_scratch_mark {
    size_t used;
    int overflow;
    size_t overflow_bytes;
};

struct ee_scratch_mark ee_scratch_mark(const struct ee_ctx *ctx);
EE_WARN_UNUSED enum ee_status ee_scratch_take(struct ee_ctx *ctx, void **out, int64_t count,
                                              size_t size);
void ee_scratch_release(struct ee_ctx *ctx, struct ee_scratch_mark mark);

EE_EXTERN_C_END

#endif
