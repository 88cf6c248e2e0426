/* A Transformer block of training: forward, recomputation, backward.
 *
 *   sequential:  mid = x + attention(norm1(x));  y = mid + mlp(norm2(mid))
 *   parallel:    y = x + attention(norm1(x)) + mlp(norm2(x))
 *
 * The layers of the backbone and the blocks of exits are the same code with other parameters. */
#ifndef EE_BLOCK_H
#define EE_BLOCK_H

#include "model/queue.h"

EE_EXTERN_C_BEGIN

/* A microbatch: N rows of tokens. Arrays belong to the caller. */
struct ee_batch {
    int64_t rows;            /* N */
    const int32_t *token;    /* [N] */
    const int32_t *target;   /* [N], -1: no loss */
    const int32_t *position; /* [N] */
    const int32_t *segment;  /* [segments + 1]: rows attend within their segment */
    int64_t segments;
    const uint64_t *row_id; /* [N] (global sample << 24) + position in it; NULL without dropout */
    bool dropout;           /* training: the config's dropouts apply */
    uint64_t dropout_seed;  /* of the step */
};

/* What a forward keeps for the backward. Which pointers are memory of the slot and which are shared
 * transient memory depends on the recomputation mode (model/chunk.h). */
struct ee_block_acts {
    float *x;        /* [N, C] input */
    float *stats1;   /* [2, N] mean and 1 / standard deviation of norm1 */
    float *qkv;      /* [N, (H + 2K) D]; queries and keys rotated, unless there is qk_norm */
    float *qk;       /* [N, (H + K) D] normalised and rotated, with qk_norm */
    float *qk_stats; /* [2, N (H + K)], with qk_norm */
    float *out;      /* [N, H D] of attention */
    float *lse;      /* [N, H] */
    float *mid;      /* [N, C]; NULL in parallel blocks */
    float *stats2;   /* [2, N] of norm2 */
    float *up;       /* [N, F], gated [N, 2F]: gate and up before the activation */
};

struct ee_block {
    const struct ee_model *model;
    const struct ee_block_index *index;
    int32_t layer;                 /* from 0: whose attention parameters apply */
    int32_t site;                  /* distinct for each block of a model, the key of its dropout */
    float *gradient;               /* the gradient arena, NULL where only forward is called */
    struct ee_weight_queue *queue; /* takes the backward's weight gradients; NULL: at once */
};

/* Elements of each piece of acts, for laying them out. */
struct ee_block_sizes {
    int64_t x, stats1, qkv, qk, qk_stats, out, lse, mid, stats2, up;
};
struct ee_block_sizes ee_block_sizes(const struct ee_config *config, int64_t rows);

/* y[N, C] from acts->x; fills the other pieces of acts. y may be acts->x only in a sequential block
 * without further use of x. */
EE_WARN_UNUSED enum ee_status ee_block_forward(const struct ee_block *block,
                                               const struct ee_batch *batch,
                                               const struct ee_block_acts *acts, float *y);

/* Fills stats1, qkv, qk, qk_stats, out and lse again, from x. */
EE_WARN_UNUSED enum ee_status ee_block_recompute_attention(const struct ee_block *block,
                                                           const struct ee_batch *batch,
                                                           const struct ee_block_acts *acts);

/* Fills everything but x again, without computing the output. */
EE_WARN_UNUSED enum ee_status ee_block_recompute(const struct ee_block *block,
                                                 const struct ee_batch *batch,
                                                 const struct ee_block_acts *acts);

/* The backward in two halves, so that an exit between them can add its gradient. In the first,
 * `dx` [N, C] is the gradient of the output, and becomes that of mid; in the second it becomes that
 * of x. A parallel block does all in the first half. acts->up is overwritten. */
EE_WARN_UNUSED enum ee_status ee_block_backward_mlp(const struct ee_block *block,
                                                    const struct ee_batch *batch,
                                                    const struct ee_block_acts *acts, float *dx);
EE_WARN_UNUSED enum ee_status ee_block_backward_attention(const struct ee_block *block,
                                                          const struct ee_batch *batch,
                                                          const struct ee_block_acts *acts,
                                                          float *dx);

/* h[N, C] = norm(x), with its statistics [2, N] or NULL. */
EE_WARN_UNUSED enum ee_status ee_norm_forward(const struct ee_model *model,
                                              struct ee_norm_index index, int64_t rows, float *h,
                                              float *stats, const float *x);

/* dx += gradient of ee_norm_forward; those of its parameters go to rows `into` of the arena. */
EE_WARN_UNUSED enum ee_status ee_norm_gradient(const struct ee_model *model,
                                               struct ee_norm_index index,
                                               struct ee_norm_index into, float *gradient,
                                               int64_t rows, float *acc_dx, const float *dh,
                                               const float *x, const float *stats);

/* The MLP proper: up[N, F or 2F] from h[N, C]; y[N, C] = residual + down(activation(up)), dropout
 * included; and the gradient: dh[N, C] = (or +=) from dy[N, C], given h and up (overwritten); with
 * a queue that takes the weight gradients, h is best a buffer of it. */
EE_WARN_UNUSED enum ee_status ee_mlp_up(const struct ee_model *model,
                                        const struct ee_mlp_index *index, int64_t rows, float *up,
                                        const float *h);
EE_WARN_UNUSED enum ee_status ee_mlp_down(const struct ee_model *model,
                                          const struct ee_mlp_index *index,
                                          const struct ee_batch *batch, int32_t site, float *y,
                                          const float *up, const float *residual);
EE_WARN_UNUSED enum ee_status ee_mlp_gradient(const struct ee_model *model,
                                              const struct ee_mlp_index *index,
                                              const struct ee_batch *batch, int32_t site,
                                              float *gradient, struct ee_weight_queue *queue,
                                              float *dh, const float *dy, const float *h, float *up,
                                              bool accumulate);

EE_EXTERN_C_END

#endif
