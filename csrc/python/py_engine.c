/* eellm._core.Engine: decoding. */
#include "python/py_util.h"

#include "infer/engine.h"

#include <string.h>

struct engine_object {
    PyObject_HEAD struct ee_engine *engine;
    struct model_object *model;
    PyObject *comm; /* NULL: none */
    PyObject *event_dtype;
};

/* In the order of enum ee_engine_kind. */
static const char *const engine_names[] = {"full",        "deferred", "recompute",
                                           "speculative", "pipeline", NULL};

static const char *const dtype_names[] = {"float32", "bfloat16", NULL};

static struct engine_object *self_of(PyObject *object) {
    return (struct engine_object *)object;
}

/* Claims the model, and the communicator where there is one. */
static bool begin(struct engine_object *self) {
    if (!begin_call(self->model))
        return false;
    if (!self->comm || begin_comm(self->comm))
        return true;
    end_call(self->model);
    return false;
}

static void end(struct engine_object *self) {
    if (self->comm)
        end_comm(self->comm);
    end_call(self->model);
}

/* Index of `name` in a list that NULL ends; raises ValueError naming `what` when it is not there.
 */
static int name_index(const char *what, const char *name, const char *const *names) {
    char list[128] = "";
    for (int i = 0; names[i]; i++) {
        if (strcmp(name, names[i]) == 0)
            return i;
        size_t used = strlen(list);
        PyOS_snprintf(list + used, sizeof list - used, "%s'%s'", i ? ", " : "", names[i]);
    }
    PyErr_Format(PyExc_ValueError, "unknown %s '%s' (expected one of %s)", what, name, list);
    return -1;
}

/* The structure of an event, as NumPy sees struct ee_event and the exits of it after one another.
 */
static PyObject *make_event_dtype(int exits) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy)
        return NULL;
    PyObject *fields = Py_BuildValue(
        "[(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)(s[(ss)(ss)(ss)](i))]", "sequence", "i4", "kind", "i4",
        "position", "i4", "token", "i4", "exit", "i4", "done", "i4", "confidence", "f4", "logprob",
        "f4", "exits", "confidence", "f4", "logprob", "f4", "token", "i4", exits);
    PyObject *dtype = fields ? PyObject_CallMethod(numpy, "dtype", "O", fields) : NULL;
    Py_XDECREF(fields);
    Py_DECREF(numpy);
    return dtype;
}

/* Builds the engine of an object that has its model and communicator. */
static bool build(struct engine_object *self, struct module_state *state,
                  const struct ee_engine_options *options) {
    enum ee_status status;
    if (!begin(self))
        return false;
    RUN_WITHOUT_GIL(status, ee_engine_create(&self->engine, self->model->model, options));
    end(self);
    if (status == EE_OK)
        self->event_dtype = make_event_dtype(self->model->model->params->exits);
    else
        raise_status(state, status);
    return self->event_dtype != NULL;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model", "dtype", "max_sequences", "max_length", "positions",
                            "empty", "comm",  "stage_seconds", "trace",      NULL};
    struct module_state *state = PyType_GetModuleState(type);
    PyObject *model, *comm = Py_None;
    const char *dtype = "float32";
    int empty = 0;
    long long max_length = 0, positions = 0, trace = 0;
    struct ee_engine_options options = {.max_sequences = 1};
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|$siLLpOdL", names, &model, &dtype,
                                               &options.max_sequences, &max_length, &positions,
                                               &empty, &comm, &options.stage_seconds, &trace))
        return NULL;
    if (!PyObject_TypeCheck(model, state->model_type)) {
        PyErr_Format(PyExc_TypeError, "model must be an eellm._core.Model, got %R",
                     (PyObject *)Py_TYPE(model));
        return NULL;
    }
    int index = name_index("dtype of the weights", dtype, dtype_names);
    if (index < 0 || (comm != Py_None && !(options.comm = comm_of(state, comm, "comm"))))
        return NULL;
    options.dtype = index == 0 ? EE_F32 : EE_BF16;
    options.max_length = max_length;
    options.positions = positions;
    options.empty = empty;
    options.trace = trace;
    struct engine_object *self = self_of(PyType_GenericAlloc(type, 0));
    if (!self)
        return NULL;
    self->model = (struct model_object *)Py_NewRef(model);
    self->comm = options.comm ? Py_NewRef(comm) : NULL;
    if (!build(self, state, &options)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int traverse(PyObject *object, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self_of(object)->model);
    Py_VISIT(self_of(object)->comm);
    Py_VISIT(self_of(object)->event_dtype);
    return 0;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    struct engine_object *self = self_of(object);
    PyObject_GC_UnTrack(object);
    /* It may wait for other ranks, whose threads may need the GIL. */
    Py_BEGIN_ALLOW_THREADS;
    ee_engine_destroy(self->engine);
    Py_END_ALLOW_THREADS;
    Py_XDECREF((PyObject *)self->model);
    Py_XDECREF(self->comm);
    Py_XDECREF(self->event_dtype);
    freefunc free_object = PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type);
}

