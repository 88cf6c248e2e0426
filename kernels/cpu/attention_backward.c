/* Attention in training, backward: the weights are recomputed from q, k and lse, block by block.
 *
 * A thread takes blocks of keys of a segment and key-value head and runs over the queries that see
 * them, so that the gradients of keys and values have one writer. Where threads share a segment and
 * key-value head, each sums the gradient of the queries on its own, and these sums are added in
 * the order of the threads afterwards. */
#include "cpu/attention_block.h"
#include "cpu/cpu.h"
#include "ops/ctx.h"

struct backward {
    const struct ee_tensor *dq, *dk, *dv, *dout, *out, *lse, *q, *k, *v;
    const struct ee_attention_params *params;
    struct attention_plan plan;
    int64_t group, width, padded; /* query heads of a key-value head; D, and rounded up to 16 */
    int64_t rows;                 /* longest segment, rounded up to whole blocks */
    float *scratch;
    int64_t scratch_size; /* floats of one thread */
    float *partial;       /* [threads, 2, group, rows, padded] gradients of shared queries */
};

/* Scratch of one thread: of one key-value head the keys, of one head the queries. Rows count from
 * the start of the segment. */
struct backward_scratch {
    float *k, *dk, *dv;      /* [rows, padded] */
    float *keys, *values;    /* [blocks, D, TILE], transposed */
    float *q, *dout, *dq;    /* [rows, padded] */
    float *lse, *delta;      /* [rows] */
    float *weights, *scores; /* [TILE, TILE] */
};

/* Floats that it takes. */
static int64_t backward_scratch_cut(struct backward_scratch *scratch, float *memory,
                                    const struct backward *job) {
    const int64_t rows = job->rows, padded = job->padded;
    int64_t used = 0;
    scratch->k = cut(memory, &used, rows * padded);
    scratch->dk = cut(memory, &used, rows * padded);
    scratch->dv = cut(memory, &used, rows * padded);
    scratch->keys = cut(memory, &used, rows * job->width);
    scratch->values = cut(memory, &used, rows * job->width);
    scratch->q = cut(memory, &used, rows * padded);
    scratch->dout = cut(memory, &used, rows * padded);
    scratch->dq = cut(memory, &used, rows * padded);
    scratch->lse = cut(memory, &used, rows);
    scratch->delta = cut(memory, &used, rows);
    scratch->weights = cut(memory, &used, TILE * TILE);
    scratch->scores = cut(memory, &used, TILE * TILE);
    return used;
}

/* Packs the queries [from, to) of a head, and what belongs to them. */
static void pack_queries(const struct backward *job, const struct backward_scratch *scratch,
                         int64_t start, int64_t head, int64_t from, int64_t to) {
    tile_pack_rows(scratch->q + from * job->padded, head_row(job->q, start + from, head),
                   job->q->stride[0], (int)(to - from), job->width, job->params->scale);
    tile_pack_rows(scratch->dout + from * job->padded, head_row(job->dout, start + from, head),
                   job->dout->stride[0], (int)(to - from), job->width, 1.0f);
    for (int64_t i = from; i < to; i++) {
        const float *out = head_row(job->out, start + i, head);
        const float *dout = scratch->dout + i * job->padded;
        v16 sum = v16_set(0.0f);
        int64_t d = 0;
        for (; d + 16 <= job->width; d += 16)
            sum = v16_fma(v16_load(dout + d), v16_load(out + d), sum);
        if (d < job->width)
            sum = v16_fma(v16_load(dout + d), v16_load_n(out + d, (int)(job->width - d)), sum);
        scratch->delta[i] = v16_sum(sum);
        scratch->lse[i] = ((const float *)job->lse->data)[(start + i) * job->lse->stride[0] + head];
    }
}

