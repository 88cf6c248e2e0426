#define _GNU_SOURCE
#include "infer/rows.h"

#include "base/clock.h"

#include <string.h>

/* -- The batch -- */

/* Cuts the arrays for the runner's capacities from its arena. */
static enum ee_status lay_out(struct ee_runner *r) {
    const struct ee_config *c = &r->model->config;
    int64_t rows = r->rows.capacity, head_rows = r->head_capacity;
    int64_t C = c->hidden_size, F = c->intermediate_size;
    int64_t attention = (int64_t)c->num_heads * c->head_dim;
    int64_t joined = attention + 2 * (int64_t)c->num_kv_heads * c->head_dim;
    const struct {
        float **out;
        int64_t rows, width;
    } floats[] = {
        {&r->rows.x, rows, C},
        {&r->normed, rows, C},
        {&r->normed2, r->two_norms ? rows : 0, C},
        {&r->qkv, rows, joined},
        {&r->heads, rows, attention},
        {&r->up, rows, c->gated ? 2 * F : F},
        {&r->inner, rows, F},
        {&r->head_x, head_rows, C},
        {&r->logits, head_rows, c->vocab_size},
        {&r->confidence, head_rows, 1},
        {&r->lse, head_rows, 1},
    };
    void *memory;
    for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++) {
        EE_TRY(ee_arena_take(&r->arena, &memory, floats[i].rows,
                             (size_t)floats[i].width * sizeof(float)));
        *floats[i].out = memory;
    }
    const struct {
        int32_t **out;
        int64_t rows;
    } integers[] = {
        {&r->rows.sequence, rows},      {&r->rows.position, rows},
        {&r->rows.token, rows},         {&r->looked, rows},
        {&r->head_token, head_rows},    {&r->head_sequence, head_rows},
        {&r->head_position, head_rows},
    };
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        EE_TRY(ee_arena_take(&r->arena, &memory, integers[i].rows, sizeof(int32_t)));
        *integers[i].out = memory;
    }
    EE_TRY(ee_arena_take(&r->arena, &memory, rows, sizeof *r->rows.kind));
    r->rows.kind = memory;
    return EE_OK;
}

struct ee_runner ee_runner_init(const struct ee_model *model, const struct ee_weights *weights,
                                struct ee_cache *cache) {
    const struct ee_config *c = &model->config;
    struct ee_runner r = {.model = model, .weights = weights, .cache = cache};
    r.first_depth = 2 * weights->first_layer;
    r.two_norms = c->parallel_residual && !c->shared_norm;
    r.fill_depth = 2 * c->num_layers - 1;
    for (int32_t e = 0; e < weights->exit_count; e++)
        if (weights->exits[e].side >= 0 && weights->exits[e].depth > r.fill_depth)
            r.fill_depth = weights->exits[e].depth;
    ee_arena_init(&r.arena, "the rows of a decoding step");
    return r;
}

void ee_runner_free(struct ee_runner *r) {
    ee_arena_free(&r->arena);
}

enum ee_status ee_runner_reserve(struct ee_runner *r, int64_t rows, int64_t head_rows) {
    if (rows <= r->rows.capacity && head_rows <= r->head_capacity)
        return EE_OK;
    /* A copy grows, so that after a failure the sequences in flight still have their memory. */
    struct ee_runner larger = *r;
    larger.rows.count = 0;
    larger.rows.capacity = ee_max(rows, r->rows.capacity);
    larger.head_capacity = ee_max(head_rows, r->head_capacity);
    ee_arena_init(&larger.arena, r->arena.what);
    EE_TRY(lay_out(&larger));
    EE_TRY(ee_arena_bind(&larger.arena, 0));
    enum ee_status status = lay_out(&larger);
    if (status != EE_OK) {
        ee_arena_free(&larger.arena);
        return status;
    }
    ee_arena_free(&r->arena);
    *r = larger;
    return EE_OK;
}

int64_t ee_rows_add(struct ee_rows *rows, int32_t sequence, int32_t position,
                    enum ee_row_kind kind) {
    EE_ASSERT(rows->count < rows->capacity);
    int64_t i = rows->count++;
    rows->sequence[i] = sequence;
    rows->position[i] = position;
    rows->kind[i] = kind;
    return i;
}

static void move_row(struct ee_rows *rows, int64_t to, int64_t from, int64_t width) {
    memcpy(rows->x + to * width, rows->x + from * width, (size_t)width * sizeof(float));
    rows->sequence[to] = rows->sequence[from];
    rows->position[to] = rows->position[from];
    rows->kind[to] = rows->kind[from];
}

