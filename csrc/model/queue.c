#include "model/queue.h"

#include "model/block.h"
#include "model/parts.h"

#include <string.h>

static int64_t padded(int64_t count) {
    int64_t lane = EE_ALIGNMENT / (int64_t)sizeof(float);
    return ee_ceil_div(count, lane) * lane;
}

int64_t ee_queue_layer_floats(const struct ee_config *c, int64_t rows) {
    struct ee_block_sizes s = ee_block_sizes(c, rows);
    /* Two normed inputs and two gradients of the residual; a parallel block copies one more. */
    return 5 * padded(s.x) + padded(rows * c->intermediate_size) + padded(s.up) + padded(s.qkv) +
           padded(s.out);
}

int64_t ee_queue_exit_floats(const struct ee_config *c, int64_t rows) {
    return padded(rows * c->hidden_size);
}

static float *take(struct ee_weight_queue *queue, int64_t count) {
    float *memory = queue->memory + queue->used;
    queue->used += padded(count);
    EE_ASSERT(queue->used <= queue->floats);
    return memory;
}

enum ee_status ee_queue_buffer(struct ee_ctx *ctx, struct ee_weight_queue *queue, float **out,
                               int64_t count) {
    if (!queue)
        return ee_scratch_floats(ctx, out, count);
    *out = take(queue, count);
    return EE_OK;
}

static struct ee_weight_note *next_note(struct ee_weight_queue *queue) {
    EE_ASSERT(queue->count < queue->capacity);
    return &queue->notes[queue->count++];
}

/* The operand itself where it lies in the queue, else a copy of it; contiguous. */
static struct ee_tensor kept(struct ee_weight_queue *queue, const struct ee_tensor *t) {
    const float *data = t->data;
    if (data >= queue->memory && data < queue->memory + queue->floats)
        return *t;
    int64_t count = t->shape[0] * t->shape[1];
    EE_ASSERT(t->stride[0] == t->shape[1]);
    float *copy = take(queue, count);
    memcpy(copy, data, (size_t)count * sizeof *copy);
    return ee_matrix(copy, t->shape[0], t->shape[1]);
}

enum ee_status ee_queue_product(struct ee_ctx *ctx, struct ee_weight_queue *queue,
                                const struct ee_tensor *dw, const struct ee_tensor *dbias,
                                const struct ee_tensor *dy, const struct ee_tensor *x) {
    if (!queue)
        return ee_linear_backward_weight(ctx, dw, dbias, dy, x);
    struct ee_weight_note *note = next_note(queue);
    *note = (struct ee_weight_note){.exit = -1, .has_bias = dbias != NULL, .dw = *dw};
    if (dbias)
        note->dbias = *dbias;
    note->dy = kept(queue, dy);
    note->x = kept(queue, x);
    return EE_OK;
}

enum ee_status ee_queue_exit(struct ee_weight_queue *queue, int32_t exit, const float *x,
                             int64_t rows, int64_t width) {
    struct ee_tensor t = ee_matrix(x, rows, width);
    struct ee_weight_note *note = next_note(queue);
    *note = (struct ee_weight_note){.exit = exit};
    note->x = kept(queue, &t);
    return EE_OK;
}
