/* From the mapping of ModelConfig.to_core to struct ee_config, by a table of fields. */
#include "python/py_util.h"

#include <math.h>
#include <stddef.h>

static const char *const families[] = {"eellm", "llama", "gpt2", NULL};
static const char *const norms[] = {"layernorm", "rmsnorm", NULL};
static const char *const activations[] = {"relu", "gelu", "gelu_tanh", "silu", NULL};
static const char *const positions[] = {"none", "learned", "rope", NULL};
static const char *const branches[] = {"none", "mlp", "block", NULL};
static const char *const exit_norms[] = {"none", "own", "final", NULL};

enum field_kind { FIELD_INT, FIELD_FLOAT, FIELD_BOOL, FIELD_ENUM };

struct field {
    const char *key;
    enum field_kind kind;
    size_t offset;
    const char *const *names; /* of an enum's values, from 0 */
};

#define CONFIG(key, kind, member) {key, kind, offsetof(struct ee_config, member), NULL}
#define CONFIG_ENUM(key, member, names) {key, FIELD_ENUM, offsetof(struct ee_config, member), names}
#define EXIT(key, kind, member) {key, kind, offsetof(struct ee_exit_config, member), NULL}

static const struct field fields[] = {
    CONFIG_ENUM("family", family, families),
    CONFIG("vocab_size", FIELD_INT, vocab_size),
    CONFIG("hidden_size", FIELD_INT, hidden_size),
    CONFIG("intermediate_size", FIELD_INT, intermediate_size),
    CONFIG("num_layers", FIELD_INT, num_layers),
    CONFIG("num_heads", FIELD_INT, num_heads),
    CONFIG("num_kv_heads", FIELD_INT, num_kv_heads),
    CONFIG("head_dim", FIELD_INT, head_dim),
    CONFIG("max_positions", FIELD_INT, max_positions),
    CONFIG_ENUM("norm", norm.kind, norms),
    CONFIG("norm_eps", FIELD_FLOAT, norm.eps),
    CONFIG("norm_offset", FIELD_FLOAT, norm.weight_offset),
    CONFIG_ENUM("activation", activation, activations),
    CONFIG("gated", FIELD_BOOL, gated),
    CONFIG("bias_q", FIELD_BOOL, bias_q),
    CONFIG("bias_kv", FIELD_BOOL, bias_kv),
    CONFIG("bias_o", FIELD_BOOL, bias_o),
    CONFIG("bias_up", FIELD_BOOL, bias_up),
    CONFIG("bias_down", FIELD_BOOL, bias_down),
    CONFIG("norm_bias", FIELD_BOOL, norm_bias),
    CONFIG("qk_norm", FIELD_BOOL, qk_norm),
    CONFIG("parallel_residual", FIELD_BOOL, parallel_residual),
    CONFIG("shared_norm", FIELD_BOOL, shared_norm),
    CONFIG("tie_embeddings", FIELD_BOOL, tie_embeddings),
    CONFIG_ENUM("positions", positions, positions),
    CONFIG("rope_dims", FIELD_INT, rope_dims),
    CONFIG("rope_interleaved", FIELD_BOOL, rope_interleaved),
    CONFIG("rope_scale", FIELD_FLOAT, rope_scale),
    CONFIG("attention_scale", FIELD_FLOAT, attention_scale),
    CONFIG("attention_softcap", FIELD_FLOAT, attention_softcap),
    CONFIG("logit_softcap", FIELD_FLOAT, logit_softcap),
    CONFIG("embedding_scale", FIELD_FLOAT, embedding_scale),
    CONFIG("embedding_dropout", FIELD_FLOAT, embedding_dropout),
    CONFIG("attention_dropout", FIELD_FLOAT, attention_dropout),
    CONFIG("residual_dropout", FIELD_FLOAT, residual_dropout),
};

static const struct field exit_fields[] = {
    EXIT("layer", FIELD_INT, layer),
    EXIT("before", FIELD_BOOL, before),
    {"branch", FIELD_ENUM, offsetof(struct ee_exit_config, branch), branches},
    {"norm", FIELD_ENUM, offsetof(struct ee_exit_config, norm), exit_norms},
    EXIT("output", FIELD_INT, output),
};

/* mapping[key], a new reference; `what` is what the mapping is. */
static PyObject *get_item(PyObject *mapping, const char *what, const char *key) {
    /* Sequences pass for mappings, whose keys are their indices. */
    if (!PyMapping_Check(mapping) || PyUnicode_Check(mapping) || PyList_Check(mapping) ||
        PyTuple_Check(mapping))
        return raise_type(what, "a mapping (see ModelConfig.to_core)", mapping);
    PyObject *value = PyMapping_GetItemString(mapping, key);
    if (!value && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_KeyError, "%s has no key '%s' (see ModelConfig.to_core)", what, key);
    }
    return value;
}

