/* Messages between threads: a send and a receive are matched by whichever comes second, which
 * copies. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "comm/local.h"

#include <stdio.h>
#include <string.h>

/* A large message that this thread has to copy. */
struct copy {
    struct ee_local_post *mine, *theirs;
    struct ee_local *peer;
};

static void append(struct ee_local *self, struct ee_local_post *post) {
    post->state = EE_LOCAL_OPEN;
    post->next = NULL;
    *self->open_end = post;
    self->open_end = &post->next;
}

/* Takes the earliest open post of `peer` that is the other side of a message of rank `rank` out of
 * the list; NULL if there is none. */
static struct ee_local_post *match(struct ee_local *peer, int rank,
                                   const struct ee_message *message) {
    for (struct ee_local_post **link = &peer->open; *link; link = &(*link)->next) {
        struct ee_local_post *post = *link;
        if (post->message.peer != rank || post->message.tag != message->tag ||
            post->message.direction == message->direction)
            continue;
        *link = post->next;
        if (!post->next)
            peer->open_end = link;
        return post;
    }
    return NULL;
}

static void transfer(const struct ee_message *a, const struct ee_message *b) {
    const struct ee_message *from = a->direction == EE_SEND ? a : b;
    const struct ee_message *to = a->direction == EE_SEND ? b : a;
    if (from->bytes > 0)
        memmove(to->data, from->data, from->bytes);
}

static struct ee_local_post *take_post(struct ee_local *self) {
    int i = 0;
    while (self->posts[i].request)
        i++;
    self->used++;
    self->high = i < self->high ? self->high : i + 1;
    return &self->posts[i];
}

/* "rank 1: the message from rank 0 to rank 1 has 8 bytes, expected 4 (tag 3)" */
static void describe_mismatch(char *text, size_t size, const struct ee_local *self,
                              const struct copy *pair) {
    const struct ee_local_post *post = pair->mine, *other = pair->theirs;
    bool send = post->message.direction == EE_SEND;
    const struct ee_message *from = send ? &post->message : &other->message;
    const struct ee_message *to = send ? &other->message : &post->message;
    char where[192];
    snprintf(text, size,
             "rank %d: the message from rank %d to rank %d has %zu bytes, expected %zu%s",
             self->comm.rank, to->peer, from->peer, from->bytes, to->bytes,
             ee_local_where(where, sizeof where, to->tag, to->action));
}

/* Posts a message. *pair = the two sides, if this thread has to copy it; false where their sizes
 * differ. */
static bool post_message(struct ee_local *self, const struct ee_message *message, double now,
                         struct copy *pair) {
    struct ee_local *peer = self->group->places[message->peer].handle;
    struct ee_local_post *post = take_post(self);
    *post = (struct ee_local_post){.message = *message, .request = self->last, .started = now};
    struct ee_local_post *other = peer ? match(peer, self->comm.rank, message) : NULL;
    *pair = (struct copy){NULL, NULL, NULL};
    if (!other) {
        append(self, post);
        return true;
    }
    if (other->message.bytes != message->bytes) {
        *pair = (struct copy){post, other, peer};
        return false;
    }
    if (message->bytes <= EE_LOCAL_SMALL) {
        transfer(message, &other->message);
        post->state = other->state = EE_LOCAL_DONE;
        ee_local_wake(peer);
        return true;
    }
    post->state = other->state = EE_LOCAL_COPYING;
    if (peer != self)
        peer->copying++;
    *pair = (struct copy){post, other, peer};
    return true;
}

/* Copies without the lock, which is held before and after. */
static void run_copies(struct ee_local *self, const struct copy *copies, int count) {
    pthread_mutex_t *lock = &self->group->job->lock;
    for (int i = 0; i < count; i++) {
        const struct copy *copy = &copies[i];
        pthread_mutex_unlock(lock);
        transfer(&copy->mine->message, &copy->theirs->message);
        pthread_mutex_lock(lock);
        copy->mine->state = copy->theirs->state = EE_LOCAL_DONE;
        if (copy->peer != self)
            copy->peer->copying--;
        ee_local_wake(copy->peer);
    }
}

