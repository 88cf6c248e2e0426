/* The transport of ranks that are threads: messages against what was sent, collectives against sums
 * in rank order, splits, deadlines, aborts, misuse, failed allocations. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "comm/comm.h"
#include "ee_test.h"

#include <math.h>
#include <pthread.h>

#define RANKS 4
#define PATIENCE 60.0 /* seconds of waits that must not be the ones to end */

static const struct ee_action none = {NULL, -1};

static uint32_t draw(uint32_t *state, uint32_t below) {
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) % below;
}

/* -- Ranks ------------------------------------------------------------------------------------ */

struct rank {
    struct ee_comm *comm;
    void (*body)(struct rank *rank);
    uint32_t seed;
    int found; /* what a body counts */
    enum ee_status status;
    char text[512]; /* of the error */
    double seconds;
    pthread_t thread;
};

static void *run_rank(void *arg) {
    struct rank *rank = arg;
    rank->body(rank);
    return NULL;
}

/* Keeps how a call of a rank ended. */
static void note(struct rank *rank, enum ee_status status) {
    rank->status = status;
    snprintf(rank->text, sizeof rank->text, "%s", status == EE_OK ? "" : ee_last_error());
}

/* Runs `body` on every rank, and waits for all. */
static void run_all(struct rank *ranks, int size, void (*body)(struct rank *rank), uint32_t seed) {
    for (int i = 0; i < size; i++) {
        ranks[i].body = body;
        ranks[i].seed = seed;
        EE_EXPECT(pthread_create(&ranks[i].thread, NULL, run_rank, &ranks[i]) == 0);
    }
    for (int i = 0; i < size; i++)
        pthread_join(ranks[i].thread, NULL);
}

static void make_ranks(struct rank *ranks, int size, double timeout) {
    struct ee_comm *comms[RANKS];
    EE_EXPECT_OK(ee_comm_local(comms, size, timeout));
    for (int i = 0; i < size; i++) {
        ranks[i] = (struct rank){.comm = comms[i]};
        EE_EXPECT_OK(ee_comm_check(comms[i]));
        EE_EXPECT(comms[i]->rank == i && comms[i]->size == size && comms[i]->timeout == timeout);
    }
}

static void destroy_ranks(struct rank *ranks, int size) {
    for (int i = 0; i < size; i++)
        ee_comm_destroy(ranks[i].comm);
}

/* Makes a job, runs it once and destroys it; the results stay in ranks. */
static void run_job(struct rank *ranks, int size, double timeout, void (*body)(struct rank *rank)) {
    make_ranks(ranks, size, timeout);
    run_all(ranks, size, body, 1);
    destroy_ranks(ranks, size);
}

/* -- Messages --------------------------------------------------------------------------------- */

#define PLANNED 60
static const size_t lengths[] = {0, 1, 7, 100, 4000, 20000, 70001};
#define LENGTHS ((uint32_t)(sizeof lengths / sizeof lengths[0]))

struct planned {
    int source, destination, tag;
    size_t bytes;
};

/* The same on every rank. */
static void make_plan(struct planned *plan, int size, uint32_t seed) {
    for (int i = 0; i < PLANNED; i++)
        plan[i] =
            (struct planned){(int)draw(&seed, (uint32_t)size), (int)draw(&seed, (uint32_t)size),
                             (int)draw(&seed, 3), lengths[draw(&seed, LENGTHS)]};
}

static unsigned char byte_of(uint32_t id, size_t i) {
    return (unsigned char)((id * 2654435761u + (uint32_t)i * 40503u) >> 11);
}

/* Whether the data are those of a message; what any other message with data has is not. */
static bool is_message(const unsigned char *data, size_t bytes, uint32_t id) {
    for (size_t i = 0; i < bytes; i++) {
        if (data[i] != byte_of(id, i))
            return false;
    }
    return true;
}

struct mail {
    int count;
    struct ee_message messages[2 * PLANNED];
    uint32_t id[2 * PLANNED];
};

