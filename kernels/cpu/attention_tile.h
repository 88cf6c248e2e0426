/* Products of small tiles for attention: a tuned inner loop, with intrinsics of each level.
 *
 * Attention works on blocks of at most 64 queries by 64 keys. All five products of a block (scores,
 * output, and the three kinds of gradient) have the form C = A B or C = factor C + A B, with A read
 * element by element from any layout and the rows of B read as vectors, so that one function serves
 * them. Blocks are copied into scratch first: rows padded with zeros to a multiple of 16 columns
 * and 4 rows, or transposed.
 *
 * At the plain level products are not fused: sums here may depend on the level. */
#ifndef EE_ATTENTION_TILE_H
#define EE_ATTENTION_TILE_H

#include "cpu/simd.h"

/* For functions whose loops only unroll once their arguments are known. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

#define TILE 64     /* queries or keys of a block */
#define TILE_ROWS 4 /* rows of C that are kept in registers */

static inline int64_t round_up(int64_t n, int64_t unit) {
    return ee_ceil_div(n, unit) * unit;
}

#if defined(EE_LEVEL_AVX512)
#    define TILE_LANES 16
#    define TILE_VECTORS 4 /* vectors of a row of C that are kept in registers */
typedef __m512 tile_vector;
#    define tile_load(p) _mm512_loadu_ps(p)
#    define tile_store(p, a) _mm512_storeu_ps(p, a)
#    define tile_set(a) _mm512_set1_ps(a)
#    define tile_mul(a, b) _mm512_mul_ps(a, b)
#    define tile_multiply_add(a, b, c) _mm512_fmadd_ps(a, b, c)
#elif defined(EE_LEVEL_AVX2)
#    define TILE_LANES 8
#    define TILE_VECTORS 2
typedef __m256 tile_vector;
#    define tile_load(p) _mm256_loadu_ps(p)
#    define tile_store(p, a) _mm256_storeu_ps(p, a)
#    define tile_set(a) _mm256_set1_ps(a)
#    define tile_mul(a, b) _mm256_mul_ps(a, b)
#    define tile_multiply_add(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
#    define TILE_LANES 4
#    define TILE_VECTORS 2
typedef float tile_vector __attribute__((vector_size(16)));
static inline tile_vector tile_load(const float *p) {
    tile_vector a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline void tile_store(float *p, tile_vector a) {
    memcpy(p, &a, sizeof a);
}
static inline tile_vector tile_set(float a) {
    return (tile_vector){a, a, a, a};
}
#    define tile_mul(a, b) ((a) * (b))
#    define tile_multiply_add(a, b, c) ((a) * (b) + (c))
#endif

/* Which part of the product counts, where C or A is a block on the diagonal of the causal mask.
 * Elements outside it are left as they are. */
enum tile_shape {
    TILE_FULL,
    TILE_LOWER,       /* C is lower triangular: row i has the columns up to i */
    TILE_A_LOWER,     /* A is lower triangular: row i has depths up to i */
    TILE_A_TRANSPOSED /* A is the transpose of a lower triangle: row i has depths from i on */
};

struct tile_product {
    float *c; /* [rows, cols], rows `c_row` elements apart */
    int64_t c_row;
    const float *a; /* element (i, k) at i * a_row + k * a_depth */
    int64_t a_row, a_depth;
    const float *b; /* [depth, cols], rows `b_row` elements apart */
    int64_t b_row;
    int rows, cols, depth; /* rows and cols are rounded up to multiples of 4 and 16 */
    enum tile_shape shape;
    bool add;            /* C += A B */
    const float *factor; /* [rows] or NULL: C = factor C + A B */
};

/* Four rows of C, `vectors` vectors wide, over the depths [from, to): C = A B, and factor times the
 * old C where `factor` is not NULL. */
ALWAYS_INLINE void tile_rows(const struct tile_product *t, int vectors, int64_t row, int64_t col,
                             int64_t from, int64_t to, const float *factor) {
    tile_vector sum[TILE_ROWS][TILE_VECTORS];
    float *c = t->c + row * t->c_row + col;
    const float *a = t->a + row * t->a_row + from * t->a_depth;
    const float *b = t->b + from * t->b_row + col;
    const int64_t c_row = t->c_row, a_row = t->a_row, a_depth = t->a_depth, b_row = t->b_row;
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = tile_set(0.0f);
    for (int64_t k = from; k < to; k++, a += a_depth, b += b_row) {
        tile_vector bk[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            bk[v] = tile_load(b + v * TILE_LANES);
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++) {
            tile_vector ak = tile_set(a[r * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = tile_multiply_add(ak, bk[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *out = c + r * c_row + v * TILE_LANES;
            if (factor)
                sum[r][v] = tile_multiply_add(tile_load(out), tile_set(factor[row + r]), sum[r][v]);
            tile_store(out, sum[r][v]);
        }
}

/* Four rows of C over the depths [from, to). */
static inline void tile_columns(const struct tile_product *t, int64_t row, int64_t cols,
                                int64_t from, int64_t to, const float *factor) {
    int64_t col = 0;
    for (; col + TILE_VECTORS * TILE_LANES <= cols; col += TILE_VECTORS * TILE_LANES)
        tile_rows(t, TILE_VECTORS, row, col, from, to, factor);
#if TILE_LANES == 16
    if (cols - col == 48)
        tile_rows(t, 3, row, col, from, to, factor);
    else if (cols - col == 32)
        tile_rows(t, 2, row, col, from, to, factor);
    else if (cols - col == 16)
        tile_rows(t, 1, row, col, from, to, factor);
#endif
}

/* Sums over the depth are broken into chains of TILE terms: one long chain would err more. */
static inline void tile_multiply(const struct tile_product *t) {
    static const float one[TILE] = {[0 ... TILE - 1] = 1.0f};
    for (int64_t row = 0; row < t->rows; row += TILE_ROWS) {
        int64_t from = 0, to = t->depth, cols = round_up(t->cols, 16);
        if (t->shape == TILE_LOWER)
            cols = ee_min(cols, round_up(row + TILE_ROWS, 16));
        else if (t->shape == TILE_A_LOWER)
            to = ee_min(to, row + TILE_ROWS);
        else if (t->shape == TILE_A_TRANSPOSED)
            from = ee_min(row, to);
        const float *factor = t->add ? one : t->factor;
        tile_columns(t, row, cols, from, ee_min(to, from + TILE), factor);
        for (from += TILE; from < to; from += TILE)
            tile_columns(t, row, cols, from, ee_min(to, from + TILE), one);
    }
}

#if defined(EE_LEVEL_AVX512)
static inline void transpose16(v16 r[16]) {
    v16 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    /* Now r[4 g + j] holds rows 4 g .. 4 g + 3 of the columns j, j + 4, j + 8, j + 12. */
    for (int j = 0; j < 4; j++) {
        v16 low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        v16 high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        t[j] = _mm512_shuffle_f32x4(low, high, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(low, high, 0xDD);
        low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
        high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
        t[4 + j] = _mm512_shuffle_f32x4(low, high, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(low, high, 0xDD);
    }
    for (int i = 0; i < 16; i++)
        r[i] = t[i];
}
#elif defined(EE_LEVEL_AVX2)
static inline void transpose8(__m256 r[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    for (int i = 0; i < 8; i++)
        r[i] = t[i];
}
static inline void transpose16(v16 r[16]) {
    __m256 part[4][8];
    for (int i = 0; i < 8; i++) {
        part[0][i] = r[i].a;
        part[1][i] = r[8 + i].a;
        part[2][i] = r[i].b;
        part[3][i] = r[8 + i].b;
    }
    for (int p = 0; p < 4; p++)
        transpose8(part[p]);
    for (int i = 0; i < 8; i++) {
        r[i] = (v16){part[0][i], part[1][i]};
        r[8 + i] = (v16){part[2][i], part[3][i]};
    }
}
#else
static inline void transpose16(v16 r[16]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            float swap = r[i].lane[j];
            r[i].lane[j] = r[j].lane[i];
            r[j].lane[i] = swap;
        }
}
#endif

/* out[d * TILE + j] = in[j * stride + d] for `rows` rows j; columns up to a multiple of 16 are
 * zero. */
static inline void tile_pack_transposed(float *out, const float *in, int64_t stride, int rows,
                                        int64_t width) {
    for (int j = 0; j < rows; j += 16) {
        int count = (int)ee_min(16, rows - j);
        for (int64_t d = 0; d < width; d += 16) {
            int lanes = (int)ee_min(16, width - d);
            v16 r[16];
            for (int i = 0; i < 16; i++) {
                const float *from = in + (j + i) * stride + d;
                r[i] = i >= count    ? v16_set(0.0f)
                       : lanes == 16 ? v16_load(from)
                                     : v16_load_n(from, lanes);
            }
            transpose16(r);
            for (int i = 0; i < lanes; i++)
                v16_store(out + (d + i) * TILE + j, r[i]);
        }
    }
}

/* out[i * padded + d] = scale * in[i * stride + d], with padded = width rounded up to 16; the
 * columns from `width` on and the rows up to a multiple of 4 are zero. */
static inline void tile_pack_rows(float *out, const float *in, int64_t stride, int rows,
                                  int64_t width, float scale) {
    const int64_t padded = round_up(width, 16);
    const v16 factor = v16_set(scale);
    for (int i = 0; i < rows; i++, in += stride, out += padded) {
        int64_t d = 0;
        for (; d + 16 <= width; d += 16)
            v16_store(out + d, v16_mul(v16_load(in + d), factor));
        if (d < width)
            v16_store(out + d, v16_mul(v16_load_n(in + d, (int)(width - d)), factor));
    }
    memset(out, 0, (size_t)((round_up(rows, TILE_ROWS) - rows) * padded) * sizeof *out);
}

/* out[d] = scale * in[d], with `in` padded to a multiple of 16 columns. */
static inline void tile_unpack_row(float *out, const float *in, int64_t width, float scale) {
    const v16 factor = v16_set(scale);
    int64_t d = 0;
    for (; d + 16 <= width; d += 16)
        v16_store(out + d, v16_mul(v16_load(in + d), factor));
    if (d < width)
        v16_store_n(out + d, v16_mul(v16_load(in + d), factor), (int)(width - d));
}

#endif
