#include "infer/events.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

enum ee_status ee_events_reserve(struct ee_event_list *list, int64_t capacity) {
    if (capacity <= list->capacity)
        return EE_OK;
    size_t exits = (size_t)list->exit_count * sizeof *list->exits;
    void *event, *said;
    EE_TRY(ee_alloc(&event, (size_t)capacity * sizeof *list->event, "the events of a step"));
    enum ee_status status = ee_alloc(&said, (size_t)capacity * exits, "the events of a step");
    if (status != EE_OK) {
        ee_free(event);
        return status;
    }
    if (list->count > 0) {
        memcpy(event, list->event, (size_t)list->count * sizeof *list->event);
        memcpy(said, list->exits, (size_t)list->count * exits);
    }
    ee_free(list->event);
    ee_free(list->exits);
    list->event = event;
    list->exits = said;
    list->capacity = capacity;
    return EE_OK;
}

void ee_events_free(struct ee_event_list *list) {
    ee_free(list->event);
    ee_free(list->exits);
}

int64_t ee_events_add(struct ee_event_list *list, const struct ee_event *event,
                      const struct ee_event_exit *exits) {
    EE_ASSERT(list->count < list->capacity);
    int64_t i = list->count++;
    list->event[i] = *event;
    if (exits)
        memcpy(ee_events_exits(list, i), exits, (size_t)list->exit_count * sizeof *exits);
    else
        ee_exits_clear(ee_events_exits(list, i), list->exit_count);
    return i;
}

bool ee_events_drop(struct ee_event_list *list, int32_t sequence) {
    int64_t count = list->count;
    list->count = 0;
    for (int64_t i = 0; i < count; i++)
        if (list->event[i].sequence != sequence) {
            int64_t to = list->count++;
            list->event[to] = list->event[i];
            memmove(ee_events_exits(list, to), ee_events_exits(list, i),
                    (size_t)list->exit_count * sizeof *list->exits);
        }
    return list->count < count;
}

void ee_exits_clear(struct ee_event_exit *exits, int32_t count) {
    for (int32_t e = 0; e < count; e++)
        exits[e] = (struct ee_event_exit){.confidence = NAN, .logprob = NAN, .token = -1};
}