static bool same_stream(const struct ee_message *a, const struct ee_message *b) {
    return a->direction == b->direction && a->peer == b->peer && a->tag == b->tag;
}

static void swap(struct mail *mail, int i) {
    struct ee_message message = mail->messages[i];
    uint32_t id = mail->id[i];
    mail->messages[i] = mail->messages[i + 1];
    mail->id[i] = mail->id[i + 1];
    mail->messages[i + 1] = message;
    mail->id[i + 1] = id;
}

static void add_mail(struct mail *mail, enum ee_direction direction, int peer, uint32_t id,
                     const struct planned *planned) {
    unsigned char *data = malloc(planned->bytes + 1);
    for (size_t i = 0; i < planned->bytes; i++)
        data[i] = direction == EE_SEND ? byte_of(id, i) : 0;
    mail->messages[mail->count] = (struct ee_message){
        direction, peer, planned->tag, data, planned->bytes, {"message", (int64_t)id}};
    mail->id[mail->count++] = id;
}

/* What a rank sends and receives, in an order of its own that keeps that of every stream. */
static void make_mail(struct mail *mail, int rank, int size, uint32_t seed) {
    struct planned plan[PLANNED];
    make_plan(plan, size, seed);
    mail->count = 0;
    for (uint32_t id = 0; id < PLANNED; id++) {
        if (plan[id].source == rank)
            add_mail(mail, EE_SEND, plan[id].destination, id, &plan[id]);
        if (plan[id].destination == rank)
            add_mail(mail, EE_RECEIVE, plan[id].source, id, &plan[id]);
    }
    seed += (uint32_t)rank;
    for (int i = 0; mail->count > 1 && i < 200; i++) {
        int at = (int)draw(&seed, (uint32_t)mail->count - 1);
        if (!same_stream(&mail->messages[at], &mail->messages[at + 1]))
            swap(mail, at);
    }
}

/* Starts the list in a few pieces and waits for them in another order. */
static enum ee_status exchange_mail(struct ee_comm *comm, const struct mail *mail, uint32_t seed) {
    ee_comm_request requests[4];
    int pieces = 1 + (int)draw(&seed, 4), from = 0;
    for (int i = 0; i < pieces; i++) {
        int to = i + 1 < pieces ? from + (int)draw(&seed, (uint32_t)(mail->count - from) + 1)
                                : mail->count;
        EE_TRY(ee_comm_start(comm, &requests[i], &mail->messages[from], to - from));
        from = to;
    }
    int first = (int)draw(&seed, (uint32_t)pieces);
    for (int i = 0; i < pieces; i++)
        EE_TRY(ee_comm_wait(comm, requests[(first + i) % pieces]));
    return EE_OK;
}

/* Counts in `found` the received messages that are not what was to be sent. */
static void exchange_plan(struct rank *rank) {
    struct mail mail;
    make_mail(&mail, rank->comm->rank, rank->comm->size, rank->seed);
    EE_EXPECT_OK(exchange_mail(rank->comm, &mail, rank->seed + 7u * (uint32_t)rank->comm->rank));
    for (int i = 0; i < mail.count; i++) {
        const struct ee_message *message = &mail.messages[i];
        rank->found += !is_message(message->data, message->bytes, mail.id[i]);
        free(message->data);
    }
}

static void test_random_messages(void) {
    for (int size = 1; size <= RANKS; size++) {
        struct rank ranks[RANKS];
        make_ranks(ranks, size, PATIENCE);
        for (uint32_t seed = 0; seed < 12; seed++)
            run_all(ranks, size, exchange_plan, 1000u * (uint32_t)size + seed);
        for (int i = 0; i < size; i++)
            EE_EXPECT(ranks[i].found == 0);
        destroy_ranks(ranks, size);
    }
}

