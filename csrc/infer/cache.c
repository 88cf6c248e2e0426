#include "infer/cache.h"

#include "base/alloc.h"

#include <string.h>

static enum ee_status allocate(struct ee_cache *cache) {
    size_t floats = (size_t)cache->layers * (size_t)cache->heads * EE_CACHE_PAGE;
    size_t bytes, table;
    if (!ee_mul_size(floats, (size_t)cache->width * sizeof(float), &bytes) ||
        !ee_mul_size(bytes, (size_t)cache->pages, &bytes) ||
        !ee_mul_size((size_t)cache->max_sequences, (size_t)cache->pages_per_sequence, &table) ||
        table > SIZE_MAX / sizeof(int32_t) || cache->pages > INT32_MAX)
        EE_FAIL(EE_ERR_NOMEM,
                "a key-value cache of %lld pages cannot be addressed; lower max_sequences or "
                "max_length",
                (long long)cache->pages);
    void *memory;
    EE_TRY(ee_alloc(&memory, bytes, "the keys of the cache"));
    cache->k = memory;
    EE_TRY(ee_alloc(&memory, bytes, "the values of the cache"));
    cache->v = memory;
    EE_TRY(ee_alloc(&memory, table * sizeof(int32_t), "the page table of the cache"));
    cache->table = memory;
    EE_TRY(ee_alloc(&memory, (size_t)cache->pages * sizeof(int32_t), "the page list of the cache"));
    cache->free_pages = memory;
    EE_TRY(ee_alloc(&memory, (size_t)cache->max_sequences * (size_t)cache->layers * sizeof(int32_t),
                    "the fill levels of the cache"));
    cache->fill = memory;
    EE_TRY(ee_alloc(&memory, (size_t)cache->max_sequences * sizeof(bool), "the cache"));
    cache->used = memory;
    memset(cache->table, -1, table * sizeof(int32_t));
    for (int64_t i = 0; i < cache->pages; i++)
        cache->free_pages[i] = (int32_t)(cache->pages - 1 - i);
    return EE_OK;
}

enum ee_status ee_cache_create(struct ee_cache **out, int32_t layers, int32_t heads, int32_t width,
                               int32_t max_sequences, int64_t max_length, int64_t positions) {
    *out = NULL;
    if (max_sequences < 1 || max_sequences > 1 << 20)
        EE_FAIL(EE_ERR_INVALID, "max_sequences must lie between 1 and %d, got %d", 1 << 20,
                max_sequences);
    if (positions < 0)
        EE_FAIL(EE_ERR_INVALID, "positions of the cache must not be negative, got %lld",
                (long long)positions);
    void *memory;
    EE_TRY(ee_alloc(&memory, sizeof(struct ee_cache), "the key-value cache"));
    struct ee_cache *cache = memory;
    cache->layers = layers;
    cache->heads = heads;
    cache->width = width;
    cache->max_sequences = max_sequences;
    cache->max_length = max_length;
    cache->pages_per_sequence = ee_ceil_div(max_length, EE_CACHE_PAGE);
    cache->pages = cache->pages_per_sequence * max_sequences;
    if (positions > 0)
        cache->pages = ee_min(cache->pages, ee_ceil_div(positions, EE_CACHE_PAGE));
    cache->free_count = cache->pages;
    enum ee_status status = allocate(cache);
    if (status != EE_OK) {
        ee_cache_destroy(cache);
        return status;
    }
    *out = cache;
    return EE_OK;
}

void ee_cache_destroy(struct ee_cache *cache) {
    if (!cache)
        return;
    ee_free(cache->k);
    ee_free(cache->v);
    ee_free(cache->table);
    ee_free(cache->free_pages);
    ee_free(cache->fill);
    ee_free(cache->used);
    ee_free(cache);
}

