/* Collectives over messages, so that deadlines and errors are those of messages.
 *
 * A sum is taken in rank order, element by element, whichever way the data go: all ranks get the
 * same bits, and so does every other transport that adds in this order. What is more than the
 * scratch holds goes in rounds. */
#include "base/clock.h"
#include "mpi/transport.h"

#include <string.h>

#define SCRATCH_BYTES ((size_t)8 << 20)
/* Up to so many bytes of all ranks together, an all-reduce sends everything to everyone. */
#define SMALL_BYTES ((size_t)64 << 10)
#define TILE_BYTES 4096

struct call {
    struct mpi *mpi;
    enum ee_mpi_call kind;
    struct ee_action action;
    double deadline;
};

static struct call begin(struct ee_comm *comm, enum ee_mpi_call kind, struct ee_action action) {
    struct call call = {ee_mpi_of(comm), kind, action, ee_now() + comm->timeout};
    return call;
}

/* -- Where the parts of the ranks lie -------------------------------------------------------- */

struct span {
    char *data;
    size_t bytes;
};

/* Part j: bytes at base + j * stride; or, where `count` is set, elements count * j / size to
 * count * (j + 1) / size of `width` bytes. */
struct parts {
    char *base;
    size_t stride, bytes;
    int64_t count;
    size_t width;
};

static struct parts equal_parts(void *base, size_t stride, size_t bytes) {
    struct parts parts = {.base = base, .stride = stride, .bytes = bytes};
    return parts;
}

static struct parts divided(void *base, int64_t count, size_t width) {
    struct parts parts = {.base = base, .count = count, .width = width};
    return parts;
}

static struct span part(const struct parts *parts, int j, int size) {
    struct span span = {parts->base + (size_t)j * parts->stride, parts->bytes};
    if (parts->count > 0) {
        int64_t from = parts->count * j / size, to = parts->count * (j + 1) / size;
        span.data = parts->base + (size_t)from * parts->width;
        span.bytes = (size_t)(to - from) * parts->width;
    }
    return span;
}

/* Sends part j of `from` to every other rank j, and receives its part into part j of `to`. */
static enum ee_status exchange(const struct call *call, struct parts from, struct parts to) {
    int size = call->mpi->comm.size, rank = call->mpi->comm.rank;
    for (int first = 1; first < size; first += WINDOW / 2) {
        struct ee_message messages[WINDOW];
        int count = 0;
        for (int k = first; k < size && k < first + WINDOW / 2; k++) {
            int source = (rank + size - k) % size, target = (rank + k) % size;
            struct span in = part(&to, source, size), out = part(&from, target, size);
            messages[count++] =
                (struct ee_message){EE_RECEIVE, source, 0, in.data, in.bytes, call->action};
            messages[count++] =
                (struct ee_message){EE_SEND, target, 0, out.data, out.bytes, call->action};
        }
        EE_TRY(ee_mpi_exchange(call->mpi, messages, count, call->kind, call->deadline));
    }
    return EE_OK;
}

/* -- Reduction ------------------------------------------------------------------------------- */

static enum ee_status reserve(struct mpi *mpi, size_t bytes) {
    if (bytes <= mpi->scratch_bytes)
        return EE_OK;
    const struct ee_host *host = mpi->job->host;
    void *memory;
    EE_TRY(host->alloc(&memory, bytes, "the scratch of a collective"));
    if (mpi->scratch)
        host->free(mpi->scratch);
    mpi->scratch = memory;
    mpi->scratch_bytes = bytes;
    return EE_OK;
}

/* A NaN on any rank is the maximum. */
#define DEFINE_COMBINE(name, type)                                                                 \
    static void name(void *into, const void *with, int64_t count, enum ee_comm_reduce reduce) {    \
        type *a = into;                                                                            \
        const type *b = with;                                                                      \
        for (int64_t i = 0; reduce == EE_COMM_SUM && i < count; i++)                               \
            a[i] += b[i];                                                                          \
        for (int64_t i = 0; reduce == EE_COMM_MAX && i < count; i++)                               \
            a[i] = b[i] > a[i] || b[i] != b[i] ? b[i] : a[i];                                      \
    }

