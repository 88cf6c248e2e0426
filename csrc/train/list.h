/* The list of one rank in memory, with a slot of activations for each action: what the runner
 * executes. */
#ifndef EE_LIST_H
#define EE_LIST_H

#include "train/schedule.h"

EE_EXTERN_C_BEGIN

struct ee_list {
    int64_t count;
    struct ee_step_action *actions;
    /* [count] The slot of its chunk for the activations. A forward that keeps none uses the slot
     * behind the others of its chunk; the weight part of a backward has none: -1. */
    int32_t *slots;
    int32_t *queues; /* [count] of both parts of a split backward: who holds what is between them */
    int32_t chunks;
    int32_t *slot_counts, *queue_counts; /* [chunks] as many as the list uses */
};

/* The list that a checked spec gives a rank. */
EE_WARN_UNUSED enum ee_status ee_list_create(struct ee_list **out,
                                             const struct ee_schedule_spec *spec, int32_t rank);

/* A list of a file, whose lists ee_walk has accepted: actions[count] of a rank with `chunks` chunks
 * and microbatches numbered below `microbatches`. */
EE_WARN_UNUSED enum ee_status ee_list_from_actions(struct ee_list **out,
                                                   const struct ee_step_action *actions,
                                                   int64_t count, int32_t chunks,
                                                   int32_t microbatches);

/* Forwards of `microbatches` through the chunks of a rank, for evaluation: each in slot 0. A chunk
 * runs as many microbatches in a row as there are ranks, as in interleaved 1F1B, so that a rank has
 * work while the others run theirs. */
EE_WARN_UNUSED enum ee_status ee_list_of_forwards(struct ee_list **out, int32_t rank, int32_t ranks,
                                                  int32_t chunks, int32_t microbatches);
void ee_list_destroy(struct ee_list *list);

EE_EXTERN_C_END

#endif
