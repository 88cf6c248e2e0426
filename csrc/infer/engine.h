/* The decoding engine: sequences in flight, and the step that moves all of them on.
 *
 * A row that leaves at an early exit is deferred: its hidden state and depth are kept, and a later
 * row of its sequence that runs deeper takes it along from there, so that keys and values of all
 * earlier positions are in place and no layer is computed twice. Deferred rows are not tested
 * again. When a sequence has max_deferred of them, the next row that would leave runs to the last
 * layer with all of them; its token is still that of the exit.
 *
 * A sequence that speculates is the same with another end: what leaves early is a draft, and the
 * row that runs to the last layer takes all drafts along to be verified by the final exit.
 *
 * In a pipeline (infer/pipeline.h) no row is deferred: a token that has left goes on through the
 * layers of later ranks while the first rank runs the next one. */
#ifndef EE_ENGINE_H
#define EE_ENGINE_H

#include "comm/comm.h"
#include "infer/head.h"
#include "infer/sampler.h"

EE_EXTERN_C_BEGIN

struct ee_engine;

enum ee_engine_kind {
    EE_ENGINE_FULL,        /* every token from the final exit */
    EE_ENGINE_DEFERRED,    /* early exits, deferred rows */
    EE_ENGINE_RECOMPUTE,   /* early exits; deferred rows are fed again from the first layer */
    EE_ENGINE_SPECULATIVE, /* early exits draft, the final one verifies */
    EE_ENGINE_PIPELINE,    /* early exits; rows that left run on at once, on other ranks if any */
    EE_ENGINE_SCORE,       /* no new tokens: the given ones are scored at every exit */
};

/* What a sequence wants. Arrays are copied. */
struct ee_request {
    enum ee_engine_kind kind;
    const int32_t *tokens; /* the prompt, or the text to score (2 tokens or more) */
    int64_t token_count;
    int64_t max_new_tokens;
    int64_t min_new_tokens; /* stop tokens cannot come before */
    /* A token leaves at early exit e iff thresholds[e] < 1 and its confidence (the largest
     * probability of the raw logits) >= thresholds[e]. One for each early exit, one for all, or
     * none (1.0). Exits with threshold 1 are not run, unless all_confidences is set. */
    const float *thresholds;
    int64_t threshold_count;
    bool all_confidences;
    int32_t max_deferred; /* rows; with EE_ENGINE_SPECULATIVE drafts in a row */
    bool full_depth;      /* EE_EVENT_FULL_DEPTH of every token that left early */
    struct ee_sampling sampling;
    const int32_t *stop_tokens;
    int64_t stop_count;
    /* For measurements and teacher forcing. forced: tokens that the text goes on with, whatever is
     * chosen. replay: for new token i, the exit that it leaves at, whatever the confidence; with
     * EE_ENGINE_SPECULATIVE, whether a draft of it is accepted (0 or 1). Tokens beyond are free. */
    const int32_t *forced;
    int64_t forced_count;
    const int32_t *replay;
    int64_t replay_count;
};

enum ee_done { EE_NOT_DONE, EE_DONE_LENGTH, EE_DONE_STOP, EE_DONE_FINISHED };

enum ee_event_kind {
    EE_EVENT_TOKEN,      /* a new token */
    EE_EVENT_FULL_DEPTH, /* the final exit's view of a token that left early, later */
    EE_EVENT_SCORE,      /* a token of a text that is scored */
};

struct ee_event {
    int32_t sequence;
    int32_t kind;     /* enum ee_event_kind */
    int32_t position; /* of the token in its sequence; the prompt begins at 0 */
    int32_t token;    /* with `forced`, an EE_EVENT_TOKEN tells the choice, not the forced one */
    int32_t exit;     /* that it left at, or that drafted it; the final one is the last */
    int32_t done;     /* enum ee_done: set on the last event of a sequence */
    float confidence; /* of that exit */
    float logprob;    /* of the token, from that exit's raw logits; from the final exit's with
                         EE_ENGINE_SPECULATIVE */
};

/* What an exit said about the row that an event's token comes from. Not run: NaN, NaN, -1. */
struct ee_event_exit {
    float confidence;
    float logprob; /* of the event's token; NaN for exits where it was not known yet */
    int32_t token; /* the largest raw logit */
};

/* The events of a step; event i has exits [i * exit_count, (i + 1) * exit_count). */
struct ee_events {
    const struct ee_event *event;
    const struct ee_event_exit *exits;
    int64_t count;
    int32_t exit_count; /* the final one included */
};