DEFINE_COMBINE(combine_f32, float)
DEFINE_COMBINE(combine_f64, double)
/* Unsigned where it adds, so that an overflow wraps. */
static void combine_i32(void *into, const void *with, int64_t count, enum ee_comm_reduce reduce) {
    int32_t *a = into;
    const int32_t *b = with;
    for (int64_t i = 0; i < count; i++)
        a[i] = reduce == EE_COMM_SUM ? (int32_t)((uint32_t)a[i] + (uint32_t)b[i])
                                     : (b[i] > a[i] ? b[i] : a[i]);
}

static void combine_i64(void *into, const void *with, int64_t count, enum ee_comm_reduce reduce) {
    int64_t *a = into;
    const int64_t *b = with;
    for (int64_t i = 0; i < count; i++)
        a[i] = reduce == EE_COMM_SUM ? (int64_t)((uint64_t)a[i] + (uint64_t)b[i])
                                     : (b[i] > a[i] ? b[i] : a[i]);
}

typedef void combine_fn(void *into, const void *with, int64_t count, enum ee_comm_reduce reduce);

static combine_fn *const combiners[] = {
    [EE_COMM_F32] = combine_f32,
    [EE_COMM_F64] = combine_f64,
    [EE_COMM_I32] = combine_i32,
    [EE_COMM_I64] = combine_i64,
};

static size_t width_of(enum ee_comm_type type) {
    return type == EE_COMM_F64 || type == EE_COMM_I64 ? 8 : 4;
}

struct reduction {
    enum ee_comm_type type;
    enum ee_comm_reduce reduce;
    size_t width;
};

/* out = the parts of all ranks in rank order: this rank's lie at `own`, the others' in the scratch.
 * Tile by tile, since out may be own. */
static void combine(const struct mpi *mpi, struct reduction how, void *out, const void *own,
                    int64_t count) {
    _Alignas(EE_ALIGNMENT) char tile[TILE_BYTES];
    size_t bytes = (size_t)count * how.width;
    for (size_t at = 0; at < bytes; at += TILE_BYTES) {
        size_t here = bytes - at < TILE_BYTES ? bytes - at : TILE_BYTES;
        for (int j = 0; j < mpi->comm.size; j++) {
            const char *from = j == mpi->comm.rank
                                   ? (const char *)own + at
                                   : (const char *)mpi->scratch + (size_t)j * bytes + at;
            if (j == 0)
                memcpy(tile, from, here);
            else
                combiners[how.type](tile, from, (int64_t)(here / how.width), how.reduce);
        }
        memcpy((char *)out + at, tile, here);
    }
}

/* Elements of a part such that the parts of all ranks fit the scratch. */
static int64_t elements_per_round(const struct mpi *mpi, size_t width) {
    return ee_max(1, (int64_t)(SCRATCH_BYTES / width / (size_t)mpi->comm.size));
}

/* One round of an all-reduce: every rank sums a part of the `count` elements, then all gather. */
static enum ee_status reduce_round(const struct call *call, struct reduction how, char *out,
                                   const char *in, int64_t count) {
    struct mpi *mpi = call->mpi;
    int size = mpi->comm.size, rank = mpi->comm.rank;
    struct parts all_in = divided((char *)in, count, how.width);
    struct parts all_out = divided(out, count, how.width);
    struct span own = part(&all_in, rank, size), sum = part(&all_out, rank, size);
    EE_TRY(exchange(call, all_in, equal_parts(mpi->scratch, own.bytes, own.bytes)));
    combine(mpi, how, sum.data, own.data, (int64_t)(own.bytes / how.width));
    return exchange(call, equal_parts(sum.data, 0, sum.bytes), all_out);
}

enum ee_status ee_mpi_all_reduce(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                 enum ee_comm_type type, enum ee_comm_reduce reduce,
                                 struct ee_action action) {
    struct call call = begin(comm, CALL_ALL_REDUCE, action);
    struct mpi *mpi = call.mpi;
    struct reduction how = {type, reduce, width_of(type)};
    size_t bytes = (size_t)count * how.width, all = bytes * (size_t)comm->size;
    if (all <= SMALL_BYTES) {
        EE_TRY(reserve(mpi, all));
        EE_TRY(exchange(&call, equal_parts((char *)in, 0, bytes),
                        equal_parts(mpi->scratch, bytes, bytes)));
        combine(mpi, how, out, in, count);
        return EE_OK;
    }
    int64_t per_part = elements_per_round(mpi, how.width), step = per_part * comm->size;
    /* A part of a round may be longer than another by one element. */
    EE_TRY(reserve(mpi, (size_t)(ee_min(per_part, ee_ceil_div(count, comm->size)) * comm->size) *
                            how.width));
    for (int64_t at = 0; at < count; at += step) {
        size_t place = (size_t)at * how.width;
        EE_TRY(reduce_round(&call, how, (char *)out + place, (const char *)in + place,
                            ee_min(step, count - at)));
    }
    return EE_OK;
}