static PyObject *load(PyObject *object, PyObject *args) {
    static const struct {
        enum array_type type;
        enum ee_dtype dtype;
    } kinds[] = {{ARRAY_F16, EE_F16}, {ARRAY_U16, EE_BF16}, {ARRAY_F32, EE_F32}};
    struct engine_object *self = self_of(object);
    const char *name;
    PyObject *values;
    if (!PyArg_ParseTuple(args, "sO", &name, &values))
        return NULL;
    const struct ee_params *params = self->model->model->params;
    int32_t row = 0;
    while (row < params->count && strcmp(params->rows[row].name, name) != 0)
        row++;
    if (row == params->count) {
        PyErr_Format(PyExc_ValueError, "the model has no parameter '%s'; its table names all",
                     name);
        return NULL;
    }
    int kind = 0;
    while (kind < 2 && !array_is(values, kinds[kind].type))
        kind++;
    const struct ee_param *param = &params->rows[row];
    Py_ssize_t shape[] = {(Py_ssize_t)param->shape[0], (Py_ssize_t)param->shape[1]};
    Py_ssize_t stride[] = {1, 1};
    void *data;
    if (!array_strided_in(values, name, kinds[kind].type, param->ndim, shape, stride, &data) ||
        !begin(self))
        return NULL;
    struct ee_tensor source = {
        data, kinds[kind].dtype, param->ndim, {shape[0], shape[1]}, {stride[0], stride[1]}};
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_engine_load(self->engine, row, &source));
    end(self);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    Py_RETURN_NONE;
}

/* Arrays of a request that come as Python objects, in memory of their own. */
struct lists {
    float *thresholds;
    int32_t *stop_tokens;
    struct ee_logit_bias *bias;
};

static void free_lists(struct lists *lists) {
    PyMem_Free(lists->thresholds);
    PyMem_Free(lists->stop_tokens);
    PyMem_Free(lists->bias);
}

static void *take_list(Py_ssize_t count, size_t size) {
    void *memory = PyMem_Calloc((size_t)count + 1, size);
    if (!memory)
        PyErr_NoMemory();
    return memory;
}

/* What does not fit an int32_t is no token, and is refused as such. */
static int32_t token_from(PyObject *object) {
    long long token = PyLong_AsLongLong(object);
    return token < 0 || token > INT32_MAX ? -1 : (int32_t)token;
}

static bool read_thresholds(PyObject *object, struct lists *lists, struct ee_request *request) {
    Py_ssize_t count = PySequence_Size(object);
    if (count < 0 || !(lists->thresholds = take_list(count, sizeof(float))))
        return false;
    request->thresholds = lists->thresholds;
    request->threshold_count = count;
    return floats_in(object, "thresholds", count, lists->thresholds);
}

static bool read_stop_tokens(PyObject *object, struct lists *lists, struct ee_request *request) {
    Py_ssize_t count = PySequence_Size(object);
    if (count < 0 || !(lists->stop_tokens = take_list(count, sizeof(int32_t))))
        return false;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        lists->stop_tokens[i] = item ? token_from(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred())
            return false;
    }
    request->stop_tokens = lists->stop_tokens;
    request->stop_count = count;
    return true;
}

