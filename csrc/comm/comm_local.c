/* The transport of ranks that are threads of one process: jobs, groups and communicators. */
#define _GNU_SOURCE
#include "base/alloc.h"
#include "base/clock.h"
#include "comm/local.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

/* Longer timeouts are as good as none, and every clock can hold this one. */
#define LONGEST 1e9

char *ee_local_where(char *text, size_t size, int tag, struct ee_action action) {
    char inner[160];
    ee_action_describe(inner, sizeof inner, tag, action);
    snprintf(text, size, inner[0] ? " (%s)" : "%s", inner);
    return text;
}

void ee_local_wake(struct ee_local *self) {
    pthread_cond_signal(&self->changed);
}

void ee_local_wake_group(struct ee_local_group *group) {
    for (int i = 0; i < group->size; i++) {
        if (group->places[i].handle)
            ee_local_wake(group->places[i].handle);
    }
}

bool ee_local_sleep(struct ee_local *self, double deadline) {
    pthread_mutex_t *lock = &self->group->job->lock;
    if (deadline < 0) {
        pthread_cond_wait(&self->changed, lock);
        return true;
    }
    deadline = deadline < ee_now() + LONGEST ? deadline : ee_now() + LONGEST;
    struct timespec until = {.tv_sec = (time_t)deadline};
    until.tv_nsec = (long)(1e9 * (deadline - (double)until.tv_sec));
    return pthread_cond_timedwait(&self->changed, lock, &until) != ETIMEDOUT;
}

/* Until no other thread copies into or out of a buffer of this rank. */
static void settle(struct ee_local *self) {
    while (self->copying > 0)
        ee_local_sleep(self, -1);
}

static void abort_job(struct ee_local_job *job, const char *reason) {
    if (job->aborted)
        return;
    job->aborted = true;
    snprintf(job->reason, sizeof job->reason, "%s", reason);
    for (struct ee_local *each = job->first; each; each = each->next)
        ee_local_wake(each);
}

enum ee_status ee_local_alive(struct ee_local *self) {
    const struct ee_local_job *job = self->group->job;
    if (!job->aborted)
        return EE_OK;
    settle(self);
    EE_FAIL(EE_ERR_COMM, "rank %d: the job was aborted: %s", self->comm.rank, job->reason);
}

enum ee_status ee_local_give_up(struct ee_local *self, const char *format, ...) {
    char reason[sizeof self->group->job->reason];
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    abort_job(self->group->job, reason);
    settle(self);
    EE_FAIL(EE_ERR_COMM, "%s", reason);
}

static void abort_locked(struct ee_comm *comm, const char *reason) {
    struct ee_local_job *job = ee_local_of(comm)->group->job;
    pthread_mutex_lock(&job->lock);
    abort_job(job, reason ? reason : "no reason was given");
    pthread_mutex_unlock(&job->lock);
}

/* Takes a communicator out of its group and job, and frees it; both stay. */
static void remove_handle(struct ee_local *self) {
    struct ee_local_group *group = self->group;
    settle(self);
    if (self->next)
        self->next->previous = self->previous;
    *(self->previous ? &self->previous->next : &group->job->first) = self->next;
    group->job->handles--;
    group->handles--;
    group->places[self->comm.rank].handle = NULL;
    if (group->handles == 0)
        ee_free(group);
    else
        ee_local_wake_group(group);
    pthread_cond_destroy(&self->changed);
    ee_free(self);
}

static void free_job(struct ee_local_job *job) {
    pthread_mutex_destroy(&job->lock);
    ee_free(job);
}

static void destroy(struct ee_comm *comm) {
    struct ee_local *self = ee_local_of(comm);
    struct ee_local_job *job = self->group->job;
    pthread_mutex_lock(&job->lock);
    remove_handle(self);
    bool last = job->handles == 0;
    pthread_mutex_unlock(&job->lock);
    if (last)
        free_job(job);
}

static enum ee_status create_group(struct ee_local_group **out, struct ee_local_job *job,
                                   int size) {
    void *memory;
    size_t places = (size_t)size * sizeof(struct ee_local_place);
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_local_group) + places, "a communicator"));
    *out = memory;
    (*out)->job = job;
    (*out)->size = size;
    return EE_OK;
}

static bool create_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes) != 0)
        return false;
    bool made = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0 &&
                pthread_cond_init(condition, &attributes) == 0;
    pthread_condattr_destroy(&attributes);
    return made;
}

