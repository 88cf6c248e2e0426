/* Models spread over ranks: who holds which parameter, lists and their buffers, put-off products,
 * and ranks that are threads training to the bits of one rank. */
#define _GNU_SOURCE
#include "ee_test.h"
#include "train/step.h"
#include "train/walk.h"

#include <math.h>
#include <pthread.h>

enum { ROWS = 9, LAYERS = 4, MOST = 8, VOCAB = 19, RANKS = 4, STEPS = 3 };

#define PATIENCE 60.0 /* seconds of waits that must not be the ones to end */

static const float rope_freq[] = {1.0f, 0.1f};

/* Exits of every kind, on edges between ranks and beside them; the embedding is used five times. */
static struct ee_config make_config(void) {
    struct ee_config c = {.vocab_size = VOCAB, .hidden_size = 12, .intermediate_size = 10};
    c.num_layers = LAYERS;
    c.num_heads = 3;
    c.num_kv_heads = 1;
    c.head_dim = 4;
    c.max_positions = 32;
    c.norm = (struct ee_norm_params){EE_LAYERNORM, 1e-5f, 0};
    c.activation = EE_SILU;
    c.gated = c.bias_q = c.bias_down = c.qk_norm = c.norm_bias = c.tie_embeddings = true;
    c.positions = EE_POSITIONS_ROPE;
    c.rope_dims = 4;
    c.rope_scale = c.embedding_scale = 1;
    c.rope_freq = rope_freq;
    c.attention_scale = 0.5f;
    c.attention_dropout = c.residual_dropout = c.embedding_dropout = 0.1f;
    c.num_exits = 5;
    c.exits[0] = (struct ee_exit_config){1, true, EE_BRANCH_NONE, EE_EXIT_NORM_NONE, -2};
    c.exits[1] = (struct ee_exit_config){1, false, EE_BRANCH_BLOCK, EE_EXIT_NORM_OWN, -1};
    c.exits[2] = (struct ee_exit_config){2, false, EE_BRANCH_MLP, EE_EXIT_NORM_FINAL, -3};
    c.exits[3] = (struct ee_exit_config){3, true, EE_BRANCH_NONE, EE_EXIT_NORM_OWN, 1};
    c.exits[4] = (struct ee_exit_config){4, false, EE_BRANCH_NONE, EE_EXIT_NORM_FINAL, -2};
    return c;
}

/* -- Layouts and tables -- */

static void test_layout(void) {
    struct ee_config config = make_config();
    struct ee_model_layout *layout;
    /* Chunks of exits: 0 at depth 0, 1 at 2, 2 at 3, 3 at 4, 4 and the final one at 8. */
    static const int8_t later[3][6] = {{0, 1, 1, 2, 3, 3}, {0, 0, 0, 1, 1, 1}, {0, 1, 1, 1, 1, 1}};
    static const int8_t earlier[3][6] = {
        {0, 0, 1, 1, 3, 3}, {0, 0, 0, 0, 1, 1}, {0, 0, 1, 1, 1, 1}};
    static const int32_t bounds[] = {0, 1, 4};
    for (int i = 0; i < 6; i++) {
        int32_t parts = i % 3 == 0 ? 4 : 2;
        EE_EXPECT_OK(ee_layout_create(&layout, &config, parts == 4 ? 2 : 2, parts / 2,
                                      i % 3 == 2 ? bounds : NULL, i >= 3));
        int32_t next = 0;
        for (int32_t g = 0; g < parts; g++) {
            const struct ee_stage *stage = &layout->stages[g];
            EE_EXPECT(stage->first_layer == next && stage->last_layer > next);
            EE_EXPECT(stage->embeds == (g == 0) && ee_layout_rank(layout, g) == g % 2);
            next = stage->last_layer;
            for (int32_t e = 0; e < 6; e++)
                EE_EXPECT(stage->exit[e] == ((i < 3 ? later : earlier)[i % 3][e] == g));
        }
        EE_EXPECT(next == LAYERS);
        ee_layout_destroy(layout);
    }
    EE_EXPECT_STATUS(ee_layout_create(&layout, &config, 5, 1, NULL, false), EE_ERR_INVALID,
                     "4 layers cannot be split into 5 ranks");
    EE_EXPECT_STATUS(ee_layout_create(&layout, &config, 2, 1, (int32_t[]){0, 4, 4}, false),
                     EE_ERR_INVALID, "ascend from 0 to the 4 layers");
    EE_EXPECT_STATUS(ee_layout_create(&layout, &config, 2, 1, (int32_t[]){0, 2, 3}, false),
                     EE_ERR_INVALID, "ascend from 0 to the 4 layers");
    EE_EXPECT(layout == NULL);
    ee_layout_destroy(NULL);
}

