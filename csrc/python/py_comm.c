/* eellm._core.Comm: a communicator, and where it comes from. */
#include "python/py_util.h"

#include "base/alloc.h"
#include "comm/grid.h"
#include "comm/host.h"

struct comm_object {
    PyObject_HEAD struct ee_comm *comm;
    bool busy; /* a thread is in a call */
    struct module_state *state;
};

PyObject *comm_wrap(struct module_state *state, struct ee_comm *comm) {
    struct comm_object *self = (struct comm_object *)PyType_GenericAlloc(state->comm_type, 0);
    if (!self) {
        ee_comm_destroy(comm);
        return NULL;
    }
    self->comm = comm;
    self->state = state;
    return (PyObject *)self;
}

struct ee_comm *comm_of(struct module_state *state, PyObject *object, const char *name) {
    if (Py_TYPE(object) == state->comm_type)
        return ((struct comm_object *)object)->comm;
    raise_type(name, "an eellm._core.Comm", object);
    return NULL;
}

bool begin_comm(PyObject *object) {
    struct comm_object *self = (struct comm_object *)object;
    if (self->busy) {
        PyErr_Format(self->state->busy_error,
                     "the communicator of rank %d is in use by another thread; give each thread a "
                     "communicator of its own",
                     self->comm->rank);
        return false;
    }
    self->busy = true;
    return true;
}

void end_comm(PyObject *object) {
    ((struct comm_object *)object)->busy = false;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ee_comm_destroy(((struct comm_object *)object)->comm);
    PyObject_Free(object);
    Py_DECREF(type);
}

/* Runs `call` on a claimed communicator, and gives it back. */
#define RUN_COMM(status, object, call)                                                             \
    do {                                                                                           \
        RUN_WITHOUT_GIL(status, call);                                                             \
        end_comm(object);                                                                          \
    } while (0)

/* -- Properties ------------------------------------------------------------------------------- */

static PyObject *get_rank(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromLong(((struct comm_object *)object)->comm->rank);
}

static PyObject *get_size(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromLong(((struct comm_object *)object)->comm->size);
}

static PyObject *get_transport(PyObject *object, void *closure) {
    (void)closure;
    return PyUnicode_FromString(((struct comm_object *)object)->comm->transport);
}

static PyObject *get_timeout(PyObject *object, void *closure) {
    (void)closure;
    return PyFloat_FromDouble(((struct comm_object *)object)->comm->timeout);
}

/* A number of seconds > 0; -1 with an exception for anything else. */
static double seconds_of(PyObject *value) {
    double seconds = PyFloat_AsDouble(value);
    if (seconds == -1 && PyErr_Occurred())
        return -1;
    if (!(seconds > 0)) {
        PyErr_Format(PyExc_ValueError, "timeout must be more than 0 seconds, got %R", value);
        return -1;
    }
    return seconds;
}

static int set_timeout(PyObject *object, PyObject *value, void *closure) {
    (void)closure;
    struct comm_object *self = (struct comm_object *)object;
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "timeout cannot be deleted");
        return -1;
    }
    double seconds = seconds_of(value);
    if (seconds < 0 || !begin_comm(object))
        return -1;
    self->comm->timeout = seconds;
    end_comm(object);
    return 0;
}

static PyObject *get_polling(PyObject *object, void *closure) {
    (void)closure;
    return PyFloat_FromDouble(((struct comm_object *)object)->comm->polling);
}

static int set_polling(PyObject *object, PyObject *value, void *closure) {
    (void)closure;
    double seconds = value ? PyFloat_AsDouble(value) : 0;
    if (!value)
        PyErr_SetString(PyExc_AttributeError, "polling cannot be deleted");
    else if (!(seconds >= 0) && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "polling must be at least 0 seconds, got %R", value);
    if (PyErr_Occurred() || !begin_comm(object))
        return -1;
    ((struct comm_object *)object)->comm->polling = seconds;
    end_comm(object);
    return 0;
}

/* -- Arrays ----------------------------------------------------------------------------------- */

