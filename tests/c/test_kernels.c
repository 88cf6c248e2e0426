/* kernels/cpu under the sanitizers: every operation on odd sizes, in memory that ends where the
 * tensors end, at every instruction-set level; what it allocates, and that it gives scratch memory
 * back, also when there is none. Values are the matter of tests/ops. */
#include "ee_test.h"
#include "ops/ctx.h"

#include <math.h>

enum { N = 7, C = 37, F = 23, H = 6, K = 2, D = 10, V = 131, PAGE = 64, PAGES = 4 };

/* Blocks of the running operation, freed after it. */
static void *blocks[32];
static int block_count;

static void *exact(size_t bytes) {
    /* Sizes in whole cache lines keep their alignment: that is how packed weights come. */
    void *block = bytes % 64 ? malloc(bytes) : aligned_alloc(64, bytes);
    if (!block)
        abort();
    return blocks[block_count++] = block;
}

static void free_blocks(void) {
    while (block_count > 0)
        free(blocks[--block_count]);
}

static float *filled(int64_t n) {
    float *data = exact((size_t)n * sizeof *data);
    for (int64_t i = 0; i < n; i++)
        data[i] = (float)(((uint32_t)i * 2654435761u) >> 8) * 0x1p-24f - 0.5f;
    return data;
}

static struct ee_tensor vec(int64_t n) {
    return ee_vector(filled(n), n);
}

static struct ee_tensor mat(int64_t n, int64_t m) {
    return ee_matrix(filled(n * m), n, m);
}

static struct ee_tensor heads(int64_t h) {
    return ee_heads(filled(N * h * D), N, h, D, h * D);
}

static int32_t *indices(int64_t n, int32_t below) {
    int32_t *index = exact((size_t)n * sizeof *index);
    for (int64_t i = 0; i < n; i++)
        index[i] = (int32_t)(i * 5 % below);
    return index;
}

static enum ee_status finite(const struct ee_tensor *tensor) {
    const float *data = tensor->data;
    for (int64_t i = 0; i < ee_tensor_elements(tensor); i++)
        if (!isfinite(data[i]))
            EE_FAIL(EE_ERR_NONFINITE, "element %d is %g", (int)i, (double)data[i]);
    return EE_OK;
}

static enum ee_status run_linear(struct ee_ctx *ctx) {
    struct ee_tensor y = mat(N, F), x = mat(N, C), bias = vec(F);
    struct ee_weight w = ee_weight_rows(filled(F * C), F, C);
    EE_TRY(ee_linear(ctx, &y, &x, &w, &bias, &y));
    return finite(&y);
}

/* From each dtype, by rows and by columns, in two parts of one panel. */
static enum ee_status pack_every_way(struct ee_ctx *ctx, const struct ee_weight *w,
                                     const struct ee_tensor *rows) {
    static const enum ee_dtype dtypes[] = {EE_F16, EE_BF16, EE_F32};
    for (int i = 0; i < 3; i++) {
        struct ee_tensor source = *rows;
        source.dtype = dtypes[i];
        source.data = exact((size_t)(V * C) * ee_dtype_size(dtypes[i]));
        EE_TRY(ee_convert(ctx, &source, rows));
        struct ee_tensor columns = ee_tensor_rows(&source, 0, V - 1);
        columns.stride[0] = 1;
        columns.stride[1] = V - 1;
        EE_TRY(ee_weight_pack(ctx, w, &columns, 1));
        struct ee_tensor head = ee_tensor_rows(&source, 0, 9),
                         tail = ee_tensor_rows(&source, 9, V - 9);
        EE_TRY(ee_weight_pack(ctx, w, &tail, 9));
        EE_TRY(ee_weight_pack(ctx, w, &head, 0));
    }
    return EE_OK;
}

