/* For clock_gettime. */
#define _GNU_SOURCE
#include "train/runner.h"

#include "base/alloc.h"
#include "base/arena.h"
#include "base/clock.h"
#include "train/walk.h"

#include <math.h>
#include <signal.h>
#include <string.h>

/* Inputs that may be received ahead of their forwards. */
#define INPUTS 2

/* A gradient: allotted to a backward in the order of the list, or being sent. */
struct gradient {
    float *data;
    ee_comm_request request; /* of its receive, then of its send */
    bool used;
};

/* A forward's output on its way. */
struct sent {
    int32_t chunk, slot;
    ee_comm_request request;
};

/* What an action that was looked at ahead got. */
struct ahead {
    int64_t action;
    int32_t gradient;        /* index of its buffer, -1 for a forward */
    float *input;            /* of a forward that receives */
    ee_comm_request request; /* of its receive */
};

struct ee_runner {
    struct ee_runner_options options;
    struct ee_arena arena;
    int32_t input_count, gradients;
    struct gradient *gradient; /* [gradients] */
    float *inputs[INPUTS];     /* NULL: in use */
    /* Rings, in the order in which they were started. */
    struct sent outputs[EE_WALK_FORWARDS];
    int64_t first_output, last_output;
    int32_t *backwards; /* [gradients] those being sent */
    int64_t first_backward, last_backward;
    struct ahead ahead[INPUTS + 2];
    int64_t first_ahead, last_ahead;
    int64_t runs;
    /* Of the run under way. */
    const struct ee_list *list;
    const struct ee_work *work;
    struct ee_trace *trace;
    int64_t looked_at; /* actions before it have what they need, or are among `ahead` */
};

static enum ee_status lay_out(struct ee_runner *r) {
    void *memory;
    for (int i = 0; i < r->input_count; i++) {
        EE_TRY(ee_arena_take(&r->arena, &memory, r->options.floats, sizeof(float)));
        r->inputs[i] = memory;
    }
    for (int32_t i = 0; i < r->gradients; i++) {
        EE_TRY(ee_arena_take(&r->arena, &memory, r->options.floats, sizeof(float)));
        r->gradient[i].data = memory;
    }
    return EE_OK;
}

/* Nothing is allocated for messages that there are not. */
static void count_buffers(struct ee_runner *r) {
    const struct ee_list *list = r->options.list;
    int32_t sends = 0, receives = 0;
    for (int64_t i = 0; i < list->count; i++) {
        const struct ee_step_action *action = &list->actions[i];
        if (action->kind == EE_STEP_FORWARD) {
            if (action->flags & EE_STEP_RECEIVES)
                r->input_count = INPUTS;
        } else {
            sends |= action->flags & EE_STEP_SENDS;
            receives |= action->flags & EE_STEP_RECEIVES;
        }
    }
    r->gradients = sends ? r->options.buffers + 2 : receives ? 2 : 1;
    r->options.list = NULL;
}

enum ee_status ee_runner_create(struct ee_runner **out, const struct ee_runner_options *options) {
    *out = NULL;
    const char *what = "the buffers of messages";
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_runner), what));
    struct ee_runner *r = memory;
    r->options = *options;
    count_buffers(r);
    ee_arena_init(&r->arena, what);
    enum ee_status status;
    size_t count = (size_t)r->gradients;
    EE_GOTO(status, ee_alloc(&memory, count * sizeof *r->gradient, what), fail);
    r->gradient = memory;
    EE_GOTO(status, ee_alloc(&memory, count * sizeof *r->backwards, what), fail);
    r->backwards = memory;
    EE_GOTO(status, lay_out(r), fail);
    EE_GOTO(status, ee_arena_bind(&r->arena, 0), fail);
    EE_GOTO(status, lay_out(r), fail);
    *out = r;
    return EE_OK;
fail:
    ee_runner_destroy(r);
    return status;
}

