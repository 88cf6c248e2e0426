#include "infer/sampler.h"

#include "base/rng.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    BLOCK = 64,  /* weights made, or added up, at a time */
    PASSES = 10, /* over the vocabulary, to enclose where it is cut */
};

static enum ee_status check_bias(const struct ee_sampling *s, int32_t vocab) {
    if (s->bias_count < 0 || s->bias_count > vocab)
        EE_FAIL(EE_ERR_INVALID,
                "logit_bias must have between 0 and %d entries, one a token at most, got %lld",
                vocab, (long long)s->bias_count);
    bool ascending = true;
    for (int64_t i = 0; i < s->bias_count; i++) {
        int32_t token = s->bias[i].token;
        if (token < 0 || token >= vocab)
            EE_FAIL(EE_ERR_INVALID, "logit_bias: tokens must lie between 0 and %d, got %d",
                    vocab - 1, token);
        if (!(fabsf(s->bias[i].bias) <= 1e6f))
            EE_FAIL(EE_ERR_INVALID,
                    "logit_bias of token %d must lie between -1e6 and 1e6, got %g; -1e6 keeps a "
                    "token out",
                    token, (double)s->bias[i].bias);
        ascending &= i == 0 || token > s->bias[i - 1].token;
    }
    for (int64_t i = 0; i < s->bias_count && !ascending; i++)
        for (int64_t j = 0; j < i; j++)
            if (s->bias[i].token == s->bias[j].token)
                EE_FAIL(EE_ERR_INVALID,
                        "logit_bias must name a token once, token %d stands in it "
                        "twice; add the two up",
                        s->bias[i].token);
    return EE_OK;
}

static enum ee_status check_penalties(const struct ee_sampling *s) {
    if (!(s->repetition_penalty > 0 && s->repetition_penalty <= FLT_MAX))
        EE_FAIL(EE_ERR_INVALID,
                "repetition_penalty must be above 0 and finite (1: none), got %g; above 1 it "
                "hinders repetition",
                (double)s->repetition_penalty);
    if (!(fabsf(s->presence_penalty) <= 100))
        EE_FAIL(EE_ERR_INVALID, "presence_penalty must lie between -100 and 100 (0: none), got %g",
                (double)s->presence_penalty);
    if (!(fabsf(s->frequency_penalty) <= 100))
        EE_FAIL(EE_ERR_INVALID, "frequency_penalty must lie between -100 and 100 (0: none), got %g",
                (double)s->frequency_penalty);
    return EE_OK;
}

enum ee_status ee_sampling_check(const struct ee_sampling *s, int32_t vocab) {
    EE_TRY(check_bias(s, vocab));
    EE_TRY(check_penalties(s));
    if (!(s->temperature >= 0 && s->temperature <= 1e6f))
        EE_FAIL(EE_ERR_INVALID,
                "temperature must lie between 0 (always the likeliest token) and 1e6, got %g",
                (double)s->temperature);
    if (s->top_k < 0)
        EE_FAIL(EE_ERR_INVALID, "top_k must be positive, or 0 for no limit, got %d", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        EE_FAIL(EE_ERR_INVALID, "top_p must lie above 0 and at most at 1 (no limit), got %g",
                (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        EE_FAIL(EE_ERR_INVALID, "min_p must lie between 0 (no limit) and 1, got %g",
                (double)s->min_p);
    return EE_OK;
}

static enum ee_status take_all(struct ee_sampler *s) {
    void *memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->logits));
    s->logits = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->weights));
    s->weights = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->draft_weights));
    s->draft_weights = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->order));
    s->order = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->seen));
    s->seen = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->vocab, sizeof *s->count));
    s->count = memory;
    return EE_OK;
}

enum ee_status ee_sampler_create(struct ee_sampler *sampler, int32_t vocab) {
    *sampler = (struct ee_sampler){.vocab = vocab};
    ee_arena_init(&sampler->arena, "the memory for choosing tokens");
    EE_TRY(take_all(sampler));
    EE_TRY(ee_arena_bind(&sampler->arena, 0));
    return take_all(sampler);
}

void ee_sampler_free(struct ee_sampler *sampler) {
    ee_arena_free(&sampler->arena);
    *sampler = (struct ee_sampler){.arena = sampler->arena};
}

double ee_sampling_uniform(const struct ee_sampling *s, int64_t position,
                           enum ee_random_purpose purpose) {
    struct ee_philox bits =
        ee_philox(ee_mix(s->seed, s->sample), (uint64_t)purpose, (uint64_t)position);
    uint64_t word = (uint64_t)bits.word[0] << 21 ^ bits.word[1] >> 11;
    return (double)word * 0x1p-53;
}

