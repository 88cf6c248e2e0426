/* The module eellm._core: initialisation, exceptions, and functions that need no handle. */
#include "python/py_util.h"

#include "base/alloc.h"

struct module_state *type_state(PyTypeObject *type) {
    return PyType_GetModuleState(type);
}

PyObject *raise_status(struct module_state *state, enum ee_status status) {
    PyObject *type = state->error;
    switch (status) {
    case EE_ERR_NOMEM:
        type = PyExc_MemoryError;
        break;
    case EE_ERR_INVALID:
        type = PyExc_ValueError;
        break;
    case EE_ERR_IO:
        type = PyExc_OSError;
        break;
    case EE_ERR_UNSUPPORTED:
        type = PyExc_NotImplementedError;
        break;
    case EE_ERR_NONFINITE:
        type = state->nonfinite_error;
        break;
    case EE_ERR_COMM:
        type = state->comm_error;
        break;
    case EE_OK:
    case EE_ERR_BUSY:
    case EE_ERR_INTERNAL:
        break;
    }
    PyErr_SetString(type, ee_last_error());
    return NULL;
}

static PyObject *alloc_stats(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    struct ee_alloc_stats stats = ee_alloc_stats();
    return Py_BuildValue("KKK", (unsigned long long)stats.calls,
                         (unsigned long long)stats.live_count,
                         (unsigned long long)stats.live_bytes);
}

static PyObject *alloc_fail_at(PyObject *module, PyObject *n) {
    (void)module;
    unsigned long long value = PyLong_AsUnsignedLongLong(n);
    if (PyErr_Occurred())
        return NULL;
    ee_alloc_fail_at(value);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"alloc_stats", alloc_stats, METH_NOARGS,
     "(allocations since start, live allocations, live bytes)"},
    {"_alloc_fail_at", alloc_fail_at, METH_O, "The n-th allocation from now fails; 0: none."},
    {NULL, NULL, 0, NULL},
};

static int add_exception(PyObject *module, PyObject **slot, const char *name, PyObject *base) {
    *slot = PyErr_NewException(name, base, NULL);
    if (!*slot)
        return -1;
    const char *short_name = strrchr(name, '.') + 1;
    return PyModule_AddObjectRef(module, short_name, *slot);
}

static int exec_module(PyObject *module) {
    struct module_state *state = module_state(module);
    if (add_exception(module, &state->error, "eellm.Error", PyExc_RuntimeError) < 0 ||
        add_exception(module, &state->nonfinite_error, "eellm.NonFiniteError", state->error) < 0 ||
        add_exception(module, &state->comm_error, "eellm.CommError", state->error) < 0)
        return -1;
    return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *state = module_state(module);
    Py_VISIT(state->error);
    Py_VISIT(state->nonfinite_error);
    Py_VISIT(state->comm_error);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->model_type);
    Py_VISIT(state->trainer_type);
    Py_VISIT(state->engine_type);
    return 0;
}

static int clear(PyObject *module) {
    struct module_state *state = module_state(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->nonfinite_error);
    Py_CLEAR(state->comm_error);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->trainer_type);
    Py_CLEAR(state->engine_type);
    return 0;
}

static void free_module(void *module) {
    clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#if PY_VERSION_HEX >= 0x030C0000 && !defined(Py_LIMITED_API)
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

struct PyModuleDef ee_module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "eellm._core",
    .m_doc = "The native core of eellm; see eellm/_core.pyi.",
    .m_size = sizeof(struct module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&ee_module_def);
}
