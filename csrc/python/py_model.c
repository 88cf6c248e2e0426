/* eellm._core.Model */
#include "python/py_util.h"

#include "base/alloc.h"
#include "base/rng.h"
#include "model/chunk.h"

static PyObject *new_model(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    PyObject *object = PyType_GenericAlloc(type, 0);
    if (object)
        ((struct model_object *)object)->state = PyType_GetModuleState(type);
    return object;
}

bool begin_call(struct model_object *model) {
    if (!model->model) {
        PyErr_SetString(model->state->error, "the model is not initialised");
        return false;
    }
    if (model->busy) {
        PyErr_SetString(model->state->error,
                        "the model is in use by another thread; wait for its call to end, or use "
                        "one model for each thread");
        return false;
    }
    model->busy = true;
    return true;
}

void end_call(struct model_object *model) {
    model->busy = false;
}

/* The model is built aside and takes its place under the GIL, so that no other thread sees half of
 * it, nor builds a second one. */
static int create(struct model_object *self, const struct ee_config *config, const char *isa_name,
                  struct ee_model_options *options) {
    struct ee_model *model = NULL;
    enum ee_status status = ee_isa_from_name(&options->isa, isa_name);
    self->busy = true;
    if (status == EE_OK)
        RUN_WITHOUT_GIL(status, ee_model_create(&model, config, options));
    self->busy = false;
    self->model = model;
    if (status == EE_OK)
        return 0;
    raise_status(self->state, status);
    return -1;
}

/* (ranks, chunks, rank, bounds int32 [ranks chunks + 1] or None, earlier_edge, exact_ties), or None
 * for the whole model. */
static bool read_part(PyObject *tuple, struct ee_part *part) {
    PyObject *bounds;
    int earlier, exact;
    if (!tuple || tuple == Py_None)
        return true;
    if (!PyTuple_Check(tuple)) {
        raise_type("part", "a tuple or None", tuple);
        return false;
    }
    if (!PyArg_ParseTuple(tuple, "iiiOpp:part", &part->ranks, &part->chunks, &part->rank, &bounds,
                          &earlier, &exact))
        return false;
    if (part->ranks < 1 || part->chunks < 1 || part->ranks > EE_MAX_RANKS || part->chunks > 1024) {
        PyErr_Format(PyExc_ValueError,
                     "a model is spread over 1 to %d ranks with 1 to 1024 chunks, got %d and %d",
                     EE_MAX_RANKS, part->ranks, part->chunks);
        return false;
    }
    part->earlier_edge = earlier;
    part->exact_ties = exact;
    Py_ssize_t count = (Py_ssize_t)part->ranks * part->chunks + 1;
    void *data = NULL;
    if (bounds != Py_None && !array_in(bounds, "bounds", ARRAY_I32, 1, &count, &data))
        return false;
    part->bounds = data;
    return true;
}

static int init(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct model_object *self = (struct model_object *)object;
    static char *names[] = {"config", "threads", "isa", "weights", "part", NULL};
    PyObject *mapping, *part = NULL;
    struct ee_model_options options = {0};
    int with_weights = 1;
    const char *isa_name = "";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|ispO:Model", names, &mapping,
                                     &options.threads, &isa_name, &with_weights, &part) ||
        !read_part(part, &options.part))
        return -1;
    options.without_weights = !with_weights;
    struct ee_config *config = PyMem_Malloc(sizeof *config);
    float *freq = PyMem_Malloc(MAX_ROPE_FREQ * sizeof *freq);
    int result = -1;
    /* Reading the config may run Python code, and so let other threads in: check after it. */
    if (!config || !freq)
        PyErr_NoMemory();
    else if (config_in(mapping, config, freq) && (self->model || self->busy))
        PyErr_SetString(self->state->error, "the model is initialised already");
    else if (!PyErr_Occurred())
        result = create(self, config, isa_name, &options);
    PyMem_Free(config);
    PyMem_Free(freq);
    return result;
}

