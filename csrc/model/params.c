#include "model/params.h"

#include "base/alloc.h"
#include "base/rng.h"
#include "ops/ctx.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Names of one parameter kind, below its layer or exit; gpt2 NULL where GPT-2 has no such thing.
 * The matrices of GPT-2 are stored [in, out]. */
enum kind {
    EMBEDDING,
    POSITIONS,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    LM_HEAD,
    NORM1,
    NORM1_BIAS,
    Q,
    K,
    V,
    Q_BIAS,
    K_BIAS,
    V_BIAS,
    Q_NORM,
    K_NORM,
    O,
    O_BIAS,
    NORM2,
    NORM2_BIAS,
    GATE,
    UP,
    GATE_BIAS,
    UP_BIAS,
    DOWN,
    DOWN_BIAS,
    EXIT_NORM,
    EXIT_NORM_BIAS,
    EXIT_HEAD,
};

static const struct kind_names {
    const char *llama, *gpt2;
    enum ee_shard shard;
    bool gpt2_transposed;
} kinds[] = {
    [EMBEDDING] = {"model.embed_tokens.weight", "transformer.wte.weight", EE_SHARD_ROWS, false},
    [POSITIONS] = {"model.embed_positions.weight", "transformer.wpe.weight", 0, false},
    [FINAL_NORM] = {"model.norm.weight", "transformer.ln_f.weight", 0, false},
    [FINAL_NORM_BIAS] = {"model.norm.bias", "transformer.ln_f.bias", 0, false},
    [LM_HEAD] = {"lm_head.weight", "lm_head.weight", EE_SHARD_ROWS, false},
    [NORM1] = {"input_layernorm.weight", "ln_1.weight", 0, false},
    [NORM1_BIAS] = {"input_layernorm.bias", "ln_1.bias", 0, false},
    [Q] = {"self_attn.q_proj.weight", "attn.c_attn.weight", EE_SHARD_ROWS, true},
    [K] = {"self_attn.k_proj.weight", "attn.c_attn.weight", EE_SHARD_ROWS, true},
    [V] = {"self_attn.v_proj.weight", "attn.c_attn.weight", EE_SHARD_ROWS, true},
    [Q_BIAS] = {"self_attn.q_proj.bias", "attn.c_attn.bias", EE_SHARD_ROWS, false},
    [K_BIAS] = {"self_attn.k_proj.bias", "attn.c_attn.bias", EE_SHARD_ROWS, false},
    [V_BIAS] = {"self_attn.v_proj.bias", "attn.c_attn.bias", EE_SHARD_ROWS, false},
    [Q_NORM] = {"self_attn.q_norm.weight", NULL, 0, false},
    [K_NORM] = {"self_attn.k_norm.weight", NULL, 0, false},
    [O] = {"self_attn.o_proj.weight", "attn.c_proj.weight", EE_SHARD_COLS, true},
    [O_BIAS] = {"self_attn.o_proj.bias", "attn.c_proj.bias", 0, false},
    [NORM2] = {"post_attention_layernorm.weight", "ln_2.weight", 0, false},
    [NORM2_BIAS] = {"post_attention_layernorm.bias", "ln_2.bias", 0, false},
    [GATE] = {"mlp.gate_proj.weight", NULL, EE_SHARD_ROWS, false},
    [UP] = {"mlp.up_proj.weight", "mlp.c_fc.weight", EE_SHARD_ROWS, true},
    [GATE_BIAS] = {"mlp.gate_proj.bias", NULL, EE_SHARD_ROWS, false},
    [UP_BIAS] = {"mlp.up_proj.bias", "mlp.c_fc.bias", EE_SHARD_ROWS, false},
    [DOWN] = {"mlp.down_proj.weight", "mlp.c_proj.weight", EE_SHARD_COLS, true},
    [DOWN_BIAS] = {"mlp.down_proj.bias", "mlp.c_proj.bias", 0, false},
    [EXIT_NORM] = {"norm.weight", "norm.weight", 0, false},
    [EXIT_NORM_BIAS] = {"norm.bias", "norm.bias", 0, false},
    [EXIT_HEAD] = {"head.weight", "head.weight", EE_SHARD_ROWS, false},
};

/* What is being built, and where: in which layer, exit, and below which name. */
struct builder {
    const struct ee_config *config;
    struct ee_params *params;
    int32_t capacity;
    int32_t layer, exit;
    char prefix[48], source_prefix[48];
};

/* Rows of a layer and of a model beside its layers, and further uses of an exit, at most. */
#define ROWS_PER_BLOCK 24
#define ROWS_BESIDE 8
#define FURTHER_PER_EXIT 3

