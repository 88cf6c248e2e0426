/* A chunk: a contiguous range of layers with the exits attached to them, and the activation slots
 * of the microbatches that are between their forward and their backward. It knows neither its
 * neighbours nor the schedule. The first chunk embeds tokens; the last one holds the final exit.
 *
 * A slot keeps, for each layer, what ee_block_acts lists. Recomputation keeps less and runs parts
 * of the forward again in the backward, in memory that all layers share; it changes no bit. */
#ifndef EE_CHUNK_H
#define EE_CHUNK_H

#include "model/exit.h"

EE_EXTERN_C_BEGIN

enum ee_recompute {
    EE_RECOMPUTE_NONE,
    EE_RECOMPUTE_ATTENTION, /* keeps x, mid, stats2 and up of a layer */
    EE_RECOMPUTE_FULL,      /* keeps x */
};

struct ee_chunk {
    const struct ee_model *model;
    int32_t first_layer, last_layer; /* [first, last) */
    enum ee_recompute recompute;
    int64_t rows; /* of a microbatch, at most */
    int32_t slots;
    struct ee_arena arena;
    struct ee_block_acts *acts;     /* [slots][last - first] */
    float **output;                 /* [slots]: [N, C] output of the last layer */
    struct ee_block_acts transient; /* what all layers share, per the recomputation mode */
    float *dx;                      /* [N, C] */
};

/* A chunk of all layers of a model. `rows`: of the largest microbatch. */
EE_WARN_UNUSED enum ee_status ee_chunk_create(struct ee_chunk **out, const struct ee_model *model,
                                              int64_t rows, int32_t slots,
                                              enum ee_recompute recompute);
void ee_chunk_destroy(struct ee_chunk *chunk);

/* Runs the layers of a microbatch and keeps in `slot` what the backward needs. */
EE_WARN_UNUSED enum ee_status ee_chunk_forward(struct ee_chunk *chunk, int32_t slot,
                                               const struct ee_batch *batch);

/* Exits and layers of a microbatch, from the deepest to the shallowest; parameter gradients are
 * added to `gradient`. training[e], sums[e]: for each exit, the final one last. tokens: unmasked
 * tokens of the global batch. */
EE_WARN_UNUSED enum ee_status ee_chunk_backward(struct ee_chunk *chunk, int32_t slot,
                                                const struct ee_batch *batch, float *gradient,
                                                const struct ee_exit_training *training,
                                                double tokens, struct ee_exit_sums *sums);

/* Forward only, without dropout: what each exit is to give stands in run[e] (gradient NULL). Uses
 * slot 0 and leaves it without meaning. */
EE_WARN_UNUSED enum ee_status ee_chunk_evaluate(struct ee_chunk *chunk,
                                                const struct ee_batch *batch,
                                                const struct ee_exit_run *run);

/* Floating-point operations of the matrix products of forward and backward of a microbatch,
 * recomputation not counted. */
double ee_chunk_flops(const struct ee_chunk *chunk, int64_t rows);

EE_EXTERN_C_END

#endif