/* Packs the keys and values of the blocks [from, to) and clears their gradients. */
static void pack_keys(const struct backward *job, const struct backward_scratch *scratch,
                      int64_t start, int64_t length, int64_t kv_head, int64_t from, int64_t to) {
    for (int64_t block = from; block < to; block++) {
        const int64_t first = block * TILE;
        const int rows = (int)ee_min(TILE, length - first);
        const float *k = head_row(job->k, start + first, kv_head);
        const float *v = head_row(job->v, start + first, kv_head);
        tile_pack_rows(scratch->k + first * job->padded, k, job->k->stride[0], rows, job->width,
                       1.0f);
        tile_pack_transposed(scratch->keys + first * job->width, k, job->k->stride[0], rows,
                             job->width);
        tile_pack_transposed(scratch->values + first * job->width, v, job->v->stride[0], rows,
                             job->width);
        const size_t bytes = (size_t)(TILE * job->padded) * sizeof(float);
        memset(scratch->dk + first * job->padded, 0, bytes);
        memset(scratch->dv + first * job->padded, 0, bytes);
    }
}

/* A block of queries of one head against a block of keys; rows count from the segment's start. */
struct backward_block {
    const struct backward *job;
    const struct backward_scratch *scratch;
    int64_t start, head;
    int64_t first_query, first_key;
    int rows, cols;
};

/* From the scores and dweights = dout v^T: the weights after dropout in place of the scores, and
 * the gradients of the scores (before the cap) in place of dweights. */
static void score_gradients(const struct backward_block *block, float *score, float *dweight) {
    const struct ee_attention_params *params = block->job->params;
    const float cap = params->softcap;
    for (int i = 0; i < block->rows; i++, score += TILE, dweight += TILE) {
        const int64_t query = block->first_query + i;
        int from, to;
        visible_columns(query - block->first_key, params->window, block->cols, &from, &to);
        float keep[TILE];
        if (params->dropout)
            dropout_row(keep, params->dropout, params->dropout->row[block->start + query],
                        ((uint64_t)block->head << 24) + (uint64_t)block->first_key);
        const v16 lse = v16_set(block->scratch->lse[query]);
        const v16 delta = v16_set(block->scratch->delta[query]);
        for (int j = 0; j < to; j += 16) {
            v16 s = v16_load(score + j), slope = v16_set(1.0f);
            if (cap > 0.0f) {
                s = soft_cap(s, cap);
                v16 t = v16_div(s, v16_set(cap));
                slope = v16_sub(slope, v16_mul(t, t));
            }
            v16 x = v16_sub(s, lse);
            if (j < from || j + 16 > to)
                x = keep_columns(x, j, from, to, MASKED);
            v16 w = v16_exp(x), dw = v16_load(dweight + j), kept = w;
            if (params->dropout) {
                v16 k = v16_load(keep + j);
                kept = v16_mul(w, k);
                dw = v16_mul(dw, k);
            }
            v16 ds = v16_mul(w, v16_sub(dw, delta));
            if (cap > 0.0f)
                ds = v16_mul(ds, slope);
            v16_store(score + j, kept);
            v16_store(dweight + j, ds);
        }
    }
}

static void backward_block(const struct backward_block *block) {
    const struct backward *job = block->job;
    const struct backward_scratch *scratch = block->scratch;
    const int64_t padded = job->padded, width = job->width;
    const int64_t query = block->first_query * padded, key = block->first_key * padded;
    const bool diagonal = block->first_query == block->first_key;
    float *weights = scratch->weights, *scores = scratch->scores;

    struct tile_product p = {
        .c = weights,
        .c_row = TILE,
        .a = scratch->q + query,
        .a_row = padded,
        .a_depth = 1,
        .b = scratch->keys + block->first_key * width,
        .b_row = TILE,
        .rows = block->rows,
        .cols = block->cols,
        .depth = (int)width,
        .shape = diagonal ? TILE_LOWER : TILE_FULL,
    };
    tile_multiply(&p);
    p.c = scores;
    p.a = scratch->dout + query;
    p.b = scratch->values + block->first_key * width;
    tile_multiply(&p);
    score_gradients(block, weights, scores);

    p = (struct tile_product){
        .c = scratch->dv + key,
        .c_row = padded,
        .a = weights,
        .a_row = 1,
        .a_depth = TILE,
        .b = scratch->dout + query,
        .b_row = padded,
        .rows = block->cols,
        .cols = (int)padded,
        .depth = block->rows,
        .shape = diagonal ? TILE_A_TRANSPOSED : TILE_FULL,
        .add = true,
    };
    tile_multiply(&p);
    p.c = scratch->dk + key;
    p.a = scores;
    p.b = scratch->q + query;
    tile_multiply(&p);

    p = (struct tile_product){
        .c = scratch->dq + query,
        .c_row = padded,
        .a = scores,
        .a_row = TILE,
        .a_depth = 1,
        .b = scratch->k + key,
        .b_row = padded,
        .rows = block->rows,
        .cols = (int)padded,
        .depth = block->cols,
        .shape = diagonal ? TILE_A_LOWER : TILE_FULL,
        .add = true,
    };
    tile_multiply(&p);
}

