/* Philox (base/rng.h) on sixteen counters at once, with intrinsics. */
#ifndef EE_SIMD_PHILOX_H
#define EE_SIMD_PHILOX_H

#include "base/rng.h"
#include "cpu/simd.h"

/* Words that one call gives: four for each of sixteen counters. */
#define EE_PHILOX_WORDS 64

#if defined(EE_LEVEL_AVX512)
#    define PHILOX_VECTORS 2
typedef __m512i philox_vector; /* eight counters, in the low halves of 64-bit lanes */

static inline philox_vector philox_set(uint64_t a) {
    return _mm512_set1_epi64((int64_t)a);
}
static inline philox_vector philox_load(const uint64_t *p) {
    return _mm512_loadu_si512(p);
}
static inline philox_vector philox_xor(philox_vector a, philox_vector b, philox_vector c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
static inline philox_vector philox_multiply(philox_vector a, philox_vector b) {
    return _mm512_mul_epu32(a, b);
}
static inline philox_vector philox_high(philox_vector a) {
    return _mm512_srli_epi64(a, 32);
}
/* The low halves of a, b, c and d, counter by counter. */
static inline void philox_store(uint32_t *p, philox_vector a, philox_vector b, philox_vector c,
                                philox_vector d) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    __m512i ab = _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA);
    __m512i cd = _mm512_mask_shuffle_epi32(c, 0xAAAA, d, _MM_PERM_CCAA);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi64(ab, first, cd));
    _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64(ab, second, cd));
}

#elif defined(EE_LEVEL_AVX2)
#    define PHILOX_VECTORS 4
typedef __m256i philox_vector; /* four counters */

static inline philox_vector philox_set(uint64_t a) {
    return _mm256_set1_epi64x((int64_t)a);
}
static inline philox_vector philox_load(const uint64_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
static inline philox_vector philox_xor(philox_vector a, philox_vector b, philox_vector c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
static inline philox_vector philox_multiply(philox_vector a, philox_vector b) {
    return _mm256_mul_epu32(a, b);
}
static inline philox_vector philox_high(philox_vector a) {
    return _mm256_srli_epi64(a, 32);
}
static inline void philox_store(uint32_t *p, philox_vector a, philox_vector b, philox_vector c,
                                philox_vector d) {
    __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
    __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xAA);
    __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
    __m256i *out = (__m256i *)(void *)p;
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
#endif

/* words[4 * i + w] = word w of Philox(key, high, counter + i). */
static inline void philox_words(uint32_t words[EE_PHILOX_WORDS], uint64_t key, uint64_t high,
                                uint64_t counter) {
#ifdef PHILOX_VECTORS
    enum { LANES = 16 / PHILOX_VECTORS };
    philox_vector c0[PHILOX_VECTORS], c1[PHILOX_VECTORS], c2[PHILOX_VECTORS], c3[PHILOX_VECTORS];
    for (int v = 0; v < PHILOX_VECTORS; v++) {
        uint64_t counters[LANES];
        for (int l = 0; l < LANES; l++)
            counters[l] = counter + (uint64_t)(v * LANES + l);
        c0[v] = philox_load(counters);
        c1[v] = philox_high(c0[v]);
        c2[v] = philox_set(high);
        c3[v] = philox_set(high >> 32);
    }
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    const philox_vector m0 = philox_set(0xD2511F53u), m1 = philox_set(0xCD9E8D57u);
    for (int round = 0; round < 10; round++) {
        /* Only low halves count: what the high halves hold is never read. */
        for (int v = 0; v < PHILOX_VECTORS; v++) {
            philox_vector p0 = philox_multiply(m0, c0[v]), p1 = philox_multiply(m1, c2[v]);
            c0[v] = philox_xor(philox_high(p1), c1[v], philox_set(k0));
            c2[v] = philox_xor(philox_high(p0), c3[v], philox_set(k1));
            c1[v] = p1;
            c3[v] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < PHILOX_VECTORS; v++)
        philox_store(words + 4 * LANES * v, c0[v], c1[v], c2[v], c3[v]);
#else
    for (uint64_t i = 0; i < 16; i++) {
        struct ee_philox random = ee_philox(key, high, counter + i);
        memcpy(words + 4 * i, random.word, sizeof random.word);
    }
#endif
}

#endif
