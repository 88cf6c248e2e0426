/* csrc/tensor: views, descriptions, sizes of weights. */
#include "tensor/tensor.h"

#include "ee_test.h"

static void test_dtypes(void) {
    static const struct {
        enum ee_dtype dtype;
        size_t size;
        const char *name;
    } known[] = {{EE_F32, 4, "float32"}, {EE_BF16, 2, "bfloat16"}, {EE_F16, 2, "float16"},
                 {EE_I8, 1, "int8"},     {EE_I32, 4, "int32"},     {EE_I64, 8, "int64"}};
    EE_EXPECT(sizeof known / sizeof known[0] == EE_DTYPE_COUNT);
    for (int i = 0; i < EE_DTYPE_COUNT; i++) {
        EE_EXPECT(ee_dtype_size(known[i].dtype) == known[i].size);
        EE_EXPECT(strcmp(ee_dtype_name(known[i].dtype), known[i].name) == 0);
    }
    EE_EXPECT(strcmp(ee_dtype_name((enum ee_dtype)99), "unknown") == 0);
}

static void test_views(void) {
    static const float data[4 * 30];
    struct ee_tensor vector = ee_vector(data, 7);
    EE_EXPECT(vector.ndim == 1 && vector.shape[0] == 7 && vector.stride[0] == 1);
    EE_EXPECT(ee_tensor_elements(&vector) == 7 && ee_tensor_contiguous(&vector));

    struct ee_tensor matrix = ee_matrix(data, 4, 30);
    EE_EXPECT(matrix.ndim == 2 && matrix.stride[0] == 30 && matrix.stride[1] == 1);
    EE_EXPECT(ee_tensor_contiguous(&matrix) && ee_tensor_elements(&matrix) == 120);
    struct ee_tensor rows = ee_tensor_rows(&matrix, 1, 2);
    EE_EXPECT(rows.data == data + 30 && rows.shape[0] == 2 && rows.shape[1] == 30);
    rows = ee_tensor_rows(&matrix, 4, 0);
    EE_EXPECT(ee_tensor_elements(&rows) == 0);

    struct ee_tensor part = ee_matrix_strided(data, 4, 10, 30);
    EE_EXPECT(!ee_tensor_contiguous(&part));
    part.shape[0] = 1; /* the stride of a single row means nothing */
    EE_EXPECT(ee_tensor_contiguous(&part));

    struct ee_tensor heads = ee_heads(data, 4, 2, 5, 30);
    EE_EXPECT(heads.ndim == 3 && heads.stride[0] == 30 && heads.stride[1] == 5);
    EE_EXPECT(heads.stride[2] == 1 && !ee_tensor_contiguous(&heads));
    rows = ee_tensor_rows(&heads, 3, 1);
    EE_EXPECT(rows.data == data + 90);
    heads = ee_heads(data, 4, 6, 5, 30);
    EE_EXPECT(ee_tensor_contiguous(&heads));

    struct ee_tensor halves = {
        .data = vector.data, .dtype = EE_BF16, .ndim = 2, .shape = {4, 3}, .stride = {3, 1}};
    rows = ee_tensor_rows(&halves, 2, 1);
    EE_EXPECT(rows.data == (const char *)data + 12);
}

static void test_describe(void) {
    char text[64];
    struct ee_tensor tensor = ee_heads(NULL, 4, 2, 5, 30);
    EE_EXPECT(strcmp(ee_tensor_describe(&tensor, text, sizeof text), "float32[4, 2, 5]") == 0);
    tensor = (struct ee_tensor){.dtype = EE_I64, .ndim = 1, .shape = {3}, .stride = {1}};
    EE_EXPECT(strcmp(ee_tensor_describe(&tensor, text, sizeof text), "int64[3]") == 0);
    for (size_t size = 1; size < 12; size++) {
        memset(text, '#', sizeof text);
        ee_tensor_describe(&tensor, text, size);
        EE_EXPECT(memchr(text, 0, size) && text[size] == '#');
        EE_EXPECT(strncmp("int64[3]", text, strlen(text)) == 0);
    }
}

static void test_weights(void) {
    static const float data[6];
    struct ee_weight rows = ee_weight_rows(data, 2, 3);
    EE_EXPECT(rows.data == data && rows.dtype == EE_F32 && rows.layout == EE_LAYOUT_ROWS);
    EE_EXPECT(rows.rows == 2 && rows.cols == 3);
    EE_EXPECT(ee_weight_bytes(EE_F32, EE_LAYOUT_ROWS, 65, 3) == 65 * 3 * 4);
    EE_EXPECT(ee_weight_bytes(EE_F32, EE_LAYOUT_PANELS, 64, 3) == 64 * 3 * 4);
    EE_EXPECT(ee_weight_bytes(EE_BF16, EE_LAYOUT_PANELS, 65, 3) == 128 * 3 * 2);
}

EE_TEST_MAIN(test_dtypes, test_views, test_describe, test_weights)
