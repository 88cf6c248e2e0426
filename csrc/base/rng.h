/* Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy
 * as 1, 2, 3", SC 2011). The n-th number of a stream is a pure function of (key, counter), so that
 * it depends on no order, thread, rank or layout. */
#ifndef EE_RNG_H
#define EE_RNG_H

#include "base/base.h"

struct ee_philox {
    uint32_t word[4];
};

static inline struct ee_philox ee_philox(uint64_t key, uint64_t counter_high, uint64_t counter) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32);
    uint32_t c2 = (uint32_t)counter_high, c3 = (uint32_t)(counter_high >> 32);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    struct ee_philox out = {{c0, c1, c2, c3}};
    return out;
}

/* [0, 1) with 24 bits, exact in float. */
static inline float ee_uniform_from_bits(uint32_t bits) {
    return (float)(bits >> 8) * 0x1p-24f;
}

/* Mixes two words into one 64-bit key (the finaliser of MurmurHash3), to derive the key of a stream
 * from a seed and the hash of a name. */
static inline uint64_t ee_mix(uint64_t a, uint64_t b) {
    uint64_t x = a * 0x9E3779B97F4A7C15ull + b;
    x ^= x >> 33;
    x *= 0xFF51AFD7ED558CCDull;
    x ^= x >> 33;
    x *= 0xC4CEB9FE1A85EC53ull;
    x ^= x >> 33;
    return x;
}

/* FNV-1a hash of a zero-terminated name. */
static inline uint64_t ee_hash_name(const char *name) {
    uint64_t hash = 0xCBF29CE484222325ull;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001B3ull;
    return hash;
}

#endif
