/* Shared by the files of csrc/python: module state, the way from a status to an exception, and
 * access to arrays. */
#ifndef EE_PY_UTIL_H
#define EE_PY_UTIL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "base/status.h"

/* What one instance of the module holds. */
struct module_state {
    PyObject *error;           /* eellm.Error */
    PyObject *nonfinite_error; /* eellm.NonFiniteError */
    PyObject *comm_error;      /* eellm.CommError */
    PyTypeObject *tensor_type, *model_type, *trainer_type, *engine_type;
};

extern struct PyModuleDef ee_module_def;

static inline struct module_state *module_state(PyObject *module) {
    return (struct module_state *)PyModule_GetState(module);
}

/* State of the module that defines `type`. */
struct module_state *type_state(PyTypeObject *type);

/* Raises the exception of a status other than EE_OK with this thread's message; returns NULL. */
PyObject *raise_status(struct module_state *state, enum ee_status status);

#endif
