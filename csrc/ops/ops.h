/* The operations: the contract between the model and a backend.
 *
 * Each prototype below is an entry of struct ee_ops (made from the list EE_OPS at the end), which a
 * backend fills: kernels/cpu, kernels/cuda. The public function checks its arguments once and calls
 * the entry of ctx->ops; a kernel assumes valid input.
 *
 * Index letters: N rows (tokens of a batch, flattened), B batch, T time, C width, H heads,
 * K key-value heads, D head width, F feed-forward width, V vocabulary, S sequences or segments.
 *
 * Rules that hold unless a prototype says otherwise:
 * - tensors are float32; outputs come first, then inputs;
 * - outputs are written (=). Gradients of parameters, and every argument whose name begins with
 *   acc_, are accumulated (+=);
 * - outputs do not overlap inputs; "in place" says where they may be the same memory;
 * - a pointer marked "or NULL" may be left out;
 * - results depend on the number of threads and on the instruction set only where marked
 *   [threads]. Operations marked [rows] give each row bits that depend on that row alone: not on
 *   the other rows, their number, the threads or the instruction set (inference relies on it);
 * - sums inside a row run over 16 lanes (element i in lane i % 16, ascending) that are added as one
 *   tree: lanes i and i + 8, then i + 4, i + 2, i + 1. Sums over a vocabulary do so in blocks of
 *   1,024 elements, the blocks added in ascending order in float64: in one chain a large term would
 *   swallow the small ones of its lane. */
#ifndef EE_OPS_H
#define EE_OPS_H

#include "base/arena.h"
#include "base/threads.h"
#include "tensor/tensor.h"

EE_EXTERN_C_BEGIN

struct ee_ops;

/* What every operation works with: backend, threads and workspace. One caller at a time. */
struct ee_ctx {
    const struct ee_ops *ops;
    struct ee_pool *pool;
    struct ee_arena scratch;
    void *overflow[32]; /* scratch blocks taken while the arena was too small; see ops/ctx.h */
    int overflow_count;
    size_t overflow_bytes;
};

/* -- Matrix products ------------------------------------------------------------------------- */

/* y[N, M] = x[N, K] w^T + bias + residual, with w of M output and K input features.
 * bias[M] or NULL. residual[N, M] or NULL; it may be y itself.
 * With a weight of plain rows: the fast product of training [threads]. With panels: [rows], each
 * output sums blocks of EE_SUM_BLOCK input features, one fused multiply-add chain from zero in a
 * block, the blocks added in ascending order, then the bias, then the residual. */
EE_WARN_UNUSED enum ee_status ee_linear(struct ee_ctx *ctx, const struct ee_tensor *y,
                                        const struct ee_tensor *x, const struct ee_weight *w,
                                        const struct ee_tensor *bias,
                                        const struct ee_tensor *residual);

/* dx[N, K] = dy[N, M] w, or += when `accumulate`. Weights of plain rows. [threads] */
EE_WARN_UNUSED enum ee_status ee_linear_backward_input(struct ee_ctx *ctx,
                                                       const struct ee_tensor *dx,
                                                       const struct ee_tensor *dy,
                                                       const struct ee_weight *w, bool accumulate);

/* acc_dw[M, K] += dy[N, M]^T x[N, K]; acc_db[M] += sum of dy over rows, or NULL. acc_dw is
 * contiguous. [threads] */
EE_WARN_UNUSED enum ee_status ee_linear_backward_weight(struct ee_ctx *ctx,
                                                        const struct ee_tensor *acc_dw,
                                                        const struct ee_tensor *acc_db,
                                                        const struct ee_tensor *dy,
                                                        const struct ee_tensor *x);

/* Packs rows[N, K] into the output features [first_row, first_row + N) of w, whose layout is panels
 * and whose data has ee_weight_bytes() bytes; the others keep their values. The last output
 * features bring the zeros that fill the last panel. Rows: float32, float16 or bfloat16, with
 * contiguous rows or, for a matrix that is stored [in, out], contiguous columns (strides 1, ld).
 * Rounded to nearest even where w is narrower, else exact; NaN stays NaN. */
EE_WARN_UNUSED enum ee_status ee_weight_pack(struct ee_ctx *ctx, const struct ee_weight *w,
                                             const struct ee_tensor *rows, int64_t first_row);

/* -- Norms ------------------------------------------------------------------------------------ */

enum ee_norm_kind { EE_LAYERNORM, EE_RMSNORM };

struct ee_norm_params {
    enum ee_norm_kind kind;
    float eps;
    float weight_offset; /* the factor is weight + offset: 0, or 1 as in Gemma */
};

