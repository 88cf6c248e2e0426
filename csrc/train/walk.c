#include "train/walk.h"

#include "base/alloc.h"

#include <string.h>

/* Messages of one chunk to a neighbour that have been sent and not received. */
struct message {
    double ready;
    int32_t microbatch;
    bool kept; /* of a forward: the sender keeps activations */
};

struct channel {
    struct message *ring; /* capacity is a power of two */
    int64_t first, last, capacity;
};

/* Full microbatches come in ascending order, so that a chunk knows them by counting. */
struct chunk {
    struct channel forward, backward; /* to this chunk: inputs, and gradients of outputs */
    int32_t forwards, backwards, weights;
};

/* The same channels for microbatches of Part 1, which others may overtake. */
struct part1 {
    struct channel forward, backward;
};

struct rank {
    struct ee_step_action action; /* the one that waits, if `waits` */
    bool waits, queued, ended;
    int32_t slots;
    int32_t backwards, forwards, passing; /* messages sent and not received, by kind */
    double clock, bytes;
};

/* What has become of an extra microbatch on a rank. */
enum extra { EXTRA_NONE, EXTRA_PASSED, EXTRA_KEPT, EXTRA_DONE };

struct walk {
    const struct ee_lists *lists;
    const struct ee_walk_costs *costs;
    struct ee_rank_result *result;
    ee_walk_record *record;
    void *record_arg;
    struct chunk *chunks;
    struct part1 *part1; /* [P v] where bubbles are filled, else NULL */
    struct rank *ranks;
    uint8_t *extras; /* [P, extra], enum extra */
    int32_t *queue;  /* ranks that may go on */
    int32_t queued;
};

/* The action under way, and where. */
struct place {
    int32_t rank, chunk; /* chunk: global */
    const struct ee_step_action *action;
    bool forward, extra;
};

static const char *const kind_names[] = {
    [EE_STEP_FORWARD] = "forward",
    [EE_STEP_BACKWARD] = "backward",
    [EE_STEP_BACKWARD_INPUT] = "backward_input",
    [EE_STEP_BACKWARD_WEIGHT] = "backward_weight",
};

#define FAIL_AT(w, at, text, ...)                                                                  \
    EE_FAIL(EE_ERR_INVALID, "rank %d, action %lld (%s of microbatch %d, chunk %d): " text,         \
            (at)->rank, (long long)(w)->result[(at)->rank].actions,                                \
            kind_names[(at)->action->kind], (at)->action->microbatch,                              \
            (at)->action->chunk __VA_OPT__(, ) __VA_ARGS__)

/* -- Channels -- */

static enum ee_status channel_push(struct channel *c, struct message message) {
    if (c->last - c->first == c->capacity) {
        int64_t capacity = c->capacity ? 2 * c->capacity : 4;
        void *memory;
        EE_TRY(ee_alloc(&memory, (size_t)capacity * sizeof *c->ring, "a walk through schedules"));
        struct message *ring = memory;
        for (int64_t i = c->first; i < c->last; i++)
            ring[i & (capacity - 1)] = c->ring[i & (c->capacity - 1)];
        ee_free(c->ring);
        c->ring = ring;
        c->capacity = capacity;
    }
    c->ring[c->last++ & (c->capacity - 1)] = message;
    return EE_OK;
}

static inline const struct message *channel_head(const struct channel *c) {
    return c->first < c->last ? &c->ring[c->first & (c->capacity - 1)] : NULL;
}

static void wake(struct walk *w, int32_t rank) {
    struct rank *r = &w->ranks[rank];
    if (r->queued || r->ended)
        return;
    r->queued = true;
    w->queue[w->queued++] = rank;
}

/* -- Rules -- */

static int32_t total(const struct ee_lists *lists) {
    return lists->microbatches + lists->fill1 + lists->fill2;
}

static enum ee_status check_range(const struct walk *w, const struct place *at) {
    const struct ee_step_action *a = at->action;
    if (a->kind > EE_STEP_BACKWARD_WEIGHT)
        EE_FAIL(EE_ERR_INVALID, "rank %d, action %lld: there is no action of kind %d", at->rank,
                (long long)w->result[at->rank].actions, a->kind);
    if (a->chunk >= w->lists->chunks)
        FAIL_AT(w, at, "the rank has %d chunks", w->lists->chunks);
    if (a->microbatch < 0 || a->microbatch >= total(w->lists))
        FAIL_AT(w, at, "there are %d microbatches", total(w->lists));
    return EE_OK;
}

