/* csrc/comm: the communicator of one rank, argument checks, the process grid. */
#include "comm/comm.h"
#include "comm/grid.h"
#include "comm/host.h"
#include "ee_test.h"

static const struct ee_action none = {NULL, -1};

static struct ee_message message(enum ee_direction direction, int tag, void *data, size_t bytes) {
    return (struct ee_message){direction, 0, tag, data, bytes, {"forward of microbatch", tag}};
}

static void test_exchange(void) {
    struct ee_comm *comm;
    EE_EXPECT_OK(ee_comm_self(&comm));
    EE_EXPECT_OK(ee_comm_check(comm));
    EE_EXPECT(comm->rank == 0 && comm->size == 1 && !comm->device && comm->timeout > 0);

    /* Matched by tag, whatever the order of the list. */
    double a = 1, b = 2, got_a = 0, got_b = 0;
    struct ee_message list[] = {
        message(EE_RECEIVE, 7, &got_b, 8), message(EE_SEND, 5, &a, 8),
        message(EE_SEND, 7, &b, 8),        message(EE_RECEIVE, 5, &got_a, 8),
        message(EE_SEND, 9, NULL, 0),      message(EE_RECEIVE, 9, NULL, 0),
    };
    EE_EXPECT_OK(ee_comm_exchange(comm, list, 6));
    EE_EXPECT(got_a == 1 && got_b == 2);
    EE_EXPECT_OK(ee_comm_exchange(comm, NULL, 0));

    /* Across exchanges, with one tag in the order of the starts; the receives wait first. */
    char in[3] = "xy", out[3] = "";
    struct ee_message sends[] = {message(EE_SEND, 1, &in[0], 1), message(EE_SEND, 1, &in[1], 1)};
    struct ee_message receives[] = {message(EE_RECEIVE, 1, &out[0], 1),
                                    message(EE_RECEIVE, 1, &out[1], 1)};
    ee_comm_request first, second, third;
    EE_EXPECT_OK(ee_comm_start(comm, &first, &sends[0], 1));
    EE_EXPECT_OK(ee_comm_start(comm, &second, &sends[1], 1));
    EE_EXPECT_OK(ee_comm_start(comm, &third, receives, 2));
    EE_EXPECT_OK(ee_comm_wait(comm, third));
    EE_EXPECT_OK(ee_comm_wait(comm, first));
    EE_EXPECT_OK(ee_comm_wait(comm, second));
    EE_EXPECT(strcmp(out, "xy") == 0);

    /* No allocation, however long it goes on. */
    uint64_t calls = ee_alloc_stats().calls;
    for (int i = 0; i < 1000; i++) {
        a = i;
        EE_EXPECT_OK(ee_comm_exchange(comm, list, 6));
        EE_EXPECT(got_a == i);
    }
    EE_EXPECT(ee_alloc_stats().calls == calls);
    ee_comm_destroy(comm);
    ee_comm_destroy(NULL);
}

static void test_exchange_errors(void) {
    struct ee_comm *comm;
    EE_EXPECT_OK(ee_comm_self(&comm));
    int64_t word = 0;
    ee_comm_request request;
    struct ee_message bad[] = {message(EE_SEND, 1, &word, 8), message(EE_SEND, -2, &word, 8),
                               message(EE_SEND, 1, NULL, 8),
                               message((enum ee_direction)7, 1, &word, 8)};
    bad[0].peer = 1;
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, &bad[0], 1), EE_ERR_INVALID,
                     "cannot send to rank 1");
    bad[0].direction = EE_RECEIVE;
    bad[0].peer = -1;
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, &bad[0], 1), EE_ERR_INVALID,
                     "receive from rank -1");
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, &bad[1], 1), EE_ERR_INVALID, "got -2");
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, &bad[2], 1), EE_ERR_INVALID, "no data");
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, &bad[3], 1), EE_ERR_INVALID, "direction 7");
    EE_EXPECT_STATUS(ee_comm_start(comm, &request, bad, -1), EE_ERR_INVALID, "got -1");
    EE_EXPECT_STATUS(ee_comm_wait(comm, 42), EE_ERR_INVALID, "no exchange 42");
    EE_EXPECT_OK(ee_comm_wait(comm, 0));

    /* A lone send or receive is found out at once, and named. */
    struct ee_message lone = message(EE_RECEIVE, 3, &word, 8);
    EE_EXPECT_STATUS(ee_comm_exchange(comm, &lone, 1), EE_ERR_COMM,
                     "rank 0: the message from rank 0 has no matching send (tag 3, forward of "
                     "microbatch 3)");
    lone = message(EE_SEND, 4, &word, 8);
    EE_EXPECT_STATUS(ee_comm_exchange(comm, &lone, 1), EE_ERR_COMM, "no matching receive (tag 4");

    struct ee_message pair[] = {message(EE_SEND, 6, &word, 8), message(EE_RECEIVE, 6, &word, 4)};
    EE_EXPECT_STATUS(ee_comm_exchange(comm, pair, 2), EE_ERR_COMM, "8 bytes were sent where 4");
    ee_comm_destroy(comm);

    EE_EXPECT_OK(ee_comm_self(&comm));
    enum ee_status status = EE_OK;
    int started = 0;
    for (; status == EE_OK && started <= EE_COMM_MAX_MESSAGES; started++)
        status = ee_comm_start(comm, &request, &lone, 1);
    EE_EXPECT(status == EE_ERR_COMM && started == EE_COMM_MAX_MESSAGES + 1);
    EE_EXPECT(strstr(ee_last_error(), "under way"));
    ee_comm_destroy(comm);
}

