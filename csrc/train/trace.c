#include "train/trace.h"

#include "base/alloc.h"

enum ee_status ee_trace_create(struct ee_trace **out, int64_t capacity) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_trace), "a trace"));
    struct ee_trace *trace = memory;
    trace->capacity = capacity;
    enum ee_status status =
        ee_alloc(&memory, (size_t)capacity * sizeof(struct ee_trace_event), "a trace");
    if (status != EE_OK) {
        ee_free(trace);
        return status;
    }
    trace->events = memory;
    *out = trace;
    return EE_OK;
}

void ee_trace_destroy(struct ee_trace *trace) {
    if (!trace)
        return;
    ee_free(trace->events);
    ee_free(trace);
}

void ee_trace_add(struct ee_trace *trace, const struct ee_trace_event *event) {
    if (!trace)
        return;
    if (trace->count == trace->capacity)
        trace->lost++;
    else
        trace->events[trace->count++] = *event;
}

void ee_trace_message(void *arg, const struct ee_message *message, double started, double done) {
    struct ee_trace_event event = {.start = started,
                                   .end = done,
                                   .bytes = (int64_t)message->bytes,
                                   .kind = message->direction == EE_SEND ? EE_EVENT_SEND
                                                                         : EE_EVENT_RECEIVE,
                                   .what = -1,
                                   .chunk = -1,
                                   .microbatch = (int32_t)message->action.index,
                                   .peer = message->peer,
                                   .tag = message->tag};
    ee_trace_add(arg, &event);
}
