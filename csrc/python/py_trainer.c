/* eellm._core.Trainer: one C call is one training step. */
#include "python/py_util.h"

#include "train/step.h"

#include <limits.h>
#include <math.h>

struct trainer_object {
    PyObject_HEAD struct model_object *model;
    struct ee_trainer *trainer;
    PyObject *comm; /* a Comm, or NULL for one rank alone */
    struct ee_trace *trace;
    struct module_state *state;
};

/* Claims the model and the communicator for a call. */
static bool begin_step(struct trainer_object *self) {
    if (!begin_call(self->model))
        return false;
    if (self->comm && !begin_comm(self->comm)) {
        end_call(self->model);
        return false;
    }
    return true;
}

static void end_step(struct trainer_object *self) {
    if (self->comm)
        end_comm(self->comm);
    end_call(self->model);
}

static bool read_recompute(const char *name, enum ee_recompute *recompute) {
    static const char *const names[] = {"none", "attention", "full"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, names[i]) == 0) {
            *recompute = (enum ee_recompute)i;
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "recompute must be none, attention or full, got '%s'", name);
    return false;
}

static PyObject *new_trainer(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    PyObject *object = PyType_GenericAlloc(type, 0);
    if (object)
        ((struct trainer_object *)object)->state = PyType_GetModuleState(type);
    return object;
}

/* Reads what is not a number: the kinds, and the temperatures of a model with `exits` early exits.
 */
static bool read_config(struct ee_trainer_config *config, const char *recompute,
                        PyObject *temperature, int32_t exits) {
    for (int32_t e = 0; e < exits; e++)
        config->temperature[e] = 1;
    if (!read_recompute(recompute, &config->recompute))
        return false;
    if (!temperature || temperature == Py_None)
        return true;
    bool empty = PySequence_Check(temperature) && PySequence_Size(temperature) == 0;
    return empty || floats_in(temperature, "exit_temperature", exits, config->temperature);
}

/* A name, for as many ranks and chunks as the model is spread over; or a whole spec. */
static bool read_schedule(struct module_state *state, PyObject *schedule, int microbatches,
                          const struct ee_model *model, struct ee_schedule_spec *spec) {
    enum ee_status status;
    if (PyUnicode_Check(schedule)) {
        const char *name = PyUnicode_AsUTF8AndSize(schedule, NULL);
        if (!name)
            return false;
        *spec = (struct ee_schedule_spec){.ranks = model->layout->ranks,
                                          .chunks = model->layout->chunks,
                                          .microbatches = microbatches};
        status = ee_schedule_from_name(&spec->kind, name);
        if (status != EE_OK)
            raise_status(state, status);
        return status == EE_OK;
    }
    if (schedule_in(schedule, spec, &status))
        return true;
    if (status != EE_OK)
        raise_status(state, status);
    return false;
}

/* (kind, run, action, seconds), or None. */
static bool read_fault(PyObject *tuple, struct ee_fault *fault) {
    static const char *const names[] = {"none", "kill", "delay", "corrupt"};
    const char *name;
    long long run, action;
    if (!tuple || tuple == Py_None)
        return true;
    if (!PyTuple_Check(tuple)) {
        raise_type("fault", "a tuple or None", tuple);
        return false;
    }
    if (!PyArg_ParseTuple(tuple, "sLLd:fault", &name, &run, &action, &fault->seconds))
        return false;
    fault->run = run;
    fault->action = action;
    for (int i = 0; i < 4; i++) {
        if (strcmp(name, names[i]) == 0) {
            fault->kind = (enum ee_fault_kind)i;
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "a fault is none, kill, delay or corrupt, got '%s'", name);
    return false;
}

/* The trainer is built aside and takes its place under the GIL, so that no other thread sees half
 * of it. */
static int create(struct trainer_object *self, struct model_object *model, PyObject *comm,
                  const struct ee_trainer_config *config) {
    if (!begin_call(model))
        return -1;
    struct ee_trainer *trainer = NULL;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_trainer_create(&trainer, model->model, config));
    end_call(model);
    if (status != EE_OK) {
        raise_status(self->state, status);
        return -1;
    }
    if (self->trainer) {
        ee_trainer_destroy(trainer);
        PyErr_SetString(self->state->error, "the trainer is initialised already");
        return -1;
    }
    self->trainer = trainer;
    self->model = (struct model_object *)Py_NewRef((PyObject *)model);
    self->comm = comm ? Py_NewRef(comm) : NULL;
    return 0;
}

