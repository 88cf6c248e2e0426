#include "model/model.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

/* Angles are products in float32, as everywhere in the field: models were trained with them. */
static enum ee_status fill_rope(struct ee_model *model) {
    const struct ee_config *c = &model->config;
    int64_t half = c->rope_dims / 2;
    size_t bytes = (size_t)(c->max_positions * half) * sizeof(float);
    void *memory;
    EE_TRY(ee_alloc(&memory, bytes, "the rotary tables"));
    model->rope_cos = memory;
    EE_TRY(ee_alloc(&memory, bytes, "the rotary tables"));
    model->rope_sin = memory;
    for (int64_t p = 0; p < c->max_positions; p++) {
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)((float)p * c->rope_freq[i]);
            model->rope_cos[p * half + i] = (float)cos(angle) * c->rope_scale;
            model->rope_sin[p * half + i] = (float)sin(angle) * c->rope_scale;
        }
    }
    return EE_OK;
}

static enum ee_status copy_config(struct ee_model *model, const struct ee_config *config) {
    model->config = *config;
    model->config.rope_freq = NULL;
    if (config->positions != EE_POSITIONS_ROPE)
        return EE_OK;
    size_t bytes = (size_t)(config->rope_dims / 2) * sizeof(float);
    void *memory;
    EE_TRY(ee_alloc(&memory, bytes, "the rotary frequencies"));
    memcpy(memory, config->rope_freq, bytes);
    model->config.rope_freq = memory;
    return fill_rope(model);
}

static enum ee_status create_layout(struct ee_model *model, const struct ee_part *part) {
    bool whole = part->ranks == 0;
    int32_t ranks = whole ? 1 : part->ranks, chunks = whole ? 1 : part->chunks;
    EE_TRY(ee_layout_create(&model->layout, &model->config, ranks, chunks, part->bounds,
                            part->earlier_edge));
    if (part->rank < 0 || part->rank >= ranks)
        EE_FAIL(EE_ERR_INVALID, "the ranks of the pipeline are 0 to %d, got %d", ranks - 1,
                part->rank);
    model->rank = part->rank;
    model->exact_ties = part->exact_ties;
    return EE_OK;
}

enum ee_status ee_model_create(struct ee_model **out, const struct ee_config *config,
                               const struct ee_model_options *options) {
    *out = NULL;
    EE_TRY(ee_config_check(config));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_model), "a model"));
    struct ee_model *model = memory;
    enum ee_status status;
    EE_GOTO(status, copy_config(model, config), fail);
    EE_GOTO(status, create_layout(model, &options->part), fail);
    EE_GOTO(status,
            ee_params_create(&model->params, &model->config, model->layout, model->rank,
                             model->exact_ties),
            fail);
    if (!options->without_weights) {
        size_t bytes = (size_t)model->params->elements * sizeof(float);
        EE_GOTO(status, ee_alloc(&memory, bytes, "the parameters"), fail);
        model->weights = memory;
    }
    EE_GOTO(status, ee_ctx_create(&model->ctx, options->isa, options->threads), fail);
    *out = model;
    return EE_OK;
fail:
    ee_model_destroy(model);
    return status;
}

void ee_model_destroy(struct ee_model *model) {
    if (!model)
        return;
    ee_ctx_destroy(model->ctx);
    ee_free(model->weights);
    ee_params_destroy(model->params);
    ee_layout_destroy(model->layout);
    ee_free(model->rope_cos);
    ee_free(model->rope_sin);
    union {
        const float *in;
        void *out;
    } freq = {model->config.rope_freq};
    ee_free(freq.out);
    ee_free(model);
}

enum ee_status ee_model_require_weights(const struct ee_model *model) {
    if (!model->weights)
        EE_FAIL(EE_ERR_INVALID,
                "the model has no weights in memory (it was made with weights=False, for an engine "
                "that loads its own); make it with weights=True");
    return EE_OK;
}

struct ee_rope ee_model_rope(const struct ee_model *model) {
    const struct ee_config *c = &model->config;
    return (struct ee_rope){model->rope_cos, model->rope_sin, c->max_positions, c->rope_dims,
                            c->rope_interleaved};
}

struct ee_attention_params ee_model_attention(const struct ee_model *model, int32_t layer) {
    const struct ee_config *c = &model->config;
    return (struct ee_attention_params){c->attention_scale, c->attention_softcap, c->window[layer],
                                        NULL};
}
