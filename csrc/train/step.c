#include "train/step.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

static enum ee_status take_arena(float **out, int64_t elements, const char *what) {
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)elements * sizeof(float), what));
    *out = memory;
    return EE_OK;
}

static enum ee_status check_config(const struct ee_model *model,
                                   const struct ee_trainer_config *config) {
    const struct ee_model_layout *layout = model->layout;
    const struct ee_schedule_spec *spec = &config->schedule;
    EE_TRY(ee_schedule_check(spec));
    if (spec->ranks != layout->ranks || spec->chunks != layout->chunks)
        EE_FAIL(EE_ERR_INVALID,
                "the schedule is one of %d ranks with %d chunks, the model is spread over %d ranks "
                "with %d; make them the same",
                spec->ranks, spec->chunks, layout->ranks, layout->chunks);
    int size = config->comm ? config->comm->size : 1, rank = config->comm ? config->comm->rank : 0;
    if (size != layout->ranks || rank != model->rank)
        EE_FAIL(EE_ERR_INVALID,
                "the model is part %d of %d, the communicator has rank %d of %d; give the trainer "
                "the ranks of the pipeline",
                model->rank, layout->ranks, rank, size);
    if (config->rows < 1 || config->rows > INT32_MAX)
        EE_FAIL(EE_ERR_INVALID, "a microbatch holds 1 to %d tokens, got %lld", INT32_MAX,
                (long long)config->rows);
    for (int32_t e = 0; e < model->config.num_exits; e++)
        if (!(config->temperature[e] > 0 && isfinite(config->temperature[e])))
            EE_FAIL(EE_ERR_INVALID, "the temperature of exit %d must be above 0, got %g", e,
                    (double)config->temperature[e]);
    return EE_OK;
}

static enum ee_status create_list(struct ee_trainer *trainer) {
    const struct ee_trainer_config *config = &trainer->config;
    if (!config->lists)
        return ee_list_create(&trainer->list, &config->schedule, trainer->model->rank);
    const struct ee_given_list *mine = &config->lists[trainer->model->rank];
    return ee_list_from_actions(&trainer->list, mine->actions, mine->count, config->schedule.chunks,
                                trainer->microbatches);
}

/* One slot more than the list uses where a forward keeps none. */
static int32_t slots_of(const struct ee_list *list, int32_t chunk) {
    int32_t count = list->slot_counts[chunk];
    for (int64_t i = 0; i < list->count; i++)
        if (list->actions[i].chunk == chunk)
            count = (int32_t)ee_max(count, list->slots[i] + 1);
    return (int32_t)ee_max(count, 1);
}

static enum ee_status create_chunks(struct ee_trainer *trainer) {
    const struct ee_model *model = trainer->model;
    const struct ee_model_layout *layout = model->layout;
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)layout->chunks * sizeof *trainer->chunks, "chunks"));
    trainer->chunks = memory;
    for (int32_t c = 0; c < layout->chunks; c++) {
        struct ee_chunk_options options = {.rows = trainer->config.rows,
                                           .slots = slots_of(trainer->list, c),
                                           .recompute = trainer->config.recompute,
                                           .queues = trainer->list->queue_counts[c],
                                           .defer_exits = trainer->config.defer_exits};
        EE_TRY(ee_chunk_create(&trainer->chunks[c], model,
                               &layout->stages[c * layout->ranks + model->rank], &options));
    }
    return EE_OK;
}

static enum ee_status create_runner(struct ee_trainer *trainer) {
    const struct ee_schedule_spec *spec = &trainer->config.schedule;
    struct ee_runner_options options = {.comm = trainer->comm,
                                        .chunks = spec->chunks,
                                        .floats = trainer->config.rows *
                                                  trainer->model->config.hidden_size,
                                        .microbatches = spec->microbatches,
                                        .fill1 = spec->fill1,
                                        .list = trainer->list,
                                        .fault = trainer->config.fault};
    EE_TRY(ee_walk_buffers(spec, trainer->config.lists, &options.buffers));
    return ee_runner_create(&trainer->runner, &options);
}

/* The list of an evaluation; evaluations of one size share it. */
static enum ee_status make_forwards(struct ee_trainer *trainer, int32_t count) {
    const struct ee_model_layout *layout = trainer->model->layout;
    if (trainer->forwards && trainer->forwards->count == (int64_t)count * layout->chunks)
        return EE_OK;
    struct ee_list *list;
    EE_TRY(ee_list_of_forwards(&list, trainer->model->rank, layout->ranks, layout->chunks, count));
    ee_list_destroy(trainer->forwards);
    trainer->forwards = list;
    return EE_OK;
}