/* Whether the places of the rows, further uses included, lie apart in arenas of their sizes. */
static bool lie_apart(const struct ee_params *params) {
    int64_t end = 0;
    for (int32_t i = 0; i < params->count + params->further; i++) {
        const struct ee_param *row = &params->rows[i];
        if (!row->held)
            continue;
        int64_t last = row->offset + row->shape[0] * row->shape[1];
        if (row->offset < end || last > params->gradient_elements ||
            (i < params->count ? last > params->elements : row->offset < params->elements))
            return false;
        end = last;
    }
    return true;
}

/* Every rank has all rows and the memory of those that it uses. */
static void test_table(void) {
    struct ee_config config = make_config();
    struct ee_model_layout *layout;
    EE_EXPECT_OK(ee_layout_create(&layout, &config, RANKS, 1, NULL, false));
    struct ee_params *params[2][RANKS];
    for (int32_t r = 0; r < RANKS; r++) {
        for (int exact = 0; exact < 2; exact++) {
            EE_EXPECT_OK(ee_params_create(&params[exact][r], &config, layout, r, exact));
            EE_EXPECT(lie_apart(params[exact][r]));
        }
        /* On the last rank: the embedding at exit 4 and the end, weight and bias of the norm. */
        EE_EXPECT(params[0][r]->further == 0);
        EE_EXPECT(params[1][r]->further == (r == 0 ? 1 : r == 3 ? 3 : 0));
        EE_EXPECT(params[1][r]->elements == params[0][r]->elements);
    }
    const struct ee_params *first = params[0][0];
    for (int32_t i = 0; i < first->count; i++) {
        int owners = 0, holders = 0;
        for (int32_t r = 0; r < RANKS; r++) {
            owners += params[0][r]->rows[i].owned;
            holders += params[0][r]->rows[i].held;
            EE_EXPECT(!params[0][r]->rows[i].owned || params[0][r]->rows[i].held);
            EE_EXPECT(params[0][r]->rows[i].tied == first->rows[i].tied);
        }
        EE_EXPECT(owners == 1 && (holders == 1 || first->rows[i].tied));
    }
    /* Exit 1's matrix is exit 3's too: on ranks 1 and 2, owned by the first. */
    int32_t head = ee_params_find(first, "exits.1.head.weight");
    EE_EXPECT(head >= 0 && first->rows[head].tied && !first->rows[head].held);
    EE_EXPECT(params[0][1]->rows[head].owned && !params[0][2]->rows[head].owned);
    EE_EXPECT(params[0][2]->rows[head].held && !params[0][3]->rows[head].held);
    EE_EXPECT(ee_param_has_use(first, head, EE_USE_EXIT + 1) &&
              ee_param_has_use(first, head, EE_USE_EXIT + 3) &&
              !ee_param_has_use(first, head, EE_USE_EMBEDDING));
    EE_EXPECT(ee_use_chunk(layout, EE_USE_EMBEDDING) == 0 &&
              ee_use_chunk(layout, EE_USE_EXIT + 3) == 2 &&
              ee_use_chunk(layout, EE_USE_EXIT + 5) == 3);
    const struct ee_params *last = params[1][3];
    int32_t row = last->embedding;
    EE_EXPECT(ee_use_gradient(last, row, EE_USE_EXIT + 4) == row);
    EE_EXPECT(ee_use_gradient(last, row, EE_USE_EXIT + 5) >= last->count);
    for (int32_t r = 0; r < RANKS; r++)
        for (int exact = 0; exact < 2; exact++)
            ee_params_destroy(params[exact][r]);
    ee_layout_destroy(layout);
}

