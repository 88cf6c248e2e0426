/* The inner loops of the training product (matmul.c): one tile of C as a sum of outer products of
 * packed panels, and the packing of panels. May use intrinsics.
 *
 * A panel of A holds TILE_ROWS rows, one of B TILE_COLS columns, depth by depth: element r of depth
 * k stands at panel[k * width + r]. Missing rows or columns of the last panel are zeros. */
#ifndef EE_MATMUL_KERNEL_H
#define EE_MATMUL_KERNEL_H

#include "cpu/cpu.h"
#include "cpu/simd.h"

/* The product over column panels (matmul_rows.c), for ee_linear to dispatch to. */
EE_WARN_UNUSED enum ee_status
    EE_LEVEL_NAME(ee_linear_panels)(struct ee_ctx *ctx, const struct ee_tensor *y,
                                    const struct ee_tensor *x, const struct ee_weight *w,
                                    const struct ee_tensor *bias, const struct ee_tensor *residual);

/* Vectors of the native width, and the shape of a tile that fills the registers. */

#if defined(EE_LEVEL_AVX512)
typedef __m512 vec;
#    define VEC 16
#    define TILE_ROWS 14
#    define TILE_VECS 2
#    define vec_zero() _mm512_setzero_ps()
#    define vec_set(a) _mm512_set1_ps(a)
#    define vec_load(p) _mm512_loadu_ps(p)
#    define vec_store(p, a) _mm512_storeu_ps(p, a)
#    define vec_add(a, b) _mm512_add_ps(a, b)
#    define vec_madd(a, b, c) _mm512_fmadd_ps(a, b, c)
#elif defined(EE_LEVEL_AVX2)
typedef __m256 vec;
#    define VEC 8
#    define TILE_ROWS 6
#    define TILE_VECS 2
#    define vec_zero() _mm256_setzero_ps()
#    define vec_set(a) _mm256_set1_ps(a)
#    define vec_load(p) _mm256_loadu_ps(p)
#    define vec_store(p, a) _mm256_storeu_ps(p, a)
#    define vec_add(a, b) _mm256_add_ps(a, b)
#    define vec_madd(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
/* Four floats, which every 64-bit machine has. A product and a sum instead of fmaf, which is a
 * function call on the oldest of them: the training product need not agree across levels. */
typedef float vec __attribute__((vector_size(16)));
#    define VEC 4
#    define TILE_ROWS 4
#    define TILE_VECS 2
#    define vec_zero() ((vec){0, 0, 0, 0})
#    define vec_set(a) ((vec){(a), (a), (a), (a)})
static inline vec vec_load(const float *p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline void vec_store(float *p, vec a) {
    memcpy(p, &a, sizeof a);
}
#    define vec_add(a, b) ((a) + (b))
#    define vec_madd(a, b, c) ((a) * (b) + (c))
#endif

#define TILE_COLS (TILE_VECS * VEC)
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Depths that pack_along prefetches ahead. Prefetches of packing go to the second-level cache,
 * which has more misses open at a time, and may point behind the end of the source: they read
 * nothing. */
#define PACK_AHEAD 32

/* c[rows, TILE_COLS] = sum over depth of a b, + init (if not NULL) + bias (if not NULL). */
struct tile {
    const float *a, *b;
    int64_t depth;
    float *c;
    int64_t c_stride;
    const float *init; /* may be c */
    int64_t init_stride;
    const float *bias;
};

ALWAYS_INLINE void tile_rows(const struct tile *t, const int rows) {
    vec sum[TILE_ROWS][TILE_VECS];
    const float *a = t->a, *b = t->b;
    for (int r = 0; r < rows; r++) {
        __builtin_prefetch(t->c + r * t->c_stride, 1);
        __builtin_prefetch(t->c + r * t->c_stride + TILE_COLS - 1, 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++)
            sum[r][v] = vec_zero();
    for (int64_t k = 0; k < t->depth; k++) {
        vec column[TILE_VECS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++)
            column[v] = vec_load(b + v * VEC);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vec row = vec_set(a[r]);
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECS; v++)
                sum[r][v] = vec_madd(row, column[v], sum[r][v]);
        }
        a += TILE_ROWS;
        b += TILE_COLS;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++) {
            vec value = sum[r][v];
            if (t->bias)
                value = vec_add(value, vec_load(t->bias + v * VEC));
            if (t->init)
                value = vec_add(value, vec_load(t->init + r * t->init_stride + v * VEC));
            vec_store(t->c + r * t->c_stride + v * VEC, value);
        }
}

static __attribute__((noinline)) void tile_full(const struct tile *t) {
    tile_rows(t, TILE_ROWS);
}

/* The last rows: the loop is compiled for each number of them. */
static __attribute__((noinline)) void tile_last_rows(const struct tile *t, int rows) {
#define ROWS_CASE(n)                                                                               \
case n:                                                                                            \
    tile_rows(t, (n) < TILE_ROWS ? (n) : TILE_ROWS);                                               \
    break;
    switch (rows) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
#if TILE_ROWS > 4
        ROWS_CASE(4)
        ROWS_CASE(5)
#endif
#if TILE_ROWS > 6
        ROWS_CASE(6)
        ROWS_CASE(7)
        ROWS_CASE(8)
        ROWS_CASE(9)
        ROWS_CASE(10)
        ROWS_CASE(11)
        ROWS_CASE(12)
        ROWS_CASE(13)
#endif
    default:
        tile_full(t);
    }
#undef ROWS_CASE
}