/* A contiguous array of any type through the buffer protocol. */
static bool get_array(PyObject *object, const char *name, bool writable, Py_buffer *view) {
    int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, view, flags) == 0)
        return true;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (PyErr_GivenExceptionMatches(type, PyExc_TypeError))
        raise_type(name, "a NumPy array", object);
    else
        PyErr_Format(PyExc_ValueError, "%s must be a C-contiguous%s array (%S); use .copy()", name,
                     writable ? ", writable" : "", value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return false;
}

/* The element type of a view, in this machine's order of bytes. */
static bool element_type(const Py_buffer *view, enum ee_comm_type *type) {
    const char *format = view->format ? view->format : "B";
    char code = format[0] == '@' || format[0] == '=' ? format[1] : format[0];
    bool single = strlen(format) == (size_t)(1 + (format[0] == '@' || format[0] == '='));
    bool integer = code == 'i' || code == 'l' || code == 'q';
    bool known = true;
    if (code == 'f' && view->itemsize == 4)
        *type = EE_COMM_F32;
    else if (code == 'd' && view->itemsize == 8)
        *type = EE_COMM_F64;
    else if (integer && view->itemsize == 4)
        *type = EE_COMM_I32;
    else if (integer && view->itemsize == 8)
        *type = EE_COMM_I64;
    else
        known = false;
    if (!known || !single)
        PyErr_Format(PyExc_ValueError,
                     "array must be of dtype float32, float64, int32 or int64, got format '%s'; "
                     "use .astype",
                     format);
    else if ((uintptr_t)view->buf % (size_t)view->itemsize != 0)
        PyErr_SetString(PyExc_ValueError, "array must be aligned in memory; use .copy()");
    return !PyErr_Occurred();
}

/* -- Collectives ------------------------------------------------------------------------------ */

static PyObject *barrier(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"what", NULL};
    struct comm_object *self = (struct comm_object *)object;
    const char *what = "barrier";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|s:barrier", names, &what) ||
        !begin_comm(object))
        return NULL;
    enum ee_status status;
    RUN_COMM(status, object, ee_comm_barrier(self->comm, (struct ee_action){what, -1}));
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

/* What all_gather holds: the length of every rank's data, and the data padded to the longest. */
struct gathered {
    int64_t *length;
    char *data;
    int64_t longest;
};

static enum ee_status allocate_padded(struct gathered *out, int size) {
    size_t bytes;
    void *memory;
    if (!ee_mul_size((size_t)out->longest, (size_t)size + 1, &bytes))
        EE_FAIL(EE_ERR_NOMEM, "no memory for %lld bytes of each rank", (long long)out->longest);
    EE_TRY(ee_alloc(&memory, bytes, "gathered data"));
    out->data = memory;
    return EE_OK;
}

static enum ee_status gather(struct ee_comm *comm, const char *data, int64_t length,
                             struct gathered *out) {
    static const struct ee_action lengths = {"all_gather, lengths", -1};
    static const struct ee_action contents = {"all_gather, data", -1};
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)comm->size * sizeof *out->length, "lengths of data"));
    out->length = memory;
    EE_TRY(ee_comm_all_gather(comm, out->length, &length, sizeof length, lengths));
    for (int i = 0; i < comm->size; i++)
        out->longest = ee_max(out->longest, out->length[i]);
    enum ee_status status = allocate_padded(out, comm->size);
    if (status != EE_OK) {
        /* The others already wait for the data. */
        ee_comm_abort(comm, ee_last_error());
        return status;
    }
    char *own = out->data + (int64_t)comm->size * out->longest;
    if (length > 0)
        memcpy(own, data, (size_t)length);
    return ee_comm_all_gather(comm, out->data, own, (size_t)out->longest, contents);
}

static PyObject *all_gather(PyObject *object, PyObject *data) {
    struct comm_object *self = (struct comm_object *)object;
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_Check(data))
        return raise_type("data", "bytes", data);
    if (PyBytes_AsStringAndSize(data, &bytes, &length) < 0 || !begin_comm(object))
        return NULL;
    struct gathered gathered = {NULL, NULL, 0};
    enum ee_status status;
    RUN_COMM(status, object, gather(self->comm, bytes, length, &gathered));
    PyObject *list = NULL;
    if (status != EE_OK)
        raise_status(self->state, status);
    else
        list = PyList_New(self->comm->size);
    for (int i = 0; list && i < self->comm->size; i++) {
        PyObject *item = PyBytes_FromStringAndSize(gathered.data + i * gathered.longest,
                                                   (Py_ssize_t)gathered.length[i]);
        if (!item || PyList_SetItem(list, i, item) < 0)
            Py_CLEAR(list);
    }
    ee_free(gathered.length);
    ee_free(gathered.data);
    return list;
}

