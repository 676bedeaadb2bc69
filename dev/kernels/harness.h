// What every test of a kernel shares: random inputs, a row a comparison, timing by events. Each dev/kernels/OP.cu is a
// program: without arguments it tests and exits 1 if anything failed; with --bench it times, on a GPU; with --small it
// tests less, for compute-sanitizer, under which a kernel takes up to a hundred times as long.
//
//     int main(int argc, char** argv) {
//         Harness h("gelu", argc, argv);
//         if (!h.bench) { test_forward(h, 200 * 768); ... }
//         else { bench_forward(h, ...); }
//         return h.finish();   // prints "N passed, N failed"
//     }
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>
#include "llmc/gpu.cuh"
#include "llmc/launch.cuh"

// Unit roundoff u of a type: |round(x) - x| <= u |x| for normal x.
template <class T>
constexpr double unit_roundoff() {
    return sizeof(T) == 2 ? 0x1p-8 : sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
}
inline constexpr double kU32 = unit_roundoff<float>();
inline constexpr double kUX = unit_roundoff<floatX>();  // of floatX

// The bound on |error| of element i of a comparison.
struct Tolerance {
    double absolute = 0, relative = 0;
};

class Harness {
  public:
    bool bench = false;
    bool small = false;  // leave out more than 300 rows of anything, and what needs gigabytes
    Gpu gpu;

    Harness(const char* op, int argc, char** argv) : op_(op) {
        // Line by line into a file too: a kernel that hangs must leave the rows before it.
        std::setvbuf(stdout, nullptr, _IOLBF, 0);
        for (int i = 1; i < argc; i++)
            if (std::strcmp(argv[i], "--bench") == 0) bench = true;
            else if (std::strcmp(argv[i], "--small") == 0) small = true;
            else fatal("%s: unknown argument %s; wanted nothing, --bench or --small", op, argv[i]);
        std::printf("%s, %s, %s\n", op, kPrecisionName, gpu.properties.name);
    }
    Harness(const Harness&) = delete;

