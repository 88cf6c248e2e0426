/* The ranks of a pipeline behind the first. */
#include "infer/pipeline.h"

#include <string.h>

static enum ee_status find(const struct ee_engine *engine, int32_t slot, struct ee_sequence **out) {
    *out = NULL;
    if (slot >= 0 && slot < engine->cache->max_sequences)
        *out = engine->sequences[slot];
    if (!*out)
        EE_FAIL(EE_ERR_INTERNAL, "rank %d knows no sequence at slot %d", engine->model->rank, slot);
    return EE_OK;
}

static enum ee_status add(struct ee_engine *engine, const struct ee_frame *frame,
                          const char *body) {
    struct ee_request request;
    struct ee_sequence *s;
    ee_request_unpack(&request, body);
    EE_TRY(ee_engine_admit(engine, &s, &request, frame->number));
    if (s->slot != frame->slot)
        EE_FAIL(EE_ERR_INTERNAL, "rank %d has slot %d for a sequence that rank 0 has at slot %d",
                engine->model->rank, s->slot, frame->slot);
    return EE_OK;
}

/* What a rank knows of a row's sequence when the row comes. */
static void set_out(struct ee_engine *engine, struct ee_sequence *s,
                    const struct ee_wire_row *row) {
    s->tokens[row->position] = row->token;
    bool newest = row->kind == EE_ROW_TOKEN || row->next >= 0;
    if (!newest)
        return;
    s->count = row->position + 1;
    s->step.token_row = true;
    s->step.decided = row->next >= 0;
    s->step.event = (struct ee_event){.token = row->next, .exit = -1, .done = EE_NOT_DONE};
    ee_exits_clear(ee_sequence_said(s, row->position, engine->events.exit_count),
                   engine->events.exit_count);
}

static enum ee_status load_rows(struct ee_engine *engine, const struct ee_frame *frame,
                                const char *body) {
    struct ee_rows *rows = &engine->runner.rows;
    size_t hidden = (size_t)engine->model->config.hidden_size * sizeof(float);
    struct ee_wire_row row;
    size_t n = (size_t)frame->rows;
    if (frame->rows < 0 || frame->rows > rows->capacity ||
        frame->bytes != (int64_t)(n * (sizeof row + hidden)))
        EE_FAIL(EE_ERR_INTERNAL, "rank %d: a pass of %d rows in %lld bytes has no room here",
                engine->model->rank, frame->rows, (long long)frame->bytes);
    rows->count = 0;
    rows->depth = engine->runner.first_depth;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++)
        if (engine->sequences[slot])
            memset(&engine->sequences[slot]->step, 0, sizeof engine->sequences[slot]->step);
    for (size_t i = 0; i < n; i++) {
        struct ee_sequence *s;
        memcpy(&row, body + i * sizeof row, sizeof row);
        EE_TRY(find(engine, row.slot, &s));
        if (row.position < 0 || row.position >= s->length_limit)
            EE_FAIL(EE_ERR_INTERNAL, "rank %d: a row at position %d of a sequence of %lld",
                    engine->model->rank, row.position, (long long)s->length_limit);
        set_out(engine, s, &row);
        (void)ee_rows_add(rows, row.slot, row.position, (enum ee_row_kind)row.kind);
    }
    if (n > 0)
        memcpy(rows->x, body + n * sizeof row, n * hidden);
    return EE_OK;
}

static enum ee_status handle(struct ee_engine *engine, const struct ee_frame *frame,
                             const char *body) {
    struct ee_pipeline *p = engine->pipeline;
    struct ee_sequence *s;
    if (frame->kind == EE_FRAME_PASS) {
        p->pass = frame->pass;
        engine->events.count = 0;
        engine->steps++;
        EE_TRY(load_rows(engine, frame, body));
        return ee_pipeline_run(engine);
    }
    EE_TRY(ee_wire_forward(&p->wire, frame, body));
    if (frame->kind == EE_FRAME_ADD)
        return add(engine, frame, body);
    if (frame->kind == EE_FRAME_STOP)
        return ee_wire_flush(&p->wire);
    EE_TRY(find(engine, frame->slot, &s));
    ee_engine_release(engine, s);
    return EE_OK;
}

static enum ee_status serve(struct ee_engine *engine) {
    struct ee_frame frame = {.kind = EE_FRAME_PASS};
    while (frame.kind != EE_FRAME_STOP) {
        const char *body;
        EE_TRY(ee_wire_receive(&engine->pipeline->wire, &frame, &body));
        EE_TRY(handle(engine, &frame, body));
    }
    return EE_OK;
}

enum ee_status ee_engine_serve(struct ee_engine *engine) {
    if (!engine->pipeline || engine->pipeline->wire.comm->rank == 0)
        EE_FAIL(EE_ERR_INVALID,
                "the ranks of a pipeline behind the first serve; this is the first");
    if (engine->pipeline->broken)
        EE_FAIL(EE_ERR_COMM, "%s", engine->pipeline->reason);
    int32_t missing = ee_weights_missing(engine->weights);
    if (missing >= 0 && engine->runner.half_layer_seconds <= 0)
        EE_FAIL(EE_ERR_INVALID, "rank %d has no weights for %s yet; load all its parameters first",
                engine->model->rank, engine->model->params->rows[missing].name);
    enum ee_status status = serve(engine);
    return status == EE_OK ? EE_OK : ee_pipeline_fail(engine, status);
}
