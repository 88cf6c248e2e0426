/* eellm._core.Engine: decoding. */
#include "python/py_util.h"

#include "infer/engine.h"

#include <string.h>

struct engine_object {
    PyObject_HEAD struct ee_engine *engine;
    struct model_object *model;
    PyObject *event_dtype;
};

static const char *const engine_names[] = {"full", "deferred", NULL};

static struct engine_object *self_of(PyObject *object) {
    return (struct engine_object *)object;
}

/* Index of `name` in a list that NULL ends; raises ValueError naming `what` when it is not there.
 */
static int name_index(const char *what, const char *name, const char *const *names) {
    for (int i = 0; names[i]; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    PyErr_Format(PyExc_ValueError, "unknown %s '%s' (expected '%s' or '%s')", what, name, names[0],
                 names[1]);
    return -1;
}

/* The structure of an event, as NumPy sees struct ee_event. */
static PyObject *make_event_dtype(void) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy)
        return NULL;
    PyObject *fields =
        Py_BuildValue("[(ss)(ss)(ss)(ss)(ss)(ss)]", "sequence", "i4", "token", "i4", "exit", "i4",
                      "confidence", "f4", "logprob", "f4", "done", "i4");
    PyObject *dtype = fields ? PyObject_CallMethod(numpy, "dtype", "O", fields) : NULL;
    Py_XDECREF(fields);
    Py_DECREF(numpy);
    return dtype;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model", "dtype", "max_sequences", "max_length", "positions", NULL};
    static const char *const dtypes[] = {"float32", "bfloat16", NULL};
    struct module_state *state = PyType_GetModuleState(type);
    PyObject *model;
    const char *dtype = "float32";
    int max_sequences = 1;
    long long max_length = 0, positions = 0;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|$siLL", names, &model, &dtype,
                                               &max_sequences, &max_length, &positions))
        return NULL;
    if (!PyObject_TypeCheck(model, state->model_type)) {
        PyErr_Format(PyExc_TypeError, "model must be an eellm._core.Model, got %R",
                     (PyObject *)Py_TYPE(model));
        return NULL;
    }
    int index = name_index("dtype of the weights", dtype, dtypes);
    if (index < 0)
        return NULL;
    struct engine_object *self = self_of(PyType_GenericAlloc(type, 0));
    if (!self)
        return NULL;
    self->model = (struct model_object *)Py_NewRef(model);
    self->event_dtype = make_event_dtype();
    struct ee_engine_options options = {index == 0 ? EE_F32 : EE_BF16, max_sequences, max_length,
                                        positions};
    if (!self->event_dtype || !begin_call(self->model)) {
        Py_DECREF(self);
        return NULL;
    }
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_engine_create(&self->engine, self->model->model, &options));
    end_call(self->model);
    if (status != EE_OK) {
        raise_status(state, status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int traverse(PyObject *object, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self_of(object)->model);
    Py_VISIT(self_of(object)->event_dtype);
    return 0;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    struct engine_object *self = self_of(object);
    PyObject_GC_UnTrack(object);
    ee_engine_destroy(self->engine);
    Py_XDECREF((PyObject *)self->model);
    Py_XDECREF(self->event_dtype);
    freefunc free_object = PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type);
}

/* Arrays of a request that come as Python sequences, in memory of their own. */
struct lists {
    float *thresholds;
    int32_t *stop_tokens;
};

static bool read_thresholds(PyObject *object, struct lists *lists, struct ee_request *request) {
    Py_ssize_t count = PySequence_Size(object);
    if (count < 0)
        return false;
    lists->thresholds = PyMem_Calloc((size_t)count + 1, sizeof(float));
    if (!lists->thresholds) {
        PyErr_NoMemory();
        return false;
    }
    request->thresholds = lists->thresholds;
    request->threshold_count = count;
    return floats_in(object, "thresholds", count, lists->thresholds);
}

static bool read_stop_tokens(PyObject *object, struct lists *lists, struct ee_request *request) {
    Py_ssize_t count = PySequence_Size(object);
    if (count < 0)
        return false;
    lists->stop_tokens = PyMem_Calloc((size_t)count + 1, sizeof(int32_t));
    if (!lists->stop_tokens) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        long long token = item ? PyLong_AsLongLong(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred())
            return false;
        /* What does not fit is no token either, and is refused as such. */
        lists->stop_tokens[i] = token < 0 || token > INT32_MAX ? -1 : (int32_t)token;
    }
    request->stop_tokens = lists->stop_tokens;
    request->stop_count = count;
    return true;
}

static PyObject *add_request(struct engine_object *self, const struct ee_request *request) {
    if (!begin_call(self->model))
        return NULL;
    enum ee_status status;
    int32_t sequence = -1;
    RUN_WITHOUT_GIL(status, ee_engine_add(self->engine, &sequence, request));
    end_call(self->model);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    return PyLong_FromLong(sequence);
}

