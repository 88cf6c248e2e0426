#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/ctx.h"

/* Elements whose squares are summed before that sum is added to the others: the order of addition
 * depends on this alone. */
#define SQUARES_BLOCK 16384

struct squares_args {
    const float *x;
    int64_t n;
    double *sums;
};

static double block_squares(const float *x, int64_t n) {
    double lane[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int l = 0; l < 16; l++) {
            double value = (double)x[i + l];
            lane[l] += value * value;
        }
    }
    for (int l = 0; i + l < n; l++)
        lane[l] += (double)x[i + l] * (double)x[i + l];
    for (int width = 8; width > 0; width /= 2) {
        for (int l = 0; l < width; l++)
            lane[l] += lane[l + width];
    }
    return lane[0];
}

static void squares_blocks(void *arg, int64_t first, int64_t last, int thread) {
    const struct squares_args *a = arg;
    (void)thread;
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * SQUARES_BLOCK;
        a->sums[b] = block_squares(a->x + start, ee_min(SQUARES_BLOCK, a->n - start));
    }
}

enum ee_status EE_KERNEL(sum_squares)(struct ee_ctx *ctx, double *sum, const struct ee_tensor *x) {
    const int64_t n = ee_tensor_elements(x), blocks = ee_ceil_div(n, SQUARES_BLOCK);
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    void *sums;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_take(ctx, &sums, blocks, sizeof(double)), done);
    struct squares_args a = {x->data, n, sums};
    ee_cpu_run(ctx, squares_blocks, &a, blocks, n);
    *sum = 0.0;
    for (int64_t b = 0; b < blocks; b++)
        *sum += a.sums[b];
done:
    ee_scratch_release(ctx, mark);
    return status;
}

struct adamw_args {
    float *p, *m, *v, *gradient;
    int64_t n;
    /* the constants of one step */
    float gradient_scale, keep, beta1, rate1, beta2, rate2, root_correction2, eps, step_size;
};

struct adamw_state {
    v16 p, m, v;
};

/* One vector, in the order of operations of torch.optim.AdamW. */
static inline struct adamw_state adamw_update(const struct adamw_args *a, struct adamw_state s,
                                              v16 g) {
    g = v16_mul(g, v16_set(a->gradient_scale));
    s.p = v16_mul(s.p, v16_set(a->keep));
    v16 difference = v16_sub(g, s.m);
    if (a->beta1 < 0.5f)
        s.m = v16_fma(difference, v16_set(-a->beta1), g);
    else
        s.m = v16_fma(difference, v16_set(a->rate1), s.m);
    s.v = v16_fma(v16_mul(g, v16_set(a->rate2)), g, v16_mul(s.v, v16_set(a->beta2)));
    v16 root = v16_div(v16_sqrt(s.v), v16_set(a->root_correction2));
    v16 change = v16_div(s.m, v16_add(root, v16_set(a->eps)));
    s.p = v16_fma(change, v16_set(-a->step_size), s.p);
    return s;
}

static void adamw_vectors(void *arg, int64_t first, int64_t last, int thread) {
    const struct adamw_args a = *(const struct adamw_args *)arg;
    (void)thread;
    const v16 zero = v16_set(0.0f);
    const int64_t end = ee_min(16 * last, a.n);
    int64_t i = 16 * first;
    for (; i + 16 <= end; i += 16) {
        struct adamw_state s = {v16_load(a.p + i), v16_load(a.m + i), v16_load(a.v + i)};
        s = adamw_update(&a, s, v16_load(a.gradient + i));
        v16_store(a.p + i, s.p);
        v16_store(a.m + i, s.m);
        v16_store(a.v + i, s.v);
        v16_store(a.gradient + i, zero);
    }
    if (i < end) {
        int rest = (int)(end - i);
        struct adamw_state s = {v16_load_n(a.p + i, rest), v16_load_n(a.m + i, rest),
                                v16_load_n(a.v + i, rest)};
        s = adamw_update(&a, s, v16_load_n(a.gradient + i, rest));
        v16_store_n(a.p + i, s.p, rest);
        v16_store_n(a.m + i, s.m, rest);
        v16_store_n(a.v + i, s.v, rest);
        v16_store_n(a.gradient + i, zero, rest);
    }
}

enum ee_status EE_KERNEL(adamw)(struct ee_ctx *ctx, const struct ee_tensor *p,
                                const struct ee_tensor *m, const struct ee_tensor *v,
                                const struct ee_tensor *gradient,
                                const struct ee_adamw_params *params) {
    const double lr = params->learning_rate, step = (double)params->step;
    const double beta1 = params->beta1, beta2 = params->beta2;
    struct adamw_args a = {
        .p = p->data,
        .m = m->data,
        .v = v->data,
        .gradient = gradient->data,
        .n = ee_tensor_elements(p),
        .gradient_scale = params->gradient_scale,
        .keep = (float)(1.0 - lr * params->weight_decay),
        .beta1 = (float)beta1,
        .rate1 = (float)(1.0 - beta1),
        .beta2 = (float)beta2,
        .rate2 = (float)(1.0 - beta2),
        .root_correction2 = (float)sqrt(1.0 - pow(beta2, step)),
        .eps = (float)params->eps,
        .step_size = (float)(lr / (1.0 - pow(beta1, step))),
    };
    ee_cpu_run(ctx, adamw_vectors, &a, ee_ceil_div(a.n, 16), a.n);
    return EE_OK;
}
