#include "model/config.h"

#include <math.h>

int32_t ee_exit_depth(const struct ee_exit_config *exit) {
    if (exit->branch == EE_BRANCH_MLP)
        return 2 * (exit->layer - 1) + 1;
    return exit->before ? 2 * (exit->layer - 1) : 2 * exit->layer;
}

static enum ee_status check_sizes(const struct ee_config *c) {
    const struct {
        const char *name;
        int32_t value, limit;
    } sizes[] = {
        {"vocab_size", c->vocab_size, 1 << 24},
        {"hidden_size", c->hidden_size, 1 << 20},
        {"intermediate_size", c->intermediate_size, 1 << 24},
        {"num_hidden_layers", c->num_layers, EE_MAX_LAYERS},
        {"num_attention_heads", c->num_heads, 1 << 12},
        {"num_key_value_heads", c->num_kv_heads, 1 << 12},
        {"head_dim", c->head_dim, 1 << 12},
        {"max_position_embeddings", c->max_positions, 1 << 24},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].limit)
            EE_FAIL(EE_ERR_INVALID, "%s must lie between 1 and %d, got %d", sizes[i].name,
                    sizes[i].limit, sizes[i].value);
    if (c->num_heads % c->num_kv_heads != 0)
        EE_FAIL(EE_ERR_INVALID, "num_key_value_heads must divide num_attention_heads (%d), got %d",
                c->num_heads, c->num_kv_heads);
    return EE_OK;
}

static enum ee_status check_numbers(const struct ee_config *c) {
    const struct {
        const char *name;
        float value, low, high;
    } numbers[] = {
        {"norm_eps", c->norm.eps, 0, 1},
        {"attention_scale", c->attention_scale, 1e-6f, 1e6f},
        {"attn_logit_softcapping", c->attention_softcap, 0, 1e6f},
        {"final_logit_softcapping", c->logit_softcap, 0, 1e6f},
        {"embedding_scale", c->embedding_scale, 1e-6f, 1e6f},
        {"norm_offset", c->norm.weight_offset, -1e6f, 1e6f},
        {"embd_pdrop", c->embedding_dropout, 0, 0.999f},
        {"attn_pdrop", c->attention_dropout, 0, 0.999f},
        {"resid_pdrop", c->residual_dropout, 0, 0.999f},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!(numbers[i].value >= numbers[i].low && numbers[i].value <= numbers[i].high))
            EE_FAIL(EE_ERR_INVALID, "%s must lie between %g and %g, got %g", numbers[i].name,
                    (double)numbers[i].low, (double)numbers[i].high, (double)numbers[i].value);
    if (c->positions == EE_POSITIONS_ROPE) {
        if (!(c->rope_scale > 0 && isfinite(c->rope_scale)))
            EE_FAIL(EE_ERR_INVALID, "the attention factor of rope_scaling must be above 0, got %g",
                    (double)c->rope_scale);
        if (c->rope_dims < 2 || c->rope_dims % 2 != 0 || c->rope_dims > c->head_dim)
            EE_FAIL(EE_ERR_INVALID,
                    "the rotated part of a head must be an even number from 2 to head_dim (%d), "
                    "got %d; set partial_rotary_factor",
                    c->head_dim, c->rope_dims);
        if (!c->rope_freq)
            EE_FAIL(EE_ERR_INVALID, "rotary positions need their frequencies");
        for (int32_t i = 0; i < c->rope_dims / 2; i++)
            if (!isfinite(c->rope_freq[i]))
                EE_FAIL(EE_ERR_INVALID,
                        "rotary frequency %d is not finite; see rope_theta and "
                        "rope_scaling",
                        i);
    }
    for (int32_t l = 0; l < c->num_layers; l++)
        if (c->window[l] < 0)
            EE_FAIL(EE_ERR_INVALID, "sliding_window of layer %d must not be negative, got %d",
                    l + 1, c->window[l]);
    return EE_OK;
}

static enum ee_status check_kinds(const struct ee_config *c) {
    if (c->shared_norm && !c->parallel_residual)
        EE_FAIL(EE_ERR_INVALID, "a norm shared by attention and MLP needs parallel_residual");
    if (c->norm_bias && c->norm.kind != EE_LAYERNORM)
        EE_FAIL(EE_ERR_INVALID, "RMSNorm has no bias");
    if (c->bias_q != c->bias_kv && c->family == EE_FAMILY_GPT2)
        EE_FAIL(EE_ERR_INVALID, "GPT-2 has a bias on all of query, key and value, or on none");
    if (c->family == EE_FAMILY_GPT2 &&
        (c->gated || c->qk_norm || c->positions != EE_POSITIONS_LEARNED || c->parallel_residual ||
         c->num_heads != c->num_kv_heads))
        EE_FAIL(EE_ERR_INVALID, "a GPT-2 model has learned positions, one MLP matrix up, as many "
                                "key-value heads as heads, no query-key norm and no parallel "
                                "residual; use model_type eellm for others");
    return EE_OK;
}

static enum ee_status check_exit(const struct ee_config *c, int32_t i) {
    const struct ee_exit_config *exit = &c->exits[i];
    if (exit->layer < 1 || exit->layer > c->num_layers)
        EE_FAIL(EE_ERR_INVALID, "early exit %d: layer must lie between 1 and %d, got %d", i,
                c->num_layers, exit->layer);
    if (exit->branch == EE_BRANCH_MLP && exit->before)
        EE_FAIL(EE_ERR_INVALID,
                "early exit %d: an MLP branch is parallel to its layer's own MLP, so its position "
                "must be 'after', got 'before'; use a block or no branch",
                i);
    if (exit->branch == EE_BRANCH_MLP && c->parallel_residual)
        EE_FAIL(EE_ERR_INVALID,
                "early exit %d: an MLP branch needs a layer without parallel "
                "residual; use a block or no branch",
                i);
    if (i > 0 && ee_exit_depth(exit) <= ee_exit_depth(&c->exits[i - 1]))
        EE_FAIL(EE_ERR_INVALID,
                "early exits must be listed from the shallowest to the deepest, each depth once: "
                "exit %d (%s layer %d) does not lie deeper than exit %d (%s layer %d)",
                i, exit->before ? "before" : "after", exit->layer, i - 1,
                c->exits[i - 1].before ? "before" : "after", c->exits[i - 1].layer);
    int32_t output = exit->output;
    if (output < EE_OUTPUT_FINAL)
        EE_FAIL(EE_ERR_INVALID,
                "early exit %d: output must be own (-1), embedding (-2), final (-3) "
                "or the index of another exit, got %d",
                i, output);
    for (int32_t steps = 0; output >= 0; steps++) {
        if (output >= c->num_exits || steps > c->num_exits || output == i)
            EE_FAIL(EE_ERR_INVALID,
                    "early exit %d: output must be own, embedding, final or the index of an exit "
                    "that leads to one, got %d",
                    i, exit->output);
        output = c->exits[output].output;
    }
    return EE_OK;
}

enum ee_status ee_config_check(const struct ee_config *c) {
    EE_TRY(check_sizes(c));
    EE_TRY(check_numbers(c));
    EE_TRY(check_kinds(c));
    if (c->num_exits < 0 || c->num_exits > EE_MAX_EXITS)
        EE_FAIL(EE_ERR_INVALID, "there may be 0 to %d early exits, got %d", EE_MAX_EXITS,
                c->num_exits);
    for (int32_t i = 0; i < c->num_exits; i++)
        EE_TRY(check_exit(c, i));
    return EE_OK;
}
