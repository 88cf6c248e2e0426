#include "train/schedule.h"

#include "base/alloc.h"

#include <string.h>

static const char *const names[] = {[EE_SCHEDULE_GPIPE] = "gpipe", [EE_SCHEDULE_1F1B] = "1f1b"};

enum ee_status ee_schedule_from_name(enum ee_schedule_kind *kind, const char *name) {
    for (int i = 0; i < 2; i++) {
        if (strcmp(name, names[i]) == 0) {
            *kind = (enum ee_schedule_kind)i;
            return EE_OK;
        }
    }
    EE_FAIL(EE_ERR_INVALID, "unknown schedule '%s' (expected 1f1b or gpipe)", name);
}

enum ee_status ee_schedule_create(struct ee_schedule **out, enum ee_schedule_kind kind,
                                  int32_t microbatches) {
    *out = NULL;
    if (microbatches < 1 || microbatches > 1 << 20)
        EE_FAIL(EE_ERR_INVALID, "a step needs 1 to %d microbatches, got %d", 1 << 20, microbatches);
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_schedule), "a schedule"));
    struct ee_schedule *schedule = memory;
    schedule->microbatches = microbatches;
    schedule->count = 2 * microbatches;
    enum ee_status status =
        ee_alloc(&memory, sizeof(struct ee_step_action) * (size_t)schedule->count, "a schedule");
    if (status != EE_OK) {
        ee_schedule_destroy(schedule);
        return status;
    }
    schedule->actions = memory;
    schedule->slots = kind == EE_SCHEDULE_GPIPE ? microbatches : 1;
    for (int32_t m = 0; m < microbatches; m++) {
        int32_t forward = kind == EE_SCHEDULE_GPIPE ? m : 2 * m;
        int32_t backward = kind == EE_SCHEDULE_GPIPE ? microbatches + m : 2 * m + 1;
        int32_t slot = m % schedule->slots;
        schedule->actions[forward] = (struct ee_step_action){EE_STEP_FORWARD, m, slot};
        schedule->actions[backward] = (struct ee_step_action){EE_STEP_BACKWARD, m, slot};
    }
    *out = schedule;
    return EE_OK;
}

void ee_schedule_destroy(struct ee_schedule *schedule) {
    if (!schedule)
        return;
    ee_free(schedule->actions);
    ee_free(schedule);
}

/* What the validator knows after a prefix of the list. */
struct progress {
    int32_t *occupant;  /* [slots] microbatch whose activations the slot holds, -1: none */
    uint8_t *forwarded; /* [microbatches] */
    int32_t backwards;  /* done so far: the next one must be of this microbatch */
    int32_t slots_used;
};

static enum ee_status check_action(const struct ee_schedule *schedule, struct progress *p,
                                   int32_t i) {
    const struct ee_step_action *a = &schedule->actions[i];
    if (a->microbatch < 0 || a->microbatch >= schedule->microbatches)
        EE_FAIL(EE_ERR_INVALID, "action %d: microbatch must lie between 0 and %d, got %d", i,
                schedule->microbatches - 1, a->microbatch);
    if (a->slot < 0 || a->slot >= schedule->slots)
        EE_FAIL(EE_ERR_INVALID, "action %d: slot must lie between 0 and %d, got %d", i,
                schedule->slots - 1, a->slot);
    if (a->kind == EE_STEP_FORWARD) {
        if (p->forwarded[a->microbatch])
            EE_FAIL(EE_ERR_INVALID, "action %d: microbatch %d goes forward twice", i,
                    a->microbatch);
        if (p->occupant[a->slot] >= 0)
            EE_FAIL(EE_ERR_INVALID, "action %d: slot %d still holds microbatch %d", i, a->slot,
                    p->occupant[a->slot]);
        p->forwarded[a->microbatch] = 1;
        p->occupant[a->slot] = a->microbatch;
        p->slots_used = (int32_t)ee_max(p->slots_used, a->slot + 1);
        return EE_OK;
    }
    if (p->occupant[a->slot] != a->microbatch)
        EE_FAIL(EE_ERR_INVALID, "action %d: slot %d does not hold microbatch %d", i, a->slot,
                a->microbatch);
    if (p->backwards != a->microbatch)
        EE_FAIL(EE_ERR_INVALID,
                "action %d: backward of microbatch %d before that of %d; gradients accumulate in "
                "ascending order",
                i, a->microbatch, p->backwards);
    p->backwards++;
    p->occupant[a->slot] = -1;
    return EE_OK;
}

static enum ee_status check_list(const struct ee_schedule *schedule, struct progress *p) {
    for (int32_t s = 0; s < schedule->slots; s++)
        p->occupant[s] = -1;
    for (int32_t i = 0; i < schedule->count; i++)
        EE_TRY(check_action(schedule, p, i));
    if (p->backwards != schedule->microbatches)
        EE_FAIL(EE_ERR_INVALID, "the list ends after %d of %d backwards", p->backwards,
                schedule->microbatches);
    if (p->slots_used != schedule->slots)
        EE_FAIL(EE_ERR_INVALID, "the list uses %d slots, %d are stated", p->slots_used,
                schedule->slots);
    return EE_OK;
}

enum ee_status ee_schedule_validate(const struct ee_schedule *schedule) {
    if (schedule->microbatches < 1 || schedule->slots < 1)
        EE_FAIL(EE_ERR_INVALID,
                "a schedule has at least one microbatch and one slot, got %d and %d",
                schedule->microbatches, schedule->slots);
    struct progress progress = {0};
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(int32_t) * (size_t)schedule->slots, "a schedule check"));
    progress.occupant = memory;
    enum ee_status status = ee_alloc(&memory, (size_t)schedule->microbatches, "a schedule check");
    progress.forwarded = memory;
    if (status == EE_OK)
        status = check_list(schedule, &progress);
    ee_free(progress.occupant);
    ee_free(progress.forwarded);
    return status;
}
