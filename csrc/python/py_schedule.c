/* Schedules: lists of actions, and the walk that proves and prices them. An action is 8 bytes,
 * which Python gets as uint64 and views as (kind, flags, chunk, microbatch). */
#include "python/py_util.h"

#include "base/alloc.h"
#include "train/walk.h"

_Static_assert(sizeof(struct ee_step_action) == sizeof(uint64_t), "an action is a uint64");

static bool optional_array(PyObject *object, const char *name, enum array_type type,
                           Py_ssize_t *count, void **data) {
    *data = NULL;
    if (object == Py_None)
        return true;
    return array_in(object, name, type, 1, count, data);
}

/* (name, ranks, chunks, microbatches, fill1, fill2_depths, exit_ranks) */
bool schedule_in(PyObject *tuple, struct ee_schedule_spec *spec, enum ee_status *status) {
    const char *name;
    PyObject *depths, *exits;
    *status = EE_OK;
    if (!PyTuple_Check(tuple)) {
        raise_type("spec", "a tuple", tuple);
        return false;
    }
    if (!PyArg_ParseTuple(tuple, "siiiiOO", &name, &spec->ranks, &spec->chunks, &spec->microbatches,
                          &spec->fill1, &depths, &exits))
        return false;
    Py_ssize_t fill2 = -1, ranks = spec->ranks;
    void *depth_data, *exit_data;
    if (!optional_array(depths, "fill2_depths", ARRAY_I32, &fill2, &depth_data) ||
        !optional_array(exits, "exit_ranks", ARRAY_U8, &ranks, &exit_data))
        return false;
    spec->fill2 = depth_data ? (int32_t)ee_min(fill2, INT32_MAX) : 0;
    spec->fill2_depth = depth_data;
    spec->exit_ranks = exit_data;
    *status = ee_schedule_from_name(&spec->kind, name);
    if (*status == EE_OK)
        *status = ee_schedule_check(spec);
    return *status == EE_OK;
}

static int64_t count_actions(const struct ee_schedule_spec *spec, int32_t rank) {
    struct ee_step_action action;
    int64_t count = 0;
    for (struct ee_schedule_iterator it = ee_schedule_begin(spec, rank);
         ee_schedule_next(&it, &action);)
        count++;
    return count;
}

PyObject *schedule_actions(PyObject *module, PyObject *args) {
    struct ee_schedule_spec spec = {0};
    PyObject *tuple;
    int rank;
    enum ee_status status;
    if (!PyArg_ParseTuple(args, "Oi", &tuple, &rank))
        return NULL;
    if (!schedule_in(tuple, &spec, &status))
        return status == EE_OK ? NULL : raise_status(module_state(module), status);
    if (rank < 0 || rank >= spec.ranks) {
        PyErr_Format(PyExc_ValueError, "rank must lie between 0 and %d, got %d", spec.ranks - 1,
                     rank);
        return NULL;
    }
    Py_ssize_t count = (Py_ssize_t)count_actions(&spec, rank);
    void *data;
    PyObject *array = array_new(ARRAY_U64, 1, &count, &data);
    if (!array)
        return NULL;
    struct ee_step_action *actions = data;
    struct ee_schedule_iterator it = ee_schedule_begin(&spec, rank);
    for (Py_ssize_t i = 0; i < count && ee_schedule_next(&it, &actions[i]);)
        i++;
    return array;
}

PyObject *schedule_fill(PyObject *module, PyObject *args) {
    (void)module;
    int ranks, count;
    double ratio;
    if (!PyArg_ParseTuple(args, "idi", &ranks, &ratio, &count))
        return NULL;
    if (ranks < 1 || !(ratio > 0) || count < 0 || count > ranks) {
        PyErr_Format(PyExc_ValueError,
                     "schedule_fill needs ranks of 1 or more, a ratio above 0 and 0 to %d "
                     "microbatches, got %d and %d",
                     ranks, ranks, count);
        return NULL;
    }
    Py_ssize_t size = count;
    void *data;
    PyObject *depths = array_new(ARRAY_I32, 1, &size, &data);
    for (int i = 0; depths && i < count; i++)
        ((int32_t *)data)[i] = ee_schedule_fill_depth(ranks, ratio, i);
    return depths ? Py_BuildValue("(iN)", (int)ee_schedule_fill_count(ranks, ratio), depths) : NULL;
}

/* -- The walk -- */

/* Where the times of the actions go: [sum of counts, 2], a rank's from 2 * at[rank] on. */
struct times {
    double *values;
    int64_t *at;
};

