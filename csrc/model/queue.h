/* Weight gradients that are put off, for schedules that split a backward into its input part and
 * its weight part (zero bubble: Qi et al., 2023).
 *
 * In the input part every product dW += dy^T x of a chunk's layers is noted with its operands
 * instead of being computed; the weight part runs the notes in the order in which they came, so
 * that a parameter's gradient has the same bits as with one backward. Operands are buffers that
 * were taken from the queue, or copies: activation slots are free after the input part. */
#ifndef EE_QUEUE_H
#define EE_QUEUE_H

#include "model/model.h"

EE_EXTERN_C_BEGIN

struct ee_weight_note {
    int32_t exit; /* the output matrix of this exit, from the input x of its head; -1: a product */
    bool has_bias;
    struct ee_tensor dw, dbias; /* += */
    struct ee_tensor dy, x;
};

struct ee_weight_queue {
    float *memory;
    int64_t floats, used;
    struct ee_weight_note *notes;
    int32_t capacity, count;
};

/* Floats and notes that the backward of a layer, and that of an exit, need at most for `rows`. */
int64_t ee_queue_layer_floats(const struct ee_config *config, int64_t rows);
int64_t ee_queue_exit_floats(const struct ee_config *config, int64_t rows);
#define EE_QUEUE_LAYER_NOTES 6

/* *out = a buffer of the queue, or scratch where `queue` is NULL. */
EE_WARN_UNUSED enum ee_status ee_queue_buffer(struct ee_ctx *ctx, struct ee_weight_queue *queue,
                                              float **out, int64_t count);

/* dw += dy^T x, dbias += column sums of dy (NULL: none): now, or noted where there is a queue. */
EE_WARN_UNUSED enum ee_status ee_queue_product(struct ee_ctx *ctx, struct ee_weight_queue *queue,
                                               const struct ee_tensor *dw,
                                               const struct ee_tensor *dbias,
                                               const struct ee_tensor *dy,
                                               const struct ee_tensor *x);

/* Notes the output matrix of an exit: x[N, C] is the input of its norm. */
EE_WARN_UNUSED enum ee_status ee_queue_exit(struct ee_weight_queue *queue, int32_t exit,
                                            const float *x, int64_t rows, int64_t width);

static inline void ee_queue_clear(struct ee_weight_queue *queue) {
    queue->used = 0;
    queue->count = 0;
}

EE_EXTERN_C_END

#endif