/* With the lists that Python gives, or those that the schedule gives. */
static int create_with_lists(struct trainer_object *self, struct model_object *model,
                             PyObject *comm, PyObject *lists, struct ee_trainer_config *config) {
    if (!lists || lists == Py_None)
        return create(self, model, comm, config);
    config->lists = PyMem_Calloc((size_t)config->schedule.ranks, sizeof *config->lists);
    int result = -1;
    if (!config->lists)
        PyErr_NoMemory();
    else if (lists_in(lists, &config->schedule, config->lists))
        result = create(self, model, comm, config);
    PyMem_Free(config->lists);
    return result;
}

static int init(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct trainer_object *self = (struct trainer_object *)object;
    static char *names[] = {
        "model",     "rows",        "microbatches",     "schedule",        "lists", "comm",
        "recompute", "defer_exits", "exit_temperature", "dynamic_weights", "fault", NULL};
    struct ee_trainer_config config = {0};
    PyObject *model, *schedule = NULL, *lists = NULL, *comm = NULL, *temperature = NULL;
    PyObject *fault = NULL;
    long long rows = LLONG_MIN;
    int microbatches = INT32_MIN, defer = 0, dynamic = 0;
    const char *recompute = "none";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$LiOOOspOpO:Trainer", names,
                                     self->state->model_type, &model, &rows, &microbatches,
                                     &schedule, &lists, &comm, &recompute, &defer, &temperature,
                                     &dynamic, &fault))
        return -1;
    bool named = !schedule || PyUnicode_Check(schedule);
    if (rows == LLONG_MIN || (named && microbatches == INT32_MIN)) {
        PyErr_SetString(PyExc_TypeError, "Trainer() needs rows and microbatches");
        return -1;
    }
    /* Boundaries of segments are int32. */
    if (rows > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "rows must lie between 1 and %d, got %lld", INT32_MAX, rows);
        return -1;
    }
    if (self->trainer) {
        PyErr_SetString(self->state->error, "the trainer is initialised already");
        return -1;
    }
    struct model_object *owner = (struct model_object *)model;
    if (!owner->model) {
        PyErr_SetString(self->state->error, "the model is not initialised");
        return -1;
    }
    config.rows = rows;
    config.dynamic_weights = dynamic;
    config.defer_exits = defer;
    comm = comm == Py_None ? NULL : comm;
    if (comm && !(config.comm = comm_of(self->state, comm, "comm")))
        return -1;
    PyObject *name = schedule ? Py_NewRef(schedule) : PyUnicode_FromString("1f1b");
    int result = -1;
    if (name && read_schedule(self->state, name, microbatches, owner->model, &config.schedule) &&
        read_config(&config, recompute, temperature, owner->model->config.num_exits) &&
        read_fault(fault, &config.fault))
        result = create_with_lists(self, owner, comm, lists, &config);
    Py_XDECREF(name);
    return result;
}