/* Offsets of rows that have no place yet: whether they follow the row before without a gap. */
enum { APART = -1, JOINED = -2 };

/* Adds a row and returns its index. cols 0 makes a vector. `joined` rows follow the one before
 * without a gap, so that both are one matrix. */
static int32_t add(struct builder *b, enum kind kind, int64_t rows, int64_t cols, float mean,
                   float std, bool joined) {
    struct ee_params *params = b->params;
    EE_ASSERT(params->count < b->capacity);
    struct ee_param *row = &params->rows[params->count];
    const struct kind_names *names = &kinds[kind];
    bool gpt2 = b->config->family == EE_FAMILY_GPT2 && names->gpt2;
    snprintf(row->name, sizeof row->name, "%s%s", b->prefix, names->llama);
    snprintf(row->source, sizeof row->source, "%s%s", gpt2 ? b->source_prefix : b->prefix,
             gpt2 ? names->gpt2 : names->llama);
    row->ndim = cols ? 2 : 1;
    row->shape[0] = rows;
    row->shape[1] = cols ? cols : 1;
    row->shard = names->shard;
    row->decay = cols != 0;
    row->init_mean = mean;
    row->init_std = std;
    row->source_rows = rows;
    row->transposed = gpt2 && names->gpt2_transposed;
    row->layer = b->layer;
    row->exit = b->exit;
    /* Until its place is known. */
    row->offset = joined ? JOINED : APART;
    return params->count++;
}

/* Marks rows [first, last] as consecutive parts of one tensor of a GPT-2 file (its c_attn). */
static void fuse_source(struct builder *b, int32_t first, int32_t last) {
    if (b->config->family != EE_FAMILY_GPT2)
        return;
    int64_t rows = 0;
    for (int32_t i = first; i <= last; i++) {
        b->params->rows[i].source_row = rows;
        rows += b->params->rows[i].shape[0];
    }
    for (int32_t i = first; i <= last; i++)
        b->params->rows[i].source_rows = rows;
}

static struct ee_norm_index add_norm(struct builder *b, enum kind weight, enum kind bias,
                                     int64_t width, bool has_bias) {
    struct ee_norm_index index = {-1, -1};
    index.weight = add(b, weight, width, 0, 1.0f - b->config->norm.weight_offset, 0, false);
    if (has_bias)
        index.bias = add(b, bias, width, 0, 0, 0, false);
    return index;
}

/* Standard deviation of output projections: 1 / sqrt(2 L), as in GPT-2 and Megatron. */
static float projection_std(const struct ee_config *config) {
    return 1.0f / sqrtf(2.0f * (float)config->num_layers);
}

static struct ee_mlp_index add_mlp(struct builder *b) {
    const struct ee_config *c = b->config;
    struct ee_mlp_index index = {-1, -1, -1, -1, -1, -1};
    int64_t width = c->hidden_size, inner = c->intermediate_size;
    if (c->gated)
        index.gate = add(b, GATE, inner, width, 0, 1, false);
    index.up = add(b, UP, inner, width, 0, 1, c->gated);
    if (c->bias_up && c->gated)
        index.gate_bias = add(b, GATE_BIAS, inner, 0, 0, 0, false);
    if (c->bias_up)
        index.up_bias = add(b, UP_BIAS, inner, 0, 0, 0, c->gated);
    index.down = add(b, DOWN, width, inner, 0, projection_std(c), false);
    if (c->bias_down)
        index.down_bias = add(b, DOWN_BIAS, width, 0, 0, 0, false);
    return index;
}

static struct ee_block_index add_block(struct builder *b) {
    const struct ee_config *c = b->config;
    struct ee_block_index index;
    memset(&index, -1, sizeof index);
    int64_t width = c->hidden_size;
    int64_t q_width = (int64_t)c->num_heads * c->head_dim;
    int64_t kv_width = (int64_t)c->num_kv_heads * c->head_dim;
    index.norm1 = add_norm(b, NORM1, NORM1_BIAS, width, c->norm_bias);
    index.q = add(b, Q, q_width, width, 0, 1, false);
    index.k = add(b, K, kv_width, width, 0, 1, true);
    index.v = add(b, V, kv_width, width, 0, 1, true);
    fuse_source(b, index.q, index.v);
    if (c->bias_q)
        index.q_bias = add(b, Q_BIAS, q_width, 0, 0, 0, false);
    if (c->bias_kv) {
        index.k_bias = add(b, K_BIAS, kv_width, 0, 0, 0, c->bias_q);
        index.v_bias = add(b, V_BIAS, kv_width, 0, 0, 0, true);
    }
    if (c->bias_q && c->bias_kv)
        fuse_source(b, index.q_bias, index.v_bias);
    if (c->qk_norm) {
        index.q_norm = add_norm(b, Q_NORM, Q_NORM, c->head_dim, false);
        index.k_norm = add_norm(b, K_NORM, K_NORM, c->head_dim, false);
    }
    index.o = add(b, O, width, q_width, 0, projection_std(c), false);
    if (c->bias_o)
        index.o_bias = add(b, O_BIAS, width, 0, 0, 0, false);
    index.norm2 = index.norm1;
    if (!c->shared_norm)
        index.norm2 = add_norm(b, NORM2, NORM2_BIAS, width, c->norm_bias);
    index.mlp = add_mlp(b);
    return index;
}

