#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/ctx.h"

struct norm_args {
    const struct ee_tensor *y, *x;
    float *mean, *rstd; /* or NULL */
    const float *weight, *bias;
    struct ee_norm_params params;
};

static float row_sum(const float *x, int64_t n) {
    v16 sum = v16_set(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        sum = v16_add(sum, v16_load(x + i));
    if (i < n)
        sum = v16_add(sum, v16_load_n(x + i, (int)(n - i)));
    return v16_sum(sum);
}

/* `center` in the lanes below n, else 0: what is subtracted from a partly filled vector. */
static inline v16 center_n(float center, int n) {
    float lanes[16];
    v16_store(lanes, v16_set(center));
    return v16_load_n(lanes, n);
}

static float row_sum_squares(const float *x, int64_t n, float center) {
    v16 sum = v16_set(0.0f);
    const v16 c = v16_set(center);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 d = v16_sub(v16_load(x + i), c);
        sum = v16_fma(d, d, sum);
    }
    if (i < n) {
        v16 d = v16_sub(v16_load_n(x + i, (int)(n - i)), center_n(center, (int)(n - i)));
        sum = v16_fma(d, d, sum);
    }
    return v16_sum(sum);
}

static inline v16 normalize(v16 x, v16 mean, v16 rstd, v16 factor, v16 bias) {
    return v16_fma(v16_mul(v16_sub(x, mean), rstd), factor, bias);
}

static void norm_row(const struct norm_args *a, float *y, const float *x, int64_t n, float mean,
                     float rstd) {
    const v16 m = v16_set(mean), s = v16_set(rstd), offset = v16_set(a->params.weight_offset);
    const v16 none = v16_set(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 factor = v16_add(v16_load(a->weight + i), offset);
        v16 bias = a->bias ? v16_load(a->bias + i) : none;
        v16_store(y + i, normalize(v16_load(x + i), m, s, factor, bias));
    }
    if (i < n) {
        int rest = (int)(n - i);
        v16 factor = v16_add(v16_load_n(a->weight + i, rest), offset);
        v16 bias = a->bias ? v16_load_n(a->bias + i, rest) : none;
        v16_store_n(y + i, normalize(v16_load_n(x + i, rest), m, s, factor, bias), rest);
    }
}

static void norm_rows(void *arg, int64_t first, int64_t last, int thread) {
    const struct norm_args *a = arg;
    (void)thread;
    const int64_t n = ee_row_width(a->x);
    for (int64_t r = first; r < last; r++) {
        const float *x = ee_row(a->x, r);
        float mean = a->params.kind == EE_LAYERNORM ? row_sum(x, n) / (float)n : 0.0f;
        float rstd = 1.0f / sqrtf(row_sum_squares(x, n, mean) / (float)n + a->params.eps);
        norm_row(a, ee_row(a->y, r), x, n, mean, rstd);
        if (a->mean)
            a->mean[r] = mean;
        if (a->rstd)
            a->rstd[r] = rstd;
    }
}

enum ee_status EE_KERNEL(norm)(struct ee_ctx *ctx, const struct ee_tensor *y,
                               const struct ee_tensor *mean, const struct ee_tensor *rstd,
                               const struct ee_tensor *x, const struct ee_tensor *weight,
                               const struct ee_tensor *bias, const struct ee_norm_params *params) {
    struct norm_args a = {
        .y = y,
        .x = x,
        .mean = mean ? mean->data : NULL,
        .rstd = rstd ? rstd->data : NULL,
        .weight = weight->data,
        .bias = bias ? bias->data : NULL,
        .params = *params,
    };
    ee_cpu_run(ctx, norm_rows, &a, ee_row_count(x), ee_tensor_elements(x));
    return EE_OK;
}

/* Rows whose share of the parameters' gradients is summed before it is added to the rest: one long
 * chain of additions would lose digits. */
#define ROW_BLOCK 64

struct norm_backward_args {
    const struct ee_tensor *dx, *dy, *x;
    const float *weight, *mean, *rstd;
    /* for each thread dweight[C] and dbias[C] of a block of rows, then the same of all its rows */
    float *partial;
    bool bias;
    bool accumulate;
    struct ee_norm_params params;
};

struct norm_row_sums {
    v16 gradient, product; /* of dy * factor, and of that with the normalised row */
};

/* What one vector of a row adds to the sums over the row and to the parameters' gradients. `n` is
 * below 16 in a row's last vector only. */
static inline void backward_sums(struct norm_row_sums *sums, v16 dy, v16 normal, v16 factor,
                                 float *dweight, float *dbias, int n) {
    v16 g = v16_mul(dy, factor);
    sums->gradient = v16_add(sums->gradient, g);
    sums->product = v16_fma(g, normal, sums->product);
    if (n == 16) {
        v16_store(dweight, v16_fma(dy, normal, v16_load(dweight)));
        if (dbias)
            v16_store(dbias, v16_add(v16_load(dbias), dy));
    } else {
        v16_store_n(dweight, v16_fma(dy, normal, v16_load_n(dweight, n)), n);
        if (dbias)
            v16_store_n(dbias, v16_add(v16_load_n(dbias, n), dy), n);
    }
}

