#include "infer/engine.h"

#include "base/alloc.h"
#include "infer/pipeline.h"

#include <string.h>

/* A part of a model has its layers in one piece, and others that it works with. */
static enum ee_status check_part(const struct ee_model *model,
                                 const struct ee_engine_options *options) {
    if (model->layout->chunks > 1)
        EE_FAIL(EE_ERR_UNSUPPORTED,
                "decoding takes one chunk of layers on each rank, the model has %d",
                model->layout->chunks);
    if (model->layout->ranks > 1 && !options->comm)
        EE_FAIL(
            EE_ERR_INVALID,
            "the model is part %d of %d; give the communicator of these ranks, or a whole model",
            model->rank, model->layout->ranks);
    const struct ee_comm *comm = options->comm;
    if (comm && (comm->rank != model->rank || comm->size != model->layout->ranks))
        EE_FAIL(EE_ERR_INVALID,
                "the model is part %d of %d, the communicator is of rank %d of %d; make both for "
                "the same ranks",
                model->rank, model->layout->ranks, comm->rank, comm->size);
    if (!(options->stage_seconds >= 0 && options->stage_seconds < 1e6))
        EE_FAIL(EE_ERR_INVALID, "stage_seconds must lie between 0 and 1e6, got %g",
                options->stage_seconds);
    return EE_OK;
}

static enum ee_status build(struct ee_engine *engine, const struct ee_engine_options *options) {
    const struct ee_config *c = &engine->model->config;
    EE_TRY(check_part(engine->model, options));
    engine->stage = &engine->model->layout->stages[engine->model->rank];
    int64_t length = options->max_length ? options->max_length : c->max_positions;
    if (length < 1 || length > c->max_positions)
        EE_FAIL(EE_ERR_INVALID,
                "max_length must lie between 1 and the model's context of %d, got %lld",
                c->max_positions, (long long)length);
    EE_TRY(ee_weights_create(&engine->weights, engine->model, options->dtype));
    if (!options->empty)
        EE_TRY(ee_weights_fill(engine->weights, engine->model));
    EE_TRY(ee_cache_create(&engine->cache, engine->weights->cache_layers, c->num_kv_heads,
                           c->head_dim, options->max_sequences, length, options->positions));
    engine->runner = ee_runner_init(engine->model, engine->weights, engine->cache);
    engine->runner.half_layer_seconds =
        options->stage_seconds / (2 * (engine->stage->last_layer - engine->stage->first_layer));
    engine->events.exit_count = engine->weights->exit_count;
    EE_TRY(ee_sampler_create(&engine->sampler, c->vocab_size));
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)options->max_sequences * sizeof *engine->sequences,
                    "the decoding engine"));
    engine->sequences = memory;
    if (options->comm && options->stage_seconds > 0)
        options->comm->polling = EE_COMM_POLLING_ALONE;
    if (options->comm && options->comm->size > 1)
        EE_TRY(ee_pipeline_create(engine, options->comm, options->trace));
    return EE_OK;
}

enum ee_status ee_engine_create(struct ee_engine **out, const struct ee_model *model,
                                const struct ee_engine_options *options) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_engine), "the decoding engine"));
    struct ee_engine *engine = memory;
    engine->model = model;
    enum ee_status status = build(engine, options);
    if (status != EE_OK) {
        ee_engine_destroy(engine);
        return status;
    }
    *out = engine;
    return EE_OK;
}

void ee_engine_destroy(struct ee_engine *engine) {
    if (!engine)
        return;
    enum ee_status stopped = ee_engine_stop(engine);
    (void)stopped; /* the job is aborted where it could not be */
    ee_pipeline_destroy(engine->pipeline);
    for (int32_t i = 0; engine->sequences && i < engine->cache->max_sequences; i++)
        ee_sequence_destroy(engine->sequences[i]);
    ee_runner_free(&engine->runner);
    ee_sampler_free(&engine->sampler);
    ee_events_free(&engine->events);
    ee_free(engine->sequences);
    ee_cache_destroy(engine->cache);
    ee_weights_destroy(engine->weights);
    ee_free(engine);
}

