#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const level_names[] = {"error", "warn", "info", "debug"};

static void print_line(enum ee_log_level level, const char *line) {
    fprintf(stderr, "eellm: %s: %s\n", level_names[level], line);
}

static _Atomic(ee_log_fn *) sink = print_line;
static atomic_int max_level = -1; /* -1: not read from the environment yet */

static int level_from_environment(void) {
    const char *name = getenv("EELLM_LOG");
    for (int i = 0; name && i < 4; i++)
        if (strcmp(name, level_names[i]) == 0)
            return i;
    return EE_LOG_WARN;
}

void ee_log_set_sink(ee_log_fn *fn) {
    atomic_store(&sink, fn ? fn : print_line);
}

void ee_log_set_level(enum ee_log_level level) {
    atomic_store(&max_level, (int)level);
}

void ee_log(enum ee_log_level level, const char *format, ...) {
    int limit = atomic_load(&max_level);
    if (limit < 0) {
        limit = level_from_environment();
        atomic_store(&max_level, limit);
    }
    if ((int)level > limit)
        return;
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    atomic_load (&sink)(level, line);
}
