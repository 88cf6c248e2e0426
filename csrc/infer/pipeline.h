/* A pipeline of ranks that decode together (the messages: infer/wire.h).
 *
 * Rank 0 starts a pass with the newest token of every sequence that has one, runs its own layers
 * and sends the rows on. Every rank tests its exits in order, sends what they decided to rank 0 at
 * once, and the rows to the next rank, whether or not they have left. Rank 0 starts the next
 * position as soon as it has the token, while later ranks still write the keys and values of the
 * last one.
 *
 * Rank 0 takes answers in the order in which they can come: exits of one pass by depth; of several
 * passes first the one whose number and rank have the smaller sum, which in a pipeline of equal
 * stages is the next to come. */
#ifndef EE_PIPELINE_H
#define EE_PIPELINE_H

#include "infer/step.h"
#include "infer/wire.h"

EE_EXTERN_C_BEGIN

/* A row of the newest token of a sequence, as rank 0 follows it. */
struct ee_flight_row {
    struct ee_sequence *s; /* may have ended meanwhile */
    int32_t position;
    bool told;             /* its token has been handed out */
    bool dropped;          /* nobody wants its token any more */
    enum ee_row_kind kind; /* what later exits do with it */
    bool gone;             /* it is not in the pass any more */
};

/* A pass under way, whose answers up to `exit` have come. */
struct ee_flight {
    int64_t pass;
    int32_t exit;  /* the next one to answer */
    int32_t count; /* rows, by ascending slots */
    struct ee_flight_row *rows;
};

struct ee_pipeline {
    struct ee_wire wire;
    int32_t *rank_of; /* [exits] */
    int64_t pass;     /* rank 0: passes so far; others: the one that runs */
    double *told_at;  /* [slots] when the token of the running pass was decided, for the trace */
    /* Rank 0: */
    struct ee_flight *flights; /* [window]: passes [oldest, pass), at pass % window */
    struct ee_flight_row *flight_rows;
    int64_t oldest;
    int32_t *ended, ended_count; /* slots whose end is still to be said */
    bool running;                /* servers wait for frames */
    bool broken;                 /* a rank failed: nothing works any more */
    char reason[512];
    /* What this rank ran. */
    struct ee_pass_trace *trace;
    int64_t trace_count, trace_capacity;
};

/* The pipeline of an engine that has been built otherwise. comm: of the ranks of its layout. */
EE_WARN_UNUSED enum ee_status ee_pipeline_create(struct ee_engine *engine, struct ee_comm *comm,
                                                 int64_t trace);
void ee_pipeline_destroy(struct ee_pipeline *pipeline);

/* Sends what exit `exit` decided of the rows that it looked at (runner.looked[0 .. count)) to
 * rank 0. On rank 0 itself it only notes the time. */
EE_WARN_UNUSED enum ee_status ee_pipeline_answer(struct ee_engine *engine, int32_t exit,
                                                 int64_t count);

/* Runs the layers of this rank on the batch, and sends on what is left of it as pass
 * pipeline->pass. */
EE_WARN_UNUSED enum ee_status ee_pipeline_run(struct ee_engine *engine);

/* -- Rank 0 (client.c) -- */

/* Tells the servers about a sequence that has been admitted. */
EE_WARN_UNUSED enum ee_status ee_client_add(struct ee_engine *engine, const struct ee_sequence *s,
                                            const struct ee_request *request);

/* Notes that a sequence has lost its place: the servers are told with the next frame. Frees it as
 * soon as no pass knows it any more. */
void ee_client_end(struct ee_engine *engine, struct ee_sequence *s);

/* Starts a pass, or takes answers until there are events. */
EE_WARN_UNUSED enum ee_status ee_client_step(struct ee_engine *engine);

/* A newest row that is under way is not to make a token. */
void ee_client_drop(struct ee_engine *engine, const struct ee_sequence *s);

/* EE_ERR_COMM once a rank has failed. */
EE_WARN_UNUSED enum ee_status ee_client_check(const struct ee_engine *engine);

/* Aborts the job for a failure of this rank; returns `status` with its message. */
enum ee_status ee_pipeline_fail(struct ee_engine *engine, enum ee_status status);

EE_EXTERN_C_END

#endif