static struct norm_row_sums backward_row_sums(const struct norm_backward_args *a, const float *dy,
                                              const float *x, int64_t n, float mean, float rstd,
                                              float *dweight, float *dbias) {
    struct norm_row_sums sums = {v16_set(0.0f), v16_set(0.0f)};
    const v16 m = v16_set(mean), s = v16_set(rstd), offset = v16_set(a->params.weight_offset);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 normal = v16_mul(v16_sub(v16_load(x + i), m), s);
        v16 factor = v16_add(v16_load(a->weight + i), offset);
        backward_sums(&sums, v16_load(dy + i), normal, factor, dweight + i,
                      dbias ? dbias + i : NULL, 16);
    }
    if (i < n) {
        /* dy is 0 in the empty lanes, and so is all that is added there. */
        int rest = (int)(n - i);
        v16 normal = v16_mul(v16_sub(v16_load_n(x + i, rest), center_n(mean, rest)), s);
        v16 factor = v16_add(v16_load_n(a->weight + i, rest), offset);
        backward_sums(&sums, v16_load_n(dy + i, rest), normal, factor, dweight + i,
                      dbias ? dbias + i : NULL, rest);
    }
    return sums;
}

/* rstd * (g - mean of g - normal * mean of g * normal), with g = dy * factor */
static inline v16 input_gradient(v16 dy, v16 x, v16 factor, v16 mean, v16 rstd, v16 negative_shift,
                                 v16 negative_slope) {
    v16 normal = v16_mul(v16_sub(x, mean), rstd);
    v16 inner = v16_fma(dy, factor, negative_shift);
    return v16_mul(v16_fma(normal, negative_slope, inner), rstd);
}

static void backward_row(const struct norm_backward_args *a, float *dx, const float *dy,
                         const float *x, int64_t n, float mean, float rstd,
                         struct norm_row_sums sums) {
    const v16 m = v16_set(mean), s = v16_set(rstd), offset = v16_set(a->params.weight_offset);
    const bool centered = a->params.kind == EE_LAYERNORM;
    const v16 shift = v16_set(centered ? -(v16_sum(sums.gradient) / (float)n) : 0.0f);
    const v16 slope = v16_set(-(v16_sum(sums.product) / (float)n));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 factor = v16_add(v16_load(a->weight + i), offset);
        v16 d = input_gradient(v16_load(dy + i), v16_load(x + i), factor, m, s, shift, slope);
        v16_store(dx + i, a->accumulate ? v16_add(v16_load(dx + i), d) : d);
    }
    if (i < n) {
        int rest = (int)(n - i);
        v16 factor = v16_add(v16_load_n(a->weight + i, rest), offset);
        v16 d = input_gradient(v16_load_n(dy + i, rest), v16_load_n(x + i, rest), factor, m, s,
                               shift, slope);
        v16_store_n(dx + i, a->accumulate ? v16_add(v16_load_n(dx + i, rest), d) : d, rest);
    }
}

/* total += block; block = 0 */
static void fold(float *EE_RESTRICT total, float *EE_RESTRICT block, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        total[i] += block[i];
        block[i] = 0.0f;
    }
}

static void norm_backward_rows(void *arg, int64_t first, int64_t last, int thread) {
    const struct norm_backward_args *a = arg;
    const int64_t n = ee_row_width(a->x), sums = a->bias ? 2 * n : n;
    float *block = a->partial + 4 * n * thread, *total = block + 2 * n;
    for (int64_t r = first; r < last; r++) {
        const float *x = ee_row(a->x, r), *dy = ee_row(a->dy, r);
        float mean = a->params.kind == EE_LAYERNORM ? a->mean[r] : 0.0f;
        struct norm_row_sums row =
            backward_row_sums(a, dy, x, n, mean, a->rstd[r], block, a->bias ? block + n : NULL);
        backward_row(a, ee_row(a->dx, r), dy, x, n, mean, a->rstd[r], row);
        if ((r - first) % ROW_BLOCK == ROW_BLOCK - 1)
            fold(total, block, sums);
    }
    fold(total, block, sums);
}

enum ee_status EE_KERNEL(norm_backward)(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                        const struct ee_tensor *acc_dweight,
                                        const struct ee_tensor *acc_dbias,
                                        const struct ee_tensor *dy, const struct ee_tensor *x,
                                        const struct ee_tensor *weight,
                                        const struct ee_tensor *mean, const struct ee_tensor *rstd,
                                        const struct ee_norm_params *params, bool accumulate) {
    const int64_t n = ee_row_width(x);
    const int threads = ee_pool_threads(ctx->pool);
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    void *partial;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_take(ctx, &partial, 4 * n * threads, sizeof(float)), done);
    memset(partial, 0, (size_t)(4 * n * threads) * sizeof(float));
    struct norm_backward_args a = {
        .dx = dx,
        .dy = dy,
        .x = x,
        .weight = weight->data,
        .mean = mean->data,
        .rstd = rstd->data,
        .partial = partial,
        .bias = acc_dbias != NULL,
        .accumulate = accumulate,
        .params = *params,
    };
    ee_cpu_run(ctx, norm_backward_rows, &a, ee_row_count(x), ee_tensor_elements(x));
    for (int t = 0; t < threads; t++) {
        const float *dweight = a.partial + 4 * n * t + 2 * n, *dbias = dweight + n;
        float *to_weight = acc_dweight->data, *to_bias = acc_dbias ? acc_dbias->data : NULL;
        for (int64_t i = 0; i < n; i++)
            to_weight[i] += dweight[i];
        for (int64_t i = 0; to_bias && i < n; i++)
            to_bias[i] += dbias[i];
    }
done:
    ee_scratch_release(ctx, mark);
    return status;
}
