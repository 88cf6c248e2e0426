/* Addresses of functions of the core by name, so that tests call the operations of the very module
 * that users run. Private: names and signatures may change. */
#include "python/py_util.h"

#include "base/alloc.h"
#include "base/log.h"
#include "comm/comm.h"
#include "infer/sampler.h"

#define ENTRY(name) {#name, (void (*)(void))name},
#define OP_ENTRY(op) ENTRY(ee_##op)

static const struct {
    const char *name;
    void (*function)(void);
} table[] = {
    // clang-format off
    EE_OPS(OP_ENTRY)
    ENTRY(ee_last_error)
    ENTRY(ee_log)
    ENTRY(ee_isa_best)
    ENTRY(ee_ctx_create)
    ENTRY(ee_ctx_destroy)
    ENTRY(ee_weight_bytes)
    ENTRY(ee_alloc_fail_at)
    ENTRY(ee_comm_self)
    ENTRY(ee_sampling_check)
    ENTRY(ee_sampling_uniform)
    ENTRY(ee_sampling_plain)
    ENTRY(ee_sampler_create)
    ENTRY(ee_sampler_free)
    ENTRY(ee_sampler_adjust)
    ENTRY(ee_sampler_weigh)
    ENTRY(ee_sampler_draw)
    ENTRY(ee_sampler_choose)
    ENTRY(ee_sampler_verify)
    // clang-format on
};

PyObject *symbols(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof table / sizeof table[0]; i++) {
        PyObject *address = PyLong_FromSize_t((size_t)(uintptr_t)table[i].function);
        if (!address || PyDict_SetItemString(dict, table[i].name, address) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(address);
    }
    return dict;
}