static bool read_enum(PyObject *value, const struct field *field, void *out) {
    if (!PyUnicode_Check(value)) {
        raise_type(field->key, "a string", value);
        return false;
    }
    for (int i = 0; field->names[i]; i++) {
        if (PyUnicode_CompareWithASCIIString(value, field->names[i]) == 0) {
            /* All enums of the config have the size of int. */
            *(int *)out = i;
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s: unknown value %R", field->key, value);
    return false;
}

static bool read_float(PyObject *value, const char *key, float *out) {
    double number = PyFloat_AsDouble(value);
    *out = (float)number;
    if (PyErr_Occurred()) {
        PyErr_Clear();
        raise_type(key, "a number", value);
        return false;
    }
    if (!isfinite(*out))
        PyErr_Format(PyExc_ValueError, "%s must be a finite number, got %R", key, value);
    return isfinite(*out);
}

static bool read_int(PyObject *value, const char *key, int32_t *out) {
    int overflow = 0;
    PyObject *number = PyBool_Check(value) ? NULL : PyNumber_Index(value);
    long long wide = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : 0;
    if (!number) {
        PyErr_Clear();
        raise_type(key, "an integer", value);
        return false;
    }
    bool ok = !overflow && wide >= INT32_MIN && wide <= INT32_MAX;
    if (!ok)
        PyErr_Format(PyExc_ValueError, "%s: %S does not fit in 32 bits", key, number);
    Py_DECREF(number);
    *out = (int32_t)wide;
    return ok;
}

static bool read_bool(PyObject *value, const char *key, bool *out) {
    if (!PyBool_Check(value)) {
        raise_type(key, "True or False", value);
        return false;
    }
    *out = value == Py_True;
    return true;
}

static bool read_field(PyObject *mapping, const char *what, const struct field *field, char *base) {
    PyObject *value = get_item(mapping, what, field->key);
    if (!value)
        return false;
    void *out = base + field->offset;
    bool ok = false;
    switch (field->kind) {
    case FIELD_ENUM:
        ok = read_enum(value, field, out);
        break;
    case FIELD_FLOAT:
        ok = read_float(value, field->key, out);
        break;
    case FIELD_BOOL:
        ok = read_bool(value, field->key, out);
        break;
    case FIELD_INT:
        ok = read_int(value, field->key, out);
        break;
    }
    Py_DECREF(value);
    return ok;
}

static bool read_fields(PyObject *mapping, const char *what, const struct field *table,
                        size_t count, void *base) {
    for (size_t i = 0; i < count; i++)
        if (!read_field(mapping, what, &table[i], base))
            return false;
    return true;
}

/* mapping[key], a sequence, and its length. */
static PyObject *get_sequence(PyObject *mapping, const char *key, Py_ssize_t *count) {
    PyObject *sequence = get_item(mapping, "the config", key);
    if (!sequence)
        return NULL;
    *count = PySequence_Check(sequence) ? PySequence_Size(sequence) : -1;
    if (*count >= 0)
        return sequence;
    PyErr_Clear();
    raise_type(key, "a sequence", sequence);
    Py_DECREF(sequence);
    return NULL;
}

static bool read_exit(PyObject *exit, Py_ssize_t i, struct ee_exit_config *out) {
    char what[32];
    PyOS_snprintf(what, sizeof what, "early exit %d", (int)i);
    if (!read_fields(exit, what, exit_fields, sizeof exit_fields / sizeof exit_fields[0], out))
        return false;
    if (out->output < EE_OUTPUT_FINAL)
        PyErr_Format(PyExc_ValueError,
                     "%s: output must be the index of an exit, or own (%d), embedding (%d) or "
                     "final (%d), got %d",
                     what, EE_OUTPUT_OWN, EE_OUTPUT_EMBEDDING, EE_OUTPUT_FINAL, out->output);
    return out->output >= EE_OUTPUT_FINAL;
}

static bool read_exits(PyObject *mapping, struct ee_config *config) {
    Py_ssize_t count;
    PyObject *exits = get_sequence(mapping, "exits", &count);
    if (!exits)
        return false;
    if (count > EE_MAX_EXITS)
        PyErr_Format(PyExc_ValueError, "there may be 0 to %d early exits, got %zd", EE_MAX_EXITS,
                     count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *exit = PySequence_GetItem(exits, i);
        if (exit)
            read_exit(exit, i, &config->exits[i]);
        Py_XDECREF(exit);
    }
    config->num_exits = (int32_t)count;
    Py_DECREF(exits);
    return !PyErr_Occurred();
}

static bool read_windows(PyObject *mapping, struct ee_config *config) {
    Py_ssize_t count;
    PyObject *window = get_sequence(mapping, "window", &count);
    if (!window)
        return false;
    if (count != config->num_layers)
        PyErr_Format(PyExc_ValueError, "window must have one number a layer (%d), got %zd",
                     config->num_layers, count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *item = PySequence_GetItem(window, i);
        if (item)
            read_int(item, "window", &config->window[i]);
        Py_XDECREF(item);
    }
    Py_DECREF(window);
    return !PyErr_Occurred();
}

bool config_in(PyObject *mapping, struct ee_config *config, float rope_freq[MAX_ROPE_FREQ]) {
    memset(config, 0, sizeof *config);
    if (!read_fields(mapping, "the config", fields, sizeof fields / sizeof fields[0], config) ||
        !read_exits(mapping, config))
        return false;
    /* ee_config_check names a number of layers that is out of range. */
    bool layers_fit = config->num_layers >= 1 && config->num_layers <= EE_MAX_LAYERS;
    if (layers_fit && !read_windows(mapping, config))
        return false;
    if (config->positions != EE_POSITIONS_ROPE)
        return true;
    Py_ssize_t half = config->rope_dims / 2;
    if (half < 1 || half > MAX_ROPE_FREQ) {
        PyErr_Format(PyExc_ValueError, "rope_dims must lie between 2 and %d, got %d",
                     2 * MAX_ROPE_FREQ, config->rope_dims);
        return false;
    }
    PyObject *freq = get_item(mapping, "the config", "rope_freq");
    bool ok = freq && floats_in(freq, "rope_freq", half, rope_freq);
    config->rope_freq = rope_freq;
    Py_XDECREF(freq);
    return ok;
}