static bool has_penalties(const struct ee_sampling *s, const struct ee_history *h) {
    bool of_written = s->presence_penalty != 0 || s->frequency_penalty != 0;
    return (s->repetition_penalty != 1 && h->count > 0) ||
           (of_written && h->count > h->prompt_count);
}

static bool leaves_logits(const struct ee_sampling *s, const struct ee_history *h) {
    return s->bias_count == 0 && h->banned_count == 0 && !has_penalties(s, h);
}

bool ee_sampling_plain(const struct ee_sampling *sampling, const struct ee_history *history) {
    return sampling->temperature == 0 && leaves_logits(sampling, history);
}

/* Finite logits stay finite. */
static float repeated(float logit, float penalty) {
    float result = logit > 0 ? logit / penalty : logit * penalty;
    return isinf(result) && !isinf(logit) ? copysignf(FLT_MAX, logit) : result;
}

/* Walks the text, not the vocabulary; the second walk leaves `seen` and `count` zero again. */
static void penalise(struct ee_sampler *sampler, const struct ee_sampling *s,
                     const struct ee_history *h) {
    float *logits = sampler->logits;
    int32_t *seen = sampler->seen, *count = sampler->count;
    for (int64_t i = 0; i < h->count; i++) {
        int32_t token = h->tokens[i];
        if (!seen[token])
            logits[token] = repeated(logits[token], s->repetition_penalty);
        seen[token] = 1;
        count[token] += i >= h->prompt_count;
    }
    for (int64_t i = 0; i < h->count; i++) {
        int32_t token = h->tokens[i];
        if (count[token] > 0) {
            logits[token] -= s->frequency_penalty * (float)count[token];
            logits[token] -= s->presence_penalty;
        }
        seen[token] = count[token] = 0;
    }
}

const float *ee_sampler_adjust(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                               const float *logits, const struct ee_history *history) {
    if (leaves_logits(sampling, history))
        return logits;
    memcpy(sampler->logits, logits, (size_t)sampler->vocab * sizeof *logits);
    for (int64_t i = 0; i < sampling->bias_count; i++)
        sampler->logits[sampling->bias[i].token] += sampling->bias[i].bias;
    if (has_penalties(sampling, history))
        penalise(sampler, sampling, history);
    for (int64_t i = 0; i < history->banned_count; i++)
        sampler->logits[history->banned[i]] = -INFINITY;
    return sampler->logits;
}

