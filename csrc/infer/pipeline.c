#define _GNU_SOURCE
#include "infer/pipeline.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Messages that one rank may have under way, some left for what it receives. */
#define MESSAGES (EE_COMM_MAX_MESSAGES - 16)

/* -- Creation -- */

/* Passes under way, equal on all ranks: enough that every rank has work while the first waits for
 * the last, few enough that a rank's messages have their places. */
static int32_t find_window(const struct ee_model_layout *layout, int32_t exits) {
    int32_t most = 0;
    for (int32_t r = 0; r < layout->ranks; r++) {
        int32_t held = 0;
        for (int32_t e = 0; e < exits; e++)
            held += layout->stages[r].exit[e];
        most = held > most ? held : most;
    }
    /* Two frames of two messages, and the answers of its exits, for each pass. */
    return (int32_t)ee_max(1, ee_min(2 * layout->ranks, MESSAGES / (4 + most)));
}

static enum ee_status take(void **out, int64_t count, size_t size) {
    return ee_alloc(out, (size_t)count * size, "a pipeline");
}

static enum ee_status allocate(struct ee_pipeline *p, const struct ee_engine *engine,
                               int64_t trace) {
    int64_t sequences = engine->cache->max_sequences, window = p->wire.window;
    void *memory;
    EE_TRY(take(&memory, engine->weights->exit_count, sizeof *p->rank_of));
    p->rank_of = memory;
    EE_TRY(take(&memory, sequences, sizeof *p->told_at));
    p->told_at = memory;
    EE_TRY(take(&memory, sequences, sizeof *p->ended));
    p->ended = memory;
    EE_TRY(take(&memory, window, sizeof *p->flights));
    p->flights = memory;
    EE_TRY(take(&memory, window * sequences, sizeof *p->flight_rows));
    p->flight_rows = memory;
    EE_TRY(take(&memory, trace, sizeof *p->trace));
    p->trace = memory;
    p->trace_capacity = trace;
    for (int64_t i = 0; i < window; i++)
        p->flights[i].rows = p->flight_rows + i * sequences;
    return EE_OK;
}

enum ee_status ee_pipeline_create(struct ee_engine *engine, struct ee_comm *comm, int64_t trace) {
    const struct ee_model_layout *layout = engine->model->layout;
    int32_t exits = engine->weights->exit_count;
    if (trace < 0 || trace > INT32_MAX)
        EE_FAIL(EE_ERR_INVALID, "a trace has 0 to %d entries, got %lld", INT32_MAX,
                (long long)trace);
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_pipeline), "a pipeline"));
    struct ee_pipeline *p = memory;
    enum ee_status status;
    EE_GOTO(status, ee_wire_create(&p->wire, comm, find_window(layout, exits), exits), fail);
    EE_GOTO(status, allocate(p, engine, trace), fail);
    for (int32_t e = 0; e < exits; e++)
        while (!layout->stages[p->rank_of[e]].exit[e])
            p->rank_of[e]++;
    p->running = comm->rank == 0;
    engine->pipeline = p;
    return EE_OK;
fail:
    ee_pipeline_destroy(p);
    return status;
}

/* Frees sequences that have ended and that only passes know, which will not come back. */
static void free_ended(struct ee_pipeline *p) {
    for (int64_t pass = p->oldest; p->flights && pass < p->pass && !p->wire.comm->rank; pass++) {
        const struct ee_flight *f = &p->flights[pass % p->wire.window];
        for (int32_t i = 0; i < f->count && f->exit < p->wire.exits; i++) {
            struct ee_sequence *s = f->rows[i].s;
            if (--s->flights == 0 && s->ended)
                ee_sequence_destroy(s);
        }
    }
}

void ee_pipeline_destroy(struct ee_pipeline *p) {
    if (!p)
        return;
    free_ended(p);
    ee_wire_free(&p->wire);
    ee_free(p->rank_of);
    ee_free(p->told_at);
    ee_free(p->ended);
    ee_free(p->flights);
    ee_free(p->flight_rows);
    ee_free(p->trace);
    ee_free(p);
}

enum ee_status ee_pipeline_fail(struct ee_engine *engine, enum ee_status status) {
    struct ee_pipeline *p = engine->pipeline;
    if (!p->broken) {
        char own[32];
        p->broken = true;
        snprintf(p->reason, sizeof p->reason, "%s", ee_last_error());
        /* Transports say whose reason it is. */
        int prefix = snprintf(own, sizeof own, "rank %d: ", p->wire.comm->rank);
        bool named = strncmp(p->reason, own, (size_t)prefix) == 0;
        ee_comm_abort(p->wire.comm, p->reason + (named ? prefix : 0));
    }
    return ee_fail(status, "%s", p->reason);
}

/* -- Trace -- */

/* The entries of a pass that begins; returns the first of them. */
static int64_t trace_start(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    const struct ee_rows *rows = &engine->runner.rows;
    int64_t first = p->trace_count;
    double now = ee_now();
    for (int64_t i = 0; i < rows->count; i++) {
        int32_t number = engine->sequences[rows->sequence[i]]->id, position = rows->position[i];
        int64_t at = first;
        while (at < p->trace_count && p->trace[at].sequence != number)
            at++;
        if (at == p->trace_capacity)
            continue;
        struct ee_pass_trace *entry = &p->trace[at];
        if (at == p->trace_count) {
            p->trace_count++;
            *entry = (struct ee_pass_trace){.start = now,
                                            .told = NAN,
                                            .sequence = number,
                                            .first_row = position,
                                            .last_row = position + 1,
                                            .first_layer = engine->stage->first_layer,
                                            .last_layer = engine->stage->last_layer,
                                            .exit = -1};
        }
        entry->first_row = (int32_t)ee_min(entry->first_row, position);
        entry->last_row = (int32_t)ee_max(entry->last_row, position + 1);
    }
    return first;
}