/* Sends two messages of one stream the wrong way round. */
static void exchange_swapped(struct rank *rank) {
    struct mail mail = {.count = 0};
    int me = rank->comm->rank;
    struct planned planned = {0, 1, 2, 300};
    for (uint32_t id = 0; id < 2; id++)
        add_mail(&mail, me == 0 ? EE_SEND : EE_RECEIVE, 1 - me, id, &planned);
    if (me == 0)
        swap(&mail, 0);
    EE_EXPECT_OK(exchange_mail(rank->comm, &mail, 1));
    for (int i = 0; i < 2; i++) {
        rank->found += !is_message(mail.messages[i].data, 300, mail.id[i]);
        free(mail.messages[i].data);
    }
}

/* Negative control: the oracle sees messages that took each other's place, and one wrong byte. */
static void test_oracle(void) {
    struct rank ranks[2];
    run_job(ranks, 2, PATIENCE, exchange_swapped);
    EE_EXPECT(ranks[1].found == 2);
    unsigned char data[100];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = byte_of(5, i);
    EE_EXPECT(is_message(data, sizeof data, 5));
    data[99] ^= 1;
    EE_EXPECT(!is_message(data, sizeof data, 5));
}

#define STEPS 300

/* Both directions at once, small and large, again and again. */
static void ping(struct rank *rank) {
    static const size_t sizes[] = {8, 40000};
    int peer = 1 - rank->comm->rank;
    unsigned char *out = malloc(40000), *in = malloc(40000);
    for (int i = 0; i < STEPS; i++) {
        size_t bytes = sizes[i % 2];
        memset(out, i + rank->comm->rank, bytes);
        struct ee_message list[] = {{EE_SEND, peer, 1, out, bytes, none},
                                    {EE_RECEIVE, peer, 1, in, bytes, none}};
        EE_EXPECT_OK(ee_comm_exchange(rank->comm, list, 2));
        rank->found += in[0] != (unsigned char)(i + peer) || in[bytes - 1] != in[0];
    }
    free(out);
    free(in);
}

static void test_nothing_is_allocated(void) {
    struct rank ranks[2];
    make_ranks(ranks, 2, PATIENCE);
    uint64_t calls = ee_alloc_stats().calls;
    run_all(ranks, 2, ping, 0);
    EE_EXPECT(ee_alloc_stats().calls == calls);
    EE_EXPECT(ranks[0].found == 0 && ranks[1].found == 0);
    destroy_ranks(ranks, 2);
}

/* -- Collectives ------------------------------------------------------------------------------ */

static const int64_t counts[] = {0, 1, 5, 1023, 30011};

static double value_of(int rank, int64_t i) {
    uint32_t state = (uint32_t)(i * 31 + rank * 7919 + 1);
    return ((double)draw(&state, 20000) - 10000) / 7;
}

static void set_value(void *data, enum ee_comm_type type, int64_t i, double value) {
    if (type == EE_COMM_F32)
        ((float *)data)[i] = (float)value;
    else if (type == EE_COMM_F64)
        ((double *)data)[i] = value;
    else if (type == EE_COMM_I32)
        ((int32_t *)data)[i] = (int32_t)value;
    else
        ((int64_t *)data)[i] = (int64_t)value;
}

static void fill(void *data, enum ee_comm_type type, int rank, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        set_value(data, type, i, value_of(rank, i));
}

/* The reduction of element i, in rank order and in the precision of the type. */
static void expect_value(void *out, enum ee_comm_type type, enum ee_comm_reduce reduce, int size,
                         int64_t i) {
    float f = 0;
    double d = 0;
    int64_t n = 0;
    for (int r = 0; r < size; r++) {
        double value = value_of(r, i);
        bool first = r == 0, sum = reduce == EE_COMM_SUM;
        f = first ? (float)value : sum ? f + (float)value : fmaxf(f, (float)value);
        d = first ? value : sum ? d + value : fmax(d, value);
        n = first ? (int64_t)value : sum ? n + (int64_t)value : ee_max(n, (int64_t)value);
    }
    bool real = type == EE_COMM_F64;
    if (type == EE_COMM_F32)
        *(float *)out = f;
    else
        set_value(out, type, 0, real ? d : (double)n);
}

