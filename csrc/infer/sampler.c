#include "infer/sampler.h"

#include "base/rng.h"

#include <math.h>
#include <string.h>

enum ee_status ee_sampling_check(const struct ee_sampling *s) {
    if (!(s->temperature >= 0 && s->temperature <= 1e6f))
        EE_FAIL(EE_ERR_INVALID,
                "temperature must lie between 0 (always the likeliest token) and 1e6, got %g",
                (double)s->temperature);
    if (s->top_k < 0)
        EE_FAIL(EE_ERR_INVALID, "top_k must be positive, or 0 for no limit, got %d", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        EE_FAIL(EE_ERR_INVALID, "top_p must lie above 0 and at most at 1 (no limit), got %g",
                (double)s->top_p);
    return EE_OK;
}

double ee_sampling_uniform(const struct ee_sampling *s, int64_t position,
                           enum ee_random_purpose purpose) {
    struct ee_philox bits =
        ee_philox(ee_mix(s->seed, s->sample), (uint64_t)purpose, (uint64_t)position);
    uint64_t word = (uint64_t)bits.word[0] << 21 ^ bits.word[1] >> 11;
    return (double)word * 0x1p-53;
}

/* e^x for x <= 0 in plain IEEE arithmetic, so that every machine samples the same token: x = n ln 2
 * + r with |r| <= ln 2 / 2, a Taylor polynomial for e^r, and 2^n put together from its bits. Below
 * the range of normal numbers it gives 0. */
static double exp_negative(double x) {
    if (!(x > -708.0))
        return 0.0;
    double n = rint(x * 0x1.71547652b82fep+0);
    double r = (x - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
    double sum = 1.0;
    for (int k = 13; k >= 1; k--)
        sum = 1.0 + r / k * sum;
    uint64_t bits = (uint64_t)((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* Descending by weight, equal ones ascending by token. */
static bool before(const double *weights, int32_t a, int32_t b) {
    return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
}

/* Restores the heap (first in order on top) below element i. */
static void sift_down(const double *weights, int32_t *heap, int32_t size, int32_t i) {
    int32_t token = heap[i];
    for (int32_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && before(weights, heap[child + 1], heap[child]))
            child++;
        if (before(weights, token, heap[child]))
            break;
        heap[i] = heap[child];
    }
    heap[i] = token;
}

/* Leaves the kept tokens, in order, at the end of order[vocab], and their number. A heap serves:
 * few tokens are kept as a rule. */
static int32_t keep_likeliest(const struct ee_sampling *s, const double *weights, int32_t vocab,
                              int32_t *order, double *total) {
    for (int32_t i = 0; i < vocab; i++)
        order[i] = i;
    for (int32_t i = vocab / 2; i-- > 0;)
        sift_down(weights, order, vocab, i);
    int32_t most = s->top_k > 0 && s->top_k < vocab ? s->top_k : vocab;
    /* top_p refers to what top_k leaves, so its sum comes first. */
    double limit = INFINITY, sum = 0;
    if (s->top_p < 1 && most == vocab) {
        limit = 0;
        for (int32_t i = 0; i < vocab; i++)
            limit += weights[i];
        limit *= (double)s->top_p;
    }
    int32_t kept = 0;
    while (kept < most && sum < limit) {
        int32_t top = order[0], size = vocab - kept - 1;
        order[0] = order[size];
        sift_down(weights, order, size, 0);
        order[size] = top;
        sum += weights[top];
        kept++;
    }
    *total = sum;
    if (s->top_p >= 1 || most == vocab)
        return kept;
    limit = sum * (double)s->top_p;
    sum = 0;
    for (int32_t i = 0; i < kept; i++) {
        sum += weights[order[vocab - 1 - i]];
        if (sum >= limit) {
            kept = i + 1;
            break;
        }
    }
    *total = sum;
    return kept;
}

int32_t ee_sample(const struct ee_sampling *s, int64_t position, const float *logits, int32_t vocab,
                  double *weights, int32_t *order) {
    float largest = -INFINITY;
    for (int32_t i = 0; i < vocab; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    double temperature = (double)s->temperature;
    for (int32_t i = 0; i < vocab; i++)
        weights[i] = exp_negative(((double)logits[i] - (double)largest) / temperature);
    double u = ee_sampling_uniform(s, position, EE_RANDOM_TOKEN), total = 0, sum = 0;
    int32_t last = 0;
    if (s->top_k == 0 && s->top_p >= 1) {
        for (int32_t i = 0; i < vocab; i++)
            total += weights[i];
        for (int32_t i = 0; i < vocab; i++) {
            sum += weights[i];
            last = weights[i] > 0 ? i : last;
            if (sum > u * total)
                return i;
        }
        return last;
    }
    int32_t kept = keep_likeliest(s, weights, vocab, order, &total);
    for (int32_t i = 0; i < kept; i++) {
        last = order[vocab - 1 - i];
        sum += weights[last];
        if (sum > u * total)
            break;
    }
    return last;
}