static enum ee_status post_all(struct ee_local *self, ee_comm_request *request,
                               const struct ee_message *messages, int count) {
    struct copy copies[EE_COMM_MAX_MESSAGES], pair;
    int large = 0;
    char mismatch[400] = "";
    EE_TRY(ee_local_alive(self));
    if (count > EE_COMM_MAX_MESSAGES - self->used)
        EE_FAIL(EE_ERR_COMM, "rank %d: more than %d messages are under way; wait for some first",
                self->comm.rank, EE_COMM_MAX_MESSAGES);
    *request = ++self->last;
    double now = ee_now();
    for (int i = 0; i < count && !mismatch[0]; i++) {
        if (!post_message(self, &messages[i], now, &pair))
            describe_mismatch(mismatch, sizeof mismatch, self, &pair);
        else if (pair.mine)
            copies[large++] = pair;
    }
    run_copies(self, copies, large);
    return mismatch[0] ? ee_local_give_up(self, "%s", mismatch) : EE_OK;
}

enum ee_status ee_local_start(struct ee_comm *comm, ee_comm_request *request,
                              const struct ee_message *messages, int count) {
    struct ee_local *self = ee_local_of(comm);
    pthread_mutex_lock(&self->group->job->lock);
    enum ee_status status = post_all(self, request, messages, count);
    pthread_mutex_unlock(&self->group->job->lock);
    return status;
}

/* How much of an exchange is left; `open` is an open post of it, or NULL. */
struct left {
    int all, pending;
    const struct ee_local_post *open;
};

static struct left count_left(struct ee_local *self, ee_comm_request request) {
    struct left left = {0, 0, NULL};
    double now = self->comm.trace ? ee_now() : 1;
    for (int i = 0; i < self->high; i++) {
        struct ee_local_post *post = &self->posts[i];
        if (post->request != request)
            continue;
        left.all++;
        if (post->state == EE_LOCAL_DONE) {
            post->done = post->done > 0 ? post->done : now;
            continue;
        }
        left.pending++;
        if (post->state == EE_LOCAL_OPEN && !left.open)
            left.open = post;
    }
    return left;
}

static enum ee_status fail_overdue(struct ee_local *self, const struct ee_message *message) {
    char where[192];
    ee_local_where(where, sizeof where, message->tag, message->action);
    if (message->direction == EE_RECEIVE)
        return ee_local_give_up(self, "rank %d: no message from rank %d within %g s%s",
                                self->comm.rank, message->peer, self->comm.timeout, where);
    return ee_local_give_up(self, "rank %d: rank %d did not receive a message within %g s%s",
                            self->comm.rank, message->peer, self->comm.timeout, where);
}

static enum ee_status wait_all(struct ee_local *self, ee_comm_request request) {
    double deadline = ee_now() + self->comm.timeout;
    bool overdue = false;
    EE_TRY(ee_local_alive(self));
    for (;;) {
        struct left left = count_left(self, request);
        if (left.all == 0)
            EE_FAIL(EE_ERR_INVALID, "rank %d: no exchange %lld is under way", self->comm.rank,
                    (long long)request);
        if (left.pending == 0)
            return EE_OK;
        EE_TRY(ee_local_alive(self));
        if (left.open) {
            const struct ee_message *message = &left.open->message;
            char where[192];
            if (!self->group->places[message->peer].handle)
                return ee_local_give_up(
                    self, "rank %d: rank %d has left the communicator%s", self->comm.rank,
                    message->peer,
                    ee_local_where(where, sizeof where, message->tag, message->action));
            if (overdue)
                return fail_overdue(self, message);
        }
        /* A copy ends by itself. */
        overdue = !ee_local_sleep(self, left.open ? deadline : -1);
    }
}

enum ee_status ee_local_wait(struct ee_comm *comm, ee_comm_request request) {
    struct ee_local *self = ee_local_of(comm);
    pthread_mutex_lock(&self->group->job->lock);
    enum ee_status status = wait_all(self, request);
    pthread_mutex_unlock(&self->group->job->lock);
    if (status != EE_OK)
        return status;
    int high = 0;
    /* What one start posted lies in the order of its list, since it took the lowest free posts. */
    for (int i = 0; i < self->high; i++) {
        struct ee_local_post *post = &self->posts[i];
        if (post->request != request) {
            high = post->request ? i + 1 : high;
            continue;
        }
        if (comm->trace)
            comm->trace(comm->trace_arg, &post->message, post->started, post->done);
        post->request = 0;
        self->used--;
    }
    self->high = high;
    return EE_OK;
}
