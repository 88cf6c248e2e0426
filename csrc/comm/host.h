/* What a transport that is an extension module of its own gets from the core.
 *
 * eellm._mpi links no object of the core. The core gives it this struct in a PyCapsule named
 * EE_HOST_CAPSULE, and gets its communicator back in one named EE_COMM_CAPSULE; ee_host_check (for
 * the transport) and ee_comm_check (for the core) refuse another version by name. */
#ifndef EE_HOST_H
#define EE_HOST_H

#include "base/log.h"
#include "base/status.h"

EE_EXTERN_C_BEGIN

#define EE_HOST_ABI 1
#define EE_HOST_CAPSULE "eellm.host"
#define EE_COMM_CAPSULE "eellm.comm"

/* The members down to last_error stay as they are in every version, so that ee_host_check can tell
 * versions apart. */
struct ee_host {
    int abi;            /* EE_HOST_ABI as the core was built with */
    size_t struct_size; /* sizeof(struct ee_host), likewise */
    /* The functions of these names in base/. */
    enum ee_status (*fail)(enum ee_status status, const char *format, ...) EE_PRINTF(2, 3);
    const char *(*last_error)(void);
    enum ee_status (*alloc)(void **out, size_t bytes, const char *what);
    void (*free)(void *pointer);
    void (*log)(enum ee_log_level level, const char *format, ...) EE_PRINTF(2, 3);
};

/* The core's own, for its side of the capsule; transports have no such function. */
const struct ee_host *ee_host(void);

/* For the transport: refuses a core of another version of this header, naming both. The message is
 * where host->last_error() has it. */
EE_WARN_UNUSED static inline enum ee_status ee_host_check(const struct ee_host *host) {
    if (host->abi != EE_HOST_ABI || host->struct_size != sizeof *host)
        return host->fail(EE_ERR_UNSUPPORTED,
                          "the core offers version %d to transports (%zu bytes), expected %d (%zu "
                          "bytes); build both again",
                          host->abi, host->struct_size, EE_HOST_ABI, sizeof *host);
    return EE_OK;
}

EE_EXTERN_C_END

#endif
