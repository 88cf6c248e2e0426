/* Rank 0 of a pipeline: starts passes and takes answers. */
#include "infer/pipeline.h"

#include <string.h>

static int32_t final_exit(const struct ee_engine *engine) {
    return engine->weights->exit_count - 1;
}

enum ee_status ee_client_check(const struct ee_engine *engine) {
    const struct ee_pipeline *p = engine->pipeline;
    if (p->broken)
        EE_FAIL(EE_ERR_COMM, "%s", p->reason);
    if (p->wire.comm->rank > 0)
        EE_FAIL(EE_ERR_INVALID, "rank %d of the pipeline serves rank 0, which takes the requests",
                p->wire.comm->rank);
    if (!p->running)
        EE_FAIL(EE_ERR_INVALID, "the pipeline has been stopped; make a new one");
    return EE_OK;
}

/* -- Sequences -- */

/* Tells the servers of sequences that have ended. */
static enum ee_status send_ends(struct ee_pipeline *p) {
    char *body;
    for (int32_t i = 0; i < p->ended_count; i++) {
        const struct ee_frame frame = {.kind = EE_FRAME_END, .slot = p->ended[i]};
        EE_TRY(ee_wire_begin(&p->wire, &frame, &body));
        EE_TRY(ee_wire_send(&p->wire));
    }
    p->ended_count = 0;
    return EE_OK;
}

enum ee_status ee_client_add(struct ee_engine *engine, const struct ee_sequence *s,
                             const struct ee_request *request) {
    struct ee_pipeline *p = engine->pipeline;
    char *body;
    const struct ee_frame frame = {.kind = EE_FRAME_ADD,
                                   .slot = s->slot,
                                   .number = s->id,
                                   .bytes = (int64_t)ee_request_bytes(request)};
    EE_TRY(send_ends(p));
    EE_TRY(ee_wire_begin(&p->wire, &frame, &body));
    ee_request_pack(body, request);
    return ee_wire_send(&p->wire);
}

static void forget(struct ee_sequence *s) {
    if (s->ended && s->flights == 0)
        ee_sequence_destroy(s);
}

void ee_client_end(struct ee_engine *engine, struct ee_sequence *s) {
    struct ee_pipeline *p = engine->pipeline;
    p->ended[p->ended_count++] = s->slot;
    s->ended = true;
    forget(s);
}

/* -- Flights -- */

static struct ee_flight *flight_of(struct ee_pipeline *p, int64_t pass) {
    return &p->flights[pass % p->wire.window];
}

/* Whether anybody waits for what later exits say about a row. */
static bool wanted(const struct ee_flight_row *row, enum ee_row_kind kind) {
    return !row->gone && !row->dropped && !row->s->ended && row->kind == kind;
}

void ee_client_drop(struct ee_engine *engine, const struct ee_sequence *s) {
    struct ee_pipeline *p = engine->pipeline;
    for (int64_t pass = p->oldest; pass < p->pass; pass++) {
        struct ee_flight *f = flight_of(p, pass);
        for (int32_t i = 0; i < f->count; i++)
            if (f->rows[i].s == s && !f->rows[i].told)
                f->rows[i].dropped = true;
    }
}

/* Hands out the token that the step of a sequence has chosen, and follows its row further. */
static void take_token(struct ee_engine *engine, struct ee_flight_row *row) {
    struct ee_sequence *s = row->s;
    int32_t exit = s->step.event.exit, done = s->step.event.done;
    bool later = s->full_depth && exit < final_exit(engine);
    row->told = true;
    s->under_way = false;
    s->awaited += later;
    if (done != EE_NOT_DONE && s->awaited > 0) {
        s->ending = done;
        s->step.event.done = EE_NOT_DONE;
    }
    ee_engine_take(engine, s);
    if (done != EE_NOT_DONE && !s->ending)
        ee_engine_release(engine, s);
}

/* What becomes of a row in the pass when its token was decided at `event`. */
static void follow(const struct ee_engine *engine, struct ee_flight_row *row,
                   const struct ee_event *event) {
    bool full_depth = row->s->full_depth;
    row->kind = full_depth ? EE_ROW_FINAL : EE_ROW_FILL;
    row->gone = event->exit == final_exit(engine) || (event->done != EE_NOT_DONE && !full_depth);
}

