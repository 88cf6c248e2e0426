/* The transport `mpi`, inside eellm._mpi: one job per process, any number of communicators.
 *
 * MPI moves large messages only while somebody calls it. A thread of the job, the service thread,
 * therefore polls every 0.2 to 1 ms while messages are under way and nobody waits for them; it
 * sleeps otherwise. It also makes the calls of MPI that block until every rank has come (start,
 * split, end), so that the caller can give up at its deadline.
 *
 * The extension links no object of the core: failures, memory and the log come from struct ee_host.
 * After the first failure of a wait MPI is not called any more but to abort: what is under way can
 * neither be completed nor called back. */
#ifndef EE_MPI_TRANSPORT_H
#define EE_MPI_TRANSPORT_H

#include "comm/comm.h"
#include "comm/host.h"

#include <mpi.h>
#include <pthread.h>

/* Messages of a collective that are under way at one time: half of them sent, half received. */
#define WINDOW 64
#define SLOTS (EE_COMM_MAX_MESSAGES + WINDOW)

/* The highest tags are those of collectives; a kind of its own for each, so that ranks that call
 * different ones do not take each other's data. */
enum ee_mpi_call {
    CALL_SPLIT,
    CALL_ALL_REDUCE,
    CALL_ALL_GATHER,
    CALL_REDUCE_SCATTER,
    CALL_BROADCAST,
    CALL_BARRIER,
    CALL_COUNT
};

struct job {
    const struct ee_host *host;
    int references; /* the module's and one per communicator */
    int rank;       /* in MPI_COMM_WORLD; -1 before it is known */
    int tag_limit;  /* tags of messages lie below */
    size_t largest; /* bytes of a message that MPI takes as bytes; above, as blocks of a MiB */
    bool started, ended;

    /* The mutex guards all that follows, and the slots of every communicator. */
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    pthread_t thread;
    bool has_thread, idle, stop, failed;
    char reason[512];
    struct mpi *comms; /* linked by next */
    int pending;       /* messages that are not complete, of all communicators */
    int waiting;       /* threads that poll in a wait */
    double last_event; /* when a message was started or completed */
    /* A call that the service thread makes; its result is a code of MPI. */
    int (*task)(struct job *job, void *arg);
    void *task_arg;
    int task_result;
};

struct slot {
    struct ee_message message;
    ee_comm_request request;
    double started, done;
    bool complete;
};

struct mpi {
    struct ee_comm comm; /* first, so that the pointers are the same */
    struct job *job;
    MPI_Comm handle;
    struct mpi *next;
    ee_comm_request last; /* requests are numbered from 1 */
    int posted;           /* messages of the caller under way */
    int pending;          /* slots that are not complete */
    int used;             /* slots[0 .. used), in the order in which they were started */
    struct slot slots[SLOTS];
    MPI_Request requests[SLOTS];
    /* Where MPI_Testsome leaves its results. */
    int finished[SLOTS];
    MPI_Status statuses[SLOTS];
    void *scratch; /* of collectives; grows, then stays */
    size_t scratch_bytes;
};

/* job.c: */

/* Makes the job of this process; MPI is not started yet. */
EE_WARN_UNUSED enum ee_status ee_job_create(struct job **out, const struct ee_host *host,
                                            size_t largest);

/* The communicator of all ranks; starts MPI where that was not done before. */
EE_WARN_UNUSED enum ee_status ee_job_world(struct job *job, struct ee_comm **out, double timeout);

/* Ends MPI, unless something has failed. Communicators may only be destroyed afterwards. */
void ee_job_end(struct job *job);

/* Ends the processes of all ranks with status 1; after a line with the reason, or without. */
void ee_job_kill(struct job *job) __attribute__((noreturn));
void ee_job_abort(struct job *job, const char *reason);

/* Frees the job with its last reference. */
void ee_job_release(struct job *job);

/* Runs a call of MPI that blocks until every rank has come; `what` says in errors what it is. */
EE_WARN_UNUSED enum ee_status ee_job_block(struct job *job, double timeout, const char *what,
                                           int (*task)(struct job *job, void *arg), void *arg);

/* Notes which messages are complete; a failure is left in job->failed and reason. The caller holds
 * the mutex. */
void ee_job_poll(struct job *job);

/* Keeps the first failure of the job. The caller holds the mutex. */
void ee_job_fail(struct job *job, const char *format, ...) EE_PRINTF(2, 3);

/* Fails with the job's reason, if it has one. */
enum ee_status ee_job_check(struct job *job, int rank);

/* comm_mpi.c: */

/* Takes over `handle`. */
EE_WARN_UNUSED enum ee_status ee_mpi_create(struct ee_comm **out, struct job *job, MPI_Comm handle,
                                            double timeout);

/* Posts messages with the tag of a collective, at most WINDOW, and waits for them. */
EE_WARN_UNUSED enum ee_status ee_mpi_exchange(struct mpi *mpi, struct ee_message *messages,
                                              int count, enum ee_mpi_call kind, double deadline);

/* " (tag 2, forward of microbatch 5)" or " (all-reduce, norm of step 3)", for errors. */
char *ee_mpi_describe(char *text, size_t size, const struct ee_message *message, int tag_limit);

static inline struct mpi *ee_mpi_of(struct ee_comm *comm) {
    return (struct mpi *)(void *)comm;
}

/* collectives.c: the functions of struct ee_comm. */
enum ee_status ee_mpi_all_reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                 enum ee_comm_type type, enum ee_comm_reduce reduce,
                                 struct ee_action action);
enum ee_status ee_mpi_all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                 struct ee_action action);
enum ee_status ee_mpi_reduce_scatter(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                     enum ee_comm_type type, enum ee_comm_reduce reduce,
                                     struct ee_action action);
enum ee_status ee_mpi_broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                struct ee_action action);
enum ee_status ee_mpi_barrier(struct ee_comm *comm, struct ee_action action);
/* A barrier that errors call a split: all ranks have come before MPI makes one. */
enum ee_status ee_mpi_meet(struct ee_comm *comm);

#endif
