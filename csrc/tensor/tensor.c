#include "tensor/tensor.h"

#include <stdio.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[EE_DTYPE_COUNT] = {
    [EE_F32] = {"float32", 4}, [EE_BF16] = {"bfloat16", 2}, [EE_F16] = {"float16", 2},
    [EE_I8] = {"int8", 1},     [EE_I32] = {"int32", 4},     [EE_I64] = {"int64", 8},
};

size_t ee_dtype_size(enum ee_dtype dtype) {
    return dtypes[dtype].size;
}

const char *ee_dtype_name(enum ee_dtype dtype) {
    return (unsigned)dtype < EE_DTYPE_COUNT ? dtypes[dtype].name : "unknown";
}

/* Views of read-only data are made too; whether data may be written is the operation's contract. */
static void *drop_const(const void *data) {
    union {
        const void *in;
        void *out;
    } pointer = {data};
    return pointer.out;
}

struct ee_tensor ee_vector(const void *data, int64_t n) {
    return (struct ee_tensor){drop_const(data), EE_F32, 1, {n}, {1}};
}

struct ee_tensor ee_matrix(const void *data, int64_t rows, int64_t cols) {
    return ee_matrix_strided(data, rows, cols, cols);
}

struct ee_tensor ee_matrix_strided(const void *data, int64_t rows, int64_t cols, int64_t stride) {
    return (struct ee_tensor){drop_const(data), EE_F32, 2, {rows, cols}, {stride, 1}};
}

struct ee_tensor ee_heads(const void *data, int64_t rows, int64_t heads, int64_t width,
                          int64_t stride) {
    return (struct ee_tensor){
        drop_const(data), EE_F32, 3, {rows, heads, width}, {stride, width, 1}};
}

struct ee_tensor ee_tensor_rows(const struct ee_tensor *tensor, int64_t first, int64_t count) {
    EE_ASSERT(first >= 0 && count >= 0 && first + count <= tensor->shape[0]);
    struct ee_tensor rows = *tensor;
    rows.data =
        (char *)tensor->data + (size_t)(first * tensor->stride[0]) * ee_dtype_size(tensor->dtype);
    rows.shape[0] = count;
    return rows;
}

int64_t ee_tensor_elements(const struct ee_tensor *tensor) {
    int64_t n = 1;
    for (int i = 0; i < tensor->ndim; i++)
        n *= tensor->shape[i];
    return n;
}

bool ee_tensor_contiguous(const struct ee_tensor *tensor) {
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->stride[i] != expected)
            return false;
        expected *= tensor->shape[i];
    }
    return true;
}

char *ee_tensor_describe(const struct ee_tensor *tensor, char *text, size_t size) {
    int used = snprintf(text, size, "%s[", ee_dtype_name(tensor->dtype));
    for (int i = 0; i < tensor->ndim && used >= 0 && (size_t)used < size; i++)
        used += snprintf(text + used, size - (size_t)used, "%s%lld", i ? ", " : "",
                         (long long)tensor->shape[i]);
    if (used >= 0 && (size_t)used < size)
        snprintf(text + used, size - (size_t)used, "]");
    return text;
}

struct ee_weight ee_weight_rows(const void *data, int64_t rows, int64_t cols) {
    return (struct ee_weight){drop_const(data), EE_F32, EE_LAYOUT_ROWS, rows, cols};
}

size_t ee_weight_bytes(enum ee_dtype dtype, enum ee_layout layout, int64_t rows, int64_t cols) {
    if (layout == EE_LAYOUT_PANELS)
        rows = ee_ceil_div(rows, EE_PANEL) * EE_PANEL;
    return (size_t)rows * (size_t)cols * ee_dtype_size(dtype);
}