/* Follows the output of an exit to the matrix it means; config check has excluded cycles. */
static int32_t resolve_output(const struct builder *b, int32_t exit, int32_t own, int32_t final) {
    const struct ee_exit_config *exits = b->config->exits;
    if (exits[exit].output == EE_OUTPUT_OWN)
        return own;
    if (exits[exit].output == EE_OUTPUT_EMBEDDING)
        return b->params->embedding;
    if (exits[exit].output == EE_OUTPUT_FINAL)
        return final;
    return -1;
}

static void add_exits(struct builder *b, struct ee_norm_index final_norm, int32_t lm_head) {
    const struct ee_config *c = b->config;
    struct ee_params *params = b->params;
    for (int32_t i = 0; i < c->num_exits; i++) {
        const struct ee_exit_config *config = &c->exits[i];
        struct ee_exit_index *exit = &params->exit[i];
        memset(exit, -1, sizeof *exit);
        exit->depth = ee_exit_depth(config);
        exit->branch = config->branch;
        b->layer = config->layer;
        b->exit = i;
        snprintf(b->prefix, sizeof b->prefix, "exits.%d.", i);
        memcpy(b->source_prefix, b->prefix, sizeof b->prefix);
        if (config->branch == EE_BRANCH_MLP)
            exit->mlp = add_mlp(b);
        if (config->branch == EE_BRANCH_BLOCK) {
            snprintf(b->prefix, sizeof b->prefix, "exits.%d.block.", i);
            memcpy(b->source_prefix, b->prefix, sizeof b->prefix);
            exit->block = add_block(b);
            snprintf(b->prefix, sizeof b->prefix, "exits.%d.", i);
            memcpy(b->source_prefix, b->prefix, sizeof b->prefix);
        }
        if (config->norm == EE_EXIT_NORM_OWN)
            exit->norm = add_norm(b, EXIT_NORM, EXIT_NORM_BIAS, c->hidden_size, c->norm_bias);
        else if (config->norm == EE_EXIT_NORM_FINAL)
            exit->norm = final_norm;
        int32_t own = -1;
        if (config->output == EE_OUTPUT_OWN)
            own = add(b, EXIT_HEAD, c->vocab_size, c->hidden_size, 0, 1, false);
        exit->output = resolve_output(b, i, own, lm_head);
    }
    for (int32_t i = 0; i < c->num_exits; i++) {
        int32_t from = i;
        while (c->exits[from].output >= 0)
            from = c->exits[from].output;
        params->exit[i].output = params->exit[from].output;
    }
    struct ee_exit_index *last = &params->exit[c->num_exits];
    memset(last, -1, sizeof *last);
    last->depth = 2 * c->num_layers;
    last->branch = EE_BRANCH_NONE;
    last->norm = final_norm;
    last->output = lm_head;
    params->exits = c->num_exits + 1;
}

bool ee_param_has_use(const struct ee_params *params, int32_t row, int32_t use) {
    if (use == EE_USE_EMBEDDING)
        return row == params->embedding;
    const struct ee_exit_index *exit = &params->exit[use - EE_USE_EXIT];
    return exit->output == row || exit->norm.weight == row || exit->norm.bias == row;
}

int32_t ee_use_chunk(const struct ee_model_layout *layout, int32_t use) {
    int32_t chunk = 0;
    if (use != EE_USE_EMBEDDING)
        while (!layout->stages[chunk].exit[use - EE_USE_EXIT])
            chunk++;
    return chunk;
}

