/* Collectives between threads: all ranks show where their data lie, and one of them, or each for a
 * part, reads and writes the others' memory. Values are added in rank order. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "comm/local.h"

#include <stdio.h>
#include <string.h>

/* Bytes that are reduced at a time, which stay in the first cache. */
#define BLOCK 4096

/* Sums of integers wrap around. The maximum of anything and NaN is NaN, so that all ranks see it.
 */
#define DEFINE_REDUCE(name, type, sum_type)                                                        \
    static void name(void *acc_data, const void *in_data, int64_t count,                           \
                     enum ee_comm_reduce reduce) {                                                 \
        type *acc = acc_data;                                                                      \
        const type *in = in_data;                                                                  \
        if (reduce == EE_COMM_SUM) {                                                               \
            for (int64_t i = 0; i < count; i++)                                                    \
                acc[i] = (type)((sum_type)acc[i] + (sum_type)in[i]);                               \
        } else {                                                                                   \
            for (int64_t i = 0; i < count; i++)                                                    \
                acc[i] = in[i] > acc[i] || in[i] != in[i] ? in[i] : acc[i];                        \
        }                                                                                          \
    }

DEFINE_REDUCE(reduce_f32, float, float)
DEFINE_REDUCE(reduce_f64, double, double)
DEFINE_REDUCE(reduce_i32, int32_t, uint32_t)
DEFINE_REDUCE(reduce_i64, int64_t, uint64_t)

static void (*const reducers[])(void *acc, const void *in, int64_t count,
                                enum ee_comm_reduce reduce) = {
    [EE_COMM_F32] = reduce_f32,
    [EE_COMM_F64] = reduce_f64,
    [EE_COMM_I32] = reduce_i32,
    [EE_COMM_I64] = reduce_i64,
};

/* Reduces elements first .. first + count of the ranks' inputs; to = the output of rank `only` from
 * its beginning on, or with -1 the same elements of every rank's output. A block is read from all
 * before it is written, so that an output may be an input. */
static void reduce_range(const struct ee_local_group *group, int64_t first, int64_t count,
                         int only) {
    const struct ee_local_place *places = group->places;
    const struct ee_local_call *call = &group->call;
    int64_t width = (int64_t)ee_comm_type_size(call->type), step = BLOCK / width;
    _Alignas(EE_ALIGNMENT) char block[BLOCK];
    for (int64_t done = 0; done < count; done += step) {
        int64_t n = ee_min(step, count - done), offset = (first + done) * width;
        memcpy(block, (const char *)places[0].in + offset, (size_t)(n * width));
        for (int i = 1; i < group->size; i++)
            reducers[call->type](block, (const char *)places[i].in + offset, n, call->reduce);
        if (only >= 0)
            memcpy((char *)places[only].out + done * width, block, (size_t)(n * width));
        for (int i = 0; only < 0 && i < group->size; i++)
            memcpy((char *)places[i].out + offset, block, (size_t)(n * width));
    }
}

static void copy(void *out, const void *in, size_t bytes) {
    if (bytes > 0 && out != in)
        memmove(out, in, bytes);
}

/* The part of the work that gives rank `rank` its result, or of the all-reduce the rank's share. */
static void run_part(const struct ee_local_group *group, int rank) {
    const struct ee_local_place *places = group->places, *mine = &places[rank];
    int64_t count = (int64_t)group->call.count, size = group->size;
    switch (group->call.kind) {
    case EE_LOCAL_ALL_REDUCE: {
        int64_t each = count / size, more = count % size;
        reduce_range(group, each * rank + ee_min(rank, more), each + (rank < more), -1);
        break;
    }
    case EE_LOCAL_REDUCE_SCATTER:
        reduce_range(group, count * rank, count, rank);
        break;
    case EE_LOCAL_ALL_GATHER:
        for (int i = 0; i < group->size; i++)
            copy(count ? (char *)mine->out + count * i : NULL, places[i].in, (size_t)count);
        break;
    case EE_LOCAL_BROADCAST:
        copy(mine->out, places[group->call.root].out, (size_t)count);
        break;
    case EE_LOCAL_BARRIER:
    case EE_LOCAL_SPLIT:
        break;
    }
}

/* Whether the last rank to arrive does everything: quicker than waking the others for a part, and
 * than waking them twice. */
static bool is_small(const struct ee_local_group *group) {
    const struct ee_local_call *call = &group->call;
    bool typed = call->kind == EE_LOCAL_ALL_REDUCE || call->kind == EE_LOCAL_REDUCE_SCATTER;
    size_t width = typed ? ee_comm_type_size(call->type) : 1;
    return call->count <= EE_LOCAL_SMALL / width / (size_t)group->size;
}

