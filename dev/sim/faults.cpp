// What no rule of the simulator catches itself: a wild pointer, a stack that is too deep, an endless loop, a
// finding of AddressSanitizer or UBSan. Each is given the kernel, the block and the thread it happened in.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
#include "runtime.h"

namespace sim {
namespace {

struct Watched {
    Worker* worker;
    uint64_t progress = 0;
    double idle_s = 0;
};

struct Watch {
    std::mutex mutex;
    std::vector<Watched> workers;
};

Watch& watch_list() {
    static Watch* instance = new Watch;
    return *instance;
}

// An endless loop never meets anybody: an OS thread of our own looks on, until the process ends.
void watch_progress() {
    constexpr double kPeriod_s = 0.5;
    for (;;) {
        usleep(static_cast<useconds_t>(kPeriod_s * 1e6));
        std::lock_guard lock(watch_list().mutex);
        for (Watched& one : watch_list().workers) {
            const uint64_t progress = __atomic_load_n(&one.worker->progress, __ATOMIC_RELAXED);
            const bool running = __atomic_load_n(&one.worker->launch, __ATOMIC_RELAXED) != nullptr;
            one.idle_s = running && progress == one.progress ? one.idle_s + kPeriod_s : 0;
            one.progress = progress;
            if (one.idle_s > settings().timeout_s)
                stop(
                    "%s: for %.0f s no thread of this block has reached a barrier or returned: an endless "
                    "loop? (SIM_TIMEOUT_S)",
                    thread_of(*one.worker).c_str(), one.idle_s);
        }
    }
}

#if defined(__SANITIZE_ADDRESS__)
// After a sanitizer's own report, before the process ends.
void name_thread() {
    const std::string who = running_thread();
    if (who.empty() && !__asan_report_present()) return;
    const std::string what =
        __asan_report_present() ? describe_address(__asan_get_report_address()) : "see above";
    dprintf(STDERR_FILENO, "simulator: %s: %s\n", who.empty() ? "host code" : who.c_str(), what.c_str());
}
#else
// On its own stack, for the fiber's may be what overflowed. It takes locks and memory, which a signal handler
// should not; the process ends here in any case, by the alarm at the latest.
void name_fault(int signal, siginfo_t* info, void*) {
    struct sigaction otherwise {};
    otherwise.sa_handler = SIG_DFL;
    sigaction(signal, &otherwise, nullptr);
    sigaction(SIGALRM, &otherwise, nullptr);
    alarm(10);
    const std::string who = running_thread();
    const char* kind = signal == SIGFPE   ? "division by zero"
                       : signal == SIGILL ? "illegal instruction"
                                          : "bad access";
    const std::string where = describe_address(info->si_addr);
    if (worker && worker->launch) {
        const Fiber& f = *worker->current;
        const auto* p = static_cast<const unsigned char*>(info->si_addr);
        if (p < f.stack && p >= f.stack - 4096)
            stop("%s: stack overflow: local variables and calls need more than %zu bytes", who.c_str(),
                 f.stack_bytes);
        // A misaligned vector access faults without an address.
        stop("%s: %s to %s, address %p (CHECK=memory finds the line)", who.c_str(), kind, where.c_str(),
             info->si_addr);
    }
    if (where.find("allocated") != std::string::npos) stop("host code: %s to %s", kind, where.c_str());
    raise(signal);
}
#endif

}  // namespace

void watch(Worker& w) {
    static std::once_flag once;
    std::call_once(once, [] {
        std::thread(watch_progress).detach();
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_set_death_callback(name_thread);
        // UBSan's library has a list of its own.
        using SetCallback = void (*)(void (*)());
        if (void* library = dlopen("libubsan.so.1", RTLD_LAZY | RTLD_NOLOAD))
            if (auto set = reinterpret_cast<SetCallback>(dlsym(library, "__sanitizer_set_death_callback")))
                set(name_thread);
#else
        struct sigaction action {};
        action.sa_sigaction = name_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, nullptr);
#endif
    });
#if !defined(__SANITIZE_ADDRESS__)
    constexpr size_t kSignalStackBytes = 256 * 1024;
    stack_t stack{};
    stack.ss_sp = malloc(kSignalStackBytes);
    stack.ss_size = kSignalStackBytes;
    sigaltstack(&stack, nullptr);
#endif
    std::lock_guard lock(watch_list().mutex);
    watch_list().workers.push_back({&w});
}

}  // namespace sim
