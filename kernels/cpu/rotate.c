/* Rotary positions.
 *
 * A pair becomes (x0 c - x1 s, x1 c + x0 s), with the second product rounded and the first fused
 * into the sum; the inverse negates s. */
#include "cpu/parallel.h"
#include "cpu/simd.h"

struct rotation {
    const struct ee_tensor *x;
    const int32_t *position;
    const struct ee_rope *rope;
    bool inverse;
};

/* `half` pairs (a[i], b[i]). */
static void rotate_halves(float *a, float *b, const float *cosine, const float *sine, int half,
                          v16 sign) {
    for (int i = 0; i < half; i += 16) {
        const int lanes = half - i < 16 ? half - i : 16;
        const bool full = lanes == 16;
        v16 c = full ? v16_load(cosine + i) : v16_load_n(cosine + i, lanes);
        v16 s = v16_mul(sign, full ? v16_load(sine + i) : v16_load_n(sine + i, lanes));
        v16 x0 = full ? v16_load(a + i) : v16_load_n(a + i, lanes);
        v16 x1 = full ? v16_load(b + i) : v16_load_n(b + i, lanes);
        v16 minus = v16_mul(x1, v16_mul(s, v16_set(-1.0f)));
        v16 y0 = v16_fma(x0, c, minus), y1 = v16_fma(x1, c, v16_mul(x0, s));
        if (full) {
            v16_store(a + i, y0);
            v16_store(b + i, y1);
        } else {
            v16_store_n(a + i, y0, lanes);
            v16_store_n(b + i, y1, lanes);
        }
    }
}

/* `half` pairs (x[2 i], x[2 i + 1]). */
static void rotate_pairs(float *EE_RESTRICT x, const float *EE_RESTRICT cosine,
                         const float *EE_RESTRICT sine, int half, float sign) {
    for (int i = 0; i < half; i++) {
        const float c = cosine[i], s = sign * sine[i], x0 = x[2 * i], x1 = x[2 * i + 1];
        const float minus = x1 * -s, plus = x0 * s;
        x[2 * i] = fmaf(x0, c, minus);
        x[2 * i + 1] = fmaf(x1, c, plus);
    }
}

static void rotate_rows(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rotation *job = arg;
    const struct ee_tensor *x = job->x;
    const int half = job->rope->dims / 2;
    const float sign = job->inverse ? -1.0f : 1.0f;
    for (int64_t n = first; n < last; n++) {
        const float *cosine = job->rope->cos + (int64_t)job->position[n] * half;
        const float *sine = job->rope->sin + (int64_t)job->position[n] * half;
        float *head = (float *)x->data + n * x->stride[0];
        for (int64_t h = 0; h < x->shape[1]; h++, head += x->stride[1])
            if (job->rope->interleaved)
                rotate_pairs(head, cosine, sine, half, sign);
            else
                rotate_halves(head, head + half, cosine, sine, half, v16_set(sign));
    }
}

enum ee_status EE_KERNEL(rotate)(struct ee_ctx *ctx, const struct ee_tensor *x,
                                 const int32_t *position, const struct ee_rope *rope,
                                 bool inverse) {
    struct rotation job = {.x = x, .position = position, .rope = rope, .inverse = inverse};
    ee_cpu_run(ctx, rotate_rows, &job, x->shape[0], x->shape[0] * x->shape[1] * rope->dims);
    return EE_OK;
}
