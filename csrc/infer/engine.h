/* The decoding engine: sequences in flight, and the step that gives each of them its next token.
 *
 * A row that leaves at an early exit is deferred: its hidden state and depth are kept, and a later
 * row of its sequence that runs deeper takes it along from there, so that keys and values of all
 * earlier positions are in place and no layer is computed twice. Deferred rows are not tested
 * again. When a sequence has max_deferred of them, the next row that would leave runs to the last
 * layer with all of them; its token is still that of the exit. */
#ifndef EE_ENGINE_H
#define EE_ENGINE_H

#include "infer/head.h"
#include "infer/sampler.h"

EE_EXTERN_C_BEGIN

struct ee_engine;

enum ee_engine_kind {
    EE_ENGINE_FULL,     /* every token from the final exit */
    EE_ENGINE_DEFERRED, /* early exits, deferred rows */
};

/* What a sequence wants. Arrays are copied. */
struct ee_request {
    const int32_t *tokens; /* the prompt */
    int64_t token_count;
    int64_t max_new_tokens;
    enum ee_engine_kind kind;
    /* A token leaves at early exit e iff thresholds[e] < 1 and its confidence (the largest
     * probability of the raw logits) >= thresholds[e]. One for each early exit, one for all, or
     * none (1.0). */
    const float *thresholds;
    int64_t threshold_count;
    int32_t max_deferred;
    struct ee_sampling sampling;
    const int32_t *stop_tokens;
    int64_t stop_count;
};

enum ee_done { EE_NOT_DONE, EE_DONE_LENGTH, EE_DONE_STOP };

/* A token of a sequence. */
struct ee_event {
    int32_t sequence;
    int32_t token;
    int32_t exit;     /* index of the exit it left at; the final one is the last */
    float confidence; /* of that exit */
    float logprob;    /* of the token, from the raw logits of that exit */
    int32_t done;     /* enum ee_done */
};

struct ee_engine_options {
    enum ee_dtype dtype;   /* of the packed weights: EE_F32 or EE_BF16 */
    int32_t max_sequences; /* in flight at a time */
    int64_t max_length;    /* positions of a sequence; 0: the model's context */
    int64_t positions;     /* of the cache over all sequences; 0: as many as they could need */
};

/* The model stays the caller's and outlives the engine; its weights are copied. */
EE_WARN_UNUSED enum ee_status ee_engine_create(struct ee_engine **out, const struct ee_model *model,
                                               const struct ee_engine_options *options);
void ee_engine_destroy(struct ee_engine *engine);

/* Admits a sequence and gives its number, which is never used again. EE_ERR_BUSY when there is no
 * room now. */
EE_WARN_UNUSED enum ee_status ee_engine_add(struct ee_engine *engine, int32_t *sequence,
                                            const struct ee_request *request);

/* Ends a sequence. EE_ERR_INVALID when none of that number is in flight. */
EE_WARN_UNUSED enum ee_status ee_engine_remove(struct ee_engine *engine, int32_t sequence);

/* One batch step: each sequence whose prompt is read makes one token; a long prompt is read over
 * several steps. The events stay valid until the next call. Sequences that are done leave.
 *
 * EE_ERR_NONFINITE: the logits of a sequence were not finite; it has been ended, what the others
 * made comes with the next call. After any other failure the next call does the step again. */
EE_WARN_UNUSED enum ee_status ee_engine_step(struct ee_engine *engine,
                                             const struct ee_event **events, int64_t *count);

int32_t ee_engine_active(const struct ee_engine *engine);

struct ee_engine_stats {
    int64_t steps;
    int64_t half_layers; /* half layers run, summed over rows */
    int64_t head_rows;   /* rows through an output matrix */
    int64_t weight_bytes, cache_bytes;
};

struct ee_engine_stats ee_engine_stats(const struct ee_engine *engine);

/* Keys and values of a layer of the cache, for inspection: sets *fill, and copies [fill, K, D] each
 * where k and v are not NULL. */
EE_WARN_UNUSED enum ee_status ee_engine_peek(const struct ee_engine *engine, int32_t sequence,
                                             int32_t layer, int32_t *fill, float *k, float *v);

EE_EXTERN_C_END

#endif