/* One head against the blocks [from, to) of keys; adds into dq, dk and dv of the scratch. */
static void backward_head(const struct backward *job, const struct backward_scratch *scratch,
                          int64_t s, int64_t head, int64_t from, int64_t to) {
    const int64_t length = segment_length(&job->plan, s);
    struct backward_block block = {
        .job = job, .scratch = scratch, .start = job->plan.segment[s], .head = head};
    pack_queries(job, scratch, block.start, head, from * TILE,
                 queries_end(&job->plan, length, ee_min(to * TILE, length) - 1));
    memset(scratch->dq, 0, (size_t)(round_up(length, TILE) * job->padded) * sizeof(float));
    for (block.first_key = from * TILE; block.first_key < to * TILE; block.first_key += TILE) {
        block.cols = (int)ee_min(TILE, length - block.first_key);
        int64_t end = queries_end(&job->plan, length, block.first_key + block.cols - 1);
        for (block.first_query = block.first_key; block.first_query < end;
             block.first_query += TILE) {
            block.rows = (int)ee_min(TILE, end - block.first_query);
            backward_block(&block);
        }
    }
}

/* Where `thread` keeps its part of the gradient of shared queries: a thread shares at most the
 * first and the last of its heads. */
static float *partial_queries(const struct backward *job, int64_t thread, int64_t from,
                              int64_t member) {
    int64_t slot = from > 0 ? 0 : 1;
    return job->partial + ((thread * 2 + slot) * job->group + member) * job->rows * job->padded;
}

static void backward_group(const struct backward *job, struct backward_scratch *scratch, int64_t s,
                           int64_t kv_head, int64_t thread, int64_t from, int64_t to) {
    const int64_t length = segment_length(&job->plan, s), start = job->plan.segment[s];
    const bool whole = from == 0 && to * TILE >= length;
    float *own_dq = scratch->dq;
    pack_keys(job, scratch, start, length, kv_head, from, to);
    for (int64_t member = 0; member < job->group; member++) {
        int64_t head = kv_head * job->group + member;
        if (!whole)
            scratch->dq = partial_queries(job, thread, from, member);
        backward_head(job, scratch, s, head, from, to);
        for (int64_t i = 0; whole && i < length; i++)
            tile_unpack_row(head_row(job->dq, start + i, head), scratch->dq + i * job->padded,
                            job->width, job->params->scale);
    }
    scratch->dq = own_dq;
    for (int64_t j = from * TILE; j < ee_min(to * TILE, length); j++) {
        tile_unpack_row(head_row(job->dk, start + j, kv_head), scratch->dk + j * job->padded,
                        job->width, 1.0f);
        tile_unpack_row(head_row(job->dv, start + j, kv_head), scratch->dv + j * job->padded,
                        job->width, 1.0f);
    }
}

static void backward_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct backward *job = arg;
    for (int64_t share = first; share < last; share++) {
        struct backward_scratch scratch;
        backward_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t at = 0;
        for (int64_t s = 0; s < job->plan.segments; s++)
            for (int64_t kv_head = 0; kv_head < job->plan.kv_heads; kv_head++) {
                int64_t from, to;
                plan_share(&job->plan, segment_length(&job->plan, s), (int)share, &at, &from, &to);
                if (from < to)
                    backward_group(job, &scratch, s, kv_head, share, from, to);
            }
    }
}