void ee_rows_remove(struct ee_rows *rows, int64_t i, int32_t width) {
    int64_t last = --rows->count;
    if (i != last)
        move_row(rows, i, last, width);
}

enum ee_status ee_rows_embed(struct ee_runner *r) {
    const struct ee_rows *rows = &r->rows;
    if (r->half_layer_seconds > 0)
        return EE_OK;
    struct ee_tensor x = ee_matrix(rows->x, rows->count, r->model->config.hidden_size);
    return ee_embed(r->model->ctx, &x, &r->weights->embedding, ee_given(&r->weights->positions),
                    rows->token, rows->position, r->model->config.embedding_scale);
}

/* -- Parts of a layer -- */

enum ee_status ee_runner_linear(struct ee_runner *r, const struct ee_tensor *y,
                                const struct ee_tensor *x, const struct ee_weight *w,
                                const struct ee_tensor *bias, const struct ee_tensor *residual) {
    if (x->shape[0] > 0)
        r->bytes_read += (int64_t)ee_weight_bytes(w->dtype, w->layout, w->rows, w->cols);
    return ee_linear(r->model->ctx, y, x, w, bias ? ee_given(bias) : NULL, residual);
}

enum ee_status ee_runner_norm(struct ee_runner *r, float *y, const float *x, int64_t n,
                              const struct ee_norm_weights *norm) {
    int64_t C = r->model->config.hidden_size;
    struct ee_tensor out = ee_matrix(y, n, C), in = ee_matrix(x, n, C);
    return ee_norm(r->model->ctx, &out, NULL, NULL, &in, &norm->weight, ee_given(&norm->bias),
                   &r->model->config.norm);
}

enum ee_status ee_runner_project(struct ee_runner *r, const struct ee_tensor *heads,
                                 const struct ee_norm_weights *norm, const int32_t *position) {
    const struct ee_config *c = &r->model->config;
    if (norm->weight.data)
        EE_TRY(ee_norm(r->model->ctx, heads, NULL, NULL, heads, &norm->weight, NULL, &c->norm));
    if (c->positions != EE_POSITIONS_ROPE)
        return EE_OK;
    struct ee_rope rope = ee_model_rope(r->model);
    return ee_rotate(r->model->ctx, heads, position, &rope, false);
}

enum ee_status ee_runner_mlp(struct ee_runner *r, float *out, const float *normed,
                             const float *residual, int64_t n, const struct ee_mlp_weights *mlp) {
    const struct ee_config *c = &r->model->config;
    struct ee_tensor x = ee_matrix(normed, n, c->hidden_size);
    struct ee_tensor up = ee_matrix(r->up, n, mlp->up.rows);
    struct ee_tensor inner = ee_matrix(r->inner, n, c->intermediate_size);
    struct ee_tensor y = ee_matrix(out, n, c->hidden_size);
    struct ee_tensor base = ee_matrix(residual, n, c->hidden_size);
    EE_TRY(ee_runner_linear(r, &up, &x, &mlp->up, &mlp->up_bias, NULL));
    EE_TRY(ee_activation(r->model->ctx, &inner, &up, c->activation, c->gated));
    return ee_runner_linear(r, &y, &inner, &mlp->down, &mlp->down_bias, &base);
}

/* -- A layer -- */

/* Drops the rows that need nothing past the keys and values just written, from the batch and from
 * what the layer holds of them. */
static void drop_filled(struct ee_runner *r, int64_t joined) {
    struct ee_rows *rows = &r->rows;
    int64_t C = r->model->config.hidden_size, kept = 0;
    for (int64_t i = 0; i < rows->count; i++) {
        if (rows->kind[i] == EE_ROW_FILL)
            continue;
        if (kept < i) {
            move_row(rows, kept, i, C);
            memcpy(r->qkv + kept * joined, r->qkv + i * joined, (size_t)joined * sizeof(float));
            memcpy(r->normed + kept * C, r->normed + i * C, (size_t)C * sizeof(float));
        }
        kept++;
    }
    rows->count = kept;
}

