/* Sixteen float lanes, whatever the instruction set. Only this file, simd_philox.h and the inner
 * loops of products and attention (matmul_kernel.h, attention_*tile.h) use intrinsics.
 *
 * Every function gives the same bits at every level: a * b + c is one fused operation, sums over
 * lanes use one fixed tree, and nothing is contracted by the compiler (-ffp-contract=off). */
#ifndef EE_SIMD_H
#define EE_SIMD_H

#include "base/base.h"

#include <math.h>
#include <string.h>

#if defined(EE_LEVEL_AVX512)
#    include <immintrin.h>

typedef __m512 v16;

static inline v16 v16_set(float a) {
    return _mm512_set1_ps(a);
}
static inline v16 v16_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline void v16_store(float *p, v16 a) {
    _mm512_storeu_ps(p, a);
}
static inline v16 v16_load_n(const float *p, int n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
static inline void v16_store_n(float *p, v16 a, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
static inline v16 v16_add(v16 a, v16 b) {
    return _mm512_add_ps(a, b);
}
static inline v16 v16_sub(v16 a, v16 b) {
    return _mm512_sub_ps(a, b);
}
static inline v16 v16_mul(v16 a, v16 b) {
    return _mm512_mul_ps(a, b);
}
static inline v16 v16_div(v16 a, v16 b) {
    return _mm512_div_ps(a, b);
}
static inline v16 v16_sqrt(v16 a) {
    return _mm512_sqrt_ps(a);
}
/* a * b + c */
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return _mm512_fmadd_ps(a, b, c);
}
/* The larger; b where either is NaN. */
static inline v16 v16_max(v16 a, v16 b) {
    return _mm512_max_ps(a, b);
}
static inline v16 v16_min(v16 a, v16 b) {
    return _mm512_min_ps(a, b);
}
/* a < b ? x : y, lane by lane; y where either is NaN. */
static inline v16 v16_select_lt(v16 a, v16 b, v16 x, v16 y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
/* 2^n for whole n in -126 .. 127. */
static inline v16 v16_exp2i(v16 n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
static inline v16 v16_load_bf16(const uint16_t *p) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline void v16_halves_(v16 a, __m256 *low, __m256 *high) {
    *low = _mm512_castps512_ps256(a);
    *high = _mm512_extractf32x8_ps(a, 1);
}

#elif defined(EE_LEVEL_AVX2)
#    include <immintrin.h>

typedef struct {
    __m256 a, b;
} v16;

#    define V16_UNARY_(name, f, ...)                                                               \
        static inline v16 name(v16 x) {                                                            \
            return (v16){f(x.a), f(x.b)};                                                          \
        }
#    define V16_BINARY_(name, f)                                                                   \
        static inline v16 name(v16 x, v16 y) {                                                     \
            return (v16){f(x.a, y.a), f(x.b, y.b)};                                                \
        }

static inline v16 v16_set(float a) {
    return (v16){_mm256_set1_ps(a), _mm256_set1_ps(a)};
}
static inline v16 v16_load(const float *p) {
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
static inline void v16_store(float *p, v16 a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + 8, a.b);
}
static inline v16 v16_load_n(const float *p, int n) {
    float lanes[16] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v16_load(lanes);
}
static inline void v16_store_n(float *p, v16 a, int n) {
    float lanes[16];
    v16_store(lanes, a);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
V16_BINARY_(v16_add, _mm256_add_ps)
V16_BINARY_(v16_sub, _mm256_sub_ps)
V16_BINARY_(v16_mul, _mm256_mul_ps)
V16_BINARY_(v16_div, _mm256_div_ps)
V16_BINARY_(v16_max, _mm256_max_ps)
V16_BINARY_(v16_min, _mm256_min_ps)
V16_UNARY_(v16_sqrt, _mm256_sqrt_ps)
static inline v16 v16_fma(v16 x, v16 y, v16 z) {
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline v16 v16_select_lt(v16 a, v16 b, v16 x, v16 y) {
    return (v16){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
                 _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
static inline __m256 v16_exp2i_half_(__m256 n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
V16_UNARY_(v16_exp2i, v16_exp2i_half_)
static inline v16 v16_load_bf16(const uint16_t *p) {
    const __m128i *half = (const __m128i *)(const void *)p;
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(half));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1));
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
static inline void v16_halves_(v16 a, __m256 *low, __m256 *high) {
    *low = a.a;
    *high = a.b;
}

#else

typedef struct {
    float lane[16];
} v16;

#    define V16_LANES_(expression)                                                                 \
        v16 r;                                                                                     \
        for (int i = 0; i < 16; i++)                                                               \
            r.lane[i] = (expression);                                                              \
        return r;

static inline v16 v16_set(float a) {
    V16_LANES_(a)
}
static inline v16 v16_load(const float *p) {
    v16 r;
    memcpy(r.lane, p, sizeof r.lane);
    return r;
}
static inline void v16_store(float *p, v16 a) {
    memcpy(p, a.lane, sizeof a.lane);
}
static inline v16 v16_load_n(const float *p, int n) {
    v16 r = {{0}};
    memcpy(r.lane, p, (size_t)n * sizeof *p);
    return r;
}
static inline void v16_store_n(float *p, v16 a, int n) {
    memcpy(p, a.lane, (size_t)n * sizeof *p);
}
static inline v16 v16_add(v16 a, v16 b) {
    V16_LANES_(a.lane[i] + b.lane[i])
}
static inline v16 v16_sub(v16 a, v16 b) {
    V16_LANES_(a.lane[i] - b.lane[i])
}
static inline v16 v16_mul(v16 a, v16 b) {
    V16_LANES_(a.lane[i] * b.lane[i])
}
static inline v16 v16_div(v16 a, v16 b) {
    V16_LANES_(a.lane[i] / b.lane[i])
}
static inline v16 v16_sqrt(v16 a) {
    V16_LANES_(sqrtf(a.lane[i]))
}
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    V16_LANES_(fmaf(a.lane[i], b.lane[i], c.lane[i]))
}
static inline v16 v16_max(v16 a, v16 b) {
    V16_LANES_(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
}
static inline v16 v16_min(v16 a, v16 b) {
    V16_LANES_(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
}
static inline v16 v16_select_lt(v16 a, v16 b, v16 x, v16 y) {
    V16_LANES_(a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i])
}
static inline float v16_exp2i_lane_(float n) {
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float r;
    memcpy(&r, &bits, sizeof r);
    return r;
}
static inline v16 v16_exp2i(v16 n) {
    V16_LANES_(v16_exp2i_lane_(n.lane[i]))
}
static inline v16 v16_load_bf16(const uint16_t *p) {
    v16 r;
    for (int i = 0; i < 16; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&r.lane[i], &bits, sizeof bits);
    }
    return r;
}

#endif

/* Sum over the lanes: i and i + 8, then i + 4, i + 2, i + 1. */
static inline float v16_sum(v16 a) {
#if defined(EE_LEVEL_AVX512) || defined(EE_LEVEL_AVX2)
    __m256 low, high;
    v16_halves_(a, &low, &high);
    low = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            a.lane[i] += a.lane[i + width];
    return a.lane[0];
#endif
}

/* The largest lane. NaN lanes give an unspecified result. */
static inline float v16_max_lane(v16 a) {
#if defined(EE_LEVEL_AVX512) || defined(EE_LEVEL_AVX2)
    __m256 low, high;
    v16_halves_(a, &low, &high);
    low = _mm256_max_ps(low, high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
    float m = a.lane[0];
    for (int i = 1; i < 16; i++)
        m = a.lane[i] > m ? a.lane[i] : m;
    return m;
#endif
}

/* The nearest whole number, ties to even, for |a| < 2^22. */
static inline v16 v16_round(v16 a) {
    v16 magic = v16_set(0x1.8p23f);
    return v16_sub(v16_add(a, magic), magic);
}

#endif
