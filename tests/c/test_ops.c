/* csrc/ops: what the operations refuse, what they do with no rows, and what they allocate. That
 * their values are right is the matter of tests/ops. */
#include "ee_test.h"
#include "ops/ctx.h"

#include <math.h>

enum {
    EE_OPS_ENUM_FIRST = -1,
#define NUMBER(op) OP_##op,
    EE_OPS(NUMBER) OP_COUNT
};

static const char *const op_names[] = {
#define NAME(op) #op,
    EE_OPS(NAME)};

/* A backend without kernels: a call that gets through to it crashes. */
static const struct ee_ops no_kernels = {.name = "none"};
static struct ee_ctx none = {.ops = &no_kernels};

static int refused[OP_COUNT], empty[OP_COUNT];

/* The operation refuses these arguments, with a message that has its name and `text`. */
#define REFUSES(op, text, ...)                                                                     \
    do {                                                                                           \
        EE_EXPECT_STATUS(ee_##op(&none, __VA_ARGS__), EE_ERR_INVALID, #op ": " text);              \
        refused[OP_##op]++;                                                                        \
    } while (0)

/* No rows are no work: EE_OK without a kernel. */
#define ALLOWS_EMPTY(op, ...)                                                                      \
    do {                                                                                           \
        EE_EXPECT_OK(ee_##op(&none, __VA_ARGS__));                                                 \
        empty[OP_##op]++;                                                                          \
    } while (0)

/* Memory for arguments that are only looked at. */
static float a[4096], b[4096], c[4096];

static struct ee_tensor vec(float *data, int64_t n) {
    return ee_vector(data, n);
}

static struct ee_tensor mat(float *data, int64_t n, int64_t m) {
    return ee_matrix(data, n, m);
}

static struct ee_tensor heads(float *data, int64_t n, int64_t h, int64_t d) {
    return ee_heads(data, n, h, d, h * d);
}

static void test_linear(void) {
    struct ee_tensor x = mat(a, 2, 8), y = mat(b, 2, 4), bias = vec(c, 4), short_bias = vec(c, 3);
    struct ee_tensor x0 = mat(a, 0, 8), y0 = mat(b, 0, 4), wide = mat(a, 2, 9), half = x;
    struct ee_weight w = ee_weight_rows(c, 4, 8), panels = w, bad = w;
    panels.layout = EE_LAYOUT_PANELS;
    half.dtype = EE_BF16;
    REFUSES(linear, "w must not be NULL", &y, &x, NULL, NULL, NULL);
    REFUSES(linear, "x must not be NULL", &y, NULL, &w, NULL, NULL);
    REFUSES(linear, "x must be float32[N, K = 8], got float32[2, 9]", &y, &wide, &w, NULL, NULL);
    REFUSES(linear, "x must be float32, got bfloat16[2, 8]", &y, &half, &w, NULL, NULL);
    REFUSES(linear, "y must be float32[N = 2, M = 4], got float32[2, 8]", &x, &x, &w, NULL, NULL);
    REFUSES(linear, "bias must have M = 4 elements, got float32[3]", &y, &x, &w, &short_bias, NULL);
    REFUSES(linear, "residual must be float32[N = 2, M = 4]", &y, &x, &w, &bias, &x);
    bad.dtype = EE_BF16;
    REFUSES(linear, "w must be plain rows of float32", &y, &x, &bad, NULL, NULL);
    bad = w;
    bad.rows = 0;
    REFUSES(linear, "w must have rows and columns, got [0, 8]", &y, &x, &bad, NULL, NULL);
    struct ee_tensor same = mat(a, 2, 4);
    REFUSES(linear, "y and x must not be the same memory", &same, &x, &w, NULL, NULL);
    struct ee_tensor strided = ee_matrix_strided(b, 2, 4, 6), overlapping = strided;
    REFUSES(linear, "y and residual are the same memory, so", &y, &x, &w, NULL, &strided);
    overlapping.stride[0] = 3;
    REFUSES(linear, "y = float32[2, 4] must have rows that do not overlap, got a stride of 3",
            &overlapping, &x, &w, NULL, NULL);
    overlapping.stride[1] = 2;
    REFUSES(linear, "y must have a last stride of 1, got 2", &overlapping, &x, &w, NULL, NULL);
    y.data = NULL;
    REFUSES(linear, "y = float32[2, 4] has no data", &y, &x, &w, NULL, NULL);
    y.ndim = 5;
    REFUSES(linear, "y must have 1 to 4 dimensions, got 5", &y, &x, &w, NULL, NULL);
    ALLOWS_EMPTY(linear, &y0, &x0, &w, &bias, NULL);
    y0.data = x0.data = NULL;
    ALLOWS_EMPTY(linear, &y0, &x0, &w, &bias, &y0);

    y = mat(b, 2, 4);
    REFUSES(linear_backward_input, "w must be a float32 weight of plain rows", &x, &y, &panels, 0);
    REFUSES(linear_backward_input, "dy must be float32[N, M = 4]", &x, &x, &w, false);
    REFUSES(linear_backward_input, "dx must be float32[N = 2, K = 8]", &y, &y, &w, false);
    ALLOWS_EMPTY(linear_backward_input, &x0, &y0, &w, true);

    struct ee_tensor dw = mat(c, 4, 8);
    REFUSES(linear_backward_weight, "acc_dw must be float32[M = 4, K = 8]", &x, NULL, &y, &x);
    REFUSES(linear_backward_weight, "acc_db must have M = 4", &dw, &short_bias, &y, &x);
    REFUSES(linear_backward_weight, "x must be float32[N = 2, K], got", &dw, NULL, &y, &dw);
    dw.stride[0] = 9;
    REFUSES(linear_backward_weight, "acc_dw = float32[4, 8] must be contig", &dw, NULL, &y, &x);
    dw.stride[0] = 8;
    ALLOWS_EMPTY(linear_backward_weight, &dw, NULL, &y0, &x0);

    REFUSES(weight_pack, "w must have the layout panels", &w, &x, 0);
    REFUSES(weight_pack, "rows must not be NULL", &panels, NULL, 0);
    REFUSES(weight_pack, "rows must be float32[N, K = 8], got float32[2, 9]", &panels, &wide, 0);
    REFUSES(weight_pack, "rows must lie within the 4 of w, got 2 from 3 on", &panels, &x, 3);
    REFUSES(weight_pack, "rows must lie within the 4 of w, got 2 from -1 on", &panels, &x, -1);
    REFUSES(weight_pack, "rows must lie within the 4 of w, got 0 from 5 on", &panels, &x0, 5);
    bad = panels;
    bad.data = x.data;
    REFUSES(weight_pack, "w and rows must not be the same memory", &bad, &x, 0);
    struct ee_tensor other = x;
    other.dtype = EE_I32;
    REFUSES(weight_pack, "rows must be float32, float16 or bfloat16, got int32", &panels, &other,
            0);
    other = x;
    other.data = NULL;
    REFUSES(weight_pack, "rows must have data, contiguous", &panels, &other, 0);
    other = x;
    other.stride[0] = 2; /* columns of 2, one over the other */
    REFUSES(weight_pack,
            "rows must have data, contiguous rows or columns, and none that overlap, "
            "got strides of 2 and 1",
            &panels, &other, 0);
    other.stride[0] = other.stride[1] = 2;
    REFUSES(weight_pack, "rows must have data, contiguous", &panels, &other, 0);
    ALLOWS_EMPTY(weight_pack, &panels, &x0, 4);
}

static void test_norm(void) {
    struct ee_tensor x = mat(a, 3, 64), y = mat(b, 3, 64), w = vec(c, 64), small = vec(c, 32);
    struct ee_tensor mean = vec(c, 3), x0 = mat(a, 0, 64), m0 = vec(c, 0), flat = vec(a, 64);
    struct ee_norm_params p = {EE_LAYERNORM, 1e-5f, 0}, bad = p;
    REFUSES(norm, "weight must have C = 64 elements, got float32[32]", &y, NULL, NULL, &x, &small,
            NULL, &p);
    REFUSES(norm, "bias must have C = 64", &y, NULL, NULL, &x, &w, &small, &p);
    REFUSES(norm, "x must not be NULL", &y, NULL, NULL, NULL, &w, NULL, &p);
    REFUSES(norm, "x must be float32[N, C], got float32[64]", &y, NULL, NULL, &flat, &w, NULL, &p);
    REFUSES(norm, "y must be float32[N = 3, C = 64]", &x0, NULL, NULL, &x, &w, NULL, &p);
    REFUSES(norm, "mean must have N = 3", &y, &w, &mean, &x, &w, NULL, &p);
    REFUSES(norm, "mean and rstd must both", &y, &mean, NULL, &x, &w, NULL, &p);
    REFUSES(norm, "params must not be NULL", &y, NULL, NULL, &x, &w, NULL, NULL);
    bad.eps = -1;
    REFUSES(norm, "eps must be >= 0, got -1", &y, NULL, NULL, &x, &w, NULL, &bad);
    bad.eps = NAN;
    REFUSES(norm, "eps must be >= 0, got nan", &y, NULL, NULL, &x, &w, NULL, &bad);
    bad = p;
    bad.kind = (enum ee_norm_kind)2;
    REFUSES(norm, "unknown kind 2", &y, NULL, NULL, &x, &w, NULL, &bad);
    bad = p;
    bad.weight_offset = INFINITY;
    REFUSES(norm, "weight_offset must be finite", &y, NULL, NULL, &x, &w, NULL, &bad);
    ALLOWS_EMPTY(norm, &x0, &m0, &m0, &x0, &w, &w, &p);

    struct ee_tensor x3 = heads(a, 3, 2, 32), y3 = heads(b, 3, 2, 32), six = vec(c, 6);
    REFUSES(norm, "weight must have D = 32 elements", &y3, NULL, NULL, &x3, &w, NULL, &p);
    REFUSES(norm, "mean must have N * H = 6 elem", &y3, &mean, &mean, &x3, &small, NULL, &p);
    x3.stride[1] = 31;
    REFUSES(norm, "x = float32[3, 2, 32] must have rows that do not", &y3, &six, &six, &x3, &small,
            NULL, &p);

    REFUSES(norm_backward, "dy must be float32[N = 3, C = 64]", &y, &w, NULL, &x0, &x, &w, &mean,
            &mean, &p, false);
    REFUSES(norm_backward, "dx must be float32[N = 3, C = 64]", &x0, &w, NULL, &y, &x, &w, &mean,
            &mean, &p, false);
    REFUSES(norm_backward, "acc_dweight must not be NULL", &y, NULL, NULL, &y, &x, &w, &mean, &mean,
            &p, false);
    REFUSES(norm_backward, "rstd must not be NULL", &y, &w, NULL, &y, &x, &w, &mean, NULL, &p, 0);
    REFUSES(norm_backward, "dx and dy must not be the same", &y, &w, NULL, &y, &x, &w, &mean, &mean,
            &p, true);
    REFUSES(norm_backward, "dx and x must not be the same", &x, &w, NULL, &y, &x, &w, &mean, &mean,
            &p, false);
    ALLOWS_EMPTY(norm_backward, &x0, &w, NULL, &x0, &x0, &w, &m0, &m0, &p, true);
}

static void test_elementwise(void) {
    struct ee_tensor x = mat(a, 2, 8), y = mat(b, 2, 8), half = mat(b, 2, 4), g = mat(c, 2, 4);
    struct ee_tensor none_rows = mat(a, 0, 8), none_half = mat(b, 0, 4), same = mat(a, 2, 4);
    REFUSES(activation, "unknown kind 4 of", &y, &x, (enum ee_activation)4, false);
    REFUSES(activation, "x must be float32[N = 2, F = 8], got", &y, &half, EE_GELU, false);
    REFUSES(activation, "x must be float32[N = 2, 2F = 16], got", &y, &x, EE_GELU, true);
    REFUSES(activation, "y and x must not be the same memory", &same, &x, EE_SILU, true);
    ALLOWS_EMPTY(activation, &none_half, &none_rows, EE_SILU, true);

    REFUSES(activation_backward, "dx must be float32[N = 2, 2F = 8]", &half, NULL, &g, &x, EE_SILU,
            true);
    REFUSES(activation_backward, "y must be float32[N = 2, F = 4]", &y, &x, &g, &x, EE_SILU, true);
    REFUSES(activation_backward, "y and dx must not be the", &y, &half, &g, &x, EE_SILU, true);
    REFUSES(activation_backward, "y and x must not be the", &y, &same, &g, &x, EE_SILU, true);
    REFUSES(activation_backward, "dx and dy must not be", &y, NULL, &y, &x, EE_SILU, false);
    ALLOWS_EMPTY(activation_backward, &none_rows, NULL, &none_half, &none_rows, EE_SILU, true);

    REFUSES(softcap, "cap must be > 0, got 0", &x, 0.0f);
    REFUSES(softcap, "cap must be > 0, got nan", &x, NAN);
    REFUSES(softcap, "x must not be NULL", NULL, 30.0f);
    ALLOWS_EMPTY(softcap, &none_rows, 30.0f);

    struct ee_tensor flat = vec(a, 8), flat3 = vec(b, 3), flat0 = vec(NULL, 0);
    REFUSES(add, "x must be float32[N = 2, C = 8], got float32[2, 4]", &y, &half);
    REFUSES(add, "x must have N = 8 elements, got float32[3]", &flat, &flat3);
    REFUSES(add, "y must not be NULL", NULL, &x);
    ALLOWS_EMPTY(add, &flat0, &flat0);

    uint64_t row[2] = {0, 1};
    struct ee_dropout d = {0.1f, 1, row}, bad = d;
    bad.p = 1;
    REFUSES(dropout, "p must lie in [0, 1), got 1", &y, &x, NULL, &bad);
    bad.p = -0.1f;
    REFUSES(dropout, "p must lie in [0, 1), got -0.1", &y, &x, NULL, &bad);
    bad = d;
    bad.row = NULL;
    REFUSES(dropout, "dropout must have the identity of every row", &y, &x, NULL, &bad);
    REFUSES(dropout, "dropout must not be NULL", &y, &x, NULL, NULL);
    REFUSES(dropout, "residual must be float32[N = 2, C = 8]", &y, &x, &half, &d);
    ALLOWS_EMPTY(dropout, &none_rows, &none_rows, NULL, &d);
}

static void test_positions(void) {
    int32_t at[3] = {0, 4, 9}, negative[3] = {0, -1, 2};
    struct ee_tensor x = heads(a, 3, 2, 8), x0 = heads(a, 0, 2, 8), flat = mat(a, 3, 8);
    struct ee_rope rope = {b, c, 10, 8, false}, bad = rope;
    bad.positions = 9;
    REFUSES(rotate, "position[2] must lie between 0 and 8, got 9", &x, at, &bad, false);
    REFUSES(rotate, "position[1] must lie between 0 and 9, got -1", &x, negative, &rope, false);
    REFUSES(rotate, "position must not be NULL", &x, NULL, &rope, false);
    static const int32_t wrong_dims[] = {-2, 0, 3, 10};
    for (int i = 0; i < 4; i++) {
        bad = rope;
        bad.dims = wrong_dims[i];
        REFUSES(rotate, "rope dims must be even and between 2 and D = 8", &x, at, &bad, false);
    }
    bad = rope;
    bad.sin = NULL;
    REFUSES(rotate, "rope must have tables of cosines and sines, got no sines", &x, at, &bad, true);
    REFUSES(rotate, "rope must not be NULL", &x, at, NULL, true);
    REFUSES(rotate, "x must be float32[N, H, D], got float32[3, 8]", &flat, at, &rope, true);
    ALLOWS_EMPTY(rotate, &x0, NULL, &rope, false);

    struct ee_tensor e = mat(a, 3, 8), e0 = mat(a, 0, 8), wpe = mat(c, 10, 8),
                     narrow = mat(c, 10, 7);
    struct ee_weight wte = ee_weight_rows(b, 10, 8);
    REFUSES(embed, "token must not be NULL", &e, &wte, NULL, NULL, NULL, 1.0f);
    REFUSES(embed, "position must not be NULL", &e, &wte, &wpe, at, NULL, 1.0f);
    REFUSES(embed, "wpe must be float32[P, C = 8], got", &e, &wte, &narrow, at, at, 1.0f);
    REFUSES(embed, "x must be float32[N, C = 8], got", &narrow, &wte, &wpe, at, at, 1.0f);
    REFUSES(embed, "wte must not be NULL", &e, NULL, &wpe, at, at, 1.0f);
    REFUSES(embed, "scale must be finite", &e, &wte, &wpe, at, at, NAN);
    ALLOWS_EMPTY(embed, &e0, &wte, NULL, NULL, NULL, 1.0f);

    struct ee_tensor dwte = mat(b, 10, 8), nine = mat(b, 9, 8);
    REFUSES(embed_backward, "token[2] must lie between 0 and 8, got 9", &nine, NULL, &e, at, at, 1);
    REFUSES(embed_backward, "token[1] must lie between 0", &dwte, NULL, &e, negative, at, 1.0f);
    REFUSES(embed_backward, "position[1] must lie betw", &dwte, &wpe, &e, at, negative, 1.0f);
    REFUSES(embed_backward, "acc_dwte must be float32[V, C = 8]", &narrow, NULL, &e, at, at, 1.0f);
    REFUSES(embed_backward, "acc_dwpe must be float32[P, C = 8]", &dwte, &narrow, &e, at, at, 1.0f);
    ALLOWS_EMPTY(embed_backward, &dwte, &wpe, &e0, NULL, NULL, 1.0f);
}

static void test_attention(void) {
    struct ee_tensor q = heads(a, 5, 4, 8), out = heads(b, 5, 4, 8), lse = mat(c, 5, 4);
    struct ee_tensor k = heads(c, 5, 2, 8), v = heads(c, 5, 2, 8), three = heads(c, 5, 3, 8);
    struct ee_tensor q0 = heads(a, 0, 4, 8), k0 = heads(c, 0, 2, 8), lse0 = mat(c, 0, 4);
    struct ee_attention_params p = {.scale = 0.3f}, bad = p;
    static const int32_t whole[] = {0, 5}, late[] = {1, 5}, early[] = {0, 4}, down[] = {0, 4, 3, 5};
    REFUSES(attention, "k must be float32[N = 5, K, D = 8]", &out, &lse, &q, &lse, &v, whole, 1,
            &p);
    REFUSES(attention, "v must be float32[N = 5, K = 2, D = 8]", &out, &lse, &q, &k, &q, whole, 1,
            &p);
    REFUSES(attention, "the key-value heads must divide the heads, got K = 3 and H = 4", &out, &lse,
            &q, &three, &three, whole, 1, &p);
    REFUSES(attention, "out must be float32[N = 5, H = 4, D = 8]", &k, &lse, &q, &k, &v, whole, 1,
            &p);
    REFUSES(attention, "lse must be float32[N = 5, H = 4]", &out, &lse0, &q, &k, &v, whole, 1, &p);
    REFUSES(attention, "segment must ascend from 0 to N = 5, got 1 to 5", &out, &lse, &q, &k, &v,
            late, 1, &p);
    REFUSES(attention, "segment must ascend from 0 to N = 5, got 0 to 4", &out, &lse, &q, &k, &v,
            early, 1, &p);
    REFUSES(attention, "segment must ascend, got 4 before 3 at index 2", &out, &lse, &q, &k, &v,
            down, 3, &p);
    REFUSES(attention, "segment must hold 0", &out, &lse, &q, &k, &v, whole, 0, &p);
    REFUSES(attention, "segment must hold 0", &out, &lse, &q, &k, &v, NULL, 1, &p);
    REFUSES(attention, "out and q must not be the same", &q, &lse, &q, &k, &v, whole, 1, &p);
    bad.softcap = -1;
    REFUSES(attention, "softcap must be > 0", &out, &lse, &q, &k, &v, whole, 1, &bad);
    bad = p;
    bad.window = -1;
    REFUSES(attention, "window must be > 0", &out, &lse, &q, &k, &v, whole, 1, &bad);
    bad = p;
    bad.scale = NAN;
    REFUSES(attention, "scale must be finite", &out, &lse, &q, &k, &v, whole, 1, &bad);
    struct ee_dropout dropout = {2, 0, NULL};
    bad = p;
    bad.dropout = &dropout;
    REFUSES(attention, "p must lie in [0, 1)", &out, &lse, &q, &k, &v, whole, 1, &bad);
    ALLOWS_EMPTY(attention, &q0, &lse0, &q0, &k0, &k0, NULL, 0, &p);

    struct ee_tensor dq = heads(a + 2048, 5, 4, 8), dk = heads(b + 2048, 5, 2, 8);
    struct ee_tensor dv = heads(c + 2048, 5, 2, 8);
    REFUSES(attention_backward, "dq must be float32[N = 5, H = 4", &dk, &dk, &dv, &out, &out, &lse,
            &q, &k, &v, whole, 1, &p);
    REFUSES(attention_backward, "dk must be float32[N = 5, K = 2", &dq, &dq, &dv, &out, &out, &lse,
            &q, &k, &v, whole, 1, &p);
    REFUSES(attention_backward, "dv must not be NULL", &dq, &dk, NULL, &out, &out, &lse, &q, &k, &v,
            whole, 1, &p);
    REFUSES(attention_backward, "segment must ascend, got", &dq, &dk, &dv, &out, &out, &lse, &q, &k,
            &v, down, 3, &p);
    REFUSES(attention_backward, "dv must overlap no other", &dq, &dk, &v, &out, &out, &lse, &q, &k,
            &v, whole, 1, &p);
    ALLOWS_EMPTY(attention_backward, &q0, &k0, &k0, &q0, &q0, &lse0, &q0, &k0, &k0, NULL, 0, &p);
}

static void test_cache(void) {
    /* Two sequences of three pages, of which the second has two. */
    int32_t table[] = {3, 1, 2, 0, 4, -1}, sequence[] = {0, 1}, position[] = {191, 127};
    int32_t far[] = {0, 192}, absent[] = {0, 128}, negative[] = {0, -1}, beyond[] = {0, 2};
    struct ee_kv kv = {a, b, table, 2, 3, 5, 64, 2, 8}, bad;
    struct ee_tensor k = heads(c, 2, 2, 8), v = heads(c, 2, 2, 8), k0 = heads(c, 0, 2, 8);
    struct ee_tensor q = heads(c, 2, 4, 8), out = heads(b, 2, 4, 8), odd = heads(c, 2, 3, 8);
    struct ee_tensor q0 = heads(c, 0, 4, 8);
    struct ee_attention_params p = {.scale = 1}, windowed = {.scale = 1, .window = 128};
    REFUSES(kv_write, "kv must not be NULL", NULL, &k, &v, sequence, position);
    static const int32_t pages[] = {-64, 0, 32, 65};
    for (int i = 0; i < 4; i++) {
        bad = kv;
        bad.page = pages[i];
        REFUSES(kv_write, "the page of kv must be a multiple of 64", &bad, &k, &v, sequence,
                position);
    }
    bad = kv;
    bad.v = NULL;
    REFUSES(kv_write, "kv must have keys, values and a page table, got no values", &bad, &k, &v,
            sequence, position);
    bad = kv;
    bad.pages = 0;
    REFUSES(kv_write, "kv must have heads, width, sequences and pages >= 1", &bad, &k, &v, sequence,
            position);
    REFUSES(kv_write, "k must be float32[N, K = 2, D = 8]", &kv, &q, &v, sequence, position);
    REFUSES(kv_write, "position[1] must lie between 0 and 191, got 192", &kv, &k, &v, sequence,
            far);
    REFUSES(kv_write, "sequence[1] must lie between 0 and", &kv, &k, &v, negative, position);
    REFUSES(kv_write, "sequence[1] must lie between 0 and 1, got 2", &kv, &k, &v, beyond, position);
    REFUSES(kv_write, "sequence 1 has no page for position 128 (table entry -1, 5 pages)", &kv, &k,
            &v, sequence, absent);
    ALLOWS_EMPTY(kv_write, &kv, &k0, &k0, NULL, NULL);

    bad = kv;
    bad.pages = 4;
    REFUSES(attention_rows, "sequence 1 has no page for position 64", &out, &q, &bad, sequence,
            position, &p);
    REFUSES(attention_rows, "sequence 1 has no page for position 128", &out, &q, &kv, sequence,
            absent, &p);
    table[0] = -1;
    REFUSES(attention_rows, "sequence 0 has no page for position 0", &out, &q, &kv, sequence,
            position, &p);
    /* Pages before the window may be gone: it is the later table entry that is refused. */
    table[4] = 5;
    REFUSES(attention_rows, "sequence 1 has no page for position 64", &out, &q, &kv, sequence,
            position, &windowed);
    windowed.window = 129;
    REFUSES(attention_rows, "sequence 0 has no page for position 0", &out, &q, &kv, sequence,
            position, &windowed);
    REFUSES(attention_rows, "the key-value heads must divide the heads, got K = 2 and H = 3", &odd,
            &odd, &kv, sequence, position, &p);
    REFUSES(attention_rows, "params must not be NULL", &out, &q, &kv, sequence, position, NULL);
    ALLOWS_EMPTY(attention_rows, &q0, &q0, &kv, NULL, NULL, &p);
}

static void test_losses(void) {
    struct ee_tensor loss = vec(a, 3), conf = vec(b, 3), logits = mat(c, 3, 10), w = vec(a, 3);
    struct ee_tensor zero = vec(a, 0), z0 = mat(c, 0, 10), four = vec(a, 4);
    struct ee_loss_params p = {0, 1, false, true}, bad = p;
    int32_t target[] = {-100, 9, 0}, wrong[] = {-1, 10, 0}, token[3];
    REFUSES(cross_entropy, "target[1] must be at most 9, got 10", &loss, &conf, &logits, wrong, &w,
            &p);
    REFUSES(cross_entropy, "target must not be NULL", &loss, &conf, &logits, NULL, &w, &p);
    REFUSES(cross_entropy, "loss must have N = 3", &four, &conf, &logits, target, &w, &p);
    REFUSES(cross_entropy, "confidence must have N = 3", &loss, &four, &logits, target, &w, &p);
    REFUSES(cross_entropy, "row_weight must not be NULL", &loss, &conf, &logits, target, NULL, &p);
    REFUSES(cross_entropy, "logits must be float32[N, V]", &loss, &conf, &w, target, &w, &p);
    REFUSES(cross_entropy, "params must not be NULL", &loss, &conf, &logits, target, &w, NULL);
    bad.temperature = 0;
    REFUSES(cross_entropy, "temperature must be > 0, got 0", &loss, &conf, &logits, target, &w,
            &bad);
    bad = p;
    bad.softcap = -30;
    REFUSES(cross_entropy, "softcap must be > 0, or 0 for none, got -30", &loss, &conf, &logits,
            target, &w, &bad);
    ALLOWS_EMPTY(cross_entropy, &zero, &zero, &z0, NULL, &zero, &p);

    REFUSES(confidence, "token must not be NULL", NULL, &conf, &loss, &logits);
    REFUSES(confidence, "lse must not be NULL", token, &conf, NULL, &logits);
    REFUSES(confidence, "confidence must have N = 3", token, &four, &loss, &logits);
    ALLOWS_EMPTY(confidence, NULL, &zero, &zero, &z0);
}

static void test_parameters(void) {
    struct ee_tensor p = mat(a, 2, 3), m = vec(b, 6), v = vec(c, 6), g = vec(c, 6),
                     five = vec(b, 5);
    struct ee_tensor zero = vec(NULL, 0), strided = ee_matrix_strided(a, 2, 3, 4), half = p;
    double sum = 7;
    half.dtype = EE_BF16;
    REFUSES(sum_squares, "sum must not be NULL", NULL, &p);
    REFUSES(sum_squares, "x = float32[2, 3] must be contiguous", &sum, &strided);
    REFUSES(sum_squares, "x must be float32, got bfloat16", &sum, &half);
    ALLOWS_EMPTY(sum_squares, &sum, &zero);
    EE_EXPECT(sum == 0);

    struct ee_adamw_params s = {1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1}, bad = s;
    REFUSES(adamw, "m must have 6 elements as p has, got 5", &p, &five, &v, &g, &s);
    REFUSES(adamw, "v must have 6 elements as p has, got 5", &p, &m, &five, &g, &s);
    REFUSES(adamw, "gradient must not be NULL", &p, &m, &v, NULL, &s);
    REFUSES(adamw, "params must not be NULL", &p, &m, &v, &g, NULL);
    bad.step = 0;
    REFUSES(adamw, "step must be counted from 1, got 0", &p, &m, &v, &g, &bad);
    bad = s;
    bad.beta1 = 1;
    REFUSES(adamw, "beta1 must lie in [0, 1), got 1", &p, &m, &v, &g, &bad);
    bad = s;
    bad.learning_rate = NAN;
    REFUSES(adamw, "learning_rate must lie in [0, inf), got nan", &p, &m, &v, &g, &bad);
    bad = s;
    bad.gradient_scale = INFINITY;
    REFUSES(adamw, "gradient_scale must be finite", &p, &m, &v, &g, &bad);
    ALLOWS_EMPTY(adamw, &zero, &zero, &zero, &zero, &s);

    REFUSES(normal, "std must be >= 0, got -1", &p, 0.0f, -1.0f, 1);
    REFUSES(normal, "mean must be finite, got", &p, NAN, 1.0f, 1);
    REFUSES(normal, "x = float32[2, 3] must be contiguous", &strided, 0.0f, 1.0f, 1);
    ALLOWS_EMPTY(normal, &zero, 0.0f, 1.0f, 1);

    struct ee_tensor integers = half;
    integers.dtype = EE_I32;
    REFUSES(convert, "out must be float32, bfloat16 or float16, got int32", &integers, &p);
    REFUSES(convert, "out must have 5 elements as in has, got 6", &m, &five);
    REFUSES(convert, "in = float32[2, 3] must be contiguous", &m, &strided);
    REFUSES(convert, "out and in must not be the same memory", &half, &p);
    ALLOWS_EMPTY(convert, &zero, &zero);
}

static void test_every_operation(void) {
    for (int op = 0; op < OP_COUNT; op++) {
        if (!refused[op] || !empty[op]) {
            fprintf(stderr, "%s: no wrong arguments, or no empty ones, are tried\n", op_names[op]);
            ee_test_failures++;
        }
    }
}

EE_TEST_MAIN(test_linear, test_norm, test_elementwise, test_positions, test_attention, test_cache,
             test_losses, test_parameters, test_every_operation)