/* Every type and reduction, out of place and in place. */
static void test_collectives(void) {
    struct ee_comm *comm;
    EE_EXPECT_OK(ee_comm_self(&comm));
    for (int type = 0; type < EE_COMM_TYPE_COUNT; type++) {
        size_t bytes = 5 * ee_comm_type_size((enum ee_comm_type)type);
        for (int reduce = EE_COMM_SUM; reduce <= EE_COMM_MAX; reduce++) {
            enum ee_comm_type t = (enum ee_comm_type)type;
            enum ee_comm_reduce r = (enum ee_comm_reduce)reduce;
            int64_t in[5] = {1, -2, 3, -4, 5}, out[5] = {0}, keep[5];
            memcpy(keep, in, sizeof in);
            EE_EXPECT_OK(ee_comm_all_reduce(comm, out, in, 5, t, r, none));
            EE_EXPECT(memcmp(out, in, bytes) == 0 && (bytes == 40 || out[4] == 0));
            memset(out, 0, sizeof out);
            EE_EXPECT_OK(ee_comm_reduce_scatter(comm, out, in, 5, t, r, none));
            EE_EXPECT(memcmp(out, in, bytes) == 0);
            EE_EXPECT_OK(ee_comm_all_reduce(comm, in, in, 5, t, r, none));
            EE_EXPECT_OK(ee_comm_reduce_scatter(comm, in, in, 5, t, r, none));
            EE_EXPECT(memcmp(in, keep, sizeof in) == 0);
        }
    }
    char in[] = "abc", out[] = "xyz";
    EE_EXPECT_OK(ee_comm_all_gather(comm, out, in, 2, none));
    EE_EXPECT(strcmp(out, "abz") == 0);
    EE_EXPECT_OK(ee_comm_all_gather(comm, in, in, 3, none));
    EE_EXPECT_OK(ee_comm_broadcast(comm, in, 3, 0, none));
    EE_EXPECT(strcmp(in, "abc") == 0);
    EE_EXPECT_OK(ee_comm_all_gather(comm, NULL, NULL, 0, none));
    EE_EXPECT_OK(ee_comm_barrier(comm, none));

    EE_EXPECT_STATUS(ee_comm_broadcast(comm, in, 3, 1, none), EE_ERR_INVALID, "root");
    EE_EXPECT_STATUS(ee_comm_broadcast(comm, NULL, 3, 0, none), EE_ERR_INVALID, "no data");
    EE_EXPECT_STATUS(ee_comm_all_gather(comm, out, NULL, 2, none), EE_ERR_INVALID, "the input");
    EE_EXPECT_STATUS(ee_comm_all_gather(comm, NULL, in, 2, none), EE_ERR_INVALID, "the output");
    EE_EXPECT_STATUS(ee_comm_all_reduce(comm, out, in, -1, EE_COMM_F32, EE_COMM_SUM, none),
                     EE_ERR_INVALID, "-1 elements");
    EE_EXPECT_STATUS(ee_comm_all_reduce(comm, out, in, INT64_MAX, EE_COMM_F64, EE_COMM_SUM, none),
                     EE_ERR_INVALID, "cannot be communicated");
    EE_EXPECT_STATUS(ee_comm_all_reduce(comm, out, in, 1, EE_COMM_TYPE_COUNT, EE_COMM_SUM, none),
                     EE_ERR_INVALID, "unknown type");
    EE_EXPECT_STATUS(
        ee_comm_reduce_scatter(comm, out, in, 1, EE_COMM_F32, (enum ee_comm_reduce)9, none),
        EE_ERR_INVALID, "reduction 9");
    ee_comm_destroy(comm);
}

