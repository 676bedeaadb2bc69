// Ctrl-C and a scheduler's SIGTERM end a run in order: the update under way is finished, the model saved.
#pragma once
#include <csignal>

// The signal that asked the run to end, 0 while none has. The only state that a handler can reach is static.
inline volatile std::sig_atomic_t& interrupt_signal() {
    static volatile std::sig_atomic_t signal = 0;
    return signal;
}

// From here on, the first SIGINT or SIGTERM sets interrupt_signal(); a second one ends the process at once.
inline void catch_interrupts() {
    struct sigaction action {};
    action.sa_handler = [](int signal) { interrupt_signal() = signal; };
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}
