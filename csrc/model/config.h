/* What a model is: sizes, kinds and exits. Filled by csrc/python from a dict of the same names,
 * checked by ee_config_check, and never changed afterwards. */
#ifndef EE_CONFIG_H
#define EE_CONFIG_H

#include "ops/ops.h"

EE_EXTERN_C_BEGIN

#define EE_MAX_EXITS 64
#define EE_MAX_LAYERS 4096

enum ee_family { EE_FAMILY_EELLM, EE_FAMILY_LLAMA, EE_FAMILY_GPT2 };
enum ee_position_kind { EE_POSITIONS_NONE, EE_POSITIONS_LEARNED, EE_POSITIONS_ROPE };
enum ee_branch { EE_BRANCH_NONE, EE_BRANCH_MLP, EE_BRANCH_BLOCK };
enum ee_exit_norm { EE_EXIT_NORM_NONE, EE_EXIT_NORM_OWN, EE_EXIT_NORM_FINAL };

/* Where an exit's output matrix comes from: an index >= 0 is that of another exit. */
enum { EE_OUTPUT_OWN = -1, EE_OUTPUT_EMBEDDING = -2, EE_OUTPUT_FINAL = -3 };

/* An early exit (DESIGN section 4). */
struct ee_exit_config {
    int32_t layer; /* 1 .. num_layers */
    bool before;   /* at the input of the layer instead of its output */
    enum ee_branch branch;
    enum ee_exit_norm norm;
    int32_t output;
};

struct ee_config {
    enum ee_family family; /* which names the parameters have in a Hugging Face file */

    int32_t vocab_size, hidden_size, intermediate_size, num_layers;
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t max_positions;

    struct ee_norm_params norm;
    enum ee_activation activation;
    bool gated; /* SwiGLU, GeGLU: two matrices up, gate and up */
    bool bias_q, bias_kv, bias_o, bias_up, bias_down;
    bool norm_bias;         /* LayerNorm with a bias */
    bool qk_norm;           /* norm over each head of queries and keys, before the rotation */
    bool parallel_residual; /* attention and MLP both read the layer's input */
    bool shared_norm;       /* with parallel_residual: one norm for both */
    bool tie_embeddings;    /* the final output matrix is the token embedding */

    enum ee_position_kind positions;
    int32_t rope_dims; /* channels of a head that are rotated */
    bool rope_interleaved;
    float rope_scale;       /* multiplies cosines and sines (attention factor of yarn; else 1) */
    const float *rope_freq; /* [rope_dims / 2] angles per position, scaling included */

    float attention_scale;
    float attention_softcap, logit_softcap; /* 0: none */
    float embedding_scale;                  /* multiplies token embeddings; 1 */
    int32_t window[EE_MAX_LAYERS];          /* sliding window of each layer, 0: none */

    float embedding_dropout, attention_dropout, residual_dropout;

    int32_t num_exits; /* early ones; the final exit is implied */
    struct ee_exit_config exits[EE_MAX_EXITS];
};

/* Checks everything that the code below relies on, naming the key that is wrong. */
EE_WARN_UNUSED enum ee_status ee_config_check(const struct ee_config *config);

/* Depth in half layers at which an exit takes its hidden state: 2 (l - 1) before layer l, 2 l after
 * it, and 2 (l - 1) + 1 (between attention and MLP) for a branch MLP. */
int32_t ee_exit_depth(const struct ee_exit_config *exit);

EE_EXTERN_C_END

#endif
