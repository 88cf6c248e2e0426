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
    int64_t units, queries; /* groups of rows x key-value heads; most queries of one of them */
    float *scratch;
    int64_t scratch_size;      /* of one share, in floats */
    float *parts;              /* [units, blocks, queries, part_size], where units are cut */
    int64_t blocks, part_size; /* blocks of keys that a sequence can have */
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

/* What a block of keys says about one query. */
struct block_sum {
    float maximum, sum; /* of the scores, of the weights relative to it */
    bool seen;          /* whether the query sees any of its keys */
};

/* Turns the scores of one query into weights relative to the block's maximum. */
static struct block_sum weigh(const struct ee_attention_params *params, float *weight,
                              const struct row_values *values) {
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
    const float maximum = v16_max_lane(highest);
    for (int j = 0; j < values->to; j += 16) {
        v16 w = v16_exp(v16_sub(v16_load(weight + j), v16_set(maximum)));
        v16_store(weight + j, w);
        sum = v16_add(sum, w);
    }
    return (struct block_sum){maximum, v16_sum(sum), true};
}

/* A block joins the blocks before it: factors[0] is what their sums are multiplied with, factors[1]
 * that for the block's. */
static void join(struct query *query, struct block_sum block, float factors[2]) {
    const float maximum = block.maximum > query->maximum ? block.maximum : query->maximum;
    float change[16] = {query->maximum - maximum, block.maximum - maximum};
    v16_store(change, v16_exp(v16_load(change)));
    factors[0] = change[0];
    factors[1] = change[1];
    query->maximum = maximum;
    query->sum = fmaf(block.sum, factors[1], query->sum * factors[0]);
}

/* A part is what one block adds to one query, kept by itself: its struct block_sum, then [padded]
 * sums of values. */
#define PART_HEAD 16 /* floats */

static void part_begin(float *part, int64_t padded) {
    const struct block_sum unseen = {0};
    memcpy(part, &unseen, sizeof unseen);
    /* A sum that is added to -0 keeps its sign even where it is 0. */
    for (int64_t d = 0; d < padded; d += 16)
        v16_store(part + PART_HEAD + d, v16_set(-0.0f));
}

/* All queries against the block of keys from `position` on; `ahead` are the keys after it. The
 * block joins those before it, or goes into `parts` [queries, part_size] where that is not NULL. */
static void rows_block(const struct rows *job, const struct rows_scratch *scratch, int64_t queries,
                       int64_t sequence, int64_t kv_head, int64_t position, const float *ahead,
                       float *parts) {
    int active = 0, keys = 0;
    for (int64_t i = 0; i < queries; i++) {
        const struct query *query = &scratch->query[i];
        int64_t from = ee_max(0, query->first - position);
        int64_t to = ee_min(BLOCK, query->last - position + 1);
        float *part = parts ? parts + i * job->part_size : NULL;
        if (part)
            part_begin(part, job->padded);
        if (from >= to)
            continue;
        scratch->active[active] = i;
        scratch->score[active] = scratch->weight + i * BLOCK;
        scratch->active_query[active] = scratch->q + i * job->padded;
        scratch->values[active++] =
            (struct row_values){.weight = scratch->weight + i * BLOCK,
                                .from = (int)from,
                                .to = (int)to,
                                .old_factor = 1.0f,
                                .factor = 1.0f,
                                .out = part ? part + PART_HEAD : scratch->out + i * job->padded};
        keys = to > keys ? (int)to : keys;
    }
    if (active == 0)
        return;
    const int64_t at = kv_offset(job->kv, sequence, position, kv_head);
    score_block(active, scratch->score, scratch->active_query, job->kv->k + at, job->width, keys,
                job->kv->v + at);
    for (int i = 0; i < active; i++) {
        struct row_values *values = &scratch->values[i];
        struct block_sum block = weigh(job->params, scratch->score[i], values);
        if (parts) {
            memcpy(parts + scratch->active[i] * job->part_size, &block, sizeof block);
            continue;
        }
        float factors[2];
        join(&scratch->query[scratch->active[i]], block, factors);
        values->old_factor = factors[0];
        values->factor = factors[1];
    }
    add_values(active, scratch->values, job->kv->v + at, job->width, ahead);
}

/* Rows of one sequence and the key-value head whose query heads go through its keys. */
struct unit {
    int64_t first, end, kv_head;
    int64_t start, last; /* positions that any of them sees */
};

