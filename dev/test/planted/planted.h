// What the programs of planted bugs share. Each is a list of cases; simulator_test.py builds and runs them:
//
//     PROGRAM --list     name, build, environment and the message that must come, a case a line, tabs between
//     PROGRAM NAME       runs one case; a planted bug must end it with status 1 and that message,
//                        a correct one with 0
//
// The message is a regular expression in which @NAME stands for FILE:LINE of the line marked "BUG NAME".
#pragma once
#include <bit>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#include "llmc/launch.cuh"

struct Case {
    const char* name;
    const char* build;        // "normal", "memory" or "race": the one that finds it; correct cases run in all
    const char* environment;  // VARIABLE=value of the run that finds it, or ""
    const char* message;
    void (*run)(Gpu& gpu);
};

// Copies from the device and waits.
template <class T>
std::vector<T> fetch(const T* device, size_t n, Gpu& gpu) {
    std::vector<T> host(n);
    copy_to_host(host.data(), device, n, gpu);
    gpu.synchronize();
    return host;
}

// Ends with the first element that is not as wanted.
template <class T, class Wanted>
void expect(const char* what, const T* got, size_t n, Wanted wanted) {
    for (size_t i = 0; i < n; i++) {
        if (got[i] == static_cast<T>(wanted(i))) continue;
        const bool fresh = std::bit_cast<uint32_t>(got[i]) == sim::kPoison;
        fatal("%s: element %zu is %g, not %g%s", what, i, static_cast<double>(got[i]),
              static_cast<double>(wanted(i)), fresh ? ": memory that nothing has written yet" : "");
    }
}
template <class T, class Wanted>
void expect(const char* what, const std::vector<T>& got, Wanted wanted) {
    expect(what, got.data(), got.size(), wanted);
}

// Argument vector in, exit status out.
inline int run_cases(const std::vector<Case>& cases, int argc, char** argv) {
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const Case& c : cases) printf("%s\t%s\t%s\t%s\n", c.name, c.build, c.environment, c.message);
        return 0;
    }
    for (const Case& c : cases) {
        if (argc != 2 || strcmp(argv[1], c.name) != 0) continue;
        Gpu gpu;
        c.run(gpu);
        return 0;
    }
    fatal("wanted --list or the name of a case");
}