/* The root's length in *length on every rank. */
static enum ee_status spread_length(struct ee_comm *comm, int64_t *length, int root) {
    struct ee_action action = {"broadcast, length", -1};
    return ee_comm_broadcast(comm, length, sizeof *length, root, action);
}

static PyObject *broadcast_bytes(struct comm_object *self, PyObject *data, int root) {
    PyObject *object = (PyObject *)self;
    bool is_root = root == self->comm->rank;
    int64_t length = is_root ? (int64_t)PyBytes_Size(data) : 0;
    enum ee_status status;
    if (!begin_comm(object))
        return NULL;
    RUN_WITHOUT_GIL(status, spread_length(self->comm, &length, root));
    PyObject *out = NULL;
    if (status == EE_OK)
        out = is_root ? Py_NewRef(data) : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!out) {
        /* The others already wait for the data. */
        if (status == EE_OK)
            ee_comm_abort(self->comm, "no memory for a broadcast");
        end_comm(object);
        return status == EE_OK ? NULL : raise_status(self->state, status);
    }
    struct ee_action action = {"broadcast, data", -1};
    RUN_COMM(status, object,
             ee_comm_broadcast(self->comm, PyBytes_AsString(out), (size_t)length, root, action));
    if (status == EE_OK)
        return out;
    Py_DECREF(out);
    return raise_status(self->state, status);
}

static PyObject *broadcast(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", "root", NULL};
    struct comm_object *self = (struct comm_object *)object;
    PyObject *data;
    int root = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|i:broadcast", names, &data, &root))
        return NULL;
    bool is_root = root == self->comm->rank;
    if (!PyBytes_Check(data) && (is_root || data != Py_None))
        return raise_type("data", is_root ? "bytes on the root" : "bytes or None", data);
    return broadcast_bytes(self, data, root);
}

static PyObject *all_reduce(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"array", "op", NULL};
    struct comm_object *self = (struct comm_object *)object;
    PyObject *array;
    const char *op = "sum";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s:all_reduce", names, &array, &op))
        return NULL;
    bool sum = strcmp(op, "sum") == 0;
    if (!sum && strcmp(op, "max") != 0)
        return PyErr_Format(PyExc_ValueError, "op must be 'sum' or 'max', got '%s'", op);
    Py_buffer view;
    enum ee_comm_type type = EE_COMM_F32;
    if (!get_array(array, "array", true, &view))
        return NULL;
    if (!element_type(&view, &type) || !begin_comm(object)) {
        PyBuffer_Release(&view);
        return NULL;
    }
    enum ee_status status;
    struct ee_action action = {"all_reduce", -1};
    RUN_COMM(status, object,
             ee_comm_all_reduce(self->comm, view.buf, view.buf, view.len / view.itemsize, type,
                                sum ? EE_COMM_SUM : EE_COMM_MAX, action));
    PyBuffer_Release(&view);
    return status == EE_OK ? Py_NewRef(array) : raise_status(self->state, status);
}

static PyObject *split(PyObject *object, PyObject *args) {
    struct comm_object *self = (struct comm_object *)object;
    int colour, key;
    if (!PyArg_ParseTuple(args, "ii:split", &colour, &key) || !begin_comm(object))
        return NULL;
    struct ee_comm *part;
    enum ee_status status;
    RUN_COMM(status, object, ee_comm_split(self->comm, &part, colour, key));
    if (status != EE_OK)
        return raise_status(self->state, status);
    if (!part)
        Py_RETURN_NONE;
    return comm_wrap(self->state, part);
}

