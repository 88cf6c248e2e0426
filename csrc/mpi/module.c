/* The extension module eellm._mpi: gives the core a communicator over Open MPI.
 *
 * The core and the module meet in two capsules: eellm.host in, eellm.comm out (comm/host.h).
 * Whoever takes the communicator out of its capsule owns it from then on, and clears the capsule's
 * destructor. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "mpi/transport.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* The job stays until the process ends: its thread may be in MPI. */
struct module_state {
    struct job *job;
};

static struct module_state *state_of(PyObject *module) {
    return (struct module_state *)PyModule_GetState(module);
}

/* What is built in, against what is there: Open MPI keeps its ABI within a minor version. */
static bool check_library(void) {
    char found[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length, major = 0, minor = 0;
    MPI_Get_library_version(found, &length);
    bool is_open = sscanf(found, "Open MPI v%d.%d", &major, &minor) == 2;
    if (is_open && major == OMPI_MAJOR_VERSION && minor == OMPI_MINOR_VERSION)
        return true;
    char *comma = strchr(found, ',');
    if (comma)
        *comma = '\0';
    PyErr_Format(
        PyExc_ImportError,
        "eellm._mpi was built against Open MPI %d.%d.%d, and '%s' was loaded; run with the "
        "MPI it was built against (look at LD_LIBRARY_PATH), or build eellm again with "
        "EELLM_MPI=1 and MPICC set to the compiler of this one",
        OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION, OMPI_RELEASE_VERSION, found);
    return false;
}

static void destroy_comm(PyObject *capsule) {
    struct ee_comm *comm = PyCapsule_GetPointer(capsule, EE_COMM_CAPSULE);
    comm->destroy(comm);
}

/* eellm.CommError with the text of the failure, or NotImplementedError. */
static PyObject *raise(const struct ee_host *host, enum ee_status status) {
    if (status == EE_ERR_UNSUPPORTED) {
        PyErr_SetString(PyExc_NotImplementedError, host->last_error());
        return NULL;
    }
    PyObject *core = PyImport_ImportModule("eellm._core");
    PyObject *type = core ? PyObject_GetAttrString(core, "CommError") : NULL;
    if (type)
        PyErr_SetString(type, host->last_error());
    Py_XDECREF(type);
    Py_XDECREF(core);
    return NULL;
}

static PyObject *world(PyObject *module, PyObject *args) {
    struct module_state *state = state_of(module);
    PyObject *capsule;
    double timeout;
    Py_ssize_t largest = INT_MAX;
    if (!PyArg_ParseTuple(args, "Od|n:world", &capsule, &timeout, &largest))
        return NULL;
    if (!(timeout > 0) || largest < 1 || largest > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "timeout must be > 0, and largest 1 to %d", INT_MAX);
        return NULL;
    }
    const struct ee_host *host = PyCapsule_GetPointer(capsule, EE_HOST_CAPSULE);
    if (!host)
        return NULL;
    struct ee_comm *comm = NULL;
    enum ee_status status = ee_host_check(host);
    if (status == EE_OK && !state->job)
        status = ee_job_create(&state->job, host, (size_t)largest);
    Py_BEGIN_ALLOW_THREADS;
    if (status == EE_OK)
        status = ee_job_world(state->job, &comm, timeout);
    Py_END_ALLOW_THREADS;
    if (status != EE_OK)
        return raise(host, status);
    PyObject *result = PyCapsule_New(comm, EE_COMM_CAPSULE, destroy_comm);
    if (!result)
        comm->destroy(comm);
    return result;
}

static PyObject *end(PyObject *module, PyObject *unused) {
    (void)unused;
    struct job *job = state_of(module)->job;
    if (job) {
        Py_BEGIN_ALLOW_THREADS;
        ee_job_end(job);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

static PyObject *has_failed(PyObject *module, PyObject *unused) {
    (void)unused;
    struct job *job = state_of(module)->job;
    return PyBool_FromLong(job && job->failed);
}

static PyObject *is_started(PyObject *module, PyObject *unused) {
    (void)unused;
    struct job *job = state_of(module)->job;
    return PyBool_FromLong(job && job->started && !job->ended);
}

static PyObject *kill_job(PyObject *module, PyObject *unused) {
    (void)unused;
    struct job *job = state_of(module)->job;
    if (job)
        ee_job_kill(job);
    Py_RETURN_NONE;
}

static PyObject *library(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    char found[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(found, &length);
    return PyUnicode_FromString(found);
}

static PyMethodDef methods[] = {
    {"world", world, METH_VARARGS,
     "world($module, host, timeout, largest=2147483647, /)\n--\n\n"
     "The communicator of all ranks, as a capsule for _core.comm_adopt."},
    {"end", end, METH_NOARGS, "end($module, /)\n--\n\nEnds MPI, unless something has failed."},
    {"kill", kill_job, METH_NOARGS, "kill($module, /)\n--\n\nEnds all ranks with status 1."},
    {"has_failed", has_failed, METH_NOARGS,
     "has_failed($module, /)\n--\n\nWhether communication has failed."},
    {"is_started", is_started, METH_NOARGS,
     "is_started($module, /)\n--\n\nWhether MPI runs in this process."},
    {"library", library, METH_NOARGS,
     "library($module, /)\n--\n\nHow the MPI that was loaded calls itself."},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    (void)module;
    return check_library() ? 0 : -1;
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
    .m_name = "eellm._mpi",
    .m_doc = "Communication over Open MPI; see eellm/_mpi.pyi.",
    .m_size = sizeof(struct module_state),
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__mpi(void);

PyMODINIT_FUNC PyInit__mpi(void) {
    return PyModuleDef_Init(&module_def);
}