enum ee_status ee_cache_acquire(struct ee_cache *cache, int32_t *sequence, int64_t positions) {
    int64_t needed = ee_ceil_div(positions, EE_CACHE_PAGE);
    if (needed > cache->pages)
        EE_FAIL(EE_ERR_INVALID,
                "a sequence of up to %lld positions does not fit the cache of %lld; shorten it, or "
                "make the engine with more positions",
                (long long)positions, (long long)(cache->pages * EE_CACHE_PAGE));
    int32_t slot = 0;
    while (slot < cache->max_sequences && cache->used[slot])
        slot++;
    if (slot == cache->max_sequences)
        EE_FAIL(EE_ERR_BUSY,
                "all %d sequences of the engine are in use; finish or remove one, or make the "
                "engine with a larger max_sequences",
                cache->max_sequences);
    if (needed > cache->free_count)
        EE_FAIL(EE_ERR_BUSY,
                "the cache has room for %lld more positions, the sequence may need %lld; finish or "
                "remove another one first",
                (long long)(cache->free_count * EE_CACHE_PAGE), (long long)positions);
    int32_t *table = cache->table + slot * cache->pages_per_sequence;
    for (int64_t i = 0; i < needed; i++)
        table[i] = cache->free_pages[--cache->free_count];
    memset(cache->fill + (int64_t)slot * cache->layers, 0, (size_t)cache->layers * sizeof(int32_t));
    cache->used[slot] = true;
    *sequence = slot;
    return EE_OK;
}

void ee_cache_release(struct ee_cache *cache, int32_t sequence) {
    int32_t *table = cache->table + sequence * cache->pages_per_sequence;
    for (int64_t i = 0; i < cache->pages_per_sequence && table[i] >= 0; i++) {
        cache->free_pages[cache->free_count++] = table[i];
        table[i] = -1;
    }
    cache->used[sequence] = false;
}

struct ee_kv ee_cache_layer(const struct ee_cache *cache, int32_t layer) {
    int64_t size = cache->pages * cache->heads * EE_CACHE_PAGE * cache->width;
    return (struct ee_kv){.k = cache->k + layer * size,
                          .v = cache->v + layer * size,
                          .table = cache->table,
                          .sequences = cache->max_sequences,
                          .pages_per_sequence = cache->pages_per_sequence,
                          .pages = cache->pages,
                          .page = EE_CACHE_PAGE,
                          .heads = cache->heads,
                          .width = cache->width};
}

enum ee_status ee_cache_write(struct ee_ctx *ctx, struct ee_cache *cache, int32_t layer,
                              const struct ee_tensor *k, const struct ee_tensor *v,
                              const int32_t *sequence, const int32_t *position) {
    struct ee_kv kv = ee_cache_layer(cache, layer);
    EE_TRY(ee_kv_write(ctx, &kv, k, v, sequence, position));
    /* Rows may come in any order: raise the level while the next position is among them. Rows of a
     * sequence mostly ascend, so one pass is the rule. */
    int64_t n = k->shape[0];
    for (bool raised = true; raised;) {
        raised = false;
        for (int64_t i = 0; i < n; i++) {
            int32_t *fill = &cache->fill[(int64_t)sequence[i] * cache->layers + layer];
            if (position[i] == *fill) {
                ++*fill;
                raised = true;
            }
        }
    }
    for (int64_t i = 0; i < n; i++) {
        int32_t fill = ee_cache_fill(cache, sequence[i], layer);
        if (position[i] >= fill)
            EE_FAIL(EE_ERR_INTERNAL,
                    "layer %d of sequence %d is filled up to position %d when a row at %d comes",
                    layer, sequence[i], fill, position[i]);
    }
    return EE_OK;
}

void ee_cache_truncate(struct ee_cache *cache, int32_t sequence, int64_t length) {
    int32_t *fill = cache->fill + (int64_t)sequence * cache->layers;
    for (int32_t layer = 0; layer < cache->layers; layer++)
        fill[layer] = (int32_t)ee_min(fill[layer], length);
}

void ee_cache_read(const struct ee_cache *cache, int32_t sequence, int32_t layer, float *k,
                   float *v) {
    struct ee_kv kv = ee_cache_layer(cache, layer);
    int32_t fill = ee_cache_fill(cache, sequence, layer);
    size_t bytes = (size_t)kv.width * sizeof(float);
    for (int64_t p = 0; p < fill; p++) {
        int64_t page = kv.table[sequence * kv.pages_per_sequence + p / kv.page];
        for (int64_t h = 0; h < kv.heads; h++) {
            int64_t from = ((page * kv.heads + h) * kv.page + p % kv.page) * kv.width;
            int64_t to = (p * kv.heads + h) * kv.width;
            memcpy(k + to, kv.k + from, bytes);
            memcpy(v + to, kv.v + from, bytes);
        }
    }
}
