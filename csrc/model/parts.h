/* Small helpers that the files of csrc/model share. */
#ifndef EE_PARTS_H
#define EE_PARTS_H

#include "base/rng.h"
#include "model/block.h"

/* Places in a block where dropout acts; part of its key. */
enum ee_dropout_place { EE_DROP_EMBEDDING, EE_DROP_ATTENTION, EE_DROP_RESIDUAL, EE_DROP_MLP };

static inline struct ee_dropout ee_dropout_at(const struct ee_batch *batch, float p, int32_t site,
                                              enum ee_dropout_place place) {
    struct ee_dropout dropout = {p, ee_mix(ee_mix(batch->dropout_seed, (uint64_t)site), place),
                                 batch->row_id};
    return dropout;
}

static inline bool ee_dropout_on(const struct ee_batch *batch, float p) {
    return batch->dropout && p > 0;
}

/* A view of a vector parameter, or NULL in `*pointer` when the row is -1. */
static inline const struct ee_tensor *ee_optional(const struct ee_params *params, int32_t row,
                                                  const float *arena, struct ee_tensor *storage) {
    if (row < 0 || !arena)
        return NULL;
    *storage = ee_param_tensor(params, row, arena);
    return storage;
}

/* The matrix of the joined rows [first, last] of the table. */
static inline struct ee_weight ee_joined_weight(const struct ee_params *params, int32_t first,
                                                int32_t last, const float *arena) {
    struct ee_tensor t = ee_param_joined(params, first, last, arena);
    return ee_weight_rows(t.data, t.shape[0], t.shape[1]);
}

EE_WARN_UNUSED static inline enum ee_status ee_scratch_floats(struct ee_ctx *ctx, float **out,
                                                              int64_t count) {
    void *memory;
    EE_TRY(ee_scratch_take(ctx, &memory, count, sizeof(float)));
    *out = (float *)memory;
    return EE_OK;
}

#endif
