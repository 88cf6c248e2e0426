#include "infer/step.h"

#include "infer/pipeline.h"

#include <string.h>

/* What becomes of a deferred row that joins a row from above. */
static enum ee_row_kind joined_kind(const struct ee_sequence *s) {
    return s->full_depth || s->kind == EE_ENGINE_SPECULATIVE ? EE_ROW_FINAL : EE_ROW_FILL;
}

static void add_token(struct ee_rows *rows, const struct ee_sequence *s, int64_t position,
                      enum ee_row_kind kind) {
    rows->token[ee_rows_add(rows, s->slot, (int32_t)position, kind)] = s->tokens[position];
}

/* The next `n` rows of a prompt, or of a text that is scored: these have an event each. */
static void start_prompt(struct ee_engine *engine, struct ee_sequence *s, int64_t n) {
    bool score = s->kind == EE_ENGINE_SCORE;
    s->step.prompt_rows = n;
    s->step.first_event = engine->events.count;
    for (int64_t p = s->read; p < s->read + n; p++) {
        add_token(&engine->runner.rows, s, p, score ? EE_ROW_TOKEN : EE_ROW_FILL);
        const struct ee_event event = {.sequence = s->id,
                                       .kind = EE_EVENT_SCORE,
                                       .position = (int32_t)p + 1,
                                       .token = s->tokens[p + (score ? 1 : 0)],
                                       .exit = engine->weights->exit_count - 1};
        if (score)
            (void)ee_events_add(&engine->events, &event, NULL);
    }
}

/* The rows that start at depth 0: what fits of prompts, the newest token of each sequence, and
 * deferred rows where these are fed again. */
void ee_step_start(struct ee_engine *engine) {
    struct ee_rows *rows = &engine->runner.rows;
    rows->count = rows->depth = 0;
    int64_t budget = EE_PROMPT_ROWS;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++) {
        struct ee_sequence *s = engine->sequences[slot];
        if (!s || s->under_way || s->ending)
            continue;
        memset(&s->step, 0, sizeof s->step);
        int64_t n = ee_min(s->prompt_count - 1 - s->read, budget);
        start_prompt(engine, s, n);
        budget -= n;
        s->step.token_row =
            s->kind != EE_ENGINE_SCORE && !s->finishing && s->read + n == s->prompt_count - 1;
        for (int32_t i = 0; s->kind == EE_ENGINE_RECOMPUTE && i < s->deferred; i++)
            add_token(rows, s, ee_sequence_first(s) + i, joined_kind(s));
        if (s->step.token_row) {
            add_token(rows, s, s->count - 1, EE_ROW_TOKEN);
            ee_exits_clear(ee_sequence_said(s, (int32_t)s->count - 1, engine->events.exit_count),
                           engine->events.exit_count);
        }
    }
}

/* Deferred rows that stand at this depth join the row that came from above. */
static void join_deferred(struct ee_engine *engine) {
    struct ee_rows *rows = &engine->runner.rows;
    size_t C = (size_t)engine->model->config.hidden_size;
    for (int32_t slot = 0; slot < engine->cache->max_sequences; slot++) {
        struct ee_sequence *s = engine->sequences[slot];
        if (!s || s->kind == EE_ENGINE_RECOMPUTE || s->step.left || ee_step_ended(s) ||
            !(s->step.token_row || s->finishing))
            continue;
        for (int32_t i = 0; i < s->deferred; i++) {
            if (s->depth[i] != rows->depth)
                continue;
            int64_t row = ee_rows_add(rows, slot, ee_sequence_first(s) + i, joined_kind(s));
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
        int32_t place = rows->position[i] - ee_sequence_first(s);
        bool stays = s->step.left && place >= 0;
        if (stays && s->hidden) {
            memcpy(s->hidden + (int64_t)place * C, rows->x + i * C, (size_t)C * sizeof(float));
            s->depth[place] = rows->depth;
        }
        if (stays || ee_step_ended(s) || (filled && rows->kind[i] == EE_ROW_FILL))
            ee_rows_remove(rows, i, C);
    }
}

enum ee_status ee_step_layers(struct ee_engine *engine) {
    struct ee_runner *r = &engine->runner;
    for (int32_t e = 0; e < engine->weights->exit_count; e++) {
        int64_t looked;
        if (!engine->stage->exit[e])
            continue;
        EE_TRY(ee_rows_run(r, engine->weights->exits[e].depth));
        EE_TRY(ee_head_fill(r, e));
        EE_TRY(ee_decide(engine, e, &looked));
        if (engine->pipeline)
            EE_TRY(ee_pipeline_answer(engine, e, looked));
        leave(engine);
        join_deferred(engine);
    }
    return ee_rows_run(r, 2 * engine->stage->last_layer);
}

enum ee_status ee_step_run(struct ee_engine *engine) {
    ee_step_start(engine);
    EE_TRY(ee_rows_embed(&engine->runner));
    return ee_step_layers(engine);
}
