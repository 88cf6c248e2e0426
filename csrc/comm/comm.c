/* The public functions: each checks its arguments and calls the transport. */
#include "comm/comm.h"

#include <stdio.h>

size_t ee_comm_type_size(enum ee_comm_type type) {
    static const size_t sizes[] = {
        [EE_COMM_F32] = 4, [EE_COMM_F64] = 8, [EE_COMM_I32] = 4, [EE_COMM_I64] = 8};
    return sizes[type];
}

char *ee_action_describe(char *text, size_t size, int tag, struct ee_action action) {
    char number[32] = "", index[32] = "";
    if (tag >= 0)
        snprintf(number, sizeof number, "tag %d", tag);
    if (action.name && action.index >= 0)
        snprintf(index, sizeof index, " %lld", (long long)action.index);
    snprintf(text, size, "%s%s%s%s", number, tag >= 0 && action.name ? ", " : "",
             action.name ? action.name : "", index);
    return text;
}

enum ee_status ee_comm_check(const struct ee_comm *comm) {
    if (comm->abi != EE_COMM_ABI || comm->struct_size != sizeof *comm)
        EE_FAIL(EE_ERR_UNSUPPORTED,
                "the transport %s has version %d of the communicator (%zu bytes), expected %d (%zu "
                "bytes); build it again",
                comm->transport, comm->abi, comm->struct_size, EE_COMM_ABI, sizeof *comm);
    if (comm->size < 1 || comm->rank < 0 || comm->rank >= comm->size || !(comm->timeout > 0))
        EE_FAIL(EE_ERR_INVALID, "%s: rank %d of %d with a timeout of %g s is no communicator",
                comm->transport, comm->rank, comm->size, comm->timeout);
    return EE_OK;
}

enum ee_status ee_comm_split(struct ee_comm *comm, struct ee_comm **out, int colour, int key) {
    *out = NULL;
    return comm->split(comm, out, colour, key);
}

/* Data may be missing only where there is none. */
static enum ee_status check_data(const struct ee_comm *comm, const void *data, size_t bytes,
                                 const char *what) {
    if (!data && bytes > 0)
        EE_FAIL(EE_ERR_INVALID, "rank %d: %s has no data, %zu bytes expected", comm->rank, what,
                bytes);
    return EE_OK;
}

static enum ee_status check_message(const struct ee_comm *comm, const struct ee_message *message) {
    bool send = message->direction == EE_SEND;
    if (!send && message->direction != EE_RECEIVE)
        EE_FAIL(EE_ERR_INVALID, "rank %d: a message must be sent or received, got direction %d",
                comm->rank, (int)message->direction);
    if (message->peer < 0 || message->peer >= comm->size)
        EE_FAIL(EE_ERR_INVALID, "rank %d: cannot %s rank %d, the communicator has ranks 0 to %d",
                comm->rank, send ? "send to" : "receive from", message->peer, comm->size - 1);
    if (message->tag < 0)
        EE_FAIL(EE_ERR_INVALID, "rank %d: a tag must be >= 0, got %d", comm->rank, message->tag);
    return check_data(comm, message->data, message->bytes, "a message");
}

enum ee_status ee_comm_start(struct ee_comm *comm, ee_comm_request *request,
                             const struct ee_message *messages, int count) {
    *request = 0;
    if (count < 0 || count > EE_COMM_MAX_MESSAGES)
        EE_FAIL(EE_ERR_INVALID, "rank %d: an exchange has 0 to %d messages, got %d", comm->rank,
                EE_COMM_MAX_MESSAGES, count);
    for (int i = 0; i < count; i++)
        EE_TRY(check_message(comm, &messages[i]));
    return count ? comm->start(comm, request, messages, count) : EE_OK;
}

enum ee_status ee_comm_wait(struct ee_comm *comm, ee_comm_request request) {
    return request ? comm->wait(comm, request) : EE_OK;
}

enum ee_status ee_comm_exchange(struct ee_comm *comm, const struct ee_message *messages,
                                int count) {
    ee_comm_request request;
    EE_TRY(ee_comm_start(comm, &request, messages, count));
    return ee_comm_wait(comm, request);
}

/* `out_parts` and `in_parts` blocks of `count` elements of `size` bytes can be addressed and are
 * there. */
static enum ee_status check_blocks(const struct ee_comm *comm, const void *out, int out_parts,
                                   const void *in, int in_parts, int64_t count, size_t size) {
    size_t bytes = 0, total = 0;
    if (count < 0 || !ee_mul_size((size_t)count, size, &bytes) ||
        !ee_mul_size(bytes, (size_t)comm->size, &total) || total > PTRDIFF_MAX)
        EE_FAIL(EE_ERR_INVALID, "rank %d: %lld elements of %zu bytes cannot be communicated",
                comm->rank, (long long)count, size);
    EE_TRY(check_data(comm, out, bytes * (size_t)out_parts, "the output"));
    return check_data(comm, in, bytes * (size_t)in_parts, "the input");
}

static enum ee_status check_reduction(const struct ee_comm *comm, enum ee_comm_type type,
                                      enum ee_comm_reduce reduce) {
    if ((unsigned)type >= EE_COMM_TYPE_COUNT || (unsigned)reduce > EE_COMM_MAX)
        EE_FAIL(EE_ERR_INVALID, "rank %d: unknown type %d or reduction %d", comm->rank, (int)type,
                (int)reduce);
    return EE_OK;
}

enum ee_status ee_comm_all_reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                  enum ee_comm_type type, enum ee_comm_reduce reduce,
                                  struct ee_action action) {
    EE_TRY(check_reduction(comm, type, reduce));
    EE_TRY(check_blocks(comm, out, 1, in, 1, count, ee_comm_type_size(type)));
    return comm->all_reduce(comm, out, in, count, type, reduce, action);
}

enum ee_status ee_comm_all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                  struct ee_action action) {
    EE_TRY(check_blocks(comm, out, comm->size, in, 1, 1, bytes));
    return comm->all_gather(comm, out, in, bytes, action);
}

enum ee_status ee_comm_reduce_scatter(struct ee_comm *comm, void *out, const void *in,
                                      int64_t count, enum ee_comm_type type,
                                      enum ee_comm_reduce reduce, struct ee_action action) {
    EE_TRY(check_reduction(comm, type, reduce));
    EE_TRY(check_blocks(comm, out, 1, in, comm->size, count, ee_comm_type_size(type)));
    return comm->reduce_scatter(comm, out, in, count, type, reduce, action);
}

enum ee_status ee_comm_broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                 struct ee_action action) {
    if (root < 0 || root >= comm->size)
        EE_FAIL(EE_ERR_INVALID,
                "rank %d: the root of a broadcast must lie between 0 and %d, got "
                "%d",
                comm->rank, comm->size - 1, root);
    EE_TRY(check_data(comm, data, bytes, "a broadcast"));
    return comm->broadcast(comm, data, bytes, root, action);
}

enum ee_status ee_comm_barrier(struct ee_comm *comm, struct ee_action action) {
    return comm->barrier(comm, action);
}

void ee_comm_abort(struct ee_comm *comm, const char *reason) {
    comm->abort(comm, reason);
}

void ee_comm_destroy(struct ee_comm *comm) {
    if (comm)
        comm->destroy(comm);
}
