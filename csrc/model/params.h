/* The parameter table: one row per parameter of the model, in the order of the flat arenas.
 *
 * Every rank of a pipeline has the whole table and the memory of those parameters that its chunks
 * use (`held`). Parameters and the two moments are equal float32 arenas of `elements` elements,
 * laid out by `offset`; that of the gradients goes on with further uses of tied parameters
 * (gradient_elements). Initialisation, optimizer, gradient norm, checkpoints, import, export and
 * the Python views read the rows; the model finds its own parameters through the index structs.
 * Nothing else knows a parameter's name, shape or place. */
#ifndef EE_PARAMS_H
#define EE_PARAMS_H

#include "model/layout.h"

EE_EXTERN_C_BEGIN

#define EE_NAME_SIZE 96

/* How tensor parallelism splits a parameter. */
enum ee_shard { EE_SHARD_NONE, EE_SHARD_ROWS, EE_SHARD_COLS };

struct ee_param {
    char name[EE_NAME_SIZE]; /* Llama's names, e.g. model.layers.0.self_attn.q_proj.weight */
    int32_t ndim;
    int64_t shape[2]; /* matrices: [output features, input features] */
    int64_t offset;   /* in the arenas, in elements; -1 where the rank does not hold it */
    bool held;        /* by this rank */
    bool owned;       /* this rank is the first to use it: it counts and saves it */
    enum ee_shard shard;
    bool decay;  /* weight decay: matrices yes, norms and biases no */
    bool frozen; /* neither gradient nor update */
    /* Used in more than one place: embedding, output matrices, norms of exits. Their gradients are
     * summed over the uses (and ranks) before the update. */
    bool tied;
    /* Initial values: mean + std * normal, std in units of the config's initializer_range. */
    float init_mean, init_std;
    /* Where the parameter stands in a Hugging Face file: rows [source_row, source_row + shape[0])
     * of tensor `source`, which has source_rows rows in all and is stored transposed if
     * `transposed` (GPT-2's [in, out] matrices). Parameters of exits stand in exits.safetensors,
     * all others in model.safetensors. */
    char source[EE_NAME_SIZE];
    int64_t source_row, source_rows;
    bool transposed;
    int32_t layer; /* 0 embeddings, 1 .. L layers, L + 1 final norm and output matrix */
    int32_t exit;  /* index of the exit that owns it, -1 for the backbone */
};

/* Indices into the rows; -1 where the model has no such parameter. */
struct ee_norm_index {
    int32_t weight, bias;
};

/* gate and up stand next to each other without a gap, so that [2F, C] starting at `gate` is one
 * matrix; the same for their biases. Not gated: `gate` is -1. */
struct ee_mlp_index {
    int32_t gate, up, gate_bias, up_bias, down, down_bias;
};

/* q, k and v likewise: [(H + 2K) D, C] starting at q, biases at q_bias. Where only some of the
 * three have a bias (bias_q != bias_kv) the joined form is not available. */
struct ee_block_index {
    struct ee_norm_index norm1, norm2; /* norm2.weight = norm1.weight when shared */
    int32_t q, k, v, q_bias, k_bias, v_bias, o, o_bias;
    struct ee_norm_index q_norm, k_norm;
    struct ee_mlp_index mlp;
};

/* An exit as the code uses it, the final one included: it is the last. */
struct ee_exit_index {
    int32_t depth; /* half layers, ee_exit_depth; the final exit: 2 L */
    enum ee_branch branch;
    struct ee_norm_index norm; /* -1: none; own or the final norm's */
    struct ee_mlp_index mlp;   /* branch MLP */
    struct ee_block_index block;
    int32_t output; /* the output matrix [V, C], wherever it comes from */
    /* Where the gradients of norm and output go: rows of the same shape. */
    struct ee_norm_index norm_gradient;
    int32_t output_gradient;
};

/* Uses of a tied parameter, in the order in which their gradients are added: the embedding of
 * tokens (EE_USE_EMBEDDING), then the exits (EE_USE_EXIT + e). */
enum { EE_USE_EMBEDDING, EE_USE_EXIT, EE_MAX_USES = EE_USE_EXIT + EE_MAX_EXITS + 1 };

struct ee_params {
    int32_t count;
    struct ee_param *rows;
    int32_t further;  /* rows[count .. count + further): gradients of further uses, exact ties */
    int64_t elements; /* of an arena */
    int64_t gradient_elements; /* of the gradients' */
    int32_t embedding, positions;
    struct ee_block_index *layers; /* [L] */
    int32_t exits;                 /* early exits + 1 */
    struct ee_exit_index exit[EE_MAX_EXITS + 1];
};

/* Builds the table of a checked config, as `rank` of a layout sees it. exact_ties: each further use
 * of a tied parameter on this rank has a gradient of its own. */
EE_WARN_UNUSED enum ee_status ee_params_create(struct ee_params **out,
                                               const struct ee_config *config,
                                               const struct ee_model_layout *layout, int32_t rank,
                                               bool exact_ties);
void ee_params_destroy(struct ee_params *params);

/* Row of a name, -1 if there is none. */
int32_t ee_params_find(const struct ee_params *params, const char *name);

/* Whether a parameter is used so. */
bool ee_param_has_use(const struct ee_params *params, int32_t row, int32_t use);

/* The chunk of the model in which a use happens. */
int32_t ee_use_chunk(const struct ee_model_layout *layout, int32_t use);

/* The row of the gradients that a use on this rank adds to. */
int32_t ee_use_gradient(const struct ee_params *params, int32_t row, int32_t use);

/* Views of a parameter in an arena (parameters, gradients, moments). ee_param_tensor has rank 1 or
 * 2; ee_param_joined spans the rows [first, last] of the table, which stand without gaps. */
struct ee_tensor ee_param_tensor(const struct ee_params *params, int32_t row, const float *arena);
struct ee_tensor ee_param_joined(const struct ee_params *params, int32_t first, int32_t last,
                                 const float *arena);

/* Fills an arena with initial values, of all parameters that are held: each element is a function
 * of (seed, name, element) alone. */
EE_WARN_UNUSED enum ee_status ee_params_init(struct ee_ctx *ctx, const struct ee_params *params,
                                             float *arena, float initializer_range, uint64_t seed);

/* The same for one row, which is held. */
EE_WARN_UNUSED enum ee_status ee_params_init_row(struct ee_ctx *ctx, const struct ee_params *params,
                                                 int32_t row, float *arena, float initializer_range,
                                                 uint64_t seed);

EE_EXTERN_C_END

#endif
