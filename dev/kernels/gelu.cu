// Test of llmc/gelu.cuh against the formulas in double precision; --bench times it.
#include "llmc/gelu.cuh"
#include "dev/kernels/harness.h"

namespace {

// What backward needs of x, in double: value, derivative and the parts that bound the error of floats.
struct Gelu {
    double two_u, s, slope;  // slope = x s (1 - s) d(2u)/dx, so that gelu' = s + slope
    explicit Gelu(double x) {
        const double k = 2 * std::sqrt(2 / M_PI);
        two_u = k * (x + 0.044715 * x * x * x);
        s = two_u >= 0 ? 1 / (1 + std::exp(-two_u)) : std::exp(two_u) / (1 + std::exp(two_u));
        slope = x * s * (1 - s) * k * (1 + 3 * 0.044715 * x * x);
    }
    // Relative error of s as computed. 2u takes 5 roundings, its factor log2(e) two (the constant, the
    // product): 7 u |2u| in the exponent, and exp(y (1 + d)) errs by |y d|. ex2.approx adds 2^-22 = 4 u; 1
    // + e, the division and e * r a rounding each.
    double error_of_s() const { return kU32 * (7 * std::fabs(two_u) + 8); }
};

// Below this, floats are subnormal, which ex2.approx flushes to zero: at most |x| 2^-126, and gelu'(x) takes
// 2 x^2 of it.
constexpr double kFlushed = 0x1p-126;
// Half of the smallest subnormal of floatX (bf16's is 2^-133, float's 2^-149): the rounding of subnormal
// results.
constexpr double kHalfSubnormal = sizeof(floatX) == 2 ? 0x1p-134 : 0x1p-150;

struct Case {
    std::vector<floatX> x, dy;
    std::vector<double> y, y_bound, dx, dx_bound;
};

Case make_case(std::vector<floatX> x, std::vector<floatX> dy) {
    Case c{.x = std::move(x), .dy = std::move(dy), .y = {}, .y_bound = {}, .dx = {}, .dx_bound = {}};
    for (size_t i = 0; i < c.x.size(); i++) {
        const double x = static_cast<float>(c.x[i]), dy = static_cast<float>(c.dy[i]);
        const Gelu g(x);
        const double y = x * g.s, dx = dy * (g.s + g.slope);
        c.y.push_back(y);
        c.y_bound.push_back(std::fabs(y) * (kUX + 2 * kU32 + 2 * g.error_of_s()) + std::fabs(x) * kFlushed);
        // slope is a product of s, 1 - s and a polynomial of 4 roundings; then a sum, the product with dy,
        // and floatX's rounding
        const double parts =
            g.s * (g.error_of_s() + 2 * kU32) + std::fabs(g.slope) * (2 * g.error_of_s() + 8 * kU32);
        c.dx.push_back(dx);
        c.dx_bound.push_back(std::fabs(dy) * 2 * parts + std::fabs(dx) * kUX +
                             (1 + x * x) * (1 + std::fabs(dy)) * 2 * kFlushed);
    }
    return c;
}

constexpr size_t kGuard = 64;  // elements after the last that must stay as they were

void test(Harness& h, const std::string& name, const Case& c) {
    const size_t n = c.x.size();
    auto x = h.to_device(c.x), dy = h.to_device(c.dy);
    const auto poison = h.to_host(h.poisoned<floatX>(kGuard).get(), kGuard);
    auto run = [&](bool forward) {
        auto out = h.poisoned<floatX>(n + kGuard);
        forward ? gelu_forward(out, x, n, h.gpu) : gelu_backward(out, dy, x, n, h.gpu);
        return h.to_host(out.get(), n + kGuard);
    };
    for (bool forward : {true, false}) {
        const std::string what = std::string(forward ? "forward " : "backward ") + name;
        auto out = run(forward);
        h.same_bits(what + ": again the same bits", out, run(forward));
        h.same_bits(what + ": nothing written beyond the end", {out.begin() + n, out.end()}, poison);
        out.resize(n);
        h.compare(what, out, forward ? c.y : c.dx, {.absolute = kHalfSubnormal},
                  forward ? c.y_bound : c.dx_bound);

        auto in_place = h.to_device(forward ? c.x : c.dy);
        forward ? gelu_forward(in_place, in_place, n, h.gpu) : gelu_backward(in_place, in_place, x, n, h.gpu);
        h.same_bits(what + ": in place", h.to_host(in_place.get(), n), out);
    }
}

void test_random(Harness& h, size_t n, double deviation) {
    test(h, std::to_string(n) + " of deviation " + std::to_string(static_cast<int>(deviation)),
         make_case(h.random<floatX>(n, deviation), h.random<floatX>(n)));
}

// Zeros, the smallest numbers, the range where e underflows, and values whose cube overflows in float.
void test_extremes(Harness& h) {
    std::vector<floatX> x;
    for (double v :
         {0.0, 1e-38, 1e-30, 1e-4, 0.5, 3.0, 5.5, 8.0, 9.5, 10.0, 10.5, 11.0, 12.0, 30.0, 1e3, 1e10, 1e14})
        for (double sign : {1.0, -1.0}) x.push_back(static_cast<floatX>(static_cast<float>(sign * v)));
    while (x.size() % x128::size != 0) x.push_back(static_cast<floatX>(-30.0f));
    // gelu'(1e14): slope is 0 times (1e14)^2, which float holds.
    test(h, "extremes", make_case(x, std::vector<floatX>(x.size(), static_cast<floatX>(1.0f))));

    std::vector<floatX> nan(x128::size, static_cast<floatX>(NAN));
    auto device = h.to_device(nan);
    gelu_forward(device, device, nan.size(), h.gpu);
    bool all = true;
    for (floatX v : h.to_host(device.get(), nan.size())) all &= std::isnan(static_cast<float>(v));
    h.check("NaN stays NaN", all);
}

// More than 2^31 elements, only where there is memory for them: zeros, but for the last ones.
void test_beyond_2_31(Harness& h) {
    const size_t n = (size_t{1} << 31) + 4096, tail = 1024;
    if (h.gpu.properties.totalGlobalMem < size_t{32} << 30) return;
    const Case c = make_case(h.random<floatX>(tail), h.random<floatX>(tail));
    DeviceBuffer<floatX> x(n);
    fill_zero(x.get(), n, h.gpu);
    copy_to_device(x.get() + n - tail, c.x.data(), tail, h.gpu);
    gelu_forward(x, x, n, h.gpu);
    h.compare("forward, the last of 2^31 + 4096", h.to_host(x.get() + n - tail, tail), c.y,
              {.absolute = kHalfSubnormal}, c.y_bound);
}

void bench(Harness& h, const std::string& model, size_t n) {
    auto x = h.to_device(h.random<floatX>(n)), dy = h.to_device(h.random<floatX>(n));
    DeviceBuffer<floatX> out(n);
    const double bytes = static_cast<double>(n * sizeof(floatX));
    h.report("gelu_forward " + model, h.median_us([&] { gelu_forward(out, x, n, h.gpu); }), 2 * bytes);
    h.report("gelu_backward " + model, h.median_us([&] { gelu_backward(out, dy, x, n, h.gpu); }), 3 * bytes);
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("gelu", argc, argv);
    if (h.bench) {
        bench(h, "124M, 64 x 1024 x 3072", size_t{64} * 1024 * 3072);
        bench(h, "1558M, 32 x 1024 x 6400", size_t{32} * 1024 * 6400);
    } else {
        for (size_t n :
             {size_t{x128::size}, size_t{63 * 4 * 64}, size_t{65 * 4 * 192}, size_t{200 * 4 * 768}})
            test_random(h, n, 1);
        test_random(h, 4 * 1600, 5);
        test_extremes(h);
        if (!h.small) test_beyond_2_31(h);
    }
    return h.finish();
}
