/* The module eellm._core: initialisation, exceptions, and functions that need no handle. */
#include "python/py_util.h"

#include "base/alloc.h"
#include "base/log.h"

PyTypeObject *create_type(PyObject *module, PyType_Spec *spec) {
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
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
    case EE_ERR_BUSY:
        type = state->busy_error;
        break;
    case EE_OK:
    case EE_ERR_INTERNAL:
        break;
    }
    /* A name in the message may have been cut within a character. */
    const char *message = ee_last_error();
    PyObject *text = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
    if (text)
        PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

PyObject *raise_type(const char *what, const char *expected, PyObject *got) {
    PyObject *name = PyType_GetName(Py_TYPE(got));
    if (name)
        PyErr_Format(PyExc_TypeError, "%s must be %s, got %S", what, expected, name);
    Py_XDECREF(name);
    return NULL;
}

int seed_converter(PyObject *object, void *out) {
    PyObject *number = PyNumber_Index(object);
    if (!number) {
        PyErr_Clear();
        raise_type("a seed", "an integer", object);
        return 0;
    }
    *(uint64_t *)out = PyLong_AsUnsignedLongLong(number);
    bool ok = !PyErr_Occurred();
    if (!ok) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "a seed must lie between 0 and 2**64 - 1, got %S", number);
    }
    Py_DECREF(number);
    return ok;
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

/* The callable that receives the core's log, or NULL. One for the process, as the log is. */
static PyObject *log_callback;

/* Exceptions of the callback are reported and dropped: the core cannot handle them. */
static void forward_log(enum ee_log_level level, const char *line) {
    if (!Py_IsInitialized())
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *callback = log_callback;
    if (callback) {
        /* The callback may replace itself. */
        Py_INCREF(callback);
        PyObject *text = PyUnicode_DecodeUTF8(line, (Py_ssize_t)strlen(line), "replace");
        PyObject *result = text ? PyObject_CallFunction(callback, "iO", (int)level, text) : NULL;
        if (!result)
            PyErr_WriteUnraisable(callback);
        Py_XDECREF(text);
        Py_XDECREF(result);
        Py_DECREF(callback);
    }
    PyGILState_Release(gil);
}

static PyObject *set_log(PyObject *module, PyObject *callback) {
    (void)module;
    if (callback != Py_None && !PyCallable_Check(callback))
        return raise_type("callback", "callable or None", callback);
    PyObject *old = log_callback;
    log_callback = callback == Py_None ? NULL : Py_NewRef(callback);
    ee_log_set_sink(log_callback ? forward_log : NULL);
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* The first line of each text is the signature that inspect.signature() shows. */
static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info($module, /)\n--\n\nWhat was built in, and what this machine runs."},
    {"measure_bandwidth", measure_bandwidth, METH_VARARGS,
     "measure_bandwidth($module, threads, mebibytes, /)\n--\n\n"
     "Read bandwidth of memory, bytes/s."},
    {"measure_flops", measure_flops, METH_VARARGS,
     "measure_flops($module, threads, isa, /)\n--\n\nRate of a large matrix product, FLOP/s."},
    {"schedule_actions", schedule_actions, METH_VARARGS,
     "schedule_actions($module, spec, rank, /)\n--\n\nThe list of a pipeline rank."},
    {"schedule_fill", schedule_fill, METH_VARARGS,
     "schedule_fill($module, ranks, ratio, count, /)\n--\n\nWhat fits the bubbles of 1F1B."},
    {"schedule_walk", schedule_walk, METH_VARARGS,
     "schedule_walk($module, spec, costs, lists, trace, grid=None, time=0.0, /)\n--\n\n"
     "Proves lists, and says what they take."},
    {"schedule_buffers", schedule_buffers, METH_VARARGS,
     "schedule_buffers($module, spec, lists, /)\n--\n\n"
     "How many gradients of a rank may be under way."},
    {"comm_self", comm_self, METH_NOARGS,
     "comm_self($module, /)\n--\n\nThe communicator of one rank."},
    {"comm_local", (PyCFunction)(void (*)(void))comm_local, METH_VARARGS | METH_KEYWORDS,
     "comm_local($module, /, size, timeout=300.0)\n--\n\n"
     "The communicators of ranks that are threads."},
    {"comm_grid", comm_grid, METH_VARARGS,
     "comm_grid($module, comm, data, tensor, pipeline, /)\n--\n\n"
     "This rank's place in the process grid, and the communicators of its coordinates."},
    {"comm_adopt", comm_adopt, METH_O,
     "comm_adopt($module, capsule, /)\n--\n\nTakes over the communicator of a transport."},
    {"host", comm_host, METH_NOARGS, "host($module, /)\n--\n\nWhat transports get from the core."},
    {"set_log", set_log, METH_O,
     "set_log($module, callback, /)\n--\n\n"
     "callback(level, line) receives the core's log; None restores the default."},
    {"_symbols", symbols, METH_NOARGS,
     "_symbols($module, /)\n--\n\nAddresses of the core's functions, for tests."},
    {"alloc_stats", alloc_stats, METH_NOARGS,
     "alloc_stats($module, /)\n--\n\n(allocations since start, live allocations, live bytes)"},
    {"_alloc_fail_at", alloc_fail_at, METH_O,
     "_alloc_fail_at($module, n, /)\n--\n\nThe n-th allocation from now fails; 0: none."},
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
        add_exception(module, &state->comm_error, "eellm.CommError", state->error) < 0 ||
        add_exception(module, &state->busy_error, "eellm.BusyError", state->error) < 0)
        return -1;
    if (import_numpy() < 0)
        return -1;
    if (!(state->tensor_type = create_tensor_type(module)) ||
        !(state->model_type = create_model_type(module)) ||
        !(state->trainer_type = create_trainer_type(module)) ||
        !(state->engine_type = create_engine_type(module)) ||
        !(state->comm_type = create_comm_type(module)) ||
        !(state->replay_type = create_replay_type(module)))
        return -1;
    PyTypeObject *types[] = {state->tensor_type, state->model_type, state->trainer_type,
                             state->engine_type, state->comm_type,  state->replay_type};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (PyModule_AddType(module, types[i]) < 0)
            return -1;
    return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *state = module_state(module);
    Py_VISIT(state->error);
    Py_VISIT(state->nonfinite_error);
    Py_VISIT(state->comm_error);
    Py_VISIT(state->busy_error);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->model_type);
    Py_VISIT(state->trainer_type);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->comm_type);
    Py_VISIT(state->replay_type);
    return 0;
}

static int clear(PyObject *module) {
    struct module_state *state = module_state(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->nonfinite_error);
    Py_CLEAR(state->comm_error);
    Py_CLEAR(state->busy_error);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->trainer_type);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->comm_type);
    Py_CLEAR(state->replay_type);
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

static struct PyModuleDef module_def = {
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
    return PyModuleDef_Init(&module_def);
}