/* Which chunk uses the row first, and whether a chunk of `rank` uses it. */
static int32_t find_users(const struct ee_params *params, int32_t row,
                          const struct ee_model_layout *layout, int32_t rank, bool *held) {
    const struct ee_param *param = &params->rows[row];
    int32_t first = -1;
    *held = false;
    for (int32_t use = EE_USE_EMBEDDING; use < EE_USE_EXIT + params->exits; use++) {
        bool own =
            use == EE_USE_EMBEDDING ? row == params->positions : param->exit == use - EE_USE_EXIT;
        if (!own && !ee_param_has_use(params, row, use))
            continue;
        int32_t chunk = ee_use_chunk(layout, use);
        first = first < 0 ? chunk : first;
        *held = *held || ee_layout_rank(layout, chunk) == rank;
    }
    for (int32_t g = 0; param->exit < 0 && g < layout->ranks * layout->chunks; g++) {
        const struct ee_stage *stage = &layout->stages[g];
        if (param->layer <= stage->first_layer || param->layer > stage->last_layer)
            continue;
        first = g;
        *held = ee_layout_rank(layout, g) == rank;
    }
    return first;
}

static void mark_users(struct ee_params *params, const struct ee_model_layout *layout,
                       int32_t rank) {
    for (int32_t i = 0; i < params->count; i++) {
        struct ee_param *row = &params->rows[i];
        int32_t uses = 0;
        for (int32_t use = 0; use < EE_USE_EXIT + params->exits; use++)
            uses += ee_param_has_use(params, i, use);
        row->tied = uses > 1;
        int32_t first = find_users(params, i, layout, rank, &row->held);
        row->owned = row->held && ee_layout_rank(layout, first) == rank;
    }
}

/* The next place of an arena that has `*elements` elements so far. */
static enum ee_status place_row(struct ee_param *row, int64_t *elements, bool joined) {
    int64_t lane = EE_ALIGNMENT / (int64_t)sizeof(float), size;
    row->offset = joined ? *elements : ee_ceil_div(*elements, lane) * lane;
    if (__builtin_mul_overflow(row->shape[0], row->shape[1], &size) ||
        __builtin_add_overflow(row->offset, size, elements) || *elements > INT64_MAX / 16)
        EE_FAIL(EE_ERR_INVALID, "%s of %lld x %lld elements cannot be addressed", row->name,
                (long long)row->shape[0], (long long)row->shape[1]);
    return EE_OK;
}

static enum ee_status place_rows(struct ee_params *params) {
    for (int32_t i = 0; i < params->count; i++) {
        struct ee_param *row = &params->rows[i];
        if (row->held)
            EE_TRY(place_row(row, &params->elements, row->offset == JOINED));
        else
            row->offset = APART;
    }
    params->gradient_elements = params->elements;
    return EE_OK;
}

/* The row that a use of `row` adds its gradient to: the row itself for the first use, and a further
 * one for each use after it. */
static enum ee_status add_use(struct ee_params *params, int32_t *row, uint8_t *used, bool exact) {
    if (*row < 0)
        return EE_OK;
    bool further = used[*row] && exact;
    used[*row] = 1;
    if (!further)
        return EE_OK;
    struct ee_param *copy = &params->rows[params->count + params->further];
    *copy = params->rows[*row];
    *row = params->count + params->further++;
    return place_row(copy, &params->gradient_elements, false);
}

static enum ee_status place_uses(struct ee_params *params, const struct ee_model_layout *layout,
                                 int32_t rank, bool exact) {
    void *used;
    EE_TRY(ee_alloc(&used, (size_t)params->count, "the parameter table"));
    uint8_t *flags = used;
    flags[params->embedding] = rank == 0;
    enum ee_status status = EE_OK;
    for (int32_t e = 0; e < params->exits && status == EE_OK; e++) {
        struct ee_exit_index *exit = &params->exit[e];
        exit->norm_gradient = exit->norm;
        exit->output_gradient = exit->output;
        if (ee_layout_rank(layout, ee_use_chunk(layout, EE_USE_EXIT + e)) != rank)
            continue;
        int32_t *const rows[] = {&exit->norm_gradient.weight, &exit->norm_gradient.bias,
                                 &exit->output_gradient};
        for (int i = 0; i < 3 && status == EE_OK; i++)
            status = add_use(params, rows[i], flags, exact);
    }
    ee_free(used);
    return status;
}

int32_t ee_use_gradient(const struct ee_params *params, int32_t row, int32_t use) {
    if (use == EE_USE_EMBEDDING)
        return row;
    const struct ee_exit_index *exit = &params->exit[use - EE_USE_EXIT];
    return exit->output == row        ? exit->output_gradient
           : exit->norm.weight == row ? exit->norm_gradient.weight
                                      : exit->norm_gradient.bias;
}