/* Queries, keys and values of all rows; the latter two go to the cache. */
static enum ee_status project_layer(struct ee_runner *r, int32_t layer) {
    const struct ee_config *c = &r->model->config;
    const struct ee_block_weights *w = &r->weights->layers[layer];
    const struct ee_rows *rows = &r->rows;
    int64_t n = rows->count, D = c->head_dim, joined = w->qkv.rows;
    struct ee_tensor normed = ee_matrix(r->normed, n, c->hidden_size);
    struct ee_tensor qkv = ee_matrix(r->qkv, n, joined);
    float *k_data = r->qkv + c->num_heads * D, *v_data = k_data + c->num_kv_heads * D;
    struct ee_tensor q = ee_heads(r->qkv, n, c->num_heads, D, joined);
    struct ee_tensor k = ee_heads(k_data, n, c->num_kv_heads, D, joined);
    struct ee_tensor v = ee_heads(v_data, n, c->num_kv_heads, D, joined);
    EE_TRY(ee_runner_norm(r, r->normed, rows->x, n, &w->norm1));
    EE_TRY(ee_runner_linear(r, &qkv, &normed, &w->qkv, &w->qkv_bias, NULL));
    EE_TRY(ee_runner_project(r, &q, &w->q_norm, rows->position));
    EE_TRY(ee_runner_project(r, &k, &w->k_norm, rows->position));
    return ee_cache_write(r->model->ctx, r->cache, layer - r->weights->first_layer, &k, &v,
                          rows->sequence, rows->position);
}

/* From before the attention of a layer to before its MLP. With parallel residual, what the MLP is
 * to read is computed here, while the layer's input still stands. */
static enum ee_status attention_half(struct ee_runner *r, int32_t layer) {
    const struct ee_config *c = &r->model->config;
    const struct ee_block_weights *w = &r->weights->layers[layer];
    struct ee_rows *rows = &r->rows;
    EE_TRY(project_layer(r, layer));
    if (rows->depth + 1 == r->fill_depth)
        drop_filled(r, w->qkv.rows);
    int64_t n = rows->count;
    if (n == 0)
        return EE_OK;
    if (r->two_norms)
        EE_TRY(ee_runner_norm(r, r->normed2, rows->x, n, &w->norm2));
    struct ee_tensor q = ee_heads(r->qkv, n, c->num_heads, c->head_dim, w->qkv.rows);
    struct ee_tensor heads = ee_heads(r->heads, n, c->num_heads, c->head_dim, w->o.cols);
    struct ee_tensor flat = ee_matrix(r->heads, n, w->o.cols);
    struct ee_tensor x = ee_matrix(rows->x, n, c->hidden_size);
    struct ee_kv kv = ee_cache_layer(r->cache, layer - r->weights->first_layer);
    struct ee_attention_params attention = ee_model_attention(r->model, layer);
    EE_TRY(ee_attention_rows(r->model->ctx, &heads, &q, &kv, rows->sequence, rows->position,
                             &attention));
    return ee_runner_linear(r, &x, &flat, &w->o, &w->o_bias, &x);
}

static enum ee_status mlp_half(struct ee_runner *r, int32_t layer) {
    const struct ee_config *c = &r->model->config;
    const struct ee_block_weights *w = &r->weights->layers[layer];
    const float *normed = r->two_norms ? r->normed2 : r->normed;
    if (!c->parallel_residual)
        EE_TRY(ee_runner_norm(r, r->normed, r->rows.x, r->rows.count, &w->norm2));
    return ee_runner_mlp(r, r->rows.x, normed, r->rows.x, r->rows.count, &w->mlp);
}

/* A sleep lasts longer than it was to by up to so much; the rest of a wait is spent awake. */
#define SLEEP_ERROR 300e-6

/* In place of computing. */
static void wait_for_depth(struct ee_runner *r, int32_t depth) {
    int32_t passed = depth - r->first_depth;
    if (r->rows.depth == r->first_depth)
        r->pass_start = ee_now();
    r->rows.depth = (int32_t)ee_max(depth, r->rows.depth);
    double until = r->pass_start + r->half_layer_seconds * passed, left;
    while ((left = until - ee_now()) > 0)
        if (left > SLEEP_ERROR)
            ee_sleep(left - SLEEP_ERROR);
}

enum ee_status ee_rows_run(struct ee_runner *r, int32_t depth) {
    if (r->half_layer_seconds > 0) {
        if (r->rows.count > 0)
            wait_for_depth(r, depth);
        return EE_OK;
    }
    for (struct ee_rows *rows = &r->rows; rows->depth < depth; rows->depth++) {
        if (rows->count == 0)
            continue;
        r->half_layers += rows->count;
        int32_t layer = rows->depth / 2;
        EE_TRY(rows->depth % 2 == 0 ? attention_half(r, layer) : mlp_half(r, layer));
    }
    return EE_OK;
}
