/* Attention in inference: rows of many sequences against keys and values in pages.
 *
 * A row's result is defined block by block, by absolute positions: scores of a block of 64 keys,
 * their maximum, weights relative to it, the sum of the weights and of the weighted values; then
 * the block joins what was summed before, in ascending order. Rows of one sequence, and the heads
 * that share keys, go through the keys together, which reads them once and changes no bit. */
#include "cpu/attention_block.h"
#include "cpu/attention_rows_tile.h"
#include "cpu/parallel.h"
#include "ops/ctx.h"

/* -- Writing -- */

struct writing {
    const struct ee_kv *kv;
    const struct ee_tensor *k, *v;
    const int32_t *sequence, *position;
};

/* Where a position of a sequence stands, for one head. */
static int64_t kv_offset(const struct ee_kv *kv, int64_t sequence, int64_t position, int64_t head) {
    int64_t page = kv->table[sequence * kv->pages_per_sequence + position / kv->page];
    return ((page * kv->heads + head) * kv->page + position % kv->page) * kv->width;
}

static void write_rows(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct writing *job = arg;
    const struct ee_kv *kv = job->kv;
    const size_t bytes = (size_t)kv->width * sizeof(float);
    for (int64_t n = first; n < last; n++)
        for (int64_t head = 0; head < kv->heads; head++) {
            int64_t at = kv_offset(kv, job->sequence[n], job->position[n], head);
            memcpy(kv->k + at, ee_row(job->k, n * kv->heads + head), bytes);
            memcpy(kv->v + at, ee_row(job->v, n * kv->heads + head), bytes);
        }
}

enum ee_status EE_KERNEL(kv_write)(struct ee_ctx *ctx, const struct ee_kv *kv,
                                   const struct ee_tensor *k, const struct ee_tensor *v,
                                   const int32_t *sequence, const int32_t *position) {
    struct writing job = {.kv = kv, .k = k, .v = v, .sequence = sequence, .position = position};
    ee_cpu_run(ctx, write_rows, &job, k->shape[0], k->shape[0] * kv->heads * kv->width);
    return EE_OK;
}

/* -- Attention -- */

/* Queries that go through the keys together. */
#define QUERIES 64

struct rows {
    const struct ee_tensor *out, *q;
    const struct ee_kv *kv;
    const int32_t *sequence, *position;
    const struct ee_attention_params *params;
    int64_t group, width, padded; /* query heads of a key-value head; D, and rounded up to 16 */
    int64_t capacity;             /* queries that go together at most */
    int64_t total, shares;        /* cost of all, and into how many shares it is cut */
    float *scratch;
    int64_t scratch_size; /* bytes of one share */
};

/* One query, in the middle of its keys. */
struct query {
    int64_t first, last; /* positions that it sees */
    float maximum, sum;  /* of the blocks so far */
};

struct rows_scratch {
    float *q, *out; /* [capacity, padded] */
    float *weight;  /* [capacity, BLOCK] */
    struct query *query;
    struct row_values *values;
    int64_t *active;            /* the queries that see the current block */
    float **score;              /* their weights */
    const float **active_query; /* their row of q */
};

static int64_t rows_scratch_cut(struct rows_scratch *scratch, float *memory,
                                const struct rows *job) {
    const int64_t n = job->capacity, unit = (int64_t)sizeof(float);
    int64_t used = 0;
    scratch->q = cut(memory, &used, n * job->padded);
    scratch->out = cut(memory, &used, n * job->padded);
    scratch->weight = cut(memory, &used, n * BLOCK);
    scratch->query = (void *)cut(memory, &used, n * (int64_t)sizeof *scratch->query / unit);
    scratch->values = (void *)cut(memory, &used, n * (int64_t)sizeof *scratch->values / unit);
    scratch->active = (void *)cut(memory, &used, n * (int64_t)sizeof *scratch->active / unit);
    scratch->score = (void *)cut(memory, &used, n * (int64_t)sizeof *scratch->score / unit);
    scratch->active_query =
        (void *)cut(memory, &used, n * (int64_t)sizeof *scratch->active_query / unit);
    return used;
}

