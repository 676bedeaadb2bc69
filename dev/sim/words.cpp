// cp.async: copies are remembered at their issue and made at the wait that covers them, the latest moment that CUDA
// allows; a kernel with a wait too few reads poison.
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
    if (race_on) race_async_issue(to, from, where);
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
            if (c.from)
                memcpy(c.to, c.from, 16);
            else
                memset(c.to, 0, 16);
        }
    }
    if (a.landed == a.copies.size() && a.groups_landed == a.group_ends.size()) a.clear();
}

}  // namespace sim
