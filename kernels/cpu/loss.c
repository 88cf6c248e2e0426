#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"

/* The largest of x[0, n), and the first index that has it; NaN is passed over. When there is
 * nothing but NaN and -infinity, -infinity and 0. */
static float row_max(const float *x, int64_t n, int64_t *index) {
    enum { BLOCK = 512 };
    float best = -INFINITY;
    int64_t best_block = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = ee_min(start + BLOCK, n);
        v16 m0 = v16_set(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
        int64_t i = start;
        for (; i + 64 <= end; i += 64) {
            m0 = v16_max(v16_load(x + i), m0);
            m1 = v16_max(v16_load(x + i + 16), m1);
            m2 = v16_max(v16_load(x + i + 32), m2);
            m3 = v16_max(v16_load(x + i + 48), m3);
        }
        float m = v16_max_lane(v16_max(v16_max(m0, m1), v16_max(m2, m3)));
        for (; i < end; i++)
            m = x[i] > m ? x[i] : m;
        if (m > best) {
            best = m;
            best_block = start;
        }
    }
    if (!index)
        return best;
    int64_t i = best_block;
    while (i < n && x[i] != best)
        i++;
    *index = i < n ? i : 0;
    return best;
}

/* Lanes from n on become -infinity, whose exponential is 0. */
static inline v16 load_or_lowest(const float *x, int n) {
    float lanes[16];
    v16_store(lanes, v16_set(-INFINITY));
    memcpy(lanes, x, (size_t)n * sizeof *x);
    return v16_load(lanes);
}

/* Elements whose exponentials are added in float32, in 16 lanes and a tree; the sums of such blocks
 * are added in float64. Otherwise a large term would swallow the many small ones of its lane. */
#define SUM_BLOCK 1024

/* Sum of exp(x - max) over n <= SUM_BLOCK elements; when `out` is not NULL (it may be x) it
 * receives the terms. */
static inline float block_sum_exp(float *out, const float *x, int64_t n, float max) {
    const v16 m = v16_set(max);
    v16 sum = v16_set(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 e = v16_exp(v16_sub(v16_load(x + i), m));
        sum = v16_add(sum, e);
        if (out)
            v16_store(out + i, e);
    }
    if (i < n) {
        v16 e = v16_exp(v16_sub(load_or_lowest(x + i, (int)(n - i)), m));
        sum = v16_add(sum, e);
        if (out)
            v16_store_n(out + i, e, (int)(n - i));
    }
    return v16_sum(sum);
}

static double row_sum_exp(float *out, const float *x, int64_t n, float max) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += SUM_BLOCK)
        sum += (double)block_sum_exp(out ? out + i : NULL, x + i, ee_min(SUM_BLOCK, n - i), max);
    return sum;
}

/* log sum exp from the maximum and the sum of exp(x - max). */
static double log_sum(float max, double sum) {
    return (double)max + log(sum);
}

struct confidence_args {
    const struct ee_tensor *logits;
    int32_t *token;
    float *confidence, *lse;
};

static void confidence_rows(void *arg, int64_t first, int64_t last, int thread) {
    const struct confidence_args *a = arg;
    (void)thread;
    for (int64_t r = first; r < last; r++) {
        const float *x = ee_row(a->logits, r);
        int64_t index;
        float max = row_max(x, a->logits->shape[1], &index);
        double sum = row_sum_exp(NULL, x, a->logits->shape[1], max);
        a->token[r] = (int32_t)index;
        a->confidence[r] = (float)(1.0 / sum);
        a->lse[r] = (float)log_sum(max, sum);
    }
}

enum ee_status EE_KERNEL(confidence)(struct ee_ctx *ctx, int32_t *token,
                                     const struct ee_tensor *confidence,
                                     const struct ee_tensor *lse, const struct ee_tensor *logits) {
    struct confidence_args a = {
        .logits = logits, .token = token, .confidence = confidence->data, .lse = lse->data};
    ee_cpu_run(ctx, confidence_rows, &a, logits->shape[0], ee_tensor_elements(logits));
    return EE_OK;
}

struct cross_entropy_args {
    float *loss, *confidence;
    const struct ee_tensor *logits;
    const int32_t *target;
    const float *row_weight;
    struct ee_loss_params params;
};

/* z = cap * tanh(x / cap) / temperature */
static inline v16 scaled(v16 x, const struct ee_loss_params *params) {
    if (params->softcap > 0.0f) {
        const v16 cap = v16_set(params->softcap);
        x = v16_mul(cap, v16_tanh(v16_div(x, cap)));
    }
    return params->temperature == 1.0f ? x : v16_div(x, v16_set(params->temperature));
}

static void scale_row(float *z, const float *x, int64_t n, const struct ee_loss_params *params) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        v16_store(z + i, scaled(v16_load(x + i), params));
    if (i < n)
        v16_store_n(z + i, scaled(v16_load_n(x + i, (int)(n - i)), params), (int)(n - i));
}