/* Adds a thread's part of dq for the rows of this reducer, the n-th of `plan.threads`. */
static void add_partial(const struct backward *job, int64_t s, int64_t kv_head, int64_t thread,
                        int64_t from, int64_t n) {
    const int64_t length = segment_length(&job->plan, s), start = job->plan.segment[s];
    const int64_t first = n * length / job->plan.threads;
    const int64_t end = (n + 1) * length / job->plan.threads;
    for (int64_t member = 0; member < job->group; member++) {
        const float *partial = partial_queries(job, thread, from, member);
        for (int64_t i = first; i < end; i++) {
            float *dq = head_row(job->dq, start + i, kv_head * job->group + member);
            for (int64_t d = 0; d < job->width; d++) {
                float part = job->params->scale * partial[i * job->padded + d];
                dq[d] = from > 0 ? dq[d] + part : part;
            }
        }
    }
}

static void reduce_share(void *arg, int64_t first, int64_t last, int unused) {
    (void)unused;
    const struct backward *job = arg;
    for (int64_t n = first; n < last; n++)
        for (int thread = 0; thread < job->plan.threads; thread++) {
            int64_t at = 0;
            for (int64_t s = 0; s < job->plan.segments; s++)
                for (int64_t kv_head = 0; kv_head < job->plan.kv_heads; kv_head++) {
                    int64_t from, to, length = segment_length(&job->plan, s);
                    plan_share(&job->plan, length, thread, &at, &from, &to);
                    if (from < to && (from > 0 || to * TILE < length))
                        add_partial(job, s, kv_head, thread, from, n);
                }
        }
}

/* Whether threads share the queries of a segment and key-value head. */
static bool shares_queries(const struct attention_plan *plan) {
    for (int thread = 0; thread < plan->threads; thread++) {
        int64_t at = 0;
        for (int64_t n = 0; n < plan->segments * plan->kv_heads; n++) {
            int64_t from, to, length = segment_length(plan, n / plan->kv_heads);
            plan_share(plan, length, thread, &at, &from, &to);
            if (from < to && (from > 0 || to * TILE < length))
                return true;
        }
    }
    return false;
}

enum ee_status EE_KERNEL(attention_backward)(struct ee_ctx *ctx, const struct ee_tensor *dq,
                                             const struct ee_tensor *dk, const struct ee_tensor *dv,
                                             const struct ee_tensor *dout,
                                             const struct ee_tensor *out,
                                             const struct ee_tensor *lse, const struct ee_tensor *q,
                                             const struct ee_tensor *k, const struct ee_tensor *v,
                                             const int32_t *segment, int64_t segments,
                                             const struct ee_attention_params *params) {
    struct backward job = {
        .dq = dq,
        .dk = dk,
        .dv = dv,
        .dout = dout,
        .out = out,
        .lse = lse,
        .q = q,
        .k = k,
        .v = v,
        .params = params,
        .plan = {.segment = segment,
                 .segments = segments,
                 .kv_heads = k->shape[1],
                 .window = params->window,
                 .threads = ee_pool_threads(ctx->pool),
                 .by_keys = true},
        .group = q->shape[1] / k->shape[1],
        .width = q->shape[2],
        .padded = round_up(q->shape[2], 16),
    };
    plan_init(&job.plan);
    job.rows = round_up(longest_segment(&job.plan), TILE);
    struct backward_scratch unused;
    job.scratch_size = backward_scratch_cut(&unused, NULL, &job);
    const bool shared = shares_queries(&job.plan);

    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    enum ee_status status;
    void *memory;
    EE_GOTO(status,
            ee_scratch_take(ctx, &memory, job.scratch_size * job.plan.threads, sizeof(float)),
            done);
    job.scratch = memory;
    if (shared) {
        int64_t size = job.plan.threads * 2 * job.group * job.rows * job.padded;
        EE_GOTO(status, ee_scratch_take(ctx, &memory, size, sizeof(float)), done);
        job.partial = memory;
    }
    ee_pool_run(ctx->pool, backward_share, &job, job.plan.threads);
    if (shared)
        ee_pool_run(ctx->pool, reduce_share, &job, job.plan.threads);
done:
    ee_scratch_release(ctx, mark);
    return status;
}