static void build(struct builder *b) {
    const struct ee_config *c = b->config;
    struct ee_params *params = b->params;
    b->exit = -1;
    params->embedding = add(b, EMBEDDING, c->vocab_size, c->hidden_size, 0, 1, false);
    params->positions = -1;
    if (c->positions == EE_POSITIONS_LEARNED)
        params->positions = add(b, POSITIONS, c->max_positions, c->hidden_size, 0, 1, false);
    for (int32_t l = 0; l < c->num_layers; l++) {
        b->layer = l + 1;
        snprintf(b->prefix, sizeof b->prefix, "model.layers.%d.", l);
        snprintf(b->source_prefix, sizeof b->source_prefix, "transformer.h.%d.", l);
        params->layers[l] = add_block(b);
    }
    b->layer = c->num_layers + 1;
    b->prefix[0] = b->source_prefix[0] = '\0';
    struct ee_norm_index final_norm =
        add_norm(b, FINAL_NORM, FINAL_NORM_BIAS, c->hidden_size, c->norm_bias);
    int32_t lm_head = params->embedding;
    if (!c->tie_embeddings)
        lm_head = add(b, LM_HEAD, c->vocab_size, c->hidden_size, 0, 1, false);
    add_exits(b, final_norm, lm_head);
}

enum ee_status ee_params_create(struct ee_params **out, const struct ee_config *config,
                                const struct ee_model_layout *layout, int32_t rank,
                                bool exact_ties) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_params), "the parameter table"));
    struct ee_params *params = memory;
    struct builder b = {.config = config, .params = params};
    b.capacity = (config->num_layers + config->num_exits) * ROWS_PER_BLOCK +
                 config->num_exits * ROWS_BESIDE + ROWS_BESIDE;
    size_t rows = (size_t)b.capacity + FURTHER_PER_EXIT * (size_t)(config->num_exits + 1);
    enum ee_status status;
    EE_GOTO(status, ee_alloc(&memory, sizeof(struct ee_param) * rows, "the parameter table"), fail);
    params->rows = memory;
    EE_GOTO(status,
            ee_alloc(&memory, sizeof(struct ee_block_index) * (size_t)config->num_layers,
                     "the parameter table"),
            fail);
    params->layers = memory;
    build(&b);
    mark_users(params, layout, rank);
    EE_GOTO(status, place_rows(params), fail);
    EE_GOTO(status, place_uses(params, layout, rank, exact_ties), fail);
    *out = params;
    return EE_OK;
fail:
    ee_params_destroy(params);
    return status;
}

void ee_params_destroy(struct ee_params *params) {
    if (!params)
        return;
    ee_free(params->rows);
    ee_free(params->layers);
    ee_free(params);
}

int32_t ee_params_find(const struct ee_params *params, const char *name) {
    for (int32_t i = 0; i < params->count; i++)
        if (strcmp(params->rows[i].name, name) == 0)
            return i;
    return -1;
}

struct ee_tensor ee_param_tensor(const struct ee_params *params, int32_t row, const float *arena) {
    const struct ee_param *param = &params->rows[row];
    EE_ASSERT(param->held);
    if (param->ndim == 1)
        return ee_vector(arena + param->offset, param->shape[0]);
    return ee_matrix(arena + param->offset, param->shape[0], param->shape[1]);
}

struct ee_tensor ee_param_joined(const struct ee_params *params, int32_t first, int32_t last,
                                 const float *arena) {
    struct ee_tensor tensor = ee_param_tensor(params, first, arena);
    int64_t rows = 0;
    for (int32_t i = first; i <= last; i++) {
        const struct ee_param *param = &params->rows[i];
        EE_ASSERT(param->offset == params->rows[first].offset + rows * tensor.stride[0]);
        rows += param->shape[0];
    }
    tensor.shape[0] = rows;
    return tensor;
}

enum ee_status ee_params_init_row(struct ee_ctx *ctx, const struct ee_params *params, int32_t row,
                                  float *arena, float initializer_range, uint64_t seed) {
    const struct ee_param *param = &params->rows[row];
    struct ee_tensor flat = ee_vector(arena + param->offset, param->shape[0] * param->shape[1]);
    return ee_normal(ctx, &flat, param->init_mean, param->init_std * initializer_range,
                     ee_mix(seed, ee_hash_name(param->name)));
}

enum ee_status ee_params_init(struct ee_ctx *ctx, const struct ee_params *params, float *arena,
                              float initializer_range, uint64_t seed) {
    for (int32_t i = 0; i < params->count; i++)
        if (params->rows[i].held)
            EE_TRY(ee_params_init_row(ctx, params, i, arena, initializer_range, seed));
    return EE_OK;
}
