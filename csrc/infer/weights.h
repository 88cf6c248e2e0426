/* The weights of a model in the form in which decoding takes them: every matrix packed in column
 * panels, as float32 or bf16, query, key and value joined into one matrix, gate and up likewise;
 * norms, biases and positions as float32. A copy of its own: what happens to the model's parameters
 * later changes nothing here.
 *
 * They are laid out first, every row of the parameter table that the model's rank holds with one
 * place, then loaded row by row from anywhere: so a model is read from files without its float32
 * parameters in memory. */
#ifndef EE_WEIGHTS_H
#define EE_WEIGHTS_H

#include "model/model.h"

EE_EXTERN_C_BEGIN

/* Tensors whose data is NULL are not there. */
struct ee_norm_weights {
    struct ee_tensor weight, bias;
};

struct ee_mlp_weights {
    struct ee_weight up; /* [2F, C] when gated: gate, then up */
    struct ee_weight down;
    struct ee_tensor up_bias, down_bias;
};

struct ee_block_weights {
    struct ee_norm_weights norm1, norm2, q_norm, k_norm;
    struct ee_weight qkv; /* [(H + 2K) D, C]; a block of an exit has q and kv instead */
    struct ee_tensor qkv_bias;
    struct ee_weight q, kv;
    struct ee_tensor q_bias, kv_bias;
    struct ee_weight o;
    struct ee_tensor o_bias;
    struct ee_mlp_weights mlp;
};

/* An exit, the final one included. */
struct ee_exit_weights {
    int32_t depth; /* half layers */
    int32_t layer; /* from 0: the one whose norm (branch MLP) or window (block) it shares */
    int32_t side;  /* layer of the cache that its block writes, -1 without a block */
    enum ee_branch branch;
    struct ee_mlp_weights mlp;
    struct ee_block_weights block;
    struct ee_norm_weights norm;
    struct ee_weight output;
};

/* Where a row of the parameter table goes: output features of a matrix, or a float32 tensor. */
struct ee_weight_place {
    bool taken, loaded;
    struct ee_weight matrix; /* data NULL: the tensor */
    int64_t first_row;
    struct ee_tensor tensor;
};

struct ee_weights {
    struct ee_arena arena;
    enum ee_dtype dtype;
    struct ee_weight embedding;
    struct ee_tensor positions;
    int32_t layer_count, exit_count; /* of the model; those that are elsewhere are empty */
    int32_t first_layer;             /* that is here: the first layer of the cache */
    int32_t cache_layers;            /* layers and side layers that are here */
    struct ee_block_weights *layers;
    struct ee_exit_weights *exits;
    int32_t place_count;
    struct ee_weight_place *places; /* by row of the parameter table */
};

/* Allocates and lays out; nothing is loaded yet. dtype: EE_F32 or EE_BF16. */
EE_WARN_UNUSED enum ee_status ee_weights_create(struct ee_weights **out,
                                                const struct ee_model *model, enum ee_dtype dtype);
void ee_weights_destroy(struct ee_weights *weights);

/* Converts and packs one parameter, the row `row` of the model's table: float32, float16 or bf16 of
 * its shape, contiguous, or a matrix with contiguous columns as ee_weight_pack takes it. On all
 * threads of the model. */
EE_WARN_UNUSED enum ee_status ee_weights_load(struct ee_weights *weights,
                                              const struct ee_model *model, int32_t row,
                                              const struct ee_tensor *source);

/* Loads every row that is here from the model's own parameters. */
EE_WARN_UNUSED enum ee_status ee_weights_fill(struct ee_weights *weights,
                                              const struct ee_model *model);

/* The first row of the table that is to be here and is not loaded yet, -1 if there is none. */
int32_t ee_weights_missing(const struct ee_weights *weights);

/* The tensor, or NULL where it is not there: an optional argument of an operation. */
static inline const struct ee_tensor *ee_given(const struct ee_tensor *tensor) {
    return tensor->data ? tensor : NULL;
}

EE_EXTERN_C_END

#endif
