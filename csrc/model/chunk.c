#include "model/chunk.h"

#include "base/alloc.h"
#include "model/parts.h"

#include <string.h>

/* Which pieces of a layer's activations a slot keeps in each mode; the others are shared. */
enum { KEEP_X = 1, KEEP_ATTENTION = 2, KEEP_MLP = 4 };

static const int kept[] = {
    [EE_RECOMPUTE_NONE] = KEEP_X | KEEP_ATTENTION | KEEP_MLP,
    [EE_RECOMPUTE_ATTENTION] = KEEP_X | KEEP_MLP,
    [EE_RECOMPUTE_FULL] = KEEP_X,
};

static enum ee_status take(struct ee_arena *arena, float **out, int64_t count) {
    void *memory = NULL;
    if (count > 0)
        EE_TRY(ee_arena_take(arena, &memory, count, sizeof(float)));
    *out = memory;
    return EE_OK;
}

/* Takes the pieces of the groups in `mask`. */
static enum ee_status take_acts(struct ee_arena *arena, struct ee_block_acts *acts,
                                const struct ee_block_sizes *s, int mask) {
    if (mask & KEEP_X)
        EE_TRY(take(arena, &acts->x, s->x));
    if (mask & KEEP_ATTENTION) {
        EE_TRY(take(arena, &acts->stats1, s->stats1));
        EE_TRY(take(arena, &acts->qkv, s->qkv));
        EE_TRY(take(arena, &acts->qk, s->qk));
        EE_TRY(take(arena, &acts->qk_stats, s->qk_stats));
        EE_TRY(take(arena, &acts->out, s->out));
        EE_TRY(take(arena, &acts->lse, s->lse));
    }
    if (mask & KEEP_MLP) {
        EE_TRY(take(arena, &acts->mid, s->mid));
        EE_TRY(take(arena, &acts->stats2, s->stats2));
        EE_TRY(take(arena, &acts->up, s->up));
    }
    return EE_OK;
}

static void share_acts(struct ee_block_acts *acts, const struct ee_block_acts *shared, int mask) {
    if (!(mask & KEEP_ATTENTION)) {
        acts->stats1 = shared->stats1;
        acts->qkv = shared->qkv;
        acts->qk = shared->qk;
        acts->qk_stats = shared->qk_stats;
        acts->out = shared->out;
        acts->lse = shared->lse;
    }
    if (!(mask & KEEP_MLP)) {
        acts->mid = shared->mid;
        acts->stats2 = shared->stats2;
        acts->up = shared->up;
    }
}

static int32_t layer_count(const struct ee_chunk *chunk) {
    return chunk->stage->last_layer - chunk->stage->first_layer;
}

static int32_t exit_count(const struct ee_chunk *chunk) {
    int32_t count = 0;
    for (int32_t e = 0; e < chunk->model->params->exits; e++)
        count += chunk->stage->exit[e];
    return count;
}

static enum ee_status lay_out_queues(struct ee_chunk *chunk) {
    const struct ee_config *c = &chunk->model->config;
    int64_t floats = layer_count(chunk) * ee_queue_layer_floats(c, chunk->options.rows);
    if (chunk->options.defer_exits)
        floats += exit_count(chunk) * ee_queue_exit_floats(c, chunk->options.rows);
    int32_t notes = layer_count(chunk) * EE_QUEUE_LAYER_NOTES + exit_count(chunk);
    for (int32_t i = 0; i < chunk->options.queues; i++) {
        struct ee_weight_queue *queue = &chunk->queues[i];
        *queue = (struct ee_weight_queue){.floats = floats, .capacity = notes};
        void *memory;
        EE_TRY(take(&chunk->arena, &queue->memory, floats));
        EE_TRY(ee_arena_take(&chunk->arena, &memory, notes, sizeof(struct ee_weight_note)));
        queue->notes = memory;
    }
    return EE_OK;
}

/* Run twice: once to measure, once to get pointers. */
static enum ee_status lay_out(struct ee_chunk *chunk) {
    const struct ee_config *c = &chunk->model->config;
    struct ee_block_sizes sizes = ee_block_sizes(c, chunk->options.rows);
    int32_t layers = layer_count(chunk);
    int mask = kept[chunk->options.recompute];
    EE_TRY(take_acts(&chunk->arena, &chunk->transient, &sizes, ~mask & ~KEEP_X));
    EE_TRY(lay_out_queues(chunk));
    for (int32_t s = 0; s < chunk->options.slots; s++) {
        for (int32_t l = 0; l < layers; l++) {
            struct ee_block_acts *acts = &chunk->acts[s * layers + l];
            EE_TRY(take_acts(&chunk->arena, acts, &sizes, mask));
            share_acts(acts, &chunk->transient, mask);
        }
        EE_TRY(take(&chunk->arena, &chunk->output[s], sizes.x));
    }
    return EE_OK;
}