static void record_times(void *arg, int32_t rank, const struct ee_step_action *action, double start,
                         double end) {
    (void)action;
    struct times *times = arg;
    double *pair = times->values + 2 * times->at[rank]++;
    pair[0] = start;
    pair[1] = end;
}

/* Busy time of neighbouring ranks in equal parts of a step: what pictures show where there are too
 * many actions to keep their times. */
struct grid {
    double *values; /* [rows, buckets] += */
    int64_t rows, buckets, ranks;
    double width; /* of a bucket, in time */
};

static void record_busy(void *arg, int32_t rank, const struct ee_step_action *action, double start,
                        double end) {
    (void)action;
    const struct grid *grid = arg;
    double *row = grid->values + (int64_t)rank * grid->rows / grid->ranks * grid->buckets;
    for (int64_t b = (int64_t)(start / grid->width); b < grid->buckets; b++) {
        double low = (double)b * grid->width, high = low + grid->width;
        if (low >= end)
            return;
        row[b] += (end < high ? end : high) - (start > low ? start : low);
    }
}

#define COSTS 8
static const char *const cost_names[COSTS] = {"forward",         "backward",    "backward_input",
                                              "backward_weight", "kept_bytes",  "queued_bytes",
                                              "transient_bytes", "static_bytes"};

/* A mapping of float64 arrays [P v], static_bytes [P], and the number `message`. */
static bool read_costs(PyObject *mapping, const struct ee_schedule_spec *spec,
                       struct ee_walk_costs *costs) {
    const double **const out[] = {
        &costs->forward,    &costs->backward,     &costs->backward_input,  &costs->backward_weight,
        &costs->kept_bytes, &costs->queued_bytes, &costs->transient_bytes, &costs->static_bytes};
    for (int i = 0; i < COSTS; i++) {
        Py_ssize_t size = (Py_ssize_t)spec->ranks * (i == COSTS - 1 ? 1 : spec->chunks);
        PyObject *array = PyMapping_GetItemString(mapping, cost_names[i]);
        void *data;
        bool good = array && array_in(array, cost_names[i], ARRAY_F64, 1, &size, &data);
        Py_XDECREF(array); /* the mapping keeps it alive */
        if (!good)
            return false;
        *out[i] = data;
    }
    PyObject *message = PyMapping_GetItemString(mapping, "message");
    costs->message = message ? PyFloat_AsDouble(message) : -1;
    Py_XDECREF(message);
    return !PyErr_Occurred();
}

bool lists_in(PyObject *sequence, const struct ee_schedule_spec *spec,
              struct ee_given_list *given) {
    if (PySequence_Size(sequence) != spec->ranks) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "lists must be one for each of %d ranks, got %zd",
                         spec->ranks, PySequence_Size(sequence));
        return false;
    }
    for (int32_t r = 0; r < spec->ranks; r++) {
        PyObject *array = PySequence_GetItem(sequence, r);
        Py_ssize_t count = -1;
        void *data = NULL;
        bool good = array && array_in(array, "a list", ARRAY_U64, 1, &count, &data);
        Py_XDECREF(array); /* the sequence keeps it alive */
        if (!good)
            return false;
        given[r] = (struct ee_given_list){data, count, 0};
    }
    return true;
}

