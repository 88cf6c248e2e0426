#include "infer/wire.h"

#include "base/alloc.h"

#include <string.h>

/* Longer than any program runs. */
#define FOREVER 1e9

static enum ee_status allocate(struct ee_parcel **out, int64_t count) {
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)count * sizeof **out, "the messages of a pipeline"));
    *out = memory;
    return EE_OK;
}

enum ee_status ee_wire_create(struct ee_wire *wire, struct ee_comm *comm, int32_t window,
                              int32_t exits) {
    *wire = (struct ee_wire){.comm = comm, .window = window, .exits = exits};
    EE_TRY(allocate(&wire->frame, 2 * (int64_t)window));
    return allocate(&wire->answers, (int64_t)window * exits);
}

void ee_wire_free(struct ee_wire *wire) {
    for (int64_t i = 0; wire->frame && i < 2 * (int64_t)wire->window; i++)
        ee_free(wire->frame[i].data);
    for (int64_t i = 0; wire->answers && i < (int64_t)wire->window * wire->exits; i++)
        ee_free(wire->answers[i].data);
    ee_free(wire->frame);
    ee_free(wire->answers);
    ee_free(wire->received.data);
    *wire = (struct ee_wire){0};
}

/* Memory for `bytes`, twice that much when it has to grow. What was there is lost. */
static enum ee_status reserve(struct ee_parcel *parcel, size_t bytes) {
    if (bytes <= parcel->capacity)
        return EE_OK;
    void *memory;
    EE_TRY(ee_alloc(&memory, 2 * bytes, "a message of a pipeline"));
    ee_free(parcel->data);
    parcel->data = memory;
    parcel->capacity = 2 * bytes;
    return EE_OK;
}

/* Waits until a parcel is out of this rank's hands. */
static enum ee_status settle(struct ee_wire *wire, struct ee_parcel *parcel) {
    ee_comm_request request = parcel->request;
    parcel->request = 0;
    return ee_comm_wait(wire->comm, request);
}

/* -- Frames -- */

static struct ee_action frame_action(const struct ee_frame *frame) {
    static const char *const names[] = {"a new sequence, slot", "rows of pass", "the end of slot",
                                        "the end of decoding"};
    int64_t index = frame->kind == EE_FRAME_PASS ? frame->pass : frame->slot;
    return (struct ee_action){names[frame->kind], frame->kind == EE_FRAME_STOP ? -1 : index};
}

static struct ee_parcel *next_frame(struct ee_wire *wire) {
    return &wire->frame[wire->frames % (2 * (int64_t)wire->window)];
}

enum ee_status ee_wire_begin(struct ee_wire *wire, const struct ee_frame *frame, char **body) {
    struct ee_parcel *parcel = next_frame(wire);
    EE_TRY(settle(wire, parcel));
    EE_TRY(reserve(parcel, (size_t)frame->bytes));
    parcel->frame = *frame;
    *body = parcel->data;
    return EE_OK;
}

enum ee_status ee_wire_send(struct ee_wire *wire) {
    struct ee_parcel *parcel = next_frame(wire);
    int to = wire->comm->rank + 1;
    if (to == wire->comm->size)
        return EE_OK;
    wire->frames++;
    struct ee_action action = frame_action(&parcel->frame);
    const struct ee_message messages[] = {
        {EE_SEND, to, EE_TAG_HEAD, &parcel->frame, sizeof parcel->frame, action},
        {EE_SEND, to, EE_TAG_BODY, parcel->data, (size_t)parcel->frame.bytes, action},
    };
    return ee_comm_start(wire->comm, &parcel->request, messages, parcel->frame.bytes > 0 ? 2 : 1);
}

enum ee_status ee_wire_forward(struct ee_wire *wire, const struct ee_frame *frame,
                               const char *body) {
    if (wire->comm->rank + 1 == wire->comm->size)
        return EE_OK;
    char *copy;
    EE_TRY(ee_wire_begin(wire, frame, &copy));
    if (frame->bytes > 0)
        memcpy(copy, body, (size_t)frame->bytes);
    return ee_wire_send(wire);
}

enum ee_status ee_wire_receive(struct ee_wire *wire, struct ee_frame *frame, const char **body) {
    struct ee_comm *comm = wire->comm;
    struct ee_parcel *parcel = &wire->received;
    const struct ee_message head = {EE_RECEIVE,     comm->rank - 1,       EE_TAG_HEAD,
                                    &parcel->frame, sizeof parcel->frame, {"a frame", -1}};
    double timeout = comm->timeout;
    comm->timeout = FOREVER;
    enum ee_status status = ee_comm_exchange(comm, &head, 1);
    comm->timeout = timeout;
    EE_TRY(status);
    *frame = parcel->frame;
    if (frame->kind < 0 || frame->kind > EE_FRAME_STOP || frame->bytes < 0)
        EE_FAIL(EE_ERR_INTERNAL, "rank %d: rank %d sent a frame of kind %d with %lld bytes",
                comm->rank, comm->rank - 1, frame->kind, (long long)frame->bytes);
    EE_TRY(reserve(parcel, (size_t)frame->bytes));
    *body = parcel->data;
    const struct ee_message rest = {EE_RECEIVE,   comm->rank - 1,       EE_TAG_BODY,
                                    parcel->data, (size_t)frame->bytes, frame_action(frame)};
    return ee_comm_exchange(comm, &rest, frame->bytes > 0);
}

