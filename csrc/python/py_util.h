/* Shared by the files of csrc/python: module state, the way from a status to an exception, arrays
 * in and out, and the handles. Python.h stays within this folder, NumPy's C API within py_array.c.
 *
 * How a call runs: parse the arguments and check the arrays; claim the handle (begin_call); release
 * the GIL; run the core; take the GIL back; release the handle; turn the status into a result or an
 * exception. */
#ifndef EE_PY_UTIL_H
#define EE_PY_UTIL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
/* Python.h brings it in with the full API alone. */
#include <string.h>

#include "comm/comm.h"
#include "model/model.h"
#include "train/walk.h"

/* What one instance of the module holds. */
struct module_state {
    PyObject *error;           /* eellm.Error */
    PyObject *nonfinite_error; /* eellm.NonFiniteError */
    PyObject *comm_error;      /* eellm.CommError */
    PyObject *busy_error;      /* eellm.BusyError */
    PyTypeObject *tensor_type, *model_type, *trainer_type, *engine_type, *comm_type, *replay_type;
};

static inline struct module_state *module_state(PyObject *module) {
    return (struct module_state *)PyModule_GetState(module);
}

/* Raises the exception of a status other than EE_OK with this thread's message; returns NULL. */
PyObject *raise_status(struct module_state *state, enum ee_status status);

/* Raises TypeError "WHAT must be EXPECTED, got TYPE"; returns NULL. */
PyObject *raise_type(const char *what, const char *expected, PyObject *got);

/* For "O&" of PyArg_Parse: a seed, 0 to 2^64 - 1, into a uint64_t. */
int seed_converter(PyObject *object, void *out);

/* -- Arrays (py_array.c) ---------------------------------------------------------------------- */

enum array_type { ARRAY_F32, ARRAY_I32, ARRAY_U64, ARRAY_U8, ARRAY_F64, ARRAY_F16, ARRAY_U16 };

int import_numpy(void);

/* *data = the memory of a C-contiguous NumPy array of this type and rank. shape[i] >= 0 is
 * required, -1 is filled in. Raises ValueError or TypeError that says what to convert, and returns
 * false. */
bool array_in(PyObject *object, const char *name, enum array_type type, int ndim, Py_ssize_t *shape,
              void **data);

/* The same for an array with contiguous rows or columns; stride: in elements. */
bool array_strided_in(PyObject *object, const char *name, enum array_type type, int ndim,
                      Py_ssize_t *shape, Py_ssize_t *stride, void **data);

/* Whether an object is a NumPy array of this type; no exception. */
bool array_is(PyObject *object, enum array_type type);

/* The same as array_in for an array that is written. */
bool array_out(PyObject *object, const char *name, enum array_type type, int ndim,
               Py_ssize_t *shape, void **data);

/* A new array, and its memory. */
PyObject *array_new(enum array_type type, int ndim, const Py_ssize_t *shape, void **data);

/* Reads `count` numbers of a sequence; raises TypeError or ValueError naming `name` when they are
 * none, not finite as float32, or more or fewer. */
bool floats_in(PyObject *sequence, const char *name, Py_ssize_t count, float *out);

/* -- Configs (py_config.c) -------------------------------------------------------------------- */

/* Fills a config from a mapping (ModelConfig.to_core). rope_freq receives the frequencies; config
 * points to it. Raises and returns false when a key is missing or of the wrong type. */
#define MAX_ROPE_FREQ 2048
bool config_in(PyObject *mapping, struct ee_config *config, float rope_freq[MAX_ROPE_FREQ]);

/* -- Handles ---------------------------------------------------------------------------------- */

struct model_object {
    PyObject_HEAD struct ee_model *model;
    bool busy; /* a thread is in a call; everything that uses the model shares it */
    struct module_state *state;
};

/* Claims a model for a call; raises eellm.Error and returns false if another thread has it, or if
 * it was made by __new__ alone. */
bool begin_call(struct model_object *model);
void end_call(struct model_object *model);

/* Row of a parameter that the model holds; raises KeyError and returns -1 for any other name. */
int32_t find_parameter(const struct ee_params *params, const char *name);

/* Runs `call` (an expression that gives a status) on a claimed handle, without the GIL. */
#define RUN_WITHOUT_GIL(status, call)                                                              \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS(status) = (call);                                                   \
        Py_END_ALLOW_THREADS                                                                       \
    } while (0)

/* Communicators (py_comm.c). A handle that communicates keeps a reference to the Comm object that
 * it was given, so that the communicator outlives it, and claims the Comm for each of its calls.
 *
 * comm_of: the communicator of a Comm; raises TypeError naming `name` and returns NULL for any
 * other object. comm_wrap: a Comm that owns `comm`, which it destroys where there is no memory for
 * one. */
struct ee_comm *comm_of(struct module_state *state, PyObject *object, const char *name);
PyObject *comm_wrap(struct module_state *state, struct ee_comm *comm);

/* Claims a Comm for a call; raises eellm.BusyError and returns false if another thread has it. */
bool begin_comm(PyObject *comm);
void end_comm(PyObject *comm);

/* A view of memory that `owner` keeps alive. */
PyObject *tensor_view(struct module_state *state, PyObject *owner, const struct ee_tensor *tensor);

/* Each makes a type of the module. */
PyTypeObject *create_tensor_type(PyObject *module);
PyTypeObject *create_model_type(PyObject *module);
PyTypeObject *create_trainer_type(PyObject *module);
PyTypeObject *create_engine_type(PyObject *module);
PyTypeObject *create_comm_type(PyObject *module);
PyTypeObject *create_replay_type(PyObject *module);

/* A type from its spec; frees nothing on failure. */
PyTypeObject *create_type(PyObject *module, PyType_Spec *spec);

/* Addresses of the core's functions by name, for tests (symbols.c). */
PyObject *symbols(PyObject *module, PyObject *unused);

/* A schedule of Python (eellm.pipeline.Schedule.spec), checked; its pointers are to arrays that the
 * tuple keeps alive. Raises and returns false, or returns false with a status other than EE_OK,
 * which is to be raised. */
bool schedule_in(PyObject *tuple, struct ee_schedule_spec *spec, enum ee_status *status);

/* The lists of all ranks, a sequence of uint64 arrays that stays alive; given[ranks]. */
bool lists_in(PyObject *sequence, const struct ee_schedule_spec *spec, struct ee_given_list *given);

/* Lists of schedules, and their price (py_schedule.c). */
PyObject *schedule_actions(PyObject *module, PyObject *args);
PyObject *schedule_fill(PyObject *module, PyObject *args);
PyObject *schedule_walk(PyObject *module, PyObject *args);
/* py_replay.c. */
PyObject *schedule_buffers(PyObject *module, PyObject *args);

/* Where communicators come from, and what the core gives to their transports (py_comm.c). */
PyObject *comm_self(PyObject *module, PyObject *unused);
PyObject *comm_local(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *comm_grid(PyObject *module, PyObject *args);
PyObject *comm_adopt(PyObject *module, PyObject *capsule);
PyObject *comm_host(PyObject *module, PyObject *unused);

/* The events of a trace as an array [n, 9], which are then forgotten (py_replay.c). */
struct ee_trace;
PyObject *trace_array(struct ee_trace *trace);

/* Measurements and build information (measure.c). */
PyObject *build_info(PyObject *module, PyObject *unused);
PyObject *measure_bandwidth(PyObject *module, PyObject *args);
PyObject *measure_flops(PyObject *module, PyObject *args);

#endif