static void dealloc(PyObject *object) {
    struct trainer_object *self = (struct trainer_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    ee_trainer_destroy(self->trainer);
    ee_trace_destroy(self->trace);
    Py_XDECREF((PyObject *)self->model);
    Py_XDECREF(self->comm);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static bool initialised(struct trainer_object *self) {
    if (!self->trainer)
        PyErr_SetString(self->state->error, "the trainer is not initialised");
    return self->trainer != NULL;
}

/* The arrays of a step as Python gives them. */
struct arrays {
    PyObject *tokens, *targets, *positions, *row_ids, *segments, *counts;
};

/* Checks the arrays of `*microbatches` microbatches (-1: as many as there are) and points `input`
 * at them. What the numbers say (ranges) is checked by the operations, except that the boundaries
 * must be as many as the counts say. */
static bool read_input(struct trainer_object *self, const struct arrays *arrays,
                       Py_ssize_t *microbatches, struct ee_step_input *input) {
    void *data[6];
    Py_ssize_t shape[] = {*microbatches, (Py_ssize_t)self->trainer->config.rows};
    if (!array_in(arrays->tokens, "tokens", ARRAY_I32, 2, shape, &data[0]) ||
        !array_in(arrays->targets, "targets", ARRAY_I32, 2, shape, &data[1]) ||
        !array_in(arrays->positions, "positions", ARRAY_I32, 2, shape, &data[2]))
        return false;
    Py_ssize_t boundaries[] = {-1}, counts[] = {shape[0]};
    if (!array_in(arrays->segments, "segments", ARRAY_I32, 1, boundaries, &data[3]) ||
        !array_in(arrays->counts, "segment_counts", ARRAY_I32, 1, counts, &data[4]))
        return false;
    *input = (struct ee_step_input){.token = data[0],
                                    .target = data[1],
                                    .position = data[2],
                                    .segment = data[3],
                                    .segment_counts = data[4]};
    if (arrays->row_ids) {
        if (!array_in(arrays->row_ids, "row_ids", ARRAY_U64, 2, shape, &data[5]))
            return false;
        input->row_id = data[5];
    }
    Py_ssize_t total = 0;
    for (Py_ssize_t m = 0; m < shape[0]; m++) {
        if (input->segment_counts[m] < 1 || input->segment_counts[m] > shape[1]) {
            PyErr_Format(PyExc_ValueError, "segment_counts[%zd] must lie between 1 and %zd, got %d",
                         m, shape[1], (int)input->segment_counts[m]);
            return false;
        }
        total += input->segment_counts[m] + 1;
    }
    if (total != boundaries[0]) {
        PyErr_Format(PyExc_ValueError,
                     "segments must have %zd boundaries (segment_counts + 1 "
                     "each), got %zd",
                     total, boundaries[0]);
        return false;
    }
    *microbatches = shape[0];
    return true;
}

static PyObject *double_list(const double *values, int32_t count) {
    PyObject *list = PyList_New(count);
    for (int32_t i = 0; list && i < count; i++) {
        PyObject *item = PyFloat_FromDouble(values[i]);
        if (!item || PyList_SetItem(list, i, item) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *step_result(const struct ee_step_result *result, int32_t exits) {
    PyObject *loss = double_list(result->loss, exits);
    PyObject *confidence = double_list(result->confidence, exits);
    if (!loss || !confidence) {
        Py_XDECREF(loss);
        Py_XDECREF(confidence);
        return NULL;
    }
    return Py_BuildValue("{s:N,s:N,s:L,s:d,s:O,s:O,s:i}", "losses", loss, "confidence", confidence,
                         "tokens", (long long)result->tokens, "grad_norm", result->grad_norm,
                         "finite", result->finite ? Py_True : Py_False, "updated",
                         result->updated ? Py_True : Py_False, "signal", (int)result->signal);
}

static PyObject *step(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct trainer_object *self = (struct trainer_object *)object;
    static char *names[] = {"tokens",
                            "targets",
                            "positions",
                            "row_ids",
                            "segments",
                            "segment_counts",
                            "exit_weights",
                            "learning_rate",
                            "beta1",
                            "beta2",
                            "eps",
                            "weight_decay",
                            "clip",
                            "max_loss",
                            "max_grad_norm",
                            "dropout_seed",
                            "update",
                            "signal",
                            NULL};
    struct arrays a;
    struct ee_step_settings s = {.adamw = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8},
                                 .max_loss = Py_HUGE_VAL,
                                 .max_grad_norm = Py_HUGE_VAL};
    PyObject *exit_weights = NULL;
    uint64_t seed = 0;
    int update = 1;
    s.adamw.learning_rate = NAN; /* not given */
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OOOOOO|$OddddddddO&pi:step", names, &a.tokens, &a.targets, &a.positions,
            &a.row_ids, &a.segments, &a.counts, &exit_weights, &s.adamw.learning_rate,
            &s.adamw.beta1, &s.adamw.beta2, &s.adamw.eps, &s.adamw.weight_decay, &s.clip,
            &s.max_loss, &s.max_grad_norm, seed_converter, &seed, &update, &s.signal) ||
        !initialised(self))
        return NULL;
    if (!exit_weights || isnan(s.adamw.learning_rate)) {
        PyErr_SetString(PyExc_TypeError, "step() needs exit_weights and learning_rate");
        return NULL;
    }
    struct ee_trainer *trainer = self->trainer;
    s.dropout_seed = seed;
    s.update = update;
    struct ee_step_input input;
    Py_ssize_t microbatches = trainer->microbatches;
    if (!read_input(self, &a, &microbatches, &input) ||
        !floats_in(exit_weights, "exit_weights", trainer->model->config.num_exits, s.exit_weight) ||
        !begin_step(self))
        return NULL;
    struct ee_step_result result;
    enum ee_status status;
    RUN_WITHOUT_GIL(status, ee_trainer_step(trainer, &input, &s, &result));
    end_step(self);
    if (status != EE_OK)
        return raise_status(self->state, status);
    return step_result(&result, trainer->model->params->exits);
}

/* Turns the argmax of every exit into "equals the final exit's", and counts agreement over the
 * unmasked tokens. */
static void compare_exits(const struct ee_evaluation *evaluation, const int32_t *target,
                          int32_t exits, int64_t tokens, uint8_t *correct, double *agreement) {
    const int32_t *final = evaluation->token + (exits - 1) * tokens;
    for (int32_t e = 0; e < exits; e++) {
        int64_t agree = 0, count = 0;
        for (int64_t i = 0; i < tokens; i++) {
            bool same = evaluation->token[e * tokens + i] == final[i];
            correct[e * tokens + i] = same;
            agree += same && target[i] >= 0;
            count += target[i] >= 0;
        }
        agreement[e] = count ? (double)agree / (double)count : 0;
    }
}

static PyObject *evaluation_result(struct ee_evaluation *evaluation, int32_t exits,
                                   const double *agreement, PyObject *confidence,
                                   PyObject *correct) {
    double loss[EE_MAX_EXITS + 1];
    for (int32_t e = 0; e < exits; e++)
        loss[e] = evaluation->sums[e].loss;
    PyObject *loss_list = double_list(loss, exits), *agree_list = double_list(agreement, exits);
    if (!loss_list || !agree_list) {
        Py_XDECREF(loss_list);
        Py_XDECREF(agree_list);
        return NULL;
    }
    return Py_BuildValue("{s:N,s:N,s:L,s:O,s:O}", "loss_sum", loss_list, "agreement", agree_list,
                         "tokens", (long long)evaluation->sums[0].tokens, "confidence", confidence,
                         "correct", correct);
}

static PyObject *evaluate(PyObject *object, PyObject *args, PyObject *kwargs) {
    struct trainer_object *self = (struct trainer_object *)object;
    static char *names[] = {"tokens", "targets", "positions", "segments", "segment_counts", NULL};
    struct arrays a = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO:evaluate", names, &a.tokens, &a.targets,
                                     &a.positions, &a.segments, &a.counts) ||
        !initialised(self))
        return NULL;
    struct ee_step_input input;
    Py_ssize_t count = -1;
    if (!read_input(self, &a, &count, &input))
        return NULL;
    int32_t exits = self->trainer->model->params->exits;
    int64_t tokens = (int64_t)count * self->trainer->config.rows;
    Py_ssize_t shape[] = {exits, count, (Py_ssize_t)self->trainer->config.rows};
    void *confidence_data, *correct_data, *token_data;
    PyObject *confidence = array_new(ARRAY_F32, 3, shape, &confidence_data);
    PyObject *correct = array_new(ARRAY_U8, 3, shape, &correct_data);
    PyObject *argmax = array_new(ARRAY_I32, 3, shape, &token_data);
    PyObject *result = NULL;
    if (confidence && correct && argmax && begin_step(self)) {
        struct ee_evaluation evaluation = {.confidence = confidence_data, .token = token_data};
        double agreement[EE_MAX_EXITS + 1];
        enum ee_status status;
        RUN_WITHOUT_GIL(status,
                        ee_trainer_evaluate(self->trainer, &input, (int32_t)count, &evaluation));
        end_step(self);
        if (status != EE_OK) {
            raise_status(self->state, status);
        } else {
            compare_exits(&evaluation, input.target, exits, tokens, correct_data, agreement);
            result = evaluation_result(&evaluation, exits, agreement, confidence, correct);
        }
    }
    Py_XDECREF(confidence);
    Py_XDECREF(correct);
    Py_XDECREF(argmax);
    return result;
}