void ee_runner_destroy(struct ee_runner *runner) {
    if (!runner)
        return;
    ee_arena_free(&runner->arena);
    ee_free(runner->gradient);
    ee_free(runner->backwards);
    ee_free(runner);
}

void ee_runner_reset(struct ee_runner *r, struct ee_comm *comm) {
    r->options.comm = comm;
    for (; r->first_ahead < r->last_ahead; r->first_ahead++) {
        struct ahead *ahead = &r->ahead[r->first_ahead % (INPUTS + 2)];
        for (int i = 0; ahead->input && i < r->input_count; i++) {
            if (!r->inputs[i]) {
                r->inputs[i] = ahead->input;
                ahead->input = NULL;
            }
        }
    }
    for (int32_t i = 0; i < r->gradients; i++)
        r->gradient[i].used = false;
    r->first_output = r->last_output;
    r->first_backward = r->last_backward;
}

int64_t ee_runner_bytes(const struct ee_runner *runner) {
    return (int64_t)runner->arena.capacity;
}

/* -- Messages -- */

static const char *const names[] = {
    [EE_STEP_FORWARD] = "forward of microbatch",
    [EE_STEP_BACKWARD] = "backward of microbatch",
    [EE_STEP_BACKWARD_INPUT] = "backward_input of microbatch",
    [EE_STEP_BACKWARD_WEIGHT] = "backward_weight of microbatch",
};

/* The message of an action: a send after it, or a receive before it. Its tag tells the chunk that
 * it goes to, its direction, and whether it is of Part 1 of bubble filling, which other messages
 * may overtake. */
static struct ee_message message_of(const struct ee_runner *r, const struct ee_step_action *action,
                                    enum ee_direction direction, float *data) {
    const struct ee_comm *comm = r->options.comm;
    bool forward = action->kind == EE_STEP_FORWARD, send = direction == EE_SEND;
    int32_t chunk = action->chunk * comm->size + comm->rank;
    int32_t to = send ? chunk + (forward ? 1 : -1) : chunk;
    int32_t m = action->microbatch - r->options.microbatches;
    int step = forward == send ? 1 : -1;
    return (struct ee_message){
        .direction = direction,
        .peer = (comm->rank + step + comm->size) % comm->size,
        .tag = 4 * to + (forward ? 0 : 2) + (m >= 0 && m < r->options.fill1),
        .data = data,
        .bytes = (size_t)r->options.floats * sizeof(float),
        .action = {names[action->kind], action->microbatch},
    };
}

static enum ee_status start(struct ee_runner *r, const struct ee_step_action *action,
                            enum ee_direction direction, float *data, ee_comm_request *request) {
    struct ee_message message = message_of(r, action, direction, data);
    return ee_comm_start(r->options.comm, request, &message, 1);
}

/* Waits for a message and records how long. */
static enum ee_status wait(struct ee_runner *r, ee_comm_request *request) {
    ee_comm_request waited = *request;
    *request = 0;
    if (!waited)
        return EE_OK;
    struct ee_trace_event event = {
        .kind = EE_EVENT_WAIT, .what = -1, .chunk = -1, .microbatch = -1, .peer = -1, .tag = -1};
    event.start = r->trace ? ee_now() : 0;
    EE_TRY(ee_comm_wait(r->options.comm, waited));
    if (r->trace) {
        event.end = ee_now();
        ee_trace_add(r->trace, &event);
    }
    return EE_OK;
}

/* -- What is on its way out -- */

static enum ee_status wait_for_backward(struct ee_runner *r) {
    struct gradient *g = &r->gradient[r->backwards[r->first_backward++ % r->gradients]];
    EE_TRY(wait(r, &g->request));
    g->used = false;
    return EE_OK;
}

static enum ee_status wait_for_output(struct ee_runner *r) {
    return wait(r, &r->outputs[r->first_output++ % EE_WALK_FORWARDS].request);
}

