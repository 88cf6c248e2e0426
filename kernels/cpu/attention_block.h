/* What the two passes of training attention share: the division of the work among threads, the
 * masks, and dropout. */
#ifndef EE_ATTENTION_BLOCK_H
#define EE_ATTENTION_BLOCK_H

#include "cpu/attention_tile.h"
#include "cpu/simd_math.h"
#include "cpu/simd_philox.h"
#include "ops/ops.h"

/* A score that is masked out. Finite, so that the difference of two of them is a number. */
#define MASKED (-0x1p126f)

static inline v16 soft_cap(v16 x, float cap) {
    return v16_mul(v16_set(cap), v16_tanh(v16_div(x, v16_set(cap))));
}

static inline v16 lane_index(void) {
    static const float index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return v16_load(index);
}

/* x in the lanes whose column (that of lane 0 is `col`) lies in [from, to), else `otherwise`. */
static inline v16 keep_columns(v16 x, int col, int from, int to, float otherwise) {
    v16 index = v16_add(lane_index(), v16_set((float)col));
    x = v16_select_lt(index, v16_set((float)to), x, v16_set(otherwise));
    return v16_select_lt(index, v16_set((float)from), v16_set(otherwise), x);
}

/* The columns [from, to) of a block of keys that a row sees. `last` is the column of the row's own
 * key, which may lie beyond the block. */
static inline void visible_columns(int64_t last, int64_t window, int cols, int *from, int *to) {
    *to = (int)ee_min(cols, last + 1);
    *from = window > 0 ? (int)ee_min(cols, ee_max(0, last - window + 1)) : 0;
}

/* keep[j] = 1 / (1 - p) or 0 for the keys j of a block, whose first is the channel `channel`, a
 * multiple of 4. */
static inline void dropout_row(float keep[TILE], const struct ee_dropout *dropout, uint64_t row,
                               uint64_t channel) {
    const float p = dropout->p, factor = 1.0f / (1.0f - p);
    uint32_t words[EE_PHILOX_WORDS];
    philox_words(words, dropout->key, row, channel / 4);
    for (int j = 0; j < TILE; j++)
        keep[j] = ee_uniform_from_bits(words[j]) >= p ? factor : 0.0f;
}

static inline float *head_row(const struct ee_tensor *tensor, int64_t row, int64_t head) {
    return (float *)tensor->data + row * tensor->stride[0] + head * tensor->stride[1];
}

/* The next `size` floats of scratch memory, aligned; NULL while only counting. */
static inline float *cut(float *memory, int64_t *used, int64_t size) {
    float *piece = memory ? memory + *used : NULL;
    *used += round_up(size, 16);
    return piece;
}

/* The work is cut into blocks of queries (forward) or of keys (backward) of each segment and
 * key-value head, in that order. Each thread takes a contiguous range of about equal cost. */
struct attention_plan {
    const int32_t *segment;
    int64_t segments, kv_heads, window;
    int64_t total; /* cost of all */
    int threads;
    bool by_keys;
};

static inline int64_t segment_length(const struct attention_plan *plan, int64_t s) {
    return (int64_t)plan->segment[s + 1] - plan->segment[s];
}

static inline int64_t longest_segment(const struct attention_plan *plan) {
    int64_t longest = 0;
    for (int64_t s = 0; s < plan->segments; s++)
        longest = ee_max(longest, segment_length(plan, s));
    return longest;
}

/* At least one past the last query that sees the keys up to `key`; a multiple of TILE_ROWS, or the
 * end, so that a product of whole rows touches none beyond. */
static inline int64_t queries_end(const struct attention_plan *plan, int64_t length, int64_t key) {
    return plan->window > 0 ? ee_min(length, round_up(key + plan->window, TILE_ROWS)) : length;
}

/* The first block of keys that the queries from `query` on see. */
static inline int64_t first_key_block(const struct attention_plan *plan, int64_t query) {
    return plan->window > 0 ? ee_max(0, query - plan->window + 1) / TILE : 0;
}

static inline int64_t block_cost(const struct attention_plan *plan, int64_t length, int64_t block) {
    const int64_t overhead = 32; /* packing, in columns of a product */
    int64_t first = block * TILE, end = ee_min(first + TILE, length);
    int64_t span = plan->by_keys ? queries_end(plan, length, end - 1) - first
                                 : end - first_key_block(plan, first) * TILE;
    return (end - first) * (span + overhead);
}

static inline void plan_init(struct attention_plan *plan) {
    plan->total = 0;
    for (int64_t s = 0; s < plan->segments; s++) {
        int64_t length = segment_length(plan, s);
        for (int64_t block = 0; block * TILE < length; block++)
            plan->total += block_cost(plan, length, block) * plan->kv_heads;
    }
}

/* The blocks [from, to) of the next (segment, key-value head) that belong to `thread`; *at is the
 * cost of all before it, and moves on. */
static inline void plan_share(const struct attention_plan *plan, int64_t length, int thread,
                              int64_t *at, int64_t *from, int64_t *to) {
    *from = *to = 0;
    for (int64_t block = 0; block * TILE < length; block++) {
        int64_t cost = block_cost(plan, length, block);
        int64_t middle = (2 * *at + cost) * plan->threads;
        if (middle < 2 * plan->total * thread)
            *from = *to = block + 1;
        else if (middle < 2 * plan->total * (thread + 1))
            *to = block + 1;
        *at += cost;
    }
}

#endif
