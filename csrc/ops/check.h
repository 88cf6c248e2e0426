/* Checks of the arguments of operations.
 *
 * The inline part compares numbers only; text is made in check.c, once something is wrong. The
 * macros return from the calling function ee_<op> with a message like
 * "norm: weight must have C = 64 elements, got float32[32]". */
#ifndef EE_CHECK_H
#define EE_CHECK_H

#include "ops/ops.h"

EE_EXTERN_C_BEGIN

/* A dimension that the tensor itself defines: any size, at least 1 but for the rows. */
#define EE_ANY (-1)

/* True when `tensor` has this shape, with contiguous last dimension, and rows that do not overlap
 * one another. */
static inline bool ee_layout_fits(const struct ee_tensor *tensor, int ndim, const int64_t *shape) {
    if (!tensor || tensor->ndim != ndim)
        return false;
    int64_t extent = 1; /* elements from the first to the last of one index of dimension i */
    bool empty = false;
    for (int i = ndim - 1; i >= 0; i--) {
        int64_t n = tensor->shape[i], stride = tensor->stride[i];
        if (shape[i] == EE_ANY ? n < (i > 0) : n != shape[i])
            return false;
        if (n > 1) {
            if (i == ndim - 1 ? stride != 1 : stride < extent)
                return false;
            extent += (n - 1) * stride;
        }
        empty |= n == 0;
    }
    return empty || tensor->data;
}

/* The same for float32. */
static inline bool ee_tensor_fits(const struct ee_tensor *tensor, int ndim, const int64_t *shape) {
    return tensor && tensor->dtype == EE_F32 && ee_layout_fits(tensor, ndim, shape);
}

/* True when every index lies between `first` and `last`, both included. */
static inline bool ee_indices_fit(const int32_t *index, int64_t n, int32_t first, int32_t last) {
    int bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= (index[i] < first) | (index[i] > last);
    return !bad;
}

/* The messages. `dims` names the dimensions, as in "N, H, D". */
enum ee_status ee_fail_tensor(const char *op, const char *name, const struct ee_tensor *tensor,
                              const char *dims, int ndim, const int64_t *shape);
enum ee_status ee_fail_flat(const char *op, const char *name, const struct ee_tensor *tensor);
enum ee_status ee_fail_indices(const char *op, const char *name, const int32_t *index, int64_t n,
                               int32_t first, int32_t last);

/* `tensor` is float32[...] with the sizes that follow `dims` ("N, C"), in that order. */
#define EE_CHECK_TENSOR(tensor, dims, ...)                                                         \
    do {                                                                                           \
        const int64_t shape_[] = {__VA_ARGS__};                                                    \
        const int ndim_ = (int)(sizeof shape_ / sizeof shape_[0]);                                 \
        if (!ee_tensor_fits(tensor, ndim_, shape_))                                                \
            return ee_fail_tensor(__func__ + 3, #tensor, tensor, dims, ndim_, shape_);             \
    } while (0)

/* The same for an argument that may be NULL. */
#define EE_CHECK_OPTIONAL(tensor, dims, ...)                                                       \
    do {                                                                                           \
        if (tensor)                                                                                \
            EE_CHECK_TENSOR(tensor, dims, __VA_ARGS__);                                            \
    } while (0)

/* `tensor` has the shape of `other`, which was checked. */
#define EE_CHECK_LIKE(tensor, other, dims)                                                         \
    do {                                                                                           \
        if (!ee_tensor_fits(tensor, (other)->ndim, (other)->shape))                                \
            return ee_fail_tensor(__func__ + 3, #tensor, tensor, dims, (other)->ndim,              \
                                  (other)->shape);                                                 \
    } while (0)

/* `tensor` is contiguous, of any rank and dtype. */
#define EE_CHECK_FLAT(tensor)                                                                      \
    do {                                                                                           \
        if (!ee_flat_fits(tensor))                                                                 \
            return ee_fail_flat(__func__ + 3, #tensor, tensor);                                    \
    } while (0)

#define EE_CHECK_FLOAT32(tensor)                                                                   \
    EE_CHECK((tensor)->dtype == EE_F32, "%s must be float32, got %s", #tensor,                     \
             ee_dtype_name((tensor)->dtype))

/* index[n] lies between first and last, both included; not NULL unless n is 0. */
#define EE_CHECK_INDICES(index, n, first, last)                                                    \
    do {                                                                                           \
        if ((n) > 0 && (!(index) || !ee_indices_fit(index, n, first, last)))                       \
            return ee_fail_indices(__func__ + 3, #index, index, n, first, last);                   \
    } while (0)

#define EE_CHECK_NOT_NULL(pointer)                                                                 \
    do {                                                                                           \
        if (!(pointer))                                                                            \
            EE_FAIL(EE_ERR_INVALID, "%s: %s must not be NULL", __func__ + 3, #pointer);            \
    } while (0)

/* A condition and how to say it, with a format: EE_CHECK(p > 0, "p must be > 0, got %g", p). */
#define EE_CHECK(condition, format, ...)                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            EE_FAIL(EE_ERR_INVALID, "%s: " format, __func__ + 3, __VA_ARGS__);                     \
    } while (0)

/* Two tensors that must not be the same memory. Views of a joined buffer interleave, so only the
 * first elements are compared. */
#define EE_CHECK_APART(a, b)                                                                       \
    EE_CHECK((a)->data != (b)->data, "%s and %s must not be the same memory", #a, #b)

/* Two tensors of one rank that may be the same memory: then rows must coincide. */
#define EE_CHECK_IN_PLACE(a, b)                                                                    \
    EE_CHECK((a)->data != (b)->data || ee_strides_equal(a, b),                                     \
             "%s and %s are the same memory, so their strides must be equal", #a, #b)

static inline bool ee_strides_equal(const struct ee_tensor *a, const struct ee_tensor *b) {
    bool equal = true;
    for (int i = 0; i + 1 < a->ndim; i++)
        equal &= a->shape[i] <= 1 || a->stride[i] == b->stride[i];
    return equal;
}

static inline bool ee_flat_fits(const struct ee_tensor *tensor) {
    if (!tensor || tensor->ndim < 1 || tensor->ndim > EE_MAX_DIMS)
        return false;
    int64_t elements = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] < 0)
            return false;
        elements *= tensor->shape[i];
    }
    return elements == 0 || (tensor->data && ee_tensor_contiguous(tensor));
}

EE_EXTERN_C_END

#endif
