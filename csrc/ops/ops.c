/* The public operations: each checks its arguments once and calls the backend. Rows of zero length
 * are refused, zero rows are no work. */
#include "ops/check.h"

#include <limits.h>
#include <math.h>

/* A row of the key within its segment has this many bits in the channel of attention's dropout. */
#define DROPOUT_KEY_BITS 24

/* -- Matrix products -- */

static enum ee_status check_weight(const char *op, const struct ee_weight *w, const char *name,
                                   bool panels_allowed) {
    if (!w || !w->data)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must not be NULL", op, name);
    if (w->rows < 1 || w->cols < 1)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must have rows and columns, got [%lld, %lld]", op, name,
                (long long)w->rows, (long long)w->cols);
    if (w->layout == EE_LAYOUT_ROWS && w->dtype == EE_F32)
        return EE_OK;
    if (!panels_allowed)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must be a float32 weight of plain rows", op, name);
    if (w->layout == EE_LAYOUT_PANELS && (w->dtype == EE_F32 || w->dtype == EE_BF16))
        return EE_OK;
    EE_FAIL(EE_ERR_INVALID,
            "%s: %s must be plain rows of float32, or panels of float32 or bfloat16, got %s of %s",
            op, name, w->layout == EE_LAYOUT_ROWS ? "plain rows" : "panels",
            ee_dtype_name(w->dtype));
}

#define CHECK_WEIGHT(w, panels_allowed) EE_TRY(check_weight(__func__ + 3, w, #w, panels_allowed))

enum ee_status ee_linear(struct ee_ctx *ctx, const struct ee_tensor *y, const struct ee_tensor *x,
                         const struct ee_weight *w, const struct ee_tensor *bias,
                         const struct ee_tensor *residual) {
    CHECK_WEIGHT(w, true);
    EE_CHECK_TENSOR(x, "N, K", EE_ANY, w->cols);
    int64_t N = x->shape[0];
    EE_CHECK_TENSOR(y, "N, M", N, w->rows);
    EE_CHECK_OPTIONAL(bias, "M", w->rows);
    EE_CHECK_OPTIONAL(residual, "N, M", N, w->rows);
    if (N == 0)
        return EE_OK;
    EE_CHECK_APART(y, x);
    if (residual)
        EE_CHECK_IN_PLACE(y, residual);
    return ctx->ops->linear(ctx, y, x, w, bias, residual);
}

enum ee_status ee_linear_backward_input(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                        const struct ee_tensor *dy, const struct ee_weight *w,
                                        bool accumulate) {
    CHECK_WEIGHT(w, false);
    EE_CHECK_TENSOR(dy, "N, M", EE_ANY, w->rows);
    EE_CHECK_TENSOR(dx, "N, K", dy->shape[0], w->cols);
    if (dy->shape[0] == 0)
        return EE_OK;
    EE_CHECK_APART(dx, dy);
    return ctx->ops->linear_backward_input(ctx, dx, dy, w, accumulate);
}

enum ee_status ee_linear_backward_weight(struct ee_ctx *ctx, const struct ee_tensor *acc_dw,
                                         const struct ee_tensor *acc_db, const struct ee_tensor *dy,
                                         const struct ee_tensor *x) {
    EE_CHECK_TENSOR(dy, "N, M", EE_ANY, EE_ANY);
    EE_CHECK_TENSOR(x, "N, K", dy->shape[0], EE_ANY);
    EE_CHECK_TENSOR(acc_dw, "M, K", dy->shape[1], x->shape[1]);
    EE_CHECK_FLAT(acc_dw);
    EE_CHECK_OPTIONAL(acc_db, "M", dy->shape[1]);
    if (dy->shape[0] == 0)
        return EE_OK;
    return ctx->ops->linear_backward_weight(ctx, acc_dw, acc_db, dy, x);
}

