/* Choosing a token from logits. Randomness is a pure function of (seed, sample, position): never of
 * a batch, a slot or an engine. */
#ifndef EE_SAMPLER_H
#define EE_SAMPLER_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

struct ee_sampling {
    float temperature; /* 0: the largest logit */
    int32_t top_k;     /* keep so many of the largest; 0: all */
    float top_p;       /* then keep the fewest whose probabilities reach this; 1: all */
    uint64_t seed;
    uint64_t sample; /* which of the samples of a prompt this is */
};

/* What a random number is for: part of its counter. */
enum ee_random_purpose { EE_RANDOM_TOKEN };

EE_WARN_UNUSED enum ee_status ee_sampling_check(const struct ee_sampling *sampling);

/* The number of (sampling, position, purpose), in [0, 1) with 53 bits. */
double ee_sampling_uniform(const struct ee_sampling *sampling, int64_t position,
                           enum ee_random_purpose purpose);

/* A token of logits[vocab] for a temperature > 0. `weights` and `order` have room for vocab
 * elements. All logits are finite or -infinity, and one at least is finite. */
int32_t ee_sample(const struct ee_sampling *sampling, int64_t position, const float *logits,
                  int32_t vocab, double *weights, int32_t *order);

EE_EXTERN_C_END

#endif
