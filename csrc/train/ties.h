/* Gradients of parameters that are used in several places: summed over the uses and the ranks. */
#ifndef EE_TIES_H
#define EE_TIES_H

#include "comm/comm.h"
#include "model/model.h"

EE_EXTERN_C_BEGIN

struct ee_ties {
    const struct ee_model *model;
    struct ee_comm *comm; /* the ranks of the pipeline, in order */
    float *buffer;        /* of the pieces that are received */
};

EE_WARN_UNUSED enum ee_status ee_ties_create(struct ee_ties **out, const struct ee_model *model,
                                             struct ee_comm *comm);
void ee_ties_destroy(struct ee_ties *ties);

/* A collective: for every tied parameter, the rank that uses it first adds the gradients up, and
 * all that hold the parameter get the sum. With exact ties the terms are those of the single uses,
 * in their order (EE_USE_EMBEDDING first), whatever rank they come from; else those of the ranks,
 * in the order of their first uses. Gradients of further uses are zero afterwards. */
EE_WARN_UNUSED enum ee_status ee_ties_sum(struct ee_ties *ties, float *gradient);

EE_EXTERN_C_END

#endif