/* Sets `out` to `rows` with a stride of 1 along rows or along columns. */
static enum ee_status check_source(struct ee_tensor *out, const struct ee_tensor *rows,
                                   int64_t cols) {
    const char *op = "weight_pack";
    if (!rows || rows->ndim != 2 || rows->shape[1] != cols || rows->shape[0] < 0)
        return ee_fail_tensor(op, "rows", rows, "N, K", 2, (const int64_t[]){EE_ANY, cols});
    if (rows->dtype != EE_F32 && rows->dtype != EE_F16 && rows->dtype != EE_BF16)
        EE_FAIL(EE_ERR_INVALID, "%s: rows must be float32, float16 or bfloat16, got %s", op,
                ee_dtype_name(rows->dtype));
    *out = *rows;
    if (ee_layout_fits(rows, 2, rows->shape)) {
        out->stride[1] = 1;
        return EE_OK;
    }
    struct ee_tensor across = *rows;
    for (int i = 0; i < 2; i++) {
        across.shape[i] = rows->shape[1 - i];
        across.stride[i] = rows->stride[1 - i];
    }
    out->stride[0] = 1;
    if (ee_layout_fits(&across, 2, across.shape))
        return EE_OK;
    EE_FAIL(EE_ERR_INVALID,
            "%s: rows must have data, contiguous rows or columns, and none that overlap, got "
            "strides of %lld and %lld",
            op, (long long)rows->stride[0], (long long)rows->stride[1]);
}

enum ee_status ee_weight_pack(struct ee_ctx *ctx, const struct ee_weight *w,
                              const struct ee_tensor *rows, int64_t first_row) {
    CHECK_WEIGHT(w, true);
    EE_CHECK(w->layout == EE_LAYOUT_PANELS, "w must have the layout panels, got %s", "plain rows");
    struct ee_tensor source;
    EE_TRY(check_source(&source, rows, w->cols));
    EE_CHECK(first_row >= 0 && first_row <= w->rows && rows->shape[0] <= w->rows - first_row,
             "rows must lie within the %lld of w, got %lld from %lld on", (long long)w->rows,
             (long long)rows->shape[0], (long long)first_row);
    EE_CHECK(w->data != rows->data, "%s and %s must not be the same memory", "w", "rows");
    if (rows->shape[0] == 0)
        return EE_OK;
    return ctx->ops->weight_pack(ctx, w, &source, first_row);
}

/* -- Norms -- */

static enum ee_status check_norm_params(const char *op, const struct ee_norm_params *params) {
    if (!params)
        EE_FAIL(EE_ERR_INVALID, "%s: params must not be NULL", op);
    if (params->kind != EE_LAYERNORM && params->kind != EE_RMSNORM)
        EE_FAIL(EE_ERR_INVALID, "%s: unknown kind %d", op, (int)params->kind);
    if (!(params->eps >= 0 && isfinite(params->eps)))
        EE_FAIL(EE_ERR_INVALID, "%s: eps must be >= 0, got %g", op, (double)params->eps);
    if (!isfinite(params->weight_offset))
        EE_FAIL(EE_ERR_INVALID, "%s: weight_offset must be finite, got %g", op,
                (double)params->weight_offset);
    return EE_OK;
}

/* Rows that are normalised one by one, and their width: [N, C], or [N, H, D] as [N * H, D]. */
struct norm_size {
    const char *dims, *rows_name, *width_name;
    int64_t rows, width;
};

static struct norm_size norm_size(const struct ee_tensor *x) {
    if (x->ndim == 3)
        return (struct norm_size){"N, H, D", "N * H", "D", x->shape[0] * x->shape[1], x->shape[2]};
    return (struct norm_size){"N, C", "N", "C", x->shape[0], x->shape[1]};
}

#define CHECK_NORM_INPUT(x)                                                                        \
    do {                                                                                           \
        if ((x) && (x)->ndim == 3)                                                                 \
            EE_CHECK_TENSOR(x, "N, H, D", EE_ANY, EE_ANY, EE_ANY);                                 \
        else                                                                                       \
            EE_CHECK_TENSOR(x, "N, C", EE_ANY, EE_ANY);                                            \
    } while (0)

enum ee_status ee_norm(struct ee_ctx *ctx, const struct ee_tensor *y, const struct ee_tensor *mean,
                       const struct ee_tensor *rstd, const struct ee_tensor *x,
                       const struct ee_tensor *weight, const struct ee_tensor *bias,
                       const struct ee_norm_params *params) {
    EE_TRY(check_norm_params("norm", params));
    CHECK_NORM_INPUT(x);
    struct norm_size size = norm_size(x);
    EE_CHECK_LIKE(y, x, size.dims);
    EE_CHECK_TENSOR(weight, size.width_name, size.width);
    EE_CHECK_OPTIONAL(bias, size.width_name, size.width);
    EE_CHECK_OPTIONAL(mean, size.rows_name, size.rows);
    EE_CHECK_OPTIONAL(rstd, size.rows_name, size.rows);
    EE_CHECK(!mean == !rstd, "mean and rstd must both be given or both be NULL, got only %s",
             mean ? "mean" : "rstd");
    if (size.rows == 0)
        return EE_OK;
    EE_CHECK_IN_PLACE(y, x);
    return ctx->ops->norm(ctx, y, mean, rstd, x, weight, bias, params);
}

