#include "infer/head.h"

#include <math.h>
#include <string.h>

enum ee_status ee_head_fill(struct ee_runner *r, int32_t exit) {
    const struct ee_config *c = &r->model->config;
    const struct ee_exit_weights *e = &r->weights->exits[exit];
    const struct ee_rows *rows = &r->rows;
    int64_t n = rows->count, D = c->head_dim, width = 2 * c->num_kv_heads * D;
    if (e->side < 0 || n == 0 || r->half_layer_seconds > 0)
        return EE_OK;
    const struct ee_block_weights *w = &e->block;
    struct ee_tensor normed = ee_matrix(r->normed, n, c->hidden_size);
    struct ee_tensor kv = ee_matrix(r->qkv, n, width);
    struct ee_tensor k = ee_heads(r->qkv, n, c->num_kv_heads, D, width);
    struct ee_tensor v = ee_heads(r->qkv + width / 2, n, c->num_kv_heads, D, width);
    EE_TRY(ee_runner_norm(r, r->normed, rows->x, n, &w->norm1));
    EE_TRY(ee_runner_linear(r, &kv, &normed, &w->kv, &w->kv_bias, NULL));
    EE_TRY(ee_runner_project(r, &k, &w->k_norm, rows->position));
    return ee_cache_write(r->model->ctx, r->cache, e->side, &k, &v, rows->sequence, rows->position);
}

/* The rest of a block whose keys and values are in the cache, on head_x in place. */
static enum ee_status run_block(struct ee_runner *r, const struct ee_exit_weights *e, int64_t n) {
    const struct ee_config *c = &r->model->config;
    const struct ee_block_weights *w = &e->block;
    struct ee_ctx *ctx = r->model->ctx;
    struct ee_tensor normed = ee_matrix(r->normed, n, c->hidden_size);
    struct ee_tensor x = ee_matrix(r->head_x, n, c->hidden_size);
    struct ee_tensor q_flat = ee_matrix(r->qkv, n, w->q.rows);
    struct ee_tensor q = ee_heads(r->qkv, n, c->num_heads, c->head_dim, w->q.rows);
    struct ee_tensor flat = ee_matrix(r->heads, n, w->o.cols);
    struct ee_tensor heads = ee_heads(r->heads, n, c->num_heads, c->head_dim, w->o.cols);
    struct ee_kv kv = ee_cache_layer(r->cache, e->side);
    struct ee_attention_params attention = ee_model_attention(r->model, e->layer);
    EE_TRY(ee_runner_norm(r, r->normed, r->head_x, n, &w->norm1));
    EE_TRY(ee_runner_linear(r, &q_flat, &normed, &w->q, &w->q_bias, NULL));
    EE_TRY(ee_runner_project(r, &q, &w->q_norm, r->head_position));
    EE_TRY(ee_attention_rows(ctx, &heads, &q, &kv, r->head_sequence, r->head_position, &attention));
    const float *mlp_in = r->normed;
    if (r->two_norms) {
        EE_TRY(ee_runner_norm(r, r->normed2, r->head_x, n, &w->norm2));
        mlp_in = r->normed2;
    }
    EE_TRY(ee_runner_linear(r, &x, &flat, &w->o, &w->o_bias, &x));
    if (!c->parallel_residual)
        EE_TRY(ee_runner_norm(r, r->normed, r->head_x, n, &w->norm2));
    return ee_runner_mlp(r, r->head_x, mlp_in, r->head_x, n, &w->mlp);
}

static enum ee_status run_branch(struct ee_runner *r, const struct ee_exit_weights *e, int64_t n) {
    if (e->branch == EE_BRANCH_BLOCK)
        return run_block(r, e, n);
    if (e->branch == EE_BRANCH_NONE)
        return EE_OK;
    /* Parallel to the MLP of its layer, behind the same norm. */
    const struct ee_block_weights *layer = &r->weights->layers[e->layer];
    EE_TRY(ee_runner_norm(r, r->normed, r->head_x, n, &layer->norm2));
    return ee_runner_mlp(r, r->head_x, r->normed, r->head_x, n, &e->mlp);
}

/* In place of computing: every token is as likely as any other. */
static void say_nothing(struct ee_runner *r, int64_t n) {
    int32_t vocab = r->model->config.vocab_size;
    memset(r->logits, 0, (size_t)(n * vocab) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        r->head_token[i] = 0;
        r->confidence[i] = 1 / (float)vocab;
        r->lse[i] = logf((float)vocab);
    }
}

enum ee_status ee_head_run(struct ee_runner *r, int32_t exit, const int32_t *index, int64_t n) {
    const struct ee_config *c = &r->model->config;
    const struct ee_exit_weights *e = &r->weights->exits[exit];
    EE_ASSERT(n <= r->head_capacity);
    if (n == 0)
        return EE_OK;
    int64_t C = c->hidden_size;
    for (int64_t i = 0; i < n; i++) {
        memcpy(r->head_x + i * C, r->rows.x + index[i] * C, (size_t)C * sizeof(float));
        r->head_sequence[i] = r->rows.sequence[index[i]];
        r->head_position[i] = r->rows.position[index[i]];
    }
    r->head_rows += n;
    if (r->half_layer_seconds > 0) {
        say_nothing(r, n);
        return EE_OK;
    }
    EE_TRY(run_branch(r, e, n));
    if (e->norm.weight.data)
        EE_TRY(ee_runner_norm(r, r->head_x, r->head_x, n, &e->norm));
    struct ee_tensor x = ee_matrix(r->head_x, n, C);
    struct ee_tensor logits = ee_matrix(r->logits, n, c->vocab_size);
    EE_TRY(ee_runner_linear(r, &logits, &x, &e->output, NULL, NULL));
    if (c->logit_softcap > 0)
        EE_TRY(ee_softcap(r->model->ctx, &logits, c->logit_softcap));
    struct ee_tensor confidence = ee_vector(r->confidence, n), lse = ee_vector(r->lse, n);
    return ee_confidence(r->model->ctx, r->head_token, &confidence, &lse, &logits);
}