static enum ee_status run_panels(struct ee_ctx *ctx) {
    struct ee_tensor rows = mat(V, C), x = mat(N, C), y = mat(N, V), residual = mat(N, V);
    static const enum ee_dtype dtypes[] = {EE_F32, EE_BF16};
    for (int i = 0; i < 2; i++) {
        struct ee_weight w = {.dtype = dtypes[i], .layout = EE_LAYOUT_PANELS, .rows = V, .cols = C};
        w.data = exact(ee_weight_bytes(w.dtype, w.layout, V, C));
        EE_TRY(pack_every_way(ctx, &w, &rows));
        EE_TRY(ee_linear(ctx, &y, &x, &w, NULL, &residual));
        EE_TRY(finite(&y));
        struct ee_tensor one_x = ee_tensor_rows(&x, N - 1, 1), one_y = ee_tensor_rows(&y, N - 1, 1);
        EE_TRY(ee_linear(ctx, &one_y, &one_x, &w, NULL, NULL));
        struct ee_tensor e = mat(N, C), wpe = mat(PAGE, C);
        EE_TRY(ee_embed(ctx, &e, &w, &wpe, indices(N, V), indices(N, PAGE), 2.0f));
        EE_TRY(finite(&e));
    }
    return finite(&y);
}

static enum ee_status run_linear_backward(struct ee_ctx *ctx) {
    struct ee_tensor dy = mat(N, F), x = mat(N, C), dx = mat(N, C), dw = mat(F, C), db = vec(F);
    struct ee_weight w = ee_weight_rows(filled(F * C), F, C);
    EE_TRY(ee_linear_backward_input(ctx, &dx, &dy, &w, false));
    EE_TRY(ee_linear_backward_input(ctx, &dx, &dy, &w, true));
    EE_TRY(ee_linear_backward_weight(ctx, &dw, &db, &dy, &x));
    EE_TRY(ee_linear_backward_weight(ctx, &dw, NULL, &dy, &x));
    EE_TRY(finite(&dx));
    return finite(&dw);
}

static enum ee_status run_norm(struct ee_ctx *ctx) {
    for (int kind = EE_LAYERNORM; kind <= EE_RMSNORM; kind++) {
        struct ee_norm_params p = {(enum ee_norm_kind)kind, 1e-5f, 0};
        struct ee_tensor x = mat(N, C), y = mat(N, C), w = vec(C), b = vec(C), dy = mat(N, C);
        struct ee_tensor mean = vec(N), rstd = vec(N), dw = vec(C), db = vec(C), dx = mat(N, C);
        EE_TRY(ee_norm(ctx, &y, &mean, &rstd, &x, &w, &b, &p));
        EE_TRY(ee_norm_backward(ctx, &dx, &dw, &db, &dy, &x, &w, &mean, &rstd, &p, true));
        EE_TRY(ee_norm_backward(ctx, &dy, &dw, NULL, &dy, &x, &w, &mean, &rstd, &p, false));
        EE_TRY(ee_norm(ctx, &x, NULL, NULL, &x, &w, NULL, &p));
        EE_TRY(finite(&x));
        EE_TRY(finite(&dx));
        EE_TRY(finite(&dw));
        free_blocks();
        struct ee_tensor q = heads(H), dq = heads(H), wd = vec(D), dwd = vec(D), m = vec(N * H);
        struct ee_tensor r = vec(N * H), out = heads(H);
        EE_TRY(ee_norm(ctx, &out, &m, &r, &q, &wd, NULL, &p));
        EE_TRY(ee_norm_backward(ctx, &dq, &dwd, NULL, &out, &q, &wd, &m, &r, &p, false));
        EE_TRY(finite(&dq));
        free_blocks();
    }
    return EE_OK;
}

