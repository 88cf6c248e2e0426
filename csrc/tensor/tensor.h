/* Tensors and weights: plain descriptions of memory that somebody else owns.
 *
 * A tensor is a view {data, dtype, shape, strides}; it owns nothing and is passed by pointer. The
 * last stride is always 1, so that a row is contiguous; the others are free, which is how the
 * queries of a joined query-key-value buffer are addressed. Strides count elements.
 *
 * A weight is a matrix [rows = output features, cols = input features] as a product takes it: plain
 * rows (training), or packed in column panels (inference). */
#ifndef EE_TENSOR_H
#define EE_TENSOR_H

#include "base/status.h"

EE_EXTERN_C_BEGIN

enum ee_dtype { EE_F32, EE_BF16, EE_F16, EE_I8, EE_I32, EE_I64, EE_DTYPE_COUNT };

/* Bytes of an element. */
size_t ee_dtype_size(enum ee_dtype dtype);

/* "float32", "bfloat16", ... */
const char *ee_dtype_name(enum ee_dtype dtype);

#define EE_MAX_DIMS 4

struct ee_tensor {
    void *data;
    enum ee_dtype dtype;
    int32_t ndim;
    int64_t shape[EE_MAX_DIMS];
    int64_t stride[EE_MAX_DIMS]; /* in elements; stride[ndim - 1] == 1 */
};

/* Contiguous float32 views. */
struct ee_tensor ee_vector(const void *data, int64_t n);
struct ee_tensor ee_matrix(const void *data, int64_t rows, int64_t cols);

/* A matrix whose rows are `stride` elements apart: some columns of a wider one. */
struct ee_tensor ee_matrix_strided(const void *data, int64_t rows, int64_t cols, int64_t stride);

/* [rows, heads, width] with rows `stride` elements apart and the heads of a row contiguous. */
struct ee_tensor ee_heads(const void *data, int64_t rows, int64_t heads, int64_t width,
                          int64_t stride);

/* Rows [first, first + count) of a tensor of any rank. */
struct ee_tensor ee_tensor_rows(const struct ee_tensor *tensor, int64_t first, int64_t count);

int64_t ee_tensor_elements(const struct ee_tensor *tensor);
bool ee_tensor_contiguous(const struct ee_tensor *tensor);

/* Writes e.g. "float32[3, 4]" for error messages; returns `text`. */
char *ee_tensor_describe(const struct ee_tensor *tensor, char *text, size_t size);

enum ee_layout {
    /* data[r * cols + c], float32. */
    EE_LAYOUT_ROWS,
    /* Panels of EE_PANEL output features: data[(r / EE_PANEL) * cols * EE_PANEL + c * EE_PANEL +
     * r % EE_PANEL]; the rows of the last panel are padded with zeros. float32 or bf16. */
    EE_LAYOUT_PANELS,
};

/* Output features in a panel, and terms in a block of the sum over the input features (DESIGN:
 * one product, one order of summation). */
#define EE_PANEL 64
#define EE_SUM_BLOCK 64

struct ee_weight {
    void *data;
    enum ee_dtype dtype;
    enum ee_layout layout;
    int64_t rows; /* output features */
    int64_t cols; /* input features */
};

/* A float32 weight of plain rows. */
struct ee_weight ee_weight_rows(const void *data, int64_t rows, int64_t cols);

/* Bytes that a weight of this form needs at `data`. */
size_t ee_weight_bytes(enum ee_dtype dtype, enum ee_layout layout, int64_t rows, int64_t cols);

EE_EXTERN_C_END

#endif
