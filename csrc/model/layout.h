/* Which layers and exits of a model each chunk of a pipeline holds, and so which parameters each
 * rank has.
 *
 * Chunk g of G = ranks x chunks lies on rank g % ranks, as its chunk g / ranks. The first chunk of
 * the model embeds tokens, the last one has the final exit. */
#ifndef EE_LAYOUT_H
#define EE_LAYOUT_H

#include "model/config.h"

EE_EXTERN_C_BEGIN

struct ee_stage {
    int32_t first_layer, last_layer; /* [first, last) */
    bool embeds;                     /* the first chunk of the model */
    bool exit[EE_MAX_EXITS + 1];     /* the exits that it holds, the final one last */
};

struct ee_model_layout {
    int32_t ranks, chunks;   /* P, v */
    struct ee_stage *stages; /* [P v], in the order of the model */
};

/* What part of a model a rank has; all zero: the whole of it. */
struct ee_part {
    int32_t ranks, chunks, rank;
    const int32_t *bounds; /* as ee_layout_create takes it */
    bool earlier_edge;
    /* Each use of a parameter that is used in several places has a gradient of its own, so that
     * their sum has the same bits in every layout. */
    bool exact_ties;
};

/* bounds[P v + 1]: chunk g has layers [bounds[g], bounds[g + 1]), at least one. An exit between two
 * chunks belongs to the later one, or with `earlier_edge` to the earlier one. bounds NULL: equal
 * shares. Refused: more chunks than layers, bounds that do not ascend from 0 to L. */
EE_WARN_UNUSED enum ee_status ee_layout_create(struct ee_model_layout **out,
                                               const struct ee_config *config, int32_t ranks,
                                               int32_t chunks, const int32_t *bounds,
                                               bool earlier_edge);
void ee_layout_destroy(struct ee_model_layout *layout);

static inline int32_t ee_layout_rank(const struct ee_model_layout *layout, int32_t chunk) {
    return chunk % layout->ranks;
}

EE_EXTERN_C_END

#endif
