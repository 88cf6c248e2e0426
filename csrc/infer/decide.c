/* What an exit makes of the rows that it looks at. */
#include "infer/step.h"

#include <math.h>
#include <string.h>

/* A row that an exit has run on: its place among the logits, its sequence and position. */
struct view {
    struct ee_engine *engine;
    struct ee_sequence *s;
    int32_t exit, position;
    int64_t row;         /* of the batch */
    const float *logits; /* [V], raw */
    int32_t largest;     /* token */
    float confidence, lse;
};

static bool is_final(const struct ee_engine *engine, int32_t exit) {
    return exit == engine->weights->exit_count - 1;
}

static float logprob(const struct view *v, int32_t token) {
    return v->logits[token] - v->lse;
}

/* -- Which rows -- */

/* New token i is to leave at this exit, whatever the confidence. */
static bool replayed(const struct ee_sequence *s, int64_t *exit) {
    int64_t i = s->count - s->prompt_count;
    if (s->kind == EE_ENGINE_SPECULATIVE || i >= s->replay_count)
        return false;
    *exit = s->replay[i];
    return true;
}

bool ee_looks(const struct ee_engine *engine, const struct ee_sequence *s, enum ee_row_kind kind,
              int32_t exit) {
    if (is_final(engine, exit))
        return kind != EE_ROW_FILL;
    if (kind != EE_ROW_TOKEN)
        return false;
    if (s->kind == EE_ENGINE_SCORE || s->all_confidences)
        return true;
    if (s->kind == EE_ENGINE_SPECULATIVE && !ee_sequence_drafts(s))
        return false;
    int64_t wanted;
    return s->thresholds[exit] < 1.0f || (replayed(s, &wanted) && wanted == exit);
}

/* Rows of a sequence by ascending position, so that drafts are verified in their order. */
static int64_t collect(struct ee_engine *engine, int32_t exit) {
    const struct ee_rows *rows = &engine->runner.rows;
    int32_t *looked = engine->runner.looked;
    int64_t n = 0;
    for (int64_t row = 0; row < rows->count; row++) {
        if (!ee_looks(engine, engine->sequences[rows->sequence[row]], rows->kind[row], exit))
            continue;
        int64_t at = n++;
        for (; at > 0; at--) {
            int32_t other = looked[at - 1];
            bool ordered = rows->sequence[other] != rows->sequence[row]
                               ? rows->sequence[other] < rows->sequence[row]
                               : rows->position[other] < rows->position[row];
            if (ordered)
                break;
            looked[at] = other;
        }
        looked[at] = (int32_t)row;
    }
    return n;
}

/* -- What they become -- */

static struct ee_history history_before(const struct ee_sequence *s, int64_t position) {
    return (struct ee_history){.tokens = s->tokens,
                               .count = position,
                               .prompt_count = s->prompt_count,
                               .banned = s->stop_tokens,
                               .banned_count = position < s->min_count ? s->stop_count : 0};
}

static int32_t choose(const struct view *v, enum ee_random_purpose purpose) {
    struct ee_history history = history_before(v->s, v->position + 1);
    if (ee_sampling_plain(&v->s->sampling, &history))
        return v->largest;
    return ee_sampler_choose(&v->engine->sampler, &v->s->sampling, v->logits, &history, purpose);
}

static struct ee_event token_event(const struct view *v, int32_t token) {
    int32_t text = ee_sequence_text(v->s, v->position + 1, token);
    return (struct ee_event){.sequence = v->s->id,
                             .kind = EE_EVENT_TOKEN,
                             .position = v->position + 1,
                             .token = token,
                             .exit = v->exit,
                             .done = (int32_t)ee_sequence_done(v->s, v->position + 1, text),
                             .confidence = v->confidence,
                             .logprob = logprob(v, token)};
}

/* Adds the event of the newest token; its end is told by the last event of the step. */
static void tell(const struct view *v) {
    struct ee_event event = v->s->step.event;
    event.done = EE_NOT_DONE;
    v->s->step.told = true;
    (void)ee_events_add(&v->engine->events, &event,
                        ee_sequence_said(v->s, v->position, v->engine->events.exit_count));
}

/* The token of the newest row is chosen here. */
static void decide(const struct view *v) {
    struct ee_sequence *s = v->s;
    int32_t token = choose(v, EE_RANDOM_TOKEN);
    ee_sequence_said(s, v->position, v->engine->events.exit_count)[v->exit].logprob =
        logprob(v, token);
    s->step.decided = true;
    s->step.event = token_event(v, token);
    if (is_final(v->engine, v->exit))
        return;
    /* Where all keys and values are written there is nothing to defer; at the cap, and at the end
     * of a text that waits for the final exit, the row runs on. */
    bool last = s->step.event.done != EE_NOT_DONE && s->full_depth;
    const struct ee_runner *r = &v->engine->runner;
    if (r->rows.depth < r->fill_depth && s->deferred < s->max_deferred && !last) {
        s->step.left = true;
        return;
    }
    r->rows.kind[v->row] = s->full_depth ? EE_ROW_FINAL : EE_ROW_FILL;
    if (s->full_depth)
        tell(v); /* before what the final exit has to say about it */
}

/* The newest row leaves a draft behind. */
static void draft(const struct view *v) {
    struct ee_sequence *s = v->s;
    int32_t V = v->engine->model->config.vocab_size;
    int32_t token = choose(v, EE_RANDOM_DRAFT);
    s->exit[s->deferred] = v->exit;
    ee_sequence_said(s, v->position, v->engine->events.exit_count)[v->exit].logprob =
        logprob(v, token);
    if (s->draft_logits)
        memcpy(s->draft_logits + (int64_t)s->deferred * V, v->logits, (size_t)V * sizeof(float));
    s->step.decided = s->step.left = true;
    s->step.event = (struct ee_event){.token = token, .done = EE_NOT_DONE};
}