/* y = (x - mean) * rstd * (weight + offset) + bias over the last dimension; mean is 0 for RMSNorm.
 * x and y: [N, C], or [N, H, D] with each head normalised on its own and weight[D]. In place
 * allowed. bias or NULL. mean and rstd: [N] or [N * H], or both NULL where no backward follows.
 * [rows] */
EE_WARN_UNUSED enum ee_status ee_norm(struct ee_ctx *ctx, const struct ee_tensor *y,
                                      const struct ee_tensor *mean, const struct ee_tensor *rstd,
                                      const struct ee_tensor *x, const struct ee_tensor *weight,
                                      const struct ee_tensor *bias,
                                      const struct ee_norm_params *params);

/* Gradients of ee_norm. dx = the gradient, or += when `accumulate`; dx may be dy itself unless
 * accumulating. acc_dweight += , acc_dbias += or NULL. mean and rstd as ee_norm gave them.
 * [threads] */
EE_WARN_UNUSED enum ee_status ee_norm_backward(
    struct ee_ctx *ctx, const struct ee_tensor *dx, const struct ee_tensor *acc_dweight,
    const struct ee_tensor *acc_dbias, const struct ee_tensor *dy, const struct ee_tensor *x,
    const struct ee_tensor *weight, const struct ee_tensor *mean, const struct ee_tensor *rstd,
    const struct ee_norm_params *params, bool accumulate);

/* -- Activations ------------------------------------------------------------------------------ */

enum ee_activation { EE_RELU, EE_GELU, EE_GELU_TANH, EE_SILU };

/* y[N, F] = f(x[N, F]); gated: x is [N, 2F], y = f(x[:, :F]) * x[:, F:] (SwiGLU with SiLU, GeGLU
 * with GELU). In place only when not gated. [rows] */
EE_WARN_UNUSED enum ee_status ee_activation(struct ee_ctx *ctx, const struct ee_tensor *y,
                                            const struct ee_tensor *x, enum ee_activation kind,
                                            bool gated);

/* dx (shape of x) from dy[N, F]; dx may be x itself. y, if not NULL, receives what ee_activation
 * gives for x, to the bit: the caller needs it for a weight gradient and need not have kept it; it
 * may be dy itself (dy is then overwritten). */
EE_WARN_UNUSED enum ee_status ee_activation_backward(struct ee_ctx *ctx, const struct ee_tensor *dx,
                                                     const struct ee_tensor *y,
                                                     const struct ee_tensor *dy,
                                                     const struct ee_tensor *x,
                                                     enum ee_activation kind, bool gated);

/* x[N, V] = cap * tanh(x / cap), in place. cap > 0. [rows] */
EE_WARN_UNUSED enum ee_status ee_softcap(struct ee_ctx *ctx, const struct ee_tensor *x, float cap);

/* y += x, same shape, rank 1 or 2. */
EE_WARN_UNUSED enum ee_status ee_add(struct ee_ctx *ctx, const struct ee_tensor *y,
                                     const struct ee_tensor *x);

/* -- Positions -------------------------------------------------------------------------------- */

/* Rotary embedding (Su et al., 2021): tables [positions, dims / 2] of cosines and sines. Pair i of
 * a head is (i, i + dims / 2), or (2i, 2i + 1) when interleaved; the channels from `dims` on pass
 * through. */
struct ee_rope {
    const float *cos, *sin;
    int64_t positions; /* rows of the tables */
    int32_t dims;      /* even, 2 .. D */
    bool interleaved;
};

/* Rotates x[N, H, D] in place by the angles of position[N]; `inverse` rotates back, which is also
 * the gradient. [rows] */
EE_WARN_UNUSED enum ee_status ee_rotate(struct ee_ctx *ctx, const struct ee_tensor *x,
                                        const int32_t *position, const struct ee_rope *rope,
                                        bool inverse);

/* x[N, C] = scale * wte[token[n]] + wpe[position[n]]. wte: rows or panels, [V, C]. wpe[P, C] or
 * NULL. Tokens outside 0 .. V - 1 and positions outside the table are EE_ERR_INVALID. [rows] */
EE_WARN_UNUSED enum ee_status ee_embed(struct ee_ctx *ctx, const struct ee_tensor *x,
                                       const struct ee_weight *wte, const struct ee_tensor *wpe,
                                       const int32_t *token, const int32_t *position, float scale);

/* acc_dwte[token[n]] += scale * dx[n]; acc_dwpe[position[n]] += dx[n], or NULL: in ascending order
 * of n, whatever the number of threads. */
EE_WARN_UNUSED enum ee_status ee_embed_backward(struct ee_ctx *ctx,
                                                const struct ee_tensor *acc_dwte,
                                                const struct ee_tensor *acc_dwpe,
                                                const struct ee_tensor *dx, const int32_t *token,
                                                const int32_t *position, float scale);

