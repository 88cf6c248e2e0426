/* The optimizer over the flat arenas: gradient norm, clipping and AdamW, by the parameter table. */
#ifndef EE_OPTIM_H
#define EE_OPTIM_H

#include "model/model.h"

EE_EXTERN_C_BEGIN

/* sums[count of rows] = sum of squares of each tensor's gradient in float64, 0 for those that this
 * rank does not own. Added in table order they give the square of the gradient norm. */
EE_WARN_UNUSED enum ee_status ee_optim_sum_squares(const struct ee_model *model,
                                                   const float *gradient, double *sums);

/* AdamW on every parameter that is not frozen; weight decay where the table says so. Gradients are
 * zeroed. */
EE_WARN_UNUSED enum ee_status ee_optim_adamw(const struct ee_model *model, float *gradient,
                                             float *moment1, float *moment2,
                                             const struct ee_adamw_params *params);

EE_EXTERN_C_END

#endif
