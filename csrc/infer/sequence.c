#include "infer/sequence.h"

#include "base/alloc.h"

#include <string.h>

#define MAX_DEFERRED 1024

/* -- Checks -- */

static enum ee_status check_numbers(const char *what, const int32_t *numbers, int64_t count,
                                    int32_t limit, const char *advice) {
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= limit)
            EE_FAIL(EE_ERR_INVALID, "%s %lld must lie between 0 and %d, got %d; %s", what,
                    (long long)i, limit - 1, numbers[i], advice);
    return EE_OK;
}

static enum ee_status check_tokens(const struct ee_request *request, int32_t vocab) {
    const char *advice = "check that tokenizer and model belong together";
    EE_TRY(check_numbers("token", request->tokens, request->token_count, vocab, advice));
    EE_TRY(check_numbers("stop token", request->stop_tokens, request->stop_count, vocab, advice));
    return check_numbers("forced token", request->forced, request->forced_count, vocab, advice);
}

static enum ee_status check_thresholds(const struct ee_request *request, int32_t exits) {
    if (request->threshold_count > 1 && request->threshold_count != exits)
        EE_FAIL(
            EE_ERR_INVALID,
            "thresholds must be one for all exits, or one for each of the %d early exits of the "
            "model, got %lld",
            exits, (long long)request->threshold_count);
    for (int64_t i = 0; i < request->threshold_count; i++)
        if (!(request->thresholds[i] >= 0 && request->thresholds[i] <= 1))
            EE_FAIL(EE_ERR_INVALID,
                    "threshold %lld must lie between 0 (leave at the first exit) and 1 (never "
                    "leave early), got %g",
                    (long long)i, (double)request->thresholds[i]);
    return EE_OK;
}

/* With so many stop tokens as there are tokens, one must be left that is none. */
static enum ee_status check_stop_tokens(const struct ee_request *request, int32_t vocab) {
    void *memory;
    EE_TRY(ee_alloc(&memory, (size_t)vocab, "a request"));
    bool *stops = memory;
    int32_t distinct = 0;
    for (int64_t i = 0; i < request->stop_count; i++) {
        distinct += !stops[request->stop_tokens[i]];
        stops[request->stop_tokens[i]] = true;
    }
    ee_free(stops);
    if (distinct == vocab)
        EE_FAIL(EE_ERR_INVALID,
                "min_new_tokens = %lld leaves no token to choose, as all %d are stop tokens; "
                "give fewer stop tokens",
                (long long)request->min_new_tokens, vocab);
    return EE_OK;
}

static enum ee_status check_new_tokens(const struct ee_request *request, int32_t exits,
                                       int32_t vocab) {
    if (request->max_new_tokens < 1)
        EE_FAIL(EE_ERR_INVALID, "max_new_tokens must be at least 1, got %lld",
                (long long)request->max_new_tokens);
    if (request->min_new_tokens < 0 || request->min_new_tokens > request->max_new_tokens)
        EE_FAIL(EE_ERR_INVALID,
                "min_new_tokens must lie between 0 and max_new_tokens = %lld, got %lld",
                (long long)request->max_new_tokens, (long long)request->min_new_tokens);
    if (request->min_new_tokens > 0 && request->stop_count >= vocab)
        EE_TRY(check_stop_tokens(request, vocab));
    if (request->max_deferred < 0 || request->max_deferred > MAX_DEFERRED)
        EE_FAIL(EE_ERR_INVALID, "max_deferred must lie between 0 and %d, got %d", MAX_DEFERRED,
                request->max_deferred);
    bool speculative = request->kind == EE_ENGINE_SPECULATIVE;
    if (speculative && request->forced_count > 0)
        EE_FAIL(EE_ERR_INVALID,
                "forced tokens leave nothing to speculate about; use another engine, or score");
    EE_TRY(check_numbers("number of the replay", request->replay, request->replay_count,
                         speculative ? 2 : exits + 1,
                         speculative ? "1 accepts a draft" : "give an exit of the model"));
    EE_TRY(check_thresholds(request, exits));
    return ee_sampling_check(&request->sampling, vocab);
}

enum ee_status ee_request_check(const struct ee_request *request, const struct ee_config *config,
                                int64_t max_length) {
    bool score = request->kind == EE_ENGINE_SCORE;
    if (score && request->token_count < 2)
        EE_FAIL(EE_ERR_INVALID,
                "a text to score needs 2 tokens or more, got %lld; begin it with the tokenizer's "
                "bos token",
                (long long)request->token_count);
    if (request->token_count < 1)
        EE_FAIL(EE_ERR_INVALID, "the prompt has no tokens; start with the tokenizer's bos token");
    if (request->token_count > max_length)
        EE_FAIL(EE_ERR_INVALID, "the %s has %lld tokens, the context holds %lld; shorten it",
                score ? "text" : "prompt", (long long)request->token_count, (long long)max_length);
    EE_TRY(check_tokens(request, config->vocab_size));
    return score ? EE_OK : check_new_tokens(request, config->num_exits, config->vocab_size);
}

/* -- Creation -- */

/* Whether deferred rows keep their hidden state, and drafts their logits. */
static bool keeps_hidden(const struct ee_sequence *s) {
    return s->kind == EE_ENGINE_DEFERRED || s->kind == EE_ENGINE_SPECULATIVE;
}

static bool keeps_logits(const struct ee_sequence *s) {
    return s->kind == EE_ENGINE_SPECULATIVE && s->sampling.temperature > 0;
}

