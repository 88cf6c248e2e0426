/* Communication between ranks: the contract between the rest of the core and a transport.
 *
 * A communicator is a numbered group of ranks, 0 .. size - 1. A transport (self, threads of one
 * process, MPI, NCCL) makes the first one, of all ranks, and fills the function pointers of struct
 * ee_comm; ee_comm_split makes smaller groups of it. Code calls the functions ee_comm_<what>, which
 * check their arguments once and call the pointer; a transport may assume valid arguments.
 *
 * Rules:
 * - Collectives (split and all from all_reduce to barrier) are called by every rank of the
 *   communicator, in the same order and with the same sizes, types and roots.
 * - Sends and receives are posted together. A rank hands over the list of all messages that it
 *   sends and receives at one point (ee_comm_start, ee_comm_exchange); the transport posts every
 *   one of them before it waits for any. There is no blocking send and no blocking receive: two
 *   ranks that both send first and receive afterwards pass with small messages, which a transport
 *   buffers, and hang with large ones.
 * - Messages from one rank to another with the same tag arrive in the order in which they were
 *   started. A receive names the rank, the tag and the exact size: there are no wildcards.
 * - A buffer of a started exchange belongs to the transport until ee_comm_wait returns: what is
 *   sent must not be changed, what is received must not be read.
 * - Every wait ends: by success, by the failure of a peer, or after comm->timeout seconds. The
 *   error (EE_ERR_COMM) names this rank, the peer, the tag and the action: "rank 1: no message
 *   from rank 0 within 300 s (tag 2, forward of microbatch 5)". After an error a communicator and
 *   all that were split from the same first one are good for nothing but abort and destroy.
 * - Data lie in host memory, or, where `device` is set, in memory of the GPU that the communicator
 *   was made for; then calls are ordered on its stream, and ee_comm_wait and the collectives return
 *   once they are queued there.
 * - A communicator is used by one thread at a time. Calls allocate nothing after the first of their
 *   kind and size, except ee_comm_split. */
#ifndef EE_COMM_H
#define EE_COMM_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

#define EE_COMM_ABI 3

/* Seconds that a wait lasts at most, unless the maker of the communicator says otherwise. */
#define EE_COMM_TIMEOUT 300.0

/* Seconds for which a wait polls: where ranks share cores to compute on, and where this rank has a
 * core that nobody else wants while it waits. */
#define EE_COMM_POLLING_SHARED 50e-6
#define EE_COMM_POLLING_ALONE 1.0

/* Messages that one list may hold, and that one rank may have under way in one communicator. */
#define EE_COMM_MAX_MESSAGES 256

enum ee_comm_type { EE_COMM_F32, EE_COMM_F64, EE_COMM_I32, EE_COMM_I64, EE_COMM_TYPE_COUNT };
enum ee_comm_reduce { EE_COMM_SUM, EE_COMM_MAX };
enum ee_direction { EE_SEND, EE_RECEIVE };

/* What a message or a collective is for, as errors name it: "forward of microbatch 5". `name` must
 * outlive the communication; NULL names nothing. A negative index is left out. */
struct ee_action {
    const char *name;
    int64_t index;
};

struct ee_message {
    enum ee_direction direction;
    int peer; /* the rank on the other side; may be this rank */
    int tag;  /* >= 0 */
    void *data;
    size_t bytes;
    struct ee_action action;
};

/* An exchange under way; 0 is one that has nothing to wait for. */
typedef int64_t ee_comm_request;

/* When this rank started a message, and when it saw that it was done, in seconds of ee_now()
 * (base/clock.h), whose zero all processes of a machine share. */
typedef void ee_comm_trace(void *arg, const struct ee_message *message, double started,
                           double done);

/* The first member of a transport's own struct. */
struct ee_comm {
    int abi;               /* EE_COMM_ABI as the transport was built with */
    size_t struct_size;    /* sizeof(struct ee_comm), likewise */
    const char *transport; /* "self", "local", "mpi", "nccl" */
    int rank, size;
    bool device;
    double timeout; /* seconds, > 0; copied by split */
    /* Seconds, >= 0: for so long a wait polls and yields, then it naps between polls, which delays
     * a message by up to 0.5 ms. Copied by split; transports that are woken do not need it. */
    double polling;
    /* Where it is set, a wait calls it for every message of the exchange that it waited for, in the
     * order of the list. Copied by split. */
    ee_comm_trace *trace;
    void *trace_arg;

