/* Messages: every one of a list is posted before any is waited for, and every wait ends. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "mpi/transport.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#define MEBIBYTE ((size_t)1 << 20)

/* To be woken costs more than most messages take. So a wait polls and yields for the time that its
 * communicator says, and that its bytes take at a modest rate, since MPI may copy them piece by
 * piece when it is called. Where a yield lasts, another thread computes on this core, and is left
 * alone for a long nap. After that time all are naps, which grow with the wait. */
#define SECONDS_PER_BYTE 1e-9
#define LONG_YIELD 300e-6
#define PART_OF_WAIT 0.01
#define SHORT_NAP 20e-6
#define LONG_NAP 500e-6

static const char *const collective_names[] = {
    [CALL_SPLIT] = "split",           [CALL_ALL_REDUCE] = "all-reduce",
    [CALL_ALL_GATHER] = "all-gather", [CALL_REDUCE_SCATTER] = "reduce-scatter",
    [CALL_BROADCAST] = "broadcast",   [CALL_BARRIER] = "barrier",
};

char *ee_mpi_describe(char *text, size_t size, const struct ee_message *message, int tag_limit) {
    char tag[48] = "", index[32] = "";
    const char *name = message->action.name;
    bool collective = message->tag >= tag_limit;
    if (collective)
        snprintf(tag, sizeof tag, "%s", collective_names[message->tag - tag_limit]);
    else
        snprintf(tag, sizeof tag, "tag %d", message->tag);
    if (name && message->action.index >= 0)
        snprintf(index, sizeof index, " %lld", (long long)message->action.index);
    snprintf(text, size, " (%s%s%s%s)", tag, name ? ", " : "", name ? name : "", index);
    return text;
}

/* -- Start ---------------------------------------------------------------------------------- */

/* A type of exactly `bytes` bytes, for what an int cannot count. */
static int create_large_type(MPI_Datatype *out, size_t bytes) {
    MPI_Datatype mebibyte, parts[2];
    int code = MPI_Type_contiguous((int)MEBIBYTE, MPI_BYTE, &mebibyte);
    if (code != MPI_SUCCESS)
        return code;
    int lengths[2] = {(int)(bytes / MEBIBYTE), (int)(bytes % MEBIBYTE)};
    MPI_Aint places[2] = {0, (MPI_Aint)(bytes / MEBIBYTE * MEBIBYTE)};
    parts[0] = mebibyte;
    parts[1] = MPI_BYTE;
    code = MPI_Type_create_struct(2, lengths, places, parts, out);
    if (code == MPI_SUCCESS)
        code = MPI_Type_commit(out);
    MPI_Type_free(&mebibyte);
    return code;
}

static int post(struct mpi *mpi, const struct ee_message *message, MPI_Request *request) {
    MPI_Datatype type = MPI_BYTE;
    int count = (int)message->bytes;
    bool large = message->bytes > mpi->job->largest;
    if (large) {
        int code = create_large_type(&type, message->bytes);
        if (code != MPI_SUCCESS)
            return code;
        count = 1;
    }
    int code = message->direction == EE_SEND ? MPI_Isend(message->data, count, type, message->peer,
                                                         message->tag, mpi->handle, request)
                                             : MPI_Irecv(message->data, count, type, message->peer,
                                                         message->tag, mpi->handle, request);
    if (large)
        MPI_Type_free(&type); /* MPI keeps it until the message is done */
    return code;
}

/* Receives first, so that what arrives finds its place. The caller holds the mutex. */
static void post_all(struct mpi *mpi, int first, int count) {
    static const enum ee_direction order[] = {EE_RECEIVE, EE_SEND};
    for (int pass = 0; pass < 2; pass++) {
        for (int i = first; i < first + count; i++) {
            const struct ee_message *message = &mpi->slots[i].message;
            if (message->direction != order[pass])
                continue;
            int code = post(mpi, message, &mpi->requests[i]);
            if (code == MPI_SUCCESS)
                continue;
            char reason[MPI_MAX_ERROR_STRING], text[200];
            int length;
            MPI_Error_string(code, reason, &length);
            ee_job_fail(mpi->job, "rank %d: a message to or from rank %d cannot be started: %s%s",
                        mpi->comm.rank, message->peer, reason,
                        ee_mpi_describe(text, sizeof text, message, mpi->job->tag_limit));
            return;
        }
    }
}