static float largest_of(const float *logits, int32_t vocab) {
    float lanes[16];
    for (int j = 0; j < 16; j++)
        lanes[j] = -INFINITY;
    int32_t i = 0;
    for (; i + 16 <= vocab; i += 16)
        for (int j = 0; j < 16; j++)
            lanes[j] = logits[i + j] > lanes[j] ? logits[i + j] : lanes[j];
    for (; i < vocab; i++)
        lanes[0] = logits[i] > lanes[0] ? logits[i] : lanes[0];
    float largest = lanes[0];
    for (int j = 1; j < 16; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    return largest;
}

/* e^x for x <= 0 within a factor of 1 +- 1e-15, in plain IEEE arithmetic, so that every machine
 * samples the same token: x = n ln 2 + r with |r| <= ln 2 / 2 (n times the first part of ln 2 is
 * exact), a Taylor polynomial for e^r, and 2^n put together from its bits, which adding 1.5 * 2^52
 * moves to the end of the word. Below the range of normal numbers it gives 0. Without a branch or
 * a call, so that compilers make vectors of it. */
static inline double exp_negative(double x) {
    double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
    double n = shifted - 0x1.8p52;
    double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    static const double even_terms[] = {1,           1.0 / 2,       1.0 / 24,       1.0 / 720,
                                        1.0 / 40320, 1.0 / 3628800, 1.0 / 479001600};
    static const double odd_terms[] = {1,          1.0 / 6,      1.0 / 120,
                                       1.0 / 5040, 1.0 / 362880, 1.0 / 39916800};
    double square = r * r, even = even_terms[6], odd = odd_terms[5];
    for (int k = 5; k >= 0; k--)
        even = even * square + even_terms[k];
    for (int k = 4; k >= 0; k--)
        odd = odd * square + odd_terms[k];
    double sum = odd * r + even;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return x > -708.0 ? sum * power : 0.0;
}

/* Tokens are kept in descending order of logits, equal ones in ascending order of tokens, up to and
 * with the last one. */
struct cut {
    float logit;
    int32_t token;
};

static inline bool before(float a_logit, int32_t a, float b_logit, int32_t b) {
    return (a_logit > b_logit) | ((a_logit == b_logit) & (a < b));
}

/* Of a block, in 8 fixed lanes: fast, and equal on every machine. */
static double sum_block(const double *weights, int32_t n) {
    double lanes[8] = {0};
    int32_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            lanes[j] += weights[i + j];
    for (int j = 0; i + j < n; j++)
        lanes[j] += weights[i + j];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
           ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* What all tokens with a logit above `limit` have of `mass` (NULL: 1 each). */
static double mass_above(const float *logits, const double *mass, int32_t vocab, float limit) {
    if (!mass) {
        int32_t count = 0;
        for (int32_t i = 0; i < vocab; i++)
            count += logits[i] > limit;
        return count;
    }
    double sum = 0;
    for (int32_t start = 0; start < vocab; start += BLOCK) {
        int32_t size = (int32_t)ee_min(BLOCK, vocab - start);
        double x[BLOCK];
        for (int32_t i = 0; i < size; i++) {
            double logit = (double)logits[start + i], one = mass[start + i];
            x[i] = logit > (double)limit ? one : 0;
        }
        sum += sum_block(x, size);
    }
    return sum;
}

/* The first place in the order at which the sum of `mass` (NULL: 1 each) reaches the target, among
 * n candidates in ascending order of tokens, which are lost; `reached` by those before them. Each
 * round keeps the side of a pivot where that place is, as in quickselect. */
static struct cut select_cut(const float *logits, const double *mass, int32_t *candidates,
                             int32_t n, double reached, double target) {
    for (;;) {
        int32_t pivot = candidates[ee_mix((uint64_t)n, 0) % (uint64_t)n];
        struct cut cut = {logits[pivot], pivot};
        double sum = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t token = candidates[i];
            double is_before = before(logits[token], token, cut.logit, pivot);
            sum += mass ? is_before * mass[token] : is_before;
        }
        bool inside = reached + sum >= target;
        if (!inside) {
            reached += sum + (mass ? mass[pivot] : 1);
            if (reached >= target)
                return cut;
        }
        int32_t left = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t token = candidates[i];
            candidates[left] = token;
            left += (token != pivot) & (before(logits[token], token, cut.logit, pivot) == inside);
        }
        if (left == 0) /* all of them together stay below the target by rounding */
            return cut;
        n = left;
    }
}

/* That place among all tokens. A few passes over the vocabulary, fast because they are plain,
 * enclose its logit: with steps that double from the largest logit down, then by halving. */
static struct cut find_cut(const float *logits, const double *mass, int32_t vocab, float largest,
                           float step, double target, int32_t *order) {
    float low = -INFINITY, high = largest; /* low < logit of the cut <= high */
    double reached = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        float middle = isinf(low) ? high - step : low + (high - low) / 2;
        if (!(middle > low && middle < high))
            break;
        double sum = mass_above(logits, mass, vocab, middle);
        if (sum >= target) {
            low = middle;
        } else {
            high = middle;
            reached = sum;
            step *= 2;
        }
    }
    int32_t n = 0;
    for (int32_t i = 0; i < vocab; i++) {
        order[n] = i;
        n += (logits[i] <= high) & ((logits[i] > low) | isinf(low));
    }
    return select_cut(logits, mass, order, n, reached, target);
}

/* weights = e^((logit - largest) / temperature) of the tokens that are kept, 0 of others; returns
 * their sum. */
static double exponentiate(const float *logits, int32_t vocab, float largest, struct cut cut,
                           float temperature, double *weights) {
    double scale = 1 / (double)temperature, sum = 0;
    for (int32_t start = 0; start < vocab; start += BLOCK) {
        int32_t size = (int32_t)ee_min(BLOCK, vocab - start);
        const float *block = logits + start;
        double *x = weights + start;
        int any = 0;
        for (int32_t i = 0; i < size; i++)
            any |= block[i] >= cut.logit;
        if (!any) {
            memset(x, 0, (size_t)size * sizeof *x);
            continue;
        }
        for (int32_t i = 0; i < size; i++) {
            bool kept = !before(cut.logit, cut.token, block[i], start + i);
            x[i] = kept ? ((double)block[i] - (double)largest) * scale : -INFINITY;
        }
        for (int32_t i = 0; i < size; i++)
            x[i] = exp_negative(x[i]);
        sum += sum_block(x, size);
    }
    return sum;
}

