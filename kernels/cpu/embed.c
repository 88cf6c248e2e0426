#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/check.h"

struct embed_args {
    const struct ee_tensor *x;
    const struct ee_weight *wte;
    const struct ee_tensor *wpe; /* or NULL */
    const int32_t *token, *position;
    float scale;
};

/* Row `r` of a weight in panels, whose elements lie EE_PANEL apart, times scale. */
static void gather_panel_row(float *x, const struct ee_weight *w, int64_t r, float scale) {
    const int64_t start = r / EE_PANEL * w->cols * EE_PANEL + r % EE_PANEL;
    if (w->dtype == EE_F32) {
        const float *from = (const float *)w->data + start;
        for (int64_t c = 0; c < w->cols; c++)
            x[c] = scale * from[c * EE_PANEL];
        return;
    }
    const uint16_t *from = (const uint16_t *)w->data + start;
    for (int64_t c = 0; c < w->cols; c++) {
        uint32_t bits = (uint32_t)from[c * EE_PANEL] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        x[c] = scale * value;
    }
}

static void embed_rows(void *arg, int64_t first, int64_t last, int thread) {
    const struct embed_args *a = arg;
    (void)thread;
    const int64_t n = a->wte->cols;
    for (int64_t r = first; r < last; r++) {
        float *x = ee_row(a->x, r);
        if (a->wte->layout == EE_LAYOUT_PANELS) {
            gather_panel_row(x, a->wte, a->token[r], a->scale);
        } else {
            const float *from = (const float *)a->wte->data + a->token[r] * n;
            for (int64_t c = 0; c < n; c++)
                x[c] = a->scale * from[c];
        }
        if (a->wpe) {
            const float *from = ee_row(a->wpe, a->position[r]);
            for (int64_t c = 0; c < n; c++)
                x[c] += from[c];
        }
    }
}

enum ee_status EE_KERNEL(embed)(struct ee_ctx *ctx, const struct ee_tensor *x,
                                const struct ee_weight *wte, const struct ee_tensor *wpe,
                                const int32_t *token, const int32_t *position, float scale) {
    const int64_t rows = x->shape[0];
    const int32_t last_token = (int32_t)ee_min(wte->rows - 1, INT32_MAX);
    if (!ee_indices_fit(token, rows, 0, last_token))
        return ee_fail_indices("embed", "token", token, rows, 0, last_token);
    if (wpe) {
        const int32_t last_position = (int32_t)ee_min(wpe->shape[0] - 1, INT32_MAX);
        if (!ee_indices_fit(position, rows, 0, last_position))
            return ee_fail_indices("embed", "position", position, rows, 0, last_position);
    }
    struct embed_args a = {x, wte, wpe, token, position, scale};
    ee_cpu_run(ctx, embed_rows, &a, rows, ee_tensor_elements(x));
    return EE_OK;
}

struct embed_backward_args {
    const struct ee_tensor *dwte, *dwpe, *dx;
    const int32_t *token, *position;
    float scale;
};

/* Each task owns 16 columns of the tables, so that no two threads add to one element. */
static void embed_backward_columns(void *arg, int64_t first, int64_t last, int thread) {
    const struct embed_backward_args *a = arg;
    (void)thread;
    const int64_t begin = 16 * first, end = ee_min(16 * last, a->dx->shape[1]);
    for (int64_t r = 0; r < a->dx->shape[0]; r++) {
        const float *from = ee_row(a->dx, r);
        float *to = ee_row(a->dwte, a->token[r]);
        for (int64_t c = begin; c < end; c++)
            to[c] += a->scale * from[c];
        if (!a->dwpe)
            continue;
        to = ee_row(a->dwpe, a->position[r]);
        for (int64_t c = begin; c < end; c++)
            to[c] += from[c];
    }
}

enum ee_status EE_KERNEL(embed_backward)(struct ee_ctx *ctx, const struct ee_tensor *acc_dwte,
                                         const struct ee_tensor *acc_dwpe,
                                         const struct ee_tensor *dx, const int32_t *token,
                                         const int32_t *position, float scale) {
    struct embed_backward_args a = {acc_dwte, acc_dwpe, dx, token, position, scale};
    ee_cpu_run(ctx, embed_backward_columns, &a, ee_ceil_div(dx->shape[1], 16),
               ee_tensor_elements(dx));
    return EE_OK;
}