static enum ee_status start_list(struct mpi *mpi, ee_comm_request *request,
                                 const struct ee_message *messages, int count) {
    struct job *job = mpi->job;
    pthread_mutex_lock(&job->mutex);
    enum ee_status status = ee_job_check(job, mpi->comm.rank);
    if (status == EE_OK) {
        int first = mpi->used;
        double now = ee_now();
        *request = ++mpi->last;
        for (int i = 0; i < count; i++) {
            mpi->slots[first + i] = (struct slot){messages[i], *request, now, now, false};
            mpi->requests[first + i] = MPI_REQUEST_NULL;
        }
        mpi->used += count;
        mpi->pending += count;
        job->pending += count;
        job->last_event = now;
        post_all(mpi, first, count);
        status = ee_job_check(job, mpi->comm.rank);
        if (job->idle)
            pthread_cond_signal(&job->wake);
    }
    pthread_mutex_unlock(&job->mutex);
    return status;
}

static enum ee_status start(struct ee_comm *comm, ee_comm_request *request,
                            const struct ee_message *messages, int count) {
    struct mpi *mpi = ee_mpi_of(comm);
    const struct ee_host *host = mpi->job->host;
    if (count > EE_COMM_MAX_MESSAGES - mpi->posted)
        return host->fail(EE_ERR_COMM,
                          "rank %d: more than %d messages are under way; wait for some first",
                          comm->rank, EE_COMM_MAX_MESSAGES);
    for (int i = 0; i < count; i++)
        if (messages[i].tag >= mpi->job->tag_limit)
            return host->fail(EE_ERR_INVALID, "rank %d: a tag must lie below %d, got %d",
                              comm->rank, mpi->job->tag_limit, messages[i].tag);
    EE_TRY(start_list(mpi, request, messages, count));
    mpi->posted += count;
    return EE_OK;
}

/* -- Wait ----------------------------------------------------------------------------------- */

/* now: the wait has lasted since `begin`. shared: whether others compute on this core. */
static void give_way(double begin, double now, double polling, bool *shared) {
    double waited = now - begin;
    if (waited < polling && !*shared) {
        sched_yield();
        *shared = ee_now() - now > LONG_YIELD;
        return;
    }
    double nap = fmin(fmax(PART_OF_WAIT * (waited - polling), SHORT_NAP), LONG_NAP);
    ee_sleep(*shared ? LONG_NAP : nap);
    *shared = false;
}

/* The first message of a request that is not complete; NULL if there is none. */
static const struct slot *first_open(const struct mpi *mpi, ee_comm_request request, int *found) {
    *found = 0;
    for (int i = 0; i < mpi->used; i++) {
        if (mpi->slots[i].request != request)
            continue;
        ++*found;
        if (!mpi->slots[i].complete)
            return &mpi->slots[i];
    }
    return NULL;
}

static void fail_late(struct mpi *mpi, const struct slot *slot, double timeout) {
    char text[200];
    const struct ee_message *message = &slot->message;
    bool send = message->direction == EE_SEND;
    ee_job_fail(mpi->job, "rank %d: %s rank %d %swithin %g s%s", mpi->comm.rank,
                send ? "the message to" : "no message from", message->peer,
                send ? "was not received " : "", timeout,
                ee_mpi_describe(text, sizeof text, message, mpi->job->tag_limit));
}

/* Takes the slots of a request out, after the caller's trace has seen them. */
static void retire(struct mpi *mpi, ee_comm_request request) {
    int kept = 0;
    for (int i = 0; i < mpi->used; i++) {
        struct slot *slot = &mpi->slots[i];
        if (slot->request == request) {
            if (mpi->comm.trace && slot->message.tag < mpi->job->tag_limit)
                mpi->comm.trace(mpi->comm.trace_arg, &slot->message, slot->started, slot->done);
            continue;
        }
        mpi->slots[kept] = *slot;
        mpi->requests[kept] = mpi->requests[i];
        kept++;
    }
    mpi->used = kept;
}

static double bytes_of(const struct mpi *mpi, ee_comm_request request) {
    double bytes = 0;
    for (int i = 0; i < mpi->used; i++)
        if (mpi->slots[i].request == request)
            bytes += (double)mpi->slots[i].message.bytes;
    return bytes;
}

/* Waits until `deadline`; *count = messages of the request. */
static enum ee_status finish(struct mpi *mpi, ee_comm_request request, double deadline,
                             int *count) {
    struct job *job = mpi->job;
    double begin = ee_now();
    bool shared = false;
    pthread_mutex_lock(&job->mutex);
    job->waiting++;
    double polling = mpi->comm.polling + SECONDS_PER_BYTE * bytes_of(mpi, request);
    for (;;) {
        if (!job->failed)
            ee_job_poll(job);
        const struct slot *open = first_open(mpi, request, count);
        double now = ee_now();
        if (!job->failed && open && now > deadline)
            fail_late(mpi, open, mpi->comm.timeout);
        if (job->failed || !open)
            break;
        pthread_mutex_unlock(&job->mutex);
        give_way(begin, now, polling, &shared);
        pthread_mutex_lock(&job->mutex);
    }
    job->waiting--;
    enum ee_status status = ee_job_check(job, mpi->comm.rank);
    if (status == EE_OK)
        retire(mpi, request);
    pthread_mutex_unlock(&job->mutex);
    return status;
}

