#include "train/ties.h"

#include "base/alloc.h"

#include <string.h>

/* Elements of a message. */
#define PIECE ((int64_t)1 << 18)

/* A term of a sum: the rank that has it, and there the row of the gradients. */
struct term {
    int32_t rank, row;
};

/* The terms of a row, in the order in which they are added. */
static int32_t list_terms(const struct ee_model *model, int32_t row,
                          struct term terms[EE_MAX_USES]) {
    const struct ee_params *params = model->params;
    int32_t count = 0;
    for (int32_t use = 0; use < EE_USE_EXIT + params->exits; use++) {
        if (!ee_param_has_use(params, row, use))
            continue;
        int32_t rank = ee_layout_rank(model->layout, ee_use_chunk(model->layout, use));
        bool known = false;
        for (int32_t i = 0; i < count; i++)
            known = known || terms[i].rank == rank;
        if (!known || model->exact_ties)
            terms[count++] = (struct term){rank, ee_use_gradient(params, row, use)};
    }
    return count;
}

enum ee_status ee_ties_create(struct ee_ties **out, const struct ee_model *model,
                              struct ee_comm *comm) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_ties), "the sums of tied gradients"));
    struct ee_ties *ties = memory;
    ties->model = model;
    ties->comm = comm;
    enum ee_status status = ee_alloc(&memory, PIECE * sizeof(float), "the sums of tied gradients");
    if (status != EE_OK) {
        ee_free(ties);
        return status;
    }
    ties->buffer = memory;
    *out = ties;
    return EE_OK;
}

void ee_ties_destroy(struct ee_ties *ties) {
    if (!ties)
        return;
    ee_free(ties->buffer);
    ee_free(ties);
}

static enum ee_status exchange(const struct ee_ties *ties, enum ee_direction direction,
                               int32_t peer, int32_t tag, float *data, int64_t count) {
    struct ee_message message = {direction,
                                 peer,
                                 tag,
                                 data,
                                 (size_t)count * sizeof(float),
                                 {"gradient of tied parameter", tag}};
    return ee_comm_exchange(ties->comm, &message, 1);
}

static void add(float *sum, const float *term, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        sum[i] += term[i];
}

/* The elements [first, first + count) of a row: sums[] points to where this rank's terms lie. */
static enum ee_status sum_piece(const struct ee_ties *ties, int32_t row, const struct term *terms,
                                int32_t count, float *gradient, int64_t first, int64_t elements) {
    const struct ee_params *params = ties->model->params;
    int32_t me = ties->comm->rank, owner = terms[0].rank;
    float *sum = gradient + params->rows[row].offset + first;
    for (int32_t i = me == owner ? 1 : 0; i < count; i++) {
        float *mine = gradient + params->rows[terms[i].row].offset + first;
        if (me == owner && terms[i].rank != me) {
            EE_TRY(exchange(ties, EE_RECEIVE, terms[i].rank, row, ties->buffer, elements));
            add(sum, ties->buffer, elements);
        } else if (me == owner) {
            add(sum, mine, elements);
        } else if (terms[i].rank == me) {
            EE_TRY(exchange(ties, EE_SEND, owner, row, mine, elements));
        }
    }
    if (me != owner)
        return exchange(ties, EE_RECEIVE, owner, row, sum, elements);
    for (int32_t i = 1; i < count; i++) {
        bool again = false;
        for (int32_t j = 0; j < i; j++)
            again = again || terms[j].rank == terms[i].rank;
        if (!again)
            EE_TRY(exchange(ties, EE_SEND, terms[i].rank, row, sum, elements));
    }
    return EE_OK;
}

enum ee_status ee_ties_sum(struct ee_ties *ties, float *gradient) {
    const struct ee_params *params = ties->model->params;
    for (int32_t row = 0; row < params->count; row++) {
        const struct ee_param *param = &params->rows[row];
        struct term terms[EE_MAX_USES];
        if (!param->tied || !param->held || param->frozen)
            continue;
        int32_t count = list_terms(ties->model, row, terms);
        int64_t elements = param->shape[0] * param->shape[1];
        for (int64_t first = 0; first < elements && count > 1; first += PIECE)
            EE_TRY(sum_piece(ties, row, terms, count, gradient, first,
                             ee_min(PIECE, elements - first)));
    }
    memset(gradient + params->elements, 0,
           (size_t)(params->gradient_elements - params->elements) * sizeof(float));
    return EE_OK;
}
