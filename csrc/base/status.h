/* How the core reports failure: a status code, and a message kept per thread.
 *
 * Everything that can fail returns enum ee_status. The function that finds the fault writes the
 * message (what was wrong, what was expected, what came, what to do) with EE_FAIL; callers hand
 * the code on with EE_TRY. Only csrc/python turns a status into an exception.
 *
 * EE_ASSERT is for bugs of our own alone, never for files, sizes, memory, user input or
 * communication: it prints and aborts. */
#ifndef EE_STATUS_H
#define EE_STATUS_H

#include "base/base.h"

EE_EXTERN_C_BEGIN

enum ee_status {
    EE_OK = 0,
    EE_ERR_NOMEM,       /* MemoryError */
    EE_ERR_INVALID,     /* ValueError: an argument, a config, a file's content */
    EE_ERR_IO,          /* OSError */
    EE_ERR_UNSUPPORTED, /* NotImplementedError: known, but not built or not served here */
    EE_ERR_BUSY,        /* eellm.Error: the handle is in use by another thread */
    EE_ERR_COMM,        /* eellm.CommError: a rank, a peer or a deadline */
    EE_ERR_NONFINITE,   /* eellm.NonFiniteError: NaN or infinity in a loss or in logits */
    EE_ERR_INTERNAL,    /* eellm.Error: a state that cannot be */
};

/* Writes this thread's message and returns `status`. */
enum ee_status ee_fail(enum ee_status status, const char *format, ...) EE_PRINTF(2, 3);

/* The message of the last failure on this thread; "" before the first. Valid until the next
 * failure on this thread. */
const char *ee_last_error(void);

/* Short name of a status, for logs: "out of memory", "invalid", ... */
const char *ee_status_name(enum ee_status status);

void ee_assert_failed(const char *condition, const char *file, int line) __attribute__((noreturn));

EE_EXTERN_C_END

#define EE_FAIL(status, ...) return ee_fail(status, __VA_ARGS__)

#define EE_TRY(call)                                                                               \
    do {                                                                                           \
        enum ee_status ee_try_status_ = (call);                                                    \
        if (ee_try_status_ != EE_OK)                                                               \
            return ee_try_status_;                                                                 \
    } while (0)

/* Like EE_TRY, for functions that clean up: stores the code in `status` and jumps to `label`. */
#define EE_GOTO(status, call, label)                                                               \
    do {                                                                                           \
        (status) = (call);                                                                         \
        if ((status) != EE_OK)                                                                     \
            goto label;                                                                            \
    } while (0)

#define EE_ASSERT(condition)                                                                       \
    do {                                                                                           \
        if (!(condition))                                                                          \
            ee_assert_failed(#condition, __FILE__, __LINE__);                                      \
    } while (0)

#endif