/* A view of a parameter in one of the trainer's arenas. */
static PyObject *arena_view(PyObject *object, PyObject *args, float *arena) {
    struct trainer_object *self = (struct trainer_object *)object;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    const struct ee_params *params = self->trainer->model->params;
    int32_t row = find_parameter(params, name);
    if (row < 0)
        return NULL;
    struct ee_tensor tensor = ee_param_tensor(params, row, arena);
    return tensor_view(self->state, object, &tensor);
}

static PyObject *gradient(PyObject *object, PyObject *args) {
    struct trainer_object *self = (struct trainer_object *)object;
    return initialised(self) ? arena_view(object, args, self->trainer->gradient) : NULL;
}

static PyObject *moment1(PyObject *object, PyObject *args) {
    struct trainer_object *self = (struct trainer_object *)object;
    return initialised(self) ? arena_view(object, args, self->trainer->moment1) : NULL;
}

static PyObject *moment2(PyObject *object, PyObject *args) {
    struct trainer_object *self = (struct trainer_object *)object;
    return initialised(self) ? arena_view(object, args, self->trainer->moment2) : NULL;
}

static PyObject *zero_gradients(PyObject *object, PyObject *unused) {
    (void)unused;
    struct trainer_object *self = (struct trainer_object *)object;
    if (!initialised(self) || !begin_call(self->model))
        return NULL;
    Py_BEGIN_ALLOW_THREADS ee_trainer_zero_gradients(self->trainer);
    Py_END_ALLOW_THREADS end_call(self->model);
    Py_RETURN_NONE;
}

