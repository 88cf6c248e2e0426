#include "train/list.h"

#include "base/alloc.h"

#include <string.h>

static enum ee_status allocate(struct ee_list *list) {
    const struct {
        void **out;
        size_t count, size;
    } arrays[] = {
        {(void **)&list->actions, (size_t)list->count, sizeof *list->actions},
        {(void **)&list->slots, (size_t)list->count, sizeof *list->slots},
        {(void **)&list->queues, (size_t)list->count, sizeof *list->queues},
        {(void **)&list->slot_counts, (size_t)list->chunks, sizeof *list->slot_counts},
        {(void **)&list->queue_counts, (size_t)list->chunks, sizeof *list->queue_counts},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
        EE_TRY(ee_alloc(arrays[i].out, arrays[i].count * arrays[i].size, "a schedule"));
    return EE_OK;
}

/* Places of each chunk that microbatches hold: of [chunk][microbatch] the one that it has, and of
 * [chunk][place] whether it is in use. */
struct places {
    int32_t *held;
    uint8_t *used;
};

/* Gives a microbatch the lowest free place of its chunk. */
static int32_t take_place(struct places *places, int64_t row, int32_t microbatch, int32_t *count) {
    int32_t place = 0;
    while (places->used[row + place])
        place++;
    places->used[row + place] = 1;
    places->held[row + microbatch] = place;
    *count = (int32_t)ee_max(*count, place + 1);
    return place;
}

static int32_t give_back(struct places *places, int64_t row, int32_t microbatch) {
    int32_t place = places->held[row + microbatch];
    places->used[row + place] = 0;
    return place;
}

static void assign(struct ee_list *list, int32_t microbatches, struct places *slots,
                   struct places *queues) {
    for (int64_t i = 0; i < list->count; i++) {
        const struct ee_step_action *a = &list->actions[i];
        int64_t row = (int64_t)a->chunk * microbatches;
        list->slots[i] = list->queues[i] = -1;
        if (a->kind == EE_STEP_FORWARD && (a->flags & EE_STEP_KEEPS))
            list->slots[i] = take_place(slots, row, a->microbatch, &list->slot_counts[a->chunk]);
        else if (a->kind == EE_STEP_BACKWARD || a->kind == EE_STEP_BACKWARD_INPUT)
            list->slots[i] = give_back(slots, row, a->microbatch);
        if (a->kind == EE_STEP_BACKWARD_INPUT)
            list->queues[i] = take_place(queues, row, a->microbatch, &list->queue_counts[a->chunk]);
        else if (a->kind == EE_STEP_BACKWARD_WEIGHT)
            list->queues[i] = give_back(queues, row, a->microbatch);
    }
    for (int64_t i = 0; i < list->count; i++) {
        const struct ee_step_action *a = &list->actions[i];
        if (a->kind == EE_STEP_FORWARD && !(a->flags & EE_STEP_KEEPS))
            list->slots[i] = list->slot_counts[a->chunk];
    }
}

static enum ee_status assign_slots(struct ee_list *list, int32_t microbatches) {
    size_t all = (size_t)list->chunks * (size_t)microbatches;
    void *memory;
    /* Two of each array, one after the other. */
    EE_TRY(ee_alloc(&memory, 2 * all * (sizeof(int32_t) + 1), "a schedule"));
    int32_t *held = memory;
    uint8_t *used = (uint8_t *)(held + 2 * all);
    struct places slots = {held, used}, queues = {held + all, used + all};
    assign(list, microbatches, &slots, &queues);
    ee_free(memory);
    return EE_OK;
}

static enum ee_status create(struct ee_list **out, int64_t count, int32_t chunks) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_list), "a schedule"));
    struct ee_list *list = memory;
    list->count = count;
    list->chunks = chunks;
    enum ee_status status = allocate(list);
    if (status == EE_OK)
        *out = list;
    else
        ee_list_destroy(list);
    return status;
}

static enum ee_status finish(struct ee_list **out, int32_t microbatches) {
    enum ee_status status = assign_slots(*out, microbatches);
    if (status != EE_OK) {
        ee_list_destroy(*out);
        *out = NULL;
    }
    return status;
}

enum ee_status ee_list_create(struct ee_list **out, const struct ee_schedule_spec *spec,
                              int32_t rank) {
    struct ee_step_action action;
    int64_t count = 0;
    for (struct ee_schedule_iterator it = ee_schedule_begin(spec, rank);
         ee_schedule_next(&it, &action);)
        count++;
    EE_TRY(create(out, count, spec->chunks));
    struct ee_schedule_iterator it = ee_schedule_begin(spec, rank);
    for (int64_t i = 0; ee_schedule_next(&it, &action); i++)
        (*out)->actions[i] = action;
    return finish(out, spec->microbatches + spec->fill1 + spec->fill2);
}

enum ee_status ee_list_from_actions(struct ee_list **out, const struct ee_step_action *actions,
                                    int64_t count, int32_t chunks, int32_t microbatches) {
    EE_TRY(create(out, count, chunks));
    if (count > 0)
        memcpy((*out)->actions, actions, (size_t)count * sizeof *actions);
    return finish(out, microbatches);
}

enum ee_status ee_list_of_forwards(struct ee_list **out, int32_t rank, int32_t ranks,
                                   int32_t chunks, int32_t microbatches) {
    EE_TRY(create(out, (int64_t)chunks * microbatches, chunks));
    struct ee_step_action *next = (*out)->actions;
    for (int32_t first = 0; first < microbatches; first += ranks) {
        int32_t end = (int32_t)ee_min((int64_t)first + ranks, microbatches);
        for (int32_t chunk = 0; chunk < chunks; chunk++) {
            int32_t global = chunk * ranks + rank;
            uint8_t flags = (uint8_t)((global > 0 ? EE_STEP_RECEIVES : 0) |
                                      (global < ranks * chunks - 1 ? EE_STEP_SENDS : 0));
            for (int32_t m = first; m < end; m++)
                *next++ = (struct ee_step_action){EE_STEP_FORWARD, flags, (uint16_t)chunk, m};
        }
    }
    for (int64_t i = 0; i < (*out)->count; i++)
        (*out)->queues[i] = -1;
    return EE_OK;
}

void ee_list_destroy(struct ee_list *list) {
    if (!list)
        return;
    ee_free(list->actions);
    ee_free(list->slots);
    ee_free(list->queues);
    ee_free(list->slot_counts);
    ee_free(list->queue_counts);
    ee_free(list);
}