/* -- Answers -- */

static size_t answer_bytes(int32_t count) {
    return sizeof(struct ee_answer_head) + (size_t)count * sizeof(struct ee_answer);
}

static int answer_tag(const struct ee_wire *wire, int64_t pass, int32_t exit) {
    return EE_TAG_ANSWER + (int)(pass % wire->window) * wire->exits + exit;
}

static struct ee_parcel *answer_of(struct ee_wire *wire, int64_t pass, int32_t exit) {
    return &wire->answers[pass % wire->window * wire->exits + exit];
}

enum ee_status ee_wire_begin_answer(struct ee_wire *wire, int64_t pass, int32_t exit, int32_t count,
                                    struct ee_answer **records) {
    struct ee_parcel *parcel = answer_of(wire, pass, exit);
    EE_TRY(settle(wire, parcel));
    EE_TRY(reserve(parcel, answer_bytes(count)));
    const struct ee_answer_head head = {pass, exit, count};
    memcpy(parcel->data, &head, sizeof head);
    *records = (struct ee_answer *)(void *)(parcel->data + sizeof head);
    return EE_OK;
}

enum ee_status ee_wire_send_answer(struct ee_wire *wire, int64_t pass, int32_t exit) {
    struct ee_parcel *parcel = answer_of(wire, pass, exit);
    struct ee_answer_head head;
    memcpy(&head, parcel->data, sizeof head);
    const struct ee_message message = {EE_SEND,
                                       0,
                                       answer_tag(wire, pass, exit),
                                       parcel->data,
                                       answer_bytes(head.count),
                                       {"the answer to pass", pass}};
    return ee_comm_start(wire->comm, &parcel->request, &message, 1);
}

enum ee_status ee_wire_read_answer(struct ee_wire *wire, int32_t from, int64_t pass, int32_t exit,
                                   int32_t count, const struct ee_answer **records) {
    struct ee_parcel *parcel = &wire->received;
    EE_TRY(reserve(parcel, answer_bytes(count)));
    const struct ee_message message = {EE_RECEIVE,
                                       from,
                                       answer_tag(wire, pass, exit),
                                       parcel->data,
                                       answer_bytes(count),
                                       {"the answer to pass", pass}};
    EE_TRY(ee_comm_exchange(wire->comm, &message, 1));
    struct ee_answer_head head;
    memcpy(&head, parcel->data, sizeof head);
    if (head.pass != pass || head.exit != exit || head.count != count)
        EE_FAIL(
            EE_ERR_INTERNAL,
            "rank %d answered pass %lld, exit %d, for %d rows, where pass %lld, exit %d, %d rows "
            "were expected",
            from, (long long)head.pass, head.exit, head.count, (long long)pass, exit, count);
    *records = (const struct ee_answer *)(const void *)(parcel->data + sizeof head);
    return EE_OK;
}

enum ee_status ee_wire_flush(struct ee_wire *wire) {
    for (int64_t i = 0; i < 2 * (int64_t)wire->window; i++)
        EE_TRY(settle(wire, &wire->frame[i]));
    for (int64_t i = 0; i < (int64_t)wire->window * wire->exits; i++)
        EE_TRY(settle(wire, &wire->answers[i]));
    return EE_OK;
}

/* -- Requests -- */

/* The arrays of a request, in the order in which they follow it. */
#define ARRAYS 6
struct array {
    const void **data;
    int64_t count;
    size_t size;
};

static void list_arrays(struct ee_request *request, struct array arrays[ARRAYS]) {
    const struct array all[ARRAYS] = {
        {(const void **)&request->tokens, request->token_count, sizeof(int32_t)},
        {(const void **)&request->thresholds, request->threshold_count, sizeof(float)},
        {(const void **)&request->stop_tokens, request->stop_count, sizeof(int32_t)},
        {(const void **)&request->forced, request->forced_count, sizeof(int32_t)},
        {(const void **)&request->replay, request->replay_count, sizeof(int32_t)},
        {(const void **)&request->sampling.bias, request->sampling.bias_count,
         sizeof(struct ee_logit_bias)},
    };
    memcpy(arrays, all, sizeof all);
}

size_t ee_request_bytes(const struct ee_request *request) {
    struct ee_request copy = *request;
    struct array arrays[ARRAYS];
    list_arrays(&copy, arrays);
    size_t bytes = sizeof *request;
    for (int i = 0; i < ARRAYS; i++)
        bytes += (size_t)arrays[i].count * arrays[i].size;
    return bytes;
}

void ee_request_pack(char *bytes, const struct ee_request *request) {
    struct ee_request copy = *request;
    struct array arrays[ARRAYS];
    list_arrays(&copy, arrays);
    char *at = bytes + sizeof copy;
    for (int i = 0; i < ARRAYS; i++) {
        size_t size = (size_t)arrays[i].count * arrays[i].size;
        if (size > 0)
            memcpy(at, *arrays[i].data, size);
        *arrays[i].data = NULL;
        at += size;
    }
    memcpy(bytes, &copy, sizeof copy);
}

void ee_request_unpack(struct ee_request *request, const char *bytes) {
    memcpy(request, bytes, sizeof *request);
    struct array arrays[ARRAYS];
    list_arrays(request, arrays);
    const char *at = bytes + sizeof *request;
    for (int i = 0; i < ARRAYS; i++) {
        *arrays[i].data = at;
        at += (size_t)arrays[i].count * arrays[i].size;
    }
}
