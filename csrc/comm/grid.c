#include "comm/grid.h"

enum ee_status ee_grid_check(struct ee_grid_size size, int ranks) {
    if (size.data < 1 || size.tensor < 1 || size.pipeline < 1)
        EE_FAIL(EE_ERR_INVALID,
                "data, tensor and pipeline must be >= 1, got data = %d, tensor = %d, pipeline = %d",
                size.data, size.tensor, size.pipeline);
    /* Two factors of 31 bits fit in 64, all three need not. */
    int64_t product = (int64_t)size.data * size.tensor;
    if (product > ranks || product * size.pipeline != ranks)
        EE_FAIL(EE_ERR_INVALID,
                "data = %d times tensor = %d times pipeline = %d must be the number of ranks, got "
                "%d; change one of the three or start as many ranks as they need",
                size.data, size.tensor, size.pipeline, ranks);
    return EE_OK;
}

struct ee_grid_place ee_grid_place(struct ee_grid_size size, int rank) {
    return (struct ee_grid_place){
        .data = rank / size.tensor / size.pipeline,
        .tensor = rank % size.tensor,
        .pipeline = rank / size.tensor % size.pipeline,
    };
}

int ee_grid_rank(struct ee_grid_size size, struct ee_grid_place place) {
    return (place.data * size.pipeline + place.pipeline) * size.tensor + place.tensor;
}

/* The group of a coordinate is named by the lowest rank in it, whose coordinate is 0. */
static enum ee_status split(const struct ee_grid *grid, struct ee_comm *world, struct ee_comm **out,
                            struct ee_grid_place lowest, int coordinate) {
    return ee_comm_split(world, out, ee_grid_rank(grid->size, lowest), coordinate);
}

enum ee_status ee_grid_create(struct ee_grid *grid, struct ee_comm *world,
                              struct ee_grid_size size) {
    *grid = (struct ee_grid){.size = size};
    EE_TRY(ee_comm_check(world));
    EE_TRY(ee_grid_check(size, world->size));
    if (size.data > 1 || size.tensor > 1)
        EE_FAIL(EE_ERR_UNSUPPORTED,
                "only pipeline parallelism is built so far, got data = %d and tensor = %d; use "
                "data = 1, tensor = 1, pipeline = %d",
                size.data, size.tensor, world->size);
    struct ee_grid_place at = ee_grid_place(size, world->rank);
    struct ee_grid_place no_data = at, no_tensor = at, no_pipeline = at;
    no_data.data = no_tensor.tensor = no_pipeline.pipeline = 0;
    grid->place = at;
    enum ee_status status;
    EE_GOTO(status, split(grid, world, &grid->data, no_data, at.data), fail);
    EE_GOTO(status, split(grid, world, &grid->tensor, no_tensor, at.tensor), fail);
    EE_GOTO(status, split(grid, world, &grid->pipeline, no_pipeline, at.pipeline), fail);
    return EE_OK;
fail:
    ee_grid_destroy(grid);
    return status;
}

void ee_grid_destroy(struct ee_grid *grid) {
    ee_comm_destroy(grid->pipeline);
    ee_comm_destroy(grid->tensor);
    ee_comm_destroy(grid->data);
    grid->pipeline = grid->tensor = grid->data = NULL;
}