enum ee_status ee_norm_backward(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                const struct ee_tensor *acc_dweight,
                                const struct ee_tensor *acc_dbias, const struct ee_tensor *dy,
                                const struct ee_tensor *x, const struct ee_tensor *weight,
                                const struct ee_tensor *mean, const struct ee_tensor *rstd,
                                const struct ee_norm_params *params, bool accumulate) {
    EE_TRY(check_norm_params("norm_backward", params));
    CHECK_NORM_INPUT(x);
    struct norm_size size = norm_size(x);
    EE_CHECK_LIKE(dy, x, size.dims);
    EE_CHECK_LIKE(dx, x, size.dims);
    EE_CHECK_TENSOR(weight, size.width_name, size.width);
    EE_CHECK_TENSOR(acc_dweight, size.width_name, size.width);
    EE_CHECK_OPTIONAL(acc_dbias, size.width_name, size.width);
    EE_CHECK_TENSOR(mean, size.rows_name, size.rows);
    EE_CHECK_TENSOR(rstd, size.rows_name, size.rows);
    if (size.rows == 0)
        return EE_OK;
    EE_CHECK_APART(dx, x);
    if (accumulate)
        EE_CHECK_APART(dx, dy);
    else
        EE_CHECK_IN_PLACE(dx, dy);
    return ctx->ops->norm_backward(ctx, dx, acc_dweight, acc_dbias, dy, x, weight, mean, rstd,
                                   params, accumulate);
}

/* -- Activations -- */

#define CHECK_ACTIVATION(kind)                                                                     \
    EE_CHECK((unsigned)(kind) <= EE_SILU, "unknown kind %d of activation", (int)(kind))

enum ee_status ee_activation(struct ee_ctx *ctx, const struct ee_tensor *y,
                             const struct ee_tensor *x, enum ee_activation kind, bool gated) {
    CHECK_ACTIVATION(kind);
    EE_CHECK_TENSOR(y, "N, F", EE_ANY, EE_ANY);
    int64_t N = y->shape[0], F = y->shape[1];
    EE_CHECK_TENSOR(x, gated ? "N, 2F" : "N, F", N, gated ? 2 * F : F);
    if (N == 0)
        return EE_OK;
    if (gated)
        EE_CHECK_APART(y, x);
    else
        EE_CHECK_IN_PLACE(y, x);
    return ctx->ops->activation(ctx, y, x, kind, gated);
}

enum ee_status ee_activation_backward(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                      const struct ee_tensor *y, const struct ee_tensor *dy,
                                      const struct ee_tensor *x, enum ee_activation kind,
                                      bool gated) {
    CHECK_ACTIVATION(kind);
    EE_CHECK_TENSOR(dy, "N, F", EE_ANY, EE_ANY);
    int64_t N = dy->shape[0], F = dy->shape[1];
    EE_CHECK_TENSOR(x, gated ? "N, 2F" : "N, F", N, gated ? 2 * F : F);
    EE_CHECK_LIKE(dx, x, gated ? "N, 2F" : "N, F");
    EE_CHECK_OPTIONAL(y, "N, F", N, F);
    if (N == 0)
        return EE_OK;
    EE_CHECK_IN_PLACE(dx, x);
    EE_CHECK_APART(dx, dy);
    if (y) {
        EE_CHECK_IN_PLACE(y, dy);
        EE_CHECK_APART(y, x);
        EE_CHECK_APART(y, dx);
    }
    return ctx->ops->activation_backward(ctx, dx, y, dy, x, kind, gated);
}

enum ee_status ee_softcap(struct ee_ctx *ctx, const struct ee_tensor *x, float cap) {
    EE_CHECK(cap > 0 && isfinite(cap), "cap must be > 0, got %g", (double)cap);
    EE_CHECK_TENSOR(x, "N, V", EE_ANY, EE_ANY);
    if (x->shape[0] == 0)
        return EE_OK;
    return ctx->ops->softcap(ctx, x, cap);
}

