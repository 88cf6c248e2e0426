/* Time and sleep, for files that define _GNU_SOURCE. */
#ifndef EE_CLOCK_H
#define EE_CLOCK_H

#include "base/base.h"

#include <time.h>

#ifdef CLOCK_MONOTONIC

/* Seconds on a clock that never jumps and whose zero all processes of a machine share. */
static inline double ee_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Sleeps; a signal may end it early. */
static inline void ee_sleep(double seconds) {
    struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&t, NULL);
}

#endif

#endif
