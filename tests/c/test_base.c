/* csrc/base: status, allocation, arena, random numbers, threads, log. */
#define _GNU_SOURCE
#include "base/arena.h"
#include "base/log.h"
#include "base/rng.h"
#include "base/threads.h"
#include "ee_test.h"

#include <pthread.h>
#include <stdatomic.h>

static void *fail_elsewhere(void *arg) {
    (void)arg;
    EE_EXPECT(ee_last_error()[0] == 0);
    EE_EXPECT(ee_fail(EE_ERR_IO, "elsewhere") == EE_ERR_IO);
    return NULL;
}

static enum ee_status try_twice(int *steps) {
    ++*steps;
    EE_TRY(ee_fail(EE_ERR_COMM, "the first"));
    ++*steps;
    return EE_OK;
}

static void test_status(void) {
    EE_EXPECT_STATUS(ee_fail(EE_ERR_INVALID, "expected %d, got %s", 3, "four"), EE_ERR_INVALID,
                     "expected 3, got four");
    pthread_t thread;
    EE_EXPECT(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0);
    pthread_join(thread, NULL);
    EE_EXPECT(strcmp(ee_last_error(), "expected 3, got four") == 0);

    char text[3000];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    EE_EXPECT(ee_fail(EE_ERR_IO, "%s", text) == EE_ERR_IO);
    EE_EXPECT(strlen(ee_last_error()) == 1023);

    int steps = 0;
    EE_EXPECT_STATUS(try_twice(&steps), EE_ERR_COMM, "the first");
    EE_EXPECT(steps == 1);

    EE_EXPECT(strcmp(ee_status_name(EE_OK), "ok") == 0);
    for (int s = EE_OK; s <= EE_ERR_INTERNAL; s++)
        EE_EXPECT(ee_status_name((enum ee_status)s) &&
                  strcmp(ee_status_name((enum ee_status)s), "unknown") != 0);
    EE_EXPECT(strcmp(ee_status_name((enum ee_status)1000), "unknown") == 0);
}

static void test_arithmetic(void) {
    size_t n;
    EE_EXPECT(ee_align_up(0) == 0 && ee_align_up(1) == 64 && ee_align_up(64) == 64);
    EE_EXPECT(ee_min(-1, 2) == -1 && ee_max(-1, 2) == 2 && ee_ceil_div(65, 64) == 2);
    EE_EXPECT(ee_mul_size(3, 4, &n) && n == 12 && !ee_mul_size(SIZE_MAX / 2, 3, &n));
    EE_EXPECT(ee_add_size(3, 4, &n) && n == 7 && !ee_add_size(SIZE_MAX, 1, &n));
}

static bool all_zero(const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bytes[i])
            return false;
    return true;
}

static void test_alloc(void) {
    /* Below and above the size from which blocks are mapped. */
    static const size_t sizes[] = {0,
                                   1,
                                   63,
                                   64,
                                   1000,
                                   (1 << 20) - 128,
                                   (1 << 20) + 1,
                                   5 << 20,
                                   (4 << 20) - 64,
                                   (2 << 20) + 1,
                                   3 << 20};
    struct ee_alloc_stats before = ee_alloc_stats();
    void *blocks[11];
    size_t total = 0;
    for (int i = 0; i < 11; i++) {
        if (!EE_EXPECT_OK(ee_alloc(&blocks[i], sizes[i], "a block")))
            return;
        EE_EXPECT(((uintptr_t)blocks[i] & (EE_ALIGNMENT - 1)) == 0);
        /* Large ones begin at a huge page, behind the allocator's own bytes. */
        EE_EXPECT(sizes[i] < (2 << 20) || (uintptr_t)blocks[i] % (2 << 20) == EE_ALIGNMENT);
        EE_EXPECT(all_zero(blocks[i], sizes[i]));
        memset(blocks[i], 0x5a, sizes[i]);
        total += sizes[i];
    }
    struct ee_alloc_stats held = ee_alloc_stats();
    EE_EXPECT(held.calls == before.calls + 11 && held.live_count == before.live_count + 11);
    EE_EXPECT(held.live_bytes == before.live_bytes + total);
    for (int i = 0; i < 11; i++)
        ee_free(blocks[i]);
    ee_free(NULL);
    struct ee_alloc_stats after = ee_alloc_stats();
    EE_EXPECT(after.live_count == before.live_count && after.live_bytes == before.live_bytes);

    void *block = &total;
    EE_EXPECT_STATUS(ee_alloc(&block, SIZE_MAX - 10, "the world"), EE_ERR_NOMEM, "the world");
    EE_EXPECT(!block);
    EE_EXPECT_STATUS(ee_alloc(&block, PTRDIFF_MAX, "the world"), EE_ERR_NOMEM, "addressed");
    EE_EXPECT_STATUS(ee_alloc(&block, (size_t)1 << 60, "the world"), EE_ERR_NOMEM, "the world");

    ee_alloc_fail_at(2);
    EE_EXPECT_OK(ee_alloc(&block, 8, "first"));
    ee_free(block);
    EE_EXPECT_STATUS(ee_alloc(&block, 8, "second"), EE_ERR_NOMEM, "second");
    EE_EXPECT_OK(ee_alloc(&block, 8, "third"));
    ee_free(block);
}

