#include "train/list.h"

#include "base/alloc.h"

#include <string.h>

static enum ee_status allocate(struct ee_list *list) {
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)list->count * sizeof *list->actions, "a schedule"));
    list->actions = memory;
    EE_TRY(ee_alloc(&memory, (size_t)list->count * sizeof *list->slots, "a schedule"));
    list->slots = memory;
    EE_TRY(ee_alloc(&memory, (size_t)list->chunks * sizeof *list->slot_counts, "a schedule"));
    list->slot_counts = memory;
    return EE_OK;
}

/* Gives each microbatch the lowest slot of its chunk that is free. held[chunk][microbatch]: its
 * slot; owner[chunk][slot]: 1 while it is in use. */
static void assign(struct ee_list *list, int32_t microbatches, int32_t *held, uint8_t *owner) {
    for (int64_t i = 0; i < list->count; i++) {
        const struct ee_step_action *a = &list->actions[i];
        int64_t row = (int64_t)a->chunk * microbatches;
        list->slots[i] = -1;
        if (a->kind == EE_STEP_FORWARD && (a->flags & EE_STEP_KEEPS)) {
            int32_t slot = 0;
            while (owner[row + slot])
                slot++;
            owner[row + slot] = 1;
            held[row + a->microbatch] = list->slots[i] = slot;
            list->slot_counts[a->chunk] = (int32_t)ee_max(list->slot_counts[a->chunk], slot + 1);
        } else if (a->kind != EE_STEP_FORWARD) {
            int32_t slot = list->slots[i] = held[row + a->microbatch];
            if (a->kind != EE_STEP_BACKWARD_INPUT)
                owner[row + slot] = 0;
        }
    }
}

static enum ee_status assign_slots(struct ee_list *list, int32_t microbatches) {
    size_t all = (size_t)list->chunks * (size_t)microbatches;
    void *held, *owner;
    EE_TRY(ee_alloc(&held, all * sizeof(int32_t), "a schedule"));
    enum ee_status status = ee_alloc(&owner, all, "a schedule");
    if (status == EE_OK) {
        assign(list, microbatches, held, owner);
        ee_free(owner);
    }
    ee_free(held);
    return status;
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

void ee_list_destroy(struct ee_list *list) {
    if (!list)
        return;
    ee_free(list->actions);
    ee_free(list->slots);
    ee_free(list->slot_counts);
    ee_free(list);
}
