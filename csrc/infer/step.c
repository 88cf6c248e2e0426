#include "infer/step.h"

#include <math.h>
#include <string.h>

/* The rows that start at depth 0: what fits of prompts, and the newest token of each sequence. */
static void start_rows(struct ee_engine *engine) {
    struct ee_rows *rows = &engine->runner.rows;
    rows->count = rows->depth = 0;
    int64_t budget = EE_PROMPT_ROWS;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++) {
        struct ee_sequence *s = engine->sequences[slot];
        if (!s)
            continue;
        memset(&s->step, 0, sizeof s->step);
        int64_t n = ee_min(s->prompt_count - 1 - s->read, budget);
        for (int64_t p = s->read; p < s->read + n; p++)
            rows->token[ee_rows_add(rows, slot, (int32_t)p, EE_ROW_FILL)] = s->prompt[p];
        budget -= n;
        s->step.prompt_rows = n;
        s->step.token_row = s->read + n == s->prompt_count - 1;
        if (s->step.token_row)
            rows->token[ee_rows_add(rows, slot, (int32_t)s->count - 1, EE_ROW_TOKEN)] = s->last;
    }
}

/* Position of the oldest deferred row, or of the newest row where none is deferred: rows from there
 * on stay and leave together. */
static int32_t first_deferred(const struct ee_sequence *s) {
    return (int32_t)s->count - 1 - s->deferred;
}

/* Nothing more of this sequence needs to run: it fails, or its last token is chosen. */
static bool ended(const struct ee_sequence *s) {
    return s->step.failed || (s->step.decided && s->step.event.done != EE_NOT_DONE);
}

/* Deferred rows that stand at this depth join the row that came from above. */
static void join_deferred(struct ee_engine *engine) {
    struct ee_rows *rows = &engine->runner.rows;
    size_t C = (size_t)engine->model->config.hidden_size;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++) {
        struct ee_sequence *s = engine->sequences[slot];
        if (!s || !s->step.token_row || s->step.left || ended(s))
            continue;
        for (int32_t i = 0; i < s->deferred; i++) {
            if (s->depth[i] != rows->depth)
                continue;
            int64_t row = ee_rows_add(rows, slot, first_deferred(s) + i, EE_ROW_FILL);
            memcpy(rows->x + (size_t)row * C, s->hidden + (size_t)i * C, C * sizeof(float));
        }
    }
}

/* Rows of sequences that left or ended at this depth leave the batch; those that left are kept.
 * Keeping them changes nothing that a repeated step would not do again. Rows that only fill keys
 * and values leave when all of these are written. */
static void leave(struct ee_engine *engine) {
    struct ee_rows *rows = &engine->runner.rows;
    int32_t C = engine->model->config.hidden_size;
    bool filled = rows->depth >= engine->runner.fill_depth;
    for (int64_t i = rows->count; i-- > 0;) {
        struct ee_sequence *s = engine->sequences[rows->sequence[i]];
        int32_t place = rows->position[i] - first_deferred(s);
        if (ended(s) || (filled && rows->kind[i] == EE_ROW_FILL)) {
            ee_rows_remove(rows, i, C);
        } else if (s->step.left && place >= 0) {
            memcpy(s->hidden + (int64_t)place * C, rows->x + i * C, (size_t)C * sizeof(float));
            s->depth[place] = rows->depth;
            ee_rows_remove(rows, i, C);
        }
    }
}

/* Row `row` of the batch leaves at `exit`, where it stands at place `head`. */
static void decide(struct ee_engine *engine, struct ee_sequence *s, int32_t exit, int64_t row,
                   int64_t head) {
    struct ee_runner *r = &engine->runner;
    int32_t V = engine->model->config.vocab_size;
    const float *logits = r->logits + head * V;
    int32_t token = r->head_token[head];
    if (s->sampling.temperature > 0)
        token = ee_sample(&s->sampling, s->count, logits, V, engine->sample_weights,
                          engine->sample_order);
    s->step.decided = true;
    s->step.event = (struct ee_event){.sequence = s->id,
                                      .token = token,
                                      .exit = exit,
                                      .confidence = r->confidence[head],
                                      .logprob = logits[token] - r->lse[head],
                                      .done = (int32_t)ee_sequence_done(s, token)};
    /* Where all keys and values are written there is nothing to defer; at the cap the row runs on,
     * to fill them. */
    if (r->rows.depth < r->fill_depth && s->deferred < s->max_deferred)
        s->step.left = true;
    else
        r->rows.kind[row] = EE_ROW_FILL;
}

static enum ee_status test_exit(struct ee_engine *engine, int32_t exit) {
    struct ee_runner *r = &engine->runner;
    bool final = exit == engine->weights->exit_count - 1;
    int64_t n = 0;
    for (int64_t i = 0; i < r->rows.count; i++) {
        const struct ee_sequence *s = engine->sequences[r->rows.sequence[i]];
        if (r->rows.kind[i] == EE_ROW_TOKEN && (final || s->thresholds[exit] < 1.0f))
            engine->index[n++] = i;
    }
    EE_TRY(ee_head_run(r, exit, engine->index, n));
    for (int64_t i = 0; i < n; i++) {
        struct ee_sequence *s = engine->sequences[r->head_sequence[i]];
        if (!isfinite(r->confidence[i])) {
            s->step.failed = true;
            s->step.event.exit = exit;
        } else if (final || r->confidence[i] >= s->thresholds[exit]) {
            decide(engine, s, exit, engine->index[i], i);
        }
    }
    return EE_OK;
}

enum ee_status ee_step_run(struct ee_engine *engine) {
    struct ee_runner *r = &engine->runner;
    start_rows(engine);
    EE_TRY(ee_rows_embed(r));
    for (int32_t e = 0; e < engine->weights->exit_count; e++) {
        EE_TRY(ee_rows_run(r, engine->weights->exits[e].depth));
        EE_TRY(ee_head_fill(r, e));
        EE_TRY(test_exit(engine, e));
        leave(engine);
        join_deferred(engine);
    }
    return EE_OK;
}