/* The communicator of a rank of a group, which has what can be set in struct ee_comm from `like`.
 */
static enum ee_status create_handle(struct ee_local_group *group, int rank,
                                    const struct ee_comm *like) {
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_local), "a communicator"));
    struct ee_local *self = memory;
    if (!create_condition(&self->changed)) {
        ee_free(self);
        EE_FAIL(EE_ERR_NOMEM, "no memory for a communicator (a condition variable)");
    }
    self->comm = (struct ee_comm){
        .abi = EE_COMM_ABI,
        .struct_size = sizeof(struct ee_comm),
        .transport = "local",
        .rank = rank,
        .size = group->size,
        .timeout = like->timeout,
        .polling = like->polling,
        .trace = like->trace,
        .trace_arg = like->trace_arg,
        .split = ee_local_split,
        .start = ee_local_start,
        .wait = ee_local_wait,
        .all_reduce = ee_local_all_reduce,
        .all_gather = ee_local_all_gather,
        .reduce_scatter = ee_local_reduce_scatter,
        .broadcast = ee_local_broadcast,
        .barrier = ee_local_barrier,
        .abort = abort_locked,
        .destroy = destroy,
    };
    self->open_end = &self->open;
    self->group = group;
    self->next = group->job->first;
    if (self->next)
        self->next->previous = self;
    group->job->first = self;
    group->job->handles++;
    group->handles++;
    group->places[rank].handle = self;
    return EE_OK;
}

/* Communicators of the ranks of a colour, `lowest` the first of them, in their places. */
static enum ee_status make_part(struct ee_local_group *group, int lowest) {
    struct ee_local_place *places = group->places;
    struct ee_local_group *part;
    int size = 0;
    for (int i = lowest; i < group->size; i++)
        size += places[i].colour == places[lowest].colour;
    EE_TRY(create_group(&part, group->job, size));
    for (int i = lowest; i < group->size; i++) {
        int rank = 0;
        if (places[i].colour != places[lowest].colour)
            continue;
        for (int k = lowest; k < group->size; k++) {
            bool before =
                places[k].key < places[i].key || (places[k].key == places[i].key && k < i);
            rank += before && places[k].colour == places[i].colour;
        }
        enum ee_status status = create_handle(part, rank, &places[i].handle->comm);
        if (status != EE_OK) {
            if (part->handles == 0)
                ee_free(part);
            return status;
        }
        places[i].made = &part->places[rank].handle->comm;
    }
    return EE_OK;
}

void ee_local_make_parts(struct ee_local_group *group) {
    group->split_status = EE_OK;
    for (int i = 0; i < group->size; i++)
        group->places[i].made = NULL;
    for (int i = 0; i < group->size && group->split_status == EE_OK; i++) {
        if (group->places[i].colour >= 0 && !group->places[i].made)
            group->split_status = make_part(group, i);
    }
    for (int i = 0; i < group->size && group->split_status != EE_OK; i++) {
        if (group->places[i].made)
            remove_handle(ee_local_of(group->places[i].made));
        group->places[i].made = NULL;
    }
}

enum ee_status ee_comm_local(struct ee_comm **out, int size, double timeout) {
    if (size < 1 || size > EE_COMM_LOCAL_RANKS)
        EE_FAIL(EE_ERR_INVALID, "a job of threads has 1 to %d ranks, got %d", EE_COMM_LOCAL_RANKS,
                size);
    if (!(timeout > 0))
        EE_FAIL(EE_ERR_INVALID, "a timeout must be more than 0 s, got %g", timeout);
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_local_job), "a communicator"));
    struct ee_local_job *job = memory;
    if (pthread_mutex_init(&job->lock, NULL) != 0) {
        ee_free(job);
        EE_FAIL(EE_ERR_NOMEM, "no memory for a communicator (a lock)");
    }
    struct ee_comm like = {.timeout = timeout, .polling = EE_COMM_POLLING_SHARED};
    struct ee_local_group *group = NULL;
    enum ee_status status = create_group(&group, job, size);
    for (int i = 0; i < size && status == EE_OK; i++) {
        status = create_handle(group, i, &like);
        if (status == EE_OK)
            out[i] = &group->places[i].handle->comm;
    }
    if (status == EE_OK)
        return EE_OK;
    if (group && group->handles == 0)
        ee_free(group);
    while (job->first)
        remove_handle(job->first);
    free_job(job);
    for (int i = 0; i < size; i++)
        out[i] = NULL;
    return status;
}
