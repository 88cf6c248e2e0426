/* eellm._core.Replay: a schedule run with waits in place of its actions. */
#include "python/py_util.h"

#include "train/replay.h"

struct replay_object {
    PyObject_HEAD struct ee_replay *replay;
    PyObject *comm;
    struct ee_trace *trace; /* NULL: steps are not recorded */
    struct module_state *state;
};

PyObject *trace_array(struct ee_trace *trace) {
    const Py_ssize_t shape[] = {trace ? (Py_ssize_t)trace->count : 0, 9};
    void *data;
    PyObject *array = array_new(ARRAY_F64, 2, shape, &data);
    double *row = data;
    for (Py_ssize_t i = 0; array && i < shape[0]; i++, row += 9) {
        const struct ee_trace_event *e = &trace->events[i];
        const double values[] = {
            e->start,        e->end,           (double)e->bytes,      (double)e->kind,
            (double)e->what, (double)e->chunk, (double)e->microbatch, (double)e->peer,
            (double)e->tag};
        memcpy(row, values, sizeof values);
    }
    if (array && trace)
        trace->count = 0;
    return array;
}

static PyObject *new_replay(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    PyObject *object = PyType_GenericAlloc(type, 0);
    if (object)
        ((struct replay_object *)object)->state = PyType_GetModuleState(type);
    return object;
}

static int create(struct replay_object *self, PyObject *comm, struct ee_replay_config *config) {
    if (!begin_comm(comm))
        return -1;
    struct ee_replay *replay = NULL;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_replay_create(&replay, config));
    end_comm(comm);
    if (status != EE_OK) {
        raise_status(self->state, status);
        return -1;
    }
    if (self->replay) {
        ee_replay_destroy(replay);
        PyErr_SetString(self->state->error, "the replay is initialised already");
        return -1;
    }
    self->replay = replay;
    self->comm = Py_NewRef(comm);
    return 0;
}

static int create_with_lists(struct replay_object *self, PyObject *comm, PyObject *lists,
                             struct ee_replay_config *config) {
    if (!lists || lists == Py_None)
        return create(self, comm, config);
    config->lists = PyMem_Calloc((size_t)config->schedule.ranks, sizeof *config->lists);
    int result = -1;
    if (!config->lists)
        PyErr_NoMemory();
    else if (lists_in(lists, &config->schedule, config->lists))
        result = create(self, comm, config);
    PyMem_Free(config->lists);
    return result;
}

static int init(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct replay_object *self = (struct replay_object *)object;
    static char *names[] = {"spec", "seconds", "comm", "floats", "lists", NULL};
    struct ee_replay_config config = {0};
    PyObject *spec, *seconds, *comm, *lists = NULL;
    long long floats;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOL|O:Replay", names, &spec, &seconds, &comm,
                                     &floats, &lists))
        return -1;
    if (self->replay) {
        PyErr_SetString(self->state->error, "the replay is initialised already");
        return -1;
    }
    enum ee_status status;
    if (!schedule_in(spec, &config.schedule, &status)) {
        if (status != EE_OK)
            raise_status(self->state, status);
        return -1;
    }
    void *data;
    Py_ssize_t shape[] = {EE_STEP_KINDS, config.schedule.chunks};
    if (!(config.comm = comm_of(self->state, comm, "comm")) ||
        !array_in(seconds, "seconds", ARRAY_F64, 2, shape, &data))
        return -1;
    config.seconds = data;
    config.floats = floats;
    return create_with_lists(self, comm, lists, &config);
}

static void dealloc(PyObject *object) {
    struct replay_object *self = (struct replay_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    ee_replay_destroy(self->replay);
    ee_trace_destroy(self->trace);
    Py_XDECREF(self->comm);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* Claims the communicator for a call, which claims the replay too. */
static bool begin_run(struct replay_object *self) {
    if (self->replay)
        return begin_comm(self->comm);
    PyErr_SetString(self->state->error, "the replay is not initialised");
    return false;
}

static PyObject *run(PyObject *object, PyObject *unused) {
    (void)unused;
    struct replay_object *self = (struct replay_object *)object;
    if (!begin_run(self))
        return NULL;
    double start, end, busy;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_replay_run(self->replay, self->trace, &start, &end, &busy));
    end_comm(self->comm);
    if (status != EE_OK)
        return raise_status(self->state, status);
    return Py_BuildValue("(ddd)", start, end, busy);
}

static PyObject *record(PyObject *object, PyObject *args) {
    struct replay_object *self = (struct replay_object *)object;
    long long capacity;
    if (!PyArg_ParseTuple(args, "L:record", &capacity) || !begin_run(self))
        return NULL;
    enum ee_status status = EE_OK;
    ee_trace_destroy(self->trace);
    self->trace = NULL;
    if (capacity > 0)
        status = ee_trace_create(&self->trace, ee_min(capacity, 1 << 24));
    end_comm(self->comm);
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

static PyObject *recorded(PyObject *object, PyObject *unused) {
    (void)unused;
    struct replay_object *self = (struct replay_object *)object;
    if (!begin_run(self))
        return NULL;
    PyObject *array = trace_array(self->trace);
    end_comm(self->comm);
    return array;
}

PyObject *schedule_buffers(PyObject *module, PyObject *args) {
    struct module_state *state = module_state(module);
    struct ee_schedule_spec spec = {0};
    PyObject *tuple, *lists;
    enum ee_status status;
    if (!PyArg_ParseTuple(args, "OO", &tuple, &lists))
        return NULL;
    if (!schedule_in(tuple, &spec, &status))
        return status == EE_OK ? NULL : raise_status(state, status);
    struct ee_given_list *given = NULL;
    if (lists != Py_None) {
        given = PyMem_Calloc((size_t)spec.ranks, sizeof *given);
        if (!given)
            return PyErr_NoMemory();
        if (!lists_in(lists, &spec, given)) {
            PyMem_Free(given);
            return NULL;
        }
    }
    int32_t buffers;
    RUN_WITHOUT_GIL(status, ee_walk_buffers(&spec, given, &buffers));
    PyMem_Free(given);
    return status == EE_OK ? PyLong_FromLong(buffers) : raise_status(state, status);
}

static PyMethodDef methods[] = {
    {"run", run, METH_NOARGS,
     "run($self, /)\n--\n\nOne step: (start, end, seconds in actions) of this rank."},
    {"record", record, METH_VARARGS,
     "record($self, capacity, /)\n--\n\nRecords up to `capacity` events from now on; 0 ends it."},
    {"recorded", recorded, METH_NOARGS,
     "recorded($self, /)\n--\n\nThe events recorded since the last call."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_init, init},
    {Py_tp_dealloc, dealloc},
    {Py_tp_new, new_replay},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Replay(spec, seconds, comm, floats, lists=None)\n--\n\n"
                "A schedule with waits in place of its actions."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Replay",
    .basicsize = sizeof(struct replay_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_replay_type(PyObject *module) {
    return create_type(module, &spec);
}