/* -- Put-off products -- */

static void fill_floats(float *values, int64_t count, int salt) {
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)((i * 31 + salt * 17) % 23 - 11) / 7.0f;
}

/* The notes have the bits of the products at once, whatever becomes of operands outside. */
static void test_queue(void) {
    enum { N = 7, IN = 6, OUT = 5, FLOATS = 512 };
    struct ee_ctx *ctx;
    EE_EXPECT_OK(ee_ctx_create(&ctx, ee_isa_best(), 1));
    void *memory;
    EE_EXPECT_OK(ee_alloc(&memory, FLOATS * sizeof(float), "a queue"));
    struct ee_weight_note notes[3];
    struct ee_weight_queue queue = {
        .memory = memory, .floats = FLOATS, .notes = notes, .capacity = 3};
    float x[N * IN], dy[N * OUT], dw[2][OUT * IN], db[2][OUT], *inside;
    fill_floats(x, N * IN, 1);
    fill_floats(dy, N * OUT, 2);
    fill_floats(dw[0], OUT * IN, 3);
    fill_floats(db[0], OUT, 4);
    memcpy(dw[1], dw[0], sizeof dw[0]);
    memcpy(db[1], db[0], sizeof db[0]);
    struct ee_tensor tx = ee_matrix(x, N, IN), tdy = ee_matrix(dy, N, OUT), tdw[2], tdb[2];
    for (int i = 0; i < 2; i++) {
        tdw[i] = ee_matrix(dw[i], OUT, IN);
        tdb[i] = ee_vector(db[i], OUT);
    }
    EE_EXPECT_OK(ee_queue_product(ctx, NULL, &tdw[0], &tdb[0], &tdy, &tx));
    EE_EXPECT_OK(ee_queue_buffer(ctx, &queue, &inside, N * OUT));
    EE_EXPECT(inside == queue.memory);
    memcpy(inside, dy, sizeof dy);
    struct ee_tensor there = ee_matrix(inside, N, OUT);
    EE_EXPECT_OK(ee_queue_product(ctx, &queue, &tdw[1], &tdb[1], &there, &tx));
    EE_EXPECT_OK(ee_queue_product(ctx, &queue, &tdw[1], NULL, &there, &tx));
    EE_EXPECT_OK(ee_queue_exit(&queue, 4, x, N, IN));
    fill_floats(x, N * IN, 9);
    EE_EXPECT(queue.count == 3 && queue.used <= queue.floats);
    EE_EXPECT(notes[0].exit == -1 && notes[0].has_bias && !notes[1].has_bias);
    EE_EXPECT(notes[0].dy.data == inside && notes[0].x.data != x);
    EE_EXPECT(notes[2].exit == 4 && notes[2].x.shape[0] == N && notes[2].x.shape[1] == IN);
    EE_EXPECT(notes[1].x.data != notes[0].x.data && notes[2].x.data != notes[1].x.data);
    EE_EXPECT(((const float *)notes[2].x.data)[1] == ((const float *)notes[0].x.data)[1]);
    EE_EXPECT_OK(
        ee_linear_backward_weight(ctx, &notes[0].dw, &notes[0].dbias, &notes[0].dy, &notes[0].x));
    EE_EXPECT(memcmp(dw[0], dw[1], sizeof dw[0]) == 0 && memcmp(db[0], db[1], sizeof db[0]) == 0);
    ee_queue_clear(&queue);
    EE_EXPECT(queue.count == 0 && queue.used == 0);
    ee_free(memory);
    ee_ctx_destroy(ctx);
}

/* -- Lists -- */

