#include "train/schedule.h"

#include <math.h>
#include <string.h>

static const char *const names[EE_SCHEDULE_KINDS] = {
    [EE_SCHEDULE_GPIPE] = "gpipe",
    [EE_SCHEDULE_1F1B] = "1f1b",
    [EE_SCHEDULE_INTERLEAVED] = "interleaved",
    [EE_SCHEDULE_ZERO_BUBBLE] = "zero_bubble",
};

const char *ee_schedule_name(enum ee_schedule_kind kind) {
    return names[kind];
}

enum ee_status ee_schedule_from_name(enum ee_schedule_kind *kind, const char *name) {
    for (int i = 0; i < EE_SCHEDULE_KINDS; i++) {
        if (strcmp(name, names[i]) == 0) {
            *kind = (enum ee_schedule_kind)i;
            return EE_OK;
        }
    }
    EE_FAIL(EE_ERR_INVALID,
            "unknown schedule '%s' (expected gpipe, 1f1b, interleaved or zero_bubble)", name);
}

static enum ee_status check_fill(const struct ee_schedule_spec *spec) {
    if (spec->fill1 < 0 || spec->fill2 < 0 || spec->fill1 >= spec->ranks + (spec->ranks == 1) ||
        spec->fill2 >= spec->ranks + (spec->ranks == 1))
        EE_FAIL(EE_ERR_INVALID,
                "each part of the bubbles takes 0 to %d microbatches on %d ranks, got %d and %d",
                spec->ranks - 1, spec->ranks, spec->fill1, spec->fill2);
    if (spec->fill1 + spec->fill2 > 0 && spec->kind != EE_SCHEDULE_1F1B)
        EE_FAIL(EE_ERR_INVALID, "bubbles are filled with the schedule 1f1b, got %s",
                names[spec->kind]);
    for (int32_t i = 0; i < spec->fill2; i++) {
        int32_t most = i > 0 ? spec->fill2_depth[i - 1] : spec->ranks;
        if (spec->fill2_depth[i] < 1 || spec->fill2_depth[i] > most)
            EE_FAIL(EE_ERR_INVALID,
                    "backwards of Part 2 run through fewer and fewer ranks: that of microbatch %d "
                    "through 1 to %d, got %d",
                    i, most, spec->fill2_depth[i]);
    }
    return EE_OK;
}

enum ee_status ee_schedule_check(const struct ee_schedule_spec *spec) {
    if (spec->ranks < 1 || spec->ranks > EE_MAX_RANKS)
        EE_FAIL(EE_ERR_INVALID, "a pipeline has 1 to %d ranks, got %d", EE_MAX_RANKS, spec->ranks);
    if (spec->microbatches < 1 || spec->microbatches > EE_MAX_MICROBATCHES)
        EE_FAIL(EE_ERR_INVALID, "a step needs 1 to %d microbatches, got %d", EE_MAX_MICROBATCHES,
                spec->microbatches);
    if (spec->chunks < 1 || spec->chunks > 1024)
        EE_FAIL(EE_ERR_INVALID, "a rank has 1 to 1024 chunks, got %d", spec->chunks);
    if (spec->chunks > 1 && spec->kind != EE_SCHEDULE_INTERLEAVED)
        EE_FAIL(EE_ERR_INVALID,
                "several chunks a rank need the schedule interleaved, got %d with %s", spec->chunks,
                names[spec->kind]);
    return check_fill(spec);
}

int32_t ee_schedule_fill_count(int32_t ranks, double ratio) {
    /* The tiny part keeps exact quotients from being rounded down. */
    return (int32_t)floor((ranks - 1) / (1 / ratio + 1) + 1e-9);
}

int32_t ee_schedule_fill_depth(int32_t ranks, double ratio, int32_t i) {
    return (int32_t)floor(ranks - (i + 1) * (1 / ratio + 1) + 1e-9);
}

/* -- Part 1 of bubble filling -- */

/* The last rank that microbatch i of Part 1 reaches, -1 for none. */
static int32_t fill1_tail(const struct ee_schedule_spec *spec, int32_t i) {
    int32_t tail = spec->fill1 - 1 - i;
    while (tail >= 0 && spec->exit_ranks && !spec->exit_ranks[tail])
        tail--;
    return tail;
}

/* Microbatches of Part 1 that come to a rank: the first ones, as later ones reach less far. */
static int32_t fill1_count(const struct ee_schedule_spec *spec, int32_t rank) {
    int32_t count = 0;
    while (count < spec->fill1 && fill1_tail(spec, count) >= rank)
        count++;
    return count;
}

/* Forwards in their order, then the backwards from the last one back: it turns first. */
static struct ee_step_action fill1_action(const struct ee_schedule_iterator *it, int64_t i) {
    int64_t count = it->fill_count / 2;
    bool forward = i < count;
    int32_t which = (int32_t)(forward ? i : 2 * count - 1 - i);
    bool tail = fill1_tail(it->spec, which) == it->rank;
    uint8_t flags = forward ? EE_STEP_KEEPS : 0;
    if (forward ? it->rank > 0 : !tail)
        flags |= EE_STEP_RECEIVES;
    if (forward ? !tail : it->rank > 0)
        flags |= EE_STEP_SENDS;
    return (struct ee_step_action){forward ? EE_STEP_FORWARD : EE_STEP_BACKWARD, flags, 0,
                                   it->spec->microbatches + which};
}

