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

/* Run twice: once to measure, once to get pointers. */
static enum ee_status lay_out(struct ee_chunk *chunk) {
    const struct ee_config *c = &chunk->model->config;
    struct ee_block_sizes sizes = ee_block_sizes(c, chunk->rows);
    int32_t layers = chunk->last_layer - chunk->first_layer;
    int mask = kept[chunk->recompute];
    EE_TRY(take_acts(&chunk->arena, &chunk->transient, &sizes, ~mask & ~KEEP_X));
    EE_TRY(take(&chunk->arena, &chunk->dx, sizes.x));
    for (int32_t s = 0; s < chunk->slots; s++) {
        for (int32_t l = 0; l < layers; l++) {
            struct ee_block_acts *acts = &chunk->acts[s * layers + l];
            EE_TRY(take_acts(&chunk->arena, acts, &sizes, mask));
            share_acts(acts, &chunk->transient, mask);
        }
        EE_TRY(take(&chunk->arena, &chunk->output[s], sizes.x));
    }
    return EE_OK;
}

enum ee_status ee_chunk_create(struct ee_chunk **out, const struct ee_model *model, int64_t rows,
                               int32_t slots, enum ee_recompute recompute) {
    *out = NULL;
    EE_TRY(ee_model_require_weights(model));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_chunk), "a chunk"));
    struct ee_chunk *chunk = memory;
    *chunk = (struct ee_chunk){.model = model,
                               .last_layer = model->config.num_layers,
                               .recompute = recompute,
                               .rows = rows,
                               .slots = slots};
    ee_arena_init(&chunk->arena, "the activations");
    size_t layers = (size_t)model->config.num_layers;
    enum ee_status status;
    EE_GOTO(
        status,
        ee_alloc(&memory, sizeof(struct ee_block_acts) * layers * (size_t)slots, "the activations"),
        fail);
    chunk->acts = memory;
    EE_GOTO(status, ee_alloc(&memory, sizeof(float *) * (size_t)slots, "the activations"), fail);
    chunk->output = memory;
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
    ee_free(chunk);
}

static struct ee_block_acts *slot_acts(const struct ee_chunk *chunk, int32_t slot) {
    return chunk->acts + slot * (chunk->last_layer - chunk->first_layer);
}

static struct ee_block layer_block(const struct ee_chunk *chunk, int32_t layer, float *gradient) {
    const struct ee_model *model = chunk->model;
    struct ee_block block = {model, &model->params->layers[layer], layer, layer + 1, gradient};
    return block;
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
    return layer + 1 < chunk->last_layer ? slot_acts(chunk, slot)[layer + 1].x
                                         : chunk->output[slot];
}

/* The hidden state at an even depth. */
static float *state_at(const struct ee_chunk *chunk, int32_t slot, int32_t depth) {
    return depth == 0 ? slot_acts(chunk, slot)[0].x : layer_output(chunk, slot, depth / 2 - 1);
}

enum ee_status ee_chunk_forward(struct ee_chunk *chunk, int32_t slot,
                                const struct ee_batch *batch) {
    EE_ASSERT(batch->rows <= chunk->rows && slot < chunk->slots);
    EE_TRY(embed(chunk->model, batch, state_at(chunk, slot, 0)));
    for (int32_t l = chunk->first_layer; l < chunk->last_layer; l++) {
        struct ee_block block = layer_block(chunk, l, NULL);
        EE_TRY(ee_block_forward(&block, batch, &slot_acts(chunk, slot)[l],
                                layer_output(chunk, slot, l)));
    }
    return EE_OK;
}

/* Runs the exits at a depth in list order. */
static enum ee_status exits_at(const struct ee_model *model, int32_t depth,
                               const struct ee_batch *batch, const float *hidden,
                               const struct ee_exit_run *run) {
    for (int32_t e = 0; e < model->params->exits; e++)
        if (model->params->exit[e].depth == depth)
            EE_TRY(ee_exit_run(model, e, batch, hidden, &run[e]));
    return EE_OK;
}

enum ee_status ee_chunk_backward(struct ee_chunk *chunk, int32_t slot, const struct ee_batch *batch,
                                 float *gradient, const struct ee_exit_training *training,
                                 double tokens, struct ee_exit_sums *sums) {
    const struct ee_model *model = chunk->model;
    struct ee_exit_run run[EE_MAX_EXITS + 1] = {0};
    for (int32_t e = 0; e < model->params->exits; e++)
        run[e] = (struct ee_exit_run){.training = &training[e],
                                      .tokens = tokens,
                                      .sums = &sums[e],
                                      .gradient = gradient,
                                      .acc_dx = chunk->dx};
    memset(chunk->dx, 0, (size_t)(batch->rows * model->config.hidden_size) * sizeof(float));
    for (int32_t l = chunk->last_layer - 1; l >= chunk->first_layer; l--) {
        struct ee_block block = layer_block(chunk, l, gradient);
        const struct ee_block_acts *acts = &slot_acts(chunk, slot)[l];
        EE_TRY(exits_at(model, 2 * l + 2, batch, layer_output(chunk, slot, l), run));
        if (chunk->recompute == EE_RECOMPUTE_FULL)
            EE_TRY(ee_block_recompute(&block, batch, acts));
        else if (chunk->recompute == EE_RECOMPUTE_ATTENTION)
            EE_TRY(ee_block_recompute_attention(&block, batch, acts));
        EE_TRY(ee_block_backward_mlp(&block, batch, acts, chunk->dx));
        EE_TRY(exits_at(model, 2 * l + 1, batch, acts->mid, run));
        EE_TRY(ee_block_backward_attention(&block, batch, acts, chunk->dx));
    }
    EE_TRY(exits_at(model, 0, batch, state_at(chunk, slot, 0), run));
    return embed_backward(model, batch, gradient, chunk->dx);
}

enum ee_status ee_chunk_evaluate(struct ee_chunk *chunk, const struct ee_batch *batch,
                                 const struct ee_exit_run *run) {
    const struct ee_model *model = chunk->model;
    struct ee_batch plain = *batch;
    plain.dropout = false;
    EE_TRY(embed(model, &plain, state_at(chunk, 0, 0)));
    EE_TRY(exits_at(model, 0, &plain, state_at(chunk, 0, 0), run));
    for (int32_t l = chunk->first_layer; l < chunk->last_layer; l++) {
        struct ee_block block = layer_block(chunk, l, NULL);
        const struct ee_block_acts *acts = &slot_acts(chunk, 0)[l];
        float *y = layer_output(chunk, 0, l);
        EE_TRY(ee_block_forward(&block, &plain, acts, y));
        EE_TRY(exits_at(model, 2 * l + 1, &plain, acts->mid, run));
        EE_TRY(exits_at(model, 2 * l + 2, &plain, y, run));
    }
    return EE_OK;
}

double ee_chunk_flops(const struct ee_chunk *chunk, int64_t rows) {
    const struct ee_model *model = chunk->model;
    double total =
        3 * ee_block_flops(&model->config, rows) * (chunk->last_layer - chunk->first_layer);
    for (int32_t e = 0; e < model->params->exits; e++) {
        double forward, backward;
        ee_exit_flops(model, e, rows, &forward, &backward);
        total += forward + backward;
    }
    return total;
}