static void check_reductions(struct ee_comm *comm, enum ee_comm_type type,
                             enum ee_comm_reduce reduce, int64_t count) {
    int64_t width = (int64_t)ee_comm_type_size(type), all = count * comm->size;
    char *in = malloc((size_t)(all * width) + 1), *out = malloc((size_t)(all * width) + 1);
    char *part = malloc((size_t)(count * width) + 1);
    fill(in, type, comm->rank, all);
    EE_EXPECT_OK(ee_comm_all_reduce(comm, out, in, all, type, reduce, none));
    EE_EXPECT_OK(ee_comm_reduce_scatter(comm, part, in, count, type, reduce, none));
    EE_EXPECT(memcmp(part, out + comm->rank * count * width, (size_t)(count * width)) == 0);
    EE_EXPECT_OK(ee_comm_all_reduce(comm, in, in, all, type, reduce, none));
    EE_EXPECT(memcmp(in, out, (size_t)(all * width)) == 0);
    fill(in, type, comm->rank, all);
    char *own = in + comm->rank * count * width;
    EE_EXPECT_OK(ee_comm_reduce_scatter(comm, own, in, count, type, reduce, none));
    EE_EXPECT(memcmp(own, part, (size_t)(count * width)) == 0);
    bool same = true;
    for (int64_t i = 0; i < all; i++) {
        char expected[8];
        expect_value(expected, type, reduce, comm->size, i);
        same &= memcmp(expected, out + i * width, (size_t)width) == 0;
    }
    EE_EXPECT(same);
    free(in);
    free(out);
    free(part);
}

static void check_copies(struct ee_comm *comm, size_t bytes) {
    unsigned char *own = malloc(bytes + 1), *all = malloc(bytes * (size_t)comm->size + 1);
    for (size_t i = 0; i < bytes; i++)
        own[i] = byte_of((uint32_t)comm->rank, i);
    EE_EXPECT_OK(ee_comm_all_gather(comm, all, own, bytes, none));
    for (int pass = 0; pass < 2; pass++) {
        for (int r = 0; r < comm->size; r++)
            EE_EXPECT(is_message(all + (size_t)r * bytes, bytes, (uint32_t)r));
        EE_EXPECT_OK(ee_comm_all_gather(comm, all, all + (size_t)comm->rank * bytes, bytes, none));
    }
    for (int root = 0; root < comm->size; root++) {
        for (size_t i = 0; i < bytes; i++)
            own[i] = comm->rank == root ? byte_of(50u + (uint32_t)root, i) : 0;
        EE_EXPECT_OK(ee_comm_broadcast(comm, own, bytes, root, none));
        EE_EXPECT(is_message(own, bytes, 50u + (uint32_t)root));
    }
    free(own);
    free(all);
}

static void collectives(struct rank *rank) {
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        for (int type = 0; type < EE_COMM_TYPE_COUNT; type++) {
            check_reductions(rank->comm, (enum ee_comm_type)type, EE_COMM_SUM, counts[i]);
            check_reductions(rank->comm, (enum ee_comm_type)type, EE_COMM_MAX, counts[i]);
        }
        check_copies(rank->comm, (size_t)counts[i]);
        EE_EXPECT_OK(ee_comm_barrier(rank->comm, none));
    }
    /* What is not a number is the maximum, wherever it stands. */
    for (int r = 0; r < rank->comm->size; r++) {
        double x = rank->comm->rank == r ? (double)NAN : 1;
        EE_EXPECT_OK(ee_comm_all_reduce(rank->comm, &x, &x, 1, EE_COMM_F64, EE_COMM_MAX, none));
        EE_EXPECT(isnan(x));
    }
    int32_t wraps = INT32_MAX;
    EE_EXPECT_OK(ee_comm_all_reduce(rank->comm, &wraps, &wraps, 1, EE_COMM_I32, EE_COMM_SUM, none));
}