static void test_lists(void) {
    struct ee_list *list;
    for (int32_t rank = 0; rank < 3; rank++) {
        EE_EXPECT_OK(ee_list_of_forwards(&list, rank, 3, 2, 5));
        EE_EXPECT(list->count == 10);
        for (int64_t i = 0; i < list->count; i++) {
            const struct ee_step_action *a = &list->actions[i];
            bool first = rank == 0 && a->chunk == 0, last = rank == 2 && a->chunk == 1;
            /* Three of chunk 0, three of chunk 1, then the two that are left of each. */
            static const int32_t microbatch[] = {0, 1, 2, 0, 1, 2, 3, 4, 3, 4};
            static const uint16_t chunk[] = {0, 0, 0, 1, 1, 1, 0, 0, 1, 1};
            EE_EXPECT(a->microbatch == microbatch[i] && a->chunk == chunk[i]);
            EE_EXPECT(a->kind == EE_STEP_FORWARD);
            EE_EXPECT(a->flags == ((first ? 0 : EE_STEP_RECEIVES) | (last ? 0 : EE_STEP_SENDS)));
            EE_EXPECT(list->slots[i] == 0 && list->queues[i] == -1);
        }
        ee_list_destroy(list);
    }
    /* Part 2 of two microbatches behind three: the second runs backward on rank 3 alone. */
    static const int32_t depth[] = {2, 1};
    struct ee_schedule_spec spec = {.kind = EE_SCHEDULE_1F1B,
                                    .ranks = 4,
                                    .chunks = 1,
                                    .microbatches = 3,
                                    .fill2 = 2,
                                    .fill2_depth = depth};
    for (int32_t rank = 0; rank < 4; rank++) {
        EE_EXPECT_OK(ee_list_create(&list, &spec, rank));
        int passing = 0;
        for (int64_t i = 0; i < list->count; i++) {
            const struct ee_step_action *a = &list->actions[i];
            bool keeps = a->flags & EE_STEP_KEEPS;
            passing += a->kind == EE_STEP_FORWARD && !keeps;
            if (a->kind == EE_STEP_FORWARD && !keeps)
                EE_EXPECT(list->slots[i] == list->slot_counts[0]);
            else
                EE_EXPECT(list->slots[i] >= 0 && list->slots[i] < list->slot_counts[0]);
        }
        EE_EXPECT(passing == (rank == 3 ? 0 : rank == 2 ? 1 : 2));
        EE_EXPECT(list->queue_counts[0] == 0);
        ee_list_destroy(list);
    }
}

static enum ee_status walk_with(const struct ee_schedule_spec *spec, struct ee_given_list *given,
                                int32_t buffers) {
    struct ee_schedule_iterator iterators[16];
    struct ee_rank_result result[16];
    struct ee_lists lists =
        given ? ee_lists_of_given(spec, given) : ee_lists_of_spec(spec, iterators);
    lists.buffers = buffers;
    return ee_walk(&lists, NULL, result, NULL, NULL);
}

/* Two buffers are enough for what the names give. */
static void test_buffers_of_names(void) {
    int32_t depth[16], buffers;
    uint8_t exits[16];
    for (int i = 0; i < 16; i++) {
        exits[i] = i % 3 != 1;
        depth[i] = (int32_t)ee_max(1, ee_schedule_fill_depth(16, 2, i));
    }
    for (int32_t p = 1; p <= 16; p++) {
        for (int32_t m = 1; m <= 40; m += m < 10 ? 1 : 7) {
            for (int kind = 0; kind < EE_SCHEDULE_KINDS; kind++) {
                struct ee_schedule_spec spec = {.kind = (enum ee_schedule_kind)kind,
                                                .ranks = p,
                                                .chunks = kind == EE_SCHEDULE_INTERLEAVED ? 3 : 1,
                                                .microbatches = m};
                EE_EXPECT_OK(walk_with(&spec, NULL, 2));
                EE_EXPECT_OK(ee_walk_buffers(&spec, NULL, &buffers));
                EE_EXPECT(buffers == 2);
                if (kind != EE_SCHEDULE_1F1B)
                    continue;
                for (int i = 0; i < p; i++)
                    depth[i] = (int32_t)ee_max(1, ee_schedule_fill_depth(p, 2, i));
                spec.fill1 = spec.fill2 = p - 1;
                spec.fill2_depth = depth;
                spec.exit_ranks = exits;
                EE_EXPECT_OK(walk_with(&spec, NULL, 2));
            }
        }
    }
}

