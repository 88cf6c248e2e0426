/* Packing of weights into the panels that the matrix products of inference read. */
#include "cpu/half.h"
#include "cpu/matmul_kernel.h"
#include "cpu/parallel.h"

/* A piece of a panel: some input features of all its outputs, small enough for the first-level
 * cache. */
#define DEPTH 64
#define PIECE (DEPTH * EE_PANEL)

struct packing {
    const struct ee_weight *w;
    const struct ee_tensor *source;
    int64_t first_row;
};

/* Outputs [lane, lane + count) of a panel, from row `row` of the source on. */
struct part {
    int64_t panel, row;
    int lane, count;
};

static void widen(float *out, const struct ee_tensor *source, int64_t start, int64_t count) {
    const uint16_t *in = (const uint16_t *)source->data + start;
    if (source->dtype == EE_F32)
        memcpy(out, (const float *)source->data + start, (size_t)count * sizeof *out);
    else if (source->dtype == EE_BF16)
        for (int64_t i = 0; i < count; i++)
            out[i] = from_bf16(in[i]);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = from_f16(in[i]);
}

/* piece[k * EE_PANEL + r] = source[row + r, c + k] for r < part->count, else 0. */
static void take_piece(float *piece, const struct ee_tensor *source, const struct part *part,
                       int64_t c, int64_t depth) {
    int64_t stride = source->stride[0];
    if (source->stride[1] != 1) {
        for (int64_t k = 0; k < depth; k++) {
            float *out = piece + k * EE_PANEL;
            widen(out, source, (c + k) * source->stride[1] + part->row, part->count);
            memset(out + part->count, 0, (size_t)(EE_PANEL - part->count) * sizeof *out);
        }
        return;
    }
    int64_t start = part->row * stride + c;
    if (source->dtype == EE_F32) {
        const float *rows = (const float *)source->data + start;
        pack_across(piece, EE_PANEL, rows, stride, part->count, depth);
        return;
    }
    float rows[PIECE];
    for (int r = 0; r < part->count; r++) {
        /* of the next piece: a step from row to row is too long for the hardware to foresee */
        const uint16_t *next = (const uint16_t *)source->data + start + r * stride + DEPTH;
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + DEPTH / 2, 0, 2);
        widen(rows + r * DEPTH, source, start + r * stride, depth);
    }
    pack_across(piece, EE_PANEL, rows, DEPTH, part->count, depth);
}

/* bfloat16 passes through float32 with all its bits, so it is cut, which keeps every NaN. */
static void narrow(uint16_t *out, const float *in, int64_t count, bool exact) {
    if (exact)
        for (int64_t i = 0; i < count; i++)
            out[i] = (uint16_t)(bits_of(in[i]) >> 16);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = to_bf16(in[i]);
}

/* The last part of a weight is stored with the zeros that fill its panel. */
static void store_piece(const struct packing *p, const float *piece, const struct part *part,
                        int64_t c, int64_t depth) {
    bool last = part->panel * EE_PANEL + part->lane + part->count == p->w->rows;
    int64_t count = last ? EE_PANEL - part->lane : part->count, times = depth;
    int64_t at = (part->panel * p->w->cols + c) * EE_PANEL + part->lane;
    if (count == EE_PANEL) {
        count *= depth;
        times = 1;
    }
    for (int64_t k = 0; k < times; k++, at += EE_PANEL, piece += EE_PANEL) {
        if (p->w->dtype == EE_F32)
            memcpy((float *)p->w->data + at, piece, (size_t)count * sizeof *piece);
        else
            narrow((uint16_t *)p->w->data + at, piece, count, p->source->dtype == EE_BF16);
    }
}

static void pack_panels(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct packing *p = arg;
    const int64_t end = p->first_row + p->source->shape[0], cols = p->w->cols;
    for (int64_t i = first; i < last; i++) {
        struct part part = {.panel = p->first_row / EE_PANEL + i};
        int64_t from = ee_max(part.panel * EE_PANEL, p->first_row);
        part.row = from - p->first_row;
        part.lane = (int)(from - part.panel * EE_PANEL);
        part.count = (int)(ee_min((part.panel + 1) * EE_PANEL, end) - from);
        for (int64_t c = 0; c < cols; c += DEPTH) {
            float piece[PIECE];
            int64_t depth = ee_min(DEPTH, cols - c);
            take_piece(piece, p->source, &part, c, depth);
            store_piece(p, piece, &part, c, depth);
        }
    }
}

enum ee_status EE_KERNEL(weight_pack)(struct ee_ctx *ctx, const struct ee_weight *w,
                                      const struct ee_tensor *rows, int64_t first_row) {
    struct packing p = {w, rows, first_row};
    int64_t panels = ee_ceil_div(first_row + rows->shape[0], EE_PANEL) - first_row / EE_PANEL;
    ee_cpu_run(ctx, pack_panels, &p, panels, rows->shape[0] * w->cols);
    return EE_OK;
}