/* The last columns: the tile is made aside, so that nothing beyond `cols` is read or written. */
static __attribute__((noinline)) void tile_last_cols(const struct tile *t, int rows, int cols) {
    float aside[TILE_ROWS * TILE_COLS];
    struct tile inner = {
        .a = t->a, .b = t->b, .depth = t->depth, .c = aside, .c_stride = TILE_COLS};
    if (rows < TILE_ROWS)
        tile_last_rows(&inner, rows);
    else
        tile_full(&inner);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < cols; j++) {
            float value = aside[r * TILE_COLS + j];
            if (t->bias)
                value += t->bias[j];
            if (t->init)
                value += t->init[r * t->init_stride + j];
            t->c[r * t->c_stride + j] = value;
        }
}

static inline void tile_run(const struct tile *t, int rows, int cols) {
    if (cols < TILE_COLS)
        tile_last_cols(t, rows, cols);
    else if (rows < TILE_ROWS)
        tile_last_rows(t, rows);
    else
        tile_full(t);
}

/* The first n lanes of a load, the others zero; the first n lanes of a store. */
#if defined(EE_LEVEL_AVX512)
static inline vec vec_load_n(const float *p, int n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
static inline void vec_store_n(float *p, vec a, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
#else
#    if defined(EE_LEVEL_AVX2)
static inline vec vec_load_n(const float *p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
/* Masked stores of AVX are slow on some CPUs. */
static inline void vec_store_n(float *p, vec a, int n) {
    __m128 four = _mm256_castps256_ps128(a);
    if (n & 4) {
        _mm_storeu_ps(p, four);
        four = _mm256_extractf128_ps(a, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)(void *)p, four);
        four = _mm_movehl_ps(four, four);
        p += 2;
    }
    if (n & 1)
        _mm_store_ss(p, four);
}
#    else
static inline vec vec_load_n(const float *p, int n) {
    vec a = {0};
    for (int i = 0; i < n; i++)
        a[i] = p[i];
    return a;
}
static inline void vec_store_n(float *p, vec a, int n) {
    for (int i = 0; i < n; i++)
        p[i] = a[i];
}
#    endif
#endif

/* Transposes a square of VEC vectors. */
#if defined(EE_LEVEL_AVX512)
ALWAYS_INLINE void transpose(vec row[16]) {
    vec t[16];
#    pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        vec a = _mm512_unpacklo_ps(row[i], row[i + 1]), b = _mm512_unpackhi_ps(row[i], row[i + 1]);
        vec c = _mm512_unpacklo_ps(row[i + 2], row[i + 3]);
        vec d = _mm512_unpackhi_ps(row[i + 2], row[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
#    pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
        vec b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
        vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
        row[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        row[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        row[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
        row[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
}
#elif defined(EE_LEVEL_AVX2)
ALWAYS_INLINE void transpose(vec row[8]) {
    vec t[8];
#    pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        vec a = _mm256_unpacklo_ps(row[i], row[i + 1]), b = _mm256_unpackhi_ps(row[i], row[i + 1]);
        vec c = _mm256_unpacklo_ps(row[i + 2], row[i + 3]);
        vec d = _mm256_unpackhi_ps(row[i + 2], row[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
#    pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        row[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}
#else
static inline void transpose(vec row[4]) {
    for (int i = 0; i < 4; i++)
        for (int j = i + 1; j < 4; j++) {
            float swap = row[i][j];
            row[i][j] = row[j][i];
            row[j][i] = swap;
        }
}
#endif

/* panel[k * width + r] = source[r * stride + k] for r < valid, else 0: each row of the source is
 * contiguous in depth. */
static inline void pack_across(float *panel, int width, const float *source, int64_t stride,
                               int valid, int64_t depth) {
    for (int64_t k = 0; k < depth; k += VEC) {
        int n = (int)ee_min(VEC, depth - k);
        for (int first = 0; first < width; first += VEC) {
            int lanes = width - first < VEC ? width - first : VEC;
            vec square[VEC];
#pragma GCC unroll 16
            for (int r = 0; r < VEC; r++) {
                const float *from = source + (first + r) * stride + k;
                __builtin_prefetch(from + width * stride, 0, 2); /* for the next panel */
                square[r] = first + r >= valid ? vec_zero()
                            : n == VEC         ? vec_load(from)
                                               : vec_load_n(from, n);
            }
            transpose(square);
            float *out = panel + k * width + first;
#pragma GCC unroll 16
            for (int i = 0; i < VEC; i++) {
                if (i >= n)
                    break;
                if (lanes == VEC)
                    vec_store(out + i * width, square[i]);
                else
                    vec_store_n(out + i * width, square[i], lanes);
            }
        }
    }
}

/* panel[k * width + r] = source[k * stride + r] for r < valid, else 0; adds the sum over depth of
 * each to sums[r]. */
static inline void pack_along(float *panel, int width, const float *source, int64_t stride,
                              int valid, int64_t depth, float *sums) {
    for (int first = 0; first < width; first += VEC) {
        int lanes = width - first < VEC ? width - first : VEC;
        int n = valid - first < 0 ? 0 : valid - first < lanes ? valid - first : lanes;
        const float *from = source + first;
        float *out = panel + first;
        vec sum = vec_zero();
        for (int64_t k = 0; k < depth; k++) {
            __builtin_prefetch(from + (k + PACK_AHEAD) * stride, 0, 2);
            vec value = n == VEC ? vec_load(from + k * stride) : vec_load_n(from + k * stride, n);
            sum = vec_add(sum, value);
            if (lanes == VEC)
                vec_store(out + k * width, value);
            else
                vec_store_n(out + k * width, value, lanes);
        }
        if (n == VEC)
            vec_store(sums + first, vec_add(vec_load(sums + first), sum));
        else if (n > 0)
            vec_store_n(sums + first, vec_add(vec_load_n(sums + first, n), sum), n);
    }
}

#endif