enum ee_status ee_engine_load(struct ee_engine *engine, int32_t row,
                              const struct ee_tensor *source) {
    if (engine->active > 0)
        EE_FAIL(EE_ERR_BUSY,
                "weights cannot change while %d sequences are in flight; finish or "
                "remove them first",
                engine->active);
    return ee_weights_load(engine->weights, engine->model, row, source);
}

/* Rows of a sequence, those of prompts aside, that are in a step and that an exit looks at. */
static int64_t held_rows(const struct ee_sequence *s) {
    return s ? s->max_deferred + 1 : 0;
}

static int64_t looked_rows(const struct ee_sequence *s) {
    if (!s)
        return 0;
    if (s->kind == EE_ENGINE_SCORE)
        return EE_PROMPT_ROWS;
    return s->full_depth || s->kind == EE_ENGINE_SPECULATIVE ? held_rows(s) : 1;
}

/* Memory for the largest step that the sequences in flight and `s` can come to. */
static enum ee_status reserve(struct ee_engine *engine, const struct ee_sequence *s) {
    int64_t held = held_rows(s), looked = looked_rows(s);
    for (int32_t i = 0; i < engine->cache->max_sequences; i++) {
        held += held_rows(engine->sequences[i]);
        looked += looked_rows(engine->sequences[i]);
    }
    looked = ee_min(looked, held + EE_PROMPT_ROWS);
    /* A deferred row gives an event when it is looked at, the newest one two; a step of a pipeline
     * may take all answers of a pass, start one, and take another answer. */
    int64_t passes = engine->pipeline ? 4 : 1;
    EE_TRY(ee_events_reserve(&engine->events, looked + passes * engine->cache->max_sequences));
    return ee_runner_reserve(&engine->runner, EE_PROMPT_ROWS + held, ee_min(looked, EE_HEAD_ROWS));
}

/* Requests that this engine can serve. */
static enum ee_status check_served(const struct ee_engine *engine,
                                   const struct ee_request *request) {
    int32_t missing = ee_weights_missing(engine->weights);
    if (missing >= 0 && engine->runner.half_layer_seconds <= 0)
        EE_FAIL(EE_ERR_INVALID, "the engine has no weights for %s yet; load all parameters first",
                engine->model->params->rows[missing].name);
    if (engine->next_id == INT32_MAX)
        EE_FAIL(EE_ERR_INTERNAL, "the engine has served all its sequence numbers; make a new one");
    if (!engine->pipeline)
        return EE_OK;
    EE_TRY(ee_client_check(engine));
    if (request->kind != EE_ENGINE_PIPELINE && request->kind != EE_ENGINE_FULL)
        EE_FAIL(
            EE_ERR_UNSUPPORTED,
            "a model spread over %d ranks writes with the engines pipeline and full alone; load "
            "it on one rank for the others, and for scores",
            engine->model->layout->ranks);
    return EE_OK;
}

enum ee_status ee_engine_admit(struct ee_engine *engine, struct ee_sequence **out,
                               const struct ee_request *request, int32_t number) {
    struct ee_cache *cache = engine->cache;
    struct ee_sequence *s = NULL;
    EE_TRY(ee_sequence_create(&s, request, &engine->model->config, cache->max_length));
    enum ee_status status;
    EE_GOTO(status, reserve(engine, s), fail);
    EE_GOTO(status, ee_cache_acquire(cache, &s->slot, s->length_limit - 1), fail);
    s->id = number;
    engine->sequences[s->slot] = s;
    engine->active++;
    *out = s;
    return EE_OK;
fail:
    ee_sequence_destroy(s);
    return status;
}

enum ee_status ee_engine_add(struct ee_engine *engine, int32_t *sequence,
                             const struct ee_request *request) {
    EE_TRY(ee_request_check(request, &engine->model->config, engine->cache->max_length));
    EE_TRY(check_served(engine, request));
    struct ee_sequence *s;
    EE_TRY(ee_engine_admit(engine, &s, request, engine->next_id));
    if (engine->pipeline) {
        enum ee_status status = ee_client_add(engine, s, request);
        if (status != EE_OK) {
            ee_engine_release(engine, s);
            return ee_pipeline_fail(engine, status);
        }
    }
    *sequence = engine->next_id++;
    return EE_OK;
}

