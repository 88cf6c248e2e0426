/* Running the rows or elements of an operation on the threads of its context. */
#ifndef EE_CPU_PARALLEL_H
#define EE_CPU_PARALLEL_H

#include "cpu/cpu.h"

/* Fewer elements than this are done sooner on the calling thread than the others wake up. */
#define EE_SERIAL_ELEMENTS 16384

/* A piece of one row: wide enough to hide the cost of a task, small enough to share out one row. */
#define EE_COLUMN_BLOCK 2048

/* Runs fn over [0, tasks), on the calling thread alone when there are few elements in all. */
static inline void ee_cpu_run(const struct ee_ctx *ctx, ee_task_fn *fn, void *arg, int64_t tasks,
                              int64_t elements) {
    if (tasks > 0 && elements < EE_SERIAL_ELEMENTS)
        fn(arg, 0, tasks, 0);
    else
        ee_pool_run(ctx->pool, fn, arg, tasks);
}

/* The rows of a tensor of rank 1 to 3, numbered over all but the last dimension. */
static inline int64_t ee_row_count(const struct ee_tensor *t) {
    int64_t rows = 1;
    for (int i = 0; i < t->ndim - 1; i++)
        rows *= t->shape[i];
    return rows;
}

static inline int64_t ee_row_width(const struct ee_tensor *t) {
    return t->shape[t->ndim - 1];
}

/* Row `r` of a float32 tensor of rank 1 to 3. */
static inline float *ee_row(const struct ee_tensor *t, int64_t r) {
    float *data = t->data;
    if (t->ndim == 3)
        return data + (r / t->shape[1]) * t->stride[0] + (r % t->shape[1]) * t->stride[1];
    return t->ndim == 2 ? data + r * t->stride[0] : data;
}

#endif