static enum ee_status run_activation(struct ee_ctx *ctx) {
    for (int kind = EE_RELU; kind <= EE_SILU; kind++) {
        for (int gated = 0; gated < 2; gated++) {
            enum ee_activation f = (enum ee_activation)kind;
            struct ee_tensor x = mat(N, gated ? 2 * F : F), y = mat(N, F), dy = mat(N, F);
            struct ee_tensor dx = mat(N, gated ? 2 * F : F);
            EE_TRY(ee_activation(ctx, &y, &x, f, gated));
            EE_TRY(ee_activation_backward(ctx, &dx, NULL, &dy, &x, f, gated));
            EE_TRY(ee_activation_backward(ctx, &x, &dy, &dy, &x, f, gated));
            EE_TRY(finite(&y));
            EE_TRY(finite(&x));
            free_blocks();
        }
    }
    return EE_OK;
}

static enum ee_status run_elementwise(struct ee_ctx *ctx) {
    struct ee_tensor x = mat(N, C), y = mat(N, C), flat = vec(C), other = vec(C);
    uint64_t *row = exact(N * sizeof *row);
    for (int n = 0; n < N; n++)
        row[n] = (uint64_t)n << 40;
    struct ee_dropout dropout = {0.3f, 7, row};
    EE_TRY(ee_softcap(ctx, &x, 2.0f));
    EE_TRY(ee_add(ctx, &y, &x));
    EE_TRY(ee_add(ctx, &flat, &other));
    EE_TRY(ee_dropout(ctx, &y, &x, &y, &dropout));
    EE_TRY(ee_dropout(ctx, &x, &x, NULL, &dropout));
    EE_TRY(finite(&y));
    return finite(&x);
}

static enum ee_status run_positions(struct ee_ctx *ctx) {
    struct ee_tensor x = heads(H);
    struct ee_rope rope = {filled(PAGE * 3), filled(PAGE * 3), PAGE, 6, false};
    int32_t *position = indices(N, PAGE);
    EE_TRY(ee_rotate(ctx, &x, position, &rope, false));
    rope.interleaved = true;
    EE_TRY(ee_rotate(ctx, &x, position, &rope, true));
    EE_TRY(finite(&x));
    struct ee_tensor e = mat(N, C), wpe = mat(PAGE, C), dwte = mat(V, C), dwpe = mat(PAGE, C);
    struct ee_weight wte = ee_weight_rows(filled(V * C), V, C);
    EE_TRY(ee_embed(ctx, &e, &wte, &wpe, indices(N, V), position, 1.0f));
    EE_TRY(ee_embed(ctx, &e, &wte, NULL, indices(N, V), NULL, 1.0f));
    EE_TRY(ee_embed_backward(ctx, &dwte, &dwpe, &e, indices(N, 2), position, 1.0f));
    EE_TRY(ee_embed_backward(ctx, &dwte, NULL, &e, indices(N, V), NULL, 1.0f));
    return finite(&dwte);
}

static enum ee_status run_attention(struct ee_ctx *ctx) {
    /* The segment in the middle is empty. */
    static const int32_t segment[] = {0, 3, 3, 7};
    uint64_t row[N] = {0};
    struct ee_dropout dropout = {0.3f, 7, row};
    for (int variant = 0; variant < 2; variant++) {
        struct ee_attention_params p = {.scale = 0.3f};
        if (variant)
            p = (struct ee_attention_params){0.3f, 5.0f, 2, &dropout};
        struct ee_tensor q = heads(H), k = heads(K), v = heads(K), out = heads(H), lse = mat(N, H);
        struct ee_tensor dq = heads(H), dk = heads(K), dv = heads(K), dout = heads(H);
        EE_TRY(ee_attention(ctx, &out, &lse, &q, &k, &v, segment, 3, &p));
        EE_TRY(finite(&out));
        EE_TRY(ee_attention_backward(ctx, &dq, &dk, &dv, &dout, &out, &lse, &q, &k, &v, segment, 3,
                                     &p));
        EE_TRY(finite(&dq));
        EE_TRY(finite(&dk));
        EE_TRY(finite(&dv));
        free_blocks();
    }
    return EE_OK;
}

