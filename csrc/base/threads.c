#define _GNU_SOURCE
#include "base/threads.h"

#include "base/alloc.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#    define cpu_relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#    define cpu_relax() __asm__ volatile("yield")
#else
#    define cpu_relax() ((void)0)
#endif

/* About 50 microseconds: longer than the gaps between the operations of a step, short enough not
 * to burn a core while Python runs. */
#define SPIN_ROUNDS 2000

/* Every so many rounds a waiting thread lets others run: where other processes leave the pool less
 * than a core a thread, two of its threads may share one, and the one that spins would hold up the
 * one it waits for. */
#define YIELD_ROUNDS 64

/* A 32-bit word that one side changes and others wait on. */
struct gate {
    _Alignas(EE_ALIGNMENT) atomic_uint value;
    atomic_uint sleepers;
};

struct worker {
    struct ee_pool *pool;
    int thread;
    pthread_t handle;
};

struct ee_pool {
    int threads;
    unsigned forks; /* of the process, as this pool's threads were started */
    int started;    /* workers that were created, for the clean-up of a failed start */
    ee_task_fn *fn;
    void *arg;
    int64_t count;
    atomic_bool stop;
    struct gate work;    /* bumped when there is a new task */
    struct gate arrived; /* workers that are done with it */
    struct gate barrier_generation;
    atomic_uint barrier_count;
    int spin_rounds;
    struct worker *workers;
};

/* Forks of this process since the first pool: a forked child has none of its parent's threads. */
static atomic_uint forks;
static pthread_once_t count_forks_once = PTHREAD_ONCE_INIT;

static void count_fork(void) {
    atomic_fetch_add(&forks, 1);
}

static void count_forks(void) {
    pthread_atfork(NULL, NULL, count_fork);
}

static void gate_wake(struct gate *gate) {
    if (atomic_load(&gate->sleepers))
        syscall(SYS_futex, &gate->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Returns once the gate's value differs from `old`. */
static void gate_wait(struct gate *gate, unsigned old, int spin_rounds) {
    for (int i = 0; i < spin_rounds; i++) {
        if (atomic_load_explicit(&gate->value, memory_order_acquire) != old)
            return;
        if (i % YIELD_ROUNDS == YIELD_ROUNDS - 1)
            sched_yield();
        else
            cpu_relax();
    }
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->value) == old)
        syscall(SYS_futex, &gate->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&gate->sleepers, 1);
}

static void run_share(struct ee_pool *pool, int thread) {
    int64_t first = thread * pool->count / pool->threads;
    int64_t last = (thread + 1) * pool->count / pool->threads;
    if (first < last)
        pool->fn(pool->arg, first, last, thread);
}

static void *worker_main(void *arg) {
    struct worker *self = arg;
    struct ee_pool *pool = self->pool;
    for (unsigned seen = 0;; seen++) {
        gate_wait(&pool->work, seen, pool->spin_rounds);
        if (atomic_load(&pool->stop))
            return NULL;
        run_share(pool, self->thread);
        atomic_fetch_add(&pool->arrived.value, 1);
        gate_wake(&pool->arrived);
    }
}

int ee_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? n : 1;
}

/* Starts the threads from 1 on; `started` tells how many came to life. */
static void start_workers(struct ee_pool *pool) {
    pool->forks = atomic_load(&forks);
    pool->started = 0;
    for (int t = 1; t < pool->threads; t++) {
        pool->workers[t] = (struct worker){.pool = pool, .thread = t};
        if (pthread_create(&pool->workers[t].handle, NULL, worker_main, &pool->workers[t]) != 0)
            return;
        pool->started = t;
    }
}

/* In a forked child: new threads, and no trace of what the parent's were doing. Where they cannot
 * be started the child goes on with those that could. */
static void restart_workers(struct ee_pool *pool) {
    struct gate *gates[] = {&pool->work, &pool->arrived, &pool->barrier_generation};
    for (int i = 0; i < 3; i++) {
        atomic_store(&gates[i]->value, 0);
        atomic_store(&gates[i]->sleepers, 0);
    }
    atomic_store(&pool->barrier_count, 0);
    start_workers(pool);
    pool->threads = pool->started + 1;
}

