/* Reading of weights in decoding, beside a plain read loop, on a machine that is not idle.
 *
 *     cc -O2 -Icsrc -Ikernels benchmarks/lab/bench_rows.c OBJECTS -o bench_rows -lpthread -lm
 *     bench_rows SECONDS DTYPE(0: float32, 1: bf16) ROWS
 *
 * OBJECTS: those of csrc/base, csrc/ops, csrc/tensor and kernels/cpu from a build. The products of
 * one step of GPT-2 124M stand between two plain reads of memory, with one thread on each of two
 * CPUs; a sample counts where both threads had their CPU to themselves and both reads went equally
 * fast. Prints the median share of the read bandwidth, for slow and fast phases of the memory. */
#define _GNU_SOURCE
#include "base/alloc.h"
#include "base/threads.h"
#include "ops/ctx.h"

#include <dirent.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define THREADS 2
#define LAYERS 12
#define VOCAB 50257
#define FAST 47e9 /* bytes a second that part the phases */
#define MOST 10000

static const int64_t shapes[4][2] = {{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}};

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void pin_threads(void) {
    DIR *tasks = opendir("/proc/self/task");
    if (!tasks)
        return;
    int cpu = 0;
    for (struct dirent *entry; (entry = readdir(tasks));) {
        int thread = atoi(entry->d_name);
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu % THREADS, &set);
        if (thread > 0 && sched_setaffinity(thread, sizeof set, &set) == 0)
            cpu++;
    }
    closedir(tasks);
}

typedef float vector __attribute__((vector_size(64)));

struct reading {
    const char *data;
    int64_t bytes; /* of each thread */
    float sink[THREADS];
};

static void read_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)last;
    struct reading *r = arg;
    const vector *v = (const vector *)(const void *)(r->data + first * r->bytes);
    vector sum[4] = {{0}};
    for (int64_t i = 0; i < r->bytes / 64; i += 4)
        for (int j = 0; j < 4; j++)
            sum[j] += v[i + j];
    sum[0] += sum[1] + sum[2] + sum[3];
    r->sink[thread] = sum[0][0];
}

static double read_rate(struct ee_ctx *ctx, const void *data, int64_t bytes) {
    struct reading r = {.data = data, .bytes = bytes / THREADS / 256 * 256};
    double start = seconds(CLOCK_MONOTONIC);
    ee_pool_run(ctx->pool, read_share, &r, THREADS);
    return (double)(r.bytes * THREADS) / (seconds(CLOCK_MONOTONIC) - start);
}

struct step {
    struct ee_ctx *ctx;
    enum ee_dtype dtype;
    char *weights, *at;
    float *x, *y;
    int64_t rows;
};

static enum ee_status product(struct step *s, int64_t outputs, int64_t inputs) {
    struct ee_weight w = {s->at, s->dtype, EE_LAYOUT_PANELS, outputs, inputs};
    struct ee_tensor x = ee_matrix(s->x, s->rows, inputs), y = ee_matrix(s->y, s->rows, outputs);
    s->at += ee_weight_bytes(s->dtype, EE_LAYOUT_PANELS, outputs, inputs);
    return ee_linear(s->ctx, &y, &x, &w, NULL, NULL);
}

static enum ee_status run_step(struct step *s) {
    s->at = s->weights;
    for (int layer = 0; layer < LAYERS; layer++)
        for (int i = 0; i < 4; i++)
            EE_TRY(product(s, shapes[i][0], shapes[i][1]));
    return product(s, VOCAB, 768);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static enum ee_status sample(struct step *s, int64_t bytes, double until) {
    static double share[2][MOST];
    int count[2] = {0};
    while (seconds(CLOCK_MONOTONIC) < until) {
        double cpu = seconds(CLOCK_PROCESS_CPUTIME_ID), start = seconds(CLOCK_MONOTONIC);
        double before = read_rate(s->ctx, s->weights, bytes / 2), begun = seconds(CLOCK_MONOTONIC);
        EE_TRY(run_step(s));
        double taken = seconds(CLOCK_MONOTONIC) - begun;
        double after = read_rate(s->ctx, s->weights, bytes / 2);
        cpu = (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu) / (seconds(CLOCK_MONOTONIC) - start);
        if (cpu < 0.95 * THREADS || before > 1.15 * after || after > 1.15 * before)
            continue;
        double rate = (before + after) / 2;
        int fast = rate > FAST;
        if (count[fast] < MOST)
            share[fast][count[fast]++] = (double)bytes / taken / rate;
    }
    for (int fast = 0; fast < 2; fast++) {
        qsort(share[fast], (size_t)count[fast], sizeof(double), ascending);
        if (count[fast] > 0)
            printf("%s: %d samples, %.3f of the read bandwidth\n", fast ? "fast" : "slow",
                   count[fast], share[fast][count[fast] / 2]);
    }
    return EE_OK;
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    struct step s = {.dtype = atoi(argv[2]) ? EE_BF16 : EE_F32, .rows = atoi(argv[3])};
    int64_t bytes = (int64_t)ee_weight_bytes(s.dtype, EE_LAYOUT_PANELS, VOCAB, 768);
    for (int i = 0; i < 4; i++)
        bytes += LAYERS *
                 (int64_t)ee_weight_bytes(s.dtype, EE_LAYOUT_PANELS, shapes[i][0], shapes[i][1]);
    void *weights, *x, *y;
    if (s.rows < 1 || ee_ctx_create(&s.ctx, ee_isa_best(), THREADS) != EE_OK ||
        ee_alloc(&weights, (size_t)bytes, "weights") != EE_OK ||
        ee_alloc(&x, (size_t)s.rows * 3072 * sizeof(float), "inputs") != EE_OK ||
        ee_alloc(&y, (size_t)s.rows * VOCAB * sizeof(float), "outputs") != EE_OK)
        return 1;
    s.weights = weights, s.x = x, s.y = y;
    for (int64_t i = 0; i < bytes; i += 4096)
        s.weights[i] = 0; /* pages of its own, not the one of zeros */
    pin_threads();
    return sample(&s, bytes, seconds(CLOCK_MONOTONIC) + atof(argv[1])) != EE_OK;
}