/* The output of a slot is about to be written again. */
static enum ee_status wait_for_slot(struct ee_runner *r, int32_t chunk, int32_t slot) {
    for (int64_t i = r->first_output; i < r->last_output; i++) {
        struct sent *sent = &r->outputs[i % EE_WALK_FORWARDS];
        if (sent->chunk == chunk && sent->slot == slot)
            EE_TRY(wait(r, &sent->request));
    }
    while (r->first_output < r->last_output &&
           !r->outputs[r->first_output % EE_WALK_FORWARDS].request)
        r->first_output++;
    return EE_OK;
}

/* Makes room for one more message, as far as ee_walk's limits go. */
static enum ee_status make_room(struct ee_runner *r, const struct ee_step_action *action,
                                int32_t slot) {
    if (action->kind == EE_STEP_FORWARD) {
        EE_TRY(wait_for_slot(r, action->chunk, slot));
        if (r->last_output - r->first_output == EE_WALK_FORWARDS)
            EE_TRY(wait_for_output(r));
    } else if (action->flags & EE_STEP_SENDS) {
        while (r->last_backward - r->first_backward >= r->options.buffers)
            EE_TRY(wait_for_backward(r));
    }
    return EE_OK;
}

static enum ee_status send_result(struct ee_runner *r, const struct ee_step_action *action,
                                  int32_t slot, int32_t gradient) {
    if (action->kind == EE_STEP_FORWARD) {
        struct sent *sent = &r->outputs[r->last_output++ % EE_WALK_FORWARDS];
        *sent = (struct sent){action->chunk, slot, 0};
        float *output = r->work->output(r->work->arg, action->chunk, slot);
        return start(r, action, EE_SEND, output, &sent->request);
    }
    struct gradient *g = &r->gradient[gradient];
    r->backwards[r->last_backward++ % r->gradients] = gradient;
    return start(r, action, EE_SEND, g->data, &g->request);
}

/* -- What comes in -- */

static int32_t free_gradient(const struct ee_runner *r) {
    for (int32_t i = 0; i < r->gradients; i++)
        if (!r->gradient[i].used)
            return i;
    return -1;
}

static int free_input(const struct ee_runner *r) {
    for (int i = 0; i < r->input_count; i++)
        if (r->inputs[i])
            return i;
    return -1;
}

/* Gives the next actions the buffers that they need and posts their receives, in the order of the
 * list, as far as buffers go. */
static enum ee_status look_ahead(struct ee_runner *r) {
    for (; r->looked_at < r->list->count; r->looked_at++) {
        const struct ee_step_action *action = &r->list->actions[r->looked_at];
        bool forward = action->kind == EE_STEP_FORWARD, receives = action->flags & EE_STEP_RECEIVES;
        if (action->kind == EE_STEP_BACKWARD_WEIGHT || (forward && !receives))
            continue;
        if (r->last_ahead - r->first_ahead == INPUTS + 2)
            return EE_OK;
        struct ahead next = {.action = r->looked_at, .gradient = -1};
        float *data;
        if (forward) {
            int input = free_input(r);
            if (input < 0)
                return EE_OK;
            data = next.input = r->inputs[input];
            r->inputs[input] = NULL;
        } else {
            next.gradient = free_gradient(r);
            if (next.gradient < 0)
                return EE_OK;
            r->gradient[next.gradient].used = true;
            data = r->gradient[next.gradient].data;
        }
        if (receives)
            EE_TRY(start(r, action, EE_RECEIVE, data, &next.request));
        r->ahead[r->last_ahead++ % (INPUTS + 2)] = next;
    }
    return EE_OK;
}

/* Puts a received input in the slot's place, whose old buffer takes part in what follows. */
static void exchange_input(struct ee_runner *r, const struct ee_step_action *action, int32_t slot,
                           float *input) {
    float **place = r->work->input(r->work->arg, action->chunk, slot);
    int empty = 0;
    while (r->inputs[empty])
        empty++;
    r->inputs[empty] = *place;
    *place = input;
}

