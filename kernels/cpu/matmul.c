/* The matrix products of training: C = A B with A and B in any of the four forms of transposition,
 * after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
 *
 * The sum over k is cut into blocks of at most DEPTH_BLOCK. In each, the operand with the shorter
 * side is packed once by all threads together (shared; when it is small, by each for itself), and
 * every thread packs its own part of the other (private) in pieces that stay in its second-level
 * cache, and multiplies. The partition is a function of the shape and the number of threads alone,
 * and no sum is split among threads. */
#include "cpu/matmul_kernel.h"

#include "ops/ctx.h"

/* Depth and piece: measured with one thread on Zen 4 (512 to 1,024 deep differ little, 256 is
 * slower). The last two are estimates from the cost of packing and of waking a thread. */
#define DEPTH_BLOCK 768
#define PRIVATE_BYTES ((int64_t)512 << 10)
#define SHARED_BYTES ((int64_t)8 << 20)
#define PARALLEL_MIN 300000 /* multiplications from which on all threads take part */
#define COPY_MAX 32768      /* elements up to which each thread packs the shared side for itself */

/* One side of a product: `count` rows of A or columns of B, each a vector over depth. */
struct operand {
    const float *data;
    int64_t stride;
    bool along; /* element (i, k) at data[k * stride + i], else at data[i * stride + k] */
    int64_t count;
    int width;   /* of a panel */
    float *sums; /* += the sum over depth of each vector, or NULL */
};

struct product {
    struct ee_pool *pool;
    int threads;
    struct operand side[2]; /* A, B */
    int shared;             /* which of them all threads pack together */
    bool copies;            /* rather, each packs all of it */
    int64_t depth;
    int64_t depth_block;
    int64_t shared_block; /* panels of the shared side that are packed at a time */
    int64_t private_block;
    float *c;
    int64_t c_stride;
    const float *init; /* added at the first block of depth: c itself or a residual, or NULL */
    int64_t init_stride;
    const float *bias;
    float *shared_panels[2]; /* used in turns, so that one barrier a block is enough; with copies
                                each thread has its own */
    int64_t shared_size;     /* elements of one of them */
    float *private_panels;   /* of all threads */
};

/* A range of panels. */
struct range {
    int64_t first, last;
};

static int64_t panel_count(const struct operand *side) {
    return ee_ceil_div(side->count, side->width);
}

static struct range share(struct range all, int part, int parts) {
    int64_t n = all.last - all.first;
    return (struct range){all.first + part * n / parts, all.first + (part + 1) * n / parts};
}

/* Depths packed before the next panel: their rows stay in the cache and in the page tables, and
 * they are a block of a sum over depth (one long running sum would round worse). */
#define ALONG_BLOCK 32

static void pack_panels_along(const struct operand *side, struct range panels, int64_t k,
                              int64_t depth, float *out, float *sums) {
    const int width = side->width;
    for (int64_t d = 0; d < depth; d += ALONG_BLOCK)
        for (int64_t p = panels.first; p < panels.last; p++) {
            float aside[TILE_ROWS > TILE_COLS ? TILE_ROWS : TILE_COLS] = {0};
            pack_along(out + (p - panels.first) * width * depth + d * width, width,
                       side->data + (k + d) * side->stride + p * width, side->stride,
                       (int)ee_min(width, side->count - p * width), ee_min(ALONG_BLOCK, depth - d),
                       aside);
            if (sums)
                for (int r = 0; r < width; r++)
                    sums[(p - panels.first) * width + r] += aside[r];
        }
}

/* Packs panels for the depths from k on; the first stands at `out`. */
static void pack(const struct operand *side, struct range panels, int64_t k, int64_t depth,
                 bool with_sums, float *out) {
    const int width = side->width;
    if (!side->along) {
        for (int64_t p = panels.first; p < panels.last; p++)
            pack_across(out + (p - panels.first) * width * depth, width,
                        side->data + p * width * side->stride + k, side->stride,
                        (int)ee_min(width, side->count - p * width), depth);
        return;
    }
    /* A few panels at a time, whose sums stand here until they meet the old values. */
    enum { AT_ONCE = 16 };
    for (int64_t p = panels.first; p < panels.last; p += AT_ONCE) {
        struct range some = {p, ee_min(p + AT_ONCE, panels.last)};
        float sums[AT_ONCE * (TILE_ROWS > TILE_COLS ? TILE_ROWS : TILE_COLS)] = {0};
        bool summed = side->sums && with_sums;
        pack_panels_along(side, some, k, depth, out + (p - panels.first) * width * depth,
                          summed ? sums : NULL);
        for (int64_t i = p * width; summed && i < ee_min(some.last * width, side->count); i++)
            side->sums[i] += sums[i - p * width];
    }
}

