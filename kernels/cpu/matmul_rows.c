/* The matrix products of inference: rows of x by a weight packed in panels of EE_PANEL outputs.
 *
 * Every output is the sum that ops.h describes, in that order, whatever the number of rows, the
 * threads or the instruction set: a block of a panel (EE_SUM_BLOCK input features) is multiplied
 * with up to ROWS_AT_ONCE rows in registers, and added to the totals of those rows. A block stays
 * in the first-level cache, so that the weights are read from memory once for ROWS_CHUNK rows. */
#include "cpu/matmul_kernel.h"

#include "ops/ctx.h"

#define ROWS_CHUNK 96
#define PARALLEL_MIN 100000 /* multiplications from which on all threads take part; an estimate */

/* Rows of x, and vectors of 16 outputs, whose sums the registers hold. */
#if defined(EE_LEVEL_AVX512)
#    define ROWS_AT_ONCE 6
#    define VECS_AT_ONCE(rows) ((rows) > 0 ? 4 : 0)
#elif defined(EE_LEVEL_AVX2)
#    define ROWS_AT_ONCE 6
#    define VECS_AT_ONCE(rows) ((rows) == 1 ? 4 : (rows) < 4 ? 2 : 1)
#else
#    define ROWS_AT_ONCE 2
#    define VECS_AT_ONCE(rows) ((rows) > 0 ? 1 : 0)
#endif
#define PANEL_VECS (EE_PANEL / 16)

/* With 512-bit loads a single row asks for float32 weights faster than the hardware foresees: so
 * what comes this many bytes later is prefetched. 0: nothing. */
#if defined(EE_LEVEL_AVX512)
#    define AHEAD_OF_ONE 6144
#else
#    define AHEAD_OF_ONE 0
#endif

struct rows_product {
    const struct ee_tensor *y, *x, *residual;
    const struct ee_weight *w;
    const float *bias;
    int64_t panels;
};

/* A block of a panel, with some rows of x. */
struct block {
    const void *w;
    int64_t depth;
    bool begin; /* the first block of its panel: totals are set, else added to */
    const float *x;
    int64_t x_stride;
    float *total;      /* [rows][EE_PANEL] */
    const char *ahead; /* memory to prefetch, `ahead_lines` cache lines a step of depth */
    int ahead_lines;
};

ALWAYS_INLINE v16 weight_load(const void *w, int64_t i, const bool bf16) {
    return bf16 ? v16_load_bf16((const uint16_t *)w + i) : v16_load((const float *)w + i);
}

