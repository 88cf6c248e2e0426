/* The transport of ranks that are threads of one process: what its files share.
 *
 * One lock guards everything of a job, which holds all communicators made by one ee_comm_local and
 * split from those; it is held for bookkeeping and small copies only. A rank sleeps on its own
 * condition, which is signalled whenever something that it may wait for has changed.
 *
 * Nobody reads or writes a buffer of a rank whose call has failed: an error aborts the whole job,
 * so that nothing is matched any more, and the failing call first lets copies under way end. */
#ifndef EE_LOCAL_H
#define EE_LOCAL_H

#include "comm/comm.h"

#include <pthread.h>

EE_EXTERN_C_BEGIN

/* Up to this many bytes a copy is quicker than taking the lock once more. */
#define EE_LOCAL_SMALL ((size_t)16384)

struct ee_local_job {
    pthread_mutex_t lock;
    int handles;            /* communicators that are alive */
    struct ee_local *first; /* the list of them */
    bool aborted;
    char reason[512];
};

enum ee_local_state { EE_LOCAL_OPEN, EE_LOCAL_COPYING, EE_LOCAL_DONE };

struct ee_local_post {
    struct ee_message message;
    ee_comm_request request;   /* 0: free */
    enum ee_local_state state; /* OPEN: the other side has not come; COPYING: a copy is under way */
    double started, done;      /* for the trace; written by its own thread, as `request` is */
    struct ee_local_post *next; /* of the open ones */
};

enum ee_local_kind {
    EE_LOCAL_ALL_REDUCE,
    EE_LOCAL_ALL_GATHER,
    EE_LOCAL_REDUCE_SCATTER,
    EE_LOCAL_BROADCAST,
    EE_LOCAL_BARRIER,
    EE_LOCAL_SPLIT
};

/* A collective; all ranks must call the same. What a kind has no use for is 0. */
struct ee_local_call {
    enum ee_local_kind kind;
    size_t count; /* elements, or bytes of those without a type */
    enum ee_comm_type type;
    enum ee_comm_reduce reduce;
    int root;
};

/* What a group knows of one of its ranks. */
struct ee_local_place {
    struct ee_local *handle; /* NULL: destroyed */
    bool arrived;            /* at the collective that is being gathered for */
    const void *in;
    void *out;
    int colour, key;
    struct ee_comm *made; /* by a split */
};

/* The ranks of one communicator. A collective is gathered for until all have arrived; then either
 * the last one does all the work, or, where it is much, every rank a part of it. */
struct ee_local_group {
    struct ee_local_job *job;
    int size;
    int handles;         /* that are alive */
    uint64_t generation; /* collectives completed */
    int arrived, finished;
    bool working; /* all have arrived, every rank does its part */
    int leader;   /* the first to arrive, whose call the others are compared with */
    struct ee_local_call call;
    /* Of the last split: */
    enum ee_status split_status;
    struct ee_local_place places[];
};

/* A communicator. The fields from `last` on belong to its own thread, but for the state of a post
 * and the data of an open one, which are guarded by the lock. */
struct ee_local {
    struct ee_comm comm; /* first, so that the pointers are the same */
    struct ee_local_group *group;
    struct ee_local *previous, *next; /* in the job's list */
    pthread_cond_t changed;
    struct ee_local_post *open, **open_end; /* in the order in which they were started */
    int copying;                            /* messages that other threads are copying */
    ee_comm_request last;                   /* requests are numbered from 1 */
    int used, high;                         /* posts in use; all of them lie below `high` */
    struct ee_local_post posts[EE_COMM_MAX_MESSAGES];
};

static inline struct ee_local *ee_local_of(struct ee_comm *comm) {
    return (struct ee_local *)(void *)comm;
}

/* All functions below are called with the lock held. */

/* EE_ERR_COMM with the reason once the job is aborted. */
EE_WARN_UNUSED enum ee_status ee_local_alive(struct ee_local *self);

/* Aborts the job for the reason given, and returns EE_ERR_COMM with it. */
enum ee_status ee_local_give_up(struct ee_local *self, const char *format, ...) EE_PRINTF(2, 3);

/* Sleeps until something has changed or ee_now() is past the deadline; false for the latter. A
 * negative deadline is none. */
bool ee_local_sleep(struct ee_local *self, double deadline);

void ee_local_wake(struct ee_local *self);
void ee_local_wake_group(struct ee_local_group *group);

/* Makes the communicators of a split in the places of the group. */
void ee_local_make_parts(struct ee_local_group *group);

/* " (tag 2, forward of microbatch 5)", or "" where nothing is known. Returns `text`. */
char *ee_local_where(char *text, size_t size, int tag, struct ee_action action);

/* The functions of struct ee_comm (local_messages.c, local_collectives.c), without the lock. */
enum ee_status ee_local_start(struct ee_comm *comm, ee_comm_request *request,
                              const struct ee_message *messages, int count);
enum ee_status ee_local_wait(struct ee_comm *comm, ee_comm_request request);
enum ee_status ee_local_all_reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                   enum ee_comm_type type, enum ee_comm_reduce reduce,
                                   struct ee_action action);
enum ee_status ee_local_all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                   struct ee_action action);
enum ee_status ee_local_reduce_scatter(struct ee_comm *comm, void *out, const void *in,
                                       int64_t count, enum ee_comm_type type,
                                       enum ee_comm_reduce reduce, struct ee_action action);
enum ee_status ee_local_broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                  struct ee_action action);
enum ee_status ee_local_barrier(struct ee_comm *comm, struct ee_action action);
enum ee_status ee_local_split(struct ee_comm *comm, struct ee_comm **out, int colour, int key);

EE_EXTERN_C_END

#endif
