/* csrc/model and csrc/train: models with every kind of head trained for a few steps, schedules that
 * must be refused, and every allocation failing in turn. */
#include "ee_test.h"
#include "train/step.h"
#include "train/walk.h"

#include <math.h>

enum { ROWS = 11, MICROBATCHES = 2, VOCAB = 19 };

static const float rope_freq[] = {1.0f, 0.1f};

/* Two layers, five exits: every branch, norm and output. */
static struct ee_config mixed_config(void) {
    struct ee_config c = {.vocab_size = VOCAB, .hidden_size = 12, .intermediate_size = 10};
    c.num_layers = 2;
    c.num_heads = 3;
    c.num_kv_heads = 1;
    c.head_dim = 4;
    c.max_positions = 32;
    c.norm = (struct ee_norm_params){EE_RMSNORM, 1e-5f, 0};
    c.activation = EE_SILU;
    c.gated = c.bias_q = c.qk_norm = true;
    c.positions = EE_POSITIONS_ROPE;
    c.rope_dims = 4;
    c.rope_scale = c.embedding_scale = 1;
    c.rope_freq = rope_freq;
    c.attention_scale = 0.5f;
    c.attention_softcap = 5;
    c.logit_softcap = 4;
    c.window[1] = 3;
    c.attention_dropout = c.residual_dropout = c.embedding_dropout = 0.1f;
    c.num_exits = 5;
    c.exits[0] = (struct ee_exit_config){1, true, EE_BRANCH_NONE, EE_EXIT_NORM_NONE, -2};
    c.exits[1] = (struct ee_exit_config){1, false, EE_BRANCH_MLP, EE_EXIT_NORM_OWN, -1};
    c.exits[2] = (struct ee_exit_config){1, false, EE_BRANCH_BLOCK, EE_EXIT_NORM_FINAL, 1};
    c.exits[3] = (struct ee_exit_config){2, false, EE_BRANCH_MLP, EE_EXIT_NORM_OWN, 2};
    c.exits[4] = (struct ee_exit_config){2, false, EE_BRANCH_NONE, EE_EXIT_NORM_OWN, -3};
    return c;
}

/* GPT-2's parts in a parallel block: LayerNorm with biases, learned positions, one matrix up. */
static struct ee_config parallel_config(void) {
    struct ee_config c = mixed_config();
    c.norm = (struct ee_norm_params){EE_LAYERNORM, 1e-5f, 1};
    c.activation = EE_GELU_TANH;
    c.gated = c.qk_norm = false;
    c.bias_kv = c.bias_o = c.bias_up = c.bias_down = c.norm_bias = true;
    c.parallel_residual = c.shared_norm = c.tie_embeddings = true;
    c.positions = EE_POSITIONS_LEARNED;
    c.num_exits = 1;
    c.exits[0] = (struct ee_exit_config){1, false, EE_BRANCH_BLOCK, EE_EXIT_NORM_OWN, -2};
    return c;
}

/* A step's arrays; the second microbatch has two segments, some targets are masked. */
struct data {
    int32_t token[MICROBATCHES * ROWS], target[MICROBATCHES * ROWS], position[MICROBATCHES * ROWS];
    uint64_t row_id[MICROBATCHES * ROWS];
    int32_t segment[5], counts[MICROBATCHES];
};

