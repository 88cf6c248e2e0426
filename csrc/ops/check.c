#include "ops/check.h"

#include <stdio.h>
#include <string.h>

/* Writes "N = 4, C = 64" for the names "N, C"; a free dimension has its name only. */
static void describe_shape(char *text, size_t size, const char *dims, int ndim,
                           const int64_t *shape) {
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < ndim && used + 1 < size; i++) {
        size_t length = strcspn(dims, ",");
        int n = snprintf(text + used, size - used, "%s%.*s", i ? ", " : "", (int)length, dims);
        used += (size_t)n;
        if (shape[i] != EE_ANY && used < size)
            used += (size_t)snprintf(text + used, size - used, " = %lld", (long long)shape[i]);
        dims += length + (dims[length] ? 2 : 0);
    }
}

static bool same_sizes(const struct ee_tensor *tensor, int ndim, const int64_t *shape) {
    if (tensor->ndim != ndim)
        return false;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] == EE_ANY ? tensor->shape[i] < (i > 0) : tensor->shape[i] != shape[i])
            return false;
    }
    return true;
}

/* What is wrong with any tensor whatever its shape; EE_OK when it is something else. */
static enum ee_status fail_form(const char *op, const char *name, const struct ee_tensor *tensor) {
    if (!tensor)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must not be NULL", op, name);
    if (tensor->ndim < 1 || tensor->ndim > EE_MAX_DIMS)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must have 1 to %d dimensions, got %d", op, name,
                EE_MAX_DIMS, (int)tensor->ndim);
    return EE_OK;
}

enum ee_status ee_fail_tensor(const char *op, const char *name, const struct ee_tensor *tensor,
                              const char *dims, int ndim, const int64_t *shape) {
    EE_TRY(fail_form(op, name, tensor));
    char got[128], expected[192];
    ee_tensor_describe(tensor, got, sizeof got);
    describe_shape(expected, sizeof expected, dims, ndim, shape);
    if (!same_sizes(tensor, ndim, shape)) {
        if (ndim == 1 && shape[0] != EE_ANY)
            EE_FAIL(EE_ERR_INVALID, "%s: %s must have %s elements, got %s", op, name, expected,
                    got);
        EE_FAIL(EE_ERR_INVALID, "%s: %s must be float32[%s], got %s", op, name, expected, got);
    }
    if (tensor->dtype != EE_F32)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must be float32, got %s", op, name, got);
    int64_t last = tensor->stride[ndim - 1];
    if (tensor->shape[ndim - 1] > 1 && last != 1)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must have a last stride of 1, got %lld", op, name,
                (long long)last);
    if (!tensor->data)
        EE_FAIL(EE_ERR_INVALID, "%s: %s = %s has no data", op, name, got);
    EE_FAIL(EE_ERR_INVALID, "%s: %s = %s must have rows that do not overlap, got a stride of %lld",
            op, name, got, (long long)tensor->stride[0]);
}

enum ee_status ee_fail_flat(const char *op, const char *name, const struct ee_tensor *tensor) {
    EE_TRY(fail_form(op, name, tensor));
    char got[128];
    ee_tensor_describe(tensor, got, sizeof got);
    if (!tensor->data)
        EE_FAIL(EE_ERR_INVALID, "%s: %s = %s has no data", op, name, got);
    EE_FAIL(EE_ERR_INVALID, "%s: %s = %s must be contiguous", op, name, got);
}

enum ee_status ee_fail_indices(const char *op, const char *name, const int32_t *index, int64_t n,
                               int32_t first, int32_t last) {
    if (!index)
        EE_FAIL(EE_ERR_INVALID, "%s: %s must not be NULL", op, name);
    int64_t i = 0;
    while (i < n - 1 && index[i] >= first && index[i] <= last)
        i++;
    if (first == INT32_MIN)
        EE_FAIL(EE_ERR_INVALID, "%s: %s[%lld] must be at most %d, got %d", op, name, (long long)i,
                (int)last, (int)index[i]);
    EE_FAIL(EE_ERR_INVALID, "%s: %s[%lld] must lie between %d and %d, got %d", op, name,
            (long long)i, (int)first, (int)last, (int)index[i]);
}
