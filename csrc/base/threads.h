/* A pool of threads that run the same function over a range of tasks.
 *
 * The calling thread is number 0 and works too. Which thread runs which task is fixed: thread t of
 * n runs the tasks [t * count / n, (t + 1) * count / n), so that a result that depends on the split
 * is the same at every call. Waiting threads spin in user space for a while, then sleep. A child
 * made by fork starts threads of its own when it first runs something. */
#ifndef EE_THREADS_H
#define EE_THREADS_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

struct ee_pool;

/* first and last (exclusive) task of this call, and which thread it is. */
typedef void ee_task_fn(void *arg, int64_t first, int64_t last, int thread);

/* `threads` >= 1; 0 takes EELLM_THREADS, or without it what the process may use (its CPU affinity).
 */
EE_WARN_UNUSED enum ee_status ee_pool_create(struct ee_pool **out, int threads);

/* Waits for nothing: no task may be running. NULL is allowed. */
void ee_pool_destroy(struct ee_pool *pool);

int ee_pool_threads(const struct ee_pool *pool);

/* Runs fn over [0, count) and returns when all is done. Not reentrant: one caller at a time, and fn
 * must not call it. With one thread, or count 1, fn runs on the calling thread only. */
void ee_pool_run(struct ee_pool *pool, ee_task_fn *fn, void *arg, int64_t count);

/* A barrier among the threads of the running task; every one of them must call it. For a phase
 * that needs what all threads of the phase before wrote. Only valid when every thread got a task:
 * run such functions over exactly ee_pool_threads() tasks. */
void ee_pool_barrier(struct ee_pool *pool);

/* The number of CPUs that this process may run on. */
int ee_cpu_count(void);

EE_EXTERN_C_END

#endif