/* Whether the draft after the row is accepted; *token = what stands there. */
static bool accepts(const struct view *v, int32_t *token) {
    struct ee_sequence *s = v->s;
    int32_t drafted = s->tokens[v->position + 1];
    int64_t i = v->position + 1 - s->prompt_count;
    int64_t place = v->position - ee_sequence_first(s);
    struct ee_history history = history_before(s, v->position + 1);
    if (i < s->replay_count) {
        *token = s->replay[i] ? drafted : choose(v, EE_RANDOM_TOKEN);
        return s->replay[i];
    }
    if (s->draft_logits) {
        const float *draft_logits =
            s->draft_logits + place * (int64_t)v->engine->model->config.vocab_size;
        return ee_sampler_verify(&v->engine->sampler, &s->sampling, v->logits, draft_logits,
                                 drafted, &history, token);
    }
    *token = choose(v, EE_RANDOM_TOKEN);
    return *token == drafted;
}

/* The final exit looks at a row whose next token is a draft, or at the newest row: the first draft
 * that is not accepted, or the end, decides. */
static void verify(const struct view *v) {
    struct ee_sequence *s = v->s;
    struct ee_event_exit *said = ee_sequence_said(s, v->position, v->engine->events.exit_count);
    bool accepted = false;
    int32_t token;
    if (v->position == s->count - 1) {
        token = choose(v, EE_RANDOM_TOKEN);
    } else {
        accepted = accepts(v, &token);
        s->step.drafts++;
        s->step.accepted += accepted;
    }
    said[v->exit].logprob = logprob(v, token);
    struct ee_event event = token_event(v, token);
    if (v->position < s->count - 1) {
        int32_t drafting = s->exit[v->position - ee_sequence_first(s)];
        if (accepted) {
            event.exit = drafting;
            event.confidence = said[drafting].confidence;
        } else {
            said[drafting].logprob = NAN; /* of another token */
        }
    }
    if (accepted && event.done == EE_NOT_DONE) {
        (void)ee_events_add(&v->engine->events, &event, said);
        return;
    }
    s->step.decided = true;
    s->step.event = event;
}

/* The final exit's view of a token that left early. */
static void look_back(const struct view *v) {
    struct ee_sequence *s = v->s;
    int32_t next = v->position + 1;
    int32_t token =
        next < s->count ? s->tokens[next] : ee_sequence_text(s, next, s->step.event.token);
    struct ee_event event = token_event(v, token);
    event.kind = EE_EVENT_FULL_DEPTH;
    event.done = EE_NOT_DONE;
    int64_t i = ee_events_add(&v->engine->events, &event, NULL);
    ee_events_exits(&v->engine->events, i)[v->exit] =
        (struct ee_event_exit){v->confidence, event.logprob, v->largest};
}

static void score(const struct view *v) {
    struct ee_sequence *s = v->s;
    int64_t i = s->step.first_event + v->position - s->read;
    struct ee_event *event = &v->engine->events.event[i];
    ee_events_exits(&v->engine->events, i)[v->exit] =
        (struct ee_event_exit){v->confidence, logprob(v, event->token), v->largest};
    event->confidence = v->confidence;
    event->logprob = logprob(v, event->token);
}

static bool leaves(const struct view *v) {
    const struct ee_sequence *s = v->s;
    int64_t wanted;
    if (s->kind == EE_ENGINE_SPECULATIVE && !ee_sequence_drafts(s))
        return false;
    if (replayed(s, &wanted))
        return v->exit >= wanted;
    return s->thresholds[v->exit] < 1.0f && v->confidence >= s->thresholds[v->exit];
}

static void look(const struct view *v) {
    struct ee_sequence *s = v->s;
    bool final = is_final(v->engine, v->exit), token_row = v->position == s->count - 1;
    bool speculative = s->kind == EE_ENGINE_SPECULATIVE;
    /* Rows behind a draft that was not accepted say nothing. */
    if (s->step.failed || (speculative && s->step.decided))
        return;
    if (!isfinite(v->confidence)) {
        s->step.failed = true;
        s->step.event = (struct ee_event){.exit = v->exit, .position = v->position + 1};
        return;
    }
    if (s->kind == EE_ENGINE_SCORE) {
        score(v);
        return;
    }
    if (!(final && s->full_depth && (s->step.decided || !token_row)))
        ee_sequence_said(s, v->position, v->engine->events.exit_count)[v->exit] =
            (struct ee_event_exit){v->confidence, NAN, v->largest};
    if (final && speculative)
        verify(v);
    else if (final && (s->step.decided || !token_row))
        look_back(v);
    else if (final || (leaves(v) && !speculative))
        decide(v);
    else if (leaves(v))
        draft(v);
}

enum ee_status ee_decide(struct ee_engine *engine, int32_t exit, int64_t *count) {
    struct ee_runner *r = &engine->runner;
    int64_t n = *count = collect(engine, exit);
    int32_t V = engine->model->config.vocab_size;
    for (int64_t first = 0; first < n; first += r->head_capacity) {
        int64_t rows = ee_min(r->head_capacity, n - first);
        EE_TRY(ee_head_run(r, exit, r->looked + first, rows));
        for (int64_t i = 0; i < rows; i++) {
            const struct view v = {.engine = engine,
                                   .s = engine->sequences[r->head_sequence[i]],
                                   .exit = exit,
                                   .position = r->head_position[i],
                                   .row = r->looked[first + i],
                                   .logits = r->logits + i * V,
                                   .largest = r->head_token[i],
                                   .confidence = r->confidence[i],
                                   .lse = r->lse[i]};
            look(&v);
        }
    }
    return EE_OK;
}
