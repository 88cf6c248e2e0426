/* Exit heads in training: [branch MLP | block] -> [norm] -> output matrix -> loss.
 *
 * Forward and backward of a head happen together, in the backward of its microbatch, over chunks of
 * rows: logits never exist beyond one chunk, and a head keeps nothing between forward and backward
 * (EE-LLM section 3.2, "defer exit forward"; here the chunks bound the memory as well). The final
 * head is the last exit. */
#ifndef EE_EXIT_H
#define EE_EXIT_H

#include "model/block.h"

EE_EXTERN_C_BEGIN

/* Logits of a chunk of rows take at most this many bytes, unless one row takes more. */
#define EE_LOGIT_BYTES ((int64_t)96 << 20)

/* How an exit is trained; the final one has weight 1, temperature 1 and no dynamic weights. */
struct ee_exit_training {
    float weight;      /* of its loss in the sum */
    float temperature; /* divides its logits in the loss */
    bool dynamic;      /* token-wise weights: multiplies each token's loss by its confidence */
};

/* Sums over the unmasked rows, added to by every microbatch in order. */
struct ee_exit_sums {
    double loss;       /* cross-entropy at the exit's temperature, unweighted */
    double confidence; /* largest probability at that temperature */
    int64_t tokens;
};

/* What to do with an exit of a microbatch. Pointers may be NULL. */
struct ee_exit_run {
    const struct ee_exit_training *training;
    double tokens; /* unmasked tokens of the whole global batch: the loss's denominator */
    struct ee_exit_sums *sums;
    float *gradient;               /* the gradient arena; NULL: forward only */
    float *acc_dx;                 /* [N, C] += gradient of the hidden state */
    struct ee_weight_queue *queue; /* takes the gradient of the output matrix; NULL: at once */
    float *logits;                 /* [N, V] the raw logits (after the softcap), forward only */
    float *confidence;             /* [N] forward only: largest probability of the raw logits */
    int32_t *token;                /* [N] forward only: their argmax */
};

/* Runs exit e (an index into params->exit) of a microbatch. `hidden` [N, C] is the state at the
 * exit's depth: a layer's input or output, or for an MLP branch acts->mid of its layer. */
EE_WARN_UNUSED enum ee_status ee_exit_run(const struct ee_model *model, int32_t e,
                                          const struct ee_batch *batch, const float *hidden,
                                          const struct ee_exit_run *run);

/* The gradient of the output matrix that a queue noted: x[N, C] is the input of the head's norm.
 * Runs the head's forward again, chunk by chunk; sums of `run` are left alone. */
EE_WARN_UNUSED enum ee_status ee_exit_run_weight(const struct ee_model *model, int32_t e,
                                                 const struct ee_batch *batch, const float *x,
                                                 const struct ee_exit_run *run);

/* Floating-point operations of the matrix products of an exit: forward, and backward. */
void ee_exit_flops(const struct ee_model *model, int32_t e, int64_t rows, double *forward,
                   double *backward);

/* The same for a block. */
double ee_block_flops(const struct ee_config *config, int64_t rows);

EE_EXTERN_C_END

#endif