enum ee_status ee_add(struct ee_ctx *ctx, const struct ee_tensor *y, const struct ee_tensor *x) {
    if (y && y->ndim == 1)
        EE_CHECK_TENSOR(y, "N", EE_ANY);
    else
        EE_CHECK_TENSOR(y, "N, C", EE_ANY, EE_ANY);
    EE_CHECK_LIKE(x, y, "N, C");
    if (y->shape[0] == 0)
        return EE_OK;
    EE_CHECK_APART(y, x);
    return ctx->ops->add(ctx, y, x);
}

/* -- Positions -- */

/* The largest index of a table of n rows. */
static int32_t last_index(int64_t n) {
    return (int32_t)ee_min(n - 1, INT32_MAX);
}

enum ee_status ee_rotate(struct ee_ctx *ctx, const struct ee_tensor *x, const int32_t *position,
                         const struct ee_rope *rope, bool inverse) {
    EE_CHECK_TENSOR(x, "N, H, D", EE_ANY, EE_ANY, EE_ANY);
    EE_CHECK_NOT_NULL(rope);
    EE_CHECK(rope->cos && rope->sin, "rope must have tables of cosines and sines, got no %s",
             rope->cos ? "sines" : "cosines");
    EE_CHECK(rope->dims >= 2 && rope->dims % 2 == 0 && rope->dims <= x->shape[2],
             "rope dims must be even and between 2 and D = %lld, got %d", (long long)x->shape[2],
             (int)rope->dims);
    EE_CHECK_INDICES(position, x->shape[0], 0, last_index(rope->positions));
    if (x->shape[0] == 0)
        return EE_OK;
    return ctx->ops->rotate(ctx, x, position, rope, inverse);
}

/* The backend checks tokens and positions: it reads them anyway. */
enum ee_status ee_embed(struct ee_ctx *ctx, const struct ee_tensor *x, const struct ee_weight *wte,
                        const struct ee_tensor *wpe, const int32_t *token, const int32_t *position,
                        float scale) {
    CHECK_WEIGHT(wte, true);
    EE_CHECK_TENSOR(x, "N, C", EE_ANY, wte->cols);
    EE_CHECK_OPTIONAL(wpe, "P, C", EE_ANY, wte->cols);
    EE_CHECK(isfinite(scale), "scale must be finite, got %g", (double)scale);
    if (x->shape[0] == 0)
        return EE_OK;
    EE_CHECK_NOT_NULL(token);
    if (wpe)
        EE_CHECK_NOT_NULL(position);
    return ctx->ops->embed(ctx, x, wte, wpe, token, position, scale);
}

enum ee_status ee_embed_backward(struct ee_ctx *ctx, const struct ee_tensor *acc_dwte,
                                 const struct ee_tensor *acc_dwpe, const struct ee_tensor *dx,
                                 const int32_t *token, const int32_t *position, float scale) {
    EE_CHECK_TENSOR(dx, "N, C", EE_ANY, EE_ANY);
    int64_t N = dx->shape[0], C = dx->shape[1];
    EE_CHECK_TENSOR(acc_dwte, "V, C", EE_ANY, C);
    EE_CHECK_OPTIONAL(acc_dwpe, "P, C", EE_ANY, C);
    EE_CHECK(isfinite(scale), "scale must be finite, got %g", (double)scale);
    EE_CHECK_INDICES(token, N, 0, last_index(acc_dwte->shape[0]));
    if (acc_dwpe)
        EE_CHECK_INDICES(position, N, 0, last_index(acc_dwpe->shape[0]));
    if (N == 0)
        return EE_OK;
    return ctx->ops->embed_backward(ctx, acc_dwte, acc_dwpe, dx, token, position, scale);
}

/* -- Dropout -- */

static enum ee_status check_dropout(const char *op, const struct ee_dropout *dropout) {
    if (!dropout)
        EE_FAIL(EE_ERR_INVALID, "%s: dropout must not be NULL", op);
    if (!(dropout->p >= 0 && dropout->p < 1))
        EE_FAIL(EE_ERR_INVALID, "%s: p must lie in [0, 1), got %g", op, (double)dropout->p);
    if (!dropout->row)
        EE_FAIL(EE_ERR_INVALID, "%s: dropout must have the identity of every row, got NULL", op);
    return EE_OK;
}