/* Multiplies panels of A (the first of `rows` at a) by panels of B (the first of `cols` at b). */
static void multiply(const struct product *p, struct range rows, const float *a, struct range cols,
                     const float *b, int64_t k, int64_t depth) {
    const struct operand *sa = &p->side[0], *sb = &p->side[1];
    bool begin = k == 0;
    bool rows_inner = p->shared == 1; /* the private side is the one that stays in cache */
    int64_t outer = rows_inner ? cols.last - cols.first : rows.last - rows.first;
    int64_t inner = rows_inner ? rows.last - rows.first : cols.last - cols.first;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t n = 0; n < inner; n++) {
            int64_t pi = rows_inner ? n : o, pj = rows_inner ? o : n;
            int64_t i = (rows.first + pi) * TILE_ROWS, j = (cols.first + pj) * TILE_COLS;
            const float *init = begin ? p->init : p->c;
            int64_t init_stride = begin ? p->init_stride : p->c_stride;
            struct tile tile = {
                .a = a + pi * TILE_ROWS * depth,
                .b = b + pj * TILE_COLS * depth,
                .depth = depth,
                .c = p->c + i * p->c_stride + j,
                .c_stride = p->c_stride,
                .init = init ? init + i * init_stride + j : NULL,
                .init_stride = init_stride,
                .bias = begin && p->bias ? p->bias + j : NULL,
            };
            tile_run(&tile, (int)ee_min(TILE_ROWS, sa->count - i),
                     (int)ee_min(TILE_COLS, sb->count - j));
        }
}

/* One thread's part of one block: packs its private panels piece by piece and multiplies. */
static void run_block(const struct product *p, struct range shared, const float *shared_panels,
                      struct range private, int64_t k, int64_t depth, bool with_sums, int thread) {
    const struct operand *side = &p->side[1 - p->shared];
    float *panels = p->private_panels + thread * p->private_block * side->width * p->depth_block;
    for (int64_t first = private.first; first < private.last; first += p->private_block) {
        struct range piece = {first, ee_min(first + p->private_block, private.last)};
        pack(side, piece, k, depth, with_sums, panels);
        if (p->shared == 0)
            multiply(p, shared, shared_panels, piece, panels, k, depth);
        else
            multiply(p, piece, panels, shared, shared_panels, k, depth);
    }
}

static void run_product(void *arg, int64_t first, int64_t last, int thread) {
    (void)first, (void)last;
    const struct product *p = arg;
    const struct operand *shared = &p->side[p->shared], *private = &p->side[1 - p->shared];
    struct range mine = share((struct range){0, panel_count(private)}, thread, p->threads);
    int turn = 0;
    for (int64_t k = 0; k < p->depth; k += p->depth_block)
        for (int64_t s = 0; s < panel_count(shared); s += p->shared_block) {
            struct range block = {s, ee_min(s + p->shared_block, panel_count(shared))};
            struct range part = p->copies ? block : share(block, thread, p->threads);
            int64_t depth = ee_min(p->depth_block, p->depth - k);
            float *panels = p->shared_panels[turn] + (p->copies ? thread * p->shared_size : 0);
            turn = p->copies ? 0 : 1 - turn;
            pack(shared, part, k, depth, !p->copies || thread == 0,
                 panels + (part.first - s) * shared->width * depth);
            if (p->threads > 1 && !p->copies)
                ee_pool_barrier(p->pool);
            run_block(p, block, panels, mine, k, depth, s == 0, thread);
        }
}

/* Takes the memory for panels. */
static enum ee_status take_panels(struct ee_ctx *ctx, struct product *p) {
    void *memory;
    p->shared_size = p->shared_block * p->side[p->shared].width * p->depth_block;
    int64_t buffers = p->copies ? p->threads : 1;
    for (int i = 0; i < (p->copies || p->threads == 1 ? 1 : 2); i++) {
        EE_TRY(ee_scratch_take(ctx, &memory, p->shared_size * buffers, sizeof(float)));
        p->shared_panels[i] = memory;
    }
    if (p->threads == 1)
        p->shared_panels[1] = p->shared_panels[0];
    int64_t size = p->private_block * p->side[1 - p->shared].width * p->depth_block;
    EE_TRY(ee_scratch_take(ctx, &memory, size * p->threads, sizeof(float)));
    p->private_panels = memory;
    return EE_OK;
}

