#define _GNU_SOURCE
#include "base/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Stands in the EE_ALIGNMENT bytes before every block. */
struct header {
    size_t bytes;  /* as asked for */
    size_t mapped; /* length of the mapping, 0 when the block came from aligned_alloc */
};

/* From this size on blocks are mapped: zero pages on demand, given back at once when freed. */
#define MAP_THRESHOLD ((size_t)1 << 20)
/* Of huge pages on x86-64, and on aarch64 with pages of 4 KiB. */
#define HUGE_PAGE ((size_t)2 << 20)

static atomic_uint_fast64_t calls, live_count, live_bytes, fail_at;

static bool must_fail(void) {
    uint_fast64_t n = atomic_load(&fail_at);
    while (n > 0) {
        if (atomic_compare_exchange_weak(&fail_at, &n, n - 1))
            return n == 1;
    }
    return false;
}

/* Maps a block, from the size of a huge page on at a multiple of it: those save most of the
 * page-table walks of large matrix products, and most of the time in which MPI copies a message
 * between processes (70 us for 1 MiB instead of 220). */
static void *map_block(size_t total) {
    size_t extra = total < HUGE_PAGE ? 0 : HUGE_PAGE;
    char *whole =
        mmap(NULL, total + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED)
        return NULL;
    size_t head = extra ? (HUGE_PAGE - (uintptr_t)whole % HUGE_PAGE) % HUGE_PAGE : 0;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), end = (total + page - 1) / page * page;
    if (head > 0)
        munmap(whole, head);
    if (extra > head)
        munmap(whole + head + end, extra - head);
    /* It is only advice, so its failure does not matter. */
    madvise(whole + head, total, MADV_HUGEPAGE);
    return whole + head;
}

enum ee_status ee_alloc(void **out, size_t bytes, const char *what) {
    *out = NULL;
    size_t total;
    if (!ee_add_size(bytes, (size_t)2 * EE_ALIGNMENT, &total) || total > PTRDIFF_MAX)
        EE_FAIL(EE_ERR_NOMEM, "%s needs %zu bytes, more than can be addressed", what, bytes);
    total = ee_align_up(total);
    bool mapped = total >= MAP_THRESHOLD;
    char *block = NULL;
    if (!must_fail())
        block = mapped ? map_block(total) : aligned_alloc(EE_ALIGNMENT, total);
    if (!block)
        EE_FAIL(EE_ERR_NOMEM,
                "no memory for %s (%zu bytes); use a smaller batch, sequence length or model", what,
                bytes);
    if (!mapped)
        memset(block, 0, total);
    *(struct header *)(void *)block = (struct header){bytes, mapped ? total : 0};
    atomic_fetch_add(&calls, 1);
    atomic_fetch_add(&live_count, 1);
    atomic_fetch_add(&live_bytes, bytes);
    *out = block + EE_ALIGNMENT;
    return EE_OK;
}

void ee_free(void *pointer) {
    if (!pointer)
        return;
    void *block = (char *)pointer - EE_ALIGNMENT;
    struct header header = *(struct header *)block;
    atomic_fetch_sub(&live_count, 1);
    atomic_fetch_sub(&live_bytes, header.bytes);
    if (header.mapped)
        munmap(block, header.mapped);
    else
        free(block);
}

struct ee_alloc_stats ee_alloc_stats(void) {
    return (struct ee_alloc_stats){atomic_load(&calls), atomic_load(&live_count),
                                   atomic_load(&live_bytes)};
}

void ee_alloc_fail_at(uint64_t n) {
    atomic_store(&fail_at, n);
}