#define ACTION(kind, flags, chunk, m) {EE_STEP_##kind, flags, chunk, m}
#define F(flags, chunk, m) ACTION(FORWARD, (flags) | EE_STEP_KEEPS, chunk, m)
#define B(flags, chunk, m) ACTION(BACKWARD, flags, chunk, m)
#define IN EE_STEP_RECEIVES
#define OUT EE_STEP_SENDS
#define BOTH (EE_STEP_RECEIVES | EE_STEP_SENDS)

/* Rank 1 sends three gradients before the input that rank 0 wants ahead of the first of them. */
static const struct ee_step_action long_lists[2][16] = {
    {F(OUT, 0, 0), F(OUT, 0, 1), F(OUT, 0, 2), F(OUT, 0, 3), F(BOTH, 1, 0), F(BOTH, 1, 1),
     F(BOTH, 1, 2), F(BOTH, 1, 3), B(BOTH, 1, 0), B(BOTH, 1, 1), B(BOTH, 1, 2), B(BOTH, 1, 3),
     B(IN, 0, 0), B(IN, 0, 1), B(IN, 0, 2), B(IN, 0, 3)},
    {F(BOTH, 0, 0), F(IN, 1, 0), F(BOTH, 0, 1), F(IN, 1, 1), F(BOTH, 0, 2), F(IN, 1, 2),
     B(OUT, 1, 0), B(OUT, 1, 1), B(OUT, 1, 2), F(BOTH, 0, 3), F(IN, 1, 3), B(OUT, 1, 3),
     B(BOTH, 0, 0), B(BOTH, 0, 1), B(BOTH, 0, 2), B(BOTH, 0, 3)}};

static const struct ee_schedule_spec long_spec = {
    .kind = EE_SCHEDULE_INTERLEAVED, .ranks = 2, .chunks = 2, .microbatches = 4};

static void test_buffers_of_a_list(void) {
    struct ee_given_list given[] = {{long_lists[0], 16, 0}, {long_lists[1], 16, 0}};
    int32_t buffers;
    EE_EXPECT_OK(walk_with(&long_spec, given, 0));
    EE_EXPECT_STATUS(walk_with(&long_spec, given, 2), EE_ERR_INVALID, "wait for each other");
    EE_EXPECT_OK(walk_with(&long_spec, given, 3));
    EE_EXPECT_OK(ee_walk_buffers(&long_spec, given, &buffers));
    EE_EXPECT(buffers >= 3 && buffers <= 4);
    /* A list that no number of buffers helps. */
    given[1].count = 15;
    EE_EXPECT_STATUS(ee_walk_buffers(&long_spec, given, &buffers), EE_ERR_INVALID, "rank 0");
}

/* -- Ranks that are threads -- */

struct data {
    int32_t token[MOST * ROWS], target[MOST * ROWS], position[MOST * ROWS];
    uint64_t row_id[MOST * ROWS];
    int32_t segment[3 * MOST], counts[MOST];
};

static struct ee_step_input fill(struct data *d, int salt) {
    for (int i = 0; i < MOST * ROWS; i++) {
        d->token[i] = (i * 7 + salt) % VOCAB;
        d->target[i] = i % 5 == 4 ? -1 : (i * 11 + salt) % VOCAB;
        d->position[i] = i % ROWS;
        d->row_id[i] = (uint64_t)i;
    }
    for (int m = 0; m < MOST; m++) {
        memcpy(&d->segment[3 * m], (int32_t[]){0, 1 + m, ROWS}, 3 * sizeof(int32_t));
        d->counts[m] = 2;
    }
    return (struct ee_step_input){d->token,  d->target,  d->position,
                                  d->row_id, d->segment, d->counts};
}

