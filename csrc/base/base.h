/* Basic types and macros that every other file may use.
 *
 * Compiles as C11 and as C++17 (nvcc), hence EE_RESTRICT, extern "C" guards and no C11-only
 * constructs in headers. */
#ifndef EE_BASE_H
#define EE_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __FAST_MATH__
#    error "eellm relies on IEEE arithmetic: do not build it with -Ofast or -ffast-math"
#endif

#ifdef __cplusplus
#    define EE_RESTRICT __restrict__
#    define EE_EXTERN_C_BEGIN extern "C" {
#    define EE_EXTERN_C_END }
#else
#    define EE_RESTRICT restrict
#    define EE_EXTERN_C_BEGIN
#    define EE_EXTERN_C_END
#endif

#define EE_WARN_UNUSED __attribute__((warn_unused_result))
#define EE_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))

/* Every tensor starts at a multiple of this many bytes: one cache line, one AVX-512 register. */
#define EE_ALIGNMENT 64

static inline size_t ee_align_up(size_t n) {
    return (n + EE_ALIGNMENT - 1) & ~(size_t)(EE_ALIGNMENT - 1);
}

static inline int64_t ee_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t ee_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline int64_t ee_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* *out = a * b (or a + b); false when that does not fit, and then *out is not to be used. */
static inline bool ee_mul_size(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}

static inline bool ee_add_size(size_t a, size_t b, size_t *out) {
    return !__builtin_add_overflow(a, b, out);
}

#endif
