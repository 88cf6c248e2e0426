#include "model/block.h"

#include "model/parts.h"

#include <string.h>

struct ee_block_sizes ee_block_sizes(const struct ee_config *c, int64_t rows) {
    int64_t heads = c->num_heads + 2 * c->num_kv_heads;
    struct ee_block_sizes s = {0};
    s.x = rows * c->hidden_size;
    s.stats1 = 2 * rows;
    s.qkv = rows * heads * c->head_dim;
    if (c->qk_norm) {
        s.qk = rows * (c->num_heads + c->num_kv_heads) * c->head_dim;
        s.qk_stats = 2 * rows * (c->num_heads + c->num_kv_heads);
    }
    s.out = rows * c->num_heads * c->head_dim;
    s.lse = rows * c->num_heads;
    if (!c->parallel_residual)
        s.mid = s.x;
    s.stats2 = 2 * rows;
    s.up = rows * c->intermediate_size * (c->gated ? 2 : 1);
    return s;
}

/* Queries, keys and values as views: `raw` are the columns of a joined buffer [N, (H + 2K) D], and
 * q and k are what attention reads. */
struct heads {
    struct ee_tensor raw_q, raw_k, q, k, v;
};

static struct heads head_views(const struct ee_config *c, int64_t rows, const float *qkv,
                               const float *qk) {
    int64_t d = c->head_dim, h = c->num_heads, kv = c->num_kv_heads;
    struct heads v;
    v.raw_q = ee_heads(qkv, rows, h, d, (h + 2 * kv) * d);
    v.raw_k = ee_heads(qkv + h * d, rows, kv, d, (h + 2 * kv) * d);
    v.v = ee_heads(qkv + (h + kv) * d, rows, kv, d, (h + 2 * kv) * d);
    v.q = qk ? ee_heads(qk, rows, h, d, (h + kv) * d) : v.raw_q;
    v.k = qk ? ee_heads(qk + h * d, rows, kv, d, (h + kv) * d) : v.raw_k;
    return v;
}

/* One product for query, key and value; their biases join in one vector or come one by one. */
static enum ee_status qkv_forward(const struct ee_block *block, int64_t rows, float *qkv,
                                  const float *h) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    const struct ee_block_index *index = block->index;
    int64_t width = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    struct ee_tensor x = ee_matrix(h, rows, c->hidden_size);
    if (c->bias_q == c->bias_kv) {
        struct ee_tensor y = ee_matrix(qkv, rows, width), bias;
        struct ee_weight w = ee_joined_weight(model->params, index->q, index->v, model->weights);
        if (c->bias_q)
            bias = ee_param_joined(model->params, index->q_bias, index->v_bias, model->weights);
        return ee_linear(model->ctx, &y, &x, &w, c->bias_q ? &bias : NULL, NULL);
    }
    const int32_t weights[] = {index->q, index->k, index->v};
    const int32_t biases[] = {index->q_bias, index->k_bias, index->v_bias};
    int64_t column = 0;
    for (int i = 0; i < 3; i++) {
        struct ee_weight w =
            ee_joined_weight(model->params, weights[i], weights[i], model->weights);
        struct ee_tensor y = ee_matrix_strided(qkv + column, rows, w.rows, width), storage;
        EE_TRY(ee_linear(model->ctx, &y, &x, &w,
                         ee_optional(model->params, biases[i], model->weights, &storage), NULL));
        column += w.rows;
    }
    return EE_OK;
}

