#include "infer/weights.h"

#include "base/alloc.h"

#include <string.h>

/* Lays the weights out twice: once to measure, once to fill. */
struct packer {
    const struct ee_model *model;
    struct ee_weights *weights;
    /* By row of the parameter table: where its packed form stands, so that a matrix that is used in
     * several places is packed once. */
    struct ee_weight *packed;
    enum ee_status status;
};

static void *take(struct packer *p, int64_t count, size_t size) {
    void *data = NULL;
    if (p->status == EE_OK)
        p->status = ee_arena_take(&p->weights->arena, &data, count, size);
    return data;
}

/* The matrix of the rows [first, last] of the table. */
static struct ee_weight pack(struct packer *p, int32_t first, int32_t last) {
    const struct ee_model *model = p->model;
    struct ee_tensor source = ee_param_joined(model->params, first, last, model->weights);
    struct ee_weight w = {NULL, p->weights->dtype, EE_LAYOUT_PANELS, source.shape[0],
                          source.shape[1]};
    w.data = take(p, (int64_t)ee_weight_bytes(w.dtype, w.layout, w.rows, w.cols), 1);
    if (p->status == EE_OK && w.data)
        p->status = ee_weight_pack(model->ctx, &w, &source);
    return w;
}

static struct ee_weight pack_shared(struct packer *p, int32_t row) {
    struct ee_weight *w = &p->packed[row];
    if (w->rows == 0)
        *w = pack(p, row, row);
    return *w;
}

/* A copy of a vector, or none where row is -1. */
static struct ee_tensor copy(struct packer *p, int32_t row) {
    if (row < 0)
        return (struct ee_tensor){0};
    struct ee_tensor source = ee_param_tensor(p->model->params, row, p->model->weights);
    size_t bytes = (size_t)ee_tensor_elements(&source) * sizeof(float);
    void *data = take(p, (int64_t)bytes, 1);
    if (data)
        memcpy(data, source.data, bytes);
    source.data = data;
    return source;
}

/* The biases of several matrices in a row, zero where a matrix has none; nothing if none has. */
static struct ee_tensor join_biases(struct packer *p, const int32_t *rows, const int64_t *sizes,
                                    int count) {
    int64_t total = 0;
    bool any = false;
    for (int i = 0; i < count; i++) {
        total += sizes[i];
        any |= rows[i] >= 0;
    }
    if (!any)
        return (struct ee_tensor){0};
    float *data = take(p, total, sizeof(float));
    for (int64_t i = 0, at = 0; data && i < count; at += sizes[i++]) {
        if (rows[i] < 0)
            continue;
        struct ee_tensor source = ee_param_tensor(p->model->params, rows[i], p->model->weights);
        memcpy(data + at, source.data, (size_t)sizes[i] * sizeof(float));
    }
    return ee_vector(data, total);
}

static struct ee_norm_weights copy_norm(struct packer *p, struct ee_norm_index index) {
    return (struct ee_norm_weights){copy(p, index.weight), copy(p, index.bias)};
}

static struct ee_mlp_weights pack_mlp(struct packer *p, const struct ee_mlp_index *index) {
    int64_t inner = p->model->config.intermediate_size;
    bool gated = index->gate >= 0;
    struct ee_mlp_weights w;
    w.up = pack(p, gated ? index->gate : index->up, index->up);
    const int32_t biases[] = {index->gate_bias, index->up_bias};
    const int64_t sizes[] = {inner, inner};
    w.up_bias = join_biases(p, biases + !gated, sizes, 1 + gated);
    w.down = pack(p, index->down, index->down);
    w.down_bias = copy(p, index->down_bias);
    return w;
}

