#include "train/step.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

static enum ee_status take_arena(float **out, const struct ee_model *model, const char *what) {
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)model->params->elements * sizeof(float), what));
    *out = memory;
    return EE_OK;
}

enum ee_status ee_trainer_create(struct ee_trainer **out, struct ee_model *model,
                                 const struct ee_trainer_config *config) {
    *out = NULL;
    if (config->schedule != EE_SCHEDULE_1F1B && config->schedule != EE_SCHEDULE_GPIPE)
        EE_FAIL(EE_ERR_UNSUPPORTED,
                "one rank trains with the schedule 1f1b or gpipe, got %s; choose one of these",
                ee_schedule_name(config->schedule));
    if (config->rows < 1 || config->rows > INT32_MAX)
        EE_FAIL(EE_ERR_INVALID, "a microbatch holds 1 to %d tokens, got %lld", INT32_MAX,
                (long long)config->rows);
    for (int32_t e = 0; e < model->config.num_exits; e++)
        if (!(config->temperature[e] > 0 && isfinite(config->temperature[e])))
            EE_FAIL(EE_ERR_INVALID, "the temperature of exit %d must be above 0, got %g", e,
                    (double)config->temperature[e]);
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_trainer), "a trainer"));
    struct ee_trainer *trainer = memory;
    trainer->model = model;
    trainer->config = *config;
    enum ee_status status;
    EE_GOTO(status, ee_comm_self(&trainer->comm), fail);
    struct ee_schedule_spec spec = {
        .kind = config->schedule, .ranks = 1, .chunks = 1, .microbatches = config->microbatches};
    EE_GOTO(status, ee_schedule_check(&spec), fail);
    EE_GOTO(status, ee_list_create(&trainer->list, &spec, 0), fail);
    EE_GOTO(status,
            ee_chunk_create(&trainer->chunk, model, config->rows, trainer->list->slot_counts[0],
                            config->recompute),
            fail);
    EE_GOTO(status, take_arena(&trainer->gradient, model, "the gradients"), fail);
    EE_GOTO(status, take_arena(&trainer->moment1, model, "the first moments"), fail);
    EE_GOTO(status, take_arena(&trainer->moment2, model, "the second moments"), fail);
    *out = trainer;
    return EE_OK;
fail:
    ee_trainer_destroy(trainer);
    return status;
}

void ee_trainer_destroy(struct ee_trainer *trainer) {
    if (!trainer)
        return;
    ee_chunk_destroy(trainer->chunk);
    ee_list_destroy(trainer->list);
    ee_comm_destroy(trainer->comm);
    ee_free(trainer->gradient);
    ee_free(trainer->moment1);
    ee_free(trainer->moment2);
    ee_free(trainer);
}

void ee_trainer_zero_gradients(struct ee_trainer *trainer) {
    memset(trainer->gradient, 0, (size_t)trainer->model->params->elements * sizeof(float));
}

/* Microbatch m of the input. */
static struct ee_batch batch_at(const struct ee_trainer *trainer, const struct ee_step_input *input,
                                int32_t m) {
    int64_t n = trainer->config.rows;
    struct ee_batch batch = {.rows = n,
                             .token = input->token + m * n,
                             .target = input->target + m * n,
                             .position = input->position + m * n,
                             .segments = input->segment_counts[m],
                             .row_id = input->row_id ? input->row_id + m * n : NULL};
    batch.segment = input->segment;
    for (int32_t i = 0; i < m; i++)
        batch.segment += input->segment_counts[i] + 1;
    return batch;
}

/* Unmasked tokens of the whole global batch: the denominator of every loss. */
static enum ee_status count_tokens(struct ee_trainer *trainer, const struct ee_step_input *input,
                                   int64_t *tokens) {
    int64_t all = trainer->config.rows * trainer->config.microbatches, count = 0;
    for (int64_t i = 0; i < all; i++)
        count += input->target[i] >= 0;
    struct ee_action action = {"token count", -1};
    EE_TRY(ee_comm_all_reduce(trainer->comm, tokens, &count, 1, EE_COMM_I64, EE_COMM_SUM, action));
    if (*tokens == 0)
        EE_FAIL(EE_ERR_INVALID,
                "a step needs at least one token with a target, all %lld are masked",
                (long long)all);
    return EE_OK;
}

static enum ee_status run_actions(struct ee_trainer *trainer, const struct ee_step_input *input,
                                  const struct ee_step_settings *settings, int64_t tokens,
                                  struct ee_exit_sums *sums) {
    const struct ee_list *list = trainer->list;
    int32_t early = trainer->model->config.num_exits;
    struct ee_exit_training training[EE_MAX_EXITS + 1];
    for (int32_t e = 0; e < early; e++)
        training[e] =
            (struct ee_exit_training){settings->exit_weight[e], trainer->config.temperature[e],
                                      trainer->config.dynamic_weights};
    training[early] = (struct ee_exit_training){1, 1, false};
    for (int64_t i = 0; i < list->count; i++) {
        const struct ee_step_action *action = &list->actions[i];
        struct ee_batch batch = batch_at(trainer, input, action->microbatch);
        batch.dropout = input->row_id != NULL;
        batch.dropout_seed = settings->dropout_seed;
        if (action->kind == EE_STEP_FORWARD)
            EE_TRY(ee_chunk_forward(trainer->chunk, list->slots[i], &batch));
        else
            EE_TRY(ee_chunk_backward(trainer->chunk, list->slots[i], &batch, trainer->gradient,
                                     training, (double)tokens, sums));
    }
    return EE_OK;
}