struct ee_engine_options {
    enum ee_dtype dtype;   /* of the packed weights: EE_F32 or EE_BF16 */
    int32_t max_sequences; /* in flight at a time */
    int64_t max_length;    /* positions of a sequence; 0: the model's context */
    int64_t positions;     /* of the cache over all sequences; 0: as many as they could need */
    bool empty;            /* the weights come with ee_engine_load; else from the model */
    /* The ranks of the pipeline that the model is a part of; NULL where it is the whole. It stays
     * the caller's and outlives the engine, which uses it alone. */
    struct ee_comm *comm;
    /* Above 0: nothing is computed; the layers and exits of this rank take so many seconds a pass,
     * and `comm` polls. For measurements, with forced tokens and replayed exits. */
    double stage_seconds;
    int64_t trace; /* passes and sequences of a pipeline that are noted, at most */
};

/* The model stays the caller's and outlives the engine; its weights are copied. Of a pipeline every
 * rank makes one, with the same options. */
EE_WARN_UNUSED enum ee_status ee_engine_create(struct ee_engine **out, const struct ee_model *model,
                                               const struct ee_engine_options *options);
void ee_engine_destroy(struct ee_engine *engine);

/* Packs one parameter, the row `row` of the model's table: float32, float16 or bf16 of its shape.
 */
EE_WARN_UNUSED enum ee_status ee_engine_load(struct ee_engine *engine, int32_t row,
                                             const struct ee_tensor *source);

/* Admits a sequence and gives its number, which is never used again. EE_ERR_BUSY when there is no
 * room now. */
EE_WARN_UNUSED enum ee_status ee_engine_add(struct ee_engine *engine, int32_t *sequence,
                                            const struct ee_request *request);

/* Ends a sequence at once. EE_ERR_INVALID when none of that number is in flight. */
EE_WARN_UNUSED enum ee_status ee_engine_remove(struct ee_engine *engine, int32_t sequence);

/* Ends a sequence after its deferred rows have run to the last layer, where full_depth asks for
 * that: *rows events come with the next steps, the last one EE_DONE_FINISHED. Without such rows it
 * is removed, and *rows is 0. */
EE_WARN_UNUSED enum ee_status ee_engine_finish(struct ee_engine *engine, int32_t sequence,
                                               int64_t *rows);

/* One batch step: each sequence whose prompt is read runs one new row, which makes a token, or a
 * draft, or verifies several; a long prompt is read over several steps. The events stay valid until
 * the next call. Sequences that are done leave.
 *
 * EE_ERR_NONFINITE: the logits of a sequence were not finite; it has been ended, what the others
 * made comes with the next call. After any other failure the next call does the step again. */
EE_WARN_UNUSED enum ee_status ee_engine_step(struct ee_engine *engine, struct ee_events *events);

int32_t ee_engine_active(const struct ee_engine *engine);

/* On the ranks of a pipeline behind the first: works for rank 0 until that calls ee_engine_stop.
 * Requests, steps and the rest above are for rank 0. */
EE_WARN_UNUSED enum ee_status ee_engine_serve(struct ee_engine *engine);

/* On rank 0: ends all sequences, and lets the other ranks return. ee_engine_destroy does it too,
 * but cannot tell whether it worked. */
EE_WARN_UNUSED enum ee_status ee_engine_stop(struct ee_engine *engine);

/* What a rank of a pipeline did for one sequence in one pass, in seconds of ee_now(). */
struct ee_pass_trace {
    double start, end;
    double told;                     /* when its token was decided here; NaN: not here */
    int32_t sequence;                /* its number */
    int32_t first_row, last_row;     /* positions [first, last) */
    int32_t first_layer, last_layer; /* that this rank has: [first, last) */
    int32_t exit;                    /* that decided; -1: none here */
};

/* *count entries, valid until the next call. */
const struct ee_pass_trace *ee_engine_trace(const struct ee_engine *engine, int64_t *count);

struct ee_engine_stats {
    int64_t steps;
    int64_t half_layers;      /* half layers run, summed over rows */
    int64_t head_rows;        /* rows through an output matrix */
    int64_t bytes_read;       /* of packed matrices, each counted once a product */
    int64_t drafts, accepted; /* drafts that were verified */
    int64_t weight_bytes, cache_bytes;
    enum ee_dtype dtype; /* of the packed weights */
};

struct ee_engine_stats ee_engine_stats(const struct ee_engine *engine);

/* Keys and values of a layer of the cache, for inspection: sets *fill, and copies [fill, K, D] each
 * where k and v are not NULL. */
EE_WARN_UNUSED enum ee_status ee_engine_peek(const struct ee_engine *engine, int32_t sequence,
                                             int32_t layer, int32_t *fill, float *k, float *v);

EE_EXTERN_C_END

#endif