static enum ee_status qkv_weight_gradient(const struct ee_block *block, int64_t rows,
                                          const float *dqkv, const float *h) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    const struct ee_block_index *index = block->index;
    int64_t width = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    struct ee_tensor x = ee_matrix(h, rows, c->hidden_size), bias;
    if (c->bias_q == c->bias_kv) {
        struct ee_tensor dy = ee_matrix(dqkv, rows, width);
        struct ee_tensor dw = ee_param_joined(model->params, index->q, index->v, block->gradient);
        if (c->bias_q)
            bias = ee_param_joined(model->params, index->q_bias, index->v_bias, block->gradient);
        return ee_queue_product(model->ctx, block->queue, &dw, c->bias_q ? &bias : NULL, &dy, &x);
    }
    const int32_t weights[] = {index->q, index->k, index->v};
    const int32_t biases[] = {index->q_bias, index->k_bias, index->v_bias};
    int64_t column = 0;
    for (int i = 0; i < 3; i++) {
        struct ee_tensor dw = ee_param_tensor(model->params, weights[i], block->gradient);
        struct ee_tensor dy = ee_matrix_strided(dqkv + column, rows, dw.shape[0], width);
        EE_TRY(ee_queue_product(model->ctx, block->queue, &dw,
                                ee_optional(model->params, biases[i], block->gradient, &bias), &dy,
                                &x));
        column += dw.shape[0];
    }
    return EE_OK;
}

/* Statistics of the head norms: queries first, then keys, each [2, N * heads]. */
static enum ee_status norm_heads(const struct ee_block *block, int64_t rows,
                                 const struct ee_block_acts *acts, const struct heads *v) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    const struct ee_tensor *raw[] = {&v->raw_q, &v->raw_k}, *out[] = {&v->q, &v->k};
    const int32_t weights[] = {block->index->q_norm.weight, block->index->k_norm.weight};
    float *stats = acts->qk_stats;
    for (int i = 0; i < 2; i++) {
        int64_t n = rows * raw[i]->shape[1];
        struct ee_tensor mean = ee_vector(stats, n), rstd = ee_vector(stats + n, n);
        struct ee_tensor weight = ee_param_tensor(model->params, weights[i], model->weights);
        EE_TRY(ee_norm(model->ctx, out[i], &mean, &rstd, raw[i], &weight, NULL, &c->norm));
        stats += 2 * n;
    }
    return EE_OK;
}

static enum ee_status norm_heads_gradient(const struct ee_block *block, int64_t rows,
                                          const struct ee_block_acts *acts, const struct heads *v,
                                          const struct heads *d) {
    const struct ee_model *model = block->model;
    const struct ee_tensor *raw[] = {&v->raw_q, &v->raw_k}, *grad[] = {&d->q, &d->k};
    const int32_t weights[] = {block->index->q_norm.weight, block->index->k_norm.weight};
    const float *stats = acts->qk_stats;
    for (int i = 0; i < 2; i++) {
        int64_t n = rows * raw[i]->shape[1];
        struct ee_tensor mean = ee_vector(stats, n), rstd = ee_vector(stats + n, n);
        struct ee_tensor weight = ee_param_tensor(model->params, weights[i], model->weights);
        struct ee_tensor dweight = ee_param_tensor(model->params, weights[i], block->gradient);
        EE_TRY(ee_norm_backward(model->ctx, grad[i], &dweight, NULL, grad[i], raw[i], &weight,
                                &mean, &rstd, &model->config.norm, false));
        stats += 2 * n;
    }
    return EE_OK;
}

static enum ee_status rotate_heads(const struct ee_block *block, const struct ee_batch *batch,
                                   const struct heads *v, bool inverse) {
    const struct ee_model *model = block->model;
    if (model->config.positions != EE_POSITIONS_ROPE)
        return EE_OK;
    struct ee_rope rope = ee_model_rope(model);
    EE_TRY(ee_rotate(model->ctx, &v->q, batch->position, &rope, inverse));
    return ee_rotate(model->ctx, &v->k, batch->position, &rope, inverse);
}

static struct ee_attention_params attention_params(const struct ee_block *block,
                                                   const struct ee_batch *batch,
                                                   struct ee_dropout *dropout) {
    const struct ee_model *model = block->model;
    struct ee_attention_params params = ee_model_attention(model, block->layer);
    *dropout =
        ee_dropout_at(batch, model->config.attention_dropout, block->site, EE_DROP_ATTENTION);
    if (ee_dropout_on(batch, dropout->p))
        params.dropout = dropout;
    return params;
}

