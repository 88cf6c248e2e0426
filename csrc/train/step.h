/* A training step: runs the action list of its schedule, sums the gradients of tied parameters,
 * then clips and updates. Every rank of the pipeline takes the same step with the same input. */
#ifndef EE_STEP_H
#define EE_STEP_H

#include "model/chunk.h"
#include "model/optim.h"
#include "train/runner.h"
#include "train/ties.h"
#include "train/walk.h"

EE_EXTERN_C_BEGIN

struct ee_trainer_config {
    int64_t rows; /* tokens of a microbatch */
    /* Ranks and chunks are those of the model's layout. What its pointers point to, and the lists,
     * stay the caller's and are not needed after ee_trainer_create. */
    struct ee_schedule_spec schedule;
    struct ee_given_list *lists; /* [ranks] in place of those that the schedule gives; or NULL */
    struct ee_comm *comm;        /* the ranks of the pipeline, in order; NULL: one rank alone */
    enum ee_recompute recompute;
    bool defer_exits;                /* split backwards: see ee_chunk_options */
    float temperature[EE_MAX_EXITS]; /* of the training loss of each early exit */
    bool dynamic_weights;            /* token-wise, for early exits */
    struct ee_fault fault;           /* for tests */
};

struct ee_trainer {
    struct ee_model *model; /* not owned */
    struct ee_trainer_config config;
    int32_t microbatches; /* of an input, those of bubble filling included */
    struct ee_list *list;
    struct ee_list *forwards; /* of the last evaluation */
    struct ee_chunk **chunks; /* [chunks of a rank] */
    struct ee_runner *runner;
    struct ee_ties *ties;
    struct ee_comm *comm;
    struct ee_comm *own_comm;            /* where the caller gave none */
    float *gradient, *moment1, *moment2; /* gradient_elements, and twice elements of the table */
    double *sums;                        /* [rows of the table] */
    int64_t steps;                       /* optimizer steps taken */
    struct ee_trace *trace;              /* NULL: steps are not recorded; not owned */
};

/* The microbatches of a step, [M, N]; those of bubble filling come last, Part 1 first. */
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
    bool update;    /* false: gradients are only accumulated */
    int32_t signal; /* any number; the step returns the largest of all ranks */
};

struct ee_step_result {
    double loss[EE_MAX_EXITS + 1];       /* mean over unmasked tokens, each exit, final one last */
    double confidence[EE_MAX_EXITS + 1]; /* mean largest probability */
    int64_t tokens;                      /* unmasked, of the microbatches that run in full */
    double grad_norm;                    /* before clipping; 0 without update */
    bool finite, updated;
    int32_t signal;
};

EE_WARN_UNUSED enum ee_status ee_trainer_create(struct ee_trainer **out, struct ee_model *model,
                                                const struct ee_trainer_config *config);
void ee_trainer_destroy(struct ee_trainer *trainer);

/* One step, a collective. A loss is the mean over the tokens that its exit was trained on. Where a
 * loss or the gradient norm is not finite or above its limit nothing is updated; then, and after an
 * error, the gradients are zero again. */
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

/* Forward only, without dropout, of `count` microbatches; a collective, with the same result on all
 * ranks. evaluation's arrays are the caller's. */
EE_WARN_UNUSED enum ee_status ee_trainer_evaluate(struct ee_trainer *trainer,
                                                  const struct ee_step_input *input, int32_t count,
                                                  struct ee_evaluation *evaluation);

/* Bytes of activations, put-off operands and buffers of messages. */
int64_t ee_trainer_activation_bytes(const struct ee_trainer *trainer);

/* Floating-point operations of this rank's matrix products in a step, recomputation not counted. */
double ee_trainer_flops(const struct ee_trainer *trainer);

EE_EXTERN_C_END

#endif