static void test_collectives(void) {
    for (int size = 1; size <= RANKS; size++) {
        struct rank ranks[RANKS];
        make_ranks(ranks, size, PATIENCE);
        uint64_t calls = ee_alloc_stats().calls;
        run_all(ranks, size, collectives, 0);
        EE_EXPECT(ee_alloc_stats().calls == calls);
        destroy_ranks(ranks, size);
    }
}

/* -- Split and trace -------------------------------------------------------------------------- */

struct traced {
    int count;
    struct ee_message messages[4];
    double started[4], done[4];
};

static void record(void *arg, const struct ee_message *message, double started, double done) {
    struct traced *traced = arg;
    traced->messages[traced->count] = *message;
    traced->started[traced->count] = started;
    traced->done[traced->count++] = done;
}

/* Ranks 0 and 2 make a part in which 2 comes first, 1 one of its own, 3 none. */
static void split_ranks(struct rank *rank) {
    struct ee_comm *comm = rank->comm, *part;
    struct traced traced = {.count = 0};
    int me = comm->rank;
    comm->timeout = 50 + me;
    comm->trace = record;
    comm->trace_arg = &traced;
    EE_EXPECT_OK(ee_comm_split(comm, &part, me == 3 ? -1 : me % 2, me == 0 ? 9 : -me));
    EE_EXPECT(!part == (me == 3));
    if (!part)
        return;
    EE_EXPECT(part->size == (me == 1 ? 1 : 2) && part->rank == (me == 0));
    EE_EXPECT(part->timeout == 50 + me && strcmp(part->transport, "local") == 0);
    if (me == 1) {
        ee_comm_destroy(part);
        return;
    }
    /* A message of the whole group does not reach the part, though its tag is the same. */
    int32_t out[2] = {me, 100 + me}, in[2] = {0};
    int peer = 2 - me;
    struct ee_message whole[] = {{EE_SEND, peer, 1, &out[0], 4, none},
                                 {EE_RECEIVE, peer, 1, &in[0], 4, none}};
    struct ee_message parts[] = {{EE_RECEIVE, 1 - part->rank, 1, &in[1], 4, none},
                                 {EE_SEND, 1 - part->rank, 1, &out[1], 4, none}};
    ee_comm_request request;
    double before = ee_now();
    EE_EXPECT_OK(ee_comm_start(comm, &request, whole, 2));
    EE_EXPECT_OK(ee_comm_exchange(part, parts, 2));
    EE_EXPECT_OK(ee_comm_wait(comm, request));
    EE_EXPECT(in[0] == peer && in[1] == 100 + peer);
    EE_EXPECT(traced.count == 4 && traced.messages[0].data == parts[0].data);
    for (int i = 0; i < 4; i++) {
        EE_EXPECT(traced.messages[i].direction == (i == 1 || i == 2 ? EE_SEND : EE_RECEIVE));
        EE_EXPECT(before <= traced.started[i] && traced.started[i] <= traced.done[i]);
        EE_EXPECT(traced.done[i] <= ee_now());
    }
    ee_comm_destroy(part);
    comm->trace = NULL;
}

/* A part outlives what it was split from. */
static void outlive(struct rank *rank) {
    struct ee_comm *part;
    EE_EXPECT_OK(ee_comm_split(rank->comm, &part, 0, -rank->comm->rank));
    ee_comm_destroy(rank->comm);
    rank->comm = part;
    double x = 1;
    EE_EXPECT_OK(ee_comm_all_reduce(part, &x, &x, 1, EE_COMM_F64, EE_COMM_SUM, none));
    EE_EXPECT(x == part->size);
}

static void test_split(void) {
    struct rank ranks[RANKS];
    run_job(ranks, 4, PATIENCE, split_ranks);
    run_job(ranks, 3, PATIENCE, outlive);
}

