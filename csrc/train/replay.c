/* For clock_nanosleep. */
#define _GNU_SOURCE
#include "train/replay.h"

#include "base/alloc.h"
#include "base/arena.h"
#include "base/clock.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/prctl.h>

/* Nanoseconds that the kernel may add to a sleep. */
#define TIMER_SLACK 1000UL
/* How much of a sleep's lateness goes into their average, and seconds that count at most. */
#define LATE_SHARE 0.05
#define LATE_LIMIT 300e-6

struct chunk {
    int32_t slots;
    float **inputs, **outputs; /* [slots] */
};

struct ee_replay {
    struct ee_replay_config config;
    struct ee_list *list;
    struct ee_runner *runner;
    struct ee_arena arena;
    struct chunk *chunks;
    double *seconds;
    double busy; /* of the run under way */
    double late; /* how much later than asked a sleep ends, on average */
};

/* -- Memory -- */

static void count_slots(struct ee_replay *r) {
    for (int64_t i = 0; i < r->list->count; i++) {
        struct chunk *chunk = &r->chunks[r->list->actions[i].chunk];
        chunk->slots = (int32_t)ee_max(chunk->slots, r->list->slots[i] + 1);
    }
}

static enum ee_status lay_out_chunk(struct ee_replay *r, struct chunk *chunk) {
    void *memory;
    EE_TRY(ee_arena_take(&r->arena, &memory, chunk->slots, sizeof *chunk->inputs));
    chunk->inputs = memory;
    EE_TRY(ee_arena_take(&r->arena, &memory, chunk->slots, sizeof *chunk->outputs));
    chunk->outputs = memory;
    for (int32_t i = 0; i < chunk->slots; i++) {
        void *input, *output;
        EE_TRY(ee_arena_take(&r->arena, &input, r->config.floats, sizeof(float)));
        EE_TRY(ee_arena_take(&r->arena, &output, r->config.floats, sizeof(float)));
        if (!r->arena.base)
            continue;
        chunk->inputs[i] = input;
        chunk->outputs[i] = output;
    }
    return EE_OK;
}

static enum ee_status lay_out(struct ee_replay *r) {
    for (int32_t c = 0; c < r->config.schedule.chunks; c++)
        EE_TRY(lay_out_chunk(r, &r->chunks[c]));
    return EE_OK;
}

static enum ee_status create_chunks(struct ee_replay *r) {
    size_t chunks = (size_t)r->config.schedule.chunks, seconds = EE_STEP_KINDS * chunks;
    void *memory;
    EE_TRY(ee_alloc(&memory, chunks * sizeof *r->chunks, "a replay"));
    r->chunks = memory;
    EE_TRY(ee_alloc(&memory, seconds * sizeof *r->seconds, "a replay"));
    r->seconds = memory;
    memcpy(r->seconds, r->config.seconds, seconds * sizeof *r->seconds);
    count_slots(r);
    EE_TRY(lay_out(r));
    EE_TRY(ee_arena_bind(&r->arena, 0));
    return lay_out(r);
}

static enum ee_status create_list(struct ee_replay *r) {
    const struct ee_schedule_spec *spec = &r->config.schedule;
    int32_t rank = r->config.comm->rank;
    if (!r->config.lists)
        return ee_list_create(&r->list, spec, rank);
    const struct ee_given_list *mine = &r->config.lists[rank];
    return ee_list_from_actions(&r->list, mine->actions, mine->count, spec->chunks,
                                spec->microbatches + spec->fill1 + spec->fill2);
}

static enum ee_status create_parts(struct ee_replay *r) {
    const struct ee_schedule_spec *spec = &r->config.schedule;
    struct ee_runner_options options = {.comm = r->config.comm,
                                        .chunks = spec->chunks,
                                        .floats = r->config.floats,
                                        .microbatches = spec->microbatches,
                                        .fill1 = spec->fill1};
    EE_TRY(ee_walk_buffers(spec, r->config.lists, &options.buffers));
    EE_TRY(create_list(r));
    EE_TRY(create_chunks(r));
    options.list = r->list;
    return ee_runner_create(&r->runner, &options);
}

static enum ee_status check(const struct ee_replay_config *config) {
    EE_TRY(ee_schedule_check(&config->schedule));
    if (config->schedule.ranks != config->comm->size)
        EE_FAIL(EE_ERR_INVALID,
                "the schedule is one of %d ranks, the communicator has %d; start as many",
                config->schedule.ranks, config->comm->size);
    if (config->floats < 2 || config->floats > INT32_MAX)
        EE_FAIL(EE_ERR_INVALID, "a message has 8 to %lld bytes, got %lld", 4 * (long long)INT32_MAX,
                4 * (long long)config->floats);
    for (int32_t i = 0; i < EE_STEP_KINDS * config->schedule.chunks; i++)
        if (!(config->seconds[i] >= 0 && config->seconds[i] <= 3600))
            EE_FAIL(EE_ERR_INVALID, "an action takes 0 to 3600 seconds, got %g",
                    config->seconds[i]);
    return EE_OK;
}

