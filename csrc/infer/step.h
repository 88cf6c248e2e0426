/* One batch step of decoding, and the state that it works on. */
#ifndef EE_STEP_H
#define EE_STEP_H

#include "infer/sequence.h"

EE_EXTERN_C_BEGIN

/* Rows of prompts that a step reads at most, over all sequences: enough for the matrix products to
 * run at full rate, few enough that other sequences need not wait long for their next token. */
#define EE_PROMPT_ROWS 256

struct ee_engine {
    const struct ee_model *model;
    struct ee_weights *weights;
    struct ee_cache *cache;
    struct ee_runner runner;
    struct ee_sequence **sequences; /* [max_sequences], by place in the cache; NULL: free */
    int32_t active, next_id;
    struct ee_event *events; /* [max_sequences] */
    int64_t event_count;
    bool pending;   /* the events have not been handed out: the step that made them failed */
    int64_t *index; /* [max_sequences] rows that an exit looks at */
    double *sample_weights; /* [V] */
    int32_t *sample_order;  /* [V] */
    int64_t steps;
};

/* Runs the step: every sequence has the result in its `step`, and nothing else has changed. */
EE_WARN_UNUSED enum ee_status ee_step_run(struct ee_engine *engine);

EE_EXTERN_C_END

#endif
