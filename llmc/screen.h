// What a person sees of a run: a line a step, and on a terminal a progress bar below it, within 80 columns.
//
//     240/20000 loss 3.2911 norm 0.842 lr 6.00e-04 1234 ms 425k tok/s 6h46m left
//     [=====>                                                         ]   1.2%
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>  // getenv
#include <string.h>
#include <unistd.h>  // isatty

#include <algorithm>
#include <chrono>
#include <string>

#include "llmc/file.h"    // text_of
#include "llmc/logger.h"  // StepReport

constexpr size_t kScreenColumns = 79;  // one less than 80: some terminals wrap a line that fills them

// A number of three digits and a unit: 425k, 1.23M, 12.3G; "999", "0.1" below a thousand.
inline std::string short_count(double x) {
    if (!(x >= 999.5)) return text_of("%.3g", x);
    const char* units = "kMGTP";
    x /= 1000;
    while (x >= 999.5 && units[1]) {
        x /= 1000;
        units++;
    }
    return text_of(x < 9.995 ? "%.2f%c" : x < 99.95 ? "%.1f%c" : "%.0f%c", x, *units);
}

// A duration in at most 6 letters, up to the 30 years that are shown: 8s, 12m34s, 6h46m, 12d03h, 480d.
inline std::string short_duration(double seconds) {
    if (!(seconds >= 0 && seconds < 1e9)) return "?";  // beyond 30 years nobody reads it; a NaN neither
    const long s = lround(seconds);
    if (s < 60) return text_of("%lds", s);
    if (s < 3600) return text_of("%ldm%02lds", s / 60, s % 60);
    if (s < 86400) return text_of("%ldh%02ldm", s / 3600, s / 60 % 60);
    return s < 8640000 ? text_of("%ldd%02ldh", s / 86400, s / 3600 % 24) : text_of("%ldd", s / 86400);
}

// The line of one step. seconds_left < 0: not known. Where the line would not fit, it loses "/steps" first.
inline std::string step_line(const StepReport& r, int64_t steps, double seconds_left) {
    const std::string of_steps = "/" + std::to_string(steps);
    const std::string loss = fabsf(r.loss) < 1000 ? text_of("%.4f", r.loss) : text_of("%.2e", r.loss);
    const std::string time = r.step_ms < 99.95     ? text_of("%.1f ms", r.step_ms)
                             : r.step_ms < 99999.5 ? text_of("%.0f ms", r.step_ms)
                                                   : short_duration(r.step_ms / 1e3);
    const std::string step = text_of("%*lld", static_cast<int>(of_steps.size()) - 1, (long long)r.step);
    const std::string rest =
        text_of(" loss %s norm %.3g lr %.2e %s %s tok/s %s left", loss.c_str(), r.grad_norm, r.learning_rate,
                time.c_str(), short_count(r.tokens_per_second).c_str(), short_duration(seconds_left).c_str());
    const std::string line = step + of_steps + rest;
    return (line.size() <= kScreenColumns ? line : step + rest).substr(0, kScreenColumns);
}

// "[===>    ]  42.0%", kScreenColumns wide.
inline std::string progress_bar(int64_t step, int64_t steps) {
    const double done = steps > 0 ? std::clamp(static_cast<double>(step) / steps, 0.0, 1.0) : 1.0;
    const int width = static_cast<int>(kScreenColumns) - 9;  // brackets, a space, "100.0%"
    const int filled = static_cast<int>(done * width);
    std::string bar(width, ' ');
    std::fill(bar.begin(), bar.begin() + filled, '=');
    if (filled < width) bar[filled] = '>';
    return text_of("[%s] %5.1f%%", bar.c_str(), 100 * done);
}

// Standard output of a run of `steps` updates. On a terminal the bar is drawn below the last line; the cursor
// waits at its beginning, so that whatever is printed next, an error from fatal() too, starts at the left and
// not behind it.
class Screen {
  public:
    explicit Screen(int64_t steps, bool terminal = is_terminal()) : steps_(steps), terminal_(terminal) {}
    Screen(const Screen&) = delete;
    Screen& operator=(const Screen&) = delete;
    ~Screen() {
        if (bar_drawn_) print("");
    }

    // Prints the line of a step and moves the bar. The time left is taken from the clock since the first
    // step, so it counts validation and samples in, and tuning out.
    void step(const StepReport& r) {
        const auto now = std::chrono::steady_clock::now();
        if (first_step_ == 0) {
            first_step_ = r.step;
            first_time_ = now;
        }
        const std::chrono::duration<double> elapsed = now - first_time_;
        const bool first = r.step == first_step_;
        const double step_s =
            first ? r.step_ms / 1e3 : elapsed.count() / static_cast<double>(r.step - first_step_);
        last_step_ = r.step;
        print(step_line(r, steps_, step_s * static_cast<double>(steps_ - r.step)) + "\n");
    }

    // Prints a line of its own, above the bar.
    [[gnu::format(printf, 2, 3)]] void message(const char* format, ...) {
        va_list args;
        va_start(args, format);
        const std::string text = text_of_list(format, args);
        va_end(args);
        print(text + "\n");
    }

    // Whether standard output is a terminal that can clear a line.
    static bool is_terminal() {
        const char* term = getenv("TERM");
        return isatty(STDOUT_FILENO) && term && strcmp(term, "dumb") != 0;
    }

  private:
    static constexpr const char* kClearLine = "\r\x1b[K";

    void print(const std::string& text) {
        std::string out = bar_drawn_ ? kClearLine + text : text;
        bar_drawn_ = terminal_ && last_step_ > 0 && last_step_ < steps_ && !text.empty();
        if (bar_drawn_) out += progress_bar(last_step_, steps_) + "\r";
        fwrite(out.data(), 1, out.size(), stdout);
        fflush(stdout);
    }

    int64_t steps_;
    bool terminal_;
    bool bar_drawn_ = false;
    int64_t first_step_ = 0, last_step_ = 0;
    std::chrono::steady_clock::time_point first_time_;
};