static PyObject *record(PyObject *object, PyObject *args) {
    struct trainer_object *self = (struct trainer_object *)object;
    long long capacity;
    if (!PyArg_ParseTuple(args, "L:record", &capacity) || !initialised(self) || !begin_step(self))
        return NULL;
    enum ee_status status = EE_OK;
    ee_trace_destroy(self->trace);
    self->trace = NULL;
    if (capacity > 0)
        status = ee_trace_create(&self->trace, ee_min(capacity, 1 << 24));
    self->trainer->trace = self->trace;
    end_step(self);
    if (status != EE_OK)
        return raise_status(self->state, status);
    Py_RETURN_NONE;
}

static PyObject *recorded(PyObject *object, PyObject *unused) {
    (void)unused;
    struct trainer_object *self = (struct trainer_object *)object;
    if (!initialised(self) || !begin_step(self))
        return NULL;
    PyObject *array = trace_array(self->trace);
    end_step(self);
    return array;
}

static PyObject *get_steps(PyObject *object, void *closure) {
    (void)closure;
    struct trainer_object *self = (struct trainer_object *)object;
    return initialised(self) ? PyLong_FromLongLong(self->trainer->steps) : NULL;
}

static int set_steps(PyObject *object, PyObject *value, void *closure) {
    (void)closure;
    struct trainer_object *self = (struct trainer_object *)object;
    if (!initialised(self))
        return -1;
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "steps cannot be deleted");
        return -1;
    }
    long long steps = PyLong_AsLongLong(value);
    if (PyErr_Occurred())
        return -1;
    if (steps < 0) {
        PyErr_Format(PyExc_ValueError, "steps must not be negative, got %lld", steps);
        return -1;
    }
    self->trainer->steps = steps;
    return 0;
}