enum ee_status ee_replay_create(struct ee_replay **out, const struct ee_replay_config *config) {
    *out = NULL;
    EE_TRY(check(config));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_replay), "a replay"));
    struct ee_replay *replay = memory;
    replay->config = *config;
    ee_arena_init(&replay->arena, "the messages of a replay");
    enum ee_status status = create_parts(replay);
    replay->config.lists = NULL;
    replay->config.seconds = NULL;
    if (status == EE_OK)
        *out = replay;
    else
        ee_replay_destroy(replay);
    return status;
}

void ee_replay_destroy(struct ee_replay *replay) {
    if (!replay)
        return;
    ee_runner_destroy(replay->runner);
    ee_list_destroy(replay->list);
    ee_arena_free(&replay->arena);
    ee_free(replay->chunks);
    ee_free(replay->seconds);
    ee_free(replay);
}

/* -- Actions -- */

static float **input_of(void *arg, int32_t chunk, int32_t slot) {
    return &((struct ee_replay *)arg)->chunks[chunk].inputs[slot];
}

static float *output_of(void *arg, int32_t chunk, int32_t slot) {
    return ((struct ee_replay *)arg)->chunks[chunk].outputs[slot];
}

/* Asks to be woken earlier by what the sleeps before it were late, so that waits have the length
 * that they should have on average. */
static void sleep_until(struct ee_replay *r, double deadline) {
    double asked = deadline - r->late;
    if (asked <= ee_now())
        return;
    struct timespec t;
    t.tv_sec = (time_t)asked;
    t.tv_nsec = (long)(1e9 * (asked - (double)t.tv_sec));
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
    r->late += LATE_SHARE * (fmin(ee_now() - asked, LATE_LIMIT) - r->late);
}

static float mark_of(const struct ee_step_action *action) {
    return (float)(action->microbatch % (1 << 20) + 1);
}

/* A message has its mark at both ends. */
static void write_mark(const struct ee_replay *r, const struct ee_step_action *action,
                       float *data) {
    data[0] = data[r->config.floats - 1] = mark_of(action);
}

static enum ee_status check_mark(const struct ee_replay *r, const struct ee_step_action *action,
                                 const float *data) {
    float wanted = mark_of(action), last = data[r->config.floats - 1];
    if (data[0] == wanted && last == wanted)
        return EE_OK;
    EE_FAIL(EE_ERR_INTERNAL,
            "rank %d received another message than that of microbatch %d (marked %g and %g, "
            "expected %g)",
            r->config.comm->rank, action->microbatch, (double)data[0], (double)last,
            (double)wanted);
}

static enum ee_status wait_action(void *arg, const struct ee_step_action *action, int32_t slot,
                                  int32_t queue, float *dx) {
    (void)queue;
    double start = ee_now();
    struct ee_replay *r = arg;
    struct chunk *chunk = &r->chunks[action->chunk];
    bool forward = action->kind == EE_STEP_FORWARD;
    if (action->flags & EE_STEP_RECEIVES)
        EE_TRY(check_mark(r, action, forward ? chunk->inputs[slot] : dx));
    if (action->flags & EE_STEP_SENDS)
        write_mark(r, action, forward ? chunk->outputs[slot] : dx);
    sleep_until(r, start + r->seconds[action->kind * r->config.schedule.chunks + action->chunk]);
    r->busy += ee_now() - start;
    return EE_OK;
}

enum ee_status ee_replay_run(struct ee_replay *replay, struct ee_trace *trace, double *start,
                             double *end, double *busy) {
    struct ee_work work = {replay, wait_action, input_of, output_of};
    struct ee_action action = {"start of a replayed step", -1};
    replay->busy = 0;
    EE_TRY(ee_comm_barrier(replay->config.comm, action));
    /* Nothing is computed here that polling could disturb. */
    double *polling = &replay->config.comm->polling, usual = *polling;
    *polling = EE_COMM_POLLING_ALONE;
    int slack = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK);
    *start = ee_now();
    enum ee_status status = ee_runner_run(replay->runner, replay->list, &work, trace);
    *end = ee_now();
    *busy = replay->busy;
    *polling = usual;
    prctl(PR_SET_TIMERSLACK, slack > 0 ? (unsigned long)slack : 0UL);
    return status;
}