static struct ee_step_input fill(struct data *d) {
    for (int i = 0; i < MICROBATCHES * ROWS; i++) {
        d->token[i] = (i * 7 + 3) % VOCAB;
        d->target[i] = i % 5 == 4 ? -1 : (i * 11 + 1) % VOCAB;
        d->position[i] = i % ROWS;
        d->row_id[i] = (uint64_t)i;
    }
    memcpy(d->segment, (int32_t[]){0, ROWS, 0, 4, ROWS}, sizeof d->segment);
    memcpy(d->counts, (int32_t[]){1, 2}, sizeof d->counts);
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

static struct ee_trainer_config trainer_config(enum ee_recompute recompute) {
    struct ee_trainer_config t = {.rows = ROWS,
                                  .schedule = {.kind = EE_SCHEDULE_1F1B,
                                               .ranks = 1,
                                               .chunks = 1,
                                               .microbatches = MICROBATCHES},
                                  .recompute = recompute,
                                  .dynamic_weights = true};
    for (int e = 0; e < EE_MAX_EXITS; e++)
        t.temperature[e] = 1.5f;
    return t;
}

static void train(struct ee_config config, enum ee_isa isa, int threads,
                  enum ee_recompute recompute) {
    struct ee_model *model;
    struct ee_trainer *trainer;
    struct ee_trainer_config t = trainer_config(recompute);
    if (!EE_EXPECT_OK(ee_model_create(&model, &config,
                                      &(struct ee_model_options){.isa = isa, .threads = threads})))
        return;
    EE_EXPECT_OK(ee_params_init(model->ctx, model->params, model->weights, 0.3f, 1));
    EE_EXPECT_OK(ee_trainer_create(&trainer, model, &t));
    struct data d;
    struct ee_step_input input = fill(&d);
    struct ee_step_settings s = settings();
    struct ee_step_result first, last;
    EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &first));
    EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &last));
    uint64_t calls = ee_alloc_stats().calls;
    for (int i = 0; i < 8; i++)
        EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &last));
    EE_EXPECT(ee_alloc_stats().calls == calls);
    EE_EXPECT(trainer->steps == 10 && last.updated && last.finite);
    int final = model->params->exits - 1;
    EE_EXPECT(last.loss[final] < first.loss[final]);

    /* A bad token in the second microbatch: an error, and no trace of the first. */
    d.token[ROWS + 3] = VOCAB;
    EE_EXPECT_STATUS(ee_trainer_step(trainer, &input, &s, &last), EE_ERR_INVALID, "19");
    EE_EXPECT_OK(ee_optim_sum_squares(model, trainer->gradient, trainer->sums));
    for (int32_t i = 0; i < model->params->count; i++)
        EE_EXPECT(trainer->sums[i] == 0);
    EE_EXPECT(trainer->steps == 10);
    ee_trainer_destroy(trainer);
    ee_model_destroy(model);
}

static void test_training(void) {
    for (int isa = 0; isa <= (int)ee_isa_best(); isa++) {
        for (int r = EE_RECOMPUTE_NONE; r <= EE_RECOMPUTE_FULL; r++) {
            train(mixed_config(), (enum ee_isa)isa, 1 + r, (enum ee_recompute)r);
            train(parallel_config(), (enum ee_isa)isa, 3 - r, (enum ee_recompute)r);
        }
    }
}

static void test_limits(void) {
    struct ee_config config = mixed_config();
    struct ee_model *model;
    struct ee_trainer *trainer;
    struct ee_trainer_config t = trainer_config(EE_RECOMPUTE_NONE);
    EE_EXPECT_OK(ee_model_create(&model, &config,
                                 &(struct ee_model_options){.isa = EE_ISA_PLAIN, .threads = 1}));
    EE_EXPECT_OK(ee_params_init(model->ctx, model->params, model->weights, 0.3f, 1));
    EE_EXPECT_OK(ee_trainer_create(&trainer, model, &t));
    struct data d;
    struct ee_step_input input = fill(&d);
    struct ee_step_settings s = settings();
    struct ee_step_result result;
    s.max_loss = 0.1;
    float before = model->weights[0];
    EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &result));
    EE_EXPECT(result.finite && !result.updated && model->weights[0] == before);
    s = settings();
    s.max_grad_norm = 1e-6;
    EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &result));
    EE_EXPECT(result.finite && !result.updated && model->weights[0] == before);
    s = settings();
    model->weights[0] = NAN; /* of token 0, which occurs */
    EE_EXPECT_OK(ee_trainer_step(trainer, &input, &s, &result));
    EE_EXPECT(!result.finite && !result.updated && trainer->steps == 0);
    for (int i = 0; i < MICROBATCHES * ROWS; i++)
        d.target[i] = -1;
    EE_EXPECT_STATUS(ee_trainer_step(trainer, &input, &s, &result), EE_ERR_INVALID, "masked");
    ee_trainer_destroy(trainer);
    t.temperature[2] = 0;
    EE_EXPECT_STATUS(ee_trainer_create(&trainer, model, &t), EE_ERR_INVALID, "exit 2");
    ee_model_destroy(model);
}