static struct ee_step_settings settings(void) {
    struct ee_step_settings s = {.adamw = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 1},
                                 .clip = 1,
                                 .max_loss = INFINITY,
                                 .max_grad_norm = INFINITY,
                                 .update = true};
    for (int e = 0; e < EE_MAX_EXITS; e++)
        s.exit_weight[e] = 0.5f;
    return s;
}

/* A job, and what its ranks found. */
struct job {
    struct ee_schedule_spec spec;
    struct ee_given_list *lists;
    enum ee_recompute recompute;
    bool defer, earlier;
    struct ee_comm *comms[RANKS];
    struct ee_model *models[RANKS];
    double losses[RANKS][STEPS][6], norms[RANKS][STEPS], sums[RANKS][6];
};

struct rank {
    struct job *job;
    int32_t rank;
    pthread_t thread;
};

static struct ee_trainer_config trainer_config(const struct job *job, int32_t rank) {
    struct ee_trainer_config t = {.rows = ROWS,
                                  .schedule = job->spec,
                                  .lists = job->lists,
                                  .comm = job->comms[rank],
                                  .recompute = job->recompute,
                                  .defer_exits = job->defer};
    for (int e = 0; e < EE_MAX_EXITS; e++)
        t.temperature[e] = 1.5f;
    return t;
}

static enum ee_status create_model(struct ee_model **out, const struct job *job, int32_t rank) {
    struct ee_config config = make_config();
    struct ee_model_options options = {
        .isa = ee_isa_best(),
        .threads = 1,
        .part = {job->spec.ranks, job->spec.chunks, rank, NULL, job->earlier, true}};
    EE_TRY(ee_model_create(out, &config, &options));
    return ee_params_init((*out)->ctx, (*out)->params, (*out)->weights, 0.3f, 1);
}

static enum ee_status evaluate(struct ee_trainer *trainer, const struct ee_step_input *input,
                               double *sums) {
    float confidence[6 * MOST * ROWS];
    int32_t token[6 * MOST * ROWS];
    struct ee_evaluation evaluation = {.confidence = confidence, .token = token};
    EE_TRY(ee_trainer_evaluate(trainer, input, 3, &evaluation));
    for (int e = 0; e < 6; e++) {
        sums[e] = evaluation.sums[e].loss;
        for (int i = 0; i < 3 * ROWS; i++)
            sums[e] += token[e * 3 * ROWS + i] * 0.25 + confidence[e * 3 * ROWS + i];
    }
    return EE_OK;
}

static enum ee_status train(struct job *job, int32_t rank) {
    struct ee_trainer_config t = trainer_config(job, rank);
    struct ee_given_list lists[RANKS];
    if (job->lists) { /* a walk changes them */
        memcpy(lists, job->lists, (size_t)job->spec.ranks * sizeof *lists);
        t.lists = lists;
    }
    struct ee_trainer *trainer = NULL;
    struct data d;
    struct ee_step_settings s = settings();
    struct ee_step_result result;
    enum ee_status status;
    EE_GOTO(status, create_model(&job->models[rank], job, rank), done);
    EE_GOTO(status, ee_trainer_create(&trainer, job->models[rank], &t), done);
    for (int i = 0; i < STEPS; i++) {
        struct ee_step_input input = fill(&d, i);
        EE_GOTO(status, ee_trainer_step(trainer, &input, &s, &result), done);
        memcpy(job->losses[rank][i], result.loss, sizeof job->losses[rank][i]);
        job->norms[rank][i] = result.grad_norm;
    }
    struct ee_step_input input = fill(&d, 9);
    status = evaluate(trainer, &input, job->sums[rank]);
done:
    ee_trainer_destroy(trainer);
    return status;
}

static void *run_rank(void *arg) {
    struct rank *rank = arg;
    enum ee_status status = train(rank->job, rank->rank);
    if (status != EE_OK) {
        fprintf(stderr, "rank %d: %s\n", (int)rank->rank, ee_last_error());
        ee_comm_abort(rank->job->comms[rank->rank], "a rank failed");
    }
    return (void *)(intptr_t)status;
}