#define MAX_THREADS 1024

/* The number that EELLM_THREADS gives, or else that of the CPUs. */
static enum ee_status default_threads(int *threads) {
    *threads = ee_cpu_count();
    const char *text = getenv("EELLM_THREADS");
    if (!text || !*text)
        return EE_OK;
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 0 || value > MAX_THREADS)
        EE_FAIL(EE_ERR_INVALID, "EELLM_THREADS must be a number from 0 (all) to %d, got '%s'",
                MAX_THREADS, text);
    if (value > 0)
        *threads = (int)value;
    return EE_OK;
}

enum ee_status ee_pool_create(struct ee_pool **out, int threads) {
    *out = NULL;
    if (threads < 0 || threads > MAX_THREADS)
        EE_FAIL(EE_ERR_INVALID, "threads must lie between 0 (all) and %d, got %d", MAX_THREADS,
                threads);
    if (threads == 0)
        EE_TRY(default_threads(&threads));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_pool), "the thread pool"));
    struct ee_pool *pool = memory;
    enum ee_status status =
        ee_alloc(&memory, sizeof(struct worker) * (size_t)threads, "the thread pool");
    if (status != EE_OK) {
        ee_free(pool);
        return status;
    }
    pool->workers = memory;
    pool->threads = threads;
    /* Spinning only pays where every thread has a core of its own. */
    pool->spin_rounds = threads <= ee_cpu_count() ? SPIN_ROUNDS : 0;
    pthread_once(&count_forks_once, count_forks);
    start_workers(pool);
    if (pool->started + 1 < threads) {
        int started = pool->started;
        ee_pool_destroy(pool);
        EE_FAIL(EE_ERR_NOMEM, "cannot start thread %d of %d; use fewer threads (EELLM_THREADS)",
                started + 1, threads);
    }
    *out = pool;
    return EE_OK;
}

void ee_pool_destroy(struct ee_pool *pool) {
    if (!pool)
        return;
    if (pool->forks != atomic_load(&forks))
        pool->started = 0; /* they are the parent's */
    atomic_store(&pool->stop, true);
    atomic_fetch_add(&pool->work.value, 1);
    gate_wake(&pool->work);
    for (int t = 1; t <= pool->started; t++)
        pthread_join(pool->workers[t].handle, NULL);
    ee_free(pool->workers);
    ee_free(pool);
}

int ee_pool_threads(const struct ee_pool *pool) {
    return pool->threads;
}

void ee_pool_run(struct ee_pool *pool, ee_task_fn *fn, void *arg, int64_t count) {
    if (count <= 0)
        return;
    if (pool->forks != atomic_load_explicit(&forks, memory_order_relaxed))
        restart_workers(pool);
    if (pool->threads == 1 || count == 1) {
        fn(arg, 0, count, 0);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    pool->count = count;
    atomic_store(&pool->arrived.value, 0);
    atomic_fetch_add(&pool->work.value, 1);
    gate_wake(&pool->work);
    run_share(pool, 0);
    unsigned others = (unsigned)pool->threads - 1, seen;
    while ((seen = atomic_load(&pool->arrived.value)) != others)
        gate_wait(&pool->arrived, seen, pool->spin_rounds);
}

void ee_pool_barrier(struct ee_pool *pool) {
    if (pool->threads == 1)
        return;
    unsigned generation = atomic_load(&pool->barrier_generation.value);
    if (atomic_fetch_add(&pool->barrier_count, 1) + 1 == (unsigned)pool->threads) {
        atomic_store(&pool->barrier_count, 0);
        atomic_fetch_add(&pool->barrier_generation.value, 1);
        gate_wake(&pool->barrier_generation);
    } else {
        gate_wait(&pool->barrier_generation, generation, pool->spin_rounds);
    }
}