/* Means over the global batch, from the sums of all ranks. */
static enum ee_status reduce_losses(struct ee_trainer *trainer, const struct ee_exit_sums *sums,
                                    struct ee_step_result *result) {
    int32_t exits = trainer->model->params->exits;
    double values[2 * (EE_MAX_EXITS + 1)];
    for (int32_t e = 0; e < exits; e++) {
        values[2 * e] = sums[e].loss;
        values[2 * e + 1] = sums[e].confidence;
    }
    struct ee_action action = {"losses", -1};
    EE_TRY(ee_comm_all_reduce(trainer->comm, values, values, 2 * exits, EE_COMM_F64, EE_COMM_SUM,
                              action));
    result->finite = true;
    for (int32_t e = 0; e < exits; e++) {
        result->loss[e] = values[2 * e] / (double)result->tokens;
        result->confidence[e] = values[2 * e + 1] / (double)result->tokens;
        result->finite = result->finite && isfinite(result->loss[e]);
    }
    return EE_OK;
}

static enum ee_status update(struct ee_trainer *trainer, const struct ee_step_settings *settings,
                             struct ee_step_result *result) {
    double sum, total;
    EE_TRY(ee_optim_sum_squares(trainer->model, trainer->gradient, &sum));
    struct ee_action action = {"gradient norm", -1};
    EE_TRY(ee_comm_all_reduce(trainer->comm, &total, &sum, 1, EE_COMM_F64, EE_COMM_SUM, action));
    result->grad_norm = sqrt(total);
    result->finite = result->finite && isfinite(result->grad_norm);
    bool high = result->grad_norm > settings->max_grad_norm;
    for (int32_t e = 0; e < trainer->model->params->exits; e++)
        high = high || result->loss[e] > settings->max_loss;
    if (!result->finite || high) {
        ee_trainer_zero_gradients(trainer);
        return EE_OK;
    }
    struct ee_adamw_params adamw = settings->adamw;
    adamw.step = trainer->steps + 1;
    adamw.gradient_scale = 1;
    /* The small constant is torch.nn.utils.clip_grad_norm_'s. */
    if (settings->clip > 0 && settings->clip < result->grad_norm + 1e-6)
        adamw.gradient_scale = (float)(settings->clip / (result->grad_norm + 1e-6));
    EE_TRY(ee_optim_adamw(trainer->model, trainer->gradient, trainer->moment1, trainer->moment2,
                          &adamw));
    trainer->steps++;
    result->updated = true;
    return EE_OK;
}

static enum ee_status step(struct ee_trainer *trainer, const struct ee_step_input *input,
                           const struct ee_step_settings *settings, struct ee_step_result *result) {
    struct ee_exit_sums sums[EE_MAX_EXITS + 1] = {0};
    EE_TRY(count_tokens(trainer, input, &result->tokens));
    EE_TRY(run_actions(trainer, input, settings, result->tokens, sums));
    EE_TRY(reduce_losses(trainer, sums, result));
    return settings->update ? update(trainer, settings, result) : EE_OK;
}

enum ee_status ee_trainer_step(struct ee_trainer *trainer, const struct ee_step_input *input,
                               const struct ee_step_settings *settings,
                               struct ee_step_result *result) {
    *result = (struct ee_step_result){0};
    enum ee_status status = step(trainer, input, settings, result);
    if (status != EE_OK)
        ee_trainer_zero_gradients(trainer);
    return status;
}

enum ee_status ee_trainer_evaluate(struct ee_trainer *trainer, const struct ee_step_input *input,
                                   int32_t count, struct ee_evaluation *evaluation) {
    static const struct ee_exit_training plain = {1, 1, false};
    int32_t exits = trainer->model->params->exits;
    int64_t n = trainer->config.rows, all = n * count;
    memset(evaluation->sums, 0, sizeof evaluation->sums);
    for (int32_t m = 0; m < count; m++) {
        struct ee_batch batch = batch_at(trainer, input, m);
        struct ee_exit_run run[EE_MAX_EXITS + 1] = {0};
        for (int32_t e = 0; e < exits; e++) {
            run[e].training = &plain;
            run[e].tokens = 1;
            run[e].sums = &evaluation->sums[e];
            run[e].confidence = evaluation->confidence + e * all + m * n;
            run[e].token = evaluation->token + e * all + m * n;
        }
        EE_TRY(ee_chunk_evaluate(trainer->chunk, &batch, run));
    }
    return EE_OK;
}

double ee_trainer_flops(const struct ee_trainer *trainer) {
    return ee_chunk_flops(trainer->chunk, trainer->config.rows) * trainer->config.microbatches;
}
