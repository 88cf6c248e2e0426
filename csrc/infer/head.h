/* What an exit does with rows: its branch, its norm, its output matrix, and the confidence. */
#ifndef EE_HEAD_H
#define EE_HEAD_H

#include "infer/rows.h"

EE_EXTERN_C_BEGIN

/* Writes keys and values of the block of exit `exit` for all rows of the batch, which stands at the
 * depth of the exit; nothing where it has no block. */
EE_WARN_UNUSED enum ee_status ee_head_fill(struct ee_runner *runner, int32_t exit);

/* The head of exit `exit` on n <= runner->head_capacity rows of the batch, `index` tells which:
 * runner->logits[n, V] (after the model's softcap), head_token[n] (the largest logit),
 * confidence[n], lse[n]. The batch stays as it is. */
EE_WARN_UNUSED enum ee_status ee_head_run(struct ee_runner *runner, int32_t exit,
                                          const int32_t *index, int64_t n);

EE_EXTERN_C_END

#endif