static void trace_self(void) {
    struct ee_comm *comm, *part;
    struct traced traced = {.count = 0};
    EE_EXPECT_OK(ee_comm_self(&comm));
    comm->trace = record;
    comm->trace_arg = &traced;
    EE_EXPECT_OK(ee_comm_split(comm, &part, 0, 0));
    int32_t out = 3, in = 0;
    struct ee_message list[] = {{EE_RECEIVE, 0, 1, &in, 4, none}, {EE_SEND, 0, 1, &out, 4, none}};
    EE_EXPECT_OK(ee_comm_exchange(part, list, 2));
    EE_EXPECT(traced.count == 2 && traced.messages[0].data == &in && traced.done[1] > 0);
    EE_EXPECT(traced.started[0] <= traced.done[0]);
    ee_comm_destroy(part);
    ee_comm_destroy(comm);
}

/* -- Errors ----------------------------------------------------------------------------------- */

static const double brief = 0.1;

/* Rank 1 waits for what nobody sends; its buffer is gone when the message comes after all. */
static void wait_in_vain(struct rank *rank) {
    struct ee_comm *comm = rank->comm;
    bool receives = comm->rank == 1;
    char *data = malloc(40000);
    memset(data, 0, 40000);
    struct ee_message message = {receives ? EE_RECEIVE : EE_SEND, receives ? 0 : 1, 2, data, 40000,
                                 {"forward of microbatch", 5}};
    if (!receives)
        ee_sleep(3 * brief);
    double start = ee_now();
    note(rank, ee_comm_exchange(comm, &message, 1));
    rank->seconds = ee_now() - start;
    free(data);
}

static void send_in_vain(struct rank *rank) {
    int32_t word = 0;
    struct ee_message message = {EE_SEND, 1, 3, &word, 4, none};
    if (rank->comm->rank == 0)
        note(rank, ee_comm_exchange(rank->comm, &message, 1));
    else
        ee_sleep(2 * brief);
}

static void miss_barrier(struct rank *rank) {
    if (rank->comm->rank == 1)
        note(rank, ee_comm_barrier(rank->comm, (struct ee_action){"gradient norm", -1}));
    else
        ee_sleep(2 * brief);
}

static void test_deadlines(void) {
    struct rank ranks[RANKS];
    run_job(ranks, 2, brief, wait_in_vain);
    EE_EXPECT(ranks[1].status == EE_ERR_COMM);
    EE_EXPECT(strcmp(ranks[1].text, "rank 1: no message from rank 0 within 0.1 s (tag 2, forward "
                                    "of microbatch 5)") == 0);
    EE_EXPECT(ranks[1].seconds >= brief && ranks[1].seconds < 2 * brief + 1);
    EE_EXPECT(ranks[0].status == EE_ERR_COMM);
    EE_EXPECT(strstr(ranks[0].text, "rank 0: the job was aborted: rank 1: no message from rank 0"));
    run_job(ranks, 2, brief, send_in_vain);
    EE_EXPECT(strcmp(ranks[0].text,
                     "rank 0: rank 1 did not receive a message within 0.1 s (tag 3)") == 0);
    run_job(ranks, 4, brief, miss_barrier);
    EE_EXPECT(strcmp(ranks[1].text, "rank 1: ranks 0, 2, 3 did not come to the barrier within 0.1 "
                                    "s (gradient norm)") == 0);
    run_job(ranks, 2, brief, miss_barrier);
    EE_EXPECT(strstr(ranks[1].text, "rank 1: rank 0 did not come to the barrier"));
}

/* Rank 2 stops while the others wait for messages and in a collective. */
static void stop(struct rank *rank) {
    int32_t word;
    struct ee_message message = {EE_RECEIVE, 2, 1, &word, 4, none};
    if (rank->comm->rank == 0)
        note(rank, ee_comm_exchange(rank->comm, &message, 1));
    if (rank->comm->rank == 1)
        note(rank, ee_comm_barrier(rank->comm, none));
    if (rank->comm->rank == 2) {
        ee_sleep(brief);
        ee_comm_abort(rank->comm, "the disk is full");
        ee_comm_abort(rank->comm, NULL);
        note(rank, ee_comm_start(rank->comm, &(ee_comm_request){0}, &message, 1));
    }
}