    // Normal numbers with the given deviation, rounded to T, from a generator of the harness (same every run).
    template <class T>
    std::vector<T> random(size_t n, double deviation = 1.0, double mean = 0.0) {
        std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(deviation));
        std::vector<T> x(n);
        for (T& v : x) v = static_cast<T>(normal(generator_));
        return x;
    }
    std::vector<int> random_ints(size_t n, int below) {
        std::uniform_int_distribution<int> uniform(0, below - 1);
        std::vector<int> x(n);
        for (int& v : x) v = uniform(generator_);
        return x;
    }

    template <class T>
    DeviceBuffer<T> to_device(const std::vector<T>& host) {
        DeviceBuffer<T> device(host.size());
        if (!host.empty()) copy_to_device(device.get(), host.data(), host.size(), gpu);
        gpu.synchronize();
        return device;
    }
    // Fresh device memory full of NaN bits, so that an element that a kernel forgets to write is seen.
    template <class T>
    DeviceBuffer<T> poisoned(size_t n) {
        DeviceBuffer<T> device(n);
        if (n) CUDA_CHECK(cudaMemsetAsync(device.get(), 0xff, n * sizeof(T), gpu.stream));
        return device;
    }
    template <class T>
    std::vector<T> to_host(const T* device, size_t n) {
        std::vector<T> host(n);
        if (n) copy_to_host(host.data(), device, n, gpu);
        gpu.synchronize();
        return host;
    }

    // got[i] against want[i], in double: |got - want| <= absolute + relative |want| (+ extra[i] where given) for every i; a NaN
    // fails unless wanted. Prints one row and counts it.
    template <class T>
    bool compare(const std::string& what, const std::vector<T>& got, const std::vector<double>& want,
                 Tolerance allowed, const std::vector<double>& extra = {}) {
        if (got.size() != want.size()) return check(what + ": sizes differ", false);
        double worst = 0, worst_error = 0, worst_allowed = 0, sum_error = 0, sum_want = 0;
        size_t at = 0;
        for (size_t i = 0; i < want.size(); i++) {
            const double x = static_cast<double>(static_cast<float>(got[i])), y = want[i];
            if (std::isnan(x) && std::isnan(y)) continue;
            if (x == y) {
                sum_want += y * y;
                continue;
            }
            const double bound =
                allowed.absolute + allowed.relative * std::fabs(y) + (extra.empty() ? 0 : extra[i]);
            double ratio = std::fabs(x - y) / bound;
            if (!(ratio >= 0)) ratio = std::numeric_limits<double>::infinity();
            sum_error += (x - y) * (x - y), sum_want += y * y;
            if (ratio > worst) worst = ratio, at = i, worst_error = std::fabs(x - y), worst_allowed = bound;
        }
        const bool ok = worst <= 1;
        std::printf("%-4s %-58s n %-9zu worst %.2e of %.2e at %zu, rel. norm %.1e\n", ok ? "ok" : "FAIL",
                    what.c_str(), want.size(), worst_error, worst_allowed, at,
                    sum_want > 0 ? std::sqrt(sum_error / sum_want) : 0.0);
        if (!ok)
            std::printf("     got %.9g, wanted %.9g\n", static_cast<double>(static_cast<float>(got[at])),
                        want[at]);
        count(ok);
        return ok;
    }

    // The same bits.
    template <class T>
    bool same_bits(const std::string& what, const std::vector<T>& a, const std::vector<T>& b) {
        return check(what,
                     a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
    }

    bool check(const std::string& what, bool ok) {
        std::printf("%-4s %s\n", ok ? "ok" : "FAIL", what.c_str());
        count(ok);
        return ok;
    }

    // Median time of f() in microseconds by events, after warm-up. With `flush`, L2 is overwritten before each run.
    template <class F>
    double median_us(F f, int runs = 30, bool flush = true) {
        if (flush && flush_.size() == 0) flush_ = DeviceBuffer<unsigned char>(size_t{256} << 20);
        cudaEvent_t begin, end;
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
        std::vector<double> us;
        for (int i = 0; i < runs + 3; i++) {
            if (flush) CUDA_CHECK(cudaMemsetAsync(flush_.get(), i, flush_.size(), gpu.stream));
            CUDA_CHECK(cudaEventRecord(begin, gpu.stream));
            f();
            CUDA_CHECK(cudaEventRecord(end, gpu.stream));
            CUDA_CHECK(cudaEventSynchronize(end));
            float ms = 0;
            CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (i >= 3) us.push_back(ms * 1e3);
        }
        CUDA_CHECK(cudaEventDestroy(begin));
        CUDA_CHECK(cudaEventDestroy(end));
        std::nth_element(us.begin(), us.begin() + us.size() / 2, us.end());
        return us[us.size() / 2];
    }

    // Bytes per second of a large device-to-device copy, read plus written: the ceiling of every elementwise kernel.
    double copy_bandwidth() {
        if (copy_bandwidth_ > 0) return copy_bandwidth_;
        const size_t bytes = size_t{1} << 30;
        DeviceBuffer<unsigned char> a(bytes), b(bytes);
        const double us = median_us(
            [&] {
                CUDA_CHECK(cudaMemcpyAsync(a.get(), b.get(), bytes, cudaMemcpyDeviceToDevice, gpu.stream));
            },
            20, false);
        return copy_bandwidth_ = 2.0 * static_cast<double>(bytes) / (us * 1e-6);
    }

    // A row of a bench: time, rates, share of the copy bandwidth. bytes are the fewest that must move.
    void report(const std::string& what, double us, double bytes, double flop = 0) {
        std::printf("%-52s %10.1f us %8.0f GB/s %5.1f%% of copy", what.c_str(), us, bytes / us * 1e-3,
                    100 * bytes / (us * 1e-6) / copy_bandwidth());
        if (flop > 0) std::printf(" %8.1f TFLOP/s", flop / us * 1e-6);
        std::printf("\n");
        std::fflush(stdout);
    }

    int finish() {
        if (!bench) std::printf("%s %s: %d passed, %d failed\n", op_, kPrecisionName, passed_, failed_);
        return failed_ == 0 && (bench || passed_ > 0) ? 0 : 1;
    }

  private:
    void count(bool ok) { (ok ? passed_ : failed_)++; }
    const char* op_;
    std::mt19937 generator_{1234};
    int passed_ = 0, failed_ = 0;
    double copy_bandwidth_ = 0;
    DeviceBuffer<unsigned char> flush_;
};
