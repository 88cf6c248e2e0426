/* Packing of weights into the panels that the matrix products of inference read. */
#include "cpu/matmul_kernel.h"

#include "ops/ctx.h"

struct packing {
    const struct ee_weight *w;
    const float *rows;
};

static uint16_t bf16_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) /* NaN: keep it one */
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static void pack_panels(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct packing *p = arg;
    const int64_t cols = p->w->cols;
    for (int64_t panel = first; panel < last; panel++) {
        int64_t row = panel * EE_PANEL, start = panel * cols * EE_PANEL;
        int valid = (int)ee_min(EE_PANEL, p->w->rows - row);
        const float *source = p->rows + row * cols;
        if (p->w->dtype == EE_F32) {
            pack_across((float *)p->w->data + start, EE_PANEL, source, cols, valid, cols);
            continue;
        }
        for (int64_t c = 0; c < cols; c += EE_SUM_BLOCK) {
            float block[EE_SUM_BLOCK * EE_PANEL];
            int64_t depth = ee_min(EE_SUM_BLOCK, cols - c);
            pack_across(block, EE_PANEL, source + c, cols, valid, depth);
            uint16_t *out = (uint16_t *)p->w->data + start + c * EE_PANEL;
            for (int64_t i = 0; i < depth * EE_PANEL; i++)
                out[i] = bf16_from_float(block[i]);
        }
    }
}

enum ee_status EE_KERNEL(weight_pack)(struct ee_ctx *ctx, const struct ee_weight *w,
                                      const struct ee_tensor *rows) {
    struct packing p = {w, rows->data};
    ee_pool_run(ctx->pool, pack_panels, &p, ee_ceil_div(w->rows, EE_PANEL));
    return EE_OK;
}
