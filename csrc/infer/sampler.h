/* Choosing a token from logits: bias, penalties, temperature and truncation make a distribution, a
 * counter-based random number draws from it. Everything is a pure function of the settings, the
 * logits and the text so far; randomness is one of (seed, sample, position, purpose): never of a
 * batch, a slot or an engine. */
#ifndef EE_SAMPLER_H
#define EE_SAMPLER_H

#include "base/arena.h"

EE_EXTERN_C_BEGIN

struct ee_logit_bias {
    int32_t token;
    float bias; /* added to the logit */
};

/* Applied in the order of the fields. */
struct ee_sampling {
    const struct ee_logit_bias *bias; /* each token once */
    int64_t bias_count;
    /* Of tokens that stand in the prompt or were written: logits above 0 are divided by it, others
     * multiplied; > 0, 1: none. */
    float repetition_penalty;
    float presence_penalty;  /* subtracted once from tokens that were written; 0: none */
    float frequency_penalty; /* subtracted for each time that a token was written; 0: none */
    float temperature;       /* divides the logits; 0: the largest logit, no randomness */
    int32_t top_k;           /* keep so many of the largest; 0: all */
    float top_p;             /* then keep the fewest whose probabilities reach this; 1: all */
    float min_p; /* then keep those at least so likely as this part of the likeliest; 0: all */
    uint64_t seed;
    uint64_t sample; /* which of the samples of a prompt this is */
};

/* What a random number is for: part of its counter. */
enum ee_random_purpose {
    EE_RANDOM_TOKEN,    /* a token from the distribution of the exit that it leaves at */
    EE_RANDOM_DRAFT,    /* a draft from an early exit */
    EE_RANDOM_ACCEPT,   /* whether a draft is accepted */
    EE_RANDOM_RESIDUAL, /* a token in place of a draft that was not */
};

/* The text before the token that is to be chosen: the prompt and what was written. The token gets
 * position `count`. */
struct ee_history {
    const int32_t *tokens;
    int64_t count, prompt_count;
    const int32_t *banned; /* tokens that must not come now */
    int64_t banned_count;
};

/* Memory for choosing, for one caller at a time. */
struct ee_sampler {
    struct ee_arena arena;
    int32_t vocab;
    float *logits;                 /* [V] after bias and penalties */
    double *weights;               /* [V] of a distribution, not normalised; 0: left out */
    double *draft_weights;         /* [V] of the distribution that a draft came from */
    int32_t *order, *seen, *count; /* [V] */
};

EE_WARN_UNUSED enum ee_status ee_sampling_check(const struct ee_sampling *sampling, int32_t vocab);

EE_WARN_UNUSED enum ee_status ee_sampler_create(struct ee_sampler *sampler, int32_t vocab);
void ee_sampler_free(struct ee_sampler *sampler);

/* The number of (sampling, position, purpose), in [0, 1) with 53 bits. */
double ee_sampling_uniform(const struct ee_sampling *sampling, int64_t position,
                           enum ee_random_purpose purpose);

/* Whether the choice is that of the largest raw logit, whatever the logits. */
bool ee_sampling_plain(const struct ee_sampling *sampling, const struct ee_history *history);

/* Bias, penalties and bans: the logits that temperature and truncation start from, in
 * sampler->logits, or `logits` itself where there is nothing to do. */
const float *ee_sampler_adjust(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                               const float *logits, const struct ee_history *history);

/* The distribution at a temperature > 0 of adjusted logits: weights[V], 0 for tokens left out, and
 * their sum, block by block of tokens in a fixed order. Equal on every machine. All logits are
 * finite or -infinity, and one at least is finite. */
double ee_sampler_weigh(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                        const float *adjusted, double *weights);

/* The token at which the sum of weights[V], blocks of tokens ascending, first exceeds u * total;
 * the last one with a weight where rounding leaves none. */
int32_t ee_sampler_draw(const double *weights, int32_t vocab, double total, double u);

/* The token that follows: the largest adjusted logit (the smallest token of equal ones) at
 * temperature 0, else a draw for `purpose`. logits[V] are raw. */
int32_t ee_sampler_choose(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                          const float *logits, const struct ee_history *history,
                          enum ee_random_purpose purpose);

/* Speculative sampling (Leviathan et al., 2023): *token = the draft, and true, with probability
 * min(1, p / q) of it; else a draw from what p exceeds q by, and false. p and q are the
 * distributions of logits and draft_logits [V], raw, under the same settings and history; the draft
 * is ee_sampler_choose's of draft_logits for EE_RANDOM_DRAFT. The token has then exactly
 * distribution p. At temperature 0 it is the choice from `logits`. */
bool ee_sampler_verify(struct ee_sampler *sampler, const struct ee_sampling *sampling,
                       const float *logits, const float *draft_logits, int32_t draft,
                       const struct ee_history *history, int32_t *token);

EE_EXTERN_C_END

#endif