double ee_sampler_weigh(struct ee_sampler *sampler, const struct ee_sampling *s,
                        const float *adjusted, double *weights) {
    int32_t vocab = sampler->vocab;
    float largest = largest_of(adjusted, vocab);
    struct cut all = {-INFINITY, vocab}, cut = all;
    if (s->top_k > 0 && s->top_k < vocab)
        cut = find_cut(adjusted, NULL, vocab, largest, 1, s->top_k, sampler->order);
    double sum = exponentiate(adjusted, vocab, largest, cut, s->temperature, weights);
    if (s->top_p >= 1 && s->min_p <= 0)
        return sum;
    cut = all;
    if (s->top_p < 1) {
        double limit = sum * (double)s->top_p;
        cut = find_cut(adjusted, weights, vocab, largest, s->temperature, limit, sampler->order);
    }
    sum = 0;
    for (int32_t start = 0; start < vocab; start += BLOCK) {
        int32_t size = (int32_t)ee_min(BLOCK, vocab - start);
        for (int32_t i = start; i < start + size; i++) {
            /* The likeliest token has weight 1. */
            bool out =
                before(cut.logit, cut.token, adjusted[i], i) | (weights[i] < (double)s->min_p);
            weights[i] = out ? 0 : weights[i];
        }
        sum += sum_block(weights + start, size);
    }
    return sum;
}

int32_t ee_sampler_draw(const double *weights, int32_t vocab, double total, double u) {
    double limit = u * total, sum = 0;
    int32_t i = 0;
    for (; i + BLOCK <= vocab; i += BLOCK) {
        double next = sum + sum_block(weights + i, BLOCK);
        if (next > limit)
            break;
        sum = next;
    }
    for (; i < vocab; i++) {
        sum += weights[i];
        if (sum > limit)
            return i;
    }
    while (--i > 0 && weights[i] <= 0)
        continue;
    return i;
}

static int32_t largest_token(const float *logits, int32_t vocab) {
    float largest = largest_of(logits, vocab);
    int32_t token = 0;
    while (token < vocab - 1 && logits[token] != largest)
        token++;
    return token;
}

int32_t ee_sampler_choose(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                          const float *logits, const struct ee_history *history,
                          enum ee_random_purpose purpose) {
    const float *adjusted = ee_sampler_adjust(sampler, sampling, logits, history);
    if (sampling->temperature == 0)
        return largest_token(adjusted, sampler->vocab);
    double total = ee_sampler_weigh(sampler, sampling, adjusted, sampler->weights);
    double u = ee_sampling_uniform(sampling, history->count, purpose);
    return ee_sampler_draw(sampler->weights, sampler->vocab, total, u);
}

/* q = what p / p_sum exceeds q / q_sum by, times both sums; returns the sum of that. */
static double subtract(double *q, const double *p, double p_sum, double q_sum, int32_t vocab) {
    double total = 0;
    for (int32_t start = 0; start < vocab; start += BLOCK) {
        int32_t size = (int32_t)ee_min(BLOCK, vocab - start);
        for (int32_t i = start; i < start + size; i++) {
            double excess = p[i] * q_sum - q[i] * p_sum;
            q[i] = excess > 0 ? excess : 0;
        }
        total += sum_block(q + start, size);
    }
    return total;
}

bool ee_sampler_verify(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                       const float *logits, const float *draft_logits, int32_t draft,
                       const struct ee_history *history, int32_t *token) {
    const float *adjusted = ee_sampler_adjust(sampler, sampling, logits, history);
    if (sampling->temperature == 0) {
        *token = largest_token(adjusted, sampler->vocab);
        return *token == draft;
    }
    double *p = sampler->weights, *q = sampler->draft_weights;
    double p_sum = ee_sampler_weigh(sampler, sampling, adjusted, p);
    adjusted = ee_sampler_adjust(sampler, sampling, draft_logits, history);
    double q_sum = ee_sampler_weigh(sampler, sampling, adjusted, q);
    double u = ee_sampling_uniform(sampling, history->count, EE_RANDOM_ACCEPT);
    *token = draft;
    if (u * (q[draft] * p_sum) < p[draft] * q_sum)
        return true;
    double total = subtract(q, p, p_sum, q_sum, sampler->vocab);
    u = ee_sampling_uniform(sampling, history->count, EE_RANDOM_RESIDUAL);
    /* Rounding can leave nothing where p and q are all but equal. */
    *token = total > 0 ? ee_sampler_draw(q, sampler->vocab, total, u)
                       : ee_sampler_draw(p, sampler->vocab, p_sum, u);
    return false;
}