enum ee_status ee_mpi_reduce_scatter(struct ee_comm *comm, void *out, const void *in, int64_t count,
                                     enum ee_comm_type type, enum ee_comm_reduce reduce,
                                     struct ee_action action) {
    struct call call = begin(comm, CALL_REDUCE_SCATTER, action);
    struct mpi *mpi = call.mpi;
    struct reduction how = {type, reduce, width_of(type)};
    size_t whole = (size_t)count * how.width;
    int64_t step = ee_min(elements_per_round(mpi, how.width), ee_max(count, 1));
    EE_TRY(reserve(mpi, (size_t)step * (size_t)comm->size * how.width));
    int64_t at = 0;
    do { /* once for no elements, so that the ranks meet */
        int64_t here = ee_min(step, count - at);
        size_t bytes = (size_t)here * how.width;
        char *base = (char *)in + (size_t)at * how.width;
        EE_TRY(exchange(&call, equal_parts(base, whole, bytes),
                        equal_parts(mpi->scratch, bytes, bytes)));
        combine(mpi, how, (char *)out + (size_t)at * how.width, base + (size_t)comm->rank * whole,
                here);
        at += step;
    } while (at < count);
    return EE_OK;
}

/* -- Without arithmetic ---------------------------------------------------------------------- */

enum ee_status ee_mpi_all_gather(struct ee_comm *comm, void *out, const void *in, size_t bytes,
                                 struct ee_action action) {
    struct call call = begin(comm, CALL_ALL_GATHER, action);
    char *own = (char *)out + (size_t)comm->rank * bytes;
    if (bytes > 0 && own != in)
        memmove(own, in, bytes);
    return exchange(&call, equal_parts(own, 0, bytes), equal_parts(out, bytes, bytes));
}

/* A binomial tree: rank r, counted from the root, receives from r without its lowest set bit, and
 * sends to r plus every power of two below that bit. */
enum ee_status ee_mpi_broadcast(struct ee_comm *comm, void *data, size_t bytes, int root,
                                struct ee_action action) {
    struct call call = begin(comm, CALL_BROADCAST, action);
    int size = comm->size, rank = (comm->rank - root + size) % size, bit = 1;
    while (bit < size && !(rank & bit))
        bit <<= 1;
    struct ee_message messages[WINDOW];
    if (rank) {
        messages[0] =
            (struct ee_message){EE_RECEIVE, (rank - bit + root) % size, 0, data, bytes, action};
        EE_TRY(ee_mpi_exchange(call.mpi, messages, 1, CALL_BROADCAST, call.deadline));
    }
    int count = 0;
    for (bit >>= 1; bit > 0; bit >>= 1)
        if (rank + bit < size)
            messages[count++] =
                (struct ee_message){EE_SEND, (rank + bit + root) % size, 0, data, bytes, action};
    return ee_mpi_exchange(call.mpi, messages, count, CALL_BROADCAST, call.deadline);
}

/* In round k everyone tells the rank 2^k further on. */
static enum ee_status meet(const struct call *call) {
    struct mpi *mpi = call->mpi;
    int size = mpi->comm.size, rank = mpi->comm.rank;
    for (int step = 1; step < size; step <<= 1) {
        char nothing = 0;
        int source = (rank + size - step) % size, target = (rank + step) % size;
        struct ee_message messages[2] = {
            {EE_RECEIVE, source, 0, &nothing, 0, call->action},
            {EE_SEND, target, 0, &nothing, 0, call->action},
        };
        EE_TRY(ee_mpi_exchange(mpi, messages, 2, call->kind, call->deadline));
    }
    return EE_OK;
}

enum ee_status ee_mpi_barrier(struct ee_comm *comm, struct ee_action action) {
    struct call call = begin(comm, CALL_BARRIER, action);
    return meet(&call);
}

enum ee_status ee_mpi_meet(struct ee_comm *comm) {
    struct ee_action none = {NULL, -1};
    struct call call = begin(comm, CALL_SPLIT, none);
    return meet(&call);
}