static enum ee_status run_cache(struct ee_ctx *ctx) {
    int32_t table[] = {2, 0, 3, 1}, sequence[N], position[N];
    for (int n = 0; n < N; n++) {
        sequence[n] = n % 2;
        position[n] = n * 21;
    }
    struct ee_kv kv = {.table = table,
                       .sequences = 2,
                       .pages_per_sequence = 2,
                       .pages = PAGES,
                       .page = PAGE,
                       .heads = K,
                       .width = D};
    kv.k = filled(PAGES * PAGE * K * D);
    kv.v = filled(PAGES * PAGE * K * D);
    struct ee_tensor k = heads(K), v = heads(K), q = heads(H), out = heads(H);
    struct ee_attention_params p = {.scale = 0.3f};
    EE_TRY(ee_kv_write(ctx, &kv, &k, &v, sequence, position));
    EE_TRY(ee_attention_rows(ctx, &out, &q, &kv, sequence, position, &p));
    EE_TRY(finite(&out));
    p.window = 70;
    p.softcap = 3;
    EE_TRY(ee_attention_rows(ctx, &out, &q, &kv, sequence, position, &p));
    return finite(&out);
}

static enum ee_status run_losses(struct ee_ctx *ctx) {
    struct ee_tensor logits = mat(N, V), loss = vec(N), confidence = vec(N), weight = vec(N);
    struct ee_tensor lse = vec(N);
    int32_t *token = indices(N, V), *target = indices(N, V);
    target[2] = -100;
    struct ee_loss_params p = {30.0f, 0.7f, true, false};
    EE_TRY(ee_confidence(ctx, token, &confidence, &lse, &logits));
    EE_TRY(ee_cross_entropy(ctx, &loss, &confidence, &logits, target, &weight, &p));
    p.gradient = true;
    EE_TRY(ee_cross_entropy(ctx, &loss, &confidence, &logits, target, &weight, &p));
    EE_TRY(finite(&loss));
    EE_TRY(finite(&lse));
    return finite(&logits);
}

static enum ee_status run_parameters(struct ee_ctx *ctx) {
    struct ee_tensor p = vec(1001), m = vec(1001), v = vec(1001), g = vec(1001), x = vec(1001);
    memset(v.data, 0, 1001 * sizeof(float));
    struct ee_adamw_params s = {1e-3, 0.9, 0.999, 1e-8, 0.1, 0.5f, 3};
    double sum;
    EE_TRY(ee_sum_squares(ctx, &sum, &g));
    EE_TRY(ee_adamw(ctx, &p, &m, &v, &g, &s));
    EE_TRY(ee_normal(ctx, &x, 1.0f, 0.02f, 42));
    EE_TRY(finite(&p));
    EE_TRY(finite(&x));
    static const enum ee_dtype dtypes[] = {EE_BF16, EE_F16};
    for (int i = 0; i < 2; i++) {
        struct ee_tensor half = ee_vector(exact(1001 * 2), 1001);
        half.dtype = dtypes[i];
        EE_TRY(ee_convert(ctx, &half, &x));
        EE_TRY(ee_convert(ctx, &g, &half));
        EE_TRY(finite(&g));
    }
    return EE_OK;
}

static const struct {
    const char *name;
    enum ee_status (*run)(struct ee_ctx *ctx);
} runs[] = {
    {"linear", run_linear},       {"panels", run_panels},         {"backward", run_linear_backward},
    {"norm", run_norm},           {"activation", run_activation}, {"elementwise", run_elementwise},
    {"positions", run_positions}, {"attention", run_attention},   {"cache", run_cache},
    {"losses", run_losses},       {"parameters", run_parameters},
};
enum { RUNS = sizeof runs / sizeof runs[0] };

static bool scratch_free(const struct ee_ctx *ctx) {
    return ctx->scratch.used == 0 && ctx->overflow_count == 0 && ctx->overflow_bytes == 0;
}

