/* What the core gives to a transport that is a module of its own. */
#include "comm/host.h"

#include "base/alloc.h"

const struct ee_host *ee_host(void) {
    static const struct ee_host host = {
        .abi = EE_HOST_ABI,
        .struct_size = sizeof(struct ee_host),
        .fail = ee_fail,
        .last_error = ee_last_error,
        .alloc = ee_alloc,
        .free = ee_free,
        .log = ee_log,
    };
    return &host;
}
