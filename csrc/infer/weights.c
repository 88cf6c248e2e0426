#include "infer/weights.h"

#include "base/alloc.h"

#include <string.h>

/* Lays the weights out twice: once to measure, once to place them. */
struct layout {
    const struct ee_model *model;
    struct ee_weights *weights;
    enum ee_status status;
};

static void *take(struct layout *l, int64_t count, size_t size) {
    void *data = NULL;
    if (l->status == EE_OK)
        l->status = ee_arena_take(&l->weights->arena, &data, count, size);
    return data;
}

/* The matrix of the rows [first, last] of the table, one place however often it is used. */
static struct ee_weight place_matrix(struct layout *l, int32_t first, int32_t last) {
    const struct ee_param *params = l->model->params->rows;
    struct ee_weight_place *places = l->weights->places;
    if (places[first].taken)
        return places[first].matrix;
    struct ee_weight w = {NULL, l->weights->dtype, EE_LAYOUT_PANELS, 0, params[first].shape[1]};
    for (int32_t row = first; row <= last; row++)
        w.rows += params[row].shape[0];
    w.data = take(l, (int64_t)ee_weight_bytes(w.dtype, w.layout, w.rows, w.cols), 1);
    int64_t at = 0;
    for (int32_t row = first; row <= last; at += params[row++].shape[0])
        places[row] = (struct ee_weight_place){.taken = true, .matrix = w, .first_row = at};
    return w;
}

/* A row that stays a float32 tensor, likewise; none where row is -1. */
static struct ee_tensor place_tensor(struct layout *l, int32_t row) {
    if (row < 0)
        return (struct ee_tensor){0};
    struct ee_weight_place *place = &l->weights->places[row];
    if (!place->taken) {
        const struct ee_param *param = &l->model->params->rows[row];
        void *data = take(l, param->shape[0] * param->shape[1], sizeof(float));
        place->taken = true;
        place->tensor = param->ndim == 1 ? ee_vector(data, param->shape[0])
                                         : ee_matrix(data, param->shape[0], param->shape[1]);
    }
    return place->tensor;
}

/* The biases of several matrices in a row, zero where a matrix has none; nothing if none has. */
static struct ee_tensor place_biases(struct layout *l, const int32_t *rows, const int64_t *sizes,
                                     int count) {
    int64_t total = 0;
    bool any = false;
    for (int i = 0; i < count; i++) {
        total += sizes[i];
        any |= rows[i] >= 0;
    }
    if (!any)
        return (struct ee_tensor){0};
    float *data = take(l, total, sizeof(float));
    for (int64_t i = 0, at = 0; i < count; at += sizes[i++])
        if (rows[i] >= 0)
            l->weights->places[rows[i]] = (struct ee_weight_place){
                .taken = true, .tensor = ee_vector(data ? data + at : NULL, sizes[i])};
    return ee_vector(data, total);
}

static struct ee_norm_weights place_norm(struct layout *l, struct ee_norm_index index) {
    return (struct ee_norm_weights){place_tensor(l, index.weight), place_tensor(l, index.bias)};
}

static struct ee_mlp_weights place_mlp(struct layout *l, const struct ee_mlp_index *index) {
    int64_t inner = l->model->config.intermediate_size;
    bool gated = index->gate >= 0;
    struct ee_mlp_weights w;
    w.up = place_matrix(l, gated ? index->gate : index->up, index->up);
    const int32_t biases[] = {index->gate_bias, index->up_bias};
    const int64_t sizes[] = {inner, inner};
    w.up_bias = place_biases(l, biases + !gated, sizes, 1 + gated);
    w.down = place_matrix(l, index->down, index->down);
    w.down_bias = place_tensor(l, index->down_bias);
    return w;
}

/* A side layer writes K and V for every row but asks a query for few, so it keeps them apart. */
static struct ee_block_weights place_block(struct layout *l, const struct ee_block_index *index,
                                           bool side) {
    const struct ee_config *c = &l->model->config;
    int64_t q_width = (int64_t)c->num_heads * c->head_dim;
    int64_t kv_width = (int64_t)c->num_kv_heads * c->head_dim;
    const int32_t biases[] = {index->q_bias, index->k_bias, index->v_bias};
    const int64_t sizes[] = {q_width, kv_width, kv_width};
    struct ee_block_weights w = {.norm1 = place_norm(l, index->norm1)};
    w.norm2 = place_norm(l, index->norm2);
    w.q_norm = place_norm(l, index->q_norm);
    w.k_norm = place_norm(l, index->k_norm);
    if (side) {
        w.q = place_matrix(l, index->q, index->q);
        w.q_bias = place_tensor(l, index->q_bias);
        w.kv = place_matrix(l, index->k, index->v);
        w.kv_bias = place_biases(l, biases + 1, sizes + 1, 2);
    } else {
        w.qkv = place_matrix(l, index->q, index->v);
        w.qkv_bias = place_biases(l, biases, sizes, 3);
    }
    w.o = place_matrix(l, index->o, index->o);
    w.o_bias = place_tensor(l, index->o_bias);
    w.mlp = place_mlp(l, &index->mlp);
    return w;
}