static void test_runs(void) {
    for (int isa = 0; isa <= (int)ee_isa_best(); isa++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            struct ee_ctx *ctx;
            if (!EE_EXPECT_OK(ee_ctx_create(&ctx, (enum ee_isa)isa, threads)))
                return;
            for (int i = 0; i < 2 * RUNS; i++) {
                uint64_t calls = ee_alloc_stats().calls;
                enum ee_status status = runs[i % RUNS].run(ctx);
                free_blocks();
                bool quiet = i < RUNS || ee_alloc_stats().calls == calls;
                if (status == EE_OK && scratch_free(ctx) && quiet)
                    continue;
                fprintf(stderr, "%s, %s, %d threads: %s%s%s\n", runs[i % RUNS].name,
                        ee_isa_name((enum ee_isa)isa), threads, status ? ee_last_error() : "ok",
                        scratch_free(ctx) ? "" : "; holds scratch",
                        quiet ? "" : "; allocates after the warm-up");
                ee_test_failures++;
            }
            ee_ctx_destroy(ctx);
        }
    }
}

/* The operation under test and its context, for the loop over allocations. */
static struct ee_ctx *starved;
static int run_index;

/* With hardly any scratch memory, every piece is an allocation that can fail. */
static enum ee_status run_starved(void) {
    ee_arena_free(&starved->scratch);
    starved->scratch = (struct ee_arena){.base = NULL, .what = "scratch"};
    enum ee_status status = ee_arena_bind(&starved->scratch, 64);
    if (status == EE_OK)
        status = runs[run_index].run(starved);
    free_blocks();
    if (!scratch_free(starved))
        EE_FAIL(EE_ERR_INTERNAL, "%s holds scratch memory", runs[run_index].name);
    ee_arena_free(&starved->scratch);
    return status;
}

static void test_no_memory(void) {
    if (!EE_EXPECT_OK(ee_ctx_create(&starved, ee_isa_best(), 2)))
        return;
    ee_arena_free(&starved->scratch);
    for (run_index = 0; run_index < RUNS; run_index++)
        ee_test_allocations(runs[run_index].name, run_starved);
    ee_ctx_destroy(starved);
}

/* What ops.c leaves to the kernel. */
static void test_embed_errors(void) {
    for (int isa = 0; isa <= (int)ee_isa_best(); isa++) {
        struct ee_ctx *ctx;
        if (!EE_EXPECT_OK(ee_ctx_create(&ctx, (enum ee_isa)isa, 2)))
            return;
        struct ee_tensor x = mat(N, C), wpe = mat(PAGE, C);
        struct ee_weight wte = ee_weight_rows(filled(V * C), V, C);
        int32_t *token = indices(N, V), *position = indices(N, PAGE);
        static const int32_t wrong[] = {-1, V, INT32_MIN, INT32_MAX};
        for (int i = 0; i < 4; i++) {
            for (int n = 0; n < N; n++) {
                int32_t keep = token[n];
                token[n] = wrong[i];
                EE_EXPECT_STATUS(ee_embed(ctx, &x, &wte, &wpe, token, position, 1.0f),
                                 EE_ERR_INVALID, "token");
                token[n] = keep;
                keep = position[n];
                position[n] = i == 1 ? PAGE : wrong[i];
                EE_EXPECT_STATUS(ee_embed(ctx, &x, &wte, &wpe, token, position, 1.0f),
                                 EE_ERR_INVALID, "position");
                position[n] = keep;
            }
        }
        EE_EXPECT_OK(ee_embed(ctx, &x, &wte, &wpe, token, position, 1.0f));
        EE_EXPECT(scratch_free(ctx));
        free_blocks();
        ee_ctx_destroy(ctx);
    }
}

