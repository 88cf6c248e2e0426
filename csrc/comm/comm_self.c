/* The transport of one rank: messages to itself are copied as soon as both sides are posted, and a
 * collective is a copy. */
#define _GNU_SOURCE
#include "base/alloc.h"
#include "base/clock.h"
#include "comm/comm.h"

#include <stdio.h>
#include <string.h>

/* Shared by a communicator and all that were split from it, so that an abort reaches every one. */
struct job {
    int references;
    bool aborted;
    char reason[256];
};

struct post {
    struct ee_message message;
    ee_comm_request request; /* 0: free */
    double started;
    bool done;
};

struct self {
    struct ee_comm comm; /* first, so that the pointers are the same */
    struct job *job;
    ee_comm_request last; /* requests are numbered from 1 */
    int used;             /* posts[0 .. used), in the order in which they were started */
    struct post posts[EE_COMM_MAX_MESSAGES];
};

static struct self *self_of(struct ee_comm *comm) {
    return (struct self *)(void *)comm;
}

static enum ee_status check_alive(const struct self *self) {
    if (self->job->aborted)
        EE_FAIL(EE_ERR_COMM, "rank %d: the job was aborted: %s", self->comm.rank,
                self->job->reason);
    return EE_OK;
}

/* Completes the earliest posted message that is the other side of `message`; *found tells whether
 * there was one. */
static enum ee_status match(struct self *self, const struct ee_message *message, bool *found) {
    *found = false;
    for (int i = 0; i < self->used; i++) {
        struct post *post = &self->posts[i];
        if (post->done || post->message.direction == message->direction ||
            post->message.tag != message->tag)
            continue;
        bool send = message->direction == EE_SEND;
        const struct ee_message *from = send ? message : &post->message;
        const struct ee_message *to = send ? &post->message : message;
        if (from->bytes != to->bytes) {
            char text[160];
            EE_FAIL(EE_ERR_COMM, "rank %d: %zu bytes were sent where %zu are received (%s)",
                    self->comm.rank, from->bytes, to->bytes,
                    ee_action_describe(text, sizeof text, to->tag, to->action));
        }
        if (from->bytes > 0)
            memmove(to->data, from->data, from->bytes);
        post->done = *found = true;
        return EE_OK;
    }
    return EE_OK;
}

static enum ee_status start(struct ee_comm *comm, ee_comm_request *request,
                            const struct ee_message *messages, int count) {
    struct self *self = self_of(comm);
    EE_TRY(check_alive(self));
    if (count > EE_COMM_MAX_MESSAGES - self->used)
        EE_FAIL(EE_ERR_COMM, "rank %d: more than %d messages are under way; wait for some first",
                comm->rank, EE_COMM_MAX_MESSAGES);
    *request = ++self->last;
    double now = comm->trace ? ee_now() : 0;
    for (int i = 0; i < count; i++) {
        bool found;
        EE_TRY(match(self, &messages[i], &found));
        self->posts[self->used++] = (struct post){messages[i], *request, now, found};
    }
    return EE_OK;
}

static enum ee_status wait(struct ee_comm *comm, ee_comm_request request) {
    struct self *self = self_of(comm);
    EE_TRY(check_alive(self));
    int kept = 0, found = 0;
    double now = comm->trace ? ee_now() : 0;
    for (int i = 0; i < self->used; i++) {
        const struct post *post = &self->posts[i];
        if (post->request == request && !post->done) {
            char text[160];
            bool send = post->message.direction == EE_SEND;
            EE_FAIL(EE_ERR_COMM, "rank %d: the message %s rank %d has no matching %s (%s)",
                    comm->rank, send ? "to" : "from", post->message.peer, send ? "receive" : "send",
                    ee_action_describe(text, sizeof text, post->message.tag, post->message.action));
        }
        found += post->request == request;
    }
    if (!found)
        EE_FAIL(EE_ERR_INVALID, "rank %d: no exchange %lld is under way", comm->rank,
                (long long)request);
    for (int i = 0; i < self->used; i++) {
        const struct post *post = &self->posts[i];
        if (post->request != request)
            self->posts[kept++] = *post;
        else if (comm->trace)
            comm->trace(comm->trace_arg, &post->message, post->started, now);
    }
    self->used = kept;
    return EE_OK;
}

static enum ee_status copy(struct ee_comm *comm, void *out, const void *in, size_t bytes) {
    EE_TRY(check_alive(self_of(comm)));
    if (bytes > 0 && out != in)
        memmove(out, in, bytes);
    return EE_OK;
}

/* The sum and the maximum over one rank are its own values, and its part is all of them. */
static enum ee_status reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                             enum ee_comm_type type, enum ee_comm_reduce operation,
                             struct ee_action action) {
    (void)operation, (void)action;
    return copy(comm, out, in, (size_t)count * ee_comm_type_size(type));
}

static enum ee_status all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                 struct ee_action action) {
    (void)action;
    return copy(comm, out, in, bytes);
}

static enum ee_status broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                struct ee_action action) {
    (void)data, (void)bytes, (void)root, (void)action;
    return check_alive(self_of(comm));
}

static enum ee_status barrier(struct ee_comm *comm, struct ee_action action) {
    (void)action;
    return check_alive(self_of(comm));
}

static void abort_job(struct ee_comm *comm, const char *reason) {
    struct job *job = self_of(comm)->job;
    if (job->aborted)
        return;
    job->aborted = true;
    snprintf(job->reason, sizeof job->reason, "%s", reason ? reason : "no reason was given");
}

static void destroy(struct ee_comm *comm) {
    struct self *self = self_of(comm);
    if (--self->job->references == 0)
        ee_free(self->job);
    ee_free(self);
}

static enum ee_status split(struct ee_comm *comm, struct ee_comm **out, int colour, int key);

/* What can be set in struct ee_comm comes from `like`. */
static enum ee_status create(struct ee_comm **out, struct job *job, const struct ee_comm *like) {
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct self), "a communicator"));
    struct self *self = memory;
    self->comm = (struct ee_comm){
        .abi = EE_COMM_ABI,
        .struct_size = sizeof(struct ee_comm),
        .transport = "self",
        .rank = 0,
        .size = 1,
        .timeout = like->timeout,
        .polling = like->polling,
        .trace = like->trace,
        .trace_arg = like->trace_arg,
        .split = split,
        .start = start,
        .wait = wait,
        .all_reduce = reduce,
        .all_gather = all_gather,
        .reduce_scatter = reduce,
        .broadcast = broadcast,
        .barrier = barrier,
        .abort = abort_job,
        .destroy = destroy,
    };
    self->job = job;
    job->references++;
    *out = &self->comm;
    return EE_OK;
}

static enum ee_status split(struct ee_comm *comm, struct ee_comm **out, int colour, int key) {
    (void)key;
    struct self *self = self_of(comm);
    EE_TRY(check_alive(self));
    return colour < 0 ? EE_OK : create(out, self->job, comm);
}

enum ee_status ee_comm_self(struct ee_comm **out) {
    *out = NULL;
    void *job;
    EE_TRY(ee_alloc(&job, sizeof(struct job), "a communicator"));
    struct ee_comm like = {.timeout = EE_COMM_TIMEOUT, .polling = EE_COMM_POLLING_SHARED};
    enum ee_status status = create(out, job, &like);
    if (status != EE_OK)
        ee_free(job);
    return status;
}
