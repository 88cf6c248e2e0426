/* Attention in training, forward: blocks of 64 queries by 64 keys with a running maximum and sum
 * (Dao et al., "FlashAttention", 2022), so that memory grows with T and not with T^2. */
#include "cpu/attention_block.h"
#include "cpu/cpu.h"
#include "ops/ctx.h"

struct forward {
    const struct ee_tensor *out, *lse, *q, *k, *v;
    const struct ee_attention_params *params;
    struct attention_plan plan;
    int64_t group, width, padded; /* query heads of a key-value head; D, and rounded up to 16 */
    float *scratch;
    int64_t scratch_size; /* floats of one thread */
};

/* Scratch of one thread. */
struct forward_scratch {
    float *keys;   /* [blocks, D, TILE], transposed */
    float *values; /* [blocks, TILE, padded] */
    float *q, *out;
    float *weights; /* [TILE, TILE] */
    float *maximum; /* [TILE] */
    float *factor;  /* [TILE], of what was summed before the current block */
    float *sum;     /* [TILE, 16], by lane */
};

/* Floats that it takes. */
static int64_t forward_scratch_cut(struct forward_scratch *scratch, float *memory,
                                   const struct forward *job) {
    const int64_t blocks = ee_ceil_div(longest_segment(&job->plan), TILE), padded = job->padded;
    int64_t used = 0;
    scratch->keys = cut(memory, &used, blocks * job->width * TILE);
    scratch->values = cut(memory, &used, blocks * TILE * padded);
    scratch->q = cut(memory, &used, TILE * padded);
    scratch->out = cut(memory, &used, TILE * padded);
    scratch->weights = cut(memory, &used, TILE * TILE);
    scratch->maximum = cut(memory, &used, TILE);
    scratch->factor = cut(memory, &used, TILE);
    scratch->sum = cut(memory, &used, TILE * 16);
    return used;
}

/* A block of queries of one head against one block of keys. */
struct forward_block {
    const struct forward *job;
    struct forward_scratch *scratch;
    int rows, cols;
    int64_t first_row; /* row of the tensors */
    int64_t head;
    int64_t first_key; /* within the segment */
    int64_t ahead;     /* first query less first key */
};

/* Caps and masks the scores and raises the rows' maxima; `factor` becomes the factor by which what
 * was summed so far shrinks. */
static void raise_maximum(const struct forward_block *block) {
    const struct ee_attention_params *params = block->job->params;
    struct forward_scratch *scratch = block->scratch;
    for (int i = 0; i < block->rows; i++) {
        float *score = scratch->weights + i * TILE;
        int from, to;
        visible_columns(block->ahead + i, params->window, block->cols, &from, &to);
        v16 maximum = v16_set(MASKED);
        for (int j = 0; j < to; j += 16) {
            v16 s = v16_load(score + j);
            if (params->softcap > 0.0f)
                s = soft_cap(s, params->softcap);
            if (j < from || j + 16 > to)
                s = keep_columns(s, j, from, to, MASKED);
            v16_store(score + j, s);
            maximum = v16_max(maximum, s);
        }
        const float old = scratch->maximum[i], highest = v16_max_lane(maximum);
        scratch->maximum[i] = highest > old ? highest : old;
        scratch->factor[i] = old - scratch->maximum[i];
    }
    for (int i = 0; i < block->rows; i += 16)
        v16_store(scratch->factor + i, v16_exp(v16_load(scratch->factor + i)));
}

/* Turns the scores into weights and adds them to the rows' sums. */
static void exponentiate(const struct forward_block *block) {
    const struct ee_attention_params *params = block->job->params;
    struct forward_scratch *scratch = block->scratch;
    for (int i = 0; i < block->rows; i++) {
        float *weight = scratch->weights + i * TILE;
        int to = (int)ee_min(block->cols, block->ahead + i + 1);
        /* A row that has seen no key yet has the maximum MASKED: keep its weights 0. */
        v16 maximum = v16_set(scratch->maximum[i] > MASKED ? scratch->maximum[i] : 0.0f);
        v16 sum = v16_mul(v16_load(scratch->sum + i * 16), v16_set(scratch->factor[i]));
        float keep[TILE];
        if (params->dropout)
            dropout_row(keep, params->dropout, params->dropout->row[block->first_row + i],
                        ((uint64_t)block->head << 24) + (uint64_t)block->first_key);
        for (int j = 0; j < to; j += 16) {
            v16 w = v16_exp(v16_sub(v16_load(weight + j), maximum));
            sum = v16_add(sum, w);
            if (params->dropout)
                w = v16_mul(w, v16_load(keep + j));
            v16_store(weight + j, w);
        }
        v16_store(scratch->sum + i * 16, sum);
    }
}

static void write_rows(const struct forward_block *block) {
    const struct forward *job = block->job;
    const struct forward_scratch *scratch = block->scratch;
    for (int i = 0; i < block->rows; i++) {
        int64_t row = block->first_row + i;
        float sum = v16_sum(v16_load(scratch->sum + i * 16));
        float *out = head_row(job->out, row, block->head);
        tile_unpack_row(out, scratch->out + i * job->padded, job->width, 1.0f / sum);
        ((float *)job->lse->data)[row * job->lse->stride[0] + block->head] =
            scratch->maximum[i] + logf(sum);
    }
}