static enum ee_status create_parts(struct ee_trainer *trainer) {
    const struct ee_params *params = trainer->model->params;
    if (!trainer->comm) {
        EE_TRY(ee_comm_self(&trainer->own_comm));
        trainer->comm = trainer->own_comm;
    }
    EE_TRY(create_list(trainer));
    EE_TRY(make_forwards(trainer, trainer->microbatches));
    EE_TRY(create_chunks(trainer));
    EE_TRY(create_runner(trainer));
    EE_TRY(ee_ties_create(&trainer->ties, trainer->model, trainer->comm));
    EE_TRY(take_arena(&trainer->gradient, params->gradient_elements, "the gradients"));
    EE_TRY(take_arena(&trainer->moment1, params->elements, "the first moments"));
    EE_TRY(take_arena(&trainer->moment2, params->elements, "the second moments"));
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)params->count * sizeof *trainer->sums, "the gradient norm"));
    trainer->sums = memory;
    return EE_OK;
}

enum ee_status ee_trainer_create(struct ee_trainer **out, struct ee_model *model,
                                 const struct ee_trainer_config *config) {
    *out = NULL;
    EE_TRY(ee_model_require_weights(model));
    EE_TRY(check_config(model, config));
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_trainer), "a trainer"));
    struct ee_trainer *trainer = memory;
    const struct ee_schedule_spec *spec = &config->schedule;
    trainer->model = model;
    trainer->config = *config;
    trainer->comm = config->comm;
    trainer->microbatches = spec->microbatches + spec->fill1 + spec->fill2;
    enum ee_status status = create_parts(trainer);
    trainer->config.lists = NULL;
    trainer->config.schedule.fill2_depth = NULL;
    trainer->config.schedule.exit_ranks = NULL;
    if (status == EE_OK)
        *out = trainer;
    else
        ee_trainer_destroy(trainer);
    return status;
}

void ee_trainer_destroy(struct ee_trainer *trainer) {
    if (!trainer)
        return;
    for (int32_t c = 0; trainer->chunks && c < trainer->config.schedule.chunks; c++)
        ee_chunk_destroy(trainer->chunks[c]);
    ee_free(trainer->chunks);
    ee_runner_destroy(trainer->runner);
    ee_ties_destroy(trainer->ties);
    ee_list_destroy(trainer->list);
    ee_list_destroy(trainer->forwards);
    ee_comm_destroy(trainer->own_comm);
    ee_free(trainer->gradient);
    ee_free(trainer->moment1);
    ee_free(trainer->moment2);
    ee_free(trainer->sums);
    ee_free(trainer);
}

void ee_trainer_zero_gradients(struct ee_trainer *trainer) {
    memset(trainer->gradient, 0, (size_t)trainer->model->params->gradient_elements * sizeof(float));
}

int64_t ee_trainer_activation_bytes(const struct ee_trainer *trainer) {
    int64_t bytes = ee_runner_bytes(trainer->runner);
    for (int32_t c = 0; c < trainer->config.schedule.chunks; c++)
        bytes += (int64_t)trainer->chunks[c]->arena.capacity;
    return bytes;
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

/* A step as its actions see it. */
struct run {
    struct ee_trainer *trainer;
    const struct ee_step_input *input;
    const struct ee_step_settings *settings;
    struct ee_exit_training training[EE_MAX_EXITS + 1];
    struct ee_exit_sums sums[EE_MAX_EXITS + 1];
    /* Denominators: in microbatches of Part 2, and in all others. */
    double full_tokens[EE_MAX_EXITS + 1], tokens[EE_MAX_EXITS + 1];
    double scale; /* of this rank's gradients */
    bool alike;   /* until the ranks go separate ways, an error is the same on all */
    const struct ee_evaluation *evaluation;
    int32_t count; /* microbatches of an evaluation */
};

static int64_t count_tokens(const struct ee_trainer *trainer, const struct ee_step_input *input,
                            int32_t first, int32_t last) {
    int64_t n = trainer->config.rows, count = 0;
    for (int64_t i = first * n; i < last * n; i++)
        count += input->target[i] >= 0;
    return count;
}

static bool is_backward(const struct ee_step_action *action) {
    return action->kind == EE_STEP_BACKWARD || action->kind == EE_STEP_BACKWARD_INPUT;
}

/* The weights that keep the gradient unbiased when microbatches fill bubbles (EE-LLM, appendix
 * C.2): with B tokens in microbatches that run in full, an exit's loss is divided by B and the
 * tokens of Part 1 that reach it, in Part 2 by B; the gradients of a rank, which Part 2's n2 tokens
 * add to, are scaled by B / (B + n2). Which microbatches these are the rank's own list says. */
static void set_denominators(struct run *run, int64_t tokens) {
    const struct ee_trainer *trainer = run->trainer;
    const struct ee_schedule_spec *spec = &trainer->config.schedule;
    int64_t part1 = 0, part2 = 0;
    for (int64_t i = 0; i < trainer->list->count; i++) {
        const struct ee_step_action *action = &trainer->list->actions[i];
        int32_t m = action->microbatch, extra = m - spec->microbatches;
        if (extra < 0 || !is_backward(action))
            continue;
        int64_t added = count_tokens(trainer, run->input, m, m + 1);
        *(extra < spec->fill1 ? &part1 : &part2) += added;
    }
    for (int32_t e = 0; e < trainer->model->params->exits; e++) {
        run->full_tokens[e] = (double)tokens;
        run->tokens[e] = (double)(tokens + part1);
    }
    run->scale = (double)tokens / (double)(tokens + part2);
}

static void set_training(struct run *run) {
    const struct ee_trainer *trainer = run->trainer;
    int32_t early = trainer->model->config.num_exits;
    for (int32_t e = 0; e < early; e++)
        run->training[e] =
            (struct ee_exit_training){run->settings->exit_weight[e], trainer->config.temperature[e],
                                      trainer->config.dynamic_weights};
    run->training[early] = (struct ee_exit_training){1, 1, false};
}

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *byte = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ byte[i]) * 1099511628211u;
    return hash;
}

