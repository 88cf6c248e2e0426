#include "model/optim.h"

/* The elements of a row; rows without a gap between them are not merged, so that each has its own
 * sum and its own decay. */
static struct ee_tensor flat(const struct ee_param *row, const float *arena) {
    return ee_vector(arena + row->offset, row->shape[0] * row->shape[1]);
}

enum ee_status ee_optim_sum_squares(const struct ee_model *model, const float *gradient,
                                    double *sums) {
    for (int32_t i = 0; i < model->params->count; i++) {
        const struct ee_param *row = &model->params->rows[i];
        sums[i] = 0;
        if (row->frozen || !row->owned)
            continue;
        struct ee_tensor g = flat(row, gradient);
        EE_TRY(ee_sum_squares(model->ctx, &sums[i], &g));
    }
    return EE_OK;
}

enum ee_status ee_optim_adamw(const struct ee_model *model, float *gradient, float *moment1,
                              float *moment2, const struct ee_adamw_params *params) {
    for (int32_t i = 0; i < model->params->count; i++) {
        const struct ee_param *row = &model->params->rows[i];
        if (row->frozen || !row->held)
            continue;
        struct ee_adamw_params p = *params;
        if (!row->decay)
            p.weight_decay = 0;
        struct ee_tensor weight = flat(row, model->weights), g = flat(row, gradient);
        struct ee_tensor m = flat(row, moment1), v = flat(row, moment2);
        EE_TRY(ee_adamw(model->ctx, &weight, &m, &v, &g, &p));
    }
    return EE_OK;
}
