/* bfloat16 and float16 to and from float32, by their bits: plain C that compilers vectorise. */
#ifndef EE_CPU_HALF_H
#define EE_CPU_HALF_H

#include "base/base.h"

#include <string.h>

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float from_bf16(uint16_t x) {
    return float_of((uint32_t)x << 16);
}

static inline uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    uint32_t nan = bits >> 16 | 0x40u; /* quiet, with what is left of the payload */
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

static inline float from_f16(uint16_t x) {
    uint32_t magnitude = (uint32_t)(x & 0x7FFF) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    /* Exponents differ by 112; the product also makes denormals right. */
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7F800000u;
    return float_of(sign | (magnitude >= 0x0F800000u ? special : finite));
}

static inline uint16_t to_f16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    /* normal: the exponent less 112, rounded to nearest even in the 13 bits that go */
    uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
    /* below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded */
    uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t nan = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half; /* from 65520 on */
    half = magnitude > 0x7F800000u ? nan : half;
    return (uint16_t)(sign | half);
}

#endif
