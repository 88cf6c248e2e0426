#include "infer/sequence.h"

#include "base/alloc.h"

#include <string.h>

#define MAX_DEFERRED 1024

static enum ee_status check_tokens(const char *what, const int32_t *tokens, int64_t count,
                                   int32_t vocab) {
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            EE_FAIL(EE_ERR_INVALID,
                    "%s %lld must lie between 0 and %d, got %d; check that tokenizer and model "
                    "belong together",
                    what, (long long)i, vocab - 1, tokens[i]);
    return EE_OK;
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

enum ee_status ee_request_check(const struct ee_request *request, const struct ee_config *config,
                                int64_t max_length) {
    if (request->token_count < 1)
        EE_FAIL(EE_ERR_INVALID, "the prompt has no tokens; start with the tokenizer's bos token");
    if (request->token_count > max_length)
        EE_FAIL(EE_ERR_INVALID,
                "the prompt has %lld tokens, the context holds %lld; shorten the prompt",
                (long long)request->token_count, (long long)max_length);
    if (request->max_new_tokens < 1)
        EE_FAIL(EE_ERR_INVALID, "max_new_tokens must be at least 1, got %lld",
                (long long)request->max_new_tokens);
    if (request->max_deferred < 0 || request->max_deferred > MAX_DEFERRED)
        EE_FAIL(EE_ERR_INVALID, "max_deferred must lie between 0 and %d, got %d", MAX_DEFERRED,
                request->max_deferred);
    EE_TRY(check_tokens("token", request->tokens, request->token_count, config->vocab_size));
    EE_TRY(
        check_tokens("stop token", request->stop_tokens, request->stop_count, config->vocab_size));
    EE_TRY(check_thresholds(request, config->num_exits));
    return ee_sampling_check(&request->sampling);
}

static enum ee_status lay_out(struct ee_sequence *s, const struct ee_config *config) {
    void *memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->prompt_count, sizeof(int32_t)));
    s->prompt = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, config->num_exits, sizeof(float)));
    s->thresholds = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->stop_count, sizeof(int32_t)));
    s->stop_tokens = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->max_deferred,
                         (size_t)config->hidden_size * sizeof(float)));
    s->hidden = memory;
    EE_TRY(ee_arena_take(&s->arena, &memory, s->max_deferred, sizeof(int32_t)));
    s->depth = memory;
    return EE_OK;
}

static void fill(struct ee_sequence *s, const struct ee_request *request, int32_t exits) {
    memcpy(s->prompt, request->tokens, (size_t)s->prompt_count * sizeof(int32_t));
    if (s->stop_count > 0)
        memcpy(s->stop_tokens, request->stop_tokens, (size_t)s->stop_count * sizeof(int32_t));
    for (int32_t e = 0; e < exits; e++) {
        int64_t i = request->threshold_count > 1 ? e : 0;
        bool given = request->kind == EE_ENGINE_DEFERRED && request->threshold_count > 0;
        s->thresholds[e] = given ? request->thresholds[i] : 1.0f;
    }
}

enum ee_status ee_sequence_create(struct ee_sequence **out, const struct ee_request *request,
                                  const struct ee_config *config, int64_t max_length) {
    *out = NULL;
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_sequence), "a sequence"));
    struct ee_sequence *s = memory;
    s->prompt_count = s->count = request->token_count;
    s->stop_count = request->stop_count;
    s->max_deferred = request->kind == EE_ENGINE_DEFERRED ? request->max_deferred : 0;
    s->sampling = request->sampling;
    /* The last token needs no place in the cache. */
    s->length_limit = max_length + 1;
    if (request->max_new_tokens < s->length_limit - s->prompt_count)
        s->length_limit = s->prompt_count + request->max_new_tokens;
    s->last = request->tokens[s->prompt_count - 1];
    ee_arena_init(&s->arena, "a sequence");
    enum ee_status status;
    EE_GOTO(status, lay_out(s, config), fail);
    EE_GOTO(status, ee_arena_bind(&s->arena, 0), fail);
    EE_GOTO(status, lay_out(s, config), fail);
    fill(s, request, config->num_exits);
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

enum ee_done ee_sequence_done(const struct ee_sequence *s, int32_t token) {
    for (int64_t i = 0; i < s->stop_count; i++)
        if (s->stop_tokens[i] == token)
            return EE_DONE_STOP;
    return s->count + 1 >= s->length_limit ? EE_DONE_LENGTH : EE_NOT_DONE;
}