static void run_job(struct job *job) {
    struct rank ranks[RANKS];
    EE_EXPECT_OK(ee_comm_local(job->comms, job->spec.ranks, PATIENCE));
    for (int32_t r = 0; r < job->spec.ranks; r++) {
        ranks[r] = (struct rank){.job = job, .rank = r};
        EE_EXPECT(pthread_create(&ranks[r].thread, NULL, run_rank, &ranks[r]) == 0);
    }
    for (int32_t r = 0; r < job->spec.ranks; r++) {
        void *status;
        pthread_join(ranks[r].thread, &status);
        EE_EXPECT((intptr_t)status == EE_OK);
    }
    for (int32_t r = 0; r < job->spec.ranks; r++)
        ee_comm_destroy(job->comms[r]);
}

static void end_job(struct job *job) {
    for (int32_t r = 0; r < job->spec.ranks; r++)
        ee_model_destroy(job->models[r]);
}

/* Losses, norms, evaluation and weights to the bit. */
static void compare(const struct job *job, const struct job *one) {
    const struct ee_model *whole = one->models[0];
    for (int32_t r = 0; r < job->spec.ranks; r++) {
        EE_EXPECT(memcmp(job->losses[r], one->losses[0], sizeof job->losses[r]) == 0);
        EE_EXPECT(memcmp(job->norms[r], one->norms[0], sizeof job->norms[r]) == 0);
        EE_EXPECT(memcmp(job->sums[r], one->sums[0], sizeof job->sums[r]) == 0);
        const struct ee_model *part = job->models[r];
        int held = 0;
        for (int32_t i = 0; part && i < part->params->count; i++) {
            const struct ee_param *row = &part->params->rows[i];
            if (!row->held)
                continue;
            held++;
            EE_EXPECT(memcmp(part->weights + row->offset,
                             whole->weights + whole->params->rows[i].offset,
                             (size_t)(row->shape[0] * row->shape[1]) * sizeof(float)) == 0);
        }
        EE_EXPECT(held > 0);
    }
}

static void test_pipelines(void) {
    static const struct {
        enum ee_schedule_kind kind;
        int32_t ranks, chunks;
        enum ee_recompute recompute;
        bool defer, earlier;
    } cases[] = {
        {EE_SCHEDULE_GPIPE, 2, 1, EE_RECOMPUTE_FULL, false, false},
        {EE_SCHEDULE_1F1B, 4, 1, EE_RECOMPUTE_NONE, false, true},
        {EE_SCHEDULE_1F1B, 3, 1, EE_RECOMPUTE_ATTENTION, false, false},
        {EE_SCHEDULE_INTERLEAVED, 2, 2, EE_RECOMPUTE_NONE, false, false},
        {EE_SCHEDULE_INTERLEAVED, 1, 4, EE_RECOMPUTE_NONE, false, true},
        {EE_SCHEDULE_ZERO_BUBBLE, 4, 1, EE_RECOMPUTE_ATTENTION, true, false},
        {EE_SCHEDULE_ZERO_BUBBLE, 2, 1, EE_RECOMPUTE_FULL, false, true},
        {EE_SCHEDULE_ZERO_BUBBLE, 1, 1, EE_RECOMPUTE_NONE, true, false},
    };
    struct job one = {.spec = {.kind = EE_SCHEDULE_1F1B, .ranks = 1, .chunks = 1}};
    one.spec.microbatches = 5;
    run_job(&one);
    EE_EXPECT(one.norms[0][0] > 0 && isfinite(one.norms[0][STEPS - 1]));
    EE_EXPECT(one.losses[0][0][0] != one.losses[0][1][0]);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct job job = {.spec = {.kind = cases[i].kind,
                                   .ranks = cases[i].ranks,
                                   .chunks = cases[i].chunks,
                                   .microbatches = 5},
                          .recompute = cases[i].recompute,
                          .defer = cases[i].defer,
                          .earlier = cases[i].earlier};
        run_job(&job);
        compare(&job, &one);
        end_job(&job);
    }
    end_job(&one);
}