/* The final exit's view of a token that left early. */
static void take_view(struct ee_engine *engine, struct ee_sequence *s,
                      const struct ee_answer *answer) {
    struct ee_event event = answer->event;
    event.done = --s->awaited == 0 ? s->ending : EE_NOT_DONE;
    int64_t i = ee_events_add(&engine->events, &event, NULL);
    ee_events_exits(&engine->events, i)[event.exit] = answer->said;
    if (event.done != EE_NOT_DONE)
        ee_engine_release(engine, s);
}

static void take_record(struct ee_engine *engine, int32_t exit, struct ee_flight_row *row,
                        const struct ee_answer *answer) {
    struct ee_sequence *s = row->s;
    bool live = !row->dropped && !s->ended;
    if (answer->outcome == EE_OUTCOME_FULL_DEPTH || answer->outcome == EE_OUTCOME_FAILED)
        row->gone = true;
    if (answer->outcome == EE_OUTCOME_TOKEN)
        follow(engine, row, &answer->event);
    if (!live)
        return;
    if (answer->outcome == EE_OUTCOME_FULL_DEPTH) {
        take_view(engine, s, answer);
        return;
    }
    if (!row->told)
        ee_sequence_said(s, row->position, engine->events.exit_count)[exit] = answer->said;
    if (answer->outcome == EE_OUTCOME_STAYS)
        return;
    s->step.event = answer->event;
    s->step.failed = answer->outcome == EE_OUTCOME_FAILED;
    s->step.decided = s->step.token_row = !s->step.failed;
    if (s->step.decided)
        take_token(engine, row);
}

/* Rows that exit `exit` looks at. */
static int32_t count_looks(const struct ee_engine *engine, const struct ee_flight *f,
                           int32_t exit) {
    int32_t n = 0;
    for (int32_t i = 0; i < f->count; i++)
        n += !f->rows[i].gone && ee_looks(engine, f->rows[i].s, f->rows[i].kind, exit);
    return n;
}

/* Goes on to the next exit that answers; the pass is through after the final one. */
static void advance(struct ee_engine *engine, struct ee_flight *f) {
    struct ee_pipeline *p = engine->pipeline;
    int32_t final = final_exit(engine);
    while (f->exit < final && (p->rank_of[f->exit] == 0 || count_looks(engine, f, f->exit) == 0))
        f->exit++;
    for (int32_t i = 0; f->exit > final && i < f->count; i++) {
        f->rows[i].s->flights--;
        forget(f->rows[i].s);
    }
    while (p->oldest < p->pass && flight_of(p, p->oldest)->exit > final)
        p->oldest++;
}

/* Waits for the next answer to a pass. */
static enum ee_status take_answer(struct ee_engine *engine, struct ee_flight *f) {
    struct ee_pipeline *p = engine->pipeline;
    const struct ee_answer *records;
    int32_t exit = f->exit, n = count_looks(engine, f, exit), at = 0;
    EE_TRY(ee_wire_read_answer(&p->wire, p->rank_of[exit], f->pass, exit, n, &records));
    for (int32_t i = 0; i < f->count; i++) {
        struct ee_flight_row *row = &f->rows[i];
        if (!row->gone && ee_looks(engine, row->s, row->kind, exit))
            take_record(engine, exit, row, &records[at++]);
    }
    f->exit++;
    advance(engine, f);
    return EE_OK;
}

/* The pass whose answer is the next to come, of those that somebody waits for: tokens before the
 * full depth of tokens that are out already. */
static struct ee_flight *next_flight(struct ee_pipeline *p) {
    struct ee_flight *best[2] = {NULL, NULL};
    for (int64_t pass = p->oldest; pass < p->pass; pass++) {
        struct ee_flight *f = flight_of(p, pass);
        bool token = false, view = false;
        for (int32_t i = 0; i < f->count; i++) {
            token = token || wanted(&f->rows[i], EE_ROW_TOKEN);
            view = view || wanted(&f->rows[i], EE_ROW_FINAL);
        }
        if (token &&
            (!best[0] || f->pass + p->rank_of[f->exit] < best[0]->pass + p->rank_of[best[0]->exit]))
            best[0] = f;
        if (view && !best[1])
            best[1] = f;
    }
    return best[0] ? best[0] : best[1];
}