static int64_t first_visible(const struct rows *job, int64_t n) {
    const int64_t window = job->params->window;
    return window > 0 ? ee_max(0, (int64_t)job->position[n] - window + 1) : 0;
}

/* Turns the scores of one query into weights relative to the block's maximum, and says how the
 * block joins the blocks before it. */
static void weigh(const struct ee_attention_params *params, struct query *query, float *weight,
                  struct row_values *values) {
    const v16 scale = v16_set(params->scale);
    v16 highest = v16_set(MASKED), sum = v16_set(0.0f);
    for (int j = 0; j < values->to; j += 16) {
        v16 s = v16_mul(v16_load(weight + j), scale);
        if (params->softcap > 0.0f)
            s = soft_cap(s, params->softcap);
        if (j < values->from || j + 16 > values->to)
            s = keep_columns(s, j, values->from, values->to, MASKED);
        v16_store(weight + j, s);
        highest = v16_max(highest, s);
    }
    const float block_maximum = v16_max_lane(highest);
    for (int j = 0; j < values->to; j += 16) {
        v16 w = v16_exp(v16_sub(v16_load(weight + j), v16_set(block_maximum)));
        v16_store(weight + j, w);
        sum = v16_add(sum, w);
    }
    const float maximum = block_maximum > query->maximum ? block_maximum : query->maximum;
    float change[16] = {query->maximum - maximum, block_maximum - maximum};
    v16_store(change, v16_exp(v16_load(change)));
    values->old_factor = change[0];
    values->factor = change[1];
    query->maximum = maximum;
    query->sum = fmaf(v16_sum(sum), values->factor, query->sum * values->old_factor);
}

/* All queries against the block of keys from `position` on; `ahead` are the keys after it. */
static void rows_block(const struct rows *job, const struct rows_scratch *scratch, int64_t queries,
                       int64_t sequence, int64_t kv_head, int64_t position, const float *ahead) {
    int active = 0, keys = 0;
    for (int64_t i = 0; i < queries; i++) {
        const struct query *query = &scratch->query[i];
        int64_t from = ee_max(0, query->first - position);
        int64_t to = ee_min(BLOCK, query->last - position + 1);
        if (from >= to)
            continue;
        scratch->active[active] = i;
        scratch->score[active] = scratch->weight + i * BLOCK;
        scratch->active_query[active] = scratch->q + i * job->padded;
        scratch->values[active++] = (struct row_values){.weight = scratch->weight + i * BLOCK,
                                                        .from = (int)from,
                                                        .to = (int)to,
                                                        .out = scratch->out + i * job->padded};
        keys = to > keys ? (int)to : keys;
    }
    if (active == 0)
        return;
    const int64_t at = kv_offset(job->kv, sequence, position, kv_head);
    score_block(active, scratch->score, scratch->active_query, job->kv->k + at, job->width, keys,
                job->kv->v + at);
    for (int i = 0; i < active; i++)
        weigh(job->params, &scratch->query[scratch->active[i]], scratch->score[i],
              &scratch->values[i]);
    add_values(active, scratch->values, job->kv->v + at, job->width, ahead);
}

