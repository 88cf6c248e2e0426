/* The only file that uses NumPy's C API. */
#include "python/py_util.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <math.h>
#include <numpy/arrayobject.h>

static const struct {
    int number;
    const char *name;
} types[] = {
    [ARRAY_F32] = {NPY_FLOAT32, "float32"}, [ARRAY_I32] = {NPY_INT32, "int32"},
    [ARRAY_U64] = {NPY_UINT64, "uint64"},   [ARRAY_U8] = {NPY_BOOL, "bool"},
    [ARRAY_F64] = {NPY_FLOAT64, "float64"}, [ARRAY_F16] = {NPY_FLOAT16, "float16"},
    [ARRAY_U16] = {NPY_UINT16, "uint16"},
};

int import_numpy(void) {
    import_array1(-1);
    return 0;
}

/* Whether the array's elements are of the type, in this machine's order of bytes. */
static bool has_type(PyArrayObject *array, enum array_type type) {
    return PyArray_EquivTypenums(PyArray_TYPE(array), types[type].number) &&
           PyArray_ISNOTSWAPPED(array);
}

/* The strides of a matrix in elements; its rows or its columns are contiguous. */
static bool take_strides(PyArrayObject *array, const char *name, Py_ssize_t *stride) {
    Py_ssize_t size = (Py_ssize_t)PyArray_ITEMSIZE(array);
    bool any = false, whole = true;
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        Py_ssize_t bytes = (Py_ssize_t)PyArray_STRIDE(array, i);
        stride[i] = bytes / size;
        any |= bytes == size || PyArray_DIM(array, i) == 1;
        whole &= bytes % size == 0;
    }
    if (!any || !whole)
        PyErr_Format(PyExc_ValueError,
                     "%s must have contiguous rows or columns; use np.ascontiguousarray", name);
    return any && whole;
}

/* stride NULL: the array must be contiguous. */
static bool take(PyObject *object, const char *name, enum array_type type, int ndim,
                 Py_ssize_t *shape, Py_ssize_t *stride, void **data) {
    if (!PyArray_Check(object)) {
        PyObject *got = PyType_GetName(Py_TYPE(object));
        PyErr_Format(PyExc_TypeError,
                     "%s must be a NumPy array of %s, got %V; use np.asarray(..., np.%s)", name,
                     types[type].name, got, "another type", types[type].name);
        Py_XDECREF(got);
        return false;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!has_type(array, type)) {
        PyErr_Format(PyExc_ValueError, "%s must be of dtype %s, got %S; use .astype(np.%s)", name,
                     types[type].name, (PyObject *)PyArray_DESCR(array), types[type].name);
        return false;
    }
    if (PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, got %d; use .reshape", name,
                     ndim, PyArray_NDIM(array));
        return false;
    }
    if (stride && !take_strides(array, name, stride))
        return false;
    if (!stride && !PyArray_IS_C_CONTIGUOUS(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be contiguous; use np.ascontiguousarray", name);
        return false;
    }
    if (!PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be aligned in memory; use .copy()", name);
        return false;
    }
    for (int i = 0; i < ndim; i++) {
        Py_ssize_t size = (Py_ssize_t)PyArray_DIM(array, i);
        if (shape[i] >= 0 && shape[i] != size) {
            PyErr_Format(PyExc_ValueError, "%s: dimension %d must be %zd, got %zd", name, i,
                         shape[i], size);
            return false;
        }
        shape[i] = size;
    }
    *data = PyArray_DATA(array);
    return true;
}

bool array_in(PyObject *object, const char *name, enum array_type type, int ndim, Py_ssize_t *shape,
              void **data) {
    return take(object, name, type, ndim, shape, NULL, data);
}

bool array_strided_in(PyObject *object, const char *name, enum array_type type, int ndim,
                      Py_ssize_t *shape, Py_ssize_t *stride, void **data) {
    return take(object, name, type, ndim, shape, stride, data);
}

bool array_is(PyObject *object, enum array_type type) {
    return PyArray_Check(object) && has_type((PyArrayObject *)object, type);
}

bool array_out(PyObject *object, const char *name, enum array_type type, int ndim,
               Py_ssize_t *shape, void **data) {
    if (!take(object, name, type, ndim, shape, NULL, data))
        return false;
    if (!PyArray_ISWRITEABLE((PyArrayObject *)object)) {
        PyErr_Format(PyExc_ValueError, "%s must be writable; use .copy()", name);
        return false;
    }
    return true;
}

PyObject *array_new(enum array_type type, int ndim, const Py_ssize_t *shape, void **data) {
    npy_intp dims[4];
    for (int i = 0; i < ndim; i++)
        dims[i] = shape[i];
    PyObject *array = PyArray_ZEROS(ndim, dims, types[type].number, 0);
    if (array)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

/* Number i of a sequence. */
static bool float_at(PyObject *sequence, const char *name, Py_ssize_t i, float *out) {
    PyObject *item = PySequence_GetItem(sequence, i);
    if (!item)
        return false;
    double value = PyFloat_AsDouble(item);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s[%zd] must be a number, got %R", name, i, item);
    } else if (!isfinite((float)value)) {
        PyErr_Format(PyExc_ValueError, "%s[%zd] must be a finite number, got %R", name, i, item);
    }
    Py_DECREF(item);
    *out = (float)value;
    return !PyErr_Occurred();
}

bool floats_in(PyObject *sequence, const char *name, Py_ssize_t count, float *out) {
    Py_ssize_t size = PySequence_Check(sequence) ? PySequence_Size(sequence) : -1;
    if (size < 0) {
        PyErr_Clear();
        raise_type(name, "a sequence of numbers", sequence);
        return false;
    }
    if (size != count) {
        PyErr_Format(PyExc_ValueError, "%s must have %zd numbers, got %zd", name, count, size);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (!float_at(sequence, name, i, &out[i]))
            return false;
    return true;
}
