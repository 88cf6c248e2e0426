#include "model/layout.h"

#include "base/alloc.h"

/* Whether a chunk has an exit at this depth. */
static bool holds(const struct ee_config *config, const struct ee_stage *stage, int32_t depth,
                  bool earlier_edge) {
    int32_t low = 2 * stage->first_layer, high = 2 * stage->last_layer;
    if (depth == low)
        return !earlier_edge || stage->first_layer == 0;
    if (depth == high)
        return earlier_edge || stage->last_layer == config->num_layers;
    return low < depth && depth < high;
}

static enum ee_status check_bounds(const struct ee_config *config, int32_t parts,
                                   const int32_t *bounds) {
    bool good = bounds[0] == 0 && bounds[parts] == config->num_layers;
    for (int32_t g = 0; g < parts; g++)
        good = good && bounds[g] < bounds[g + 1];
    if (!good)
        EE_FAIL(EE_ERR_INVALID,
                "the bounds of %d chunks must ascend from 0 to the %d layers of the model", parts,
                config->num_layers);
    return EE_OK;
}

static void fill(struct ee_model_layout *layout, const struct ee_config *config,
                 const int32_t *bounds, bool earlier_edge) {
    int32_t parts = layout->ranks * layout->chunks;
    for (int32_t g = 0; g < parts; g++) {
        struct ee_stage *stage = &layout->stages[g];
        int64_t layers = config->num_layers;
        stage->first_layer = bounds ? bounds[g] : (int32_t)ee_ceil_div(g * layers, parts);
        stage->last_layer = bounds ? bounds[g + 1] : (int32_t)ee_ceil_div((g + 1) * layers, parts);
        stage->embeds = g == 0;
        stage->exit[config->num_exits] = g == parts - 1;
        for (int32_t e = 0; e < config->num_exits; e++)
            stage->exit[e] = holds(config, stage, ee_exit_depth(&config->exits[e]), earlier_edge);
    }
}

enum ee_status ee_layout_create(struct ee_model_layout **out, const struct ee_config *config,
                                int32_t ranks, int32_t chunks, const int32_t *bounds,
                                bool earlier_edge) {
    *out = NULL;
    if (ranks < 1 || chunks < 1 || (int64_t)ranks * chunks > config->num_layers)
        EE_FAIL(EE_ERR_INVALID,
                "%d layers cannot be split into %d ranks with %d chunks each: every chunk needs a "
                "layer; use fewer ranks or chunks",
                config->num_layers, ranks, chunks);
    if (bounds)
        EE_TRY(check_bounds(config, ranks * chunks, bounds));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_model_layout), "a layout"));
    struct ee_model_layout *layout = memory;
    layout->ranks = ranks;
    layout->chunks = chunks;
    enum ee_status status =
        ee_alloc(&memory, sizeof(struct ee_stage) * (size_t)(ranks * chunks), "a layout");
    if (status != EE_OK) {
        ee_free(layout);
        return status;
    }
    layout->stages = memory;
    fill(layout, config, bounds, earlier_edge);
    *out = layout;
    return EE_OK;
}

void ee_layout_destroy(struct ee_model_layout *layout) {
    if (!layout)
        return;
    ee_free(layout->stages);
    ee_free(layout);
}