static PyObject *get_memory(PyObject *object, void *closure) {
    (void)closure;
    struct trainer_object *self = (struct trainer_object *)object;
    if (!initialised(self))
        return NULL;
    const struct ee_model *model = self->trainer->model;
    long long arena = (long long)model->params->elements * (long long)sizeof(float);
    long long gradients = (long long)model->params->gradient_elements * (long long)sizeof(float);
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L}", "parameters", arena, "gradients", gradients,
                         "moments", 2 * arena, "activations",
                         (long long)ee_trainer_activation_bytes(self->trainer), "scratch",
                         (long long)model->ctx->scratch.capacity);
}

static PyObject *get_flops(PyObject *object, void *closure) {
    (void)closure;
    struct trainer_object *self = (struct trainer_object *)object;
    return initialised(self) ? PyLong_FromDouble(ee_trainer_flops(self->trainer)) : NULL;
}

/* The first line of each text is the signature that inspect.signature() shows; 1e999 is infinity.
 */
static PyMethodDef methods[] = {
    {"step", (PyCFunction)(void (*)(void))step, METH_VARARGS | METH_KEYWORDS,
     "step($self, /, tokens, targets, positions, row_ids, segments, segment_counts, *,\n"
     "exit_weights, learning_rate, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0, clip=0.0,\n"
     "max_loss=1e999, max_grad_norm=1e999, dropout_seed=0, update=True, signal=0)\n--\n\n"
     "One optimizer step over all microbatches."},
    {"evaluate", (PyCFunction)(void (*)(void))evaluate, METH_VARARGS | METH_KEYWORDS,
     "evaluate($self, /, tokens, targets, positions, segments, segment_counts)\n--\n\n"
     "Losses and agreement of every exit, forward only."},
    {"gradient", gradient, METH_VARARGS,
     "gradient($self, name, /)\n--\n\nThe gradient of a parameter."},
    {"moment1", moment1, METH_VARARGS,
     "moment1($self, name, /)\n--\n\nAdamW's first moment of a parameter."},
    {"moment2", moment2, METH_VARARGS,
     "moment2($self, name, /)\n--\n\nAdamW's second moment of a parameter."},
    {"zero_gradients", zero_gradients, METH_NOARGS,
     "zero_gradients($self, /)\n--\n\nSets all gradients to zero."},
    {"record", record, METH_VARARGS,
     "record($self, capacity, /)\n--\n\nRecords up to `capacity` events from now on; 0 ends it."},
    {"recorded", recorded, METH_NOARGS,
     "recorded($self, /)\n--\n\nThe events recorded since the last call."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"steps", get_steps, set_steps, "Optimizer steps taken.", NULL},
    {"memory", get_memory, NULL, "Bytes by purpose.", NULL},
    {"flops", get_flops, NULL, "Floating-point operations of a step's matrix products.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_init, init},
    {Py_tp_dealloc, dealloc},
    {Py_tp_new, new_trainer},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc,
     "Trainer(model, *, rows, microbatches=None, schedule='1f1b', lists=None, comm=None, "
     "recompute='none', defer_exits=False, exit_temperature=(), dynamic_weights=False, "
     "fault=None)\n--\n\nGradients, moments, activation "
     "slots and a schedule."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "eellm._core.Trainer",
    .basicsize = sizeof(struct trainer_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

PyTypeObject *create_trainer_type(PyObject *module) {
    return create_type(module, &spec);
}
