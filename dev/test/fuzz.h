// What the fuzzers share: a mutation loop over good inputs, and a watch over memory and time.
//
//   build/host/test/fuzz_safetensors [--inputs 100000] [--seed 1] [--first 0]
//
// Input i is a function of (seed, i): a failure prints both, and `--seed S --first I --inputs 1` repeats it.
// A crash, an input that takes longer than 20 s or more memory than allowed_bytes() ends the program with a
// status other than 0. Run under ASan and UBSan too (make CHECK=memory).
//
// Included once a program: it replaces operator new.
#pragma once

#include <malloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <string_view>
#include <vector>

// State of the program that operator new and the signal handler must reach.
struct FuzzWatch {
    unsigned long long seed = 1, input = 0;
    size_t live_bytes = 0, peak_bytes = 0;  // of operator new
};

inline FuzzWatch& fuzz_watch() {
    static FuzzWatch watch;
    return watch;
}

// Not inlined, any of them: the compiler would see free() on what its own operator new returned, and warn.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    void* p = std::malloc(std::max<size_t>(bytes, 1));
    if (!p) return p;
    FuzzWatch& watch = fuzz_watch();
    watch.live_bytes += malloc_usable_size(p);
    watch.peak_bytes = std::max(watch.peak_bytes, watch.live_bytes);
    return p;
}

[[gnu::noinline]] void* operator new(size_t bytes) {
    if (void* p = operator new(bytes, std::nothrow)) return p;
    throw std::bad_alloc();
}

[[gnu::noinline]] void operator delete(void* p) noexcept {
    if (p) fuzz_watch().live_bytes -= malloc_usable_size(p);
    std::free(p);
}

