#include "base/arena.h"

#include "base/alloc.h"

void ee_arena_init(struct ee_arena *arena, const char *what) {
    *arena = (struct ee_arena){.what = what};
}

enum ee_status ee_arena_bind(struct ee_arena *arena, size_t at_least) {
    size_t bytes = arena->high_water > at_least ? arena->high_water : at_least;
    void *base;
    EE_TRY(ee_alloc(&base, bytes, arena->what));
    arena->base = base;
    arena->capacity = bytes;
    arena->used = 0;
    arena->high_water = 0;
    return EE_OK;
}

enum ee_status ee_arena_take(struct ee_arena *arena, void **out, int64_t count, size_t size) {
    *out = NULL;
    size_t bytes, end;
    if (count < 0 || !ee_mul_size((size_t)count, size, &bytes) ||
        bytes > PTRDIFF_MAX - 2 * EE_ALIGNMENT ||
        !ee_add_size(arena->used, ee_align_up(bytes), &end))
        EE_FAIL(EE_ERR_NOMEM, "%s: %lld elements of %zu bytes cannot be addressed", arena->what,
                (long long)count, size);
    if (arena->base) {
        if (end > arena->capacity)
            EE_FAIL(EE_ERR_INTERNAL, "%s: needs %zu bytes, %zu were planned", arena->what, end,
                    arena->capacity);
        *out = arena->base + arena->used;
    }
    arena->used = end;
    if (end > arena->high_water)
        arena->high_water = end;
    return EE_OK;
}

void ee_arena_free(struct ee_arena *arena) {
    ee_free(arena->base);
    ee_arena_init(arena, arena->what);
}
