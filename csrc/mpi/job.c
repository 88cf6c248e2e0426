/* The job of a process: start and end of MPI, the service thread, and the poll of all messages. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "mpi/transport.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

/* To wake costs 10 us and more, a poll a tenth of one: the thread polls often after a message was
 * started or completed, then at times that grow with the time without such an event. */
#define SHORTEST_INTERVAL 200e-6
#define LONGEST_INTERVAL 1e-3
#define PART_OF_QUIET_TIME 0.25
/* Polls without anything under way after which the thread sleeps until it is woken. */
#define POLLS_BEFORE_IDLE 20

void ee_job_fail(struct job *job, const char *format, ...) {
    if (job->failed)
        return;
    job->failed = true;
    va_list args;
    va_start(args, format);
    vsnprintf(job->reason, sizeof job->reason, format, args);
    va_end(args);
}

enum ee_status ee_job_check(struct job *job, int rank) {
    if (job->ended)
        return job->host->fail(EE_ERR_COMM, "rank %d: MPI has ended", rank);
    if (job->failed)
        return job->host->fail(EE_ERR_COMM, "%s", job->reason);
    return EE_OK;
}

/* The end of one message; a size other than the expected one is a failure. */
static void complete(struct mpi *mpi, int index, const MPI_Status *status, double now) {
    struct slot *slot = &mpi->slots[index];
    slot->complete = true;
    slot->done = mpi->job->last_event = now;
    mpi->pending--;
    mpi->job->pending--;
    if (slot->message.direction == EE_SEND)
        return;
    MPI_Count bytes = 0;
    MPI_Get_elements_x(status, MPI_BYTE, &bytes);
    if ((size_t)bytes != slot->message.bytes) {
        char text[200];
        ee_job_fail(mpi->job, "rank %d: rank %d sent %lld bytes where %zu are received%s",
                    mpi->comm.rank, slot->message.peer, (long long)bytes, slot->message.bytes,
                    ee_mpi_describe(text, sizeof text, &slot->message, mpi->job->tag_limit));
    }
}

static bool is_gone(int code) {
#ifdef MPI_ERR_PROC_FAILED /* since Open MPI 5 */
    int class = MPI_SUCCESS;
    MPI_Error_class(code, &class);
    return class == MPI_ERR_PROC_FAILED;
#else
    (void)code;
    return false;
#endif
}

static void report(struct mpi *mpi, int index, int code) {
    const struct ee_message *message = &mpi->slots[index].message;
    char reason[MPI_MAX_ERROR_STRING], text[200];
    int length;
    MPI_Error_string(code, reason, &length);
    bool send = message->direction == EE_SEND;
    if (is_gone(code)) { /* eellm/cli/__init__.py knows the words */
        ee_job_fail(mpi->job, "rank %d: the process of rank %d has ended%s", mpi->comm.rank,
                    message->peer,
                    ee_mpi_describe(text, sizeof text, message, mpi->job->tag_limit));
        return;
    }
    ee_job_fail(mpi->job, "rank %d: %zu bytes %s rank %d: %s%s", mpi->comm.rank, message->bytes,
                send ? "to" : "from", message->peer, reason,
                ee_mpi_describe(text, sizeof text, message, mpi->job->tag_limit));
}

static void poll_comm(struct mpi *mpi) {
    int count = 0;
    int code = MPI_Testsome(mpi->used, mpi->requests, &count, mpi->finished, mpi->statuses);
    double now = ee_now();
    bool in_status = code != MPI_SUCCESS;
    if (count == MPI_UNDEFINED)
        return;
    for (int i = 0; i < count; i++) {
        int index = mpi->finished[i], error = mpi->statuses[i].MPI_ERROR;
        if (in_status && error != MPI_SUCCESS && error != MPI_ERR_PENDING)
            report(mpi, index, error);
        else
            complete(mpi, index, &mpi->statuses[i], now);
    }
    if (in_status)
        ee_job_fail(mpi->job, "rank %d: MPI_Testsome failed with code %d", mpi->comm.rank, code);
}

void ee_job_poll(struct job *job) {
    for (struct mpi *mpi = job->comms; mpi && !job->failed; mpi = mpi->next)
        if (mpi->pending > 0)
            poll_comm(mpi);
}

/* -- The service thread --------------------------------------------------------------------- */