/* Numbers of 32 bits, of which there are many. */
static uint64_t hash_words(uint64_t hash, const void *data, int64_t count) {
    const uint32_t *word = data;
    for (int64_t i = 0; i < count; i++)
        hash = (hash ^ word[i]) * 1099511628211u;
    return hash;
}

/* A number that tells one step's input and settings from another's. */
static int64_t fingerprint(const struct run *run) {
    const struct ee_trainer *trainer = run->trainer;
    const struct ee_step_input *input = run->input;
    const struct ee_step_settings *s = run->settings;
    int64_t all = trainer->config.rows * trainer->microbatches, boundaries = 0;
    for (int32_t m = 0; m < trainer->microbatches; m++)
        boundaries += input->segment_counts[m] + 1;
    uint64_t hash = hash_words(14695981039346656037u, input->token, all);
    hash = hash_words(hash, input->target, all);
    hash = hash_words(hash, input->position, all);
    hash = hash_words(hash, input->segment, boundaries);
    hash = hash_words(hash, s->exit_weight, trainer->model->config.num_exits);
    const double numbers[] = {s->adamw.learning_rate,
                              s->adamw.beta1,
                              s->adamw.beta2,
                              s->adamw.eps,
                              s->adamw.weight_decay,
                              s->clip,
                              s->max_loss,
                              s->max_grad_norm,
                              s->update};
    hash = hash_bytes(hash, numbers, sizeof numbers);
    hash = hash_bytes(hash, &s->dropout_seed, sizeof s->dropout_seed);
    return (int64_t)(hash ^ hash >> 32);
}

/* All ranks have the same step before them; and the largest of their signals. */
static enum ee_status agree(struct run *run, struct ee_step_result *result) {
    int64_t mine = fingerprint(run);
    int64_t values[] = {mine, ~mine, run->settings->signal};
    struct ee_action action = {"start of the step", -1};
    EE_TRY(ee_comm_all_reduce(run->trainer->comm, values, values, 3, EE_COMM_I64, EE_COMM_MAX,
                              action));
    result->signal = (int32_t)values[2];
    if (values[0] != ~values[1])
        EE_FAIL(EE_ERR_INVALID,
                "the ranks have different data or settings for step %lld; give all of them the "
                "same files and the same config",
                (long long)run->trainer->steps + 1);
    return EE_OK;
}

/* -- Actions -- */

static float **input_of(void *arg, int32_t chunk, int32_t slot) {
    return ee_chunk_input(((struct run *)arg)->trainer->chunks[chunk], slot);
}

static float *output_of(void *arg, int32_t chunk, int32_t slot) {
    return ee_chunk_output(((struct run *)arg)->trainer->chunks[chunk], slot);
}

