#include "infer/engine.h"

#include "base/alloc.h"
#include "infer/step.h"

#include <string.h>

static enum ee_status allocate(struct ee_engine *engine, size_t sequences, size_t vocab) {
    const char *what = "the decoding engine";
    void *memory;
    EE_TRY(ee_alloc(&memory, sequences * sizeof *engine->sequences, what));
    engine->sequences = memory;
    EE_TRY(ee_alloc(&memory, sequences * sizeof *engine->events, what));
    engine->events = memory;
    EE_TRY(ee_alloc(&memory, sequences * sizeof *engine->index, what));
    engine->index = memory;
    EE_TRY(ee_alloc(&memory, vocab * sizeof *engine->sample_weights, what));
    engine->sample_weights = memory;
    EE_TRY(ee_alloc(&memory, vocab * sizeof *engine->sample_order, what));
    engine->sample_order = memory;
    return EE_OK;
}

static enum ee_status build(struct ee_engine *engine, const struct ee_engine_options *options) {
    const struct ee_config *c = &engine->model->config;
    int64_t length = options->max_length ? options->max_length : c->max_positions;
    if (length < 1 || length > c->max_positions)
        EE_FAIL(EE_ERR_INVALID,
                "max_length must lie between 1 and the model's context of %d, got %lld",
                c->max_positions, (long long)length);
    EE_TRY(ee_weights_create(&engine->weights, engine->model, options->dtype));
    EE_TRY(ee_cache_create(&engine->cache, engine->weights->cache_layers, c->num_kv_heads,
                           c->head_dim, options->max_sequences, length, options->positions));
    engine->runner = ee_runner_init(engine->model, engine->weights, engine->cache);
    return allocate(engine, (size_t)options->max_sequences, (size_t)c->vocab_size);
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
    for (int32_t i = 0; engine->sequences && i < engine->cache->max_sequences; i++)
        ee_sequence_destroy(engine->sequences[i]);
    ee_runner_free(&engine->runner);
    ee_free(engine->sequences);
    ee_free(engine->events);
    ee_free(engine->index);
    ee_free(engine->sample_weights);
    ee_free(engine->sample_order);
    ee_cache_destroy(engine->cache);
    ee_weights_destroy(engine->weights);
    ee_free(engine);
}

/* Memory for the largest step that the sequences in flight and `s` can come to. */
static enum ee_status reserve(struct ee_engine *engine, const struct ee_sequence *s) {
    int64_t rows = EE_PROMPT_ROWS + 1 + s->max_deferred;
    for (int32_t i = 0; i < engine->cache->max_sequences; i++)
        if (engine->sequences[i])
            rows += 1 + engine->sequences[i]->max_deferred;
    return ee_runner_reserve(&engine->runner, rows, engine->cache->max_sequences);
}

enum ee_status ee_engine_add(struct ee_engine *engine, int32_t *sequence,
                             const struct ee_request *request) {
    struct ee_cache *cache = engine->cache;
    EE_TRY(ee_request_check(request, &engine->model->config, cache->max_length));
    if (engine->next_id == INT32_MAX)
        EE_FAIL(EE_ERR_INTERNAL, "the engine has served all its sequence numbers; make a new one");
    struct ee_sequence *s = NULL;
    EE_TRY(ee_sequence_create(&s, request, &engine->model->config, cache->max_length));
    enum ee_status status;
    EE_GOTO(status, reserve(engine, s), fail);
    EE_GOTO(status, ee_cache_acquire(cache, &s->slot, s->length_limit - 1), fail);
    s->id = engine->next_id++;
    engine->sequences[s->slot] = s;
    engine->active++;
    *sequence = s->id;
    return EE_OK;
fail:
    ee_sequence_destroy(s);
    return status;
}

static void release(struct ee_engine *engine, struct ee_sequence *s) {
    ee_cache_release(engine->cache, s->slot);
    engine->sequences[s->slot] = NULL;
    engine->active--;
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

/* Takes the number of an event out of the list that waits to be handed out. */
static bool drop_pending(struct ee_engine *engine, int32_t id) {
    int64_t kept = 0, count = engine->pending ? engine->event_count : 0;
    for (int64_t i = 0; i < count; i++)
        if (engine->events[i].sequence != id)
            engine->events[kept++] = engine->events[i];
    if (kept == count)
        return false;
    engine->event_count = kept;
    engine->pending = kept > 0;
    return true;
}

enum ee_status ee_engine_remove(struct ee_engine *engine, int32_t id) {
    bool waited = drop_pending(engine, id);
    struct ee_sequence *s = NULL;
    enum ee_status status = find(engine, id, &s);
    if (status != EE_OK)
        return waited ? EE_OK : status;
    release(engine, s);
    return EE_OK;
}

/* Takes over what the step made of a sequence; ends it where it is done. */
static void commit(struct ee_engine *engine, struct ee_sequence *s) {
    s->read += s->step.prompt_rows;
    if (!s->step.token_row)
        return;
    EE_ASSERT(s->step.decided);
    s->deferred = s->step.left ? s->deferred + 1 : 0;
    s->count++;
    s->last = s->step.event.token;
    engine->events[engine->event_count++] = s->step.event;
    if (s->step.event.done)
        release(engine, s);
}

/* Ends the sequences whose logits were not finite. */
static enum ee_status end_failed(struct ee_engine *engine) {
    enum ee_status status = EE_OK;
    for (int32_t i = 0; i < engine->cache->max_sequences; i++) {
        struct ee_sequence *s = engine->sequences[i];
        if (!s || !s->step.failed)
            continue;
        if (status == EE_OK)
            status = ee_fail(EE_ERR_NONFINITE,
                             "the logits of sequence %d at position %lld, exit %d, are not finite; "
                             "the sequence has been ended: check the model's weights",
                             s->id, (long long)s->count, s->step.event.exit);
        release(engine, s);
    }
    return status;
}

static enum ee_status run(struct ee_engine *engine) {
    engine->event_count = 0;
    if (engine->active == 0)
        return EE_OK;
    EE_TRY(ee_step_run(engine));
    engine->steps++;
    for (int32_t i = 0; i < engine->cache->max_sequences; i++)
        if (engine->sequences[i] && !engine->sequences[i]->step.failed)
            commit(engine, engine->sequences[i]);
    enum ee_status status = end_failed(engine);
    engine->pending = status != EE_OK && engine->event_count > 0;
    return status;
}

enum ee_status ee_engine_step(struct ee_engine *engine, const struct ee_event **events,
                              int64_t *count) {
    *events = engine->events;
    *count = 0;
    if (!engine->pending)
        EE_TRY(run(engine));
    engine->pending = false;
    *count = engine->event_count;
    return EE_OK;
}

int32_t ee_engine_active(const struct ee_engine *engine) {
    int32_t active = engine->active;
    for (int64_t i = 0; engine->pending && i < engine->event_count; i++)
        active += engine->events[i].done != EE_NOT_DONE;
    return active;
}

struct ee_engine_stats ee_engine_stats(const struct ee_engine *engine) {
    const struct ee_cache *cache = engine->cache;
    int64_t page = (int64_t)cache->heads * EE_CACHE_PAGE * cache->width * (int64_t)sizeof(float);
    return (struct ee_engine_stats){.steps = engine->steps,
                                    .half_layers = engine->runner.half_layers,
                                    .head_rows = engine->runner.head_rows,
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