static enum ee_status wait(struct ee_comm *comm, ee_comm_request request) {
    struct mpi *mpi = ee_mpi_of(comm);
    int count = 0;
    EE_TRY(finish(mpi, request, ee_now() + comm->timeout, &count));
    if (count == 0)
        return mpi->job->host->fail(EE_ERR_INVALID, "rank %d: no exchange %lld is under way",
                                    comm->rank, (long long)request);
    mpi->posted -= count;
    return EE_OK;
}

enum ee_status ee_mpi_exchange(struct mpi *mpi, struct ee_message *messages, int count,
                               enum ee_mpi_call kind, double deadline) {
    ee_comm_request request;
    for (int i = 0; i < count; i++)
        messages[i].tag = mpi->job->tag_limit + (int)kind;
    EE_TRY(start_list(mpi, &request, messages, count));
    return finish(mpi, request, deadline, &count);
}

/* -- Communicators -------------------------------------------------------------------------- */

struct split {
    MPI_Comm from, to;
    int colour, key;
};

static int split_handle(struct job *job, void *arg) {
    (void)job;
    struct split *split = arg;
    int colour = split->colour < 0 ? MPI_UNDEFINED : split->colour;
    return MPI_Comm_split(split->from, colour, split->key, &split->to);
}

static enum ee_status split(struct ee_comm *comm, struct ee_comm **out, int colour, int key) {
    struct mpi *mpi = ee_mpi_of(comm);
    EE_TRY(ee_mpi_meet(comm)); /* its error names the rank that has not come */
    void *memory;
    EE_TRY(mpi->job->host->alloc(&memory, sizeof(struct split), "a communicator"));
    struct split *parts = memory;
    *parts = (struct split){mpi->handle, MPI_COMM_NULL, colour, key};
    EE_TRY(ee_job_block(mpi->job, comm->timeout, "a split", split_handle, parts));
    MPI_Comm handle = parts->to;
    mpi->job->host->free(memory);
    if (handle == MPI_COMM_NULL)
        return EE_OK;
    EE_TRY(ee_mpi_create(out, mpi->job, handle, comm->timeout));
    (*out)->polling = comm->polling;
    (*out)->trace = comm->trace;
    (*out)->trace_arg = comm->trace_arg;
    return EE_OK;
}

static void abort_job(struct ee_comm *comm, const char *reason) {
    ee_job_abort(ee_mpi_of(comm)->job, reason);
}

/* The handle stays with MPI until its end: to free it is a collective, and objects of Python go in
 * an order that differs between ranks. */
static void destroy(struct ee_comm *comm) {
    struct mpi *mpi = ee_mpi_of(comm);
    struct job *job = mpi->job;
    pthread_mutex_lock(&job->mutex);
    for (struct mpi **link = &job->comms; *link; link = &(*link)->next) {
        if (*link == mpi) {
            *link = mpi->next;
            break;
        }
    }
    job->pending -= mpi->pending;
    pthread_mutex_unlock(&job->mutex);
    if (mpi->scratch)
        job->host->free(mpi->scratch);
    job->host->free(mpi);
    ee_job_release(job);
}

enum ee_status ee_mpi_create(struct ee_comm **out, struct job *job, MPI_Comm handle,
                             double timeout) {
    void *memory;
    EE_TRY(job->host->alloc(&memory, sizeof(struct mpi), "a communicator"));
    struct mpi *mpi = memory;
    memset(mpi, 0, sizeof *mpi);
    mpi->comm = (struct ee_comm){
        .abi = EE_COMM_ABI,
        .struct_size = sizeof(struct ee_comm),
        .transport = "mpi",
        .timeout = timeout,
        .polling = EE_COMM_POLLING_SHARED,
        .split = split,
        .start = start,
        .wait = wait,
        .all_reduce = ee_mpi_all_reduce,
        .all_gather = ee_mpi_all_gather,
        .reduce_scatter = ee_mpi_reduce_scatter,
        .broadcast = ee_mpi_broadcast,
        .barrier = ee_mpi_barrier,
        .abort = abort_job,
        .destroy = destroy,
    };
    mpi->job = job;
    mpi->handle = handle;
    MPI_Comm_set_errhandler(handle, MPI_ERRORS_RETURN);
    MPI_Comm_rank(handle, &mpi->comm.rank);
    MPI_Comm_size(handle, &mpi->comm.size);
    pthread_mutex_lock(&job->mutex);
    job->references++;
    mpi->next = job->comms;
    job->comms = mpi;
    pthread_mutex_unlock(&job->mutex);
    *out = &mpi->comm;
    return EE_OK;
}