static int64_t unit_queries(const struct rows *job, const struct unit *unit) {
    return (unit->end - unit->first) * job->group;
}

static int64_t unit_blocks(const struct unit *unit) {
    return unit->last / BLOCK - unit->start / BLOCK + 1;
}

/* The row and the head of query i. */
static void query_place(const struct rows *job, const struct unit *unit, int64_t i, int64_t *row,
                        int64_t *head) {
    *row = unit->first + i / job->group;
    *head = unit->kv_head * job->group + i % job->group;
}

static struct query query_init(const struct rows *job, int64_t row) {
    return (struct query){
        .first = first_visible(job, row), .last = job->position[row], .maximum = MASKED};
}

static void load_queries(const struct rows *job, const struct rows_scratch *scratch,
                         const struct unit *unit) {
    for (int64_t i = 0; i < unit_queries(job, unit); i++) {
        int64_t n, head;
        query_place(job, unit, i, &n, &head);
        scratch->query[i] = query_init(job, n);
        float *q = scratch->q + i * job->padded;
        memset(q, 0, (size_t)job->padded * sizeof(float));
        memcpy(q, ee_row(job->q, n * job->q->shape[1] + head), (size_t)job->width * sizeof(float));
    }
}

static void finish_query(const struct rows *job, const struct unit *unit, int64_t i,
                         const float *sum, const struct query *query) {
    int64_t n, head;
    query_place(job, unit, i, &n, &head);
    float *out = ee_row(job->out, n * job->out->shape[1] + head);
    const v16 divisor = v16_set(query->sum);
    for (int64_t d = 0; d < job->width; d += 16)
        v16_store_n(out + d, v16_div(v16_load(sum + d), divisor), (int)ee_min(16, job->width - d));
}

/* The blocks [block, end) of a unit's keys; `parts` as in rows_block, of the first of them. */
static void unit_run(const struct rows *job, const struct rows_scratch *scratch,
                     const struct unit *unit, int64_t block, int64_t end, float *parts) {
    const int64_t sequence = job->sequence[unit->first];
    for (; block < end; block++) {
        const int64_t position = (unit->start / BLOCK + block) * BLOCK, next = position + BLOCK;
        const float *ahead =
            block + 1 < end ? job->kv->k + kv_offset(job->kv, sequence, next, unit->kv_head) : NULL;
        rows_block(job, scratch, unit_queries(job, unit), sequence, unit->kv_head, position, ahead,
                   parts);
        if (parts)
            parts += job->queries * job->part_size;
    }
}

static void unit_whole(const struct rows *job, const struct rows_scratch *scratch,
                       const struct unit *unit) {
    const int64_t queries = unit_queries(job, unit);
    load_queries(job, scratch, unit);
    memset(scratch->out, 0, (size_t)(queries * job->padded) * sizeof(float));
    unit_run(job, scratch, unit, 0, unit_blocks(unit), NULL);
    for (int64_t i = 0; i < queries; i++)
        finish_query(job, unit, i, scratch->out + i * job->padded, &scratch->query[i]);
}

/* The rows from n on that go together, for key-value head 0; their cost for one head is set. */
static struct unit next_unit(const struct rows *job, int64_t n, int64_t *cost) {
    const int64_t limit = ee_min(job->q->shape[0], n + ee_max(1, QUERIES / job->group));
    const int64_t reading = 4; /* the cost of reading a key, in queries that use it */
    struct unit unit = {.first = n, .end = n, .start = INT64_MAX};
    for (; unit.end < limit && job->sequence[unit.end] == job->sequence[n]; unit.end++) {
        unit.start = ee_min(unit.start, first_visible(job, unit.end));
        unit.last = ee_max(unit.last, job->position[unit.end]);
    }
    *cost = (unit.last - unit.start + BLOCK) * (unit_queries(job, &unit) + reading);
    return unit;
}

/* Each share is whole units, of about the same cost. */
static void rows_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rows *job = arg;
    const int64_t heads = job->kv->heads, N = job->q->shape[0];
    for (int64_t share = first; share < last; share++) {
        struct rows_scratch scratch;
        rows_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t at = 0, cost;
        for (int64_t n = 0; n < N;) {
            struct unit unit = next_unit(job, n, &cost);
            for (unit.kv_head = 0; unit.kv_head < heads; unit.kv_head++, at += cost) {
                int64_t middle = (2 * at + cost) * job->shares;
                if (middle >= 2 * job->total * share && middle < 2 * job->total * (share + 1))
                    unit_whole(job, &scratch, &unit);
            }
            n = unit.end;
        }
    }
}

