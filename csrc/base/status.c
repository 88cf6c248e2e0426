#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local char last_error[1024];

enum ee_status ee_fail(enum ee_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

const char *ee_last_error(void) {
    return last_error;
}

const char *ee_status_name(enum ee_status status) {
    static const char *const names[] = {
        [EE_OK] = "ok",
        [EE_ERR_NOMEM] = "out of memory",
        [EE_ERR_INVALID] = "invalid",
        [EE_ERR_IO] = "input/output",
        [EE_ERR_UNSUPPORTED] = "unsupported",
        [EE_ERR_BUSY] = "busy",
        [EE_ERR_COMM] = "communication",
        [EE_ERR_NONFINITE] = "not finite",
        [EE_ERR_INTERNAL] = "internal",
    };
    return (unsigned)status < sizeof names / sizeof names[0] ? names[status] : "unknown";
}

void ee_assert_failed(const char *condition, const char *file, int line) {
    fprintf(stderr, "eellm: internal error: %s is false at %s:%d; please report this\n", condition,
            file, line);
    abort();
}