/* The same layout in both passes. */
static enum ee_status lay_out(struct ee_arena *arena, void **pieces) {
    EE_TRY(ee_arena_take(arena, &pieces[0], 10, 4));
    EE_TRY(ee_arena_take(arena, &pieces[1], 0, 4));
    return ee_arena_take(arena, &pieces[2], 100, 8);
}

static void test_arena(void) {
    struct ee_arena arena;
    void *pieces[3];
    ee_arena_init(&arena, "activations");
    EE_EXPECT_OK(lay_out(&arena, pieces));
    EE_EXPECT(!pieces[0] && !pieces[1] && !pieces[2]);
    EE_EXPECT(arena.high_water == 64 + 832 && ee_arena_mark(&arena) == arena.high_water);
    EE_EXPECT_STATUS(ee_arena_take(&arena, pieces, INT64_MAX, 8), EE_ERR_NOMEM, "activations");
    EE_EXPECT_STATUS(ee_arena_take(&arena, pieces, -1, 8), EE_ERR_NOMEM, "activations");
    EE_EXPECT(arena.used == 64 + 832);

    EE_EXPECT_OK(ee_arena_bind(&arena, 0));
    EE_EXPECT(arena.capacity == 64 + 832);
    EE_EXPECT_OK(lay_out(&arena, pieces));
    EE_EXPECT(pieces[0] == arena.base && pieces[2] == arena.base + 64);
    EE_EXPECT(all_zero(pieces[2], 800));
    memset(pieces[2], 1, 800);
    EE_EXPECT_STATUS(ee_arena_take(&arena, pieces, 1, 1), EE_ERR_INTERNAL, "activations");
    EE_EXPECT(!pieces[0]);

    ee_arena_reset(&arena, 64);
    void *again;
    EE_EXPECT_OK(ee_arena_take(&arena, &again, 832, 1));
    EE_EXPECT(again == pieces[2] && arena.high_water == 64 + 832);
    ee_arena_free(&arena);
    EE_EXPECT(!arena.base && !arena.capacity && !arena.used);

    EE_EXPECT_OK(ee_arena_bind(&arena, 4096));
    EE_EXPECT(arena.capacity == 4096);
    ee_arena_free(&arena);
}

static enum ee_status make_arena(void) {
    struct ee_arena arena;
    ee_arena_init(&arena, "an arena");
    EE_TRY(ee_arena_bind(&arena, 100));
    ee_arena_free(&arena);
    return EE_OK;
}