static bool read_bias(PyObject *object, struct lists *lists, struct ee_request *request) {
    PyObject *items = PyMapping_Items(object);
    Py_ssize_t count = items ? PyList_Size(items) : -1;
    if (!items) {
        PyErr_Clear();
        raise_type("logit_bias", "a mapping of tokens to numbers", object);
    }
    bool good = count >= 0 && (lists->bias = take_list(count, sizeof *lists->bias));
    for (Py_ssize_t i = 0; good && i < count; i++) {
        PyObject *item = PyList_GetItem(items, i); /* borrowed */
        lists->bias[i].token = token_from(PyTuple_GetItem(item, 0));
        good = !PyErr_Occurred();
        if (good)
            lists->bias[i].bias = (float)PyFloat_AsDouble(PyTuple_GetItem(item, 1));
        good = good && !PyErr_Occurred();
    }
    Py_XDECREF(items);
    request->sampling.bias = lists->bias;
    request->sampling.bias_count = count;
    return good;
}

static bool read_numbers(PyObject *object, const char *name, const int32_t **numbers,
                         int64_t *count) {
    Py_ssize_t shape[] = {-1};
    void *data;
    if (!object || object == Py_None)
        return true;
    if (!array_in(object, name, ARRAY_I32, 1, shape, &data))
        return false;
    *numbers = data;
    *count = shape[0];
    return true;
}

static PyObject *add_request(struct engine_object *self, const struct ee_request *request) {
    if (!begin(self))
        return NULL;
    enum ee_status status;
    int32_t sequence = -1;
    RUN_WITHOUT_GIL(status, ee_engine_add(self->engine, &sequence, request));
    end(self);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    return PyLong_FromLong(sequence);
}

static PyObject *add(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"tokens",
                            "max_new_tokens",
                            "min_new_tokens",
                            "engine",
                            "thresholds",
                            "all_confidences",
                            "max_deferred",
                            "full_depth",
                            "logit_bias",
                            "repetition_penalty",
                            "presence_penalty",
                            "frequency_penalty",
                            "temperature",
                            "top_k",
                            "top_p",
                            "min_p",
                            "seed",
                            "sample",
                            "stop_tokens",
                            "forced",
                            "replay",
                            NULL};
    PyObject *tokens, *thresholds = NULL, *stop_tokens = NULL, *bias = NULL, *forced = NULL,
                      *replay = NULL;
    const char *engine = "deferred";
    int all_confidences = 0, full_depth = 0;
    struct ee_request request = {.max_deferred = 15};
    struct ee_sampling *sampling = &request.sampling;
    sampling->repetition_penalty = sampling->top_p = 1;
    long long max_new_tokens = 0, min_new_tokens = 0;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O|$LLsOpipOffffiffO&O&OOO:add", names, &tokens, &max_new_tokens,
            &min_new_tokens, &engine, &thresholds, &all_confidences, &request.max_deferred,
            &full_depth, &bias, &sampling->repetition_penalty, &sampling->presence_penalty,
            &sampling->frequency_penalty, &sampling->temperature, &sampling->top_k,
            &sampling->top_p, &sampling->min_p, seed_converter, &sampling->seed, seed_converter,
            &sampling->sample, &stop_tokens, &forced, &replay))
        return NULL;
    int kind = name_index("engine", engine, engine_names);
    if (kind < 0)
        return NULL;
    request.kind = (enum ee_engine_kind)kind;
    request.max_new_tokens = max_new_tokens;
    request.min_new_tokens = min_new_tokens;
    request.all_confidences = all_confidences;
    request.full_depth = full_depth;
    struct lists lists = {NULL, NULL, NULL};
    PyObject *result = NULL;
    if (read_numbers(tokens, "tokens", &request.tokens, &request.token_count) &&
        read_numbers(forced, "forced", &request.forced, &request.forced_count) &&
        read_numbers(replay, "replay", &request.replay, &request.replay_count) &&
        (!thresholds || read_thresholds(thresholds, &lists, &request)) &&
        (!stop_tokens || read_stop_tokens(stop_tokens, &lists, &request)) &&
        (!bias || bias == Py_None || read_bias(bias, &lists, &request)))
        result = add_request(self_of(object), &request);
    free_lists(&lists);
    return result;
}

