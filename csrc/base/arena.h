/* Arenas: one block of memory from which views are cut.
 *
 * An arena owns its bytes; what it hands out is never freed on its own. Two ways to use it:
 *
 * - lay out, then bind: with `base` NULL (after ee_arena_init) ee_arena_take only counts and gives
 *   NULL; run the same code once to measure, call ee_arena_bind, run it again to get pointers;
 * - as scratch: take a mark, take memory, go back to the mark. `high_water` tells the most that was
 *   in use, and an exhausted arena fails instead of growing, so that a step allocates nothing. */
#ifndef EE_ARENA_H
#define EE_ARENA_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

struct ee_arena {
    char *base;        /* NULL while measuring */
    size_t capacity;   /* bytes at base */
    size_t used;       /* bytes handed out, each piece rounded up to EE_ALIGNMENT */
    size_t high_water; /* largest `used` so far */
    const char *what;  /* named in errors; must outlive the arena */
};

/* Starts measuring. */
void ee_arena_init(struct ee_arena *arena, const char *what);

/* Allocates as many bytes as the measuring pass reached (at least `at_least`) and starts over.
 * The memory is zeroed. */
EE_WARN_UNUSED enum ee_status ee_arena_bind(struct ee_arena *arena, size_t at_least);

/* *out = the next `count` elements of `size` bytes, aligned to EE_ALIGNMENT; NULL while measuring.
 * Fails when count * size overflows or a bound arena is exhausted. */
EE_WARN_UNUSED enum ee_status ee_arena_take(struct ee_arena *arena, void **out, int64_t count,
                                            size_t size);

static inline size_t ee_arena_mark(const struct ee_arena *arena) {
    return arena->used;
}

static inline void ee_arena_reset(struct ee_arena *arena, size_t mark) {
    arena->used = mark;
}

/* Frees the block; the arena measures again. */
void ee_arena_free(struct ee_arena *arena);

EE_EXTERN_C_END

#endif
