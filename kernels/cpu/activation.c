#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Value and derivative of an activation. GELU with tanh is x * sigmoid(2u), u = sqrt(2 / pi) *
 * (x + 0.044715 x^3): 0.5 * (1 + tanh u) without its cancellation. */
struct dual {
    v16 value, slope;
};

static ALWAYS_INLINE struct dual sigmoid_times(v16 x, v16 argument, v16 argument_slope) {
    v16 rest, s = v16_sigmoid(argument, &rest), value = v16_mul(x, s);
    /* s + x * s * (1 - s) * argument' */
    return (struct dual){value, v16_fma(v16_mul(value, rest), argument_slope, s)};
}

static ALWAYS_INLINE struct dual gelu_tanh(v16 x) {
    const float twice = 1.5957691216f; /* 2 sqrt(2 / pi) */
    const v16 cubic = v16_set(twice * 0.044715f), linear = v16_set(twice);
    /* Beyond 16 the sigmoid is 0 or 1; x^3 must not overflow. */
    v16 t = v16_max(v16_set(-16.0f), v16_min(v16_set(16.0f), x));
    v16 square = v16_mul(t, t);
    v16 argument = v16_mul(t, v16_fma(square, cubic, linear));
    v16 slope = v16_fma(v16_mul(square, v16_set(3.0f)), cubic, linear);
    return sigmoid_times(x, argument, slope);
}

static ALWAYS_INLINE struct dual gelu(v16 x) {
    v16 density, phi = v16_normal_cdf(x, &density);
    v16 slope = v16_fma(v16_mul(x, v16_set(0.3989422804f)), density, phi);
    return (struct dual){v16_mul(x, phi), slope};
}

static ALWAYS_INLINE struct dual activate(v16 x, enum ee_activation kind) {
    const v16 zero = v16_set(0.0f), one = v16_set(1.0f);
    switch (kind) {
    case EE_GELU:
        return gelu(x);
    case EE_GELU_TANH:
        return gelu_tanh(x);
    case EE_SILU:
        return sigmoid_times(x, x, one);
    case EE_RELU:
        break;
    }
    /* NaN stays NaN. */
    return (struct dual){v16_select_lt(x, zero, zero, x), v16_select_lt(zero, x, one, zero)};
}

struct activation_args {
    const struct ee_tensor *y, *dx, *dy, *x;
    enum ee_activation kind;
    int64_t width, pieces; /* pieces of EE_COLUMN_BLOCK columns in a row of F */
    float cap;
};

/* The columns [begin, end) of row `row`, for one task. */
struct piece {
    int64_t row, begin, end;
};

static struct piece piece_of(const struct activation_args *a, int64_t task) {
    int64_t begin = task % a->pieces * EE_COLUMN_BLOCK;
    return (struct piece){task / a->pieces, begin, ee_min(begin + EE_COLUMN_BLOCK, a->width)};
}

static ALWAYS_INLINE void forward(float *y, const float *x, const float *up, int64_t n,
                                  enum ee_activation kind) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 value = activate(v16_load(x + i), kind).value;
        v16_store(y + i, up ? v16_mul(value, v16_load(up + i)) : value);
    }
    if (i < n) {
        int rest = (int)(n - i);
        v16 value = activate(v16_load_n(x + i, rest), kind).value;
        v16_store_n(y + i, up ? v16_mul(value, v16_load_n(up + i, rest)) : value, rest);
    }
}

static void forward_pieces(void *arg, int64_t first, int64_t last, int thread) {
    const struct activation_args *a = arg;
    (void)thread;
    const bool gated = a->x->shape[1] != a->width;
    for (int64_t task = first; task < last; task++) {
        struct piece p = piece_of(a, task);
        float *y = ee_row(a->y, p.row) + p.begin;
        const float *x = ee_row(a->x, p.row) + p.begin, *up = gated ? x + a->width : NULL;
        const int64_t n = p.end - p.begin;
        switch (a->kind) {
        case EE_RELU:
            forward(y, x, up, n, EE_RELU);
            break;
        case EE_GELU:
            forward(y, x, up, n, EE_GELU);
            break;
        case EE_GELU_TANH:
            forward(y, x, up, n, EE_GELU_TANH);
            break;
        case EE_SILU:
            forward(y, x, up, n, EE_SILU);
            break;
        }
    }
}

enum ee_status EE_KERNEL(activation)(struct ee_ctx *ctx, const struct ee_tensor *y,
                                     const struct ee_tensor *x, enum ee_activation kind,
                                     bool gated) {
    (void)gated;
    struct activation_args a = {.y = y, .x = x, .kind = kind, .width = y->shape[1]};
    a.pieces = ee_ceil_div(a.width, EE_COLUMN_BLOCK);
    ee_cpu_run(ctx, forward_pieces, &a, y->shape[0] * a.pieces, ee_tensor_elements(x));
    return EE_OK;
}

