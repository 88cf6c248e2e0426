/* The two products of a block of keys in inference, several queries at a time: a tuned inner loop,
 * with intrinsics of each level.
 *
 * However many queries and keys go together, each number is the result of the same operations: a
 * score is 16 lanes over D and the tree of v16_sum; a column of the output is one chain of fused
 * multiply-adds over the keys that the query sees, in ascending order. */
#ifndef EE_ATTENTION_ROWS_TILE_H
#define EE_ATTENTION_ROWS_TILE_H

#include "cpu/attention_tile.h"

#define BLOCK 64 /* keys */

/* How many queries, and vectors of the output, are kept in registers. */
#define ROWS_QUERIES 4
#if defined(EE_LEVEL_AVX512)
#    define ROWS_SCORE_QUERIES 4
#    define ROWS_VECTORS 4
#else
#    define ROWS_SCORE_QUERIES 1
#    define ROWS_VECTORS 1
#endif

/* out[0 .. 3] = v16_sum of each of four vectors, to the bit. */
static inline void sum_four(float *out, v16 a, v16 b, v16 c, v16 d) {
#if defined(EE_LEVEL_AVX512)
    v16 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    v16 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    v16 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x0E));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x01));
    const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, all)));
#elif defined(EE_LEVEL_AVX2)
    __m256 a8 = _mm256_add_ps(a.a, a.b), b8 = _mm256_add_ps(b.a, b.b);
    __m256 c8 = _mm256_add_ps(c.a, c.b), d8 = _mm256_add_ps(d.a, d.b);
    __m256 ab =
        _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
    __m256 cd =
        _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
    __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    all = _mm256_add_ps(_mm256_shuffle_ps(all, all, 0x88), _mm256_shuffle_ps(all, all, 0xDD));
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    out[0] = v16_sum(a);
    out[1] = v16_sum(b);
    out[2] = v16_sum(c);
    out[3] = v16_sum(d);
#endif
}

/* score[r][j] = q[r] . k[j] for `queries` queries and the keys j < `keys`, rounded up to a multiple
 * of 4. The queries are padded with zeros to a multiple of 16; k is not. `ahead`, if not NULL, is
 * what will be read next: as much of it is fetched. */
ALWAYS_INLINE void score_queries(int queries, float *const score[], const float *const q[],
                                 const float *k, int64_t width, int keys, const float *ahead) {
    const int64_t whole = width / 16 * 16;
    const int lanes = (int)(width - whole);
    for (int j = 0; j < keys; j += 4) {
        const float *key[4];
        v16 sum[ROWS_SCORE_QUERIES][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            key[i] = k + (j + i < keys ? j + i : keys - 1) * width;
#pragma GCC unroll 4
            for (int r = 0; r < queries; r++)
                sum[r][i] = v16_set(0.0f);
        }
        for (int64_t d = 0; d < width; d += 16) {
            v16 part[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                part[i] = d < whole ? v16_load(key[i] + d) : v16_load_n(key[i] + d, lanes);
                if (ahead)
                    __builtin_prefetch(ahead + (j + i) * width + d, 0, 2);
            }
#pragma GCC unroll 4
            for (int r = 0; r < queries; r++) {
                v16 qd = v16_load(q[r] + d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    sum[r][i] = v16_fma(qd, part[i], sum[r][i]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < queries; r++)
            sum_four(score[r] + j, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

static inline void score_block(int queries, float *const score[], const float *const q[],
                               const float *k, int64_t width, int keys, const float *ahead) {
    int r = 0;
#if ROWS_SCORE_QUERIES > 1
    for (; r + ROWS_SCORE_QUERIES <= queries; r += ROWS_SCORE_QUERIES, ahead = NULL)
        score_queries(ROWS_SCORE_QUERIES, score + r, q + r, k, width, keys, ahead);
#endif
    for (; r < queries; r++, ahead = NULL)
        score_queries(1, score + r, q + r, k, width, keys, ahead);
}

/* A query's part of a block: its weights, and how its sum of values goes on. */
struct row_values {
    const float *weight; /* [BLOCK] */
    int from, to;        /* the keys that it sees */
    float *out;          /* [padded] = old_factor * out + factor * (sum over the block) */
    float old_factor, factor;
};

/* Columns [col, col + 16 * vectors) of `queries` queries; the last vector has `lanes` lanes. */
ALWAYS_INLINE void add_columns(int queries, int vectors, int lanes, const struct row_values *row,
                               const float *v, int64_t width, int64_t col, const float *ahead) {
    v16 sum[ROWS_QUERIES][ROWS_VECTORS];
    int from = 0, to = BLOCK; /* what all of them see */
#pragma GCC unroll 4
    for (int r = 0; r < queries; r++) {
        from = row[r].from > from ? row[r].from : from;
        to = row[r].to < to ? row[r].to : to;
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            sum[r][i] = v16_set(0.0f);
    }
    if (from > to)
        from = to = BLOCK;
    v += col;
#define ADD_VALUE(r, j)                                                                            \
    _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) {                                    \
        const float *value = v + (j) * width + 16 * i;                                             \
        sum[r][i] = v16_fma(v16_set(row[r].weight[j]),                                             \
                            lanes == 16 ? v16_load(value) : v16_load_n(value, lanes), sum[r][i]);  \
    }
#pragma GCC unroll 4
    for (int r = 0; r < queries; r++)
        for (int j = row[r].from; j < from && j < row[r].to; j++)
            ADD_VALUE(r, j)
    for (int j = from; j < to; j++) {
#pragma GCC unroll 4
        for (int i = 0; ahead && i < vectors; i++)
            __builtin_prefetch(ahead + j * width + col + 16 * i, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < queries; r++)
            ADD_VALUE(r, j)
    }
#pragma GCC unroll 4
    for (int r = 0; r < queries; r++)
        for (int j = to; j < row[r].to; j++)
            ADD_VALUE(r, j)
#undef ADD_VALUE
#pragma GCC unroll 4
    for (int r = 0; r < queries; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            float *out = row[r].out + col + 16 * i;
            v16 old = v16_mul(v16_load(out), v16_set(row[r].old_factor));
            v16_store(out, v16_fma(sum[r][i], v16_set(row[r].factor), old));
        }
}

ALWAYS_INLINE void add_values_of(int queries, const struct row_values *row, const float *v,
                                 int64_t width, const float *ahead) {
    const int lanes = (int)(width % 16);
    int64_t col = 0;
    for (; col + 16 * ROWS_VECTORS <= width; col += 16 * ROWS_VECTORS)
        add_columns(queries, ROWS_VECTORS, 16, row, v, width, col, ahead);
#if ROWS_VECTORS > 1
    for (; col + 16 <= width; col += 16)
        add_columns(queries, 1, 16, row, v, width, col, ahead);
#endif
    if (lanes > 0)
        add_columns(queries, 1, lanes, row, v, width, col, ahead);
}

/* v[BLOCK, width] into the sums of `queries` queries; `ahead` as in score_queries. */
static inline void add_values(int queries, const struct row_values *row, const float *v,
                              int64_t width, const float *ahead) {
    int r = 0;
    for (; r + ROWS_QUERIES <= queries; r += ROWS_QUERIES, ahead = NULL)
        add_values_of(ROWS_QUERIES, row + r, v, width, ahead);
    for (; r < queries; r++, ahead = NULL)
        add_values_of(1, row + r, v, width, ahead);
}

#endif
