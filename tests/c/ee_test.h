/* What the C tests share. A test program has EE_TEST_MAIN(first, second, ...) with functions that
 * take nothing; a failed check prints where and goes on, and the exit status tells. */
#ifndef EE_TEST_H
#define EE_TEST_H

#include "base/alloc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ee_test_failures;

#define EE_EXPECT(condition)                                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition);               \
            ee_test_failures++;                                                                    \
        }                                                                                          \
    } while (0)

/* The call gives `expected`, and where that is a failure, a message that contains `text`. */
#define EE_EXPECT_STATUS(call, expected, text)                                                     \
    ee_test_status(call, expected, text, #call, __FILE__, __LINE__)
#define EE_EXPECT_OK(call) EE_EXPECT_STATUS(call, EE_OK, "")

static inline bool ee_test_status(enum ee_status got, enum ee_status expected, const char *text,
                                  const char *call, const char *file, int line) {
    if (got == expected && (got == EE_OK || strstr(ee_last_error(), text)))
        return true;
    fprintf(stderr, "%s:%d: %s\n  expected %s '%s', got %s '%s'\n", file, line, call,
            ee_status_name(expected), text, ee_status_name(got), got ? ee_last_error() : "");
    ee_test_failures++;
    return false;
}

/* Fails the first, second, third ... allocation of `make`, which creates something and destroys it,
 * until it gets through: every time it must report that there is no memory, and hold none. */
static inline void ee_test_allocations(const char *name, enum ee_status (*make)(void)) {
    uint64_t n = 0;
    enum ee_status status;
    do {
        uint64_t live = ee_alloc_stats().live_count;
        ee_alloc_fail_at(++n);
        status = make();
        ee_alloc_fail_at(0);
        uint64_t held = ee_alloc_stats().live_count - live;
        if ((status != EE_OK && status != EE_ERR_NOMEM) || held) {
            fprintf(stderr, "%s, allocation %d: status %s, %d blocks held\n", name, (int)n,
                    ee_status_name(status), (int)held);
            ee_test_failures++;
            return;
        }
    } while (status != EE_OK);
    EE_EXPECT(n > 1); /* something was allocated at all */
}

#define EE_TEST_MAIN(...)                                                                          \
    int main(void) {                                                                               \
        void (*const tests[])(void) = {__VA_ARGS__};                                               \
        uint64_t live = ee_alloc_stats().live_count;                                               \
        for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)                                \
            tests[i]();                                                                            \
        EE_EXPECT(ee_alloc_stats().live_count == live);                                            \
        if (ee_test_failures)                                                                      \
            fprintf(stderr, "%d checks failed\n", ee_test_failures);                               \
        return ee_test_failures != 0;                                                              \
    }

#endif
