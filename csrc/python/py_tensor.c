/* eellm._core.Tensor: a view of the core's memory, out through the buffer protocol and DLPack. */
#include "python/py_util.h"

#include "base/alloc.h"

struct tensor_object {
    PyObject_HEAD PyObject *owner;
    struct ee_tensor tensor;
    struct module_state *state;
    /* For the buffer protocol: in bytes, alive as long as the object. */
    Py_ssize_t shape[EE_MAX_DIMS], strides[EE_MAX_DIMS];
};

/* The structures of DLPack 1.0 (dmlc.github.io/dlpack), as far as they are needed. */
struct dl_device {
    int32_t type; /* 1: CPU */
    int32_t id;
};

struct dl_tensor {
    void *data;
    struct dl_device device;
    int32_t ndim;
    uint8_t type_code; /* 2: float, 4: bfloat */
    uint8_t bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct dl_managed {
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
};

struct dl_managed_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    struct dl_tensor tensor;
};

PyObject *tensor_view(struct module_state *state, PyObject *owner, const struct ee_tensor *tensor) {
    struct tensor_object *self = PyObject_GC_New(struct tensor_object, state->tensor_type);
    if (!self)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->tensor = *tensor;
    self->state = state;
    for (int i = 0; i < tensor->ndim; i++) {
        self->shape[i] = (Py_ssize_t)tensor->shape[i];
        self->strides[i] = (Py_ssize_t)(tensor->stride[i] * (int64_t)ee_dtype_size(tensor->dtype));
    }
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static int traverse(PyObject *object, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((struct tensor_object *)object)->owner);
    return 0;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_CLEAR(((struct tensor_object *)object)->owner);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

static PyObject *get_shape(PyObject *object, void *closure) {
    (void)closure;
    const struct ee_tensor *t = &((struct tensor_object *)object)->tensor;
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(t->shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size) < 0)
            Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *get_dtype(PyObject *object, void *closure) {
    (void)closure;
    return PyUnicode_FromString(ee_dtype_name(((struct tensor_object *)object)->tensor.dtype));
}

/* Whether a consumer that asks with these flags can take the tensor as it lies. */
static bool fits_request(const struct ee_tensor *t, int flags) {
    bool by_rows = ee_tensor_contiguous(t);
    bool by_columns = by_rows && (t->ndim < 2 || t->shape[0] <= 1 || t->shape[1] <= 1);
    if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS && !by_columns)
        return false;
    bool strided = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
    bool any_order = strided && (flags & PyBUF_C_CONTIGUOUS) != PyBUF_C_CONTIGUOUS &&
                     (flags & PyBUF_ANY_CONTIGUOUS) != PyBUF_ANY_CONTIGUOUS;
    return by_rows || any_order;
}

static int get_buffer(PyObject *object, Py_buffer *view, int flags) {
    struct tensor_object *self = (struct tensor_object *)object;
    const struct ee_tensor *t = &self->tensor;
    view->obj = NULL;
    if (t->dtype != EE_F32) {
        PyErr_Format(PyExc_BufferError, "the buffer protocol has no %s; use DLPack",
                     ee_dtype_name(t->dtype));
        return -1;
    }
    if (!fits_request(t, flags)) {
        PyErr_SetString(PyExc_BufferError,
                        "the tensor does not lie in the order that is asked for; ask for strides");
        return -1;
    }
    view->buf = t->data;
    view->obj = Py_NewRef(object);
    view->len = (Py_ssize_t)ee_tensor_elements(t) * (Py_ssize_t)sizeof(float);
    view->itemsize = sizeof(float);
    view->readonly = 0;
    view->ndim = t->ndim;
    static char format[] = "f";
    view->format = (flags & PyBUF_FORMAT) ? format : NULL;
    view->shape = (flags & PyBUF_ND) ? self->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL;
    view->suboffsets = NULL;
    view->internal = NULL;
    return 0;
}

/* The consumer may delete from a thread without the GIL, or after Python has ended: then the
 * reference is left alone rather than touched. */
static void release_owner(void *context) {
    if (!Py_IsInitialized())
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF((PyObject *)context);
    PyGILState_Release(gil);
}

static void delete_managed(struct dl_managed *self) {
    release_owner(self->context);
    ee_free(self);
}

static void delete_versioned(struct dl_managed_versioned *self) {
    release_owner(self->context);
    ee_free(self);
}

/* A consumed capsule has another name, and its consumer calls the deleter. */
static void capsule_destructor(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        struct dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        managed->deleter(managed);
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        struct dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        managed->deleter(managed);
    }
}