static void test_split_and_abort(void) {
    struct ee_comm *comm, *part, *nothing;
    EE_EXPECT_OK(ee_comm_self(&comm));
    comm->timeout = 5;
    EE_EXPECT_OK(ee_comm_split(comm, &part, 3, -1));
    EE_EXPECT(part != comm && part->size == 1 && part->rank == 0 && part->timeout == 5);
    EE_EXPECT_OK(ee_comm_split(comm, &nothing, -1, 0));
    EE_EXPECT(!nothing);

    /* A message of one communicator does not reach the other. */
    int32_t word = 1;
    struct ee_message send = message(EE_SEND, 1, &word, 4);
    struct ee_message receive = message(EE_RECEIVE, 1, &word, 4);
    ee_comm_request request;
    EE_EXPECT_OK(ee_comm_start(comm, &request, &send, 1));
    EE_EXPECT_STATUS(ee_comm_exchange(part, &receive, 1), EE_ERR_COMM, "no matching send");

    ee_comm_abort(comm, "the loss is not finite");
    ee_comm_abort(comm, "a later reason");
    ee_comm_destroy(comm);
    EE_EXPECT_STATUS(ee_comm_barrier(part, none), EE_ERR_COMM, "the loss is not finite");
    EE_EXPECT_STATUS(ee_comm_broadcast(part, &word, 4, 0, none), EE_ERR_COMM, "aborted");
    EE_EXPECT_STATUS(ee_comm_all_gather(part, &word, &word, 4, none), EE_ERR_COMM, "aborted");
    EE_EXPECT_STATUS(ee_comm_start(part, &request, &send, 1), EE_ERR_COMM, "aborted");
    EE_EXPECT_STATUS(ee_comm_wait(part, 1), EE_ERR_COMM, "aborted");
    EE_EXPECT_STATUS(ee_comm_split(part, &nothing, 0, 0), EE_ERR_COMM, "aborted");
    ee_comm_destroy(part);
}

static void test_check(void) {
    struct ee_comm *comm;
    EE_EXPECT_OK(ee_comm_self(&comm));
    struct ee_comm other = *comm;
    other.abi++;
    char version[64];
    snprintf(version, sizeof version, "the transport self has version %d", EE_COMM_ABI + 1);
    EE_EXPECT_STATUS(ee_comm_check(&other), EE_ERR_UNSUPPORTED, version);
    other = *comm;
    other.struct_size--;
    EE_EXPECT_STATUS(ee_comm_check(&other), EE_ERR_UNSUPPORTED, "build it again");
    other = *comm;
    other.rank = 1;
    EE_EXPECT_STATUS(ee_comm_check(&other), EE_ERR_INVALID, "rank 1 of 1");
    other = *comm;
    other.timeout = 0;
    EE_EXPECT_STATUS(ee_comm_check(&other), EE_ERR_INVALID, "timeout");
    ee_comm_destroy(comm);

    char text[64];
    struct ee_action action = {"backward of microbatch", 12};
    ee_action_describe(text, sizeof text, 3, action);
    EE_EXPECT(strcmp(text, "tag 3, backward of microbatch 12") == 0);
    EE_EXPECT(strcmp(ee_action_describe(text, sizeof text, 3, none), "tag 3") == 0);
    action = (struct ee_action){"gradient norm", -1};
    EE_EXPECT(strcmp(ee_action_describe(text, sizeof text, -1, action), "gradient norm") == 0);
    ee_action_describe(text, 5, 3, action);
    EE_EXPECT(strcmp(text, "tag ") == 0);
}

static void test_host(void) {
    struct ee_host host = *ee_host();
    EE_EXPECT_OK(ee_host_check(&host));
    host.abi += 5;
    EE_EXPECT_STATUS(ee_host_check(&host), EE_ERR_UNSUPPORTED, "version 6 to transports");
    host = *ee_host();
    host.struct_size++;
    EE_EXPECT_STATUS(ee_host_check(&host), EE_ERR_UNSUPPORTED, "build both again");
    EE_EXPECT(strcmp(host.last_error(), ee_last_error()) == 0);
    void *memory;
    EE_EXPECT_OK(host.alloc(&memory, 8, "a test"));
    host.free(memory);
}

