/* The events of a step, in the making. */
#ifndef EE_EVENTS_H
#define EE_EVENTS_H

#include "infer/engine.h"

EE_EXTERN_C_BEGIN

struct ee_event_list {
    struct ee_event *event;
    struct ee_event_exit *exits; /* [capacity, exit_count] */
    int64_t count, capacity;
    int32_t exit_count;
};

/* Room for `capacity` events; those in the list stay. */
EE_WARN_UNUSED enum ee_status ee_events_reserve(struct ee_event_list *list, int64_t capacity);
void ee_events_free(struct ee_event_list *list);

/* Appends an event and returns its index. `exits` [exit_count], or NULL where no exit has been run.
 */
int64_t ee_events_add(struct ee_event_list *list, const struct ee_event *event,
                      const struct ee_event_exit *exits);

/* Takes the events of a sequence out; whether there were any. */
bool ee_events_drop(struct ee_event_list *list, int32_t sequence);

static inline struct ee_event_exit *ee_events_exits(const struct ee_event_list *list, int64_t i) {
    return list->exits + i * list->exit_count;
}

/* What is said by exits that have not been run. */
void ee_exits_clear(struct ee_event_exit *exits, int32_t count);

EE_EXTERN_C_END

#endif
