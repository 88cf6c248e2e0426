/* Schedules as data: what a pipeline rank does in a training step, one action after the other.
 *
 * A pure function maps (name, microbatches) to the list; the runner executes it and knows nothing
 * of its making; the validator proves that a list can be run. Nothing here touches tensors or
 * communication. Microbatches are numbered from 0. */
#ifndef EE_SCHEDULE_H
#define EE_SCHEDULE_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

enum ee_schedule_kind {
    EE_SCHEDULE_GPIPE, /* all forwards, then all backwards: M slots */
    EE_SCHEDULE_1F1B,  /* after a warm-up, one forward and one backward in turns */
};

enum ee_step_kind { EE_STEP_FORWARD, EE_STEP_BACKWARD };

struct ee_step_action {
    enum ee_step_kind kind;
    int32_t microbatch;
    int32_t slot; /* of the activations that the forward keeps for the backward */
};

struct ee_schedule {
    int32_t microbatches;
    int32_t slots; /* as many as the list uses */
    int32_t count;
    struct ee_step_action *actions;
};

/* EE_ERR_INVALID for a name that is neither "1f1b" nor "gpipe". */
EE_WARN_UNUSED enum ee_status ee_schedule_from_name(enum ee_schedule_kind *kind, const char *name);

/* The list of the only rank of a pipeline; microbatches >= 1. */
EE_WARN_UNUSED enum ee_status ee_schedule_create(struct ee_schedule **out,
                                                 enum ee_schedule_kind kind, int32_t microbatches);
void ee_schedule_destroy(struct ee_schedule *schedule);

/* Checks a list: every microbatch goes forward once and backward once, in this order; backwards
 * come in ascending order, so that every schedule accumulates a parameter's gradient in the same
 * order; a slot holds one microbatch at a time; `slots` is the number in use. The error names the
 * first action that is wrong. */
EE_WARN_UNUSED enum ee_status ee_schedule_validate(const struct ee_schedule *schedule);

EE_EXTERN_C_END

#endif