static void test_scratch(void) {
    struct ee_ctx *ctx;
    void *first, *second, *third;
    if (!EE_EXPECT_OK(ee_ctx_create(&ctx, EE_ISA_PLAIN, 1)))
        return;
    size_t capacity = ctx->scratch.capacity;
    int64_t much = (int64_t)capacity;
    struct ee_scratch_mark outer = ee_scratch_mark(ctx);
    EE_EXPECT_OK(ee_scratch_take(ctx, &first, 100, 1));
    EE_EXPECT(((uintptr_t)first & (EE_ALIGNMENT - 1)) == 0);
    struct ee_scratch_mark inner = ee_scratch_mark(ctx);
    EE_EXPECT_OK(ee_scratch_take(ctx, &second, much, 1));
    memset(second, 1, capacity);
    EE_EXPECT_OK(ee_scratch_take(ctx, &third, 100, 1));
    EE_EXPECT((char *)third == (char *)first + 128 && ctx->overflow_count == 1);
    ee_scratch_release(ctx, inner);
    EE_EXPECT(ctx->overflow_count == 0 && ctx->scratch.capacity == capacity);
    memset(first, 2, 100); /* still held */
    ee_scratch_release(ctx, outer);
    EE_EXPECT(scratch_free(ctx) && ctx->scratch.capacity >= capacity + 256);

    uint64_t calls = ee_alloc_stats().calls;
    EE_EXPECT_OK(ee_scratch_take(ctx, &first, 100, 1));
    EE_EXPECT_OK(ee_scratch_take(ctx, &second, much, 1));
    ee_scratch_release(ctx, outer);
    EE_EXPECT(ee_alloc_stats().calls == calls);

    EE_EXPECT_STATUS(ee_scratch_take(ctx, &first, -1, 4), EE_ERR_NOMEM, "scratch");
    EE_EXPECT_STATUS(ee_scratch_take(ctx, &first, INT64_MAX, 4), EE_ERR_NOMEM, "scratch");
    EE_EXPECT(!first && scratch_free(ctx));

    enum ee_status status = EE_OK;
    int taken = 0;
    for (; status == EE_OK && taken < 100; taken++)
        status = ee_scratch_take(ctx, &first, 4 * much, 1);
    EE_EXPECT(status == EE_ERR_INTERNAL && taken == 33);
    ee_scratch_release(ctx, outer);
    EE_EXPECT(scratch_free(ctx));
    ee_ctx_destroy(ctx);
    ee_ctx_destroy(NULL);
}

static void test_context(void) {
    struct ee_ctx *ctx;
    enum ee_isa isa;
    EE_EXPECT_STATUS(ee_ctx_create(&ctx, EE_ISA_PLAIN, -1), EE_ERR_INVALID, "threads");
    EE_EXPECT(!ctx);
    EE_EXPECT_OK(ee_isa_from_name(&isa, NULL));
    EE_EXPECT(isa == ee_isa_best());
    EE_EXPECT_OK(ee_isa_from_name(&isa, ""));
    EE_EXPECT_OK(ee_isa_from_name(&isa, "plain"));
    EE_EXPECT(isa == EE_ISA_PLAIN && strcmp(ee_isa_name(isa), "plain") == 0);
    EE_EXPECT_STATUS(ee_isa_from_name(&isa, "sse9"), EE_ERR_INVALID, "'sse9'");
    for (int i = (int)ee_isa_best() + 1; i < EE_ISA_COUNT; i++)
        EE_EXPECT_STATUS(ee_isa_from_name(&isa, ee_isa_name((enum ee_isa)i)), EE_ERR_INVALID,
                         "does not run");
}

static enum ee_status make_context(void) {
    struct ee_ctx *ctx;
    EE_TRY(ee_ctx_create(&ctx, ee_isa_best(), 2));
    ee_ctx_destroy(ctx);
    return EE_OK;
}

static void test_allocations(void) {
    ee_test_allocations("ee_ctx_create", make_context);
}

EE_TEST_MAIN(test_context, test_scratch, test_allocations, test_runs, test_embed_errors,
             test_no_memory)
