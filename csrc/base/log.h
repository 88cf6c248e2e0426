/* The log of the core: the only place below csrc/python that prints.
 *
 * Lines go to a sink, by default standard error as "eellm: LEVEL: TEXT". EELLM_LOG (error, warn,
 * info, debug) sets the level; the default is warn. */
#ifndef EE_LOG_H
#define EE_LOG_H

#include "base/base.h"

EE_EXTERN_C_BEGIN

enum ee_log_level { EE_LOG_ERROR, EE_LOG_WARN, EE_LOG_INFO, EE_LOG_DEBUG };

typedef void ee_log_fn(enum ee_log_level level, const char *line);

/* NULL restores the default sink. */
void ee_log_set_sink(ee_log_fn *sink);
void ee_log_set_level(enum ee_log_level level);

void ee_log(enum ee_log_level level, const char *format, ...) EE_PRINTF(2, 3);

EE_EXTERN_C_END

#endif
