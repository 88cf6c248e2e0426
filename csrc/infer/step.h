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

struct ee_pipeline;

struct ee_engine {
    const struct ee_model *model;
    const struct ee_stage *stage; /* the layers and exits that are here */
    struct ee_pipeline *pipeline; /* NULL: all are */
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

/* Its first part: the rows that start at depth 0. */
void ee_step_start(struct ee_engine *engine);

/* Its second: from the depth of the batch through all layers and exits that are here. */
EE_WARN_UNUSED enum ee_status ee_step_layers(struct ee_engine *engine);

/* Nothing more of a sequence needs to run: it fails, or its last token is chosen. */
static inline bool ee_step_ended(const struct ee_sequence *s) {
    return s->step.failed ||
           (s->step.decided && s->step.event.done != EE_NOT_DONE && !s->full_depth);
}

/* Whether exit `exit` looks at a row of this kind, the newest of its sequence. */
bool ee_looks(const struct ee_engine *engine, const struct ee_sequence *s, enum ee_row_kind kind,
              int32_t exit);

/* Runs exit `exit` on the rows of the batch that it is to look at, runner.looked[0 .. *count), and
 * takes their decisions. */
EE_WARN_UNUSED enum ee_status ee_decide(struct ee_engine *engine, int32_t exit, int64_t *count);

/* Memory and places for a sequence of a checked request; `number` is its own. */
EE_WARN_UNUSED enum ee_status ee_engine_admit(struct ee_engine *engine, struct ee_sequence **out,
                                              const struct ee_request *request, int32_t number);

/* Takes a sequence out of the engine. */
void ee_engine_release(struct ee_engine *engine, struct ee_sequence *s);

/* Takes over the token of a sequence that its step has chosen. */
void ee_engine_take(struct ee_engine *engine, struct ee_sequence *s);

/* Says `done` on the last event of a sequence in this step. */
void ee_engine_mark(struct ee_engine *engine, const struct ee_sequence *s, int32_t done);

EE_EXTERN_C_END

#endif
