/* Aligned allocation with counters, and the fault that tests inject.
 *
 * All heap memory of the core comes from here, so that the counters show what a step allocates
 * (after warm-up: nothing) and what is still held (after the last handle is gone: nothing). */
#ifndef EE_ALLOC_H
#define EE_ALLOC_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

struct ee_alloc_stats {
    uint64_t calls;      /* allocations since the process started */
    uint64_t live_count; /* allocations not yet freed */
    uint64_t live_bytes; /* their bytes, as asked for */
};

/* `bytes` of zeroed memory aligned to EE_ALIGNMENT; *out = NULL and EE_ERR_NOMEM (naming `what`)
 * when there is none. Zero bytes give a valid pointer that is to be freed as any other. Large
 * blocks are backed by fresh zero pages, which cost memory only once they are touched. */
EE_WARN_UNUSED enum ee_status ee_alloc(void **out, size_t bytes, const char *what);

/* Frees what ee_alloc gave; NULL is allowed. */
void ee_free(void *pointer);

struct ee_alloc_stats ee_alloc_stats(void);

/* For tests: the n-th allocation from now fails (1 is the next one); 0 switches that off. */
void ee_alloc_fail_at(uint64_t n);

EE_EXTERN_C_END

#endif