/* Rank 1 leaves while the others wait for it. */
static void leave(struct rank *rank) {
    int32_t word;
    struct ee_message message = {EE_RECEIVE, 1, 1, &word, 4, none};
    if (rank->comm->rank == 0)
        note(rank, ee_comm_exchange(rank->comm, &message, 1));
    if (rank->comm->rank == 1) {
        ee_sleep(brief);
        ee_comm_destroy(rank->comm);
        rank->comm = NULL;
    }
}

static void leave_collective(struct rank *rank) {
    if (rank->comm->rank == 0)
        note(rank, ee_comm_barrier(rank->comm, none));
    else
        leave(rank);
}

static void test_abort(void) {
    struct rank ranks[RANKS];
    run_job(ranks, 3, PATIENCE, stop);
    for (int i = 0; i < 3; i++) {
        char text[64];
        snprintf(text, sizeof text, "rank %d: the job was aborted: the disk is full", i);
        EE_EXPECT(ranks[i].status == EE_ERR_COMM && strcmp(ranks[i].text, text) == 0);
    }
    run_job(ranks, 2, PATIENCE, leave);
    EE_EXPECT(strcmp(ranks[0].text, "rank 0: rank 1 has left the communicator (tag 1)") == 0);
    run_job(ranks, 2, PATIENCE, leave_collective);
    EE_EXPECT(strstr(ranks[0].text, "rank 0: rank 1 has left the communicator before the barrier"));
}

/* Each kind of disagreement: the odd rank is 1. */
static void disagree(struct rank *rank) {
    bool odd = rank->comm->rank == 1;
    double x[4] = {0}, all[12] = {0};
    struct ee_comm *comm = rank->comm, *part;
    enum ee_comm_type type = odd && rank->seed == 3 ? EE_COMM_I64 : EE_COMM_F64;
    switch (rank->seed) {
    case 0:
        note(rank, odd ? ee_comm_barrier(comm, none) : ee_comm_split(comm, &part, 0, 0));
        break;
    case 1:
        note(rank, ee_comm_broadcast(comm, x, 8, odd, none));
        break;
    case 2:
        note(rank, ee_comm_all_gather(comm, all, x, odd ? 8 : 16, none));
        break;
    case 3:
        note(rank, ee_comm_all_reduce(comm, x, x, 2, type, EE_COMM_SUM, none));
        break;
    case 4:
        note(rank, ee_comm_all_reduce(comm, x, x, 2, type, odd ? EE_COMM_MAX : EE_COMM_SUM, none));
        break;
    default:
        note(rank, ee_comm_reduce_scatter(comm, x, all, odd ? 2 : 1, type, EE_COMM_SUM, none));
        break;
    }
}

static void differ_in_size(struct rank *rank) {
    char data[64] = "";
    int me = rank->comm->rank;
    struct ee_message message = {me ? EE_RECEIVE : EE_SEND, 1 - me, 4, data, me ? 30 : 40, none};
    note(rank, ee_comm_exchange(rank->comm, &message, 1));
}

static void test_disagreements(void) {
    struct rank ranks[RANKS];
    for (uint32_t kind = 0; kind < 6; kind++) {
        make_ranks(ranks, 3, PATIENCE);
        run_all(ranks, 3, disagree, kind);
        destroy_ranks(ranks, 3);
        for (int i = 0; i < 3; i++) {
            EE_EXPECT(ranks[i].status == EE_ERR_COMM);
            EE_EXPECT(strstr(ranks[i].text, "all ranks must call the same"));
        }
    }
    run_job(ranks, 2, PATIENCE, differ_in_size);
    for (int i = 0; i < 2; i++)
        EE_EXPECT(strstr(ranks[i].text, "the message from rank 0 to rank 1 has 40 bytes, expected "
                                        "30 (tag 4)"));
}