/* -- Lists -- */

/* Whether the backward of a full or a Part-2 microbatch covers the rank. */
static bool covered(const struct ee_schedule_spec *spec, int32_t rank, int64_t k) {
    int64_t i = k - spec->microbatches;
    return i < 0 || spec->ranks - rank <= spec->fill2_depth[i];
}

/* The next microbatch and chunk. With several chunks, groups of P microbatches go through the
 * chunks one after the other; the last group is padded. */
static inline void advance(const struct ee_schedule_spec *spec, struct ee_schedule_place *place,
                           int32_t *microbatch, int32_t *chunk) {
    *microbatch = place->base + place->within;
    *chunk = place->chunk;
    place->within++;
    if (spec->chunks == 1 || place->within < spec->ranks)
        return;
    place->within = 0;
    if (++place->chunk == spec->chunks) {
        place->chunk = 0;
        place->base += spec->ranks;
    }
}

static inline struct ee_step_action full_action(const struct ee_schedule_iterator *it, uint8_t kind,
                                                int32_t microbatch, int32_t chunk) {
    const struct ee_schedule_spec *spec = it->spec;
    bool first = chunk == 0 && it->rank == 0;
    bool last = chunk == spec->chunks - 1 && it->rank == spec->ranks - 1;
    bool kept = covered(spec, it->rank, microbatch);
    bool below = it->rank > 0 && spec->fill2 > 0 ? covered(spec, it->rank - 1, microbatch) : true;
    uint8_t flags = 0;
    if (kind == EE_STEP_FORWARD)
        flags = (uint8_t)((first ? 0 : EE_STEP_RECEIVES) | (last ? 0 : EE_STEP_SENDS) |
                          (kept ? EE_STEP_KEEPS : 0));
    else if (kind != EE_STEP_BACKWARD_WEIGHT)
        flags = (uint8_t)((last ? 0 : EE_STEP_RECEIVES) | (first || !below ? 0 : EE_STEP_SENDS));
    /* Part 2 is numbered behind Part 1. */
    if (microbatch >= spec->microbatches)
        microbatch += spec->fill1;
    return (struct ee_step_action){kind, flags, (uint16_t)chunk, microbatch};
}

struct ee_schedule_iterator ee_schedule_begin(const struct ee_schedule_spec *spec, int32_t rank) {
    int64_t P = spec->ranks, M = spec->microbatches;
    struct ee_schedule_iterator it = {.spec = spec, .rank = rank};
    it.total = M + spec->fill2;
    it.warmup = P - 1 - rank;
    if (spec->kind == EE_SCHEDULE_GPIPE)
        it.warmup = it.total;
    if (spec->chunks > 1) {
        it.total = ee_ceil_div(M, P) * P * spec->chunks;
        it.warmup = 2 * (P - 1 - rank) + (spec->chunks - 1) * P;
    }
    it.warmup = ee_min(it.warmup, it.total);
    it.fill_count = 2 * fill1_count(spec, rank);
    return it;
}

/* Weight gradients that a rank may leave behind before it takes one up: as many as keep the first
 * rank's number of activations. */
static bool weight_is_due(const struct ee_schedule_iterator *it) {
    int64_t behind = it->backward - it->weight;
    if (it->spec->kind != EE_SCHEDULE_ZERO_BUBBLE || behind == 0)
        return false;
    return it->backward == it->total || behind > it->rank;
}

bool ee_schedule_next(struct ee_schedule_iterator *it, struct ee_step_action *action) {
    const struct ee_schedule_spec *spec = it->spec;
    const bool split = spec->kind == EE_SCHEDULE_ZERO_BUBBLE;
    for (;;) {
        int32_t microbatch, chunk;
        if (weight_is_due(it)) {
            *action = full_action(it, EE_STEP_BACKWARD_WEIGHT, (int32_t)it->weight++, 0);
            return true;
        }
        bool forward = it->forward < it->total && it->forward - it->backward <= it->warmup;
        if (!forward && it->backward == it->total)
            return false;
        if (!forward && it->fill < it->fill_count) {
            *action = fill1_action(it, it->fill++);
            return true;
        }
        advance(spec, forward ? &it->next_forward : &it->next_backward, &microbatch, &chunk);
        if (forward) {
            it->forward++;
        } else {
            it->backward++;
            chunk = spec->chunks - 1 - chunk;
        }
        bool exists = spec->chunks == 1 || microbatch < spec->microbatches;
        if (!exists || (!forward && !covered(spec, it->rank, microbatch)))
            continue;
        uint8_t kind = forward ? EE_STEP_FORWARD
                       : split ? EE_STEP_BACKWARD_INPUT
                               : EE_STEP_BACKWARD;
        *action = full_action(it, kind, microbatch, chunk);
        return true;
    }
}