/* Time of a step at uniform costs, and the most activations that a rank keeps. */
static double walk_time(struct ee_schedule_spec spec, double f, double b, double w,
                        int32_t *slots) {
    enum { MOST = 64 };
    struct ee_schedule_iterator iterators[MOST];
    struct ee_rank_result result[MOST];
    double costs[7][MOST] = {{0}};
    for (int i = 0; i < MOST; i++) {
        costs[0][i] = f;
        costs[1][i] = b + w;
        costs[2][i] = b;
        costs[3][i] = w;
    }
    struct ee_walk_costs all = {.forward = costs[0],
                                .backward = costs[1],
                                .backward_input = costs[2],
                                .backward_weight = costs[3],
                                .kept_bytes = costs[4],
                                .transient_bytes = costs[5],
                                .static_bytes = costs[6]};
    EE_EXPECT_OK(ee_schedule_check(&spec));
    struct ee_lists lists = ee_lists_of_spec(&spec, iterators);
    EE_EXPECT_OK(ee_walk(&lists, &all, result, NULL, NULL));
    double end = 0;
    *slots = 0;
    for (int32_t r = 0; r < spec.ranks; r++) {
        end = result[r].end > end ? result[r].end : end;
        *slots = (int32_t)ee_max(*slots, result[r].slots);
    }
    return end;
}

/* The closed forms, which hold exactly at whole numbers. */
static void test_schedules(void) {
    int32_t slots;
    for (int32_t p = 1; p <= 8; p++) {
        for (int32_t m = 1; m <= 16; m++) {
            struct ee_schedule_spec spec = {.ranks = p, .chunks = 1, .microbatches = m};
            EE_EXPECT(walk_time(spec, 1, 1, 1, &slots) == 3 * (p - 1) + 3 * m);
            EE_EXPECT(slots == m);
            spec.kind = EE_SCHEDULE_1F1B;
            EE_EXPECT(walk_time(spec, 1, 1, 1, &slots) == 3 * (p - 1) + 3 * m);
            EE_EXPECT(slots == ee_min(p, m));
            spec.kind = EE_SCHEDULE_ZERO_BUBBLE;
            double t = walk_time(spec, 4, 6, 2, &slots);
            EE_EXPECT(m < p || t == 12 * m + (p - 1) * (4 + 6 - 2));
            EE_EXPECT(slots <= p);
            spec.kind = EE_SCHEDULE_INTERLEAVED;
            for (spec.chunks = 1; spec.chunks <= 4; spec.chunks++) {
                t = walk_time(spec, 1, 1, 1, &slots);
                EE_EXPECT(m % p || t == 3 * (m * spec.chunks + p - 1));
            }
        }
    }
    struct ee_schedule_spec none = {.ranks = 1, .chunks = 1};
    EE_EXPECT_STATUS(ee_schedule_check(&none), EE_ERR_INVALID, "got 0");
    enum ee_schedule_kind kind;
    EE_EXPECT_STATUS(ee_schedule_from_name(&kind, "2f2b"), EE_ERR_INVALID, "2f2b");
}

struct two_lists {
    struct ee_step_action actions[2][6];
    int32_t count[2], next[2];
};

static bool next_of_two(void *arg, int32_t rank, struct ee_step_action *action) {
    struct two_lists *lists = arg;
    if (lists->next[rank] == lists->count[rank])
        return false;
    *action = lists->actions[rank][lists->next[rank]++];
    return true;
}