void ee_engine_release(struct ee_engine *engine, struct ee_sequence *s) {
    ee_cache_release(engine->cache, s->slot);
    engine->sequences[s->slot] = NULL;
    engine->active--;
    if (engine->pipeline && engine->model->rank == 0)
        ee_client_end(engine, s);
    else
        ee_sequence_destroy(s);
}

static enum ee_status find(const struct ee_engine *engine, int32_t id, struct ee_sequence **out) {
    for (int32_t i = 0; i < engine->cache->max_sequences; i++) {
        *out = engine->sequences[i];
        if (*out && (*out)->id == id)
            return EE_OK;
    }
    EE_FAIL(EE_ERR_INVALID,
            "no sequence %d is in flight: it is done, has been removed, or was never added", id);
}

/* Takes a sequence out of the events that wait to be handed out. */
static bool drop_pending(struct ee_engine *engine, int32_t id) {
    if (!engine->pending || !ee_events_drop(&engine->events, id))
        return false;
    engine->pending = engine->events.count > 0;
    return true;
}

enum ee_status ee_engine_remove(struct ee_engine *engine, int32_t id) {
    bool waited = drop_pending(engine, id);
    struct ee_sequence *s = NULL;
    enum ee_status status = find(engine, id, &s);
    if (status != EE_OK)
        return waited ? EE_OK : status;
    ee_engine_release(engine, s);
    return EE_OK;
}

enum ee_status ee_engine_finish(struct ee_engine *engine, int32_t id, int64_t *rows) {
    struct ee_sequence *s = NULL;
    *rows = 0;
    enum ee_status status = find(engine, id, &s);
    if (status == EE_OK && s->awaited > 0) {
        ee_client_drop(engine, s);
        s->ending = EE_DONE_FINISHED;
        *rows = s->awaited;
        return EE_OK;
    }
    if (status != EE_OK || !s->full_depth || s->deferred == 0)
        return ee_engine_remove(engine, id);
    s->finishing = true;
    *rows = s->deferred;
    return EE_OK;
}

/* The newest row left a draft behind. */
static void commit_draft(struct ee_sequence *s) {
    s->tokens[s->count++] = s->step.event.token;
    s->deferred++;
}

void ee_engine_mark(struct ee_engine *engine, const struct ee_sequence *s, int32_t done) {
    int64_t i = engine->events.count - 1;
    while (engine->events.event[i].sequence != s->id)
        i--;
    engine->events.event[i].done = done;
}

void ee_engine_take(struct ee_engine *engine, struct ee_sequence *s) {
    const struct ee_event *event = &s->step.event;
    int32_t position = event->position;
    if (s->step.told)
        ee_engine_mark(engine, s, event->done);
    else
        (void)ee_events_add(&engine->events, event,
                            ee_sequence_said(s, position - 1, engine->events.exit_count));
    s->tokens[position] = ee_sequence_text(s, position, event->token);
    s->count = position + 1;
    s->deferred = s->step.left ? s->deferred + 1 : 0;
    if (s->kind == EE_ENGINE_SPECULATIVE)
        ee_cache_truncate(engine->cache, s->slot, position);
}

/* Takes over what the step made of a sequence; ends it where it is done. */
static void commit(struct ee_engine *engine, struct ee_sequence *s) {
    struct ee_event_list *events = &engine->events;
    enum ee_done done = EE_NOT_DONE;
    s->read += s->step.prompt_rows;
    engine->drafts += s->step.drafts;
    engine->accepted += s->step.accepted;
    if (s->kind == EE_ENGINE_SCORE && s->read == s->prompt_count - 1) {
        done = EE_DONE_LENGTH;
        events->event[s->step.first_event + s->step.prompt_rows - 1].done = (int32_t)done;
    } else if (s->finishing) {
        done = EE_DONE_FINISHED;
        ee_engine_mark(engine, s, (int32_t)done);
    } else if (s->step.token_row) {
        EE_ASSERT(s->step.decided);
        done = (enum ee_done)s->step.event.done;
        if (s->kind == EE_ENGINE_SPECULATIVE && s->step.left)
            commit_draft(s);
        else
            ee_engine_take(engine, s);
    }
    if (done != EE_NOT_DONE)
        ee_engine_release(engine, s);
}