/* One head of the block of queries `query_block` of segment s; the keys up to it are packed. */
static void forward_queries(const struct forward *job, struct forward_scratch *scratch, int64_t s,
                            int64_t head, int64_t query_block) {
    const int64_t first = query_block * TILE, length = segment_length(&job->plan, s);
    struct forward_block block = {
        .job = job,
        .scratch = scratch,
        .rows = (int)ee_min(TILE, length - first),
        .first_row = job->plan.segment[s] + first,
        .head = head,
    };
    const float *q = head_row(job->q, block.first_row, head);
    tile_pack_rows(scratch->q, q, job->q->stride[0], block.rows, job->width, job->params->scale);
    for (int i = 0; i < TILE; i++)
        scratch->maximum[i] = MASKED;
    memset(scratch->sum, 0, TILE * 16 * sizeof *scratch->sum);

    const int64_t first_block = first_key_block(&job->plan, first);
    for (int64_t b = first_block; b <= query_block; b++) {
        block.first_key = b * TILE;
        block.ahead = first - block.first_key;
        block.cols = (int)ee_min(TILE, length - block.first_key);
        struct tile_product scores = {
            .c = scratch->weights,
            .c_row = TILE,
            .a = scratch->q,
            .a_row = job->padded,
            .a_depth = 1,
            .b = scratch->keys + b * job->width * TILE,
            .b_row = TILE,
            .rows = block.rows,
            .cols = block.cols,
            .depth = (int)job->width,
            .shape = b == query_block ? TILE_LOWER : TILE_FULL,
        };
        tile_multiply(&scores);
        raise_maximum(&block);
        exponentiate(&block);
        struct tile_product output = {
            .c = scratch->out,
            .c_row = job->padded,
            .a = scratch->weights,
            .a_row = TILE,
            .a_depth = 1,
            .b = scratch->values + b * TILE * job->padded,
            .b_row = job->padded,
            .rows = block.rows,
            .cols = (int)job->padded,
            .depth = block.cols,
            .shape = b == query_block ? TILE_A_LOWER : TILE_FULL,
            .factor = b == first_block ? NULL : scratch->factor,
        };
        tile_multiply(&output);
    }
    write_rows(&block);
}

/* The blocks [from, to) of queries of a segment and key-value head. */
static void forward_group(const struct forward *job, struct forward_scratch *scratch, int64_t s,
                          int64_t kv_head, int64_t from, int64_t to) {
    const int64_t length = segment_length(&job->plan, s), start = job->plan.segment[s];
    int64_t packed = first_key_block(&job->plan, from * TILE);
    for (int64_t block = from; block < to; block++) {
        for (; packed <= block; packed++) {
            int64_t row = start + packed * TILE;
            int rows = (int)ee_min(TILE, length - packed * TILE);
            tile_pack_transposed(scratch->keys + packed * job->width * TILE,
                                 head_row(job->k, row, kv_head), job->k->stride[0], rows,
                                 job->width);
            tile_pack_rows(scratch->values + packed * TILE * job->padded,
                           head_row(job->v, row, kv_head), job->v->stride[0], rows, job->width,
                           1.0f);
        }
        for (int64_t head = kv_head * job->group; head < (kv_head + 1) * job->group; head++)
            forward_queries(job, scratch, s, head, block);
    }
}

static void forward_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct forward *job = arg;
    for (int64_t share = first; share < last; share++) {
        struct forward_scratch scratch;
        forward_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t at = 0;
        for (int64_t s = 0; s < job->plan.segments; s++)
            for (int64_t kv_head = 0; kv_head < job->plan.kv_heads; kv_head++) {
                int64_t from, to;
                plan_share(&job->plan, segment_length(&job->plan, s), (int)share, &at, &from, &to);
                if (from < to)
                    forward_group(job, &scratch, s, kv_head, from, to);
            }
    }
}

enum ee_status EE_KERNEL(attention)(struct ee_ctx *ctx, const struct ee_tensor *out,
                                    const struct ee_tensor *lse, const struct ee_tensor *q,
                                    const struct ee_tensor *k, const struct ee_tensor *v,
                                    const int32_t *segment, int64_t segments,
                                    const struct ee_attention_params *params) {
    struct forward job = {
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
                 .threads = ee_pool_threads(ctx->pool)},
        .group = q->shape[1] / k->shape[1],
        .width = q->shape[2],
        .padded = round_up(q->shape[2], 16),
    };
    plan_init(&job.plan);
    struct forward_scratch unused;
    job.scratch_size = forward_scratch_cut(&unused, NULL, &job);
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    void *memory;
    EE_TRY(ee_scratch_take(ctx, &memory, job.scratch_size * job.plan.threads, sizeof(float)));
    job.scratch = memory;
    ee_pool_run(ctx->pool, forward_share, &job, job.plan.threads);
    ee_scratch_release(ctx, mark);
    return EE_OK;
}
