#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_philox.h"

/* -- Addition -- */

struct add_args {
    const struct ee_tensor *y, *x;
    int64_t width, pieces;
};

static void add_pieces(void *arg, int64_t first, int64_t last, int thread) {
    const struct add_args *a = arg;
    (void)thread;
    for (int64_t task = first; task < last; task++) {
        int64_t row = task / a->pieces, begin = task % a->pieces * EE_COLUMN_BLOCK;
        float *y = ee_row(a->y, row);
        const float *x = ee_row(a->x, row);
        const int64_t end = ee_min(begin + EE_COLUMN_BLOCK, a->width);
        for (int64_t i = begin; i < end; i++)
            y[i] += x[i];
    }
}

enum ee_status EE_KERNEL(add)(struct ee_ctx *ctx, const struct ee_tensor *y,
                              const struct ee_tensor *x) {
    struct add_args a = {.y = y, .x = x, .width = ee_row_width(y)};
    a.pieces = ee_ceil_div(a.width, EE_COLUMN_BLOCK);
    ee_cpu_run(ctx, add_pieces, &a, ee_row_count(y) * a.pieces, ee_tensor_elements(y));
    return EE_OK;
}

/* -- Dropout -- */

struct dropout_args {
    const struct ee_tensor *y, *x, *residual;
    const struct ee_dropout *dropout;
    int32_t threshold; /* kept iff the upper 24 bits of the word are at least this */
    float scale;
};

/* y = x * scale where the words say so, else 0; all of one block. */
static inline void keep_block(const struct dropout_args *a, float y[EE_PHILOX_WORDS],
                              const float x[EE_PHILOX_WORDS],
                              const uint32_t words[EE_PHILOX_WORDS]) {
    for (int i = 0; i < EE_PHILOX_WORDS; i++) {
        float scaled = x[i] * a->scale;
        y[i] = (int32_t)(words[i] >> 8) >= a->threshold ? scaled : 0.0f;
    }
}

/* `count` <= EE_PHILOX_WORDS channels of which the first belongs to `counter`. Outputs may be
 * inputs, so the block is worked on in a copy. */
static inline void dropout_channels(const struct dropout_args *a, float *y, const float *x,
                                    const float *residual, int64_t count, uint64_t row,
                                    uint64_t counter) {
    uint32_t words[EE_PHILOX_WORDS];
    philox_words(words, a->dropout->key, row, counter);
    float block[EE_PHILOX_WORDS] = {0};
    memcpy(block, x, (size_t)count * sizeof *x);
    keep_block(a, block, block, words);
    if (residual) {
        float sum[EE_PHILOX_WORDS] = {0};
        memcpy(sum, residual, (size_t)count * sizeof *sum);
        for (int i = 0; i < EE_PHILOX_WORDS; i++)
            block[i] = sum[i] + block[i];
    }
    memcpy(y, block, (size_t)count * sizeof *y);
}

static void dropout_rows(void *arg, int64_t first, int64_t last, int thread) {
    const struct dropout_args *a = arg;
    (void)thread;
    const int64_t n = a->x->shape[1];
    for (int64_t r = first; r < last; r++) {
        float *y = ee_row(a->y, r);
        const float *x = ee_row(a->x, r), *residual = a->residual ? ee_row(a->residual, r) : NULL;
        const uint64_t row = a->dropout->row[r];
        int64_t c = 0;
        for (; c + EE_PHILOX_WORDS <= n; c += EE_PHILOX_WORDS)
            dropout_channels(a, y + c, x + c, residual ? residual + c : NULL, EE_PHILOX_WORDS, row,
                             (uint64_t)c / 4);
        if (c < n)
            dropout_channels(a, y + c, x + c, residual ? residual + c : NULL, n - c, row,
                             (uint64_t)c / 4);
    }
}

enum ee_status EE_KERNEL(dropout)(struct ee_ctx *ctx, const struct ee_tensor *y,
                                  const struct ee_tensor *x, const struct ee_tensor *residual,
                                  const struct ee_dropout *dropout) {
    struct dropout_args a = {
        .y = y,
        .x = x,
        .residual = residual,
        .dropout = dropout,
        .threshold = (int32_t)ceil((double)dropout->p * 0x1p24),
        .scale = 1.0f / (1.0f - dropout->p),
    };
    ee_cpu_run(ctx, dropout_rows, &a, x->shape[0], ee_tensor_elements(x));
    return EE_OK;
}

/* -- Normal numbers -- */

struct normal_args {
    float *x;
    int64_t n;
    float mean, std;
    uint64_t key;
};

/* The natural logarithm of (bits + 1) * 2^-32, in 0 .. -22.2, to about 1e-10. */
static inline double log_uniform(uint32_t bits) {
    double value = (double)bits + 1.0;
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    /* value = m * 2^k with m in [sqrt(1/2), sqrt(2)) */
    const uint64_t root_half = 0x3FE6A09E667F3BCDu;
    uint64_t shifted = word - root_half;
    int32_t k = (int32_t)(shifted >> 52);
    uint64_t mantissa = (shifted & 0xFFFFFFFFFFFFFu) + root_half;
    double m;
    memcpy(&m, &mantissa, sizeof m);
    /* log m = 2 artanh s */
    double s = (m - 1.0) / (m + 1.0), q = s * s;
    double p = 1.0 / 11;
    p = p * q + 1.0 / 9;
    p = p * q + 1.0 / 7;
    p = p * q + 1.0 / 5;
    p = p * q + 1.0 / 3;
    p = p * q + 1.0;
    return 2.0 * s * p + (double)(k - 32) * 0.693147180559945309;
}

