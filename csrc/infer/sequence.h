/* A sequence in flight: its settings, where it stands, and its deferred rows. */
#ifndef EE_SEQUENCE_H
#define EE_SEQUENCE_H

#include "infer/engine.h"

EE_EXTERN_C_BEGIN

struct ee_sequence {
    int32_t id;
    int32_t slot; /* its place in the cache */
    struct ee_arena arena;

    int32_t *prompt;
    int64_t prompt_count;
    float *thresholds; /* [exits]; the final one's is never looked at */
    int32_t *stop_tokens;
    int64_t stop_count;
    int64_t length_limit; /* prompt and new tokens together */
    struct ee_sampling sampling;

    int64_t read;  /* rows of the prompt that are in the cache to the last layer */
    int64_t count; /* tokens so far, the prompt's included: the position of the next one */
    int32_t last;  /* the newest token, not in the cache yet */

    /* Rows that left early, the oldest first: positions count - 1 - deferred .. count - 2. Older
     * rows stand at least as deep as newer ones. */
    int32_t max_deferred, deferred;
    float *hidden;  /* [max_deferred, C] */
    int32_t *depth; /* [max_deferred] */

    /* Of the step in progress; taken over when it succeeds. */
    struct {
        bool token_row; /* a row of this sequence is on its way to a token */
        bool decided;   /* the token is chosen: event is filled */
        bool left;      /* its row left early and is deferred */
        bool failed;    /* logits that are not finite */
        int64_t prompt_rows;
        struct ee_event event;
    } step;
};

/* Checks a request against a model and a context of max_length positions. */
EE_WARN_UNUSED enum ee_status ee_request_check(const struct ee_request *request,
                                               const struct ee_config *config, int64_t max_length);

EE_WARN_UNUSED enum ee_status ee_sequence_create(struct ee_sequence **out,
                                                 const struct ee_request *request,
                                                 const struct ee_config *config,
                                                 int64_t max_length);
void ee_sequence_destroy(struct ee_sequence *sequence);

/* Whether `token`, the next one, ends the sequence. */
enum ee_done ee_sequence_done(const struct ee_sequence *sequence, int32_t token);

EE_EXTERN_C_END

#endif