/* Ends one sequence whose logits were not finite, and says so. */
static enum ee_status end_failed(struct ee_engine *engine) {
    struct ee_sequence *failed = NULL;
    bool more = false;
    for (int32_t i = engine->cache->max_sequences; i-- > 0;) {
        struct ee_sequence *s = engine->sequences[i];
        if (!s || !s->step.failed)
            continue;
        more = failed != NULL;
        failed = s;
    }
    if (!failed)
        return EE_OK;
    enum ee_status status =
        ee_fail(EE_ERR_NONFINITE,
                "the logits of sequence %d at position %d, exit %d, are not finite; the sequence "
                "has been ended: check the model's weights",
                failed->id, failed->step.event.position, failed->step.event.exit);
    (void)ee_events_drop(&engine->events, failed->id);
    ee_engine_release(engine, failed);
    engine->pending = more || engine->events.count > 0;
    return status;
}

static enum ee_status run(struct ee_engine *engine) {
    engine->events.count = 0;
    if (engine->active == 0)
        return EE_OK;
    if (engine->pipeline) {
        EE_TRY(ee_client_check(engine));
        enum ee_status status = ee_client_step(engine);
        return status == EE_OK ? EE_OK : ee_pipeline_fail(engine, status);
    }
    EE_TRY(ee_step_run(engine));
    engine->steps++;
    for (int32_t i = 0; i < engine->cache->max_sequences; i++)
        if (engine->sequences[i] && !engine->sequences[i]->step.failed)
            commit(engine, engine->sequences[i]);
    return EE_OK;
}

enum ee_status ee_engine_step(struct ee_engine *engine, struct ee_events *events) {
    const struct ee_event_list *list = &engine->events;
    *events = (struct ee_events){.exit_count = list->exit_count};
    if (!engine->pending)
        EE_TRY(run(engine));
    EE_TRY(end_failed(engine));
    engine->pending = false;
    events->event = list->event;
    events->exits = list->exits;
    events->count = list->count;
    return EE_OK;
}

int32_t ee_engine_active(const struct ee_engine *engine) {
    int32_t active = engine->active;
    for (int64_t i = 0; engine->pending && i < engine->events.count; i++)
        active += engine->events.event[i].done != EE_NOT_DONE;
    return active;
}

struct ee_engine_stats ee_engine_stats(const struct ee_engine *engine) {
    const struct ee_cache *cache = engine->cache;
    int64_t page = (int64_t)cache->heads * EE_CACHE_PAGE * cache->width * (int64_t)sizeof(float);
    return (struct ee_engine_stats){.steps = engine->steps,
                                    .half_layers = engine->runner.half_layers,
                                    .head_rows = engine->runner.head_rows,
                                    .bytes_read = engine->runner.bytes_read,
                                    .drafts = engine->drafts,
                                    .accepted = engine->accepted,
                                    .dtype = engine->weights->dtype,
                                    .weight_bytes = (int64_t)engine->weights->arena.capacity,
                                    .cache_bytes = 2 * cache->layers * cache->pages * page};
}

enum ee_status ee_engine_peek(const struct ee_engine *engine, int32_t id, int32_t layer,
                              int32_t *fill, float *k, float *v) {
    struct ee_sequence *s = NULL;
    EE_TRY(find(engine, id, &s));
    if (layer < 0 || layer >= engine->cache->layers)
        EE_FAIL(EE_ERR_INVALID, "the cache has %d layers, got layer %d", engine->cache->layers,
                layer);
    *fill = ee_cache_fill(engine->cache, s->slot, layer);
    if (k && v)
        ee_cache_read(engine->cache, s->slot, layer, k, v);
    return EE_OK;
}