static const char *describe_call(char *text, size_t size, const struct ee_local_call *call) {
    static const char *const types[] = {"float32", "float64", "int32", "int64"};
    static const char *const reductions[] = {"sum", "maximum"};
    static const char *const names[] = {
        [EE_LOCAL_ALL_REDUCE] = "all-reduce",
        [EE_LOCAL_ALL_GATHER] = "all-gather",
        [EE_LOCAL_REDUCE_SCATTER] = "reduce-scatter",
        [EE_LOCAL_BROADCAST] = "broadcast",
        [EE_LOCAL_BARRIER] = "barrier",
        [EE_LOCAL_SPLIT] = "split",
    };
    const char *name = names[call->kind];
    switch (call->kind) {
    case EE_LOCAL_ALL_REDUCE:
    case EE_LOCAL_REDUCE_SCATTER:
        snprintf(text, size, "%s (%s of %zu %s)", name, reductions[call->reduce], call->count,
                 types[call->type]);
        break;
    case EE_LOCAL_ALL_GATHER:
        snprintf(text, size, "%s (%zu bytes)", name, call->count);
        break;
    case EE_LOCAL_BROADCAST:
        snprintf(text, size, "%s (%zu bytes of rank %d)", name, call->count, call->root);
        break;
    case EE_LOCAL_BARRIER:
    case EE_LOCAL_SPLIT:
        snprintf(text, size, "%s", name);
        break;
    }
    return text;
}

static bool same_call(const struct ee_local_call *a, const struct ee_local_call *b) {
    return a->kind == b->kind && a->count == b->count && a->type == b->type &&
           a->reduce == b->reduce && a->root == b->root;
}

static enum ee_status fail_differing(struct ee_local *self, const struct ee_local_call *call,
                                     struct ee_action action) {
    const struct ee_local_group *group = self->group;
    char mine[96], theirs[96], where[192];
    return ee_local_give_up(
        self, "rank %d: %s%s where rank %d calls %s; all ranks must call the same", self->comm.rank,
        describe_call(mine, sizeof mine, call), ee_local_where(where, sizeof where, -1, action),
        group->leader, describe_call(theirs, sizeof theirs, &group->call));
}

/* Writes "rank 2" or "ranks 2, 3, 5", those that have not arrived; many are cut short. */
static void describe_missing(char *text, size_t size, const struct ee_local_group *group) {
    int missing = group->size - group->arrived, named = 0, at;
    at = snprintf(text, size, missing > 1 ? "ranks" : "rank");
    for (int i = 0; i < group->size && named < 8; i++) {
        if (!group->places[i].arrived)
            at += snprintf(text + at, size - (size_t)at, "%s %d", named++ ? "," : "", i);
    }
    if (missing > named)
        snprintf(text + at, size - (size_t)at, " and %d more", missing - named);
}

/* A rank that has not arrived and never will; -1 if there is none. */
static int find_left(const struct ee_local_group *group) {
    for (int i = 0; i < group->size; i++) {
        if (!group->places[i].handle && !group->places[i].arrived)
            return i;
    }
    return -1;
}

static enum ee_status fail_missing(struct ee_local *self, int left, struct ee_action action) {
    char call[96], where[192], missing[160];
    describe_call(call, sizeof call, &self->group->call);
    ee_local_where(where, sizeof where, -1, action);
    if (left >= 0)
        return ee_local_give_up(self, "rank %d: rank %d has left the communicator before the %s%s",
                                self->comm.rank, left, call, where);
    describe_missing(missing, sizeof missing, self->group);
    return ee_local_give_up(self, "rank %d: %s did not come to the %s within %g s%s",
                            self->comm.rank, missing, call, self->comm.timeout, where);
}

/* Waits until all ranks have arrived. */
static enum ee_status gather(struct ee_local *self, uint64_t generation, struct ee_action action) {
    const struct ee_local_group *group = self->group;
    double deadline = ee_now() + self->comm.timeout;
    bool overdue = false;
    while (group->generation == generation && !group->working) {
        EE_TRY(ee_local_alive(self));
        int left = find_left(group);
        if (left >= 0 || overdue)
            return fail_missing(self, left, action);
        overdue = !ee_local_sleep(self, deadline);
    }
    return EE_OK;
}

