/* Decoding is running rows through layers: a batch of rows, each a (sequence, position) with its
 * hidden state, stands at one depth and moves on together. Rows join and leave the batch between
 * two moves; what a row becomes depends on nothing but itself and the cache of its sequence. */
#ifndef EE_ROWS_H
#define EE_ROWS_H

#include "infer/cache.h"
#include "infer/weights.h"

EE_EXTERN_C_BEGIN

enum ee_row_kind {
    EE_ROW_FILL,  /* only fills keys and values: nobody reads its hidden state at the end */
    EE_ROW_TOKEN, /* every exit may look at it */
    EE_ROW_FINAL, /* the final exit alone looks at it */
};

/* Arrays of `capacity`; the first `count` are in use, in any order. */
struct ee_rows {
    int64_t count, capacity;
    int32_t depth; /* half layers that the rows have passed */
    float *x;      /* [capacity, C] */
    int32_t *sequence, *position;
    int32_t *token; /* of rows at depth 0, for ee_rows_embed */
    enum ee_row_kind *kind;
};

/* What moves rows: model, packed weights, cache, and the memory between. */
struct ee_runner {
    const struct ee_model *model;
    int32_t first_depth; /* where rows start that come to the layers that are here */
    const struct ee_weights *weights;
    struct ee_cache *cache;
    struct ee_arena arena;
    struct ee_rows rows;
    bool two_norms;          /* attention and MLP read the same state through norms of their own */
    float *normed, *normed2; /* [capacity, C]; normed2 with two_norms alone */
    float *qkv;              /* [capacity, (H + 2K) D] */
    float *heads;            /* [capacity, H D] */
    float *up, *inner;       /* [capacity, F or 2F], [capacity, F] */
    /* The rows that an exit looks at, see head.h. */
    int32_t *looked; /* [capacity] */
    int64_t head_capacity;
    float *head_x, *logits; /* [head_capacity, C], [.., V] */
    float *confidence, *lse;
    int32_t *head_token, *head_sequence, *head_position;
    /* Half layers after which a row has written all its keys and values: 2 L - 1, or 2 L where an
     * exit after the last layer has a block. */
    int32_t fill_depth;
    /* Work done so far: half layers of rows, rows through an output matrix, and bytes of packed
     * matrices, counted once a product. */
    int64_t half_layers, head_rows, bytes_read;
    /* Above 0: nothing is computed, a half layer takes so long, counted from the start of a pass.
     */
    double half_layer_seconds, pass_start;
};

/* A runner of a model, without memory for rows yet. */
struct ee_runner ee_runner_init(const struct ee_model *model, const struct ee_weights *weights,
                                struct ee_cache *cache);
void ee_runner_free(struct ee_runner *runner);

/* Memory for so many rows in a batch and in front of an exit. Rows in the batch are lost, unless it
 * fails. */
EE_WARN_UNUSED enum ee_status ee_runner_reserve(struct ee_runner *runner, int64_t rows,
                                                int64_t head_rows);

/* Adds a row and returns its index; token (at depth 0) or hidden state are the caller's to fill. */
int64_t ee_rows_add(struct ee_rows *rows, int32_t sequence, int32_t position,
                    enum ee_row_kind kind);

/* Removes row i; the last one takes its place. */
void ee_rows_remove(struct ee_rows *rows, int64_t i, int32_t width);

/* Embeds the tokens of all rows of the batch, which stands at depth 0. */
EE_WARN_UNUSED enum ee_status ee_rows_embed(struct ee_runner *runner);

/* Moves all rows of the batch on to `depth`, writing keys and values. In the last layer, rows of
 * kind EE_ROW_FILL end (and leave the batch) as soon as these are written. */
EE_WARN_UNUSED enum ee_status ee_rows_run(struct ee_runner *runner, int32_t depth);

/* ee_linear by a packed weight, counted in bytes_read. */
EE_WARN_UNUSED enum ee_status ee_runner_linear(struct ee_runner *runner, const struct ee_tensor *y,
                                               const struct ee_tensor *x, const struct ee_weight *w,
                                               const struct ee_tensor *bias,
                                               const struct ee_tensor *residual);

/* The parts of a layer that heads use too, on n rows. `project` makes queries or keys [n, .., D]
 * ready for attention: the norm of each head where there is one, then the rotation. */
EE_WARN_UNUSED enum ee_status ee_runner_norm(struct ee_runner *runner, float *y, const float *x,
                                             int64_t n, const struct ee_norm_weights *norm);
EE_WARN_UNUSED enum ee_status ee_runner_project(struct ee_runner *runner,
                                                const struct ee_tensor *heads,
                                                const struct ee_norm_weights *norm,
                                                const int32_t *position);
/* out[n, C] = MLP(normed[n, C]) + residual[n, C]; out may be residual. */
EE_WARN_UNUSED enum ee_status ee_runner_mlp(struct ee_runner *runner, float *out,
                                            const float *normed, const float *residual, int64_t n,
                                            const struct ee_mlp_weights *mlp);

EE_EXTERN_C_END

#endif