/* -- Dropout ---------------------------------------------------------------------------------- */

/* Element (row n, channel c) is kept iff the c % 4-th word of Philox(key, row[n], c / 4), as a
 * number in [0, 1), is >= p. `key` stands for (seed, layer, site), row[n] for (global sample,
 * position): the same under every layout and in recomputation. */
struct ee_dropout {
    float p; /* 0 <= p < 1 */
    uint64_t key;
    const uint64_t *row; /* [N] */
};

/* y[N, C] = residual + kept(x) * (1 / (1 - p) rounded to float32); residual or NULL (then 0). In
 * place allowed for both. The gradient with respect to x is the same call on dy without residual.
 */
EE_WARN_UNUSED enum ee_status ee_dropout(struct ee_ctx *ctx, const struct ee_tensor *y,
                                         const struct ee_tensor *x,
                                         const struct ee_tensor *residual,
                                         const struct ee_dropout *dropout);

/* -- Attention -------------------------------------------------------------------------------- */

/* Row i of a segment sees row j of it iff j <= i and (window == 0 or i - j < window). Scores are
 * scale * q.k, then softcap * tanh(score / softcap) if softcap > 0. */
struct ee_attention_params {
    float scale;
    float softcap;                    /* 0: none */
    int32_t window;                   /* 0: none */
    const struct ee_dropout *dropout; /* on the weights after softmax; channel h * 2^24 + (row of
                                         the key within its segment); or NULL */
};

/* out[N, H, D] and lse[N, H] (log of the sum of exp of the scores, before dropout) for q[N, H, D],
 * k[N, K, D], v[N, K, D], with K dividing H; head h reads key-value head h / (H / K).
 * segment[S + 1] ascends from 0 to N: rows see rows of their own segment only. [threads] */
EE_WARN_UNUSED enum ee_status ee_attention(struct ee_ctx *ctx, const struct ee_tensor *out,
                                           const struct ee_tensor *lse, const struct ee_tensor *q,
                                           const struct ee_tensor *k, const struct ee_tensor *v,
                                           const int32_t *segment, int64_t segments,
                                           const struct ee_attention_params *params);

/* dq, dk, dv = the gradients; they may overlap nothing. out and lse as the forward gave them.
 * [threads] */
EE_WARN_UNUSED enum ee_status
ee_attention_backward(struct ee_ctx *ctx, const struct ee_tensor *dq, const struct ee_tensor *dk,
                      const struct ee_tensor *dv, const struct ee_tensor *dout,
                      const struct ee_tensor *out, const struct ee_tensor *lse,
                      const struct ee_tensor *q, const struct ee_tensor *k,
                      const struct ee_tensor *v, const int32_t *segment, int64_t segments,
                      const struct ee_attention_params *params);

/* Keys and values of one layer for many sequences, in pages of `page` positions (a multiple of 64).
 * Position p of sequence s stands in page table[s * pages_per_sequence + p / page] at
 * k[((page index * heads + head) * page + p % page) * width], v likewise. A contiguous cache is one
 * page a sequence. */
struct ee_kv {
    float *k, *v;
    const int32_t *table; /* [sequences, pages_per_sequence] */
    int64_t sequences, pages_per_sequence;
    int64_t pages; /* in all, for checks */
    int32_t page;
    int32_t heads; /* K */
    int32_t width; /* D */
};

/* Writes k[N, K, D] and v[N, K, D] at (sequence[n], position[n]). */
EE_WARN_UNUSED enum ee_status ee_kv_write(struct ee_ctx *ctx, const struct ee_kv *kv,
                                          const struct ee_tensor *k, const struct ee_tensor *v,
                                          const int32_t *sequence, const int32_t *position);

/* out[N, H, D]: row n attends to the positions 0 .. position[n] of sequence[n] (within the window),
 * all of which are in the cache. Keys are taken in absolute blocks of 64 positions, each block with
 * its own maximum, merged in ascending order. Dropout is not used. [rows] */
EE_WARN_UNUSED enum ee_status ee_attention_rows(struct ee_ctx *ctx, const struct ee_tensor *out,
                                                const struct ee_tensor *q, const struct ee_kv *kv,
                                                const int32_t *sequence, const int32_t *position,
                                                const struct ee_attention_params *params);

/* -- Losses ----------------------------------------------------------------------------------- */

struct ee_loss_params {
    float softcap;     /* of the model, on the raw logits; 0: none */
    float temperature; /* > 0; divides the capped logits */
    bool dynamic;      /* multiplies a row's gradient by its confidence, taken as a constant */
    bool gradient;     /* false: the logits are only read */
};