enum ee_status ee_dropout(struct ee_ctx *ctx, const struct ee_tensor *y, const struct ee_tensor *x,
                          const struct ee_tensor *residual, const struct ee_dropout *dropout) {
    EE_CHECK_TENSOR(x, "N, C", EE_ANY, EE_ANY);
    EE_CHECK_LIKE(y, x, "N, C");
    EE_CHECK_OPTIONAL(residual, "N, C", x->shape[0], x->shape[1]);
    if (x->shape[0] == 0)
        return EE_OK;
    EE_TRY(check_dropout("dropout", dropout));
    EE_CHECK_IN_PLACE(y, x);
    if (residual)
        EE_CHECK_IN_PLACE(y, residual);
    return ctx->ops->dropout(ctx, y, x, residual, dropout);
}

/* -- Attention -- */

static enum ee_status check_attention_params(const char *op,
                                             const struct ee_attention_params *params) {
    if (!params)
        EE_FAIL(EE_ERR_INVALID, "%s: params must not be NULL", op);
    if (!isfinite(params->scale))
        EE_FAIL(EE_ERR_INVALID, "%s: scale must be finite, got %g", op, (double)params->scale);
    if (!(params->softcap >= 0 && isfinite(params->softcap)))
        EE_FAIL(EE_ERR_INVALID, "%s: softcap must be > 0, or 0 for none, got %g", op,
                (double)params->softcap);
    if (params->window < 0)
        EE_FAIL(EE_ERR_INVALID, "%s: window must be > 0, or 0 for none, got %d", op,
                (int)params->window);
    return EE_OK;
}

/* segment[segments + 1] ascends from 0 to N; segments may be empty. */
static enum ee_status check_segments(const char *op, const int32_t *segment, int64_t segments,
                                     int64_t N, const struct ee_dropout *dropout) {
    if (!segment || segments < 1)
        EE_FAIL(EE_ERR_INVALID, "%s: segment must hold 0 and the end of at least one segment", op);
    if (segment[0] != 0 || segment[segments] != N)
        EE_FAIL(EE_ERR_INVALID, "%s: segment must ascend from 0 to N = %lld, got %d to %d", op,
                (long long)N, (int)segment[0], (int)segment[segments]);
    int32_t longest = 0;
    for (int64_t s = 0; s < segments; s++) {
        if (segment[s] > segment[s + 1])
            EE_FAIL(EE_ERR_INVALID, "%s: segment must ascend, got %d before %d at index %lld", op,
                    (int)segment[s], (int)segment[s + 1], (long long)s + 1);
        longest = (int32_t)ee_max(longest, segment[s + 1] - segment[s]);
    }
    if (dropout && longest > 1 << DROPOUT_KEY_BITS)
        EE_FAIL(EE_ERR_INVALID, "%s: with dropout a segment may have %d rows, got %d", op,
                1 << DROPOUT_KEY_BITS, (int)longest);
    return EE_OK;
}

/* The shapes and parameters that forward and backward share. */
static enum ee_status check_attention(const char *op, const struct ee_tensor *q,
                                      const struct ee_tensor *k, const int32_t *segment,
                                      int64_t segments, const struct ee_attention_params *params) {
    EE_TRY(check_attention_params(op, params));
    int64_t H = q->shape[1], K = k->shape[1];
    if (H % K != 0)
        EE_FAIL(EE_ERR_INVALID,
                "%s: the key-value heads must divide the heads, got K = %lld and "
                "H = %lld",
                op, (long long)K, (long long)H);
    if (q->shape[0] == 0)
        return EE_OK;
    EE_TRY(check_segments(op, segment, segments, q->shape[0], params->dropout));
    return params->dropout ? check_dropout(op, params->dropout) : EE_OK;
}