static void test_random(void) {
    /* The known-answer vectors of the authors' library (Random123, kat_vectors). */
    static const struct {
        uint64_t key, high, low;
        uint32_t word[4];
    } known[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {0x299f31d0a4093822,
         0x0370734413198a2e,
         0x85a308d3243f6a88,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        struct ee_philox got = ee_philox(known[i].key, known[i].high, known[i].low);
        EE_EXPECT(memcmp(got.word, known[i].word, sizeof got.word) == 0);
    }
    EE_EXPECT(ee_uniform_from_bits(0) == 0.0f && ee_uniform_from_bits(UINT32_MAX) < 1.0f);
    EE_EXPECT(ee_uniform_from_bits(0x80000000u) == 0.5f);
    /* The test vectors of FNV-1a, 64 bits. */
    EE_EXPECT(ee_hash_name("") == 0xcbf29ce484222325u);
    EE_EXPECT(ee_hash_name("a") == 0xaf63dc4c8601ec8cu);
    EE_EXPECT(ee_hash_name("foobar") == 0x85944171f73967e8u);
    EE_EXPECT(ee_mix(1, 2) != ee_mix(2, 1) && ee_mix(0, 1) != ee_mix(0, 2));
}

#define MOST_TASKS 1000

struct record {
    struct ee_pool *pool;
    int64_t count;
    int owner[MOST_TASKS];
    atomic_int calls;
    int phases[8];
};

static void note_tasks(void *arg, int64_t first, int64_t last, int thread) {
    struct record *record = arg;
    atomic_fetch_add(&record->calls, 1);
    for (int64_t i = first; i < last; i++)
        record->owner[i] = record->owner[i] == -1 ? thread : -2;
}

/* Every thread adds to its own number, then reads all the others', phase after phase. */
static void note_phases(void *arg, int64_t first, int64_t last, int thread) {
    struct record *record = arg;
    int threads = ee_pool_threads(record->pool);
    EE_EXPECT(first == thread && last == thread + 1);
    for (int phase = 1; phase <= 50; phase++) {
        record->phases[thread] = phase;
        ee_pool_barrier(record->pool);
        for (int t = 0; t < threads; t++)
            if (record->phases[t] != phase)
                atomic_fetch_add(&record->calls, 1);
        ee_pool_barrier(record->pool);
    }
}

static void check_pool(struct ee_pool *pool, struct record *record, int threads) {
    static const int64_t counts[] = {0, 1, 2, 3, 7, 8, 9, 64, MOST_TASKS};
    EE_EXPECT(ee_pool_threads(pool) == threads);
    for (int run = 0; run < 300; run++) {
        int64_t count = counts[run % 9];
        for (int64_t i = 0; i < MOST_TASKS; i++)
            record->owner[i] = -1;
        atomic_store(&record->calls, 0);
        ee_pool_run(pool, note_tasks, record, count);
        EE_EXPECT(atomic_load(&record->calls) == ee_min(count, threads));
        bool right = true;
        for (int t = 0; t < threads && count > 1; t++)
            for (int64_t i = t * count / threads; i < (t + 1) * count / threads; i++)
                right &= record->owner[i] == t;
        EE_EXPECT(right && (count != 1 || record->owner[0] == 0));
        EE_EXPECT(count == MOST_TASKS || record->owner[count] == -1);
    }
    record->pool = pool;
    atomic_store(&record->calls, 0);
    ee_pool_run(pool, note_phases, record, threads);
    EE_EXPECT(atomic_load(&record->calls) == 0);
}

static void test_threads(void) {
    EE_EXPECT(ee_cpu_count() >= 1);
    struct record *record = calloc(1, sizeof *record);
    struct ee_pool *pool;
    for (int threads = 1; record && threads <= 8; threads++) {
        if (!EE_EXPECT_OK(ee_pool_create(&pool, threads)))
            break;
        check_pool(pool, record, threads);
        ee_pool_destroy(pool);
    }
    free(record);
    EE_EXPECT_OK(ee_pool_create(&pool, 0));
    EE_EXPECT(ee_pool_threads(pool) == ee_cpu_count());
    ee_pool_destroy(pool);
    ee_pool_destroy(NULL);
    EE_EXPECT_STATUS(ee_pool_create(&pool, -1), EE_ERR_INVALID, "threads");
    EE_EXPECT(!pool);
    EE_EXPECT_STATUS(ee_pool_create(&pool, 1025), EE_ERR_INVALID, "got 1025");
}

static enum ee_status make_pool(void) {
    struct ee_pool *pool;
    EE_TRY(ee_pool_create(&pool, 3));
    ee_pool_destroy(pool);
    return EE_OK;
}

static char logged[1100];
static enum ee_log_level logged_level;

static void keep_line(enum ee_log_level level, const char *line) {
    logged_level = level;
    snprintf(logged, sizeof logged, "%s", line);
}

static void test_log(void) {
    ee_log_set_sink(keep_line);
    EE_EXPECT(setenv("EELLM_LOG", "info", 1) == 0);
    ee_log(EE_LOG_DEBUG, "quiet");
    EE_EXPECT(logged[0] == 0);
    ee_log(EE_LOG_INFO, "step %d", 7);
    EE_EXPECT(strcmp(logged, "step 7") == 0 && logged_level == EE_LOG_INFO);
    ee_log_set_level(EE_LOG_ERROR);
    ee_log(EE_LOG_WARN, "quiet");
    EE_EXPECT(strcmp(logged, "step 7") == 0);
    char text[3000];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    ee_log(EE_LOG_ERROR, "%s", text);
    EE_EXPECT(strlen(logged) == 1023);
    ee_log_set_sink(NULL);
    ee_log(EE_LOG_WARN, "this line must not be seen");
    ee_log_set_level(EE_LOG_WARN);
}

static void test_allocations(void) {
    ee_test_allocations("ee_arena_bind", make_arena);
    ee_test_allocations("ee_pool_create", make_pool);
}

EE_TEST_MAIN(test_status, test_arithmetic, test_alloc, test_arena, test_random, test_threads,
             test_log, test_allocations)