/* Cross-entropy of logits[N, V] against target[n]. loss[n] = -log softmax(z)[target], with
 * z = softcap(logits) / temperature; confidence[n] = max softmax(z). Rows with target < 0 are
 * ignored: loss, confidence and gradient are 0. With `gradient`, logits are replaced by
 * row_weight[n] * (dynamic ? confidence[n] : 1) * d loss[n] / d logits. loss, confidence,
 * row_weight: [N]. Targets >= V are EE_ERR_INVALID. [rows] */
EE_WARN_UNUSED enum ee_status ee_cross_entropy(struct ee_ctx *ctx, const struct ee_tensor *loss,
                                               const struct ee_tensor *confidence,
                                               const struct ee_tensor *logits,
                                               const int32_t *target,
                                               const struct ee_tensor *row_weight,
                                               const struct ee_loss_params *params);

/* The exit decision of rows of logits[N, V] (capped already): token[n] = the smallest index of the
 * largest logit; confidence[n] = its softmax probability; lse[n] = log sum exp(logits). Rows with a
 * NaN or +infinity get confidence NaN. [rows] */
EE_WARN_UNUSED enum ee_status ee_confidence(struct ee_ctx *ctx, int32_t *token,
                                            const struct ee_tensor *confidence,
                                            const struct ee_tensor *lse,
                                            const struct ee_tensor *logits);

/* -- Parameters ------------------------------------------------------------------------------- */

/* *sum = sum of x * x in float64, of a contiguous tensor. Independent of the number of threads. */
EE_WARN_UNUSED enum ee_status ee_sum_squares(struct ee_ctx *ctx, double *sum,
                                             const struct ee_tensor *x);

/* AdamW (Loshchilov and Hutter, 2019), as PyTorch computes it. */
struct ee_adamw_params {
    double learning_rate, beta1, beta2, eps, weight_decay; /* 1 - beta must not be rounded twice */
    float gradient_scale; /* the gradient is multiplied by this first (clipping) */
    int64_t step;         /* from 1 */
};

/* One pass: scales the gradient, updates m, v and p, and sets the gradient to zero. All four are
 * contiguous and of equal size. p -= lr * weight_decay * p first; then
 * p -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps). */
EE_WARN_UNUSED enum ee_status ee_adamw(struct ee_ctx *ctx, const struct ee_tensor *p,
                                       const struct ee_tensor *m, const struct ee_tensor *v,
                                       const struct ee_tensor *gradient,
                                       const struct ee_adamw_params *params);

/* x[i] = mean + std * (the i-th number of the standard normal stream `key`), contiguous x:
 * Box-Muller on the words w of Philox(key, 0, i / 4) in float64. Words 0 and 1 give elements 4j and
 * 4j + 1, words 2 and 3 the next two: radius sqrt(-2 ln((w + 1) / 2^32)) of the first word times
 * the cosine, then the sine, of 2 pi w / 2^32 of the second. std 0 fills with the mean. */
EE_WARN_UNUSED enum ee_status ee_normal(struct ee_ctx *ctx, const struct ee_tensor *x, float mean,
                                        float std, uint64_t key);

/* Converts between float32, bfloat16 and float16, contiguous, equal numbers of elements; to a
 * narrower type rounds to nearest even, NaN stays NaN. */
EE_WARN_UNUSED enum ee_status ee_convert(struct ee_ctx *ctx, const struct ee_tensor *out,
                                         const struct ee_tensor *in);

/* -- The table -------------------------------------------------------------------------------- */

#define EE_OPS(X)                                                                                  \
    X(linear)                                                                                      \
    X(linear_backward_input)                                                                       \
    X(linear_backward_weight)                                                                      \
    X(weight_pack)                                                                                 \
    X(norm)                                                                                        \
    X(norm_backward)                                                                               \
    X(activation)                                                                                  \
    X(activation_backward)                                                                         \
    X(softcap)                                                                                     \
    X(add)                                                                                         \
    X(rotate)                                                                                      \
    X(embed)                                                                                       \
    X(embed_backward)                                                                              \
    X(dropout)                                                                                     \
    X(attention)                                                                                   \
    X(attention_backward)                                                                          \
    X(kv_write)                                                                                    \
    X(attention_rows)                                                                              \
    X(cross_entropy)                                                                               \
    X(confidence)                                                                                  \
    X(sum_squares)                                                                                 \
    X(adamw)                                                                                       \
    X(normal)                                                                                      \
    X(convert)

struct ee_ops {
    const char *name; /* "cpu plain", "cpu avx2", "cpu avx512" */
#define EE_OPS_POINTER(op) __typeof__(ee_##op) *op;
    EE_OPS(EE_OPS_POINTER)
#undef EE_OPS_POINTER
};

EE_EXTERN_C_END

#endif
