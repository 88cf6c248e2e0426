/* Elementary functions on sixteen lanes, the same bits at every instruction-set level. NaN gives
 * NaN. The stated errors are in units in the last place of the exact result. */
#ifndef EE_SIMD_MATH_H
#define EE_SIMD_MATH_H

#include "cpu/simd.h"

/* x - n ln 2, with ln 2 in two parts of which the first has trailing zeros. */
static inline v16 v16_minus_n_ln2(v16 x, v16 n) {
    v16 r = v16_fma(n, v16_set(-0x1.62e4p-1f), x);
    return v16_fma(n, v16_set(-0x1.7f7d1cp-20f), r);
}

/* e^x. Below -87.33 the result is 0 (no denormals), above 88.37 infinity. At most 0.9 units. */
static inline v16 v16_exp(v16 x) {
    const float low = -87.33654f, high = 88.37626f;
    /* Of two numbers v16_max and v16_min give the second where one is NaN. */
    v16 y = v16_min(v16_set(high), v16_max(v16_set(low), x));
    v16 n = v16_round(v16_mul(y, v16_set(1.44269504f)));
    v16 r = v16_minus_n_ln2(y, n);
    /* minimax polynomial on |r| <= ln 2 / 2 */
    v16 p = v16_set(0x1.6ac6b2p-10f);
    p = v16_fma(p, r, v16_set(0x1.123de0p-7f));
    p = v16_fma(p, r, v16_set(0x1.555858p-5f));
    p = v16_fma(p, r, v16_set(0x1.55548cp-3f));
    p = v16_fma(p, r, v16_set(0x1.fffffcp-2f));
    p = v16_fma(p, r, v16_set(1.0f));
    p = v16_fma(p, r, v16_set(1.0f));
    v16 e = v16_mul(p, v16_exp2i(n));
    e = v16_select_lt(x, v16_set(low), v16_set(0.0f), e);
    return v16_select_lt(v16_set(high), x, v16_set(INFINITY), e);
}

/* 1 / (1 + e^-x), 0 below -88.37, and *rest = 1 minus that, which also stays accurate when it is
 * small. At most 2.5 units. */
static inline v16 v16_sigmoid(v16 x, v16 *rest) {
    const v16 one = v16_set(1.0f);
    v16 e = v16_exp(v16_sub(v16_set(0.0f), x));
    v16 s = v16_div(one, v16_add(one, e));
    *rest = v16_select_lt(e, one, v16_mul(e, s), v16_sub(one, s));
    return s;
}

/* tanh x = e / (e + 2) with e = e^2x - 1 while that is small, 1 - 2 / (e + 2) beyond. At most 2.5
 * units below 1/2, 1 unit above. */
static inline v16 v16_tanh(v16 x) {
    const v16 zero = v16_set(0.0f), one = v16_set(1.0f), two = v16_set(2.0f);
    v16 y = v16_add(x, x);
    y = v16_select_lt(x, zero, v16_sub(zero, y), y);
    y = v16_min(v16_set(20.0f), y); /* where the result is 1 */
    v16 n = v16_round(v16_mul(y, v16_set(1.44269504f)));
    v16 r = v16_minus_n_ln2(y, n);
    /* minimax polynomial for (e^r - 1 - r) / r^2 */
    v16 p = v16_set(0x1.9c5622p-13f);
    p = v16_fma(p, r, v16_set(0x1.6d4c66p-10f));
    p = v16_fma(p, r, v16_set(0x1.1113acp-7f));
    p = v16_fma(p, r, v16_set(0x1.5554eap-5f));
    p = v16_fma(p, r, v16_set(0x1.555554p-3f));
    p = v16_fma(p, r, v16_set(0.5f));
    p = v16_fma(v16_mul(r, r), p, r);
    v16 scale = v16_exp2i(n);
    v16 e = v16_fma(scale, p, v16_sub(scale, one));
    v16 small = v16_select_lt(e, two, e, v16_set(-2.0f));
    v16 t = v16_div(small, v16_add(e, two));
    t = v16_select_lt(e, two, t, v16_add(t, one));
    return v16_select_lt(x, zero, v16_sub(zero, t), t);
}

/* Phi(x), the distribution function of the standard normal, and *density = e^(-x^2 / 2). Near 0 an
 * odd polynomial; further out e^(-x^2 / 2) times the Mills ratio, so that the lower tail keeps its
 * relative accuracy down to x = -13, where denormals begin. At most 6.1 units. */
static inline v16 v16_normal_cdf(v16 x, v16 *density) {
    const v16 zero = v16_set(0.0f), one = v16_set(1.0f), half = v16_set(0.5f);
    v16 t = v16_select_lt(x, zero, v16_sub(zero, x), x);
    t = v16_min(v16_set(16.0f), t);
    /* t^2 as a rounded square and its error, which e^x magnifies by its size */
    v16 square = v16_mul(t, t);
    v16 error = v16_fma(t, t, v16_sub(zero, square));
    v16 e = v16_exp(v16_mul(square, v16_set(-0.5f)));
    e = v16_fma(v16_mul(error, v16_set(-0.5f)), e, e);
    *density = e;
    /* Phi(-t) e^(t^2 / 2) (t + 3) as a polynomial in w = (t - 3) / (t + 3) */
    v16 inverse = v16_div(one, v16_add(t, v16_set(3.0f)));
    v16 w = v16_fma(inverse, v16_set(-6.0f), one);
    v16 p = v16_set(-0x1.1dbc2ep-13f);
    p = v16_fma(p, w, v16_set(-0x1.e62b3ep-11f));
    p = v16_fma(p, w, v16_set(0x1.fb5598p-11f));
    p = v16_fma(p, w, v16_set(0x1.c6e92ep-8f));
    p = v16_fma(p, w, v16_set(-0x1.567988p-7f));
    p = v16_fma(p, w, v16_set(-0x1.83275ep-5f));
    p = v16_fma(p, w, v16_set(0x1.d71326p-3f));
    p = v16_fma(p, w, v16_set(-0x1.04c72cp-1f));
    p = v16_fma(p, w, v16_set(0x1.754a76p-1f));
    v16 tail = v16_mul(v16_mul(p, inverse), e);
    tail = v16_select_lt(x, zero, tail, v16_sub(one, tail));
    /* (Phi(x) - 1/2) / x as a polynomial in x^2 */
    v16 c = v16_set(0x1.afc39ap-14f);
    c = v16_fma(c, square, v16_set(-0x1.35aab2p-10f));
    c = v16_fma(c, square, v16_set(0x1.46c620p-7f));
    c = v16_fma(c, square, v16_set(-0x1.105820p-4f));
    c = v16_fma(c, square, v16_set(0x1.988454p-2f));
    return v16_select_lt(t, v16_set(0.75f), v16_fma(c, x, half), tail);
}

#endif