static PyObject *results(const struct ee_rank_result *result, int32_t ranks, PyObject *times) {
    static const char *const names[] = {"start", "end", "busy", "peak_bytes"};
    PyObject *dict = PyDict_New();
    Py_ssize_t size = ranks;
    for (int i = 0; dict && i < 4; i++) {
        void *data;
        PyObject *array = array_new(ARRAY_F64, 1, &size, &data);
        for (int32_t r = 0; array && r < ranks; r++) {
            const double values[] = {result[r].start, result[r].end, result[r].busy,
                                     result[r].peak_bytes};
            ((double *)data)[r] = values[i];
        }
        if (!array || PyDict_SetItemString(dict, names[i], array) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(array);
    }
    void *data[2] = {NULL, NULL};
    PyObject *slots = array_new(ARRAY_I32, 1, &size, &data[0]);
    PyObject *actions = array_new(ARRAY_U64, 1, &size, &data[1]);
    for (int32_t r = 0; slots && actions && r < ranks; r++) {
        ((int32_t *)data[0])[r] = result[r].slots;
        ((uint64_t *)data[1])[r] = (uint64_t)result[r].actions;
    }
    if (dict && (!slots || !actions || PyDict_SetItemString(dict, "slots", slots) < 0 ||
                 PyDict_SetItemString(dict, "actions", actions) < 0 ||
                 PyDict_SetItemString(dict, "times", times) < 0))
        Py_CLEAR(dict);
    Py_XDECREF(slots);
    Py_XDECREF(actions);
    return dict;
}

/* Everything that a walk needs, in memory of its own. */
struct walk_call {
    struct ee_schedule_spec spec;
    struct ee_schedule_iterator *iterators;
    struct ee_given_list *given;
    struct ee_rank_result *result;
    struct ee_lists lists;
    struct times times;
};

static bool allocate_call(struct walk_call *call) {
    size_t ranks = (size_t)call->spec.ranks;
    call->iterators = PyMem_Calloc(ranks, sizeof *call->iterators);
    call->given = PyMem_Calloc(ranks, sizeof *call->given);
    call->result = PyMem_Calloc(ranks, sizeof *call->result);
    call->times.at = PyMem_Calloc(ranks, sizeof *call->times.at);
    if (call->iterators && call->given && call->result && call->times.at)
        return true;
    PyErr_NoMemory();
    return false;
}

static void free_call(struct walk_call *call) {
    PyMem_Free(call->iterators);
    PyMem_Free(call->given);
    PyMem_Free(call->result);
    PyMem_Free(call->times.at);
}

/* Room for the times of all actions, by rank. */
static PyObject *make_times(struct walk_call *call, bool given) {
    int64_t total = 0;
    for (int32_t r = 0; r < call->spec.ranks; r++) {
        call->times.at[r] = total;
        total += given ? call->given[r].count : count_actions(&call->spec, r);
    }
    const Py_ssize_t shape[] = {(Py_ssize_t)total, 2};
    void *data;
    PyObject *array = array_new(ARRAY_F64, 2, shape, &data);
    call->times.values = data;
    return array;
}

static PyObject *run_walk(struct module_state *state, struct walk_call *call, PyObject *mapping,
                          PyObject *lists, bool trace, struct grid *grid) {
    struct ee_walk_costs costs;
    bool priced = mapping != Py_None, given = lists != Py_None;
    if ((priced && !read_costs(mapping, &call->spec, &costs)) ||
        (given && !lists_in(lists, &call->spec, call->given)))
        return NULL;
    call->lists = given ? ee_lists_of_given(&call->spec, call->given)
                        : ee_lists_of_spec(&call->spec, call->iterators);
    PyObject *times = trace ? make_times(call, given) : Py_NewRef(Py_None);
    if (!times)
        return NULL;
    enum ee_status status;
    ee_walk_record *record = grid->values ? record_busy : trace ? record_times : NULL;
    void *arg = grid->values ? (void *)grid : &call->times;
    RUN_WITHOUT_GIL(status,
                    ee_walk(&call->lists, priced ? &costs : NULL, call->result, record, arg));
    PyObject *result = status == EE_OK ? results(call->result, call->spec.ranks, times) : NULL;
    Py_DECREF(times);
    return status == EE_OK ? result : raise_status(state, status);
}

static bool read_grid(PyObject *object, double time, const struct ee_schedule_spec *spec,
                      struct grid *grid) {
    Py_ssize_t shape[] = {-1, -1};
    void *data;
    if (!object || object == Py_None)
        return true;
    if (!array_out(object, "grid", ARRAY_F64, 2, shape, &data))
        return false;
    if (shape[0] < 1 || shape[0] > spec->ranks || shape[1] < 1 || !(time > 0)) {
        PyErr_Format(PyExc_ValueError,
                     "a grid has 1 to %d rows, buckets, and the time of a step, got %zd x %zd",
                     spec->ranks, shape[0], shape[1]);
        return false;
    }
    *grid = (struct grid){data, shape[0], shape[1], spec->ranks, time / (double)shape[1]};
    return true;
}

PyObject *schedule_walk(PyObject *module, PyObject *args) {
    struct walk_call call = {0};
    PyObject *tuple, *costs, *lists, *array = NULL;
    struct grid grid = {0};
    int trace;
    double time = 0;
    enum ee_status status;
    if (!PyArg_ParseTuple(args, "OOOp|Od", &tuple, &costs, &lists, &trace, &array, &time))
        return NULL;
    if (!schedule_in(tuple, &call.spec, &status))
        return status == EE_OK ? NULL : raise_status(module_state(module), status);
    PyObject *result = NULL;
    if (read_grid(array, time, &call.spec, &grid) && allocate_call(&call))
        result = run_walk(module_state(module), &call, costs, lists, trace, &grid);
    free_call(&call);
    return result;
}