    /* The functions below say what each does. */
    enum ee_status (*split)(struct ee_comm *comm, struct ee_comm **out, int colour, int key);
    enum ee_status (*start)(struct ee_comm *comm, ee_comm_request *request,
                            const struct ee_message *messages, int count);
    enum ee_status (*wait)(struct ee_comm *comm, ee_comm_request request);
    enum ee_status (*all_reduce)(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                 enum ee_comm_type type, enum ee_comm_reduce reduce,
                                 struct ee_action action);
    enum ee_status (*all_gather)(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                 struct ee_action action);
    enum ee_status (*reduce_scatter)(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                     enum ee_comm_type type, enum ee_comm_reduce reduce,
                                     struct ee_action action);
    enum ee_status (*broadcast)(struct ee_comm *comm, void *data, size_t bytes, int root,
                                struct ee_action action);
    enum ee_status (*barrier)(struct ee_comm *comm, struct ee_action action);
    void (*abort)(struct ee_comm *comm, const char *reason);
    void (*destroy)(struct ee_comm *comm);
};

/* Bytes of an element. */
size_t ee_comm_type_size(enum ee_comm_type type);

/* The communicator of one rank. What it sends to itself is matched with what it receives by tag;
 * since nobody else can, a wait for a message without its counterpart fails at once. */
EE_WARN_UNUSED enum ee_status ee_comm_self(struct ee_comm **out);

/* The most ranks that ee_comm_local makes. */
#define EE_COMM_LOCAL_RANKS 4096

/* out[size] = the communicators of `size` ranks that are threads of this process; timeout: seconds,
 * > 0. Each is for a thread of its own, and is destroyed by itself. An error of one rank aborts the
 * job, and a rank whose peer has destroyed its communicator fails instead of waiting for it. */
EE_WARN_UNUSED enum ee_status ee_comm_local(struct ee_comm **out, int size, double timeout);

/* Refuses a communicator of another version of this header, naming both. */
EE_WARN_UNUSED enum ee_status ee_comm_check(const struct ee_comm *comm);

/* *out = a communicator of the ranks that give the same colour, ordered by key, and by rank where
 * keys are equal; NULL for a negative colour. A collective: every rank calls it. Communicators are
 * made at the start, by all ranks in the same order, never when first needed in a step. */
EE_WARN_UNUSED enum ee_status ee_comm_split(struct ee_comm *comm, struct ee_comm **out, int colour,
                                            int key);

/* Posts all messages of a list and returns; the list itself may be reused then. */
EE_WARN_UNUSED enum ee_status ee_comm_start(struct ee_comm *comm, ee_comm_request *request,
                                            const struct ee_message *messages, int count);

/* Returns once every message of the exchange is done. Each request is waited for once. */
EE_WARN_UNUSED enum ee_status ee_comm_wait(struct ee_comm *comm, ee_comm_request request);

/* Start and wait. */
EE_WARN_UNUSED enum ee_status ee_comm_exchange(struct ee_comm *comm,
                                               const struct ee_message *messages, int count);

/* out[count] = the sum or maximum over ranks of in[count], the same bits on every rank; out may be
 * in. */
EE_WARN_UNUSED enum ee_status ee_comm_all_reduce(struct ee_comm *comm, void *out, const void *in,
                                                 int64_t count, enum ee_comm_type type,
                                                 enum ee_comm_reduce reduce,
                                                 struct ee_action action);

/* out[size * bytes] = the `bytes` bytes at `in` of every rank, in rank order; `in` may be this
 * rank's part of out. */
EE_WARN_UNUSED enum ee_status ee_comm_all_gather(struct ee_comm *comm, void *out, const void *in,
                                                 size_t bytes, struct ee_action action);

/* out[count] = this rank's part, from rank * count on, of the sum or maximum over ranks of
 * in[size * count]; out may be that part of in, whose other parts are then undefined. */
EE_WARN_UNUSED enum ee_status
ee_comm_reduce_scatter(struct ee_comm *comm, void *out, const void *in, int64_t count,
                       enum ee_comm_type type, enum ee_comm_reduce reduce, struct ee_action action);

/* data[bytes] of rank `root` to all. */
EE_WARN_UNUSED enum ee_status ee_comm_broadcast(struct ee_comm *comm, void *data, size_t bytes,
                                                int root, struct ee_action action);

/* Returns once every rank has called it. */
EE_WARN_UNUSED enum ee_status ee_comm_barrier(struct ee_comm *comm, struct ee_action action);

/* Makes the calls of all ranks fail with `reason`, also those that wait now: for a rank that cannot
 * go on. Transports of several processes may end the job. */
void ee_comm_abort(struct ee_comm *comm, const char *reason);

/* Frees the communicator; no exchange may be under way unless it failed or was aborted. Those split
 * from it live on. NULL is allowed. */
void ee_comm_destroy(struct ee_comm *comm);

/* Writes "tag 2, forward of microbatch 5" or the part of it that is known, for the errors of
 * transports; a negative tag is left out. Returns `text`. */
char *ee_action_describe(char *text, size_t size, int tag, struct ee_action action);

EE_EXTERN_C_END

#endif