static void run_task(struct job *job) {
    int (*task)(struct job *, void *) = job->task;
    void *arg = job->task_arg;
    pthread_mutex_unlock(&job->mutex);
    int result = task(job, arg);
    pthread_mutex_lock(&job->mutex);
    job->task = NULL;
    job->task_result = result;
    pthread_cond_broadcast(&job->done);
}

/* The caller holds the mutex. Who waits polls. */
static double interval(const struct job *job) {
    if (job->waiting > 0)
        return LONGEST_INTERVAL;
    double part = PART_OF_QUIET_TIME * (ee_now() - job->last_event);
    return fmin(fmax(part, SHORTEST_INTERVAL), LONGEST_INTERVAL);
}

static void *serve(void *arg) {
    struct job *job = arg;
    int quiet = 0;
    prctl(PR_SET_NAME, "eellm-mpi");
    prctl(PR_SET_TIMERSLACK, 10000UL);
    pthread_mutex_lock(&job->mutex);
    while (!job->stop) {
        if (job->task) {
            run_task(job);
            continue;
        }
        quiet = job->pending > 0 ? 0 : quiet + 1;
        if (job->failed || quiet > POLLS_BEFORE_IDLE) {
            job->idle = true;
            pthread_cond_wait(&job->wake, &job->mutex);
            job->idle = false;
            quiet = 0;
            continue;
        }
        double nap = interval(job);
        pthread_mutex_unlock(&job->mutex);
        ee_sleep(nap);
        pthread_mutex_lock(&job->mutex);
        if (job->waiting == 0 && job->pending > 0)
            ee_job_poll(job);
    }
    pthread_mutex_unlock(&job->mutex);
    return NULL;
}

static struct timespec deadline_of(double timeout) {
    double when = ee_now() + fmin(timeout, 1e9);
    struct timespec t = {(time_t)when, (long)(1e9 * (when - floor(when)))};
    return t;
}

enum ee_status ee_job_block(struct job *job, double timeout, const char *what,
                            int (*task)(struct job *, void *), void *arg) {
    struct timespec deadline = deadline_of(timeout);
    pthread_mutex_lock(&job->mutex);
    int late = 0;
    while (job->task && !late) /* another thread's */
        late = pthread_cond_timedwait(&job->done, &job->mutex, &deadline);
    if (!late) {
        job->task = task;
        job->task_arg = arg;
        pthread_cond_signal(&job->wake);
        while (job->task && !late)
            late = pthread_cond_timedwait(&job->done, &job->mutex, &deadline);
    }
    int code = job->task_result;
    if (job->task)
        ee_job_fail(job, "rank %d: %s did not end within %g s; a rank of the job has not come",
                    job->rank, what, timeout);
    else if (code != MPI_SUCCESS) {
        char reason[MPI_MAX_ERROR_STRING];
        int length;
        MPI_Error_string(code, reason, &length);
        ee_job_fail(job, "rank %d: %s: %s", job->rank, what, reason);
    }
    enum ee_status status = ee_job_check(job, job->rank);
    pthread_mutex_unlock(&job->mutex);
    return status;
}

/* -- Start and end -------------------------------------------------------------------------- */

/* The rank by what launchers set, for errors before MPI has said it; -1 without. */
static int launched_rank(void) {
    const char *text = getenv("OMPI_COMM_WORLD_RANK");
    if (!text)
        text = getenv("PMIX_RANK");
    return text ? (int)strtol(text, NULL, 10) : -1;
}

enum ee_status ee_job_create(struct job **out, const struct ee_host *host, size_t largest) {
    void *memory;
    EE_TRY(host->alloc(&memory, sizeof(struct job), "the MPI job"));
    struct job *job = memory;
    *job = (struct job){.host = host, .references = 1, .rank = launched_rank(), .largest = largest};
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&job->mutex, NULL);
    pthread_cond_init(&job->wake, NULL);
    pthread_cond_init(&job->done, &attributes);
    pthread_condattr_destroy(&attributes);
    *out = job;
    return EE_OK;
}

struct start {
    int provided;
    bool ended;
};

static int start_mpi(struct job *job, void *arg) {
    struct start *start = arg;
    int is_on = 0, is_off = 0, found = 0, *limit = NULL;
    MPI_Finalized(&is_off);
    start->ended = is_off;
    if (is_off)
        return MPI_SUCCESS;
    MPI_Initialized(&is_on);
    /* A connection that is lost fails the messages of that rank, and not the process at once. */
    setenv("OMPI_MCA_mpi_ft_enable", "1", 0);
    int code = is_on ? MPI_Query_thread(&start->provided)
                     : MPI_Init_thread(NULL, NULL, MPI_THREAD_MULTIPLE, &start->provided);
    if (code != MPI_SUCCESS)
        return code;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &job->rank);
    code = MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, (void *)&limit, &found);
    job->tag_limit = (found && limit ? *limit : 32767) - CALL_COUNT;
    return code;
}