/* From acts->x to acts->out; h[N, C] receives norm1(x). */
static enum ee_status attention_core(const struct ee_block *block, const struct ee_batch *batch,
                                     const struct ee_block_acts *acts, float *h) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    int64_t n = batch->rows;
    EE_TRY(ee_norm_forward(model, block->index->norm1, n, h, acts->stats1, acts->x));
    EE_TRY(qkv_forward(block, n, acts->qkv, h));
    struct heads v = head_views(c, n, acts->qkv, c->qk_norm ? acts->qk : NULL);
    if (c->qk_norm)
        EE_TRY(norm_heads(block, n, acts, &v));
    EE_TRY(rotate_heads(block, batch, &v, false));
    struct ee_tensor out =
        ee_heads(acts->out, n, c->num_heads, c->head_dim, (int64_t)c->num_heads * c->head_dim);
    struct ee_tensor lse = ee_matrix(acts->lse, n, c->num_heads);
    struct ee_dropout dropout;
    struct ee_attention_params params = attention_params(block, batch, &dropout);
    return ee_attention(model->ctx, &out, &lse, &v.q, &v.k, &v.v, batch->segment, batch->segments,
                        &params);
}

/* y = acts->x + projection of acts->out. */
static enum ee_status attention_out(const struct ee_block *block, const struct ee_batch *batch,
                                    const struct ee_block_acts *acts, float *y) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    struct ee_ctx *ctx = model->ctx;
    int64_t n = batch->rows;
    struct ee_tensor out = ee_matrix(y, n, c->hidden_size), storage;
    struct ee_tensor residual = ee_matrix(acts->x, n, c->hidden_size);
    struct ee_tensor a = ee_matrix(acts->out, n, (int64_t)c->num_heads * c->head_dim);
    struct ee_weight w =
        ee_joined_weight(model->params, block->index->o, block->index->o, model->weights);
    const struct ee_tensor *bias =
        ee_optional(model->params, block->index->o_bias, model->weights, &storage);
    if (!ee_dropout_on(batch, c->residual_dropout))
        return ee_linear(ctx, &out, &a, &w, bias, &residual);
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *product;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_floats(ctx, &product, n * c->hidden_size), done);
    struct ee_tensor p = ee_matrix(product, n, c->hidden_size);
    struct ee_dropout dropout =
        ee_dropout_at(batch, c->residual_dropout, block->site, EE_DROP_RESIDUAL);
    EE_GOTO(status, ee_linear(ctx, &p, &a, &w, bias, NULL), done);
    EE_GOTO(status, ee_dropout(ctx, &out, &p, &residual, &dropout), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

/* Fills stats2 and up; h holds norm1(x) on entry, for blocks that share the norm. */
static enum ee_status mlp_core(const struct ee_block *block, const struct ee_batch *batch,
                               const struct ee_block_acts *acts, float *h) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    if (!c->shared_norm) {
        const float *in = c->parallel_residual ? acts->x : acts->mid;
        EE_TRY(ee_norm_forward(model, block->index->norm2, batch->rows, h, acts->stats2, in));
    }
    return ee_mlp_up(model, &block->index->mlp, batch->rows, acts->up, h);
}