/* Bubble filling, and a list that needs more buffers than two. */
static void test_other_lists(void) {
    static const int32_t depth[] = {2, 1};
    struct job filled = {.spec = {.kind = EE_SCHEDULE_1F1B,
                                  .ranks = 4,
                                  .chunks = 1,
                                  .microbatches = 4,
                                  .fill1 = 2,
                                  .fill2 = 2,
                                  .fill2_depth = depth}};
    run_job(&filled);
    for (int32_t r = 1; r < 4; r++)
        EE_EXPECT(memcmp(filled.losses[r], filled.losses[0], sizeof filled.losses[r]) == 0);
    EE_EXPECT(isfinite(filled.norms[0][STEPS - 1]) && filled.norms[0][STEPS - 1] > 0);
    end_job(&filled);

    struct ee_given_list given[] = {{long_lists[0], 16, 0}, {long_lists[1], 16, 0}};
    struct job one = {.spec = {.kind = EE_SCHEDULE_1F1B, .ranks = 1, .chunks = 1}};
    one.spec.microbatches = 4;
    struct job job = {.spec = long_spec, .lists = given};
    run_job(&one);
    run_job(&job);
    compare(&job, &one);
    end_job(&job);
    end_job(&one);
}

/* -- The record -- */

static void test_trace(void) {
    struct ee_trace *trace;
    EE_EXPECT_OK(ee_trace_create(&trace, 2));
    struct ee_trace_event event = {.start = 1, .end = 2, .kind = EE_EVENT_ACTION};
    struct ee_message message = {EE_RECEIVE, 3, 6, NULL, 40, {"forward of microbatch", 5}};
    ee_trace_add(NULL, &event);
    ee_trace_add(trace, &event);
    ee_trace_message(trace, &message, 3, 4);
    ee_trace_message(trace, &message, 5, 6);
    EE_EXPECT(trace->count == 2 && trace->lost == 1);
    const struct ee_trace_event *e = &trace->events[1];
    EE_EXPECT(e->start == 3 && e->end == 4 && e->bytes == 40 && e->kind == EE_EVENT_RECEIVE);
    EE_EXPECT(e->microbatch == 5 && e->peer == 3 && e->tag == 6);
    ee_trace_destroy(trace);
    ee_trace_destroy(NULL);
}

/* -- Failed allocations -- */

/* A whole step of one rank with chunks that send to each other, and a part of two ranks. */
static enum ee_status make_all(void) {
    struct job one = {.spec = {.kind = EE_SCHEDULE_INTERLEAVED, .ranks = 1, .chunks = 2}};
    struct job two = {.spec = {.kind = EE_SCHEDULE_ZERO_BUBBLE, .ranks = 2, .chunks = 1}};
    one.spec.microbatches = two.spec.microbatches = 3;
    two.defer = true;
    struct ee_trainer *trainer = NULL;
    enum ee_status status;
    EE_GOTO(status, train(&one, 0), done);
    EE_GOTO(status, ee_comm_local(two.comms, 2, PATIENCE), done);
    EE_GOTO(status, create_model(&two.models[1], &two, 1), done);
    struct ee_trainer_config t = trainer_config(&two, 1);
    EE_GOTO(status, ee_trainer_create(&trainer, two.models[1], &t), done);
    struct ee_trace *trace;
    EE_GOTO(status, ee_trace_create(&trace, 4), done);
    ee_trace_destroy(trace);
done:
    ee_trainer_destroy(trainer);
    ee_model_destroy(one.models[0]);
    ee_model_destroy(two.models[1]);
    for (int r = 0; r < 2; r++)
        ee_comm_destroy(two.comms[r]);
    return status;
}

static void test_allocations(void) {
    ee_test_allocations("parts of a pipeline", make_all);
}

EE_TEST_MAIN(test_layout, test_table, test_queue, test_lists, test_buffers_of_names,
             test_buffers_of_a_list, test_pipelines, test_other_lists, test_trace, test_allocations)