static PyObject *score(PyObject *object, PyObject *tokens) {
    struct ee_request request = {.kind = EE_ENGINE_SCORE};
    if (!read_numbers(tokens, "tokens", &request.tokens, &request.token_count))
        return NULL;
    return add_request(self_of(object), &request);
}

/* A copy of the events: [n] of the structure. */
static PyObject *make_events(struct engine_object *self, const struct ee_events *events) {
    const size_t head = sizeof *events->event;
    const size_t exits = (size_t)events->exit_count * sizeof *events->exits;
    Py_ssize_t numbers = (Py_ssize_t)((size_t)events->count * (head + exits) / sizeof(int32_t));
    void *data;
    PyObject *flat = array_new(ARRAY_I32, 1, &numbers, &data);
    if (!flat)
        return NULL;
    char *out = data;
    for (int64_t i = 0; i < events->count; i++) {
        memcpy(out, &events->event[i], head);
        memcpy(out + head, events->exits + i * events->exit_count, exits);
        out += head + exits;
    }
    PyObject *array = PyObject_CallMethod(flat, "view", "O", self->event_dtype);
    Py_DECREF(flat);
    return array;
}

static PyObject *step(PyObject *object, PyObject *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin(self))
        return NULL;
    struct ee_events events;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_engine_step(self->engine, &events));
    PyObject *result = status == EE_OK ? make_events(self, &events) : NULL;
    end(self);
    return status == EE_OK ? result : raise_status(self->model->state, status);
}

/* Runs a call of the engine that takes no arguments and may wait for other ranks. */
static PyObject *run_plain(PyObject *object, enum ee_status (*call)(struct ee_engine *)) {
    struct engine_object *self = self_of(object);
    if (!begin(self))
        return NULL;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, call(self->engine));
    end(self);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    Py_RETURN_NONE;
}

static PyObject *serve(PyObject *object, PyObject *unused) {
    (void)unused;
    return run_plain(object, ee_engine_serve);
}

static PyObject *stop(PyObject *object, PyObject *unused) {
    (void)unused;
    return run_plain(object, ee_engine_stop);
}

static PyObject *finish(PyObject *object, PyObject *number) {
    struct engine_object *self = self_of(object);
    int32_t id = token_from(number);
    if (PyErr_Occurred() || !begin(self))
        return NULL;
    int64_t rows;
    enum ee_status status = ee_engine_finish(self->engine, id, &rows);
    end(self);
    if (status != EE_OK)
        return raise_status(self->model->state, status);
    return PyLong_FromLongLong(rows);
}

static PyObject *remove_sequence(PyObject *object, PyObject *number) {
    struct engine_object *self = self_of(object);
    int32_t id = token_from(number);
    if (PyErr_Occurred() || !begin(self))
        return NULL;
    enum ee_status status = ee_engine_remove(self->engine, id);
    end(self);
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
    if (!PyArg_ParseTuple(args, "ii", &sequence, &layer) || !begin(self))
        return NULL;
    PyObject *result = read_cache(self, sequence, layer);
    end(self);
    return result;
}

static PyObject *get_active(PyObject *object, void *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin(self))
        return NULL;
    int32_t active = ee_engine_active(self->engine);
    end(self);
    return PyLong_FromLong(active);
}

static PyObject *get_stats(PyObject *object, void *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin(self))
        return NULL;
    struct ee_engine_stats stats = ee_engine_stats(self->engine);
    end(self);
    return Py_BuildValue("{sLsLsLsLsLsLsLsL}", "steps", (long long)stats.steps, "half_layers",
                         (long long)stats.half_layers, "head_rows", (long long)stats.head_rows,
                         "bytes_read", (long long)stats.bytes_read, "drafts",
                         (long long)stats.drafts, "accepted", (long long)stats.accepted,
                         "weight_bytes", (long long)stats.weight_bytes, "cache_bytes",
                         (long long)stats.cache_bytes);
}