/* -- Passes -- */

/* Whether a sequence has rows that can start. */
static bool starts(const struct ee_sequence *s) {
    return s && !s->under_way && s->ending == EE_NOT_DONE;
}

static bool anything_starts(const struct ee_engine *engine) {
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++)
        if (starts(engine->sequences[slot]))
            return true;
    return false;
}

/* Notes the rows that the pass is to make tokens from. */
static void note_rows(struct ee_engine *engine, struct ee_flight *f) {
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++) {
        struct ee_sequence *s = engine->sequences[slot];
        if (!starts(s))
            continue;
        s->read += s->step.prompt_rows;
        if (!s->step.token_row)
            continue;
        s->under_way = true;
        s->flights++;
        f->rows[f->count++] =
            (struct ee_flight_row){.s = s, .position = (int32_t)s->count - 1, .kind = EE_ROW_TOKEN};
    }
}

/* Takes over what rank 0's own exits decided. */
static void take_own(struct ee_engine *engine, struct ee_flight *f) {
    for (int32_t i = 0; i < f->count; i++) {
        struct ee_flight_row *row = &f->rows[i];
        row->gone = row->s->step.failed;
        if (!row->s->step.decided)
            continue;
        follow(engine, row, &row->s->step.event);
        take_token(engine, row);
    }
}

static enum ee_status start_pass(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    while (p->pass - p->oldest == p->wire.window)
        EE_TRY(take_answer(engine, flight_of(p, p->oldest)));
    struct ee_flight *f = flight_of(p, p->pass);
    *f = (struct ee_flight){.pass = p->pass, .rows = f->rows};
    ee_step_start(engine);
    note_rows(engine, f);
    EE_TRY(ee_rows_embed(&engine->runner));
    EE_TRY(ee_pipeline_run(engine));
    bool nothing = engine->runner.rows.count == 0;
    p->pass++;
    take_own(engine, f);
    if (nothing) /* no other rank knows of it */
        f->exit = engine->weights->exit_count;
    advance(engine, f);
    return EE_OK;
}

static bool any(const struct ee_engine *engine, bool (*test)(const struct ee_sequence *s)) {
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++)
        if (engine->sequences[slot] && test(engine->sequences[slot]))
            return true;
    return false;
}

static bool is_reading(const struct ee_sequence *s) {
    return s->read < s->prompt_count - 1;
}

static bool has_failed(const struct ee_sequence *s) {
    return s->step.failed;
}

enum ee_status ee_client_step(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    if (anything_starts(engine)) {
        EE_TRY(start_pass(engine));
        engine->steps++;
        /* The next piece of a prompt follows at once. */
        if (any(engine, is_reading))
            return send_ends(p);
    }
    struct ee_flight *f;
    while (engine->events.count == 0 && !any(engine, has_failed) && (f = next_flight(p)) != NULL)
        EE_TRY(take_answer(engine, f));
    return send_ends(p);
}

static enum ee_status stop(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    const struct ee_frame frame = {.kind = EE_FRAME_STOP};
    char *body;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++)
        if (engine->sequences[slot])
            ee_engine_release(engine, engine->sequences[slot]);
    EE_TRY(send_ends(p));
    while (p->oldest < p->pass)
        EE_TRY(take_answer(engine, flight_of(p, p->oldest)));
    EE_TRY(ee_wire_begin(&p->wire, &frame, &body));
    EE_TRY(ee_wire_send(&p->wire));
    return ee_wire_flush(&p->wire);
}

enum ee_status ee_engine_stop(struct ee_engine *engine) {
    struct ee_pipeline *p = engine->pipeline;
    if (!p || !p->running || p->broken)
        return EE_OK;
    enum ee_status status = stop(engine);
    p->running = false;
    return status == EE_OK ? EE_OK : ee_pipeline_fail(engine, status);
}