/* A microbatch that runs in full goes through all chunks in order. */
static enum ee_status check_full(const struct walk *w, const struct place *at) {
    const struct chunk *c = &w->chunks[at->chunk];
    const struct ee_step_action *a = at->action;
    int32_t last = w->lists->ranks * w->lists->chunks - 1, m = a->microbatch, expected = 0;
    int32_t due = at->forward                          ? c->forwards
                  : a->kind == EE_STEP_BACKWARD_WEIGHT ? c->weights
                                                       : c->backwards;
    if (m != due)
        FAIL_AT(w, at, "microbatch %d is due; they come once each, in ascending order", due);
    if (at->forward)
        expected = (at->chunk > 0 ? EE_STEP_RECEIVES : 0) | (at->chunk < last ? EE_STEP_SENDS : 0) |
                   EE_STEP_KEEPS;
    else if (a->kind != EE_STEP_BACKWARD_WEIGHT)
        expected = (at->chunk < last ? EE_STEP_RECEIVES : 0) | (at->chunk > 0 ? EE_STEP_SENDS : 0);
    if (a->flags != expected)
        FAIL_AT(w, at, "it must receive, send and keep as its place asks (flags %d), got %d",
                expected, a->flags);
    if (!at->forward && m >= c->forwards)
        FAIL_AT(w, at, "its forward has not run");
    if (a->kind == EE_STEP_BACKWARD_WEIGHT && m >= c->backwards)
        FAIL_AT(w, at, "its backward_input has not run");
    if (a->kind == EE_STEP_BACKWARD && c->weights != m)
        FAIL_AT(w, at, "the weight gradient of microbatch %d comes first", c->weights);
    return EE_OK;
}

static uint8_t *extra_at(const struct walk *w, const struct place *at) {
    return &w->extras[(int64_t)at->rank * (w->lists->fill1 + w->lists->fill2) +
                      at->action->microbatch - w->lists->microbatches];
}

static enum ee_status check_extra(const struct walk *w, const struct place *at) {
    uint8_t state = *extra_at(w, at);
    if (w->lists->chunks > 1)
        FAIL_AT(w, at, "partial microbatches need one chunk a rank");
    if (at->forward && state != EXTRA_NONE)
        FAIL_AT(w, at, "it has gone forward here before");
    if (!at->forward && (at->action->kind != EE_STEP_BACKWARD || state != EXTRA_KEPT))
        FAIL_AT(w, at, "no forward here kept activations for it");
    if ((at->action->flags & EE_STEP_RECEIVES) == 0 && at->forward && at->rank > 0)
        FAIL_AT(w, at, "it must receive its input");
    return EE_OK;
}

static void count(struct walk *w, const struct place *at) {
    struct chunk *c = &w->chunks[at->chunk];
    if (at->extra) {
        bool keeps = at->action->flags & EE_STEP_KEEPS;
        *extra_at(w, at) = at->forward ? (keeps ? EXTRA_KEPT : EXTRA_PASSED) : EXTRA_DONE;
        return;
    }
    c->forwards += at->forward;
    c->backwards += !at->forward && at->action->kind != EE_STEP_BACKWARD_WEIGHT;
    c->weights += !at->forward && at->action->kind != EE_STEP_BACKWARD_INPUT;
}

/* -- Time and memory -- */

static double cost_of(const struct walk *w, const struct place *at) {
    if (!w->costs)
        return 0;
    const double *const costs[] = {w->costs->forward, w->costs->backward, w->costs->backward_input,
                                   w->costs->backward_weight};
    return costs[at->action->kind][at->chunk];
}

/* The peak of a rank while an action of a microbatch runs that needs `more` bytes. */
static void note_peak(const struct rank *r, struct ee_rank_result *result, double more) {
    result->slots = (int32_t)ee_max(result->slots, r->slots);
    if (r->bytes + more > result->peak_bytes)
        result->peak_bytes = r->bytes + more;
}