[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { operator delete(p); }

// A sanitizer that finds something ends with a signal, so that the input is named.
extern "C" inline const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" inline const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

// A file in memory, with a path that it can be opened by: 10^5 files on a disk would take minutes.
class MemoryFile {
  public:
    MemoryFile() : fd_(memfd_create("fuzz", 0)), path_("/proc/self/fd/" + std::to_string(fd_)) {
        if (fd_ < 0) throw std::bad_alloc();
    }
    MemoryFile(const MemoryFile&) = delete;
    ~MemoryFile() { close(fd_); }

    const std::string& path() const { return path_; }

    void fill(const std::string& bytes) {
        if (ftruncate(fd_, 0) != 0 ||
            pwrite(fd_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()))
            throw std::bad_alloc();
    }

  private:
    int fd_;
    std::string path_;
};

// SplitMix64 (Steele, Lea, Flood 2014): small, and seeded at no cost.
class FuzzRandom {
  public:
    FuzzRandom(uint64_t seed, uint64_t input) : state_(seed * 0x9e3779b97f4a7c15u + input) {
        state_ = next();
    }
    uint64_t next() {
        uint64_t x = state_ += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }
    size_t below(size_t n) { return n == 0 ? 0 : static_cast<size_t>(next() % n); }

  private:
    uint64_t state_;
};

// Numbers at which sizes and offsets break.
constexpr uint64_t kEdges[] = {0,
                               1,
                               2,
                               3,
                               4,
                               7,
                               8,
                               9,
                               127,
                               128,
                               255,
                               256,
                               1000,
                               32767,
                               32768,
                               65535,
                               65536,
                               50256,
                               50257,
                               0x7fffffff,
                               0x80000000,
                               0xffffffff,
                               0x100000000,
                               0x3fffffffffffffff,
                               0x4000000000000000,
                               0x7fffffffffffffff,
                               0x8000000000000000,
                               0xfffffffffffffff0,
                               0xffffffffffffffff};
constexpr size_t kLongestInput = 1 << 16;

// Replaces a decimal number of the text by an edge, or by one close to itself.
inline void mutate_number(std::string& text, FuzzRandom& random) {
    const size_t from = text.find_first_of("0123456789", random.below(text.size() + 1));
    if (from == text.npos) return;
    const size_t to = std::min(text.find_first_not_of("0123456789", from), text.size());
    const uint64_t old = std::strtoull(text.substr(from, to - from).c_str(), nullptr, 10);
    const bool edge = random.below(2);
    const uint64_t number = edge ? kEdges[random.below(std::size(kEdges))] : old + random.below(17) - 8;
    text.replace(from, to - from, (random.below(16) == 0 ? "-" : "") + std::to_string(number));
}

// One change of one kind.
inline void mutate_once(std::string& text, FuzzRandom& random, const std::vector<std::string>& good,
                        const std::vector<std::string>& words) {
    const size_t at = random.below(text.size() + 1),
                 length = random.below(std::min<size_t>(text.size() - at, 64) + 1);
    const size_t to = random.below(text.size() + 1);
    const uint64_t edge = kEdges[random.below(std::size(kEdges))];
    const size_t width = size_t{1} << random.below(4);  // of a binary number
    const std::string& other = good[random.below(good.size())];
    switch (random.below(12)) {
        case 0:
            if (at < text.size()) text[at] = static_cast<char>(text[at] ^ 1 << random.below(8));
            break;
        case 1:
            if (at < text.size()) text[at] = static_cast<char>(random.next());
            break;
        case 2: text.insert(at, 1 + random.below(8), static_cast<char>(random.next())); break;
        case 3: text.erase(at, length); break;
        case 4: text.insert(to, text.substr(at, length)); break;
        case 5: text.insert(at, words[random.below(words.size())]); break;
        case 6: text.replace(at, length, words[random.below(words.size())]); break;
        case 7:
        case 8: mutate_number(text, random); break;
        case 9: text.resize(at); break;
        case 10:
            if (at + width <= text.size()) std::memcpy(text.data() + at, &edge, width);
            break;
        case 11: text.replace(at, length, other, random.below(other.size() + 1), random.below(256)); break;
    }
    if (text.size() > kLongestInput) text.resize(kLongestInput);
}

// A good input with 1 to 16 changes; one in 64 has none.
inline std::string mutate(FuzzRandom& random, const std::vector<std::string>& good,
                          const std::vector<std::string>& words) {
    std::string text = good[random.below(good.size())];
    if (random.below(64) == 0) return text;
    for (size_t changes = size_t{1} << random.below(5); changes > 0; changes--)
        mutate_once(text, random, good, words);
    return text;
}

[[noreturn]] inline void fuzz_failed(const char* why) {
    const FuzzWatch& watch = fuzz_watch();
    std::printf("%s: repeat with --seed %llu --first %llu --inputs 1\n", why, watch.seed, watch.input);
    std::fflush(stdout);
    std::_Exit(1);
}

// A parser may take this much for an input: hundreds of bytes for each of its own (a value of JSON takes over
// a hundred, and a growing list is there twice), and little beside them. A size that lies asks for far more.
inline size_t allowed_bytes(size_t input_bytes) { return (size_t{1} << 20) + 512 * input_bytes; }

// Runs `test` on the inputs that the command line asks for. test: takes an input, checks all that can be
// checked, returns whether the parser took it. Returns the program's status; a loop that took, or refused,
// every input tests nothing.
inline int fuzz(int argc, char** argv, const std::function<std::string(FuzzRandom&)>& input_of,
                const std::function<bool(const std::string&)>& test) {
    unsigned long long inputs = 100000, first = 0, taken = 0;
    FuzzWatch& watch = fuzz_watch();
    for (int i = 1; i < argc; i += 2) {
        const std::string_view flag = argv[i];
        auto* value = flag == "--inputs"  ? &inputs
                      : flag == "--seed"  ? &watch.seed
                      : flag == "--first" ? &first
                                          : nullptr;
        if (!value || i + 1 == argc || std::sscanf(argv[i + 1], "%llu", value) != 1) {
            std::fprintf(stderr, "usage: %s [--inputs N] [--seed S] [--first I]\n", argv[0]);
            return 2;
        }
    }
    for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM})
        signal(number, [](int caught) { fuzz_failed(caught == SIGALRM ? "hang" : "crash"); });
    size_t largest = 0;
    for (watch.input = first; watch.input < first + inputs; watch.input++) {
        FuzzRandom random(watch.seed, watch.input);
        const std::string input = input_of(random);
        const size_t before = watch.peak_bytes = watch.live_bytes;
        alarm(20);
        taken += test(input);
        alarm(0);
        if (watch.peak_bytes - before > allowed_bytes(input.size())) fuzz_failed("too much memory");
        largest = std::max(largest, watch.peak_bytes - before);
    }
    std::printf("%s: %llu inputs of seed %llu: %llu taken, %llu refused, at most %zu bytes allocated\n",
                argv[0], inputs, watch.seed, taken, inputs - taken, largest);
    std::printf("1 passed, 0 failed\n");  // what does not pass has ended the program
    return inputs > 1000 && (taken == 0 || taken == inputs);
}

#define FUZZ_CHECK(condition) \
    if (!(condition)) fuzz_failed("not true: " #condition)
