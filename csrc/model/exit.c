#include "model/exit.h"

#include "model/parts.h"

#include <string.h>

/* Rows of a chunk: equal shares of N of which each keeps to EE_LOGIT_BYTES. */
static int64_t chunk_rows(int64_t rows, int64_t vocab) {
    int64_t most = ee_max(1, EE_LOGIT_BYTES / (vocab * (int64_t)sizeof(float)));
    return ee_ceil_div(rows, ee_ceil_div(rows, most));
}

/* Buffers of the chunk loop. */
struct chunk_buffers {
    float *h;          /* [R, C] input of the output matrix, when there is a norm */
    float *dh;         /* [R, C] its gradient */
    float *stats;      /* [2, R] of the norm */
    float *logits;     /* [R, V] */
    float *loss;       /* [R] */
    float *confidence; /* [R] */
    float *row_weight; /* [R] */
};

static enum ee_status take_buffers(const struct ee_model *model, struct chunk_buffers *b,
                                   int64_t rows) {
    struct ee_ctx *ctx = model->ctx;
    const struct ee_config *c = &model->config;
    EE_TRY(ee_scratch_floats(ctx, &b->h, rows * c->hidden_size));
    EE_TRY(ee_scratch_floats(ctx, &b->dh, rows * c->hidden_size));
    EE_TRY(ee_scratch_floats(ctx, &b->stats, 2 * rows));
    EE_TRY(ee_scratch_floats(ctx, &b->logits, rows * c->vocab_size));
    EE_TRY(ee_scratch_floats(ctx, &b->loss, rows));
    EE_TRY(ee_scratch_floats(ctx, &b->confidence, rows));
    return ee_scratch_floats(ctx, &b->row_weight, rows);
}

/* Forward-only outputs of a chunk that starts at row `first`. */
static enum ee_status read_logits(const struct ee_model *model, const struct ee_exit_run *run,
                                  const struct chunk_buffers *b, int64_t first, int64_t rows) {
    const struct ee_config *c = &model->config;
    if (!run->logits && !run->token)
        return EE_OK;
    int64_t vocab = c->vocab_size;
    float *logits = b->logits;
    if (run->logits) {
        logits = run->logits + first * vocab;
        memcpy(logits, b->logits, (size_t)(rows * vocab) * sizeof(float));
    }
    struct ee_tensor t = ee_matrix(logits, rows, vocab);
    if (c->logit_softcap > 0)
        EE_TRY(ee_softcap(model->ctx, &t, c->logit_softcap));
    if (!run->token)
        return EE_OK;
    struct ee_tensor confidence = ee_vector(run->confidence + first, rows);
    struct ee_tensor lse = ee_vector(b->loss, rows);
    return ee_confidence(model->ctx, run->token + first, &confidence, &lse, &t);
}

static enum ee_status chunk_loss(const struct ee_model *model, const struct ee_batch *batch,
                                 const struct ee_exit_run *run, const struct chunk_buffers *b,
                                 int64_t first, int64_t rows) {
    struct ee_tensor loss = ee_vector(b->loss, rows), confidence = ee_vector(b->confidence, rows);
    struct ee_tensor logits = ee_matrix(b->logits, rows, model->config.vocab_size);
    struct ee_tensor row_weight = ee_vector(b->row_weight, rows);
    const int32_t *target = batch->target + first;
    float weight = (float)(run->training->weight / run->tokens);
    for (int64_t i = 0; i < rows; i++)
        b->row_weight[i] = weight;
    struct ee_loss_params params = {model->config.logit_softcap, run->training->temperature,
                                    run->training->dynamic, run->gradient != NULL};
    EE_TRY(ee_cross_entropy(model->ctx, &loss, &confidence, &logits, target, &row_weight, &params));
    if (!run->sums)
        return EE_OK;
    for (int64_t i = 0; i < rows; i++) {
        run->sums->loss += b->loss[i];
        run->sums->confidence += b->confidence[i];
        run->sums->tokens += target[i] >= 0;
    }
    return EE_OK;
}

/* From the gradient of the logits to those of the output matrix (unless a queue has it), and of the
 * norm and the hidden state (unless acc_dx is NULL). */