/* -- Fewer units than threads: each is cut into blocks of keys -- */

static float *unit_parts(const struct rows *job, int64_t unit, int64_t block) {
    return job->parts + (unit * job->blocks + block) * job->queries * job->part_size;
}

/* A share of the blocks of every unit, into parts. */
static void parts_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rows *job = arg;
    for (int64_t share = first; share < last; share++) {
        struct rows_scratch scratch;
        rows_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t index = 0, cost;
        for (int64_t n = 0; n < job->q->shape[0];) {
            struct unit unit = next_unit(job, n, &cost);
            const int64_t blocks = unit_blocks(&unit), begin = share * blocks / job->shares;
            const int64_t end = (share + 1) * blocks / job->shares;
            for (unit.kv_head = 0; unit.kv_head < job->kv->heads; unit.kv_head++, index++) {
                load_queries(job, &scratch, &unit);
                unit_run(job, &scratch, &unit, begin, end, unit_parts(job, index, begin));
            }
            n = unit.end;
        }
    }
}

/* Joins the parts of a query in the order in which unit_whole would have. */
static void join_parts(const struct rows *job, const struct unit *unit, int64_t index, int64_t i,
                       float *out) {
    int64_t n, head;
    query_place(job, unit, i, &n, &head);
    struct query query = query_init(job, n);
    memset(out, 0, (size_t)job->padded * sizeof(float));
    for (int64_t b = 0; b < unit_blocks(unit); b++) {
        const float *part = unit_parts(job, index, b) + i * job->part_size;
        struct block_sum block;
        memcpy(&block, part, sizeof block);
        if (!block.seen)
            continue;
        float factors[2];
        join(&query, block, factors);
        for (int64_t d = 0; d < job->padded; d += 16) {
            v16 old = v16_mul(v16_load(out + d), v16_set(factors[0]));
            v16 sum = v16_load(part + PART_HEAD + d);
            v16_store(out + d, v16_fma(sum, v16_set(factors[1]), old));
        }
    }
    finish_query(job, unit, i, out, &query);
}

static void join_share(void *arg, int64_t first, int64_t last, int thread) {
    (void)thread;
    const struct rows *job = arg;
    for (int64_t share = first; share < last; share++) {
        struct rows_scratch scratch;
        rows_scratch_cut(&scratch, job->scratch + share * job->scratch_size, job);
        int64_t index = 0, cost;
        for (int64_t n = 0; n < job->q->shape[0];) {
            struct unit unit = next_unit(job, n, &cost);
            const int64_t queries = unit_queries(job, &unit);
            for (unit.kv_head = 0; unit.kv_head < job->kv->heads; unit.kv_head++, index++)
                for (int64_t i = share * queries / job->shares;
                     i < (share + 1) * queries / job->shares; i++)
                    join_parts(job, &unit, index, i, scratch.out);
            n = unit.end;
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
    job.part_size = PART_HEAD + job.padded;
    job.blocks = ee_ceil_div(kv->pages_per_sequence * kv->page, BLOCK);
    int64_t cost;
    for (int64_t n = 0; n < q->shape[0];) {
        struct unit unit = next_unit(&job, n, &cost);
        job.total += cost * kv->heads;
        job.units += kv->heads;
        job.queries = ee_max(job.queries, unit_queries(&job, &unit));
        n = unit.end;
    }
    job.shares = job.total * job.width < EE_SERIAL_ELEMENTS ? 1 : ee_pool_threads(ctx->pool);
    struct rows_scratch unused;
    job.scratch_size = rows_scratch_cut(&unused, NULL, &job);
    const bool split = job.units < job.shares;
    const int64_t parts = split ? job.units * job.blocks * job.queries * job.part_size : 0;
    struct ee_scratch_mark mark = ee_scratch_mark(ctx);
    void *memory;
    EE_TRY(ee_scratch_take(ctx, &memory, job.scratch_size * job.shares + parts, sizeof(float)));
    job.scratch = memory;
    job.parts = job.scratch + job.scratch_size * job.shares;
    ee_pool_run(ctx->pool, split ? parts_share : rows_share, &job, job.shares);
    if (split)
        ee_pool_run(ctx->pool, join_share, &job, job.shares);
    ee_scratch_release(ctx, mark);
    return EE_OK;
}
