/* Schedules as data: what each rank of a pipeline does in a training step, one action after the
 * other.
 *
 * A pure function maps (schedule, ranks, chunks a rank, microbatches, bubble options) to one list a
 * rank. The runner executes the lists and knows nothing of their making; ee_walk (walk.h) proves
 * that lists can be run, and prices them. Nothing here touches tensors or communication.
 *
 * Chunk g of G = P v lies on rank g % P, as its chunk g / P: a microbatch goes through the chunks
 * in ascending order. Microbatches 0 .. M - 1 run forward and backward through all chunks; those of
 * bubble filling come after them: M .. M + fill1 - 1 of Part 1, the others of Part 2. */
#ifndef EE_SCHEDULE_H
#define EE_SCHEDULE_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

enum ee_schedule_kind {
    EE_SCHEDULE_GPIPE,       /* all forwards, then all backwards */
    EE_SCHEDULE_1F1B,        /* after a warm-up, one forward and one backward in turns */
    EE_SCHEDULE_INTERLEAVED, /* 1F1B over several chunks a rank (Narayanan et al., 2021) */
    EE_SCHEDULE_ZERO_BUBBLE, /* ZB-H1 (Qi et al., 2023): weight gradients fill the end */
};
#define EE_SCHEDULE_KINDS 4

enum ee_step_kind {
    EE_STEP_FORWARD,
    EE_STEP_BACKWARD,       /* input and weight gradients */
    EE_STEP_BACKWARD_INPUT, /* the input's alone; the weights' come in an action of their own */
    EE_STEP_BACKWARD_WEIGHT,
};

enum ee_step_flag {
    EE_STEP_RECEIVES =
        1,             /* forward: the input of the chunk; backward: the gradient of its output */
    EE_STEP_SENDS = 2, /* forward: its output; backward: the gradient of its input */
    EE_STEP_KEEPS = 4, /* forward: the activations, for a backward */
};

struct ee_step_action {
    uint8_t kind;   /* enum ee_step_kind */
    uint8_t flags;  /* enum ee_step_flag */
    uint16_t chunk; /* of the rank, from 0 */
    int32_t microbatch;
};

#define EE_MAX_RANKS 65536
#define EE_MAX_MICROBATCHES (1 << 24)

struct ee_schedule_spec {
    enum ee_schedule_kind kind;
    int32_t ranks;        /* P */
    int32_t chunks;       /* v, of a rank; more than 1 with EE_SCHEDULE_INTERLEAVED alone */
    int32_t microbatches; /* M, those that run in full */
    /* Bubble filling, with EE_SCHEDULE_1F1B: microbatch i of Part 1 (from 0) runs forward and
     * backward through ranks 0 .. fill1 - 1 - i, microbatch i of Part 2 backward through the last
     * fill2_depth[i] ranks. `exit_ranks[r]`: rank r has an early exit; a microbatch of Part 1 ends
     * at the last such rank that it may reach, and is left out where there is none. */
    int32_t fill1, fill2;
    const int32_t *fill2_depth;
    const uint8_t *exit_ranks;
};

const char *ee_schedule_name(enum ee_schedule_kind kind);

/* EE_ERR_INVALID for another name than gpipe, 1f1b, interleaved or zero_bubble. */
EE_WARN_UNUSED enum ee_status ee_schedule_from_name(enum ee_schedule_kind *kind, const char *name);

EE_WARN_UNUSED enum ee_status ee_schedule_check(const struct ee_schedule_spec *spec);

/* How many microbatches fit each part of the bubbles without making the step longer, and through
 * how many of the last ranks the backward of Part 2's microbatch i (from 0) may run, for a backward
 * that takes `ratio` = b / f times as long as a forward (EE-LLM, appendix C.2). */
int32_t ee_schedule_fill_count(int32_t ranks, double ratio);
int32_t ee_schedule_fill_depth(int32_t ranks, double ratio, int32_t i);

struct ee_schedule_place {
    int32_t base, within, chunk; /* microbatch base + within */
};

/* Walks through the list of one rank, in constant memory. `spec` stays the caller's and has been
 * checked. */
struct ee_schedule_iterator {
    const struct ee_schedule_spec *spec;
    int32_t rank;
    int64_t warmup, total; /* forwards before the first backward; of each kind in all */
    int64_t forward, backward, weight;
    int32_t fill, fill_count; /* actions of Part 1 on this rank, done and in all */
    struct ee_schedule_place next_forward, next_backward;
};

struct ee_schedule_iterator ee_schedule_begin(const struct ee_schedule_spec *spec, int32_t rank);

/* The next action, or false at the end. */
bool ee_schedule_next(struct ee_schedule_iterator *iterator, struct ee_step_action *action);

EE_EXTERN_C_END

#endif
