/* Norms and MLPs as blocks and exits use them. */
#include "model/parts.h"

enum ee_status ee_norm_forward(const struct ee_model *model, struct ee_norm_index index,
                               int64_t rows, float *h, float *stats, const float *x) {
    const struct ee_params *params = model->params;
    int64_t width = model->config.hidden_size;
    struct ee_tensor out = ee_matrix(h, rows, width), in = ee_matrix(x, rows, width);
    struct ee_tensor mean = ee_vector(stats, rows), rstd = ee_vector(stats + rows, rows), storage;
    struct ee_tensor weight = ee_param_tensor(params, index.weight, model->weights);
    return ee_norm(model->ctx, &out, stats ? &mean : NULL, stats ? &rstd : NULL, &in, &weight,
                   ee_optional(params, index.bias, model->weights, &storage), &model->config.norm);
}

enum ee_status ee_norm_gradient(const struct ee_model *model, struct ee_norm_index index,
                                struct ee_norm_index into, float *gradient, int64_t rows,
                                float *acc_dx, const float *dh, const float *x,
                                const float *stats) {
    const struct ee_params *params = model->params;
    int64_t width = model->config.hidden_size;
    struct ee_tensor dx = ee_matrix(acc_dx, rows, width), dy = ee_matrix(dh, rows, width);
    struct ee_tensor in = ee_matrix(x, rows, width), storage;
    struct ee_tensor mean = ee_vector(stats, rows), rstd = ee_vector(stats + rows, rows);
    struct ee_tensor weight = ee_param_tensor(params, index.weight, model->weights);
    struct ee_tensor dweight = ee_param_tensor(params, into.weight, gradient);
    return ee_norm_backward(model->ctx, &dx, &dweight,
                            ee_optional(params, into.bias, gradient, &storage), &dy, &in, &weight,
                            &mean, &rstd, &model->config.norm, true);
}

static int64_t up_width(const struct ee_config *c) {
    return (int64_t)c->intermediate_size * (c->gated ? 2 : 1);
}

static int32_t first_up(const struct ee_mlp_index *index) {
    return index->gate >= 0 ? index->gate : index->up;
}

/* The joined bias of gate and up, NULL where there is none. */
static const struct ee_tensor *up_bias(const struct ee_params *params,
                                       const struct ee_mlp_index *index, const float *arena,
                                       struct ee_tensor *storage) {
    if (index->up_bias < 0)
        return NULL;
    int32_t first = index->gate_bias >= 0 ? index->gate_bias : index->up_bias;
    *storage = ee_param_joined(params, first, index->up_bias, arena);
    return storage;
}

enum ee_status ee_mlp_up(const struct ee_model *model, const struct ee_mlp_index *index,
                         int64_t rows, float *up, const float *h) {
    const struct ee_config *c = &model->config;
    struct ee_tensor y = ee_matrix(up, rows, up_width(c)), x = ee_matrix(h, rows, c->hidden_size);
    struct ee_tensor storage;
    struct ee_weight w =
        ee_joined_weight(model->params, first_up(index), index->up, model->weights);
    return ee_linear(model->ctx, &y, &x, &w,
                     up_bias(model->params, index, model->weights, &storage), NULL);
}

enum ee_status ee_mlp_down(const struct ee_model *model, const struct ee_mlp_index *index,
                           const struct ee_batch *batch, int32_t site, float *y, const float *up,
                           const float *residual) {
    const struct ee_config *c = &model->config;
    struct ee_ctx *ctx = model->ctx;
    int64_t rows = batch->rows;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    float *active;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_floats(ctx, &active, rows * c->intermediate_size), done);
    struct ee_tensor a = ee_matrix(active, rows, c->intermediate_size);
    struct ee_tensor u = ee_matrix(up, rows, up_width(c)), storage;
    struct ee_tensor out = ee_matrix(y, rows, c->hidden_size);
    struct ee_tensor res = ee_matrix(residual, rows, c->hidden_size);
    EE_GOTO(status, ee_activation(ctx, &a, &u, c->activation, c->gated), done);
    struct ee_weight w = ee_joined_weight(model->params, index->down, index->down, model->weights);
    const struct ee_tensor *bias =
        ee_optional(model->params, index->down_bias, model->weights, &storage);
    if (!ee_dropout_on(batch, c->residual_dropout)) {
        EE_GOTO(status, ee_linear(ctx, &out, &a, &w, bias, &res), done);
    } else {
        float *product;
        EE_GOTO(status, ee_scratch_floats(ctx, &product, rows * c->hidden_size), done);
        struct ee_tensor p = ee_matrix(product, rows, c->hidden_size);
        struct ee_dropout dropout = ee_dropout_at(batch, c->residual_dropout, site, EE_DROP_MLP);
        EE_GOTO(status, ee_linear(ctx, &p, &a, &w, bias, NULL), done);
        EE_GOTO(status, ee_dropout(ctx, &out, &p, &res, &dropout), done);
    }
done:
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_mlp_gradient(const struct ee_model *model, const struct ee_mlp_index *index,
                               const struct ee_batch *batch, int32_t site, float *gradient,
                               struct ee_weight_queue *queue, float *dh, const float *dy,
                               const float *h, float *up, bool accumulate) {
    const struct ee_config *c = &model->config;
    const struct ee_params *params = model->params;
    struct ee_ctx *ctx = model->ctx;
    int64_t rows = batch->rows, width = c->hidden_size;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    struct ee_tensor d = ee_matrix(dy, rows, width), storage;
    enum ee_status status;
    float *active;
    EE_GOTO(status, ee_queue_buffer(ctx, queue, &active, rows * c->intermediate_size), done);
    if (ee_dropout_on(batch, c->residual_dropout)) {
        float *dropped;
        EE_GOTO(status, ee_queue_buffer(ctx, queue, &dropped, rows * width), done);
        struct ee_dropout dropout = ee_dropout_at(batch, c->residual_dropout, site, EE_DROP_MLP);
        struct ee_tensor t = ee_matrix(dropped, rows, width);
        EE_GOTO(status, ee_dropout(ctx, &t, &d, NULL, &dropout), done);
        d = t;
    }
    struct ee_tensor a = ee_matrix(active, rows, c->intermediate_size);
    struct ee_tensor u = ee_matrix(up, rows, up_width(c));
    struct ee_weight down = ee_joined_weight(params, index->down, index->down, model->weights);
    EE_GOTO(status, ee_linear_backward_input(ctx, &a, &d, &down, false), done);
    /* `active` held the gradient of the activation and now receives the activation itself. */
    EE_GOTO(status, ee_activation_backward(ctx, &u, &a, &a, &u, c->activation, c->gated), done);
    struct ee_tensor ddown = ee_param_tensor(params, index->down, gradient);
    EE_GOTO(status,
            ee_queue_product(ctx, queue, &ddown,
                             ee_optional(params, index->down_bias, gradient, &storage), &d, &a),
            done);
    struct ee_tensor in = ee_matrix(h, rows, width), din = ee_matrix(dh, rows, width);
    struct ee_tensor dup = ee_param_joined(params, first_up(index), index->up, gradient);
    EE_GOTO(status,
            ee_queue_product(ctx, queue, &dup, up_bias(params, index, gradient, &storage), &u, &in),
            done);
    struct ee_weight w = ee_joined_weight(params, first_up(index), index->up, model->weights);
    EE_GOTO(status, ee_linear_backward_input(ctx, &din, &u, &w, accumulate), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}