enum ee_status ee_block_forward(const struct ee_block *block, const struct ee_batch *batch,
                                const struct ee_block_acts *acts, float *y) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    struct ee_ctx *ctx = model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h;
    float *mid = c->parallel_residual ? y : acts->mid;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_floats(ctx, &h, batch->rows * c->hidden_size), done);
    EE_GOTO(status, attention_core(block, batch, acts, h), done);
    EE_GOTO(status, attention_out(block, batch, acts, mid), done);
    EE_GOTO(status, mlp_core(block, batch, acts, h), done);
    EE_GOTO(status, ee_mlp_down(model, &block->index->mlp, batch, block->site, y, acts->up, mid),
            done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_block_recompute_attention(const struct ee_block *block,
                                            const struct ee_batch *batch,
                                            const struct ee_block_acts *acts) {
    struct ee_ctx *ctx = block->model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h;
    enum ee_status status =
        ee_scratch_floats(ctx, &h, batch->rows * block->model->config.hidden_size);
    if (status == EE_OK)
        status = attention_core(block, batch, acts, h);
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_block_recompute(const struct ee_block *block, const struct ee_batch *batch,
                                  const struct ee_block_acts *acts) {
    struct ee_ctx *ctx = block->model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_floats(ctx, &h, batch->rows * block->model->config.hidden_size),
            done);
    EE_GOTO(status, attention_core(block, batch, acts, h), done);
    if (acts->mid)
        EE_GOTO(status, attention_out(block, batch, acts, acts->mid), done);
    EE_GOTO(status, mlp_core(block, batch, acts, h), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

/* Gradient of the attention half: dh[N, C] = (or +=) the gradient of norm1's output, from dy, the
 * gradient of the output of the projection. h holds norm1(x). */
static enum ee_status attention_gradient(const struct ee_block *block, const struct ee_batch *batch,
                                         const struct ee_block_acts *acts, float *dh,
                                         const float *dy, const float *h, bool accumulate) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    const struct ee_params *params = model->params;
    struct ee_ctx *ctx = model->ctx;
    int64_t n = batch->rows, out_width = (int64_t)c->num_heads * c->head_dim;
    int64_t qkv_width = out_width + 2 * (int64_t)c->num_kv_heads * c->head_dim;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *dqkv, *dout;
    struct ee_tensor d = ee_matrix(dy, n, c->hidden_size), storage;
    enum ee_status status;
    EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &dqkv, n * qkv_width), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &dout, n * out_width), done);
    if (ee_dropout_on(batch, c->residual_dropout)) {
        float *dropped;
        EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &dropped, n * c->hidden_size), done);
        struct ee_tensor t = ee_matrix(dropped, n, c->hidden_size);
        struct ee_dropout dropout =
            ee_dropout_at(batch, c->residual_dropout, block->site, EE_DROP_RESIDUAL);
        EE_GOTO(status, ee_dropout(ctx, &t, &d, NULL, &dropout), done);
        d = t;
    }
    struct ee_tensor a = ee_matrix(acts->out, n, out_width), da = ee_matrix(dout, n, out_width);
    struct ee_weight o = ee_joined_weight(params, block->index->o, block->index->o, model->weights);
    struct ee_tensor dwo = ee_param_tensor(params, block->index->o, block->gradient);
    EE_GOTO(status, ee_linear_backward_input(ctx, &da, &d, &o, false), done);
    EE_GOTO(status,
            ee_queue_product(ctx, block->queue, &dwo,
                             ee_optional(params, block->index->o_bias, block->gradient, &storage),
                             &d, &a),
            done);
    struct heads v = head_views(c, n, acts->qkv, c->qk_norm ? acts->qk : NULL);
    struct heads g = head_views(c, n, dqkv, NULL);
    struct ee_tensor out = ee_heads(acts->out, n, c->num_heads, c->head_dim, out_width);
    struct ee_tensor dheads = ee_heads(dout, n, c->num_heads, c->head_dim, out_width);
    struct ee_tensor lse = ee_matrix(acts->lse, n, c->num_heads);
    struct ee_dropout dropout;
    struct ee_attention_params attention = attention_params(block, batch, &dropout);
    EE_GOTO(status,
            ee_attention_backward(ctx, &g.q, &g.k, &g.v, &dheads, &out, &lse, &v.q, &v.k, &v.v,
                                  batch->segment, batch->segments, &attention),
            done);
    EE_GOTO(status, rotate_heads(block, batch, &g, true), done);
    if (c->qk_norm)
        EE_GOTO(status, norm_heads_gradient(block, n, acts, &v, &g), done);
    EE_GOTO(status, qkv_weight_gradient(block, n, dqkv, h), done);
    struct ee_tensor din = ee_matrix(dh, n, c->hidden_size), dy_qkv = ee_matrix(dqkv, n, qkv_width);
    struct ee_weight w = ee_joined_weight(params, block->index->q, block->index->v, model->weights);
    EE_GOTO(status, ee_linear_backward_input(ctx, &din, &dy_qkv, &w, accumulate), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

/* Both halves of a parallel block read the same gradient dy, which is also that of the residual. */
static enum ee_status backward_parallel(const struct ee_block *block, const struct ee_batch *batch,
                                        const struct ee_block_acts *acts, float *dx) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    struct ee_ctx *ctx = model->ctx;
    int64_t n = batch->rows, size = n * c->hidden_size;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h, *dh, *dy;
    enum ee_status status;
    EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &h, size), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &dh, size), done);
    EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &dy, size), done);
    memcpy(dy, dx, (size_t)size * sizeof *dy);
    bool shared = c->shared_norm;
    EE_GOTO(
        status,
        ee_norm_forward(model, block->index->norm2, n, h, shared ? NULL : acts->stats2, acts->x),
        done);
    EE_GOTO(status,
            ee_mlp_gradient(model, &block->index->mlp, batch, block->site, block->gradient,
                            block->queue, dh, dy, h, acts->up, false),
            done);
    if (!shared) {
        EE_GOTO(status,
                ee_norm_gradient(model, block->index->norm2, block->index->norm2, block->gradient,
                                 n, dx, dh, acts->x, acts->stats2),
                done);
        /* A queue still needs the other norm's output. */
        if (block->queue)
            EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &h, size), done);
        EE_GOTO(status, ee_norm_forward(model, block->index->norm1, n, h, NULL, acts->x), done);
    }
    EE_GOTO(status, attention_gradient(block, batch, acts, dh, dy, h, shared), done);
    EE_GOTO(status,
            ee_norm_gradient(model, block->index->norm1, block->index->norm1, block->gradient, n,
                             dx, dh, acts->x, acts->stats1),
            done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_block_backward_mlp(const struct ee_block *block, const struct ee_batch *batch,
                                     const struct ee_block_acts *acts, float *dx) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    if (c->parallel_residual)
        return backward_parallel(block, batch, acts, dx);
    struct ee_ctx *ctx = model->ctx;
    int64_t n = batch->rows, size = n * c->hidden_size;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h, *dh;
    enum ee_status status;
    EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &h, size), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &dh, size), done);
    EE_GOTO(status, ee_norm_forward(model, block->index->norm2, n, h, acts->stats2, acts->mid),
            done);
    EE_GOTO(status,
            ee_mlp_gradient(model, &block->index->mlp, batch, block->site, block->gradient,
                            block->queue, dh, dx, h, acts->up, false),
            done);
    EE_GOTO(status,
            ee_norm_gradient(model, block->index->norm2, block->index->norm2, block->gradient, n,
                             dx, dh, acts->mid, acts->stats2),
            done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_block_backward_attention(const struct ee_block *block,
                                           const struct ee_batch *batch,
                                           const struct ee_block_acts *acts, float *dx) {
    const struct ee_model *model = block->model;
    const struct ee_config *c = &model->config;
    if (c->parallel_residual)
        return EE_OK;
    struct ee_ctx *ctx = model->ctx;
    int64_t n = batch->rows, size = n * c->hidden_size;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *h, *dh;
    enum ee_status status;
    EE_GOTO(status, ee_queue_buffer(ctx, block->queue, &h, size), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &dh, size), done);
    EE_GOTO(status, ee_norm_forward(model, block->index->norm1, n, h, acts->stats1, acts->x), done);
    EE_GOTO(status, attention_gradient(block, batch, acts, dh, dx, h, false), done);
    EE_GOTO(status,
            ee_norm_gradient(model, block->index->norm1, block->index->norm1, block->gradient, n,
                             dx, dh, acts->x, acts->stats1),
            done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}