enum ee_status ee_attention(struct ee_ctx *ctx, const struct ee_tensor *out,
                            const struct ee_tensor *lse, const struct ee_tensor *q,
                            const struct ee_tensor *k, const struct ee_tensor *v,
                            const int32_t *segment, int64_t segments,
                            const struct ee_attention_params *params) {
    EE_CHECK_TENSOR(q, "N, H, D", EE_ANY, EE_ANY, EE_ANY);
    int64_t N = q->shape[0];
    EE_CHECK_TENSOR(k, "N, K, D", N, EE_ANY, q->shape[2]);
    EE_CHECK_LIKE(v, k, "N, K, D");
    EE_CHECK_LIKE(out, q, "N, H, D");
    EE_CHECK_TENSOR(lse, "N, H", N, q->shape[1]);
    EE_TRY(check_attention("attention", q, k, segment, segments, params));
    if (N == 0)
        return EE_OK;
    EE_CHECK_APART(out, q);
    EE_CHECK_APART(out, k);
    EE_CHECK_APART(out, v);
    return ctx->ops->attention(ctx, out, lse, q, k, v, segment, segments, params);
}

enum ee_status ee_attention_backward(struct ee_ctx *ctx, const struct ee_tensor *dq,
                                     const struct ee_tensor *dk, const struct ee_tensor *dv,
                                     const struct ee_tensor *dout, const struct ee_tensor *out,
                                     const struct ee_tensor *lse, const struct ee_tensor *q,
                                     const struct ee_tensor *k, const struct ee_tensor *v,
                                     const int32_t *segment, int64_t segments,
                                     const struct ee_attention_params *params) {
    EE_CHECK_TENSOR(q, "N, H, D", EE_ANY, EE_ANY, EE_ANY);
    int64_t N = q->shape[0];
    EE_CHECK_TENSOR(k, "N, K, D", N, EE_ANY, q->shape[2]);
    EE_CHECK_LIKE(v, k, "N, K, D");
    EE_CHECK_LIKE(out, q, "N, H, D");
    EE_CHECK_LIKE(dout, q, "N, H, D");
    EE_CHECK_TENSOR(lse, "N, H", N, q->shape[1]);
    EE_CHECK_LIKE(dq, q, "N, H, D");
    EE_CHECK_LIKE(dk, k, "N, K, D");
    EE_CHECK_LIKE(dv, k, "N, K, D");
    EE_TRY(check_attention("attention_backward", q, k, segment, segments, params));
    if (N == 0)
        return EE_OK;
    const struct ee_tensor *outputs[] = {dq, dk, dv}, *inputs[] = {dout, out, q, k, v};
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 5; j++)
            EE_CHECK(outputs[i]->data != inputs[j]->data, "%s must overlap no other argument",
                     (const char *[]){"dq", "dk", "dv"}[i]);
    }
    return ctx->ops->attention_backward(ctx, dq, dk, dv, dout, out, lse, q, k, v, segment, segments,
                                        params);
}

static enum ee_status check_kv(const char *op, const struct ee_kv *kv) {
    if (!kv)
        EE_FAIL(EE_ERR_INVALID, "%s: kv must not be NULL", op);
    if (!kv->k || !kv->v || !kv->table)
        EE_FAIL(EE_ERR_INVALID, "%s: kv must have keys, values and a page table, got no %s", op,
                !kv->k   ? "keys"
                : !kv->v ? "values"
                         : "table");
    if (kv->page < 64 || kv->page % 64 != 0)
        EE_FAIL(EE_ERR_INVALID, "%s: the page of kv must be a multiple of 64 positions, got %d", op,
                (int)kv->page);
    if (kv->heads < 1 || kv->width < 1 || kv->pages < 1 || kv->sequences < 1 ||
        kv->pages_per_sequence < 1)
        EE_FAIL(
            EE_ERR_INVALID,
            "%s: kv must have heads, width, sequences and pages >= 1, got %d heads of width %d, "
            "%lld sequences, %lld pages, %lld a sequence",
            op, (int)kv->heads, (int)kv->width, (long long)kv->sequences, (long long)kv->pages,
            (long long)kv->pages_per_sequence);
    return EE_OK;
}

/* The pages of the positions [first, last] of a sequence exist. */
static enum ee_status check_pages(const char *op, const struct ee_kv *kv, int32_t sequence,
                                  int32_t first, int32_t last) {
    const int32_t *table = kv->table + sequence * kv->pages_per_sequence;
    for (int32_t page = first / kv->page; page <= last / kv->page; page++) {
        if (table[page] < 0 || table[page] >= kv->pages)
            EE_FAIL(EE_ERR_INVALID,
                    "%s: sequence %d has no page for position %lld (table entry %d, %lld pages)",
                    op, (int)sequence, (long long)page * kv->page, (int)table[page],
                    (long long)kv->pages);
    }
    return EE_OK;
}

