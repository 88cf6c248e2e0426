/* From the mapping of ModelConfig.to_core to struct ee_config, by a table of fields. */
#include "python/py_util.h"

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

static bool read_enum(PyObject *value, const struct field *field, void *out) {
    PyObject *text = PyUnicode_AsUTF8String(value);
    const char *name = text ? PyBytes_AsString(text) : NULL;
    int found = -1;
    for (int i = 0; name && field->names[i]; i++)
        if (strcmp(name, field->names[i]) == 0)
            found = i;
    if (name && found < 0)
        PyErr_Format(PyExc_ValueError, "%s: unknown value '%s'", field->key, name);
    Py_XDECREF(text);
    /* All enums of the config have the size of int. */
    if (found >= 0)
        *(int *)out = found;
    return found >= 0;
}

static bool read_field(PyObject *mapping, const struct field *field, char *base) {
    PyObject *value = PyMapping_GetItemString(mapping, field->key);
    if (!value)
        return false;
    void *out = base + field->offset;
    bool ok = true;
    if (field->kind == FIELD_ENUM) {
        ok = read_enum(value, field, out);
    } else if (field->kind == FIELD_FLOAT) {
        *(float *)out = (float)PyFloat_AsDouble(value);
    } else if (field->kind == FIELD_BOOL) {
        *(bool *)out = PyObject_IsTrue(value) == 1;
    } else {
        long long number = PyLong_AsLongLong(value);
        if (!PyErr_Occurred() && (number < INT32_MIN || number > INT32_MAX)) {
            PyErr_Format(PyExc_ValueError, "%s: %lld does not fit in 32 bits", field->key, number);
            ok = false;
        }
        *(int32_t *)out = (int32_t)number;
    }
    Py_DECREF(value);
    return ok && !PyErr_Occurred();
}

static bool read_fields(PyObject *mapping, const struct field *table, size_t count, void *base) {
    for (size_t i = 0; i < count; i++)
        if (!read_field(mapping, &table[i], base))
            return false;
    return true;
}

static bool read_exits(PyObject *mapping, struct ee_config *config) {
    PyObject *exits = PyMapping_GetItemString(mapping, "exits");
    Py_ssize_t count = exits ? PySequence_Size(exits) : -1;
    if (count > EE_MAX_EXITS)
        PyErr_Format(PyExc_ValueError, "there may be 0 to %d early exits, got %zd", EE_MAX_EXITS,
                     count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *exit = PySequence_GetItem(exits, i);
        if (exit)
            read_fields(exit, exit_fields, sizeof exit_fields / sizeof exit_fields[0],
                        &config->exits[i]);
        Py_XDECREF(exit);
    }
    config->num_exits = (int32_t)count;
    Py_XDECREF(exits);
    return !PyErr_Occurred();
}

static bool read_windows(PyObject *mapping, struct ee_config *config) {
    PyObject *window = PyMapping_GetItemString(mapping, "window");
    Py_ssize_t count = window ? PySequence_Size(window) : -1;
    if (count >= 0 && (count != config->num_layers || count > EE_MAX_LAYERS))
        PyErr_Format(PyExc_ValueError, "window must have one number a layer (%d), got %zd",
                     config->num_layers, count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *item = PySequence_GetItem(window, i);
        long long value = item ? PyLong_AsLongLong(item) : 0;
        config->window[i] = (int32_t)ee_min(ee_max(value, -1), INT32_MAX);
        Py_XDECREF(item);
    }
    Py_XDECREF(window);
    return !PyErr_Occurred();
}

bool config_in(PyObject *mapping, struct ee_config *config, float rope_freq[MAX_ROPE_FREQ]) {
    memset(config, 0, sizeof *config);
    if (!read_fields(mapping, fields, sizeof fields / sizeof fields[0], config) ||
        !read_exits(mapping, config) || !read_windows(mapping, config))
        return false;
    if (config->positions != EE_POSITIONS_ROPE)
        return true;
    PyObject *freq = PyMapping_GetItemString(mapping, "rope_freq");
    Py_ssize_t half = config->rope_dims / 2;
    bool ok = freq != NULL;
    if (ok && (half < 1 || half > MAX_ROPE_FREQ)) {
        PyErr_Format(PyExc_ValueError, "rope_dims must lie between 2 and %d, got %d",
                     2 * MAX_ROPE_FREQ, config->rope_dims);
        ok = false;
    }
    ok = ok && floats_in(freq, "rope_freq", half, rope_freq);
    config->rope_freq = rope_freq;
    Py_XDECREF(freq);
    return ok;
}