/* The maximum and the sum of exponentials of a row that may not be written. */
static void scan_scaled(const float *x, int64_t n, const struct ee_loss_params *params, float *max,
                        double *sum) {
    float z[SUM_BLOCK];
    *max = -INFINITY;
    for (int64_t i = 0; i < n; i += SUM_BLOCK) {
        const int64_t count = ee_min(SUM_BLOCK, n - i);
        scale_row(z, x + i, count, params);
        float m = row_max(z, count, NULL);
        *max = m > *max ? m : *max;
    }
    *sum = 0.0;
    for (int64_t i = 0; i < n; i += SUM_BLOCK) {
        const int64_t count = ee_min(SUM_BLOCK, n - i);
        scale_row(z, x + i, count, params);
        *sum += (double)block_sum_exp(NULL, z, count, *max);
    }
}

/* d z / d x * temperature = 1 - tanh^2, from z = cap * tanh / temperature */
static inline v16 cap_slope(v16 z, const struct ee_loss_params *params) {
    v16 t = v16_mul(z, v16_set(params->temperature / params->softcap));
    return v16_fma(t, v16_sub(v16_set(0.0f), t), v16_set(1.0f));
}

/* x holds z on entry and receives exp(z - max) * factor * (1 - tanh^2). */
static void capped_gradient(float *x, int64_t n, float max, float factor,
                            const struct ee_loss_params *params) {
    const v16 m = v16_set(max), f = v16_set(factor);
    for (int64_t i = 0; i < n; i += 16) {
        const int count = (int)ee_min(16, n - i);
        v16 z = count == 16 ? v16_load(x + i) : v16_load_n(x + i, count);
        v16 g = v16_mul(v16_exp(v16_sub(z, m)), f);
        g = v16_mul(g, cap_slope(z, params));
        if (count == 16)
            v16_store(x + i, g);
        else
            v16_store_n(x + i, g, count);
    }
}

static float first_lane(v16 a) {
    float lanes[16];
    v16_store(lanes, a);
    return lanes[0];
}

/* The gradient in place of what the forward part left in the row: the exponentials, or z where
 * there is a softcap. */
static void row_gradient(float *x, int64_t n, int32_t target, float z_target, float max, double sum,
                         float weight, const struct ee_loss_params *params) {
    const float factor = (float)((double)weight / sum);
    if (params->softcap > 0.0f) {
        capped_gradient(x, n, max, factor, params);
        x[target] -= weight * first_lane(cap_slope(v16_set(z_target), params));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor;
    x[target] -= weight;
}

static void cross_entropy_row(const struct cross_entropy_args *a, int64_t r) {
    const struct ee_loss_params *params = &a->params;
    const int64_t n = a->logits->shape[1];
    float *x = ee_row(a->logits, r);
    const int32_t target = a->target[r];
    if (target < 0) {
        a->loss[r] = 0.0f;
        a->confidence[r] = 0.0f;
        if (params->gradient)
            memset(x, 0, (size_t)n * sizeof *x);
        return;
    }
    const bool capped = params->softcap > 0.0f;
    const bool raw = !capped && params->temperature == 1.0f;
    const float z_target = raw ? x[target] : first_lane(scaled(v16_set(x[target]), params));
    float max;
    double sum;
    if (raw || params->gradient) {
        if (!raw)
            scale_row(x, x, n, params);
        max = row_max(x, n, NULL);
        sum = row_sum_exp(params->gradient && !capped ? x : NULL, x, n, max);
    } else {
        scan_scaled(x, n, params, &max, &sum);
    }
    const float confidence = (float)(1.0 / sum);
    a->loss[r] = (float)(log_sum(max, sum) - (double)z_target);
    a->confidence[r] = confidence;
    if (params->gradient) {
        float weight = a->row_weight[r] * (params->dynamic ? confidence : 1.0f);
        row_gradient(x, n, target, z_target, max, sum, weight / params->temperature, params);
    }
}

static void cross_entropy_rows(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    for (int64_t r = first; r < last; r++)
        cross_entropy_row(arg, r);
}

enum ee_status EE_KERNEL(cross_entropy)(struct ee_ctx *ctx, const struct ee_tensor *loss,
                                        const struct ee_tensor *confidence,
                                        const struct ee_tensor *logits, const int32_t *target,
                                        const struct ee_tensor *row_weight,
                                        const struct ee_loss_params *params) {
    struct cross_entropy_args a = {
        .loss = loss->data,
        .confidence = confidence->data,
        .logits = logits,
        .target = target,
        .row_weight = row_weight->data,
        .params = *params,
    };
    ee_cpu_run(ctx, cross_entropy_rows, &a, logits->shape[0], ee_tensor_elements(logits));
    return EE_OK;
}
