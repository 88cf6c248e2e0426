/* The process grid: data x tensor x pipeline parallelism.
 *
 * Rank (d P + p) T + t of the job is replica d of the data, stage p of the pipeline and part t of
 * every tensor, so that the ranks that exchange most (tensor, then pipeline) are neighbours. Three
 * communicators hold the ranks that differ in one coordinate only, numbered by it. */
#ifndef EE_GRID_H
#define EE_GRID_H

#include "comm/comm.h"

EE_EXTERN_C_BEGIN

struct ee_grid_size {
    int data, tensor, pipeline; /* D, T, P */
};

struct ee_grid_place {
    int data, tensor, pipeline; /* d, t, p */
};

struct ee_grid {
    struct ee_grid_size size;
    struct ee_grid_place place; /* of this rank */
    struct ee_comm *data;       /* replicas of the same parameters */
    struct ee_comm *tensor;     /* parts of the same layers */
    struct ee_comm *pipeline;   /* stages of the same replica, in order */
};

/* Refuses factors below 1, and those whose product is not the number of ranks. */
EE_WARN_UNUSED enum ee_status ee_grid_check(struct ee_grid_size size, int ranks);

/* Where a rank of the job stands, and which rank stands there. */
struct ee_grid_place ee_grid_place(struct ee_grid_size size, int rank);
int ee_grid_rank(struct ee_grid_size size, struct ee_grid_place place);

/* A collective of all ranks of `world`: makes the three communicators, on every rank in the same
 * order (data, tensor, pipeline); they are the caller's. After an error there is none.
 * EE_ERR_UNSUPPORTED for now: data or tensor above 1. */
EE_WARN_UNUSED enum ee_status ee_grid_create(struct ee_grid *grid, struct ee_comm *world,
                                             struct ee_grid_size size);

/* Frees the three communicators. */
void ee_grid_destroy(struct ee_grid *grid);

EE_EXTERN_C_END

#endif