static PyObject *abort_comm(PyObject *object, PyObject *args) {
    struct comm_object *self = (struct comm_object *)object;
    const char *reason;
    if (!PyArg_ParseTuple(args, "s:abort", &reason) || !begin_comm(object))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    ee_comm_abort(self->comm, reason);
    Py_END_ALLOW_THREADS;
    end_comm(object);
    Py_RETURN_NONE;
}

/* -- Messages --------------------------------------------------------------------------------- */

struct exchange {
    int count;
    struct ee_message messages[EE_COMM_MAX_MESSAGES];
    Py_buffer views[EE_COMM_MAX_MESSAGES];
};

static bool add_message(struct exchange *exchange, enum ee_direction direction, PyObject *item) {
    PyObject *array;
    struct ee_message message = {.direction = direction, .action = {NULL, -1}};
    const char *name = direction == EE_SEND ? "a send" : "a receive";
    if (!PyTuple_Check(item)) {
        raise_type(name, "a tuple (peer, tag, array)", item);
        return false;
    }
    if (!PyArg_ParseTuple(item, "iiO:exchange", &message.peer, &message.tag, &array))
        return false;
    if (exchange->count == EE_COMM_MAX_MESSAGES) {
        PyErr_Format(PyExc_ValueError, "an exchange has at most %d messages", EE_COMM_MAX_MESSAGES);
        return false;
    }
    Py_buffer *view = &exchange->views[exchange->count];
    if (!get_array(array, "the array of a message", direction == EE_RECEIVE, view))
        return false;
    message.data = view->buf;
    message.bytes = (size_t)view->len;
    exchange->messages[exchange->count++] = message;
    return true;
}

static bool add_messages(struct exchange *exchange, enum ee_direction direction, PyObject *list) {
    if (!PyList_Check(list)) {
        raise_type(direction == EE_SEND ? "sends" : "receives", "a list", list);
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        if (!add_message(exchange, direction, PyList_GetItem(list, i)))
            return false;
    }
    return true;
}

static PyObject *exchange(PyObject *object, PyObject *args) {
    struct comm_object *self = (struct comm_object *)object;
    PyObject *sends, *receives;
    if (!PyArg_ParseTuple(args, "OO:exchange", &sends, &receives))
        return NULL;
    struct exchange *all = PyMem_Calloc(1, sizeof *all);
    if (!all)
        return PyErr_NoMemory();
    bool ok = add_messages(all, EE_SEND, sends) && add_messages(all, EE_RECEIVE, receives) &&
              begin_comm(object);
    enum ee_status status = EE_OK;
    if (ok)
        RUN_COMM(status, object, ee_comm_exchange(self->comm, all->messages, all->count));
    for (int i = 0; i < all->count; i++)
        PyBuffer_Release(&all->views[i]);
    PyMem_Free(all);
    if (status != EE_OK)
        return raise_status(self->state, status);
    return ok ? Py_NewRef(Py_None) : NULL;
}

static PyObject *repr(PyObject *object) {
    const struct ee_comm *comm = ((struct comm_object *)object)->comm;
    return PyUnicode_FromFormat("Comm(rank %d of %d, %s)", comm->rank, comm->size, comm->transport);
}

/* -- Where they come from --------------------------------------------------------------------- */

PyObject *comm_self(PyObject *module, PyObject *unused) {
    (void)unused;
    struct module_state *state = module_state(module);
    struct ee_comm *comm;
    enum ee_status status = ee_comm_self(&comm);
    return status == EE_OK ? comm_wrap(state, comm) : raise_status(state, status);
}

/* Wraps all of them, or destroys all. */
static PyObject *wrap_list(struct module_state *state, struct ee_comm **comms, int size) {
    PyObject *list = PyList_New(size);
    for (int i = 0; i < size; i++) {
        PyObject *item = list ? comm_wrap(state, comms[i]) : NULL;
        if (!list)
            ee_comm_destroy(comms[i]);
        else if (!item || PyList_SetItem(list, i, item) < 0)
            Py_CLEAR(list);
    }
    return list;
}