static void test_grid_places(void) {
    for (int d = 1; d <= 4; d++) {
        for (int t = 1; t <= 4; t++) {
            for (int p = 1; p <= 4; p++) {
                struct ee_grid_size size = {.data = d, .tensor = t, .pipeline = p};
                EE_EXPECT_OK(ee_grid_check(size, d * t * p));
                EE_EXPECT_STATUS(ee_grid_check(size, d * t * p + 1), EE_ERR_INVALID, "number of");
                for (int i = 0; i < d * p * t; i++) {
                    struct ee_grid_place at = ee_grid_place(size, i);
                    EE_EXPECT(at.tensor == i % t && at.pipeline == i / t % p);
                    EE_EXPECT(at.data == i / (t * p) && ee_grid_rank(size, at) == i);
                }
            }
        }
    }
    struct ee_grid_size size = {.data = 2, .tensor = 1, .pipeline = 3};
    EE_EXPECT_STATUS(ee_grid_check(size, 4), EE_ERR_INVALID,
                     "data = 2 times tensor = 1 times pipeline = 3");
    size.data = 0;
    EE_EXPECT_STATUS(ee_grid_check(size, 4), EE_ERR_INVALID, ">= 1");
    size = (struct ee_grid_size){INT32_MAX, INT32_MAX, INT32_MAX};
    EE_EXPECT_STATUS(ee_grid_check(size, 1), EE_ERR_INVALID, "number of ranks");
}

/* A communicator of four ranks that notes how it is split. */
struct noted {
    struct ee_comm comm;
    struct ee_comm *self;
    int colour[4], key[4], splits;
};

static enum ee_status note_split(struct ee_comm *comm, struct ee_comm **out, int colour, int key) {
    struct noted *noted = (struct noted *)(void *)comm;
    noted->colour[noted->splits] = colour;
    noted->key[noted->splits++] = key;
    return ee_comm_split(noted->self, out, 0, 0);
}

static void test_grid(void) {
    struct ee_comm *self;
    struct ee_grid grid;
    struct ee_grid_size one = {1, 1, 1}, four = {.data = 1, .tensor = 1, .pipeline = 4};
    EE_EXPECT_OK(ee_comm_self(&self));
    EE_EXPECT_OK(ee_grid_create(&grid, self, one));
    EE_EXPECT(grid.data->size == 1 && grid.pipeline->size == 1);
    EE_EXPECT(grid.tensor->size == 1 && grid.place.pipeline == 0);
    ee_grid_destroy(&grid);
    EE_EXPECT_STATUS(ee_grid_create(&grid, self, four), EE_ERR_INVALID, "pipeline = 4");
    EE_EXPECT(!grid.data && !grid.tensor && !grid.pipeline);

    struct noted noted = {.comm = *self, .self = self};
    noted.comm.size = 4;
    noted.comm.rank = 2;
    noted.comm.split = note_split;
    EE_EXPECT_OK(ee_grid_create(&grid, &noted.comm, four));
    EE_EXPECT(grid.place.pipeline == 2 && grid.place.data == 0 && grid.place.tensor == 0);
    EE_EXPECT(noted.splits == 3);
    /* Alone in data and tensor; the pipeline is one group, ordered by stage. */
    EE_EXPECT(noted.colour[0] == 2 && noted.key[0] == 0);
    EE_EXPECT(noted.colour[1] == 2 && noted.key[1] == 0);
    EE_EXPECT(noted.colour[2] == 0 && noted.key[2] == 2);
    ee_grid_destroy(&grid);

    struct ee_grid_size data = {.data = 2, .tensor = 1, .pipeline = 2};
    struct ee_grid_size tensor = {.data = 1, .tensor = 4, .pipeline = 1};
    EE_EXPECT_STATUS(ee_grid_create(&grid, &noted.comm, data), EE_ERR_UNSUPPORTED, "data = 2");
    EE_EXPECT_STATUS(ee_grid_create(&grid, &noted.comm, tensor), EE_ERR_UNSUPPORTED, "tensor = 4");
    EE_EXPECT(noted.splits == 3);
    ee_comm_destroy(self);
}

static enum ee_status make_comm(void) {
    struct ee_comm *comm;
    EE_TRY(ee_comm_self(&comm));
    ee_comm_destroy(comm);
    return EE_OK;
}

static enum ee_status make_grid(void) {
    struct ee_comm *comm;
    struct ee_grid grid;
    EE_TRY(ee_comm_self(&comm));
    enum ee_status status = ee_grid_create(&grid, comm, (struct ee_grid_size){1, 1, 1});
    ee_grid_destroy(&grid);
    ee_comm_destroy(comm);
    return status;
}

static void test_allocations(void) {
    ee_test_allocations("ee_comm_self", make_comm);
    ee_test_allocations("ee_grid_create", make_grid);
}

EE_TEST_MAIN(test_exchange, test_exchange_errors, test_collectives, test_split_and_abort,
             test_check, test_host, test_grid_places, test_grid, test_allocations)