/* The rows [first, end), all of one sequence, for the query heads of one key-value head. */
static void rows_group(const struct rows *job, const struct rows_scratch *scratch, int64_t first,
                       int64_t end, int64_t kv_head) {
    const int64_t queries = (end - first) * job->group;
    int64_t start = INT64_MAX, last = 0;
    for (int64_t i = 0; i < queries; i++) {
        const int64_t n = first + i / job->group, head = kv_head * job->group + i % job->group;
        scratch->query[i] = (struct query){
            .first = first_visible(job, n), .last = job->position[n], .maximum = MASKED};
        start = ee_min(start, scratch->query[i].first);
        last = ee_max(last, scratch->query[i].last);
        float *q = scratch->q + i * job->padded;
        memset(q, 0, (size_t)job->padded * sizeof(float));
        memcpy(q, ee_row(job->q, n * job->q->shape[1] + head), (size_t)job->width * sizeof(float));
    }
    memset(scratch->out, 0, (size_t)(queries * job->padded) * sizeof(float));
    for (int64_t position = start / BLOCK * BLOCK; position <= last; position += BLOCK) {
        const int64_t next = position + BLOCK, sequence = job->sequence[first];
        const float *ahead =
            next <= last ? job->kv->k + kv_offset(job->kv, sequence, next, kv_head) : NULL;
        rows_block(job, scratch, queries, sequence, kv_head, position, ahead);
    }
    for (int64_t i = 0; i < queries; i++) {
        const int64_t n = first + i / job->group, head = kv_head * job->group + i % job->group;
        float *out = ee_row(job->out, n * job->out->shape[1] + head);
        const float *sum = scratch->out + i * job->padded;
        const v16 divisor = v16_set(scratch->query[i].sum);
        for (int64_t d = 0; d < job->width; d += 16)
            v16_store_n(out + d, v16_div(v16_load(sum + d), divisor),
                        (int)ee_min(16, job->width - d));
    }
}

/* One past the last row that goes together with row n; its cost for one key-value head is added up
 * in *cost. */
static int64_t group_end(const struct rows *job, int64_t n, int64_t *cost) {
    const int64_t limit = ee_min(job->q->shape[0], n + ee_max(1, QUERIES / job->group));
    const int64_t reading = 4; /* the cost of reading a key, in queries that use it */
    int64_t start = INT64_MAX, last = 0, end = n;
    for (; end < limit && job->sequence[end] == job->sequence[n]; end++) {
        start = ee_min(start, first_visible(job, end));
        last = ee_max(last, job->position[end]);
    }
    *cost = (last - start + BLOCK) * ((end - n) * job->group + reading);
    return end;
}

static void rows_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rows *job = arg;
    const int64_t heads = job->kv->heads, N = job->q->shape[0];
    for (int64_t share = first; share < last; share++) {
        struct rows_scratch scratch;
        rows_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t at = 0, cost, end;
        for (int64_t n = 0; n < N; n = end) {
            end = group_end(job, n, &cost);
            for (int64_t head = 0; head < heads; head++, at += cost) {
                int64_t middle = (2 * at + cost) * job->shares;
                if (middle >= 2 * job->total * share && middle < 2 * job->total * (share + 1))
                    rows_group(job, &scratch, n, end, head);
            }
        }
    }
}

enum ee_status EE_KERNEL(attention_rows)(struct ee_ctx *ctx, const struct ee_tensor *out,
                                         const struct ee_tensor *q, const struct ee_kv *kv,
                                         const int32_t *sequence, const int32_t *position,
                                         const struct ee_attention_params *params) {
    struct rows job = {
        .out = out,
        .q = q,
        .kv = kv,
        .sequence = sequence,
        .position = position,
        .params = params,
        .group = q->shape[1] / kv->heads,
        .width = q->shape[2],
        .padded = round_up(q->shape[2], 16),
    };
    job.capacity = ee_max(QUERIES, job.group);
    int64_t cost;
    for (int64_t n = 0; n < q->shape[0]; job.total += cost * kv->heads)
        n = group_end(&job, n, &cost);
    job.shares = job.total * job.width < EE_SERIAL_ELEMENTS ? 1 : ee_pool_threads(ctx->pool);
    struct rows_scratch unused;
    job.scratch_size = rows_scratch_cut(&unused, NULL, &job);
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    void *memory;
    EE_TRY(ee_scratch_take(ctx, &memory, job.scratch_size * job.shares, sizeof(float)));
    job.scratch = memory;
    ee_pool_run(ctx->pool, rows_share, &job, job.shares);
    ee_scratch_release(ctx, mark);
    return EE_OK;
}
