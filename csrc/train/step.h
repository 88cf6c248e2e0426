/* A training step: runs the action list of its schedule, then clips and updates. */
#ifndef EE_STEP_H
#define EE_STEP_H

#include "comm/comm.h"
#include "model/chunk.h"
#include "model/optim.h"
#include "train/list.h"

EE_EXTERN_C_BEGIN

struct ee_trainer_config {
    int64_t rows; /* tokens of a microbatch */
    int32_t microbatches;
    enum ee_schedule_kind schedule;
    enum ee_recompute recompute;
    float temperature[EE_MAX_EXITS]; /* of the training loss of each early exit */
    bool dynamic_weights;            /* token-wise, for early exits */
};

struct ee_trainer {
    struct ee_model *model; /* not owned */
    struct ee_trainer_config config;
    struct ee_list *list;
    struct ee_chunk *chunk;
    struct ee_comm *comm;
    float *gradient, *moment1, *moment2; /* arenas as the model's weights */
    int64_t steps;                       /* optimizer steps taken */
};

/* The M microbatches of a step. Arrays are [M, N]. */
struct ee_step_input {
    const int32_t *token, *target, *position;
    const uint64_t *row_id;        /* NULL where there is no dropout */
    const int32_t *segment;        /* boundaries of each microbatch, one after the other */
    const int32_t *segment_counts; /* [M]: microbatch m has segment_counts[m] + 1 boundaries */
};

struct ee_step_settings {
    float exit_weight[EE_MAX_EXITS];
    struct ee_adamw_params adamw;   /* gradient_scale and step are set by the step itself */
    double clip;                    /* largest gradient norm; 0: no clipping */
    double max_loss, max_grad_norm; /* above: no update */
    uint64_t dropout_seed;
    bool update; /* false: gradients are only accumulated */
};

struct ee_step_result {
    double loss[EE_MAX_EXITS + 1];       /* mean over unmasked tokens, each exit, final one last */
    double confidence[EE_MAX_EXITS + 1]; /* mean largest probability */
    int64_t tokens;                      /* unmasked */
    double grad_norm;                    /* before clipping; 0 without update */
    bool finite, updated;
};

EE_WARN_UNUSED enum ee_status ee_trainer_create(struct ee_trainer **out, struct ee_model *model,
                                                const struct ee_trainer_config *config);
void ee_trainer_destroy(struct ee_trainer *trainer);

/* One step. Where a loss or the gradient norm is not finite or above its limit nothing is updated;
 * then, and after an error, the gradients are zero again. */
EE_WARN_UNUSED enum ee_status ee_trainer_step(struct ee_trainer *trainer,
                                              const struct ee_step_input *input,
                                              const struct ee_step_settings *settings,
                                              struct ee_step_result *result);

void ee_trainer_zero_gradients(struct ee_trainer *trainer);

struct ee_evaluation {
    struct ee_exit_sums sums[EE_MAX_EXITS + 1]; /* at temperature 1 */
    /* [E][count * N]: largest probability of each token at each exit, and its argmax. */
    float *confidence;
    int32_t *token;
};

/* Forward only, without dropout, of `count` microbatches; evaluation's arrays are the caller's. */
EE_WARN_UNUSED enum ee_status ee_trainer_evaluate(struct ee_trainer *trainer,
                                                  const struct ee_step_input *input, int32_t count,
                                                  struct ee_evaluation *evaluation);

/* Floating-point operations of the matrix products of a step, recomputation not counted. */
double ee_trainer_flops(const struct ee_trainer *trainer);

EE_EXTERN_C_END

#endif