static enum ee_status train_action(void *arg, const struct ee_step_action *action, int32_t slot,
                                   int32_t queue, float *dx) {
    struct run *run = arg;
    struct ee_trainer *trainer = run->trainer;
    const struct ee_schedule_spec *spec = &trainer->config.schedule;
    struct ee_chunk *chunk = trainer->chunks[action->chunk];
    struct ee_batch batch = batch_at(trainer, run->input, action->microbatch);
    batch.dropout = run->input->row_id != NULL;
    batch.dropout_seed = run->settings->dropout_seed;
    bool part2 = action->microbatch >= spec->microbatches + spec->fill1;
    struct ee_backward backward = {trainer->gradient, run->training,
                                   part2 ? run->full_tokens : run->tokens, run->sums};
    switch (action->kind) {
    case EE_STEP_FORWARD:
        return ee_chunk_forward(chunk, slot, &batch);
    case EE_STEP_BACKWARD_WEIGHT:
        return ee_chunk_backward_weight(chunk, queue, &batch, &backward);
    default:
        return ee_chunk_backward(chunk, slot, queue, &batch, dx, &backward);
    }
}

static enum ee_status run_actions(struct run *run) {
    struct ee_trainer *trainer = run->trainer;
    struct ee_work work = {run, train_action, input_of, output_of};
    EE_TRY(ee_runner_run(trainer->runner, trainer->list, &work, trainer->trace));
    if (run->scale != 1)
        for (int64_t i = 0; i < trainer->model->params->gradient_elements; i++)
            trainer->gradient[i] = (float)(trainer->gradient[i] * run->scale);
    return ee_ties_sum(trainer->ties, trainer->gradient);
}

/* Sums over ranks; an exit's are those of the rank that has it. */
static enum ee_status reduce_sums(struct ee_trainer *trainer, struct ee_exit_sums *sums) {
    int32_t exits = trainer->model->params->exits;
    double values[3 * (EE_MAX_EXITS + 1)] = {0};
    for (int32_t e = 0; e < exits; e++) {
        values[3 * e] = sums[e].loss;
        values[3 * e + 1] = sums[e].confidence;
        values[3 * e + 2] = (double)sums[e].tokens;
    }
    struct ee_action action = {"losses", -1};
    EE_TRY(ee_comm_all_reduce(trainer->comm, values, values, 3 * exits, EE_COMM_F64, EE_COMM_SUM,
                              action));
    for (int32_t e = 0; e < exits; e++)
        sums[e] =
            (struct ee_exit_sums){values[3 * e], values[3 * e + 1], (int64_t)values[3 * e + 2]};
    return EE_OK;
}

static enum ee_status reduce_losses(struct run *run, struct ee_step_result *result) {
    EE_TRY(reduce_sums(run->trainer, run->sums));
    result->finite = true;
    for (int32_t e = 0; e < run->trainer->model->params->exits; e++) {
        const struct ee_exit_sums *sums = &run->sums[e];
        result->loss[e] = sums->loss / (double)sums->tokens;
        result->confidence[e] = sums->confidence / (double)sums->tokens;
        result->finite = result->finite && isfinite(result->loss[e]);
    }
    return EE_OK;
}

/* The norm of all gradients: a sum for each tensor, added in the order of the table, so that the
 * layout changes no bit. */
static enum ee_status gradient_norm(struct ee_trainer *trainer, double *norm) {
    int32_t count = trainer->model->params->count;
    EE_TRY(ee_optim_sum_squares(trainer->model, trainer->gradient, trainer->sums));
    struct ee_action action = {"gradient norm", -1};
    EE_TRY(ee_comm_all_reduce(trainer->comm, trainer->sums, trainer->sums, count, EE_COMM_F64,
                              EE_COMM_SUM, action));
    double total = 0;
    for (int32_t i = 0; i < count; i++)
        total += trainer->sums[i];
    *norm = sqrt(total);
    return EE_OK;
}

