// How the program stops, and how it warns: one line on standard error that names the rank, what was wanted,
// what was got and what to do. User input and files are checked with these, never with assert.
//
//     fatal("--steps %d: wants at least 1", steps);   prints   rank 0: --steps -3: wants at least 1
#pragma once

#include <errno.h>   // errno, so that a warning leaves it as it was
#include <stdarg.h>  // va_list
#include <stdint.h>  // int64_t
#include <stdio.h>   // vsnprintf, fflush
#include <unistd.h>  // write, _exit

#include <algorithm>  // max
#include <string>

// This process' rank: its identity, set once when the ranks are known, and the only state of its kind.
inline int& process_rank() {
    static int rank = 0;
    return rank;
}

// vprintf into a string.
inline std::string text_of_list(const char* format, va_list args) {
    va_list again;
    va_copy(again, args);
    std::string text(std::max(0, vsnprintf(nullptr, 0, format, again)), '\0');
    va_end(again);
    vsnprintf(text.data(), text.size() + 1, format, args);
    return text;
}

// Writes "rank R: " + prefix + the formatted text + newline to standard error in one write, so that the lines
// of several ranks don't mix. Line breaks inside the text (a file's name may hold one) become spaces.
inline void print_error_line(const char* prefix, const char* format, va_list args) {
    std::string text = text_of_list(format, args);
    for (char& c : text) {
        if (c == '\n' || c == '\r') c = ' ';
    }
    const std::string line = "rank " + std::to_string(process_rank()) + ": " + prefix + text + "\n";
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

// Ends the process with status 1. No destructor and no atexit handler runs: any thread may call this, and a
// destructor that waits for a worker thread, or for the GPU, would hang instead. What stdout holds is written
// before the message.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fatal(const char* format, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, format);
    print_error_line("", format, args);
    va_end(args);
    _exit(1);
}

// The same line with "warning: " before the text, after which the program goes on.
__attribute__((format(printf, 1, 2))) inline void warn(const char* format, ...) {
    const int saved_errno = errno;
    fflush(stdout);
    va_list args;
    va_start(args, format);
    print_error_line("warning: ", format, args);
    va_end(args);
    errno = saved_errno;
}

// a / b rounded up, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b where it has no remainder; else ends the program: "WHAT 10 is not a multiple of OF_WHAT 3".
inline int64_t div_exact(int64_t a, int64_t b, const char* what, const char* of_what) {
    if (b <= 0 || a % b != 0)
        fatal("%s %lld is not a multiple of %s %lld", what, (long long)a, of_what, (long long)b);
    return a / b;
}