/* Copies: [n, 3] of seconds, and [n, 6] of the other fields in their order. */
static PyObject *trace_arrays(const struct ee_pass_trace *entries, int64_t count) {
    Py_ssize_t times_shape[] = {(Py_ssize_t)count, 3}, rest_shape[] = {(Py_ssize_t)count, 6};
    void *times_data = NULL, *rest_data = NULL;
    PyObject *times = array_new(ARRAY_F64, 2, times_shape, &times_data);
    PyObject *rest = array_new(ARRAY_I32, 2, rest_shape, &rest_data);
    double *seconds = times_data;
    int32_t *numbers = rest_data;
    for (int64_t i = 0; times && rest && i < count; i++) {
        const struct ee_pass_trace *e = &entries[i];
        const double all[] = {e->start, e->end, e->told};
        const int32_t fields[] = {e->sequence,    e->first_row,  e->last_row,
                                  e->first_layer, e->last_layer, e->exit};
        memcpy(seconds + 3 * i, all, sizeof all);
        memcpy(numbers + 6 * i, fields, sizeof fields);
    }
    PyObject *pair = times && rest ? PyTuple_Pack(2, times, rest) : NULL;
    Py_XDECREF(times);
    Py_XDECREF(rest);
    return pair;
}

static PyObject *get_trace(PyObject *object, void *unused) {
    (void)unused;
    struct engine_object *self = self_of(object);
    if (!begin(self))
        return NULL;
    int64_t count;
    const struct ee_pass_trace *entries = ee_engine_trace(self->engine, &count);
    PyObject *result = trace_arrays(entries, count);
    end(self);
    return result;
}

static PyObject *get_dtype(PyObject *object, void *unused) {
    (void)unused;
    /* It never changes, so a step may be under way. */
    struct ee_engine_stats stats = ee_engine_stats(self_of(object)->engine);
    return PyUnicode_FromString(dtype_names[stats.dtype == EE_BF16]);
}

static PyMethodDef methods[] = {
    {"load", load, METH_VARARGS, "load($self, name, values, /)\n--\n\nPacks a parameter."},
    {"add", (PyCFunction)(void (*)(void))add, METH_VARARGS | METH_KEYWORDS,
     "add($self, /, tokens, *, max_new_tokens, min_new_tokens=0, engine='deferred',\n"
     "thresholds=(), all_confidences=False, max_deferred=15, full_depth=False, logit_bias=None,\n"
     "repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, temperature=0.0,\n"
     "top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, stop_tokens=(), forced=None,\n"
     "replay=None)\n--\n\n"
     "Admits a prompt and returns its sequence number."},
    {"score", score, METH_O,
     "score($self, tokens, /)\n--\n\nAdmits a text whose tokens are scored at every exit."},
    {"step", step, METH_NOARGS,
     "step($self, /)\n--\n\nOne batch step: a structured array of events."},
    {"finish", finish, METH_O,
     "finish($self, sequence, /)\n--\n\nEnds a sequence after its deferred rows have run."},
    {"remove", remove_sequence, METH_O,
     "remove($self, sequence, /)\n--\n\nEnds a sequence and frees its place in the cache."},
    {"serve", serve, METH_NOARGS,
     "serve($self, /)\n--\n\nWorks for rank 0 of a pipeline until that stops."},
    {"stop", stop, METH_NOARGS,
     "stop($self, /)\n--\n\nEnds all sequences, and lets the other ranks of a pipeline return."},
    {"_cache", cache, METH_VARARGS,
     "_cache($self, sequence, layer, /)\n--\n\nCopies of keys and values [fill, K, D] of a layer."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"active", get_active, NULL, "Sequences in flight.", NULL},
    {"dtype", get_dtype, NULL, "Of the packed weights.", NULL},
    {"trace", get_trace, NULL, "What this rank of a pipeline did, and when.", NULL},
    {"stats", get_stats, NULL, "Work done so far, and memory.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "Engine(model, *, dtype='float32', max_sequences=1, max_length=0, positions=0,\n"
                "empty=False, comm=None, stage_seconds=0.0, trace=0)\n--\n\n"
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