/* Waits for what the action needs; *gradient: its buffer. */
static enum ee_status receive(struct ee_runner *r, int64_t i, int32_t *gradient) {
    const struct ee_step_action *action = &r->list->actions[i];
    *gradient = -1;
    if (r->first_ahead == r->last_ahead || r->ahead[r->first_ahead % (INPUTS + 2)].action != i)
        return EE_OK;
    struct ahead ahead = r->ahead[r->first_ahead++ % (INPUTS + 2)];
    EE_TRY(wait(r, &ahead.request));
    *gradient = ahead.gradient;
    if (ahead.input)
        exchange_input(r, action, r->list->slots[i], ahead.input);
    else if (!(action->flags & EE_STEP_RECEIVES))
        memset(r->gradient[*gradient].data, 0, (size_t)r->options.floats * sizeof(float));
    return EE_OK;
}

/* -- The run -- */

static void inject(struct ee_runner *r, const struct ee_step_action *action, int32_t slot,
                   int32_t gradient) {
    const struct ee_fault *fault = &r->options.fault;
    if (fault->kind == EE_FAULT_KILL)
        raise(SIGKILL);
    if (fault->kind == EE_FAULT_DELAY)
        ee_sleep(fault->seconds);
    if (fault->kind == EE_FAULT_CORRUPT && action->kind == EE_STEP_FORWARD)
        r->work->output(r->work->arg, action->chunk, slot)[0] = NAN;
    if (fault->kind == EE_FAULT_CORRUPT && gradient >= 0)
        r->gradient[gradient].data[0] = NAN;
}

static enum ee_status run_action(struct ee_runner *r, int64_t i) {
    const struct ee_step_action *action = &r->list->actions[i];
    int32_t slot = r->list->slots[i], gradient;
    EE_TRY(make_room(r, action, slot));
    EE_TRY(look_ahead(r));
    EE_TRY(receive(r, i, &gradient));
    EE_TRY(look_ahead(r));
    struct ee_trace_event event = {.kind = EE_EVENT_ACTION,
                                   .what = action->kind,
                                   .chunk = action->chunk,
                                   .microbatch = action->microbatch,
                                   .peer = -1,
                                   .tag = -1};
    event.start = r->trace ? ee_now() : 0;
    float *dx = gradient < 0 ? NULL : r->gradient[gradient].data;
    EE_TRY(r->work->run(r->work->arg, action, slot, r->list->queues[i], dx));
    if (r->trace) {
        event.end = ee_now();
        ee_trace_add(r->trace, &event);
    }
    if (r->options.fault.kind && r->options.fault.run == r->runs && r->options.fault.action == i)
        inject(r, action, slot, gradient);
    if (action->flags & EE_STEP_SENDS)
        return send_result(r, action, slot, gradient);
    if (gradient >= 0)
        r->gradient[gradient].used = false;
    return EE_OK;
}

static enum ee_status run(struct ee_runner *r) {
    for (int64_t i = 0; i < r->list->count; i++)
        EE_TRY(run_action(r, i));
    while (r->first_output < r->last_output)
        EE_TRY(wait_for_output(r));
    while (r->first_backward < r->last_backward)
        EE_TRY(wait_for_backward(r));
    return EE_OK;
}

enum ee_status ee_runner_run(struct ee_runner *runner, const struct ee_list *list,
                             const struct ee_work *work, struct ee_trace *trace) {
    struct ee_comm *comm = runner->options.comm;
    runner->list = list;
    runner->work = work;
    runner->trace = trace;
    runner->looked_at = 0;
    comm->trace = trace ? ee_trace_message : NULL;
    comm->trace_arg = trace;
    enum ee_status status = run(runner);
    comm->trace = NULL;
    runner->runs++;
    return status;
}