enum ee_status ee_kv_write(struct ee_ctx *ctx, const struct ee_kv *kv, const struct ee_tensor *k,
                           const struct ee_tensor *v, const int32_t *sequence,
                           const int32_t *position) {
    EE_TRY(check_kv("kv_write", kv));
    EE_CHECK_TENSOR(k, "N, K, D", EE_ANY, kv->heads, kv->width);
    EE_CHECK_LIKE(v, k, "N, K, D");
    int64_t N = k->shape[0];
    EE_CHECK_INDICES(sequence, N, 0, last_index(kv->sequences));
    EE_CHECK_INDICES(position, N, 0, last_index(kv->pages_per_sequence * kv->page));
    for (int64_t n = 0; n < N; n++)
        EE_TRY(check_pages("kv_write", kv, sequence[n], position[n], position[n]));
    if (N == 0)
        return EE_OK;
    return ctx->ops->kv_write(ctx, kv, k, v, sequence, position);
}

enum ee_status ee_attention_rows(struct ee_ctx *ctx, const struct ee_tensor *out,
                                 const struct ee_tensor *q, const struct ee_kv *kv,
                                 const int32_t *sequence, const int32_t *position,
                                 const struct ee_attention_params *params) {
    EE_TRY(check_kv("attention_rows", kv));
    EE_TRY(check_attention_params("attention_rows", params));
    EE_CHECK_TENSOR(q, "N, H, D", EE_ANY, EE_ANY, kv->width);
    EE_CHECK_LIKE(out, q, "N, H, D");
    EE_CHECK(q->shape[1] % kv->heads == 0,
             "the key-value heads must divide the heads, got K = %d and H = %lld", (int)kv->heads,
             (long long)q->shape[1]);
    int64_t N = q->shape[0];
    EE_CHECK_INDICES(sequence, N, 0, last_index(kv->sequences));
    EE_CHECK_INDICES(position, N, 0, last_index(kv->pages_per_sequence * kv->page));
    for (int64_t n = 0; n < N; n++) {
        int64_t first =
            params->window > 0 ? ee_max(0, (int64_t)position[n] - params->window + 1) : 0;
        EE_TRY(check_pages("attention_rows", kv, sequence[n], (int32_t)first, position[n]));
    }
    if (N == 0)
        return EE_OK;
    EE_CHECK_APART(out, q);
    return ctx->ops->attention_rows(ctx, out, q, kv, sequence, position, params);
}

/* -- Losses -- */

enum ee_status ee_cross_entropy(struct ee_ctx *ctx, const struct ee_tensor *loss,
                                const struct ee_tensor *confidence, const struct ee_tensor *logits,
                                const int32_t *target, const struct ee_tensor *row_weight,
                                const struct ee_loss_params *params) {
    EE_CHECK_TENSOR(logits, "N, V", EE_ANY, EE_ANY);
    int64_t N = logits->shape[0];
    EE_CHECK_TENSOR(loss, "N", N);
    EE_CHECK_TENSOR(confidence, "N", N);
    EE_CHECK_TENSOR(row_weight, "N", N);
    EE_CHECK_NOT_NULL(params);
    EE_CHECK(params->softcap >= 0 && isfinite(params->softcap),
             "softcap must be > 0, or 0 for none, got %g", (double)params->softcap);
    EE_CHECK(params->temperature > 0 && isfinite(params->temperature),
             "temperature must be > 0, got %g", (double)params->temperature);
    EE_CHECK_INDICES(target, N, INT32_MIN, last_index(logits->shape[1]));
    if (N == 0)
        return EE_OK;
    return ctx->ops->cross_entropy(ctx, loss, confidence, logits, target, row_weight, params);
}

enum ee_status ee_confidence(struct ee_ctx *ctx, int32_t *token, const struct ee_tensor *confidence,
                             const struct ee_tensor *lse, const struct ee_tensor *logits) {
    EE_CHECK_TENSOR(logits, "N, V", EE_ANY, EE_ANY);
    int64_t N = logits->shape[0];
    EE_CHECK_TENSOR(confidence, "N", N);
    EE_CHECK_TENSOR(lse, "N", N);
    if (N == 0)
        return EE_OK;
    EE_CHECK_NOT_NULL(token);
    return ctx->ops->confidence(ctx, token, confidence, lse, logits);
}

