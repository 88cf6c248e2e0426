/* A model: its config, its parameter table, the arena of its parameters, and the context that runs
 * it. Training and inference both start from here. */
#ifndef EE_MODEL_H
#define EE_MODEL_H

#include "model/params.h"
#include "ops/ctx.h"

EE_EXTERN_C_BEGIN

struct ee_model {
    struct ee_config config;        /* rope_freq points to memory that the model owns */
    struct ee_model_layout *layout; /* of the pipeline that the model is spread over */
    int32_t rank;                   /* in it: which part is here */
    bool exact_ties;
    struct ee_params *params;
    struct ee_ctx *ctx;
    float *weights; /* the parameter arena, zero until it is filled; NULL without weights */
    /* Cosines and sines of all positions, [max_positions, rope_dims / 2]; NULL without RoPE. */
    float *rope_cos, *rope_sin;
};

struct ee_model_options {
    enum ee_isa isa;
    int threads; /* 0: all that the process may use */
    /* Without weights there are the table and the threads but no parameter arena, for decoding with
     * weights that are read straight into their packed form. */
    bool without_weights;
    struct ee_part part; /* whose parameters the model has; bounds stays the caller's */
};

/* Checks and copies `config` and allocates everything. */
EE_WARN_UNUSED enum ee_status ee_model_create(struct ee_model **out, const struct ee_config *config,
                                              const struct ee_model_options *options);
void ee_model_destroy(struct ee_model *model);

/* EE_ERR_INVALID where the model was made without weights. */
EE_WARN_UNUSED enum ee_status ee_model_require_weights(const struct ee_model *model);

/* The tables as ee_rotate takes them. */
struct ee_rope ee_model_rope(const struct ee_model *model);

/* Attention parameters of layer l (from 0; a block of an exit has those of its own layer). Dropout
 * is left out. */
struct ee_attention_params ee_model_attention(const struct ee_model *model, int32_t layer);

EE_EXTERN_C_END

#endif