enum ee_status ee_chunk_create(struct ee_chunk **out, const struct ee_model *model,
                               const struct ee_stage *stage,
                               const struct ee_chunk_options *options) {
    *out = NULL;
    EE_TRY(ee_model_require_weights(model));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_chunk), "a chunk"));
    struct ee_chunk *chunk = memory;
    *chunk = (struct ee_chunk){.model = model, .stage = stage, .options = *options};
    const char *what = "the activations";
    ee_arena_init(&chunk->arena, what);
    size_t slots = (size_t)options->slots, layers = (size_t)layer_count(chunk);
    enum ee_status status;
    EE_GOTO(status, ee_alloc(&memory, sizeof(struct ee_block_acts) * layers * slots, what), fail);
    chunk->acts = memory;
    EE_GOTO(status, ee_alloc(&memory, sizeof(float *) * slots, what), fail);
    chunk->output = memory;
    size_t queues = (size_t)options->queues;
    EE_GOTO(status, ee_alloc(&memory, sizeof(struct ee_weight_queue) * queues, what), fail);
    chunk->queues = memory;
    EE_GOTO(status, lay_out(chunk), fail);
    EE_GOTO(status, ee_arena_bind(&chunk->arena, 0), fail);
    EE_GOTO(status, lay_out(chunk), fail);
    *out = chunk;
    return EE_OK;
fail:
    ee_chunk_destroy(chunk);
    return status;
}

void ee_chunk_destroy(struct ee_chunk *chunk) {
    if (!chunk)
        return;
    ee_arena_free(&chunk->arena);
    ee_free(chunk->acts);
    ee_free(chunk->output);
    ee_free(chunk->queues);
    ee_free(chunk);
}

/* The activations of a layer of the model in a slot. */
static struct ee_block_acts *acts_of(const struct ee_chunk *chunk, int32_t slot, int32_t layer) {
    return &chunk->acts[slot * layer_count(chunk) + layer - chunk->stage->first_layer];
}

static struct ee_block layer_block(const struct ee_chunk *chunk, int32_t layer) {
    const struct ee_model *model = chunk->model;
    return (struct ee_block){
        .model = model, .index = &model->params->layers[layer], .layer = layer, .site = layer + 1};
}

/* Tokens to x[N, C]. */
static enum ee_status embed(const struct ee_model *model, const struct ee_batch *batch, float *x) {
    const struct ee_config *c = &model->config;
    const struct ee_params *params = model->params;
    struct ee_tensor out = ee_matrix(x, batch->rows, c->hidden_size), storage;
    struct ee_weight wte =
        ee_joined_weight(params, params->embedding, params->embedding, model->weights);
    EE_TRY(ee_embed(model->ctx, &out, &wte,
                    ee_optional(params, params->positions, model->weights, &storage), batch->token,
                    batch->position, c->embedding_scale));
    if (!ee_dropout_on(batch, c->embedding_dropout))
        return EE_OK;
    struct ee_dropout dropout = ee_dropout_at(batch, c->embedding_dropout, 0, EE_DROP_EMBEDDING);
    return ee_dropout(model->ctx, &out, &out, NULL, &dropout);
}

static enum ee_status embed_backward(const struct ee_model *model, const struct ee_batch *batch,
                                     float *gradient, float *dx) {
    const struct ee_config *c = &model->config;
    const struct ee_params *params = model->params;
    struct ee_tensor d = ee_matrix(dx, batch->rows, c->hidden_size), storage;
    if (ee_dropout_on(batch, c->embedding_dropout)) {
        struct ee_dropout dropout =
            ee_dropout_at(batch, c->embedding_dropout, 0, EE_DROP_EMBEDDING);
        EE_TRY(ee_dropout(model->ctx, &d, &d, NULL, &dropout));
    }
    struct ee_tensor dwte = ee_param_tensor(params, params->embedding, gradient);
    return ee_embed_backward(model->ctx, &dwte,
                             ee_optional(params, params->positions, gradient, &storage), &d,
                             batch->token, batch->position, c->embedding_scale);
}

/* Where the layer's output goes: the input of the next one, or the slot's output. */
static float *layer_output(const struct ee_chunk *chunk, int32_t slot, int32_t layer) {
    return layer + 1 < chunk->stage->last_layer ? acts_of(chunk, slot, layer + 1)->x
                                                : chunk->output[slot];
}

enum ee_status ee_chunk_forward(struct ee_chunk *chunk, int32_t slot,
                                const struct ee_batch *batch) {
    EE_ASSERT(batch->rows <= chunk->options.rows && slot < chunk->options.slots);
    if (chunk->stage->embeds)
        EE_TRY(embed(chunk->model, batch, *ee_chunk_input(chunk, slot)));
    for (int32_t l = chunk->stage->first_layer; l < chunk->stage->last_layer; l++) {
        struct ee_block block = layer_block(chunk, l);
        EE_TRY(
            ee_block_forward(&block, batch, acts_of(chunk, slot, l), layer_output(chunk, slot, l)));
    }
    return EE_OK;
}