/* Chooses the blocks and the partition. */
static void plan(struct product *p, int threads) {
    const struct operand *a = &p->side[0], *b = &p->side[1];
    double work = (double)a->count * (double)b->count * (double)p->depth;
    p->threads = work < PARALLEL_MIN ? 1 : threads;
    p->shared = b->count >= a->count ? 0 : 1;
    const struct operand *shared = &p->side[p->shared], *private = &p->side[1 - p->shared];
    int64_t blocks = ee_ceil_div(p->depth, DEPTH_BLOCK);
    p->depth_block = ee_ceil_div(ee_ceil_div(p->depth, blocks), 16) * 16;
    int64_t size = p->depth_block * (int64_t)sizeof(float);
    p->shared_block = ee_max(1, ee_min(panel_count(shared), SHARED_BYTES / (size * shared->width)));
    p->private_block = ee_max(1, ee_min(ee_ceil_div(panel_count(private), p->threads),
                                        PRIVATE_BYTES / (size * private->width)));
    p->copies = p->threads > 1 && shared->count * p->depth <= COPY_MAX;
}

static enum ee_status run(struct ee_ctx *ctx, struct product *p) {
    if (p->side[0].count == 0 || p->side[1].count == 0 || p->depth == 0)
        return EE_OK;
    p->side[0].width = TILE_ROWS;
    p->side[1].width = TILE_COLS;
    p->pool = ctx->pool;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    plan(p, ee_pool_threads(ctx->pool));
    enum ee_status status = take_panels(ctx, p);
    if (status == EE_OK) {
        if (p->threads > 1)
            ee_pool_run(ctx->pool, run_product, p, p->threads);
        else
            run_product(p, 0, 1, 0);
    }
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status EE_KERNEL(linear)(struct ee_ctx *ctx, const struct ee_tensor *y,
                                 const struct ee_tensor *x, const struct ee_weight *w,
                                 const struct ee_tensor *bias, const struct ee_tensor *residual) {
    if (w->layout == EE_LAYOUT_PANELS)
        return EE_LEVEL_NAME(ee_linear_panels)(ctx, y, x, w, bias, residual);
    struct product p = {
        .side = {{.data = x->data, .stride = x->stride[0], .count = x->shape[0]},
                 {.data = w->data, .stride = w->cols, .count = w->rows}},
        .depth = w->cols,
        .c = y->data,
        .c_stride = y->stride[0],
        .init = residual ? residual->data : NULL,
        .init_stride = residual ? residual->stride[0] : 0,
        .bias = bias ? bias->data : NULL,
    };
    return run(ctx, &p);
}

enum ee_status EE_KERNEL(linear_backward_input)(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                                const struct ee_tensor *dy,
                                                const struct ee_weight *w, bool accumulate) {
    struct product p = {
        .side = {{.data = dy->data, .stride = dy->stride[0], .count = dy->shape[0]},
                 {.data = w->data, .stride = w->cols, .along = true, .count = w->cols}},
        .depth = w->rows,
        .c = dx->data,
        .c_stride = dx->stride[0],
        .init = accumulate ? dx->data : NULL,
        .init_stride = dx->stride[0],
    };
    return run(ctx, &p);
}

enum ee_status EE_KERNEL(linear_backward_weight)(struct ee_ctx *ctx, const struct ee_tensor *acc_dw,
                                                 const struct ee_tensor *acc_db,
                                                 const struct ee_tensor *dy,
                                                 const struct ee_tensor *x) {
    int64_t outputs = acc_dw->shape[0], inputs = acc_dw->shape[1];
    struct product p = {
        .side = {{.data = dy->data,
                  .stride = dy->stride[0],
                  .along = true,
                  .count = outputs,
                  .sums = acc_db ? acc_db->data : NULL},
                 {.data = x->data, .stride = x->stride[0], .along = true, .count = inputs}},
        .depth = dy->shape[0],
        .c = acc_dw->data,
        .c_stride = inputs,
        .init = acc_dw->data,
        .init_stride = inputs,
    };
    return run(ctx, &p);
}