static enum ee_status chunk_backward(const struct ee_model *model, const struct ee_exit_index *exit,
                                     const struct ee_exit_run *run, const struct chunk_buffers *b,
                                     const float *hidden, float *acc_dx, int64_t rows) {
    const struct ee_config *c = &model->config;
    bool norm = exit->norm.weight >= 0;
    struct ee_tensor dlogits = ee_matrix(b->logits, rows, c->vocab_size);
    struct ee_tensor h = ee_matrix(norm ? b->h : hidden, rows, c->hidden_size);
    struct ee_tensor dh = ee_matrix(norm ? b->dh : acc_dx, rows, c->hidden_size);
    struct ee_tensor dw = ee_param_tensor(model->params, exit->output_gradient, run->gradient);
    struct ee_weight w =
        ee_joined_weight(model->params, exit->output, exit->output, model->weights);
    if (!run->queue)
        EE_TRY(ee_linear_backward_weight(model->ctx, &dw, NULL, &dlogits, &h));
    if (!acc_dx)
        return EE_OK;
    EE_TRY(ee_linear_backward_input(model->ctx, &dh, &dlogits, &w, !norm));
    if (!norm)
        return EE_OK;
    return ee_norm_gradient(model, exit->norm, exit->norm_gradient, run->gradient, rows, acc_dx,
                            b->dh, hidden, b->stats);
}

/* Norm, output matrix and loss over chunks of rows. */
static enum ee_status run_head(const struct ee_model *model, int32_t e,
                               const struct ee_batch *batch, const float *hidden, float *acc_dx,
                               const struct ee_exit_run *run) {
    const struct ee_config *c = &model->config;
    const struct ee_exit_index *exit = &model->params->exit[e];
    struct ee_ctx *ctx = model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    int64_t width = c->hidden_size, step = chunk_rows(batch->rows, c->vocab_size);
    struct chunk_buffers b;
    enum ee_status status;
    EE_GOTO(status, take_buffers(model, &b, step), done);
    struct ee_weight w =
        ee_joined_weight(model->params, exit->output, exit->output, model->weights);
    for (int64_t first = 0; first < batch->rows; first += step) {
        int64_t rows = ee_min(step, batch->rows - first);
        const float *x = hidden + first * width;
        const float *h = x;
        if (exit->norm.weight >= 0) {
            EE_GOTO(status, ee_norm_forward(model, exit->norm, rows, b.h, b.stats, x), done);
            h = b.h;
        }
        struct ee_tensor logits = ee_matrix(b.logits, rows, c->vocab_size);
        struct ee_tensor in = ee_matrix(h, rows, width);
        EE_GOTO(status, ee_linear(ctx, &logits, &in, &w, NULL, NULL), done);
        if (run->sums || run->gradient)
            EE_GOTO(status, chunk_loss(model, batch, run, &b, first, rows), done);
        if (run->gradient)
            EE_GOTO(status,
                    chunk_backward(model, exit, run, &b, x, acc_dx ? acc_dx + first * width : NULL,
                                   rows),
                    done);
        else
            EE_GOTO(status, read_logits(model, run, &b, first, rows), done);
    }
    if (run->queue)
        status = ee_queue_exit(run->queue, e, hidden, batch->rows, width);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

/* hidden + mlp(norm2(hidden)), with the norm of the exit's layer. */
static enum ee_status run_mlp_branch(const struct ee_model *model, int32_t e,
                                     const struct ee_batch *batch, const float *hidden,
                                     const struct ee_exit_run *run) {
    const struct ee_config *c = &model->config;
    const struct ee_exit_index *exit = &model->params->exit[e];
    struct ee_norm_index norm = model->params->layers[c->exits[e].layer - 1].norm2;
    int32_t site = c->num_layers + 1 + e;
    struct ee_ctx *ctx = model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    struct ee_block_sizes sizes = ee_block_sizes(c, batch->rows);
    int64_t n = batch->rows;
    float *h, *stats, *up, *out, *dout, *dh;
    enum ee_status status;
    EE_GOTO(status, ee_scratch_floats(ctx, &h, sizes.x), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &stats, sizes.stats2), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &up, sizes.up), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &out, sizes.x), done);
    EE_GOTO(status, ee_norm_forward(model, norm, n, h, stats, hidden), done);
    EE_GOTO(status, ee_mlp_up(model, &exit->mlp, n, up, h), done);
    EE_GOTO(status, ee_mlp_down(model, &exit->mlp, batch, site, out, up, hidden), done);
    if (!run->gradient) {
        status = run_head(model, e, batch, out, NULL, run);
        goto done;
    }
    EE_GOTO(status, ee_scratch_floats(ctx, &dout, sizes.x), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &dh, sizes.x), done);
    memset(dout, 0, (size_t)sizes.x * sizeof(float));
    EE_GOTO(status, run_head(model, e, batch, out, dout, run), done);
    EE_GOTO(status,
            ee_mlp_gradient(model, &exit->mlp, batch, site, run->gradient, NULL, dh, dout, h, up,
                            false),
            done);
    EE_GOTO(status,
            ee_norm_gradient(model, norm, norm, run->gradient, n, run->acc_dx, dh, hidden, stats),
            done);
    struct ee_tensor dx = ee_vector(run->acc_dx, sizes.x), residual = ee_vector(dout, sizes.x);
    EE_GOTO(status, ee_add(ctx, &dx, &residual), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

static enum ee_status take_acts(const struct ee_model *model, int64_t rows,
                                struct ee_block_acts *acts) {
    struct ee_block_sizes s = ee_block_sizes(&model->config, rows);
    const struct {
        float **piece;
        int64_t size;
    } pieces[] = {
        {&acts->stats1, s.stats1},     {&acts->qkv, s.qkv},       {&acts->qk, s.qk},
        {&acts->qk_stats, s.qk_stats}, {&acts->out, s.out},       {&acts->lse, s.lse},
        {&acts->mid, s.mid},           {&acts->stats2, s.stats2}, {&acts->up, s.up},
    };
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++)
        if (pieces[i].size > 0)
            EE_TRY(ee_scratch_floats(model->ctx, pieces[i].piece, pieces[i].size));
    return EE_OK;
}