static enum ee_status lay_out(struct ee_sequence *s, const struct ee_config *config,
                              struct ee_logit_bias **bias) {
    const size_t hidden = (size_t)config->hidden_size * sizeof(float);
    const size_t logits = (size_t)config->vocab_size * sizeof(float);
    const struct {
        void **out;
        int64_t count;
        size_t size;
    } arrays[] = {
        {(void **)&s->tokens, s->length_limit, sizeof *s->tokens},
        {(void **)&s->thresholds, config->num_exits, sizeof *s->thresholds},
        {(void **)&s->stop_tokens, s->stop_count, sizeof *s->stop_tokens},
        {(void **)&s->forced, s->forced_count, sizeof *s->forced},
        {(void **)&s->replay, s->replay_count, sizeof *s->replay},
        {(void **)bias, s->sampling.bias_count, sizeof **bias},
        {(void **)&s->hidden, keeps_hidden(s) ? s->max_deferred : 0, hidden},
        {(void **)&s->depth, s->max_deferred, sizeof *s->depth},
        {(void **)&s->exit, s->max_deferred, sizeof *s->exit},
        {(void **)&s->said, s->max_deferred + 1, ((size_t)config->num_exits + 1) * sizeof *s->said},
        {(void **)&s->draft_logits, keeps_logits(s) ? s->max_deferred : 0, logits},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        EE_TRY(ee_arena_take(&s->arena, arrays[i].out, arrays[i].count, arrays[i].size));
        if (arrays[i].count == 0)
            *arrays[i].out = NULL;
    }
    return EE_OK;
}

static void copy(void *to, const void *from, int64_t count, size_t size) {
    if (count > 0)
        memcpy(to, from, (size_t)count * size);
}

static void fill(struct ee_sequence *s, const struct ee_request *request, int32_t exits,
                 struct ee_logit_bias *bias) {
    copy(s->tokens, request->tokens, s->prompt_count, sizeof *s->tokens);
    copy(s->stop_tokens, request->stop_tokens, s->stop_count, sizeof *s->stop_tokens);
    copy(s->forced, request->forced, s->forced_count, sizeof *s->forced);
    copy(s->replay, request->replay, s->replay_count, sizeof *s->replay);
    copy(bias, request->sampling.bias, s->sampling.bias_count, sizeof *bias);
    s->sampling.bias = bias;
    for (int32_t e = 0; e < exits; e++) {
        bool given = request->kind != EE_ENGINE_FULL && request->threshold_count > 0;
        s->thresholds[e] = given ? request->thresholds[request->threshold_count > 1 ? e : 0] : 1.0f;
    }
}

static void set_limits(struct ee_sequence *s, const struct ee_request *request,
                       int64_t max_length) {
    s->prompt_count = s->count = request->token_count;
    s->length_limit = s->prompt_count;
    if (s->kind == EE_ENGINE_SCORE)
        return;
    /* The last token needs no place in the cache. */
    s->length_limit = max_length + 1;
    if (request->max_new_tokens < s->length_limit - s->prompt_count)
        s->length_limit = s->prompt_count + request->max_new_tokens;
    s->min_count =
        s->prompt_count + ee_min(request->min_new_tokens, s->length_limit - s->prompt_count);
    s->stop_count = request->stop_count;
    s->forced_count = ee_min(request->forced_count, s->length_limit - s->prompt_count);
    s->replay_count = request->kind == EE_ENGINE_FULL ? 0 : request->replay_count;
    if (request->kind != EE_ENGINE_FULL && request->kind != EE_ENGINE_PIPELINE)
        s->max_deferred = (int32_t)ee_min(request->max_deferred, s->length_limit - s->prompt_count);
    s->all_confidences = request->all_confidences;
    s->full_depth =
        request->full_depth && (s->kind == EE_ENGINE_DEFERRED || s->kind == EE_ENGINE_RECOMPUTE ||
                                s->kind == EE_ENGINE_PIPELINE);
    s->sampling = request->sampling;
}

enum ee_status ee_sequence_create(struct ee_sequence **out, const struct ee_request *request,
                                  const struct ee_config *config, int64_t max_length) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_sequence), "a sequence"));
    struct ee_sequence *s = memory;
    struct ee_logit_bias *bias = NULL;
    s->kind = request->kind;
    set_limits(s, request, max_length);
    ee_arena_init(&s->arena, "a sequence");
    enum ee_status status;
    EE_GOTO(status, lay_out(s, config, &bias), fail);
    EE_GOTO(status, ee_arena_bind(&s->arena, 0), fail);
    EE_GOTO(status, lay_out(s, config, &bias), fail);
    fill(s, request, config->num_exits, bias);
    *out = s;
    return EE_OK;
fail:
    ee_sequence_destroy(s);
    return status;
}

void ee_sequence_destroy(struct ee_sequence *s) {
    if (!s)
        return;
    ee_arena_free(&s->arena);
    ee_free(s);
}

/* -- Rules -- */

static bool stops(const struct ee_sequence *s, int64_t position, int32_t token) {
    for (int64_t i = 0; i < s->stop_count && position >= s->min_count; i++)
        if (s->stop_tokens[i] == token)
            return true;
    return false;
}

enum ee_done ee_sequence_done(const struct ee_sequence *s, int64_t position, int32_t token) {
    if (stops(s, position, token))
        return EE_DONE_STOP;
    return position + 1 >= s->length_limit ? EE_DONE_LENGTH : EE_NOT_DONE;
}

bool ee_sequence_drafts(const struct ee_sequence *s) {
    bool stopped = s->deferred > 0 && stops(s, s->count - 1, s->tokens[s->count - 1]);
    return s->deferred < s->max_deferred && s->count + 1 < s->length_limit && !stopped;
}
