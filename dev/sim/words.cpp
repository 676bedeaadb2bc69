// What is started now and done later: copies (cp.async) and warpgroup products are remembered at their issue
// and done at the wait that covers them, the latest moment that CUDA allows. With a wait too few one reads
// poison.
#include <cstring>
#include "runtime.h"

namespace sim {

void async_issue(void* to, const void* from, Where where) {
    check_shared(to, 16, "cp.async", where);
    if (reinterpret_cast<uintptr_t>(from) % 16)
        fail(where, "cp.async: source %p is not a multiple of 16", from);
#if defined(__SANITIZE_ADDRESS__)  // found here, the line is that of the copy, not of the wait
    if (void* bad = from ? __asan_region_is_poisoned(const_cast<void*>(from), 16) : nullptr)
        fail(where, "cp.async reads %s", describe_address(bad).c_str());
#endif
    Worker& w = *worker;
    w.async_used = true;
    if (race_on) race_async_issue(to, from, where, false);
    poison(to, 16);
    w.async[w.current->thread].copies.push_back({to, from});
}

void async_commit() {
    AsyncCopies& a = worker->async[worker->current->thread];
    worker->async_used = true;
    a.group_ends.push_back(a.copies.size());
}

void async_wait(size_t newest) {
    AsyncCopies& a = worker->async[worker->current->thread];
    while (a.group_ends.size() - a.groups_landed > newest) {
        for (const size_t end = a.group_ends[a.groups_landed++]; a.landed < end; a.landed++) {
            const AsyncCopies::Copy& c = a.copies[a.landed];
            if (race_on) race_async_landed(c.to);
            if (c.from) memcpy(c.to, c.from, 16);
            else memset(c.to, 0, 16);
        }
    }
    if (a.landed == a.copies.size() && a.groups_landed == a.group_ends.size()) a.clear();
}

void product_issue(float (&held)[8][4], const uint32_t* a, const unsigned char* left,
                   const unsigned char* tile, int at, bool transposed, bool add, Where where) {
    constexpr unsigned kGroup = 128;
    constexpr size_t kTileBytes = 64 * 128;
    Worker& w = *worker;
    const unsigned thread = w.current->thread;
    WarpgroupProducts& p = w.products[thread];
    w.async_used = true;
    if (thread / kGroup * kGroup + kGroup > w.threads)
        fail(where, "a warpgroup product needs 128 threads from a multiple of 128 on; the block has %u",
             w.threads);
    if (!p.fenced) fail(where, "a warpgroup product without a wgmma_fence since the last wgmma_wait");
    for (const unsigned char* rows : {left, tile}) {
        if (!rows) continue;
        if ((rows - w.shared) % 1024)
            fail(where, "a warpgroup product's tile must begin at a multiple of 1024 bytes");
        check_shared(rows, 16, "wgmma", where);
        check_shared(rows + kTileBytes - 16, 16, "wgmma", where);
    }
    size_t sum = 0;
    while (sum < p.sums.size() && p.sums[sum].held != held) sum++;
    if (sum == p.sums.size()) {
        p.sums.push_back({held, {}});
        memcpy(p.sums[sum].values, held, sizeof(held));
        poison(held, sizeof(held));
    }
    if (!add) memset(p.sums[sum].values, 0, sizeof(held));
    WarpgroupProducts::Product product{sum, {}, left, tile, at, transposed, where};
    if (a) memcpy(product.a, a, sizeof(product.a));
    p.products.push_back(product);
}

}  // namespace sim