ALWAYS_INLINE void block_rows(const struct block *b, const int rows, const int vecs,
                              const bool bf16) {
    const char *ahead = b->ahead;
    for (int first = 0; first < PANEL_VECS; first += vecs) {
        v16 sum[ROWS_AT_ONCE][PANEL_VECS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++)
                sum[r][v] = v16_set(0.0f);
        for (int64_t k = 0; k < b->depth; k++) {
            v16 column[PANEL_VECS];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++)
                column[v] = weight_load(b->w, k * EE_PANEL + (first + v) * 16, bf16);
            if (b->ahead_lines > 0) /* into the second level: the first has few open misses */
                __builtin_prefetch(ahead, 0, 2);
            if (b->ahead_lines > 1)
                __builtin_prefetch(ahead + 64, 0, 2);
            if (rows == 1 && b->ahead_lines > 2) {
                __builtin_prefetch(ahead + 128, 0, 2);
                __builtin_prefetch(ahead + 192, 0, 2);
            }
            ahead += b->ahead_lines * 64;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                v16 value = v16_set(b->x[r * b->x_stride + k]);
#pragma GCC unroll 4
                for (int v = 0; v < vecs; v++)
                    sum[r][v] = v16_fma(value, column[v], sum[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                float *out = b->total + r * EE_PANEL + (first + v) * 16;
                v16_store(out, b->begin ? sum[r][v] : v16_add(v16_load(out), sum[r][v]));
            }
    }
}

/* The loop is compiled for each number of rows and both types of weights. */
#define DEFINE_BLOCK(name, rows, bf16)                                                             \
    static void name(const struct block *b) {                                                      \
        block_rows(b, rows, VECS_AT_ONCE(rows), bf16);                                             \
    }
#define DEFINE_BLOCKS(rows)                                                                        \
    DEFINE_BLOCK(block_f32_##rows, rows, false)                                                    \
    DEFINE_BLOCK(block_bf16_##rows, rows, true)
DEFINE_BLOCKS(1)
DEFINE_BLOCKS(2)
#if ROWS_AT_ONCE > 2
DEFINE_BLOCKS(3)
DEFINE_BLOCKS(4)
DEFINE_BLOCKS(5)
DEFINE_BLOCKS(6)
#endif

typedef void block_fn(const struct block *b);
static block_fn *const block_fns[2][ROWS_AT_ONCE] = {
#if ROWS_AT_ONCE > 2
    {block_f32_1, block_f32_2, block_f32_3, block_f32_4, block_f32_5, block_f32_6},
    {block_bf16_1, block_bf16_2, block_bf16_3, block_bf16_4, block_bf16_5, block_bf16_6},
#else
    {block_f32_1, block_f32_2},
    {block_bf16_1, block_bf16_2},
#endif
};

/* All groups of rows but the first find a block in the first-level cache, and memory would idle
 * meanwhile: so the first groups prefetch the next block. One group alone leaves that to the
 * hardware, if it is not one row. Returns the cache lines for a step of depth. */
static int lines_ahead(int64_t group, int64_t groups, int rows, bool bf16) {
    int passes = PANEL_VECS / VECS_AT_ONCE(rows), lines = bf16 ? 2 : 4;
    if (passes > 1) /* each skips most lines, which the hardware does not foresee */
        return group > 0 ? 0 : lines > passes ? lines / passes : 1;
    if (AHEAD_OF_ONE > 0 && groups == 1 && rows == 1 && !bf16)
        return lines;
    if (groups == 1 || group >= lines)
        return 0;
    if (bf16 || groups > 3)
        return 1;
    return groups == 2 || group == 0 ? 2 : 1;
}

/* y = total + bias + residual for the outputs of one panel. */
static void finish_row(const struct rows_product *p, int64_t row, int64_t first,
                       const float *total) {
    float *y = (float *)p->y->data + row * p->y->stride[0] + first;
    const float *residual =
        p->residual ? (const float *)p->residual->data + row * p->residual->stride[0] + first
                    : NULL;
    int left = (int)ee_min(EE_PANEL, p->w->rows - first);
    for (int i = 0; i < left; i += 16) {
        int n = left - i < 16 ? left - i : 16;
        v16 value = v16_load(total + i);
        if (p->bias)
            value = v16_add(value, v16_load_n(p->bias + first + i, n));
        if (residual)
            value = v16_add(value, v16_load_n(residual + i, n));
        v16_store_n(y + i, value, n);
    }
}

static void panel_rows(const struct rows_product *p, int64_t panel, int64_t first, int64_t last) {
    _Alignas(EE_ALIGNMENT) float total[ROWS_CHUNK * EE_PANEL];
    const int64_t cols = p->w->cols, stride = p->x->stride[0], n = last - first;
    const bool bf16 = p->w->dtype == EE_BF16;
    const size_t size = ee_dtype_size(p->w->dtype);
    const char *w = (const char *)p->w->data + (size_t)(panel * cols * EE_PANEL) * size;
    const float *x = (const float *)p->x->data + first * stride;
    const int64_t groups = ee_ceil_div(n, ROWS_AT_ONCE);
    for (int64_t k = 0; k < cols; k += EE_SUM_BLOCK) {
        struct block block = {
            .w = w, .depth = ee_min(EE_SUM_BLOCK, cols - k), .begin = k == 0, .x_stride = stride};
        w += (size_t)(block.depth * EE_PANEL) * size;
        block.ahead = AHEAD_OF_ONE > 0 && n == 1 ? (const char *)block.w + AHEAD_OF_ONE : w;
        for (int64_t g = 0, r = 0; g < groups; g++) {
            int rows = (int)((g + 1) * n / groups - r);
            block.x = x + r * stride + k;
            block.total = total + r * EE_PANEL;
            block.ahead_lines = lines_ahead(g, groups, rows, bf16);
            block_fns[bf16][rows - 1](&block);
            block.ahead += block.depth * 64 * block.ahead_lines;
            r += rows;
        }
    }
    for (int64_t r = first; r < last; r++)
        finish_row(p, r, panel * EE_PANEL, total + (r - first) * EE_PANEL);
}

/* Tasks are (chunk of rows, panel), chunks outermost. */
static void run_rows(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rows_product *p = arg;
    for (int64_t task = first; task < last; task++) {
        int64_t row = task / p->panels * ROWS_CHUNK;
        panel_rows(p, task % p->panels, row, ee_min(row + ROWS_CHUNK, p->x->shape[0]));
    }
}

enum ee_status EE_LEVEL_NAME(ee_linear_panels)(struct ee_ctx *ctx, const struct ee_tensor *y,
                                               const struct ee_tensor *x, const struct ee_weight *w,
                                               const struct ee_tensor *bias,
                                               const struct ee_tensor *residual) {
    struct rows_product p = {
        .y = y,
        .x = x,
        .residual = residual,
        .w = w,
        .bias = bias ? bias->data : NULL,
        .panels = ee_ceil_div(w->rows, EE_PANEL),
    };
    int64_t tasks = p.panels * ee_ceil_div(x->shape[0], ROWS_CHUNK);
    if ((double)x->shape[0] * (double)w->rows * (double)w->cols < PARALLEL_MIN) {
        if (tasks > 0)
            run_rows(&p, 0, tasks, 0);
    } else {
        ee_pool_run(ctx->pool, run_rows, &p, tasks);
    }
    return EE_OK;
}