static void account(struct walk *w, const struct place *at) {
    static const struct ee_walk_costs none = {0};
    struct rank *r = &w->ranks[at->rank];
    struct ee_rank_result *result = &w->result[at->rank];
    const struct ee_walk_costs *costs = w->costs ? w->costs : &none;
    double kept = costs->kept_bytes ? costs->kept_bytes[at->chunk] : 0;
    double queued = costs->queued_bytes ? costs->queued_bytes[at->chunk] : 0;
    double transient = costs->transient_bytes ? costs->transient_bytes[at->chunk] : 0;
    switch (at->action->kind) {
    case EE_STEP_FORWARD:
        if (at->action->flags & EE_STEP_KEEPS) {
            r->slots++;
            r->bytes += kept;
            kept = 0;
        }
        note_peak(r, result, kept);
        return;
    case EE_STEP_BACKWARD_INPUT:
        r->bytes += queued;
        break;
    case EE_STEP_BACKWARD_WEIGHT:
        note_peak(r, result, transient);
        r->bytes -= queued;
        return;
    default:
        break;
    }
    note_peak(r, result, transient);
    r->slots--;
    r->bytes -= kept;
}

/* -- The walk -- */

static struct channel *channel_of(struct walk *w, const struct place *at, int32_t chunk) {
    int32_t m = at->action->microbatch - w->lists->microbatches;
    if (m >= 0 && m < w->lists->fill1)
        return at->forward ? &w->part1[chunk].forward : &w->part1[chunk].backward;
    return at->forward ? &w->chunks[chunk].forward : &w->chunks[chunk].backward;
}

/* How many messages of the action's kind the rank has sent that nobody has received. */
static int32_t *unreceived(struct rank *r, const struct place *at) {
    if (!at->forward)
        return &r->backwards;
    return at->action->flags & EE_STEP_KEEPS ? &r->forwards : &r->passing;
}

/* Whether the action has to wait until a message of its rank is received. */
static bool has_to_wait(const struct walk *w, const struct place *at) {
    if (!w->lists->buffers || !(at->action->flags & EE_STEP_SENDS))
        return false;
    int32_t limit = !at->forward                        ? w->lists->buffers
                    : at->action->flags & EE_STEP_KEEPS ? EE_WALK_FORWARDS
                                                        : 1;
    return *unreceived(&w->ranks[at->rank], at) >= limit;
}

static inline enum ee_status send(struct walk *w, const struct place *at, double end) {
    int32_t to = at->chunk + (at->forward ? 1 : -1), P = w->lists->ranks;
    if (to < 0 || to >= P * w->lists->chunks)
        FAIL_AT(w, at, "there is no chunk to send to");
    double message = w->costs && P > 1 ? w->costs->message : 0;
    struct message sent = {end + message, at->action->microbatch,
                           (at->action->flags & EE_STEP_KEEPS) != 0};
    EE_TRY(channel_push(channel_of(w, at, to), sent));
    *unreceived(&w->ranks[at->rank], at) += 1;
    int32_t rank = at->rank + (at->forward ? 1 : -1);
    wake(w, rank < 0 ? P - 1 : rank == P ? 0 : rank);
    return EE_OK;
}

static inline enum ee_status run(struct walk *w, const struct place *at, double ready) {
    struct rank *r = &w->ranks[at->rank];
    struct ee_rank_result *result = &w->result[at->rank];
    double start = r->clock > ready ? r->clock : ready, taken = cost_of(w, at);
    account(w, at);
    count(w, at);
    r->clock = start + taken;
    if (result->actions == 0)
        result->start = start;
    result->busy += taken;
    result->end = r->clock;
    if (at->action->flags & EE_STEP_SENDS)
        EE_TRY(send(w, at, r->clock));
    if (w->record)
        w->record(w->record_arg, at->rank, at->action, start, r->clock);
    result->actions++;
    r->waits = false;
    return EE_OK;
}

/* Runs the pending action of a rank unless it has to wait. */
static enum ee_status try_action(struct walk *w, int32_t rank) {
    struct rank *r = &w->ranks[rank];
    struct place at = {.rank = rank, .action = &r->action};
    at.chunk = r->action.chunk * w->lists->ranks + rank;
    at.forward = r->action.kind == EE_STEP_FORWARD;
    at.extra = r->action.microbatch >= w->lists->microbatches;
    if (!r->waits) {
        EE_TRY(check_range(w, &at));
        EE_TRY(at.extra ? check_extra(w, &at) : check_full(w, &at));
        r->waits = true;
    }
    if (has_to_wait(w, &at))
        return EE_OK;
    if (!(r->action.flags & EE_STEP_RECEIVES))
        return run(w, &at, 0);
    struct channel *from = channel_of(w, &at, at.chunk);
    const struct message *head = channel_head(from);
    if (!head)
        return EE_OK;
    if (head->microbatch != r->action.microbatch)
        FAIL_AT(w, &at, "the next message for it is that of microbatch %d", head->microbatch);
    double ready = head->ready;
    /* Whoever sent it may go on. */
    int32_t sender = (rank + (at.forward ? w->lists->ranks - 1 : 1)) % w->lists->ranks;
    *(at.forward ? head->kept ? &w->ranks[sender].forwards : &w->ranks[sender].passing
                 : &w->ranks[sender].backwards) -= 1;
    from->first++;
    if (w->lists->buffers)
        wake(w, sender);
    return run(w, &at, ready);
}

