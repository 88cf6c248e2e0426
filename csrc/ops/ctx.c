#include "ops/ctx.h"

#include "base/alloc.h"
#include "cpu/cpu.h"

#include <stdlib.h>
#include <string.h>

#define SCRATCH_AT_START ((size_t)1 << 20)

static const struct {
    const char *name;
    const struct ee_ops *ops;
} levels[EE_ISA_COUNT] = {
    [EE_ISA_PLAIN] = {"plain", &ee_cpu_ops_plain},
#ifdef __x86_64__
    [EE_ISA_AVX2] = {"avx2", &ee_cpu_ops_avx2},
    [EE_ISA_AVX512] = {"avx512", &ee_cpu_ops_avx512},
#else
    [EE_ISA_AVX2] = {"avx2", NULL},
    [EE_ISA_AVX512] = {"avx512", NULL},
#endif
};

const char *ee_isa_name(enum ee_isa isa) {
    return levels[isa].name;
}

static bool runs(enum ee_isa isa) {
#ifdef __x86_64__
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == EE_ISA_AVX2)
        return avx2;
    if (isa == EE_ISA_AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == EE_ISA_PLAIN;
}

enum ee_isa ee_isa_best(void) {
    enum ee_isa isa = EE_ISA_COUNT - 1;
    while (!runs(isa))
        isa--;
    return isa;
}

enum ee_status ee_isa_from_name(enum ee_isa *isa, const char *name) {
    *isa = ee_isa_best();
    if (!name || !*name)
        name = getenv("EELLM_ISA");
    if (!name || !*name)
        return EE_OK;
    for (int i = 0; i < EE_ISA_COUNT; i++) {
        if (strcmp(name, levels[i].name) != 0)
            continue;
        if (!runs((enum ee_isa)i))
            EE_FAIL(EE_ERR_INVALID, "this CPU does not run the instruction set %s; its best is %s",
                    name, levels[*isa].name);
        *isa = (enum ee_isa)i;
        return EE_OK;
    }
    EE_FAIL(EE_ERR_INVALID, "unknown instruction set '%s' (expected plain, avx2 or avx512)", name);
}

enum ee_status ee_ctx_create(struct ee_ctx **out, enum ee_isa isa, int threads) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_ctx), "a context"));
    struct ee_ctx *ctx = memory;
    ctx->ops = levels[isa].ops;
    ee_arena_init(&ctx->scratch, "scratch");
    enum ee_status status;
    EE_GOTO(status, ee_arena_bind(&ctx->scratch, SCRATCH_AT_START), fail);
    EE_GOTO(status, ee_pool_create(&ctx->pool, threads), fail);
    *out = ctx;
    return EE_OK;
fail:
    ee_ctx_destroy(ctx);
    return status;
}

void ee_ctx_destroy(struct ee_ctx *ctx) {
    if (!ctx)
        return;
    ee_pool_destroy(ctx->pool);
    while (ctx->overflow_count > 0)
        ee_free(ctx->overflow[--ctx->overflow_count]);
    ee_arena_free(&ctx->scratch);
    ee_free(ctx);
}

struct ee_scratch_mark ee_scratch_mark(const struct ee_ctx *ctx) {
    return (struct ee_scratch_mark){ctx->scratch.used, ctx->overflow_count, ctx->overflow_bytes};
}

enum ee_status ee_scratch_take(struct ee_ctx *ctx, void **out, int64_t count, size_t size) {
    *out = NULL;
    size_t bytes;
    if (count < 0 || !ee_mul_size((size_t)count, size, &bytes) || bytes > PTRDIFF_MAX / 2)
        EE_FAIL(EE_ERR_NOMEM, "scratch: %lld elements of %zu bytes cannot be addressed",
                (long long)count, size);
    bytes = ee_align_up(bytes);
    struct ee_arena *arena = &ctx->scratch;
    if (bytes <= arena->capacity - arena->used)
        return ee_arena_take(arena, out, (int64_t)bytes, 1);
    if (ctx->overflow_count == (int)(sizeof ctx->overflow / sizeof ctx->overflow[0]))
        EE_FAIL(EE_ERR_INTERNAL, "too many pieces of scratch memory");
    EE_TRY(ee_alloc(out, bytes, "scratch memory"));
    ctx->overflow[ctx->overflow_count++] = *out;
    ctx->overflow_bytes += bytes;
    size_t total = arena->used + ctx->overflow_bytes;
    if (total > arena->high_water)
        arena->high_water = total;
    return EE_OK;
}

void ee_scratch_release(struct ee_ctx *ctx, struct ee_scratch_mark mark) {
    while (ctx->overflow_count > mark.overflow)
        ee_free(ctx->overflow[--ctx->overflow_count]);
    ctx->overflow_bytes = mark.overflow_bytes;
    struct ee_arena *arena = &ctx->scratch;
    ee_arena_reset(arena, mark.used);
    if (mark.used > 0 || mark.overflow > 0 || arena->high_water <= arena->capacity)
        return;
    /* Grow while nothing is in use; if that fails, the heap serves as before. */
    struct ee_arena larger;
    ee_arena_init(&larger, arena->what);
    if (ee_arena_bind(&larger, arena->high_water + arena->high_water / 8) == EE_OK) {
        ee_arena_free(arena);
        *arena = larger;
    }
}
