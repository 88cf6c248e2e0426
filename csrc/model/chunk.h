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

struct ee_chunk_options {
    int64_t rows;  /* of a microbatch, at most */
    int32_t slots; /* of activations */
    enum ee_recompute recompute;
    int32_t queues;   /* weight gradients of how many microbatches may be put off at a time */
    bool defer_exits; /* those of output matrices among them, which costs another forward */
};

struct ee_chunk {
    const struct ee_model *model;
    const struct ee_stage *stage;
    struct ee_chunk_options options;
    struct ee_arena arena;
    struct ee_block_acts *acts;     /* [slots][last - first] */
    float **output;                 /* [slots]: [N, C] output of the last layer */
    struct ee_block_acts transient; /* what all layers share, per the recomputation mode */
    struct ee_weight_queue *queues; /* [queues] */
};

/* What a backward needs of the training step; arrays are by exit, the final one last. */
struct ee_backward {
    float *gradient;                         /* parameter gradients are added to it */
    const struct ee_exit_training *training; /* [E] */
    const double *tokens;                    /* [E] each loss's denominator */
    struct ee_exit_sums *sums;               /* [E] */
};

/* `stage`: of the model's layout, on its rank. */
EE_WARN_UNUSED enum ee_status ee_chunk_create(struct ee_chunk **out, const struct ee_model *model,
                                              const struct ee_stage *stage,
                                              const struct ee_chunk_options *options);
void ee_chunk_destroy(struct ee_chunk *chunk);

/* Where the slot's input [N, C] lies: the caller fills it, unless the chunk embeds, and may put
 * another buffer of that size in its place between a backward and a forward. */
static inline float **ee_chunk_input(struct ee_chunk *chunk, int32_t slot) {
    return &chunk->acts[slot * (chunk->stage->last_layer - chunk->stage->first_layer)].x;
}

/* Its output [N, C], until the slot's next forward. */
static inline float *ee_chunk_output(const struct ee_chunk *chunk, int32_t slot) {
    return chunk->output[slot];
}

/* Runs the layers of a microbatch and keeps in `slot` what the backward needs. */
EE_WARN_UNUSED enum ee_status ee_chunk_forward(struct ee_chunk *chunk, int32_t slot,
                                               const struct ee_batch *batch);

/* Exits and layers of a microbatch, from the deepest to the shallowest. dx[N, C]: the gradient of
 * the chunk's output becomes that of its input; where the chunk embeds it becomes undefined. With
 * queue >= 0 this is the input part, and the weight gradients of the layers wait in that queue. */
EE_WARN_UNUSED enum ee_status ee_chunk_backward(struct ee_chunk *chunk, int32_t slot, int32_t queue,
                                                const struct ee_batch *batch, float *dx,
                                                const struct ee_backward *backward);

/* The weight part of a microbatch. */
EE_WARN_UNUSED enum ee_status ee_chunk_backward_weight(struct ee_chunk *chunk, int32_t queue,
                                                       const struct ee_batch *batch,
                                                       const struct ee_backward *backward);

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