static void trace_end(struct ee_engine *engine, int64_t first) {
    struct ee_pipeline *p = engine->pipeline;
    double now = ee_now();
    for (int64_t i = first; i < p->trace_count; i++)
        p->trace[i].end = now;
}

static void trace_told(struct ee_pipeline *p, const struct ee_sequence *s, int32_t exit) {
    for (int64_t i = p->trace_count; i-- > 0;)
        if (p->trace[i].sequence == s->id) {
            p->trace[i].told = ee_now();
            p->trace[i].exit = exit;
            return;
        }
}

const struct ee_pass_trace *ee_engine_trace(const struct ee_engine *engine, int64_t *count) {
    const struct ee_pipeline *p = engine->pipeline;
    *count = p ? p->trace_count : 0;
    return p ? p->trace : NULL;
}

/* -- A pass -- */

/* The final exit's view of a row, just added to the events. */
static int64_t find_view(const struct ee_event_list *events, int32_t number) {
    int64_t i = events->count - 1;
    while (events->event[i].sequence != number || events->event[i].kind != EE_EVENT_FULL_DEPTH)
        i--;
    return i;
}

/* What exit `exit` made of a row that it has looked at. */
static void fill_answer(struct ee_engine *engine, int32_t exit, int64_t row,
                        struct ee_answer *answer) {
    const struct ee_event_list *events = &engine->events;
    const struct ee_rows *rows = &engine->runner.rows;
    struct ee_sequence *s = engine->sequences[rows->sequence[row]];
    bool final = exit == engine->weights->exit_count - 1;
    *answer = (struct ee_answer){.outcome = EE_OUTCOME_STAYS};
    answer->event = s->step.event;
    answer->said = ee_sequence_said(s, rows->position[row], events->exit_count)[exit];
    if (s->step.failed) {
        answer->outcome = EE_OUTCOME_FAILED;
    } else if (final && rows->kind[row] == EE_ROW_FINAL) {
        int64_t i = find_view(events, s->id);
        answer->outcome = EE_OUTCOME_FULL_DEPTH;
        answer->event = events->event[i];
        answer->said = ee_events_exits(events, i)[exit];
    } else if (s->step.decided) {
        answer->outcome = EE_OUTCOME_TOKEN;
    }
}

enum ee_status ee_pipeline_answer(struct ee_engine *engine, int32_t exit, int64_t count) {
    struct ee_pipeline *p = engine->pipeline;
    const struct ee_runner *r = &engine->runner;
    bool final = exit == engine->weights->exit_count - 1;
    if (p->wire.comm->rank > 0 && (count > 0 || final)) {
        struct ee_answer *records;
        EE_TRY(ee_wire_begin_answer(&p->wire, p->pass, exit, (int32_t)count, &records));
        for (int64_t i = 0; i < count; i++)
            fill_answer(engine, exit, r->looked[i], &records[i]);
        EE_TRY(ee_wire_send_answer(&p->wire, p->pass, exit));
    }
    for (int64_t i = 0; i < count && p->trace_capacity > 0; i++) {
        const struct ee_sequence *s = engine->sequences[r->rows.sequence[r->looked[i]]];
        if (s->step.decided && s->step.event.exit == exit)
            trace_told(p, s, exit);
    }
    return EE_OK;
}

/* Sends what is left of the batch to the next rank. */
static enum ee_status send_rows(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    const struct ee_rows *rows = &engine->runner.rows;
    size_t hidden = (size_t)engine->model->config.hidden_size * sizeof(float);
    size_t n = (size_t)rows->count;
    struct ee_wire_row row;
    const struct ee_frame frame = {.kind = EE_FRAME_PASS,
                                   .rows = (int32_t)rows->count,
                                   .pass = p->pass,
                                   .bytes = (int64_t)(n * (sizeof row + hidden))};
    char *body;
    EE_TRY(ee_wire_begin(&p->wire, &frame, &body));
    for (size_t i = 0; i < n; i++) {
        const struct ee_sequence *s = engine->sequences[rows->sequence[i]];
        int32_t position = rows->position[i];
        bool newest = s->step.token_row && position == s->count - 1;
        row = (struct ee_wire_row){rows->sequence[i], position, s->tokens[position],
                                   (int32_t)rows->kind[i], -1};
        if (newest && s->step.decided)
            row.next = ee_sequence_text(s, position + 1, s->step.event.token);
        memcpy(body + i * sizeof row, &row, sizeof row);
    }
    if (n > 0)
        memcpy(body + n * sizeof row, rows->x, n * hidden);
    return ee_wire_send(&p->wire);
}

enum ee_status ee_pipeline_run(struct ee_engine *engine) {
    const struct ee_comm *comm = engine->pipeline->wire.comm;
    int64_t first = trace_start(engine);
    EE_TRY(ee_step_layers(engine));
    trace_end(engine, first);
    bool nothing = comm->rank == 0 && engine->runner.rows.count == 0;
    return nothing || comm->rank == comm->size - 1 ? EE_OK : send_rows(engine);
}
