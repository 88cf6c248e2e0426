/* What this build holds, and what this machine can do. */
#include "python/py_util.h"

#include "base/alloc.h"

#include <time.h>

#ifdef __clang__
#    define COMPILER "clang " __clang_version__
#else
#    define COMPILER "gcc " __VERSION__
#endif

PyObject *build_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *levels = PyList_New(0);
    for (int i = 0; levels && i <= (int)ee_isa_best(); i++) {
        PyObject *name = PyUnicode_FromString(ee_isa_name((enum ee_isa)i));
        if (!name || PyList_Append(levels, name) < 0)
            Py_CLEAR(levels);
        Py_XDECREF(name);
    }
    if (!levels)
        return NULL;
    return Py_BuildValue("{s:s,s:s,s:N,s:i,s:O,s:O}", "compiler", COMPILER, "isa",
                         ee_isa_name(ee_isa_best()), "isa_levels", levels, "cpus", ee_cpu_count(),
                         "cuda", Py_False, "mpi", Py_False);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Best rate, in units per second, of at least `repeats` runs of an operation that takes `amount`.
 */
struct measurement {
    struct ee_ctx *ctx;
    struct ee_tensor a, b, c;
};

static enum ee_status read_once(struct measurement *m) {
    double sum;
    return ee_sum_squares(m->ctx, &sum, &m->a);
}

static enum ee_status multiply_once(struct measurement *m) {
    struct ee_weight w = ee_weight_rows(m->b.data, m->b.shape[0], m->b.shape[1]);
    return ee_linear(m->ctx, &m->c, &m->a, &w, NULL, NULL);
}

static enum ee_status best_time(struct measurement *m, enum ee_status (*run)(struct measurement *),
                                int repeats, double *seconds) {
    EE_TRY(run(m));
    *seconds = 1e30;
    for (int i = 0; i < repeats; i++) {
        double start = now();
        EE_TRY(run(m));
        double taken = now() - start;
        if (taken < *seconds)
            *seconds = taken;
    }
    return EE_OK;
}

/* Three square matrices of this size: far beyond the caches, less than a second a product. */
#define PRODUCT_SIZE 1536

static enum ee_status measure(enum ee_isa isa, int threads, int64_t read_elements,
                              double *seconds) {
    struct measurement m = {0};
    EE_TRY(ee_ctx_create(&m.ctx, isa, threads));
    int64_t n = PRODUCT_SIZE;
    void *memory;
    enum ee_status status = ee_alloc(
        &memory, sizeof(float) * (size_t)ee_max(read_elements, 3 * n * n), "a measurement");
    if (status == EE_OK) {
        float *data = memory;
        int64_t elements = ee_max(read_elements, 2 * n * n);
        for (int64_t i = 0; i < elements; i++)
            data[i] = (float)(i % 251) * 0x1p-8f;
        if (read_elements > 0) {
            m.a = ee_vector(data, read_elements);
            status = best_time(&m, read_once, 7, seconds);
        } else {
            m.a = ee_matrix(data, n, n);
            m.b = ee_matrix(data + n * n, n, n);
            m.c = ee_matrix(data + 2 * n * n, n, n);
            status = best_time(&m, multiply_once, 5, seconds);
        }
    }
    ee_free(memory);
    ee_ctx_destroy(m.ctx);
    return status;
}

PyObject *measure_bandwidth(PyObject *module, PyObject *args) {
    int threads, mebibytes;
    if (!PyArg_ParseTuple(args, "ii", &threads, &mebibytes))
        return NULL;
    if (mebibytes < 1 || mebibytes > 1 << 16)
        return PyErr_Format(PyExc_ValueError, "mebibytes must lie between 1 and 65536, got %d",
                            mebibytes);
    int64_t elements = (int64_t)mebibytes << 18;
    double seconds = 1;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, measure(ee_isa_best(), threads, elements, &seconds));
    if (status != EE_OK)
        return raise_status(module_state(module), status);
    return PyFloat_FromDouble((double)elements * sizeof(float) / seconds);
}

PyObject *measure_flops(PyObject *module, PyObject *args) {
    int threads;
    const char *name;
    if (!PyArg_ParseTuple(args, "is", &threads, &name))
        return NULL;
    enum ee_isa isa;
    double seconds = 1;
    enum ee_status status = ee_isa_from_name(&isa, name);
    if (status == EE_OK)
        RUN_WITHOUT_GIL(status, measure(isa, threads, 0, &seconds));
    if (status != EE_OK)
        return raise_status(module_state(module), status);
    return PyFloat_FromDouble(2.0 * PRODUCT_SIZE * PRODUCT_SIZE * PRODUCT_SIZE / seconds);
}