/* -- Parameters -- */

enum ee_status ee_sum_squares(struct ee_ctx *ctx, double *sum, const struct ee_tensor *x) {
    EE_CHECK_NOT_NULL(sum);
    EE_CHECK_FLAT(x);
    EE_CHECK_FLOAT32(x);
    *sum = 0;
    if (ee_tensor_elements(x) == 0)
        return EE_OK;
    return ctx->ops->sum_squares(ctx, sum, x);
}

#define CHECK_SAME_ELEMENTS(a, b)                                                                  \
    EE_CHECK(ee_tensor_elements(a) == ee_tensor_elements(b),                                       \
             "%s must have %lld elements as %s has, got %lld", #a,                                 \
             (long long)ee_tensor_elements(b), #b, (long long)ee_tensor_elements(a))

static enum ee_status check_adamw_params(const struct ee_adamw_params *params) {
    if (!params)
        EE_FAIL(EE_ERR_INVALID, "adamw: params must not be NULL");
    const struct {
        const char *name;
        double value, below;
    } fields[] = {
        {"learning_rate", params->learning_rate, INFINITY},
        {"beta1", params->beta1, 1},
        {"beta2", params->beta2, 1},
        {"eps", params->eps, INFINITY},
        {"weight_decay", params->weight_decay, INFINITY},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (!(fields[i].value >= 0 && fields[i].value < fields[i].below))
            EE_FAIL(EE_ERR_INVALID, "adamw: %s must lie in [0, %g), got %g", fields[i].name,
                    fields[i].below, fields[i].value);
    }
    if (!isfinite(params->gradient_scale))
        EE_FAIL(EE_ERR_INVALID, "adamw: gradient_scale must be finite, got %g",
                (double)params->gradient_scale);
    if (params->step < 1)
        EE_FAIL(EE_ERR_INVALID, "adamw: step must be counted from 1, got %lld",
                (long long)params->step);
    return EE_OK;
}

enum ee_status ee_adamw(struct ee_ctx *ctx, const struct ee_tensor *p, const struct ee_tensor *m,
                        const struct ee_tensor *v, const struct ee_tensor *gradient,
                        const struct ee_adamw_params *params) {
    EE_TRY(check_adamw_params(params));
    EE_CHECK_FLAT(p);
    EE_CHECK_FLOAT32(p);
    EE_CHECK_FLAT(m);
    EE_CHECK_FLOAT32(m);
    EE_CHECK_FLAT(v);
    EE_CHECK_FLOAT32(v);
    EE_CHECK_FLAT(gradient);
    EE_CHECK_FLOAT32(gradient);
    CHECK_SAME_ELEMENTS(m, p);
    CHECK_SAME_ELEMENTS(v, p);
    CHECK_SAME_ELEMENTS(gradient, p);
    if (ee_tensor_elements(p) == 0)
        return EE_OK;
    return ctx->ops->adamw(ctx, p, m, v, gradient, params);
}

enum ee_status ee_normal(struct ee_ctx *ctx, const struct ee_tensor *x, float mean, float std,
                         uint64_t key) {
    EE_CHECK_FLAT(x);
    EE_CHECK_FLOAT32(x);
    EE_CHECK(isfinite(mean), "mean must be finite, got %g", (double)mean);
    EE_CHECK(std >= 0 && isfinite(std), "std must be >= 0, got %g", (double)std);
    if (ee_tensor_elements(x) == 0)
        return EE_OK;
    return ctx->ops->normal(ctx, x, mean, std, key);
}

#define CHECK_FLOAT_TYPE(tensor)                                                                   \
    EE_CHECK((unsigned)(tensor)->dtype <= EE_F16,                                                  \
             "%s must be float32, bfloat16 or float16, got %s", #tensor,                           \
             ee_dtype_name((tensor)->dtype))

enum ee_status ee_convert(struct ee_ctx *ctx, const struct ee_tensor *out,
                          const struct ee_tensor *in) {
    EE_CHECK_FLAT(out);
    EE_CHECK_FLAT(in);
    CHECK_FLOAT_TYPE(out);
    CHECK_FLOAT_TYPE(in);
    CHECK_SAME_ELEMENTS(out, in);
    if (ee_tensor_elements(in) == 0)
        return EE_OK;
    EE_CHECK_APART(out, in);
    return ctx->ops->convert(ctx, out, in);
}
