/* The replay of a schedule: the runner, its messages and its transport as in training, with each
 * action replaced by a wait of a given length. So schedules are measured on more ranks than there
 * are cores.
 *
 * A wait sleeps until a point in time and takes no core. Messages carry the numbers of their
 * microbatch, which their receivers check. */
#ifndef EE_REPLAY_H
#define EE_REPLAY_H

#include "train/runner.h"
#include "train/walk.h"

EE_EXTERN_C_BEGIN

#define EE_STEP_KINDS 4

struct ee_replay_config {
    /* What its pointers point to, and the lists, are not needed after ee_replay_create. */
    struct ee_schedule_spec schedule;
    struct ee_given_list *lists; /* [ranks] in place of those that the schedule gives; or NULL */
    struct ee_comm *comm;        /* the ranks of the pipeline, in order; outlives the replay */
    /* [EE_STEP_KINDS][chunks of this rank]: seconds of each kind of action (enum ee_step_kind). */
    const double *seconds;
    int64_t floats; /* of a message */
};

struct ee_replay;

EE_WARN_UNUSED enum ee_status ee_replay_create(struct ee_replay **out,
                                               const struct ee_replay_config *config);
void ee_replay_destroy(struct ee_replay *replay);

/* One step, a collective: a barrier, then the list. *start, *end: of the list, in seconds of
 * ee_now(); *busy: the part of it that the actions took. trace may be NULL. */
EE_WARN_UNUSED enum ee_status ee_replay_run(struct ee_replay *replay, struct ee_trace *trace,
                                            double *start, double *end, double *busy);

EE_EXTERN_C_END

#endif