static void dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ee_model_destroy(((struct model_object *)object)->model);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *table_row(const struct ee_param *row) {
    PyObject *shape =
        row->ndim == 1 ? Py_BuildValue("(L)", (long long)row->shape[0])
                       : Py_BuildValue("(LL)", (long long)row->shape[0], (long long)row->shape[1]);
    if (!shape)
        return NULL;
    return Py_BuildValue(
        "{s:s,s:N,s:L,s:O,s:O,s:O,s:O,s:O,s:i,s:i,s:s,s:L,s:L,s:O}", "name", row->name, "shape",
        shape, "offset", (long long)row->offset, "held", row->held ? Py_True : Py_False, "owned",
        row->owned ? Py_True : Py_False, "decay", row->decay ? Py_True : Py_False, "frozen",
        row->frozen ? Py_True : Py_False, "tied", row->tied ? Py_True : Py_False, "layer",
        row->layer, "exit", row->exit, "source", row->source, "source_row",
        (long long)row->source_row, "source_rows", (long long)row->source_rows, "transposed",
        row->transposed ? Py_True : Py_False);
}

static bool initialised(struct model_object *self) {
    if (!self->model)
        PyErr_SetString(self->state->error, "the model is not initialised");
    return self->model != NULL;
}

static PyObject *get_table(PyObject *object, void *closure) {
    (void)closure;
    struct model_object *self = (struct model_object *)object;
    if (!initialised(self))
        return NULL;
    const struct ee_params *params = self->model->params;
    PyObject *list = PyList_New(params->count);
    for (int32_t i = 0; list && i < params->count; i++) {
        PyObject *row = table_row(&params->rows[i]);
        if (!row || PyList_SetItem(list, i, row) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *get_threads(PyObject *object, void *closure) {
    (void)closure;
    struct model_object *self = (struct model_object *)object;
    return initialised(self) ? PyLong_FromLong(ee_pool_threads(self->model->ctx->pool)) : NULL;
}

static PyObject *get_isa(PyObject *object, void *closure) {
    (void)closure;
    struct model_object *self = (struct model_object *)object;
    /* The backend's name is "cpu_avx2" and the like. */
    return initialised(self) ? PyUnicode_FromString(strchr(self->model->ctx->ops->name, '_') + 1)
                             : NULL;
}

/* Whether the model has parameters in memory; the error is set where it has none. */
static bool has_weights(struct model_object *self) {
    enum ee_status status = ee_model_require_weights(self->model);
    if (status != EE_OK)
        raise_status(self->state, status);
    return status == EE_OK;
}

int32_t find_parameter(const struct ee_params *params, const char *name) {
    int32_t row = ee_params_find(params, name);
    if (row >= 0 && params->rows[row].held)
        return row;
    const char *why = row < 0 ? "the model has no parameter '%s'"
                              : "'%s' is a parameter of another rank's part of the model";
    PyErr_Format(PyExc_KeyError, why, name);
    return -1;
}

static PyObject *parameter(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    const char *name;
    if (!PyArg_ParseTuple(args, "s:parameter", &name) || !initialised(self) || !has_weights(self))
        return NULL;
    int32_t row = find_parameter(self->model->params, name);
    if (row < 0)
        return NULL;
    struct ee_tensor tensor = ee_param_tensor(self->model->params, row, self->model->weights);
    return tensor_view(self->state, object, &tensor);
}

static PyObject *initialize(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    float range;
    uint64_t seed;
    if (!PyArg_ParseTuple(args, "fO&:initialize", &range, seed_converter, &seed) ||
        !initialised(self) || !has_weights(self) || !begin_call(self))
        return NULL;
    struct ee_model *model = self->model;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_params_init(model->ctx, model->params, model->weights, range, seed));
    end_call(self);
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

static PyObject *initialize_parameter(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    const char *name;
    float range;
    uint64_t seed;
    if (!PyArg_ParseTuple(args, "sfO&:initialize_parameter", &name, &range, seed_converter,
                          &seed) ||
        !initialised(self) || !has_weights(self) || !begin_call(self))
        return NULL;
    struct ee_model *model = self->model;
    int32_t row = find_parameter(model->params, name);
    enum ee_status status = EE_OK;
    if (row >= 0)
        RUN_WITHOUT_GIL(status, ee_params_init_row(model->ctx, model->params, row, model->weights,
                                                   range, seed));
    end_call(self);
    if (row < 0)
        return NULL;
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

/* Sequence by sequence, so that the activations are those of one. out: [E, B, T, V]. */
static enum ee_status run_forward(const struct ee_model *model, const int32_t *tokens,
                                  int64_t batch, int64_t time, float *out) {
    if (time > model->config.max_positions)
        EE_FAIL(EE_ERR_INVALID,
                "a sequence of %lld tokens does not fit in max_position_embeddings (%d)",
                (long long)time, model->config.max_positions);
    if (model->layout->ranks > 1)
        EE_FAIL(EE_ERR_UNSUPPORTED,
                "this is part %d of a model spread over %d ranks, which has no logits of its own; "
                "use the trainer's evaluate, or load the model as a whole",
                model->rank, model->layout->ranks);
    struct ee_chunk *chunk;
    struct ee_chunk_options options = {.rows = time, .slots = 1, .recompute = EE_RECOMPUTE_FULL};
    EE_TRY(ee_chunk_create(&chunk, model, &model->layout->stages[0], &options));
    void *memory;
    enum ee_status status = ee_alloc(&memory, (size_t)time * sizeof(int32_t), "positions");
    int32_t *position = memory;
    for (int64_t t = 0; status == EE_OK && t < time; t++)
        position[t] = (int32_t)t;
    int32_t segment[] = {0, (int32_t)time};
    int32_t exits = model->params->exits;
    int64_t vocab = model->config.vocab_size;
    for (int64_t b = 0; status == EE_OK && b < batch; b++) {
        struct ee_batch one = {.rows = time,
                               .token = tokens + b * time,
                               .position = position,
                               .segment = segment,
                               .segments = 1};
        struct ee_exit_run run[EE_MAX_EXITS + 1] = {0};
        for (int32_t e = 0; e < exits; e++)
            run[e].logits = out + (e * batch + b) * time * vocab;
        status = ee_chunk_evaluate(chunk, &one, run);
    }
    ee_free(memory);
    ee_chunk_destroy(chunk);
    return status;
}

static PyObject *forward(PyObject *object, PyObject *args) {
    struct model_object *self = (struct model_object *)object;
    PyObject *tokens, *out;
    if (!PyArg_ParseTuple(args, "OO:forward", &tokens, &out) || !initialised(self))
        return NULL;
    Py_ssize_t shape[] = {-1, -1};
    void *token_data, *out_data;
    if (!array_in(tokens, "tokens", ARRAY_I32, 2, shape, &token_data))
        return NULL;
    Py_ssize_t out_shape[] = {self->model->params->exits, shape[0], shape[1],
                              self->model->config.vocab_size};
    if (!array_out(out, "out", ARRAY_F32, 4, out_shape, &out_data) || !begin_call(self))
        return NULL;
    enum ee_status status = EE_OK;
    if (shape[0] > 0 && shape[1] > 0)
        RUN_WITHOUT_GIL(status, run_forward(self->model, token_data, shape[0], shape[1], out_data));
    end_call(self);
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"parameter", parameter, METH_VARARGS,
     "parameter($self, name, /)\n--\n\nA parameter, to be read and written in place."},
    {"initialize", initialize, METH_VARARGS,
     "initialize($self, initializer_range, seed, /)\n--\n\nDraws initial values."},
    {"initialize_parameter", initialize_parameter, METH_VARARGS,
     "initialize_parameter($self, name, initializer_range, seed, /)\n--\n\n"
     "Draws the initial values of one parameter."},
    {"forward", forward, METH_VARARGS,
     "forward($self, tokens, out, /)\n--\n\nLogits of every exit, the final one last."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"table", get_table, NULL, "The parameter table.", NULL},
    {"threads", get_threads, NULL, "Threads of the model's context.", NULL},
    {"isa", get_isa, NULL, "Instruction-set level of the kernels.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_init, init},
    {Py_tp_dealloc, dealloc},
    {Py_tp_new, new_model},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc,
     "Model(config, threads=0, isa='', weights=True, part=None)\n--\n\nA model's config, "
     "parameters and threads."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Model",
    .basicsize = sizeof(struct model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_model_type(PyObject *module) {
    return create_type(module, &spec);
}