/* One vector of the backward: `n` lanes; up and dup belong to the gate and may be NULL. Reads all
 * before it writes, since outputs may be inputs. */
static ALWAYS_INLINE void backward_vector(float *dx, float *dup, float *y, const float *dy,
                                          const float *x, const float *up, int n,
                                          enum ee_activation kind) {
    v16 g = n == 16 ? v16_load(dy) : v16_load_n(dy, n);
    struct dual f = activate(n == 16 ? v16_load(x) : v16_load_n(x, n), kind);
    v16 u = v16_set(1.0f);
    if (up)
        u = n == 16 ? v16_load(up) : v16_load_n(up, n);
    v16 value = up ? v16_mul(f.value, u) : f.value;
    v16 d = v16_mul(up ? v16_mul(g, u) : g, f.slope), du = v16_mul(g, f.value);
    if (n == 16) {
        v16_store(dx, d);
        if (dup)
            v16_store(dup, du);
        if (y)
            v16_store(y, value);
    } else {
        v16_store_n(dx, d, n);
        if (dup)
            v16_store_n(dup, du, n);
        if (y)
            v16_store_n(y, value, n);
    }
}

static ALWAYS_INLINE void backward(const struct activation_args *a, struct piece p,
                                   enum ee_activation kind) {
    const bool gated = a->x->shape[1] != a->width;
    float *dx = ee_row(a->dx, p.row), *y = a->y ? ee_row(a->y, p.row) : NULL;
    const float *dy = ee_row(a->dy, p.row), *x = ee_row(a->x, p.row);
    const float *up = gated ? x + a->width : NULL;
    float *dup = gated ? dx + a->width : NULL;
    int64_t i = p.begin;
    for (; i + 16 <= p.end; i += 16)
        backward_vector(dx + i, dup ? dup + i : NULL, y ? y + i : NULL, dy + i, x + i,
                        up ? up + i : NULL, 16, kind);
    if (i < p.end)
        backward_vector(dx + i, dup ? dup + i : NULL, y ? y + i : NULL, dy + i, x + i,
                        up ? up + i : NULL, (int)(p.end - i), kind);
}

static void backward_pieces(void *arg, int64_t first, int64_t last, int thread) {
    const struct activation_args *a = arg;
    (void)thread;
    for (int64_t task = first; task < last; task++) {
        struct piece p = piece_of(a, task);
        switch (a->kind) {
        case EE_RELU:
            backward(a, p, EE_RELU);
            break;
        case EE_GELU:
            backward(a, p, EE_GELU);
            break;
        case EE_GELU_TANH:
            backward(a, p, EE_GELU_TANH);
            break;
        case EE_SILU:
            backward(a, p, EE_SILU);
            break;
        }
    }
}

enum ee_status EE_KERNEL(activation_backward)(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                              const struct ee_tensor *y, const struct ee_tensor *dy,
                                              const struct ee_tensor *x, enum ee_activation kind,
                                              bool gated) {
    (void)gated;
    struct activation_args a = {
        .y = y, .dx = dx, .dy = dy, .x = x, .kind = kind, .width = dy->shape[1]};
    a.pieces = ee_ceil_div(a.width, EE_COLUMN_BLOCK);
    ee_cpu_run(ctx, backward_pieces, &a, dy->shape[0] * a.pieces, ee_tensor_elements(x));
    return EE_OK;
}

static void softcap_pieces(void *arg, int64_t first, int64_t last, int thread) {
    const struct activation_args *a = arg;
    (void)thread;
    const v16 cap = v16_set(a->cap);
    for (int64_t task = first; task < last; task++) {
        struct piece p = piece_of(a, task);
        float *x = ee_row(a->x, p.row);
        int64_t i = p.begin;
        for (; i + 16 <= p.end; i += 16)
            v16_store(x + i, v16_mul(cap, v16_tanh(v16_div(v16_load(x + i), cap))));
        if (i < p.end) {
            int rest = (int)(p.end - i);
            v16 t = v16_tanh(v16_div(v16_load_n(x + i, rest), cap));
            v16_store_n(x + i, v16_mul(cap, t), rest);
        }
    }
}

enum ee_status EE_KERNEL(softcap)(struct ee_ctx *ctx, const struct ee_tensor *x, float cap) {
    struct activation_args a = {.x = x, .width = x->shape[1], .cap = cap};
    a.pieces = ee_ceil_div(a.width, EE_COLUMN_BLOCK);
    ee_cpu_run(ctx, softcap_pieces, &a, x->shape[0] * a.pieces, ee_tensor_elements(x));
    return EE_OK;
}