static enum ee_status start_thread(struct job *job) {
    if (job->has_thread)
        return EE_OK;
    int error = pthread_create(&job->thread, NULL, serve, job);
    if (error)
        return job->host->fail(EE_ERR_COMM, "the thread that serves MPI cannot be started: %s",
                               strerror(error));
    job->has_thread = true;
    return EE_OK;
}

static enum ee_status ensure_started(struct job *job, double timeout) {
    if (job->started)
        return EE_OK;
    EE_TRY(start_thread(job));
    /* Lives on where the deadline passes while the thread still writes to it. */
    void *memory;
    EE_TRY(job->host->alloc(&memory, sizeof(struct start), "the start of MPI"));
    struct start *start = memory;
    *start = (struct start){0};
    EE_TRY(ee_job_block(job, timeout, "the start of MPI", start_mpi, start));
    struct start result = *start;
    job->host->free(start);
    if (result.ended)
        return job->host->fail(EE_ERR_COMM, "MPI has ended in this process; start it once");
    if (result.provided < MPI_THREAD_MULTIPLE)
        return job->host->fail(EE_ERR_UNSUPPORTED,
                               "this MPI does not serve several threads (level %d, expected "
                               "MPI_THREAD_MULTIPLE); use one that was built for it",
                               result.provided);
    job->started = true;
    return EE_OK;
}

static int duplicate_world(struct job *job, void *arg) {
    (void)job;
    return MPI_Comm_dup(MPI_COMM_WORLD, (MPI_Comm *)arg);
}

enum ee_status ee_job_world(struct job *job, struct ee_comm **out, double timeout) {
    EE_TRY(ee_job_check(job, job->rank));
    EE_TRY(ensure_started(job, timeout));
    void *handle;
    EE_TRY(job->host->alloc(&handle, sizeof(MPI_Comm), "a communicator"));
    EE_TRY(ee_job_block(job, timeout, "the communicator of all ranks", duplicate_world, handle));
    enum ee_status status = ee_mpi_create(out, job, *(MPI_Comm *)handle, timeout);
    job->host->free(handle);
    return status;
}

static int finalize(struct job *job, void *arg) {
    (void)job, (void)arg;
    int is_off = 0;
    MPI_Finalized(&is_off);
    return is_off ? MPI_SUCCESS : MPI_Finalize();
}

static void stop_thread(struct job *job) {
    pthread_mutex_lock(&job->mutex);
    job->stop = true;
    pthread_cond_signal(&job->wake);
    pthread_mutex_unlock(&job->mutex);
    pthread_join(job->thread, NULL);
    job->has_thread = false;
}

void ee_job_end(struct job *job) {
    if (job->ended || job->failed)
        return;
    /* Without a deadline: another rank may have long work to do after its last message. */
    if (job->started && ee_job_block(job, INFINITY, "the end of MPI", finalize, NULL) != EE_OK)
        return;
    if (job->has_thread)
        stop_thread(job);
    job->ended = true;
}

void ee_job_kill(struct job *job) {
    /* mpirun ends the job when a rank ends with a status, and says less than after MPI_Abort. */
    if (job->started && !job->ended && !getenv("PRTE_LAUNCHED")) {
        signal(SIGALRM, SIG_DFL);
        alarm(10); /* ends this process, should MPI hang */
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    _Exit(1);
}

void ee_job_abort(struct job *job, const char *reason) {
    job->host->log(EE_LOG_ERROR, "rank %d: %s", job->rank, reason ? reason : "the job is ended");
    ee_job_kill(job);
}

void ee_job_release(struct job *job) {
    pthread_mutex_lock(&job->mutex);
    bool last = --job->references == 0;
    pthread_mutex_unlock(&job->mutex);
    if (!last)
        return;
    if (job->has_thread && !job->ended) /* it may hang in MPI, and uses the job */
        return;
    pthread_cond_destroy(&job->done);
    pthread_cond_destroy(&job->wake);
    pthread_mutex_destroy(&job->mutex);
    job->host->free(job);
}
