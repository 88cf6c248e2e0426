/* The key-value cache: pages of keys and values of every layer, handed to sequences when they are
 * admitted. One page table serves all layers: page i holds the same positions in each of them. A
 * block of an exit has a layer of its own, after those of the model.
 *
 * The fill level of (sequence, layer) is the number of positions, from 0, whose keys and values
 * stand there. Rows that left early have not filled the deeper layers yet. */
#ifndef EE_CACHE_H
#define EE_CACHE_H

#include "ops/ops.h"

EE_EXTERN_C_BEGIN

#define EE_CACHE_PAGE 64

struct ee_cache {
    int32_t layers, max_sequences;
    int64_t max_length; /* positions of a sequence, at most */
    int64_t pages, pages_per_sequence, free_count;
    int32_t heads, width;
    float *k, *v;        /* [layers][pages][heads][EE_CACHE_PAGE][width] */
    int32_t *table;      /* [max_sequences][pages_per_sequence]; -1: no page */
    int32_t *free_pages; /* [pages], the first free_count of them */
    int32_t *fill;       /* [max_sequences][layers] */
    bool *used;          /* [max_sequences] */
};

/* `positions` in all, over all sequences; 0: enough for max_sequences of max_length. */
EE_WARN_UNUSED enum ee_status ee_cache_create(struct ee_cache **out, int32_t layers, int32_t heads,
                                              int32_t width, int32_t max_sequences,
                                              int64_t max_length, int64_t positions);
void ee_cache_destroy(struct ee_cache *cache);

/* Gives a sequence its place, with pages for `positions` <= max_length. EE_ERR_BUSY when there is
 * no place now, EE_ERR_INVALID when there can never be. */
EE_WARN_UNUSED enum ee_status ee_cache_acquire(struct ee_cache *cache, int32_t *sequence,
                                               int64_t positions);
void ee_cache_release(struct ee_cache *cache, int32_t sequence);

struct ee_kv ee_cache_layer(const struct ee_cache *cache, int32_t layer);

static inline int32_t ee_cache_fill(const struct ee_cache *cache, int32_t sequence, int32_t layer) {
    return cache->fill[(int64_t)sequence * cache->layers + layer];
}

/* Writes k and v [N, K, D] of rows at (sequence, position) and raises the fill levels. The rows of
 * a sequence must leave no gap behind the positions that are there. */
EE_WARN_UNUSED enum ee_status ee_cache_write(struct ee_ctx *ctx, struct ee_cache *cache,
                                             int32_t layer, const struct ee_tensor *k,
                                             const struct ee_tensor *v, const int32_t *sequence,
                                             const int32_t *position);

/* Forgets the positions of a sequence from `length` on, in all layers. */
void ee_cache_truncate(struct ee_cache *cache, int32_t sequence, int64_t length);

/* Copies keys and values of one layer, [fill, K, D] each, for inspection. */
void ee_cache_read(const struct ee_cache *cache, int32_t sequence, int32_t layer, float *k,
                   float *v);

EE_EXTERN_C_END

#endif