/* Random traffic that is cut off at some time: buffers are freed as soon as a call has failed. */
static void exchange_until_aborted(struct rank *rank) {
    for (uint32_t i = 0; i < 1000 && rank->status == EE_OK; i++) {
        struct mail mail;
        make_mail(&mail, rank->comm->rank, rank->comm->size, i);
        note(rank, exchange_mail(rank->comm, &mail, i));
        for (int k = 0; k < mail.count; k++)
            free(mail.messages[k].data);
        if (rank->comm->rank == 3 && i == 3 + rank->seed)
            ee_comm_abort(rank->comm, "enough");
    }
}

static void test_abort_under_way(void) {
    for (uint32_t seed = 0; seed < 6; seed++) {
        struct rank ranks[RANKS];
        make_ranks(ranks, RANKS, PATIENCE);
        run_all(ranks, RANKS, exchange_until_aborted, seed);
        destroy_ranks(ranks, RANKS);
        for (int i = 0; i < RANKS; i++)
            EE_EXPECT(ranks[i].status == EE_ERR_COMM && strstr(ranks[i].text, "enough"));
    }
}

static void test_arguments(void) {
    struct ee_comm *comms[2];
    EE_EXPECT_STATUS(ee_comm_local(comms, 0, 1), EE_ERR_INVALID, "got 0");
    EE_EXPECT_STATUS(ee_comm_local(comms, EE_COMM_LOCAL_RANKS + 1, 1), EE_ERR_INVALID, "4097");
    EE_EXPECT_STATUS(ee_comm_local(comms, 2, 0), EE_ERR_INVALID, "timeout");
    EE_EXPECT_STATUS(ee_comm_local(comms, 2, (double)NAN), EE_ERR_INVALID, "timeout");

    EE_EXPECT_OK(ee_comm_local(comms, 2, 1e300));
    ee_comm_request request = 0;
    int32_t word = 0;
    struct ee_message message = {EE_SEND, 1, 0, &word, 4, none};
    EE_EXPECT_STATUS(ee_comm_wait(comms[0], 7), EE_ERR_INVALID, "no exchange 7");
    for (int i = 0; i < EE_COMM_MAX_MESSAGES; i++)
        EE_EXPECT_OK(ee_comm_start(comms[0], &request, &message, 1));
    EE_EXPECT_STATUS(ee_comm_start(comms[0], &request, &message, 1), EE_ERR_COMM, "under way");
    ee_comm_destroy(comms[0]);
    ee_comm_destroy(comms[1]);
}

/* -- Failed allocations ----------------------------------------------------------------------- */

static enum ee_status make_job(void) {
    struct ee_comm *comms[3];
    EE_TRY(ee_comm_local(comms, 3, 1));
    for (int i = 0; i < 3; i++)
        ee_comm_destroy(comms[i]);
    return EE_OK;
}

static void split_once(struct rank *rank) {
    struct ee_comm *part;
    note(rank, ee_comm_split(rank->comm, &part, rank->comm->rank == 0, 0));
    ee_comm_destroy(part);
}

static struct rank splitting[3];

/* All fail together, and the communicator is still good. */
static enum ee_status split_job(void) {
    run_all(splitting, 3, split_once, 0);
    EE_EXPECT(splitting[0].status == splitting[1].status);
    EE_EXPECT(splitting[0].status == splitting[2].status);
    return splitting[0].status;
}

static void test_allocations(void) {
    ee_test_allocations("ee_comm_local", make_job);
    make_ranks(splitting, 3, PATIENCE);
    ee_test_allocations("ee_comm_split", split_job);
    destroy_ranks(splitting, 3);
}

EE_TEST_MAIN(test_random_messages, test_oracle, test_nothing_is_allocated, test_collectives,
             test_split, trace_self, test_deadlines, test_abort, test_disagreements,
             test_abort_under_way, test_arguments, test_allocations)