static enum ee_status update(struct ee_trainer *trainer, const struct ee_step_settings *settings,
                             struct ee_step_result *result) {
    EE_TRY(gradient_norm(trainer, &result->grad_norm));
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

static enum ee_status step(struct run *run, struct ee_step_result *result) {
    const struct ee_trainer *trainer = run->trainer;
    EE_TRY(agree(run, result));
    int32_t full = trainer->config.schedule.microbatches;
    result->tokens = count_tokens(trainer, run->input, 0, full);
    if (result->tokens == 0)
        EE_FAIL(EE_ERR_INVALID,
                "a step needs at least one token with a target, all %lld are masked",
                (long long)trainer->config.rows * full);
    run->alike = false;
    set_denominators(run, result->tokens);
    set_training(run);
    EE_TRY(run_actions(run));
    EE_TRY(reduce_losses(run, result));
    return run->settings->update ? update(run->trainer, run->settings, result) : EE_OK;
}

/* After an error one rank alone can go on: nobody waits for it. Others would wait for a rank that
 * fails alone, so it ends the job; that of a communicator ends by itself, and `alike` says that all
 * ranks have the same error. */
static enum ee_status recover(struct ee_trainer *trainer, enum ee_status status, bool alike) {
    struct ee_comm *comm = trainer->comm;
    if (comm->size > 1) {
        if (!alike && status != EE_ERR_COMM)
            ee_comm_abort(comm, ee_last_error());
        return status;
    }
    if (trainer->own_comm) {
        ee_comm_destroy(trainer->own_comm);
        trainer->own_comm = NULL;
        if (ee_comm_self(&comm) != EE_OK)
            return EE_ERR_NOMEM;
        trainer->own_comm = comm;
    }
    trainer->comm = trainer->ties->comm = comm;
    ee_runner_reset(trainer->runner, comm);
    return status;
}

enum ee_status ee_trainer_step(struct ee_trainer *trainer, const struct ee_step_input *input,
                               const struct ee_step_settings *settings,
                               struct ee_step_result *result) {
    *result = (struct ee_step_result){0};
    struct run run = {.trainer = trainer, .input = input, .settings = settings, .alike = true};
    enum ee_status status = step(&run, result);
    if (status == EE_OK)
        return EE_OK;
    ee_trainer_zero_gradients(trainer);
    return recover(trainer, status, run.alike);
}

static enum ee_status evaluate_action(void *arg, const struct ee_step_action *action, int32_t slot,
                                      int32_t queue, float *dx) {
    (void)slot, (void)queue, (void)dx;
    static const struct ee_exit_training plain = {1, 1, false};
    struct run *run = arg;
    const struct ee_trainer *trainer = run->trainer;
    int64_t n = trainer->config.rows, all = n * run->count;
    struct ee_batch batch = batch_at(trainer, run->input, action->microbatch);
    struct ee_exit_run exits[EE_MAX_EXITS + 1] = {0};
    for (int32_t e = 0; e < trainer->model->params->exits; e++) {
        exits[e].training = &plain;
        exits[e].tokens = 1;
        exits[e].sums = &run->sums[e];
        exits[e].confidence = run->evaluation->confidence + e * all + action->microbatch * n;
        exits[e].token = run->evaluation->token + e * all + action->microbatch * n;
    }
    return ee_chunk_evaluate(trainer->chunks[action->chunk], &batch, exits);
}

/* What other ranks found is zero here. */
static enum ee_status gather_tokens(struct ee_trainer *trainer,
                                    const struct ee_evaluation *evaluation, int64_t count) {
    struct ee_action action = {"tokens of the evaluation", -1};
    if (trainer->comm->size == 1)
        return EE_OK;
    EE_TRY(ee_comm_all_reduce(trainer->comm, evaluation->confidence, evaluation->confidence, count,
                              EE_COMM_F32, EE_COMM_SUM, action));
    return ee_comm_all_reduce(trainer->comm, evaluation->token, evaluation->token, count,
                              EE_COMM_I32, EE_COMM_SUM, action);
}

static enum ee_status evaluate(struct ee_trainer *trainer, const struct ee_step_input *input,
                               int32_t count, struct ee_evaluation *evaluation) {
    int32_t exits = trainer->model->params->exits;
    int64_t all = exits * trainer->config.rows * count;
    memset(evaluation->confidence, 0, (size_t)all * sizeof *evaluation->confidence);
    memset(evaluation->token, 0, (size_t)all * sizeof *evaluation->token);
    struct run run = {.trainer = trainer, .input = input, .evaluation = evaluation, .count = count};
    struct ee_work work = {&run, evaluate_action, input_of, output_of};
    EE_TRY(make_forwards(trainer, count));
    EE_TRY(ee_runner_run(trainer->runner, trainer->forwards, &work, NULL));
    EE_TRY(reduce_sums(trainer, run.sums));
    memcpy(evaluation->sums, run.sums, sizeof run.sums);
    return gather_tokens(trainer, evaluation, all);
}

enum ee_status ee_trainer_evaluate(struct ee_trainer *trainer, const struct ee_step_input *input,
                                   int32_t count, struct ee_evaluation *evaluation) {
    enum ee_status status = evaluate(trainer, input, count, evaluation);
    return status == EE_OK ? EE_OK : recover(trainer, status, false);
}

double ee_trainer_flops(const struct ee_trainer *trainer) {
    double flops = 0;
    for (int32_t c = 0; c < trainer->config.schedule.chunks; c++)
        flops += ee_chunk_flops(trainer->chunks[c], trainer->config.rows);
    return flops * trainer->config.schedule.microbatches;
}