static PyObject *add(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"tokens",       "max_new_tokens", "engine",      "thresholds",
                            "max_deferred", "temperature",    "top_k",       "top_p",
                            "seed",         "sample",         "stop_tokens", NULL};
    PyObject *tokens, *thresholds = NULL, *stop_tokens = NULL;
    long long max_new_tokens = 0;
    const char *engine = "deferred";
    unsigned long long seed = 0, sample = 0;
    struct ee_request request = {.max_deferred = 15, .sampling.top_p = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$LsOififKKO", names, &tokens, &max_new_tokens,
                                     &engine, &thresholds, &request.max_deferred,
                                     &request.sampling.temperature, &request.sampling.top_k,
                                     &request.sampling.top_p, &seed, &sample, &stop_tokens))
        return NULL;
    int kind = name_index("engine", engine, engine_names);
    Py_ssize_t shape[] = {-1};
    void *data;
    if (kind < 0 || !array_in(tokens, "tokens", ARRAY_I32, 1, shape, &data))
        return NULL;
    request.kind = kind == 0 ? EE_ENGINE_FULL : EE_ENGINE_DEFERRED;
    request.tokens = data;
    request.token_count = shape[0];
    request.max_new_tokens = max_new_tokens;
    request.sampling.seed = seed;
    request.sampling.sample = sample;
    struct lists lists = {NULL, NULL};
    PyObject *result = NULL;
    if ((!thresholds || read_thresholds(thresholds, &lists, &request)) &&
        (!stop_tokens || read_stop_tokens(stop_tokens, &lists, &request)))
        result = add_request(self_of(object), &request);
    PyMem_Free(lists.thresholds);
    PyMem_Free(lists.stop_tokens);
    return result;
}

/* A copy of the events: [n] of the structure. */
static PyObject *make_events(struct engine_object *self, const struct ee_event *events,
                             int64_t count) {
    Py_ssize_t numbers = (Py_ssize_t)((size_t)count * sizeof *events / sizeof(int32_t));
    void *data;
    PyObject *flat = array_new(ARRAY_I32, 1, &numbers, &data);
    if (!flat)
        return NULL;
    memcpy(data, events, (size_t)count * sizeof *events);
    PyObject *array = PyObject_CallMethod(flat, "view", "O", self->event_dtype);
    Py_DECREF(flat);
    return array;
}

static PyObject *step(PyObject *object, PyObject *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin_call(self->model))
        return NULL;
    const struct ee_event *events;
    int64_t count;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_engine_step(self->engine, &events, &count));
    PyObject *result = status == EE_OK ? make_events(self, events, count) : NULL;
    end_call(self->model);
    return status == EE_OK ? result : raise_status(self->model->state, status);
}

static PyObject *remove_sequence(PyObject *object, PyObject *number) {
    struct engine_object *self = self_of(object);
    long long sequence = PyLong_AsLongLong(number);
    if (PyErr_Occurred() || !begin_call(self->model))
        return NULL;
    int32_t id = sequence < 0 || sequence > INT32_MAX ? -1 : (int32_t)sequence;
    enum ee_status status = ee_engine_remove(self->engine, id);
    end_call(self->model);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    Py_RETURN_NONE;
}

/* Shapes stand in the model's config, which knows K and D. */
static PyObject *read_cache(struct engine_object *self, int sequence, int layer) {
    const struct ee_config *c = &self->model->model->config;
    int32_t fill;
    enum ee_status status = ee_engine_peek(self->engine, sequence, layer, &fill, NULL, NULL);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    const Py_ssize_t shape[] = {fill, c->num_kv_heads, c->head_dim};
    void *k_data = NULL, *v_data = NULL;
    PyObject *k = array_new(ARRAY_F32, 3, shape, &k_data);
    PyObject *v = array_new(ARRAY_F32, 3, shape, &v_data);
    if (k && v)
        status = ee_engine_peek(self->engine, sequence, layer, &fill, k_data, v_data);
    PyObject *pair = k && v && status == EE_OK ? PyTuple_Pack(2, k, v) : NULL;
    Py_XDECREF(k);
    Py_XDECREF(v);
    return status == EE_OK ? pair : raise_status(self->model->state, status);
}

static PyObject *cache(PyObject *object, PyObject *args) {
    struct engine_object *self = self_of(object);
    int sequence, layer;
    if (!PyArg_ParseTuple(args, "ii", &sequence, &layer) || !begin_call(self->model))
        return NULL;
    PyObject *result = read_cache(self, sequence, layer);
    end_call(self->model);
    return result;
}

static PyObject *get_active(PyObject *object, void *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin_call(self->model))
        return NULL;
    int32_t active = ee_engine_active(self->engine);
    end_call(self->model);
    return PyLong_FromLong(active);
}

static PyObject *get_stats(PyObject *object, void *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin_call(self->model))
        return NULL;
    struct ee_engine_stats stats = ee_engine_stats(self->engine);
    end_call(self->model);
    return Py_BuildValue("{sLsLsLsLsL}", "steps", (long long)stats.steps, "half_layers",
                         (long long)stats.half_layers, "head_rows", (long long)stats.head_rows,
                         "weight_bytes", (long long)stats.weight_bytes, "cache_bytes",
                         (long long)stats.cache_bytes);
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_VARARGS | METH_KEYWORDS,
     "add($self, /, tokens, *, max_new_tokens, engine='deferred', thresholds=(), max_deferred=15,\n"
     "temperature=0.0, top_k=0, top_p=1.0, seed=0, sample=0, stop_tokens=())\n--\n\n"
     "Admits a prompt and returns its sequence number."},
    {"step", step, METH_NOARGS,
     "step($self, /)\n--\n\nOne batch step: a structured array of events."},
    {"remove", remove_sequence, METH_O,
     "remove($self, sequence, /)\n--\n\nEnds a sequence and frees its place in the cache."},
    {"_cache", cache, METH_VARARGS,
     "_cache($self, sequence, layer, /)\n--\n\nCopies of keys and values [fill, K, D] of a layer."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"active", get_active, NULL, "Sequences in flight.", NULL},
    {"stats", get_stats, NULL, "Work done so far, and memory.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc,
     "Engine(model, *, dtype='float32', max_sequences=1, max_length=0, positions=0)\n--\n\n"
     "Decoding: packed weights, the key-value cache, and the sequences in flight."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Engine",
    .basicsize = sizeof(struct engine_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_engine_type(PyObject *module) {
    return create_type(module, &spec);
}
