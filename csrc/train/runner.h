/* The runner of a rank: executes a list of actions, with the messages that it asks for.
 *
 * Receives are posted ahead of the actions that need them, sends when their data are there, and
 * both are waited for no sooner than needed: communication goes on behind computation. There is no
 * blocking send or receive. What an action computes is the caller's affair (struct ee_work): chunks
 * of layers in training and evaluation, plain waiting in a replay.
 *
 * Buffers of gradients that are sent are as many as ee_walk_buffers says plus two; with as many,
 * lists that ee_walk accepts run to their end whatever the timing. An output that is sent stays in
 * its slot, and an input is received in a buffer that takes the place of the slot's. */
#ifndef EE_RUNNER_H
#define EE_RUNNER_H

#include "train/list.h"
#include "train/trace.h"

EE_EXTERN_C_BEGIN

struct ee_work {
    void *arg;
    /* Runs an action. dx: backwards alone; the gradient of the chunk's output (zero for the last
     * chunk of the model), to become that of its input. */
    enum ee_status (*run)(void *arg, const struct ee_step_action *action, int32_t slot,
                          int32_t queue, float *dx);
    /* Where the input of a slot lies, to be exchanged for another buffer; and its output. */
    float **(*input)(void *arg, int32_t chunk, int32_t slot);
    float *(*output)(void *arg, int32_t chunk, int32_t slot);
};

/* A fault for tests, at an action of a list (counted from 0) of the run of that number. */
enum ee_fault_kind { EE_FAULT_NONE, EE_FAULT_KILL, EE_FAULT_DELAY, EE_FAULT_CORRUPT };

struct ee_fault {
    enum ee_fault_kind kind;
    int64_t run, action; /* counted from 0 */
    double seconds;      /* of a delay */
};

struct ee_runner_options {
    struct ee_comm *comm; /* the ranks of the pipeline, in order; outlives the runner */
    int32_t chunks;
    int64_t floats;       /* of a message */
    int32_t microbatches; /* those that run in full: Part 1's travel apart from them */
    int32_t fill1;
    int32_t buffers;            /* as ee_walk_buffers says */
    const struct ee_list *list; /* of a step: tells which buffers are needed; not kept */
    struct ee_fault fault;
};

struct ee_runner;

EE_WARN_UNUSED enum ee_status ee_runner_create(struct ee_runner **out,
                                               const struct ee_runner_options *options);
void ee_runner_destroy(struct ee_runner *runner);

/* Runs a list to its end; trace may be NULL. After an error the communicator is good for nothing
 * but abort. */
EE_WARN_UNUSED enum ee_status ee_runner_run(struct ee_runner *runner, const struct ee_list *list,
                                            const struct ee_work *work, struct ee_trace *trace);

/* Forgets a run that failed, to go on with another communicator of the same ranks. */
void ee_runner_reset(struct ee_runner *runner, struct ee_comm *comm);

/* Bytes of its buffers. */
int64_t ee_runner_bytes(const struct ee_runner *runner);

EE_EXTERN_C_END

#endif