PyObject *comm_local(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"size", "timeout", NULL};
    struct module_state *state = module_state(module);
    int size;
    double timeout = EE_COMM_TIMEOUT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i|d:comm_local", names, &size, &timeout))
        return NULL;
    struct ee_comm **comms = PyMem_Calloc(EE_COMM_LOCAL_RANKS, sizeof(struct ee_comm *));
    if (!comms)
        return PyErr_NoMemory();
    enum ee_status status = ee_comm_local(comms, size, timeout);
    PyObject *list = status == EE_OK ? wrap_list(state, comms, size) : raise_status(state, status);
    PyMem_Free(comms);
    return list;
}

/* ((data, tensor, pipeline), three communicators); takes them, or destroys them. */
static PyObject *wrap_grid(struct module_state *state, const struct ee_grid *grid) {
    struct ee_comm *comms[] = {grid->data, grid->tensor, grid->pipeline};
    PyObject *list = wrap_list(state, comms, 3);
    const struct ee_grid_place *at = &grid->place;
    return list ? Py_BuildValue("(iii)N", at->data, at->tensor, at->pipeline, list) : NULL;
}

PyObject *comm_grid(PyObject *module, PyObject *args) {
    struct module_state *state = module_state(module);
    struct ee_grid_size size;
    struct ee_grid grid;
    PyObject *world;
    if (!PyArg_ParseTuple(args, "Oiii:comm_grid", &world, &size.data, &size.tensor, &size.pipeline))
        return NULL;
    struct ee_comm *comm = comm_of(state, world, "comm");
    if (!comm || !begin_comm(world))
        return NULL;
    enum ee_status status;
    RUN_COMM(status, world, ee_grid_create(&grid, comm, size));
    return status == EE_OK ? wrap_grid(state, &grid) : raise_status(state, status);
}

PyObject *comm_adopt(PyObject *module, PyObject *capsule) {
    struct module_state *state = module_state(module);
    if (!PyCapsule_IsValid(capsule, EE_COMM_CAPSULE))
        return PyCapsule_CheckExact(capsule)
                   ? PyErr_Format(PyExc_ValueError,
                                  "capsule must hold a communicator that has not been adopted")
                   : raise_type("capsule", "a capsule of a communicator", capsule);
    struct ee_comm *comm = PyCapsule_GetPointer(capsule, EE_COMM_CAPSULE);
    enum ee_status status = ee_comm_check(comm);
    if (status != EE_OK)
        return raise_status(state, status);
    if (PyCapsule_SetDestructor(capsule, NULL) < 0 ||
        PyCapsule_SetName(capsule, EE_COMM_CAPSULE ".adopted") < 0)
        return NULL;
    return comm_wrap(state, comm);
}

PyObject *comm_host(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyCapsule_New((void *)(uintptr_t)ee_host(), EE_HOST_CAPSULE, NULL);
}

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"barrier", WITH_KEYWORDS(barrier),
     "barrier($self, what='barrier')\n--\n\nReturns once every rank has called it."},
    {"all_gather", all_gather, METH_O,
     "all_gather($self, data, /)\n--\n\nThe data of every rank, of any length each."},
    {"broadcast", WITH_KEYWORDS(broadcast),
     "broadcast($self, data, root=0)\n--\n\nThe data of the root."},
    {"all_reduce", WITH_KEYWORDS(all_reduce),
     "all_reduce($self, array, op='sum')\n--\n\nReduces an array over the ranks, in place."},
    {"split", split, METH_VARARGS,
     "split($self, colour, key, /)\n--\n\nA communicator of the ranks of the same colour."},
    {"exchange", exchange, METH_VARARGS,
     "exchange($self, sends, receives, /)\n--\n\nStarts all messages and waits for them."},
    {"abort", abort_comm, METH_VARARGS,
     "abort($self, reason, /)\n--\n\nMakes the calls of all ranks fail."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"rank", get_rank, NULL, "This rank.", NULL},
    {"size", get_size, NULL, "Number of ranks.", NULL},
    {"transport", get_transport, NULL, "Name of the transport.", NULL},
    {"timeout", get_timeout, set_timeout, "Seconds that a wait lasts at most.", NULL},
    {"polling", get_polling, set_polling, "Seconds for which a wait polls.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc},
    {Py_tp_repr, repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "A communicator: this rank's side of a numbered group."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Comm",
    .basicsize = sizeof(struct comm_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_comm_type(PyObject *module) {
    return create_type(module, &spec);
}
