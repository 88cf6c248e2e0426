/* One batch step of decoding, and the state that it works on: which rows run (step.c), and what an
 * exit makes of those that it looks at (decide.c). */
#ifndef EE_STEP_H
#define EE_STEP_H

#include "infer/events.h"
#include "infer/sequence.h"

EE_EXTERN_C_BEGIN

/* Rows of prompts that a step reads at most, over all sequences: enough for the matrix products to
 * run at full rate, few enough that other sequences need not wait long for their next token. */
#define EE_PROMPT_ROWS 256

/* Rows that an output matrix takes at a time: logits exist for so many. */
#define EE_HEAD_ROWS 64

struct ee_engine {
    const struct ee_model *model;
    struct ee_weights *weights;
    struct ee_cache *cache;
    struct ee_runner runner;
    struct ee_sampler sampler;
    struct ee_sequence **sequences; /* [max_sequences], by place in the cache; NULL: free */
    int32_t active, next_id;
    struct ee_event_list events;
    bool pending; /* the events have not been handed out: the step that made them failed */
    int64_t steps, drafts, accepted;
};

/* Runs the step: every sequence has the result in its `step`, and nothing else has changed. */
EE_WARN_UNUSED enum ee_status ee_step_run(struct ee_engine *engine);

/* Nothing more of a sequence needs to run: it fails, or its last token is chosen. */
static inline bool ee_step_ended(const struct ee_sequence *s) {
    return s->step.failed ||
           (s->step.decided && s->step.event.done != EE_NOT_DONE && !s->full_depth);
}

/* Runs exit `exit` on the rows of the batch that it is to look at, and takes their decisions. */
EE_WARN_UNUSED enum ee_status ee_decide(struct ee_engine *engine, int32_t exit);

EE_EXTERN_C_END

#endif