/* Runs the chunk's exits at a depth in list order. */
static enum ee_status exits_at(const struct ee_chunk *chunk, int32_t depth,
                               const struct ee_batch *batch, const float *hidden,
                               const struct ee_exit_run *run) {
    const struct ee_params *params = chunk->model->params;
    for (int32_t e = 0; e < params->exits; e++)
        if (chunk->stage->exit[e] && params->exit[e].depth == depth)
            EE_TRY(ee_exit_run(chunk->model, e, batch, hidden, &run[e]));
    return EE_OK;
}

static struct ee_exit_run exit_run(const struct ee_backward *backward, int32_t e) {
    return (struct ee_exit_run){.training = &backward->training[e],
                                .tokens = backward->tokens[e],
                                .sums = &backward->sums[e],
                                .gradient = backward->gradient};
}

enum ee_status ee_chunk_backward(struct ee_chunk *chunk, int32_t slot, int32_t queue,
                                 const struct ee_batch *batch, float *dx,
                                 const struct ee_backward *backward) {
    const struct ee_stage *stage = chunk->stage;
    struct ee_weight_queue *put_off = queue < 0 ? NULL : &chunk->queues[queue];
    struct ee_exit_run run[EE_MAX_EXITS + 1] = {0};
    for (int32_t e = 0; e < chunk->model->params->exits; e++) {
        run[e] = exit_run(backward, e);
        run[e].acc_dx = dx;
        run[e].queue = chunk->options.defer_exits ? put_off : NULL;
    }
    if (put_off)
        ee_queue_clear(put_off);
    for (int32_t l = stage->last_layer - 1; l >= stage->first_layer; l--) {
        struct ee_block block = layer_block(chunk, l);
        block.gradient = backward->gradient;
        block.queue = put_off;
        const struct ee_block_acts *acts = acts_of(chunk, slot, l);
        EE_TRY(exits_at(chunk, 2 * l + 2, batch, layer_output(chunk, slot, l), run));
        if (chunk->options.recompute == EE_RECOMPUTE_FULL)
            EE_TRY(ee_block_recompute(&block, batch, acts));
        else if (chunk->options.recompute == EE_RECOMPUTE_ATTENTION)
            EE_TRY(ee_block_recompute_attention(&block, batch, acts));
        EE_TRY(ee_block_backward_mlp(&block, batch, acts, dx));
        EE_TRY(exits_at(chunk, 2 * l + 1, batch, acts->mid, run));
        EE_TRY(ee_block_backward_attention(&block, batch, acts, dx));
    }
    EE_TRY(exits_at(chunk, 2 * stage->first_layer, batch, *ee_chunk_input(chunk, slot), run));
    return stage->embeds ? embed_backward(chunk->model, batch, backward->gradient, dx) : EE_OK;
}

enum ee_status ee_chunk_backward_weight(struct ee_chunk *chunk, int32_t queue,
                                        const struct ee_batch *batch,
                                        const struct ee_backward *backward) {
    const struct ee_weight_queue *q = &chunk->queues[queue];
    for (int32_t i = 0; i < q->count; i++) {
        const struct ee_weight_note *note = &q->notes[i];
        if (note->exit >= 0) {
            struct ee_exit_run run = exit_run(backward, note->exit);
            EE_TRY(ee_exit_run_weight(chunk->model, note->exit, batch, note->x.data, &run));
        } else {
            EE_TRY(ee_linear_backward_weight(chunk->model->ctx, &note->dw,
                                             note->has_bias ? &note->dbias : NULL, &note->dy,
                                             &note->x));
        }
    }
    return EE_OK;
}

enum ee_status ee_chunk_evaluate(struct ee_chunk *chunk, const struct ee_batch *batch,
                                 const struct ee_exit_run *run) {
    const struct ee_stage *stage = chunk->stage;
    struct ee_batch plain = *batch;
    plain.dropout = false;
    float *x = *ee_chunk_input(chunk, 0);
    if (stage->embeds)
        EE_TRY(embed(chunk->model, &plain, x));
    EE_TRY(exits_at(chunk, 2 * stage->first_layer, &plain, x, run));
    for (int32_t l = stage->first_layer; l < stage->last_layer; l++) {
        struct ee_block block = layer_block(chunk, l);
        const struct ee_block_acts *acts = acts_of(chunk, 0, l);
        float *y = layer_output(chunk, 0, l);
        EE_TRY(ee_block_forward(&block, &plain, acts, y));
        EE_TRY(exits_at(chunk, 2 * l + 1, &plain, acts->mid, run));
        EE_TRY(exits_at(chunk, 2 * l + 2, &plain, y, run));
    }
    return EE_OK;
}

double ee_chunk_flops(const struct ee_chunk *chunk, int64_t rows) {
    const struct ee_model *model = chunk->model;
    double total = 3 * ee_block_flops(&model->config, rows) * layer_count(chunk);
    for (int32_t e = 0; e < model->params->exits; e++) {
        if (!chunk->stage->exit[e])
            continue;
        double forward, backward;
        ee_exit_flops(model, e, rows, &forward, &backward);
        total += forward + backward;
    }
    return total;
}