static void complete(struct ee_local_group *group) {
    group->generation++;
    group->arrived = group->finished = 0;
    group->working = false;
    for (int i = 0; i < group->size; i++)
        group->places[i].arrived = false;
    ee_local_wake_group(group);
}

/* The last rank to arrive. */
static void begin_work(struct ee_local_group *group) {
    if (!is_small(group)) {
        group->working = true;
        ee_local_wake_group(group);
        return;
    }
    for (int i = 0; i < group->size; i++)
        run_part(group, i);
    if (group->call.kind == EE_LOCAL_SPLIT)
        ee_local_make_parts(group);
    complete(group);
}

/* Does this rank's part, and waits for the others to do theirs, which they will: nobody can fail
 * any more. */
static void work(struct ee_local *self, uint64_t generation) {
    struct ee_local_group *group = self->group;
    pthread_mutex_unlock(&group->job->lock);
    run_part(group, self->comm.rank);
    pthread_mutex_lock(&group->job->lock);
    if (++group->finished == group->size)
        complete(group);
    while (group->generation == generation)
        ee_local_sleep(self, -1);
}

/* A collective, with the lock held; the rank's place has been filled. */
static enum ee_status meet(struct ee_local *self, struct ee_local_call call,
                           struct ee_action action) {
    struct ee_local_group *group = self->group;
    uint64_t generation = group->generation;
    if (group->arrived == 0) {
        group->call = call;
        group->leader = self->comm.rank;
    } else if (!same_call(&group->call, &call)) {
        return fail_differing(self, &call, action);
    }
    group->places[self->comm.rank].arrived = true;
    if (++group->arrived == group->size)
        begin_work(group);
    EE_TRY(gather(self, generation, action));
    if (group->generation == generation)
        work(self, generation);
    return EE_OK;
}

static enum ee_status collect(struct ee_comm *comm, struct ee_local_call call, const void *in,
                              void *out, struct ee_action action) {
    struct ee_local *self = ee_local_of(comm);
    struct ee_local_place *place = &self->group->places[comm->rank];
    pthread_mutex_lock(&self->group->job->lock);
    enum ee_status status = ee_local_alive(self);
    if (status == EE_OK) {
        place->in = in;
        place->out = out;
        status = meet(self, call, action);
    }
    pthread_mutex_unlock(&self->group->job->lock);
    return status;
}

enum ee_status ee_local_all_reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                   enum ee_comm_type type, enum ee_comm_reduce reduce,
                                   struct ee_action action) {
    struct ee_local_call call = {EE_LOCAL_ALL_REDUCE, (size_t)count, type, reduce, 0};
    return collect(comm, call, in, out, action);
}

enum ee_status ee_local_reduce_scatter(struct ee_comm *comm, void *out, const void *in,
                                       int64_t count, enum ee_comm_type type,
                                       enum ee_comm_reduce reduce, struct ee_action action) {
    struct ee_local_call call = {EE_LOCAL_REDUCE_SCATTER, (size_t)count, type, reduce, 0};
    return collect(comm, call, in, out, action);
}

enum ee_status ee_local_all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                   struct ee_action action) {
    struct ee_local_call call = {.kind = EE_LOCAL_ALL_GATHER, .count = bytes};
    return collect(comm, call, in, out, action);
}

enum ee_status ee_local_broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                  struct ee_action action) {
    struct ee_local_call call = {.kind = EE_LOCAL_BROADCAST, .count = bytes, .root = root};
    return collect(comm, call, data, data, action);
}

enum ee_status ee_local_barrier(struct ee_comm *comm, struct ee_action action) {
    struct ee_local_call call = {.kind = EE_LOCAL_BARRIER};
    return collect(comm, call, NULL, NULL, action);
}

enum ee_status ee_local_split(struct ee_comm *comm, struct ee_comm **out, int colour, int key) {
    struct ee_local *self = ee_local_of(comm);
    struct ee_local_group *group = self->group;
    struct ee_local_place *place = &group->places[comm->rank];
    struct ee_local_call call = {.kind = EE_LOCAL_SPLIT};
    pthread_mutex_lock(&group->job->lock);
    enum ee_status status = ee_local_alive(self);
    if (status == EE_OK) {
        place->colour = colour;
        place->key = key;
        status = meet(self, call, (struct ee_action){NULL, -1});
    }
    if (status == EE_OK) {
        *out = place->made;
        if (group->split_status != EE_OK)
            status = ee_fail(group->split_status,
                             "rank %d: no memory for the communicators of a split", comm->rank);
    }
    pthread_mutex_unlock(&group->job->lock);
    return status;
}