/* A side layer writes K and V for every row but asks a query for few, so it keeps them apart. */
static struct ee_block_weights pack_block(struct packer *p, const struct ee_block_index *index,
                                          bool side) {
    const struct ee_config *c = &p->model->config;
    int64_t q_width = (int64_t)c->num_heads * c->head_dim;
    int64_t kv_width = (int64_t)c->num_kv_heads * c->head_dim;
    const int32_t biases[] = {index->q_bias, index->k_bias, index->v_bias};
    const int64_t sizes[] = {q_width, kv_width, kv_width};
    struct ee_block_weights w = {.norm1 = copy_norm(p, index->norm1)};
    w.norm2 = c->shared_norm ? w.norm1 : copy_norm(p, index->norm2);
    w.q_norm = copy_norm(p, index->q_norm);
    w.k_norm = copy_norm(p, index->k_norm);
    if (side) {
        w.q = pack(p, index->q, index->q);
        w.q_bias = copy(p, index->q_bias);
        w.kv = pack(p, index->k, index->v);
        w.kv_bias = join_biases(p, biases + 1, sizes + 1, 2);
    } else {
        w.qkv = pack(p, index->q, index->v);
        w.qkv_bias = join_biases(p, biases, sizes, 3);
    }
    w.o = pack(p, index->o, index->o);
    w.o_bias = copy(p, index->o_bias);
    w.mlp = pack_mlp(p, &index->mlp);
    return w;
}

static void pack_exit(struct packer *p, int32_t i) {
    const struct ee_model *model = p->model;
    const struct ee_exit_index *index = &model->params->exit[i];
    struct ee_exit_weights *exit = &p->weights->exits[i];
    *exit = (struct ee_exit_weights){.depth = index->depth, .side = -1, .branch = index->branch};
    exit->layer =
        (i < model->config.num_exits ? model->config.exits[i].layer : model->config.num_layers) - 1;
    if (index->branch == EE_BRANCH_MLP)
        exit->mlp = pack_mlp(p, &index->mlp);
    if (index->branch == EE_BRANCH_BLOCK) {
        exit->block = pack_block(p, &index->block, true);
        exit->side = p->weights->cache_layers++;
    }
    exit->norm = copy_norm(p, index->norm);
    exit->output = pack_shared(p, index->output);
}

static void lay_out(struct packer *p) {
    struct ee_weights *w = p->weights;
    const struct ee_params *params = p->model->params;
    memset(p->packed, 0, (size_t)params->count * sizeof *p->packed);
    w->cache_layers = w->layer_count;
    w->embedding = pack_shared(p, params->embedding);
    w->positions = copy(p, params->positions);
    for (int32_t l = 0; l < w->layer_count; l++)
        w->layers[l] = pack_block(p, &params->layers[l], false);
    for (int32_t i = 0; i < w->exit_count; i++)
        pack_exit(p, i);
}

static enum ee_status fill(struct ee_weights *weights, const struct ee_model *model) {
    struct packer p = {.model = model, .weights = weights};
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)model->params->count * sizeof *p.packed, "the packed table"));
    p.packed = memory;
    ee_arena_init(&weights->arena, "the packed weights");
    lay_out(&p);
    if (p.status == EE_OK)
        p.status = ee_arena_bind(&weights->arena, 0);
    if (p.status == EE_OK)
        lay_out(&p);
    ee_free(p.packed);
    return p.status;
}

enum ee_status ee_weights_create(struct ee_weights **out, const struct ee_model *model,
                                 enum ee_dtype dtype) {
    *out = NULL;
    if (dtype != EE_F32 && dtype != EE_BF16)
        EE_FAIL(EE_ERR_INVALID, "weights for decoding are float32 or bfloat16, got %s",
                ee_dtype_name(dtype));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_weights), "the weights for decoding"));
    struct ee_weights *weights = memory;
    weights->dtype = dtype;
    weights->layer_count = model->config.num_layers;
    weights->exit_count = model->params->exits;
    enum ee_status status;
    EE_GOTO(status,
            ee_alloc(&memory, (size_t)weights->layer_count * sizeof *weights->layers,
                     "the weights for decoding"),
            fail);
    weights->layers = memory;
    EE_GOTO(status,
            ee_alloc(&memory, (size_t)weights->exit_count * sizeof *weights->exits,
                     "the weights for decoding"),
            fail);
    weights->exits = memory;
    EE_GOTO(status, fill(weights, model), fail);
    *out = weights;
    return EE_OK;
fail:
    ee_weights_destroy(weights);
    return status;
}

void ee_weights_destroy(struct ee_weights *weights) {
    if (!weights)
        return;
    ee_arena_free(&weights->arena);
    ee_free(weights->layers);
    ee_free(weights->exits);
    ee_free(weights);
}