/* A whole Transformer block on top of the hidden state. */
static enum ee_status run_block_branch(const struct ee_model *model, int32_t e,
                                       const struct ee_batch *batch, const float *hidden,
                                       const struct ee_exit_run *run) {
    const struct ee_config *c = &model->config;
    const struct ee_exit_index *exit = &model->params->exit[e];
    struct ee_block block = {.model = model,
                             .index = &exit->block,
                             .layer = c->exits[e].layer - 1,
                             .site = c->num_layers + 1 + e,
                             .gradient = run->gradient};
    struct ee_ctx *ctx = model->ctx;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    int64_t size = batch->rows * c->hidden_size;
    struct ee_block_acts acts = {0};
    float *x, *out, *dout;
    enum ee_status status;
    EE_GOTO(status, take_acts(model, batch->rows, &acts), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &x, size), done);
    EE_GOTO(status, ee_scratch_floats(ctx, &out, size), done);
    memcpy(x, hidden, (size_t)size * sizeof(float));
    acts.x = x;
    EE_GOTO(status, ee_block_forward(&block, batch, &acts, out), done);
    if (!run->gradient) {
        status = run_head(model, e, batch, out, NULL, run);
        goto done;
    }
    EE_GOTO(status, ee_scratch_floats(ctx, &dout, size), done);
    memset(dout, 0, (size_t)size * sizeof(float));
    EE_GOTO(status, run_head(model, e, batch, out, dout, run), done);
    EE_GOTO(status, ee_block_backward_mlp(&block, batch, &acts, dout), done);
    EE_GOTO(status, ee_block_backward_attention(&block, batch, &acts, dout), done);
    struct ee_tensor dx = ee_vector(run->acc_dx, size), branch = ee_vector(dout, size);
    EE_GOTO(status, ee_add(ctx, &dx, &branch), done);
done:
    ee_scratch_release(ctx, mark);
    return status;
}

enum ee_status ee_exit_run(const struct ee_model *model, int32_t e, const struct ee_batch *batch,
                           const float *hidden, const struct ee_exit_run *run) {
    const struct ee_exit_index *exit = &model->params->exit[e];
    if (exit->branch == EE_BRANCH_MLP)
        return run_mlp_branch(model, e, batch, hidden, run);
    if (exit->branch == EE_BRANCH_BLOCK)
        return run_block_branch(model, e, batch, hidden, run);
    return run_head(model, e, batch, hidden, run->acc_dx, run);
}

enum ee_status ee_exit_run_weight(const struct ee_model *model, int32_t e,
                                  const struct ee_batch *batch, const float *x,
                                  const struct ee_exit_run *run) {
    struct ee_exit_run weight = *run;
    weight.sums = NULL;
    weight.queue = NULL;
    return run_head(model, e, batch, x, NULL, &weight);
}

static double mlp_flops(const struct ee_config *c, int64_t rows) {
    return 2.0 * (double)rows * c->hidden_size * c->intermediate_size * (c->gated ? 3 : 2);
}

double ee_block_flops(const struct ee_config *c, int64_t rows) {
    double attention = 2.0 * c->num_heads + 2.0 * c->num_kv_heads;
    return 2.0 * (double)rows * c->hidden_size * c->head_dim * attention + mlp_flops(c, rows);
}

void ee_exit_flops(const struct ee_model *model, int32_t e, int64_t rows, double *forward,
                   double *backward) {
    const struct ee_config *c = &model->config;
    *forward = 2.0 * (double)rows * c->hidden_size * c->vocab_size;
    if (model->params->exit[e].branch == EE_BRANCH_MLP)
        *forward += mlp_flops(c, rows);
    if (model->params->exit[e].branch == EE_BRANCH_BLOCK)
        *forward += ee_block_flops(c, rows);
    *backward = 2 * *forward;
}