static void place_exit(struct layout *l, int32_t i) {
    const struct ee_model *model = l->model;
    const struct ee_exit_index *index = &model->params->exit[i];
    struct ee_exit_weights *exit = &l->weights->exits[i];
    *exit = (struct ee_exit_weights){.depth = index->depth, .side = -1, .branch = index->branch};
    exit->layer =
        (i < model->config.num_exits ? model->config.exits[i].layer : model->config.num_layers) - 1;
    if (index->branch == EE_BRANCH_MLP)
        exit->mlp = place_mlp(l, &index->mlp);
    if (index->branch == EE_BRANCH_BLOCK) {
        exit->block = place_block(l, &index->block, true);
        exit->side = l->weights->cache_layers++;
    }
    exit->norm = place_norm(l, index->norm);
    exit->output = place_matrix(l, index->output, index->output);
}

static enum ee_status lay_out(struct ee_weights *w, const struct ee_model *model) {
    const struct ee_params *params = model->params;
    const struct ee_stage *stage = &model->layout->stages[model->rank];
    struct layout l = {.model = model, .weights = w};
    memset(w->places, 0, (size_t)w->place_count * sizeof *w->places);
    w->first_layer = stage->first_layer;
    w->cache_layers = stage->last_layer - stage->first_layer;
    if (stage->embeds) {
        w->embedding = place_matrix(&l, params->embedding, params->embedding);
        w->positions = place_tensor(&l, params->positions);
    }
    for (int32_t i = stage->first_layer; i < stage->last_layer; i++)
        w->layers[i] = place_block(&l, &params->layers[i], false);
    for (int32_t i = 0; i < w->exit_count; i++)
        if (stage->exit[i])
            place_exit(&l, i);
        else
            w->exits[i] = (struct ee_exit_weights){.depth = params->exit[i].depth, .side = -1};
    for (int32_t row = 0; row < w->place_count; row++)
        EE_ASSERT(w->places[row].taken == params->rows[row].held);
    return l.status;
}

static enum ee_status allocate(struct ee_weights *weights, const struct ee_model *model) {
    const char *what = "the weights for decoding";
    void *memory;
    weights->layer_count = model->config.num_layers;
    EE_TRY(ee_alloc(&memory, (size_t)weights->layer_count * sizeof *weights->layers, what));
    weights->layers = memory;
    weights->exit_count = model->params->exits;
    EE_TRY(ee_alloc(&memory, (size_t)weights->exit_count * sizeof *weights->exits, what));
    weights->exits = memory;
    weights->place_count = model->params->count;
    EE_TRY(ee_alloc(&memory, (size_t)weights->place_count * sizeof *weights->places, what));
    weights->places = memory;
    ee_arena_init(&weights->arena, what);
    EE_TRY(lay_out(weights, model));
    EE_TRY(ee_arena_bind(&weights->arena, 0));
    return lay_out(weights, model);
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
    enum ee_status status = allocate(weights, model);
    if (status != EE_OK) {
        ee_weights_destroy(weights);
        return status;
    }
    *out = weights;
    return EE_OK;
}

void ee_weights_destroy(struct ee_weights *weights) {
    if (!weights)
        return;
    ee_arena_free(&weights->arena);
    ee_free(weights->layers);
    ee_free(weights->exits);
    ee_free(weights->places);
    ee_free(weights);
}

static enum ee_status check_source(const struct ee_param *param, const struct ee_tensor *source) {
    char got[128];
    if (source->dtype != EE_F32 && source->dtype != EE_F16 && source->dtype != EE_BF16)
        EE_FAIL(EE_ERR_INVALID,
                "%s has the wrong dtype (expected float32, float16 or bfloat16, got "
                "%s)",
                param->name, ee_dtype_name(source->dtype));
    struct ee_tensor wanted = *source;
    wanted.ndim = param->ndim;
    memcpy(wanted.shape, param->shape, sizeof param->shape);
    bool same = source->ndim == param->ndim;
    for (int i = 0; same && i < param->ndim; i++)
        same = source->shape[i] == param->shape[i];
    if (same)
        return EE_OK;
    char expected[128];
    EE_FAIL(EE_ERR_INVALID, "%s has the wrong shape (expected %s, got %s)", param->name,
            ee_tensor_describe(&wanted, expected, sizeof expected),
            ee_tensor_describe(source, got, sizeof got));
}

enum ee_status ee_weights_load(struct ee_weights *weights, const struct ee_model *model,
                               int32_t row, const struct ee_tensor *source) {
    if (row < 0 || row >= weights->place_count)
        EE_FAIL(EE_ERR_INVALID, "the parameter table has %d rows, got row %d", weights->place_count,
                row);
    EE_TRY(check_source(&model->params->rows[row], source));
    struct ee_weight_place *place = &weights->places[row];
    if (!place->taken)
        EE_FAIL(EE_ERR_INVALID, "%s belongs to another rank than %d", model->params->rows[row].name,
                model->rank);
    if (place->matrix.data)
        EE_TRY(ee_weight_pack(model->ctx, &place->matrix, source, place->first_row));
    else
        EE_TRY(ee_convert(model->ctx, &place->tensor, source));
    place->loaded = true;
    return EE_OK;
}

enum ee_status ee_weights_fill(struct ee_weights *weights, const struct ee_model *model) {
    EE_TRY(ee_model_require_weights(model));
    for (int32_t row = 0; row < weights->place_count; row++) {
        if (!weights->places[row].taken)
            continue;
        struct ee_tensor source = ee_param_tensor(model->params, row, model->weights);
        EE_TRY(ee_weights_load(weights, model, row, &source));
    }
    return EE_OK;
}

int32_t ee_weights_missing(const struct ee_weights *weights) {
    for (int32_t row = 0; row < weights->place_count; row++)
        if (weights->places[row].taken && !weights->places[row].loaded)
            return row;
    return -1;
}