static enum ee_status run_rank(struct walk *w, int32_t rank) {
    struct rank *r = &w->ranks[rank];
    for (;;) {
        if (!r->waits && !w->lists->next(w->lists->arg, rank, &r->action)) {
            r->ended = true;
            return EE_OK;
        }
        EE_TRY(try_action(w, rank));
        if (r->waits)
            return EE_OK;
    }
}

static enum ee_status check_end(const struct walk *w) {
    const int32_t P = w->lists->ranks, G = P * w->lists->chunks, M = w->lists->microbatches;
    for (int32_t i = 0; i < P; i++) {
        const struct place at = {.rank = i, .action = &w->ranks[i].action};
        if (!w->ranks[i].ended)
            FAIL_AT(w, &at,
                    "what it needs never comes: the ranks wait for each other, or it is "
                    "not sent");
    }
    for (int32_t g = 0; g < G; g++) {
        const struct chunk *c = &w->chunks[g];
        if (c->forwards != M || c->backwards != M || c->weights != M)
            EE_FAIL(EE_ERR_INVALID,
                    "rank %d, chunk %d: the list ends after %d forwards, %d backwards and %d "
                    "weight gradients of %d microbatches",
                    g % P, g / P, c->forwards, c->backwards, c->weights, M);
        const struct part1 *p = w->part1 ? &w->part1[g] : NULL;
        if (channel_head(&c->forward) || channel_head(&c->backward) ||
            (p && (channel_head(&p->forward) || channel_head(&p->backward))))
            EE_FAIL(EE_ERR_INVALID, "rank %d, chunk %d: a message to it is never received", g % P,
                    g / P);
    }
    for (int32_t i = 0; i < P; i++)
        if (w->ranks[i].slots > 0)
            EE_FAIL(EE_ERR_INVALID, "rank %d: activations are kept for no backward", i);
    return EE_OK;
}

static enum ee_status allocate(struct walk *w) {
    size_t P = (size_t)w->lists->ranks, G = P * (size_t)w->lists->chunks;
    const char *what = "a walk through schedules";
    void *memory;
    EE_TRY(ee_alloc(&memory, G * sizeof *w->chunks, what));
    w->chunks = memory;
    if (w->lists->fill1 > 0) {
        EE_TRY(ee_alloc(&memory, G * sizeof *w->part1, what));
        w->part1 = memory;
    }
    EE_TRY(ee_alloc(&memory, P * sizeof *w->ranks, what));
    w->ranks = memory;
    EE_TRY(ee_alloc(&memory, P * ((size_t)w->lists->fill1 + (size_t)w->lists->fill2), what));
    w->extras = memory;
    EE_TRY(ee_alloc(&memory, P * sizeof *w->queue, what));
    w->queue = memory;
    return EE_OK;
}

static void release(struct walk *w) {
    for (int32_t g = 0; w->chunks && g < w->lists->ranks * w->lists->chunks; g++) {
        ee_free(w->chunks[g].forward.ring);
        ee_free(w->chunks[g].backward.ring);
        if (w->part1) {
            ee_free(w->part1[g].forward.ring);
            ee_free(w->part1[g].backward.ring);
        }
    }
    ee_free(w->chunks);
    ee_free(w->part1);
    ee_free(w->ranks);
    ee_free(w->extras);
    ee_free(w->queue);
}