static struct dl_tensor describe(struct tensor_object *self) {
    struct ee_tensor *t = &self->tensor;
    return (struct dl_tensor){.data = t->data,
                              .device = {1, 0},
                              .ndim = t->ndim,
                              .type_code = t->dtype == EE_BF16 ? 4 : 2,
                              .bits = (uint8_t)(8 * ee_dtype_size(t->dtype)),
                              .lanes = 1,
                              .shape = t->shape,
                              .strides = t->stride};
}

static PyObject *export_managed(struct tensor_object *self, bool versioned) {
    size_t size = versioned ? sizeof(struct dl_managed_versioned) : sizeof(struct dl_managed);
    void *memory;
    enum ee_status status = ee_alloc(&memory, size, "an export");
    if (status != EE_OK)
        return raise_status(self->state, status);
    if (versioned) {
        struct dl_managed_versioned *managed = memory;
        managed->major = 1;
        managed->context = Py_NewRef((PyObject *)self);
        managed->deleter = delete_versioned;
        managed->tensor = describe(self);
    } else {
        struct dl_managed *managed = memory;
        managed->context = Py_NewRef((PyObject *)self);
        managed->deleter = delete_managed;
        managed->tensor = describe(self);
    }
    PyObject *capsule =
        PyCapsule_New(memory, versioned ? "dltensor_versioned" : "dltensor", capsule_destructor);
    if (!capsule) {
        Py_DECREF((PyObject *)self);
        ee_free(memory);
    }
    return capsule;
}

/* The two integers of a tuple, or as they are if `pair` is None. */
static bool read_pair(PyObject *pair, const char *name, int *first, int *second) {
    if (pair == Py_None)
        return true;
    PyObject *integers[] = {NULL, NULL};
    if (PyTuple_Check(pair) && PyTuple_Size(pair) == 2)
        for (int i = 0; i < 2; i++)
            integers[i] = PyNumber_Index(PyTuple_GetItem(pair, i));
    if (integers[0] && integers[1]) {
        *first = (int)PyLong_AsLong(integers[0]);
        *second = (int)PyLong_AsLong(integers[1]);
    } else {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be None or a tuple of two integers, got %R", name,
                     pair);
    }
    Py_XDECREF(integers[0]);
    Py_XDECREF(integers[1]);
    return !PyErr_Occurred();
}

static PyObject *dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO", names, &stream, &version, &device,
                                     &copy))
        return NULL;
    if (stream != Py_None) {
        PyErr_SetString(PyExc_BufferError, "a CPU tensor has no stream; pass stream=None");
        return NULL;
    }
    int wants_copy = PyObject_IsTrue(copy);
    if (wants_copy < 0)
        return NULL;
    if (wants_copy) {
        PyErr_SetString(PyExc_BufferError, "the tensor is exported without a copy; copy it after");
        return NULL;
    }
    int type = 1, id = 0, major = 0, minor = 0;
    if (!read_pair(device, "dl_device", &type, &id) ||
        !read_pair(version, "max_version", &major, &minor))
        return NULL;
    if (type != 1 || id != 0) {
        PyErr_Format(PyExc_BufferError, "the tensor lies on the CPU (1, 0), asked for (%d, %d)",
                     type, id);
        return NULL;
    }
    return export_managed((struct tensor_object *)object, major >= 1);
}

static PyObject *dlpack_device(PyObject *object, PyObject *unused) {
    (void)object, (void)unused;
    return Py_BuildValue("ii", 1, 0);
}

static PyObject *repr(PyObject *object) {
    char text[128];
    ee_tensor_describe(&((struct tensor_object *)object)->tensor, text, sizeof text);
    return PyUnicode_FromFormat("Tensor(%s)", text);
}

static PyMethodDef methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))dlpack, METH_VARARGS | METH_KEYWORDS,
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "Exports the tensor without a copy."},
    {"__dlpack_device__", dlpack_device, METH_NOARGS,
     "__dlpack_device__($self, /)\n--\n\n(1, 0): the CPU."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"shape", get_shape, NULL, "Sizes.", NULL},
    {"dtype", get_dtype, NULL, "Name of the element type.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_repr, repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_bf_getbuffer, get_buffer},
    {Py_tp_doc, "A view of memory of the core."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Tensor",
    .basicsize = sizeof(struct tensor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_tensor_type(PyObject *module) {
    return create_type(module, &spec);
}
