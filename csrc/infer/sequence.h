/* A sequence in flight: its settings, where it stands, and its deferred rows. */
#ifndef EE_SEQUENCE_H
#define EE_SEQUENCE_H

#include "infer/engine.h"

EE_EXTERN_C_BEGIN

struct ee_sequence {
    int32_t id;
    int32_t slot; /* its place in the cache */
    enum ee_engine_kind kind;
    struct ee_arena arena;

    int32_t *tokens; /* [length_limit]: the prompt, what was written, and drafts */
    int64_t prompt_count;
    int64_t min_count;    /* no stop token comes at a position before this */
    int64_t length_limit; /* prompt and new tokens together */
    float *thresholds;    /* [early exits] */
    int32_t *stop_tokens, *forced, *replay;
    int64_t stop_count, forced_count, replay_count;
    bool all_confidences, full_depth;
    struct ee_sampling sampling;

    bool finishing; /* only its deferred rows are to run */
    int64_t read;   /* rows of the prompt that are in the cache to the last layer */
    int64_t count;  /* tokens so far, drafts included: the position of the next one */

    /* Rows that left early, the oldest first: positions count - 1 - deferred .. count - 2. Older
     * rows stand at least as deep as newer ones. Where the sequence speculates, the token after
     * each of them is a draft. */
    int32_t max_deferred, deferred;
    float *hidden;              /* [max_deferred, C]; nothing where they are fed again */
    int32_t *depth, *exit;      /* [max_deferred] where each stands, and left */
    struct ee_event_exit *said; /* [max_deferred + 1, exits], the newest row's last */
    float *draft_logits;        /* [max_deferred, V]; nothing where drafts are not sampled */

    /* Rank 0 of a pipeline: passes that know the sequence; whether its newest row is in one of
     * them; rows whose full depth is still to be told; how the sequence ends when that has come;
     * whether it has ended otherwise. */
    int32_t flights;
    bool under_way;
    int32_t awaited, ending;
    bool ended;

    /* Of the step in progress; taken over when it succeeds. */
    struct {
        bool token_row; /* the newest row is on its way to a token */
        bool decided;   /* the token is chosen: event is filled */
        bool told;      /* the event is in the list */
        bool left;      /* the newest row left early and is deferred */
        bool failed;    /* logits that are not finite: event tells where */
        int64_t prompt_rows;
        int64_t first_event; /* of the tokens that are scored */
        int64_t drafts, accepted;
        struct ee_event event;
    } step;
};

/* Checks a request against a model and a context of max_length positions. */
EE_WARN_UNUSED enum ee_status ee_request_check(const struct ee_request *request,
                                               const struct ee_config *config, int64_t max_length);

/* A checked request. */
EE_WARN_UNUSED enum ee_status ee_sequence_create(struct ee_sequence **out,
                                                 const struct ee_request *request,
                                                 const struct ee_config *config,
                                                 int64_t max_length);
void ee_sequence_destroy(struct ee_sequence *sequence);

/* Position of the oldest deferred row, or of the newest row where none is deferred: rows from there
 * on stay and leave together. */
static inline int32_t ee_sequence_first(const struct ee_sequence *s) {
    return (int32_t)s->count - 1 - s->deferred;
}

/* What the exits said about the row at `position`. */
static inline struct ee_event_exit *ee_sequence_said(const struct ee_sequence *s, int32_t position,
                                                     int32_t exits) {
    return s->said + (int64_t)(position - ee_sequence_first(s)) * exits;
}

/* The token that stands at `position` of the text when `chosen` was chosen for it. */
static inline int32_t ee_sequence_text(const struct ee_sequence *s, int64_t position,
                                       int32_t chosen) {
    int64_t i = position - s->prompt_count;
    return i < s->forced_count ? s->forced[i] : chosen;
}

/* Whether `token`, at `position` of the text, ends the sequence. */
enum ee_done ee_sequence_done(const struct ee_sequence *sequence, int64_t position, int32_t token);

/* Whether the newest row may leave a draft behind: there is room for it, and for the row that is
 * to verify it, and the text goes on. */
bool ee_sequence_drafts(const struct ee_sequence *sequence);

EE_EXTERN_C_END

#endif