static enum ee_status walk(struct walk *w) {
    EE_TRY(allocate(w));
    for (int32_t i = 0; i < w->lists->ranks; i++) {
        w->result[i] = (struct ee_rank_result){0};
        w->ranks[i].bytes = w->costs ? w->costs->static_bytes[i] : 0;
        w->result[i].peak_bytes = w->ranks[i].bytes;
    }
    for (int32_t i = w->lists->ranks; i-- > 0;)
        wake(w, i);
    while (w->queued > 0) {
        int32_t rank = w->queue[--w->queued];
        w->ranks[rank].queued = false;
        EE_TRY(run_rank(w, rank));
    }
    return check_end(w);
}

enum ee_status ee_walk(const struct ee_lists *lists, const struct ee_walk_costs *costs,
                       struct ee_rank_result *result, ee_walk_record *record, void *record_arg) {
    struct walk w = {.lists = lists,
                     .costs = costs,
                     .result = result,
                     .record = record,
                     .record_arg = record_arg};
    enum ee_status status = walk(&w);
    release(&w);
    return status;
}

static bool next_of_spec(void *arg, int32_t rank, struct ee_step_action *action) {
    struct ee_schedule_iterator *iterators = arg;
    return ee_schedule_next(&iterators[rank], action);
}

static bool next_given(void *arg, int32_t rank, struct ee_step_action *action) {
    struct ee_given_list *list = (struct ee_given_list *)arg + rank;
    if (list->at == list->count)
        return false;
    *action = list->actions[list->at++];
    return true;
}

struct ee_lists ee_lists_of_given(const struct ee_schedule_spec *spec,
                                  struct ee_given_list *given) {
    for (int32_t i = 0; i < spec->ranks; i++)
        given[i].at = 0;
    return (struct ee_lists){.ranks = spec->ranks,
                             .chunks = spec->chunks,
                             .microbatches = spec->microbatches,
                             .fill1 = spec->fill1,
                             .fill2 = spec->fill2,
                             .next = next_given,
                             .arg = given};
}

/* A walk with so many buffers, 0 for no limit. */
static enum ee_status walk_with(const struct ee_schedule_spec *spec, struct ee_given_list *given,
                                struct ee_schedule_iterator *iterators,
                                struct ee_rank_result *result, int32_t buffers) {
    struct ee_lists lists =
        given ? ee_lists_of_given(spec, given) : ee_lists_of_spec(spec, iterators);
    lists.buffers = buffers;
    return ee_walk(&lists, NULL, result, NULL, NULL);
}

static enum ee_status find_buffers(const struct ee_schedule_spec *spec, struct ee_given_list *given,
                                   struct ee_schedule_iterator *iterators,
                                   struct ee_rank_result *result, int32_t *buffers) {
    int32_t most = spec->chunks * (spec->microbatches + spec->fill1 + spec->fill2);
    enum ee_status status = EE_OK;
    for (*buffers = 2;; *buffers *= 2) {
        status = walk_with(spec, given, iterators, result, *buffers);
        if (status != EE_ERR_INVALID || *buffers >= most)
            break;
    }
    if (status != EE_ERR_INVALID)
        return status;
    EE_TRY(walk_with(spec, given, iterators, result, 0));
    EE_FAIL(EE_ERR_UNSUPPORTED,
            "the lists are valid, but a rank would have more than %d outputs on their way at a "
            "time, or more than one whose activations it does not keep; let the next rank receive "
            "them earlier",
            EE_WALK_FORWARDS);
}

enum ee_status ee_walk_buffers(const struct ee_schedule_spec *spec, struct ee_given_list *given,
                               int32_t *buffers) {
    size_t ranks = (size_t)spec->ranks;
    void *iterators, *result;
    EE_TRY(ee_alloc(&iterators, ranks * sizeof(struct ee_schedule_iterator), "a schedule"));
    enum ee_status status = ee_alloc(&result, ranks * sizeof(struct ee_rank_result), "a schedule");
    if (status == EE_OK) {
        status = find_buffers(spec, given, iterators, result, buffers);
        ee_free(result);
    }
    ee_free(iterators);
    return status;
}

struct ee_lists ee_lists_of_spec(const struct ee_schedule_spec *spec,
                                 struct ee_schedule_iterator *iterators) {
    for (int32_t i = 0; i < spec->ranks; i++)
        iterators[i] = ee_schedule_begin(spec, i);
    return (struct ee_lists){.ranks = spec->ranks,
                             .chunks = spec->chunks,
                             .microbatches = spec->microbatches,
                             .fill1 = spec->fill1,
                             .fill2 = spec->fill2,
                             .next = next_of_spec,
                             .arg = iterators};
}
