/* What a rank did and when: actions and messages of the steps that were recorded. */
#ifndef EE_TRACE_H
#define EE_TRACE_H

#include "comm/comm.h"
#include "train/schedule.h"

EE_EXTERN_C_BEGIN

enum ee_event_kind {
    EE_EVENT_ACTION,  /* an action of the list; `what` is its enum ee_step_kind */
    EE_EVENT_WAIT,    /* the rank has nothing to do until a message has come or gone */
    EE_EVENT_SEND,    /* from its start to the end that the sender saw */
    EE_EVENT_RECEIVE, /* likewise on the other side */
};

struct ee_trace_event {
    double start, end; /* seconds of ee_now() */
    int64_t bytes;     /* of messages */
    int32_t kind, what, chunk, microbatch;
    int32_t peer, tag; /* of messages, else -1 */
};

struct ee_trace {
    struct ee_trace_event *events;
    int64_t count, capacity, lost; /* lost: those that found no room */
};

EE_WARN_UNUSED enum ee_status ee_trace_create(struct ee_trace **out, int64_t capacity);
void ee_trace_destroy(struct ee_trace *trace);

/* NULL is allowed: nothing is recorded. */
void ee_trace_add(struct ee_trace *trace, const struct ee_trace_event *event);

/* As an ee_comm_trace. */
void ee_trace_message(void *trace, const struct ee_message *message, double started, double done);

EE_EXTERN_C_END

#endif