/* Cosine and sine of 2 pi bits / 2^32, to about 1e-10. */
static inline void turn(uint32_t bits, double *cosine, double *sine) {
    uint32_t quarter = (bits + 0x20000000u) >> 30;
    int32_t rest = (int32_t)(bits - (quarter << 30)); /* within an eighth of a turn */
    double a = (double)rest * 0x1.921fb54442d18p-30, q = a * a;
    double s = -1.0 / 39916800;
    s = s * q + 1.0 / 362880;
    s = s * q - 1.0 / 5040;
    s = s * q + 1.0 / 120;
    s = s * q - 1.0 / 6;
    s = s * q * a + a;
    double c = 1.0 / 479001600;
    c = c * q - 1.0 / 3628800;
    c = c * q + 1.0 / 40320;
    c = c * q - 1.0 / 720;
    c = c * q + 1.0 / 24;
    c = c * q - 0.5;
    c = c * q + 1.0;
    double x = quarter & 1 ? s : c, y = quarter & 1 ? c : s;
    *cosine = (quarter + 1) & 2 ? -x : x;
    *sine = quarter & 2 ? -y : y;
}

/* Words 0 and 1 of a counter give the elements 4i and 4i + 1 (radius and angle; cosine, sine),
 * words 2 and 3 the next two. */
static void normal_block(const struct normal_args *a, float x[EE_PHILOX_WORDS], uint64_t counter) {
    enum { PAIRS = EE_PHILOX_WORDS / 2 };
    uint32_t words[EE_PHILOX_WORDS], radius_word[PAIRS], angle_word[PAIRS];
    philox_words(words, a->key, 0, counter);
    for (int i = 0; i < PAIRS; i++) {
        radius_word[i] = words[2 * i];
        angle_word[i] = words[2 * i + 1];
    }
    const double mean = (double)a->mean, std = (double)a->std;
    float first[PAIRS], second[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        double radius = sqrt(-2.0 * log_uniform(radius_word[i])), cosine, sine;
        turn(angle_word[i], &cosine, &sine);
        first[i] = (float)(mean + std * (radius * cosine));
        second[i] = (float)(mean + std * (radius * sine));
    }
    for (int i = 0; i < PAIRS; i++) {
        x[2 * i] = first[i];
        x[2 * i + 1] = second[i];
    }
}

static void normal_blocks(void *arg, int64_t first, int64_t last, int thread) {
    const struct normal_args *a = arg;
    (void)thread;
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * EE_PHILOX_WORDS, count = ee_min(EE_PHILOX_WORDS, a->n - start);
        float block[EE_PHILOX_WORDS];
        normal_block(a, block, (uint64_t)b * (EE_PHILOX_WORDS / 4));
        memcpy(a->x + start, block, (size_t)count * sizeof *block);
    }
}

enum ee_status EE_KERNEL(normal)(struct ee_ctx *ctx, const struct ee_tensor *x, float mean,
                                 float std, uint64_t key) {
    struct normal_args a = {x->data, ee_tensor_elements(x), mean, std, key};
    ee_cpu_run(ctx, normal_blocks, &a, ee_ceil_div(a.n, EE_PHILOX_WORDS), 4 * a.n);
    return EE_OK;
}

/* -- Conversion -- */

struct convert_args {
    void *out;
    const void *in;
    enum ee_dtype to, from;
    int64_t n;
};

/* `count` elements from `start` on, between a narrow type and float32. */
static void widen(const struct convert_args *a, float *out, int64_t start, int64_t count) {
    const uint16_t *in = (const uint16_t *)a->in + start;
    if (a->from == EE_BF16) {
        for (int64_t i = 0; i < count; i++)
            out[i] = from_bf16(in[i]);
    } else {
        for (int64_t i = 0; i < count; i++)
            out[i] = from_f16(in[i]);
    }
}

static void narrow(const struct convert_args *a, const float *in, int64_t start, int64_t count) {
    uint16_t *out = (uint16_t *)a->out + start;
    if (a->to == EE_BF16) {
        for (int64_t i = 0; i < count; i++)
            out[i] = to_bf16(in[i]);
    } else {
        for (int64_t i = 0; i < count; i++)
            out[i] = to_f16(in[i]);
    }
}

static void convert_blocks(void *arg, int64_t first, int64_t last, int thread) {
    const struct convert_args *a = arg;
    (void)thread;
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * EE_COLUMN_BLOCK, count = ee_min(EE_COLUMN_BLOCK, a->n - start);
        float block[EE_COLUMN_BLOCK];
        if (a->from == EE_F32) {
            narrow(a, (const float *)a->in + start, start, count);
        } else if (a->to == EE_F32) {
            widen(a, (float *)a->out + start, start, count);
        } else {
            widen(a, block, start, count);
            narrow(a, block, start, count);
        }
    }
}

enum ee_status EE_KERNEL(convert)(struct ee_ctx *ctx, const struct ee_tensor *out,
                                  const struct ee_tensor *in) {
    struct convert_args a = {out->data, in->data, out->dtype, in->dtype, ee_tensor_elements(in)};
    if (a.to == a.from)
        memcpy(a.out, a.in, (size_t)a.n * ee_dtype_size(a.to));
    else
        ee_cpu_run(ctx, convert_blocks, &a, ee_ceil_div(a.n, EE_COLUMN_BLOCK), a.n);
    return EE_OK;
}
