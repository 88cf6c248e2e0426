/* Walks through the lists of all ranks of a pipeline at once: proves that they can be run, and says
 * how long a step takes and how much memory it needs.
 *
 * An action starts when its rank is free and what it receives has come. Messages of one chunk to
 * the next travel in order, forwards and backwards apart, beside the computation. Whatever order
 * ranks are visited in, the result is the same: every dependency is a message or a list. */
#ifndef EE_WALK_H
#define EE_WALK_H

#include "train/schedule.h"

EE_EXTERN_C_BEGIN

/* Where the lists come from: the next action of a rank, false at its end. */
struct ee_lists {
    int32_t ranks, chunks, microbatches; /* P, v, M */
    int32_t fill1, fill2;                /* microbatches of bubble filling */
    /* How many backward messages of a rank may have been sent and not been received, as many as it
     * has buffers for; with a limit, forward ones are limited too: EE_WALK_FORWARDS whose
     * activations are kept, one whose are not. 0: no limits. */
    int32_t buffers;
    bool (*next)(void *arg, int32_t rank, struct ee_step_action *action);
    void *arg;
};

#define EE_WALK_FORWARDS 96

/* Of each global chunk [P v], in any unit of time, and bytes. */
struct ee_walk_costs {
    const double *forward, *backward, *backward_input, *backward_weight;
    const double *kept_bytes;   /* a microbatch between its forward and the backward of its input */
    const double *queued_bytes; /* between the two parts of a split backward */
    const double *transient_bytes; /* while a backward runs */
    const double *static_bytes;    /* of each rank [P] */
    double message; /* from the end of an action to the start of what needs it elsewhere */
};

struct ee_rank_result {
    int64_t actions;
    double start, end, busy; /* first start, last end, time spent in actions */
    double peak_bytes;       /* static ones included */
    int32_t slots;           /* activations kept at a time, over all chunks of the rank */
};

/* Called for each action, those of a rank in order. */
typedef void ee_walk_record(void *arg, int32_t rank, const struct ee_step_action *action,
                            double start, double end);

/* result[P]. costs or record may be NULL; without costs all times and bytes are 0.
 *
 * Refused, with the rank and the number of the action: a microbatch that does not go forward and
 * backward exactly once through every chunk, or comes out of order (each parameter accumulates in
 * ascending order of microbatches), or whose backward comes before its forward; a message that is
 * sent but not received, or expected but never sent, or that another one overtakes; activations
 * that are kept for no backward; ranks that wait for each other. */
EE_WARN_UNUSED enum ee_status ee_walk(const struct ee_lists *lists,
                                      const struct ee_walk_costs *costs,
                                      struct ee_rank_result *result, ee_walk_record *record,
                                      void *record_arg);

/* The lists that a checked spec gives: iterators[P] belong to the caller. */
struct ee_lists ee_lists_of_spec(const struct ee_schedule_spec *spec,
                                 struct ee_schedule_iterator *iterators);

/* The list of a rank in memory. */
struct ee_given_list {
    const struct ee_step_action *actions;
    int64_t count, at; /* at: the next one, for the walk */
};

/* Lists in memory, with the numbers of a spec: given[P] belong to the caller. */
struct ee_lists ee_lists_of_given(const struct ee_schedule_spec *spec, struct ee_given_list *given);

/* The least number of buffers, at least 2, with which lists that ee_walk accepts cannot come to a
 * stop. given: NULL for those of the spec. EE_ERR_UNSUPPORTED where the limits of forwards are too
 * narrow for them. */
EE_WARN_UNUSED enum ee_status ee_walk_buffers(const struct ee_schedule_spec *spec,
                                              struct ee_given_list *given, int32_t *buffers);

EE_EXTERN_C_END

#endif