/* Lists of two ranks and two microbatches that must be refused: each breaks one rule. */
static void test_bad_schedules(void) {
#define F0(m) {EE_STEP_FORWARD, EE_STEP_SENDS | EE_STEP_KEEPS, 0, m}
#define B0(m) {EE_STEP_BACKWARD, EE_STEP_RECEIVES, 0, m}
#define F1(m) {EE_STEP_FORWARD, EE_STEP_RECEIVES | EE_STEP_KEEPS, 0, m}
#define B1(m)                                                                                      \
    {                                                                                              \
        EE_STEP_BACKWARD, EE_STEP_SENDS, 0, m                                                      \
    }
    static const struct {
        const char *text; /* NULL: a good one */
        struct two_lists lists;
    } cases[] = {
        {NULL, {{{F0(0), F0(1), B0(0), B0(1)}, {F1(0), B1(0), F1(1), B1(1)}}, {4, 4}, {0, 0}}},
        {"microbatch 1 is due",
         {{{F0(0), F0(0), B0(0), B0(1)}, {F1(0), B1(0), F1(1), B1(1)}}, {4, 4}, {0, 0}}},
        {"microbatch 0 is due",
         {{{F0(0), F0(1), B0(0), B0(1)}, {F1(0), F1(1), B1(1), B1(0)}}, {4, 4}, {0, 0}}},
        {"its forward has not run",
         {{{F0(0), F0(1), B0(0), B0(1)}, {B1(0), F1(0), F1(1), B1(1)}}, {4, 4}, {0, 0}}},
        {"wait for each other",
         {{{F0(0), B0(0), F0(1), B0(1)}, {F1(0), F1(1), B1(0), B1(1)}}, {4, 4}, {0, 0}}},
        {"ends after 1 forwards", {{{F0(0), B0(0)}, {F1(0), B1(0)}}, {2, 2}, {0, 0}}},
        {"there are 2 microbatches", {{{F0(2)}, {F1(0)}}, {1, 1}, {0, 0}}},
        {"as its place asks",
         {{{F0(0), F0(1), B0(0), B0(1)}, {F1(0), F1(1), {EE_STEP_BACKWARD, 0, 0, 0}, B1(1)}},
          {4, 4},
          {0, 0}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct two_lists two = cases[i].lists;
        struct ee_lists lists = {
            .ranks = 2, .chunks = 1, .microbatches = 2, .next = next_of_two, .arg = &two};
        struct ee_rank_result result[2];
        if (cases[i].text)
            EE_EXPECT_STATUS(ee_walk(&lists, NULL, result, NULL, NULL), EE_ERR_INVALID,
                             cases[i].text);
        else
            EE_EXPECT_OK(ee_walk(&lists, NULL, result, NULL, NULL));
    }
#undef F0
#undef B0
#undef F1
#undef B1
}

/* A microbatch keeps its slot from its forward to the backward of its input, and a queue from there
 * to the backward of its weights; nobody else has them then. */
static void test_slots(void) {
    struct ee_schedule_spec spec = {
        .kind = EE_SCHEDULE_ZERO_BUBBLE, .ranks = 4, .chunks = 1, .microbatches = 6};
    for (int32_t rank = 0; rank < 4; rank++) {
        struct ee_list *list;
        EE_EXPECT_OK(ee_list_create(&list, &spec, rank));
        int32_t slots[16], queues[16];
        memset(slots, -1, sizeof slots);
        memset(queues, -1, sizeof queues);
        for (int64_t i = 0; i < list->count; i++) {
            const struct ee_step_action *a = &list->actions[i];
            if (a->kind != EE_STEP_BACKWARD_WEIGHT) {
                int32_t *held = &slots[list->slots[i]];
                EE_EXPECT(list->slots[i] >= 0 && list->slots[i] < list->slot_counts[0]);
                EE_EXPECT(*held == (a->kind == EE_STEP_FORWARD ? -1 : a->microbatch));
                *held = a->kind == EE_STEP_FORWARD ? a->microbatch : -1;
            }
            if (a->kind != EE_STEP_FORWARD) {
                int32_t *held = &queues[list->queues[i]];
                EE_EXPECT(list->queues[i] >= 0 && list->queues[i] < list->queue_counts[0]);
                EE_EXPECT(*held == (a->kind == EE_STEP_BACKWARD_INPUT ? -1 : a->microbatch));
                *held = a->kind == EE_STEP_BACKWARD_INPUT ? a->microbatch : -1;
            }
        }
        EE_EXPECT(list->slot_counts[0] <= 4 - rank);
        EE_EXPECT(list->queue_counts[0] <= rank + 1);
        ee_list_destroy(list);
    }
}

static enum ee_status make_all(void) {
    struct ee_config config = mixed_config();
    struct ee_trainer_config t = trainer_config(EE_RECOMPUTE_ATTENTION);
    struct ee_model *model = NULL;
    struct ee_trainer *trainer = NULL;
    struct data d;
    struct ee_step_input input = fill(&d);
    struct ee_step_settings s = settings();
    struct ee_step_result result;
    enum ee_status status;
    EE_GOTO(status,
            ee_model_create(&model, &config,
                            &(struct ee_model_options){.isa = ee_isa_best(), .threads = 2}),
            done);
    EE_GOTO(status, ee_params_init(model->ctx, model->params, model->weights, 0.3f, 1), done);
    EE_GOTO(status, ee_trainer_create(&trainer, model, &t), done);
    EE_GOTO(status, ee_trainer_step(trainer, &input, &s, &result), done);
done:
    ee_trainer_destroy(trainer);
    ee_model_destroy(model);
    return status;
}

static void test_allocations(void) {
    ee_test_allocations("a model, a trainer and a step", make_all);
}

EE_TEST_MAIN(test_training, test_limits, test_schedules, test_bad_schedules, test_slots,
             test_allocations)
