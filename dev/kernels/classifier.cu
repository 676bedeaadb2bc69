// Test of llmc/classifier.cuh against softmax and cross-entropy in double precision; --bench times it.
//
// Bounds are first order in the unit roundoff u of float; c + 1 additions on the way to a sum of positive
// terms cost it c u relatively.
#include "llmc/classifier.cuh"
#include <climits>
#include "dev/kernels/harness.h"

namespace {

constexpr double u = kU32;
constexpr double kEx2Error = 0x1p-22;  // of ex2.approx, relative: 2 ulp
constexpr float kDlossScale = 1.0f / 1024;

struct Shape {
    int rows, V, Vp;
    size_t size() const { return static_cast<size_t>(rows) * Vp; }
    std::string name() const {
        return "rows " + std::to_string(rows) + " V " + std::to_string(V) + " of " + std::to_string(Vp);
    }
};

int padded(int V) { return (V + 127) / 128 * 128; }
double value(floatX x) { return static_cast<double>(static_cast<float>(x)); }

struct Expected {
    std::vector<double> losses, losses_bound, dlogits, dlogits_bound;
};

// z = x log2(e) - M in float: log2(e) is rounded (u |x - x_max| log2(e), since M has the same factor), z once
// more. M itself is rounded, but the same everywhere, so that it cancels; it may exceed the true maximum by u
// |M|, or fall short.
Expected reference(const std::vector<floatX>& logits, const std::vector<int>& targets, const Shape& shape) {
    Expected e;
    const auto [rows, V, Vp] = shape;
    // A thread's terms and rescalings one after the other, a pack at a time, then trees of 5 and 5; every
    // rescaling is an ex2 and a product. At least as many threads have the row as said here.
    const double threads = Vp <= 64 * x128::size ? 8 : Vp <= 256 * x128::size ? 32 : 256;
    const double per_thread = std::ceil(V / threads + x128::size), rescalings = per_thread / x128::size + 3;
    const double sum_error = (per_thread + 12) * u + rescalings * (kEx2Error + 2 * u);
    for (int r = 0; r < rows; r++) {
        const floatX* x = &logits[static_cast<size_t>(r) * Vp];
        double max = -1e300, sum = 0, weighted_z = 0;
        for (int i = 0; i < V; i++) max = std::max(max, value(x[i]));
        for (int i = 0; i < V; i++) {
            const double p = std::exp(value(x[i]) - max);
            sum += p, weighted_z += p > 0 ? p * (max - value(x[i])) / M_LN2 : 0;
        }
        // the sum's terms: 2^z with an error of 2 u |z| ln 2 from z, and M's distance from the maximum
        const double term_error = kEx2Error + 2 * u * M_LN2 * weighted_z / sum;
        const bool valid = targets[r] >= 0 && targets[r] < V;
        const double target_z = valid ? (value(x[targets[r]]) - max) / M_LN2 : 0;
        e.losses.push_back(valid ? std::log(sum) - target_z * M_LN2 : NAN);
        // log2f errs by 1 ulp of its result (2 u), or 2^-22 near 1; z at the target 2 u; the difference, ln 2
        // and its product 3 u.
        const double log_sum = std::log(sum) / M_LN2;
        e.losses_bound.push_back(1.01 * (sum_error + term_error +
                                         M_LN2 * (2 * u * log_sum + 0x1p-22 + 2 * u * std::fabs(target_z)) +
                                         4 * u * std::fabs(e.losses.back())));
        for (int i = 0; i < Vp; i++) {
            const double z = i < V ? (value(x[i]) - max) / M_LN2 : 0,
                         p = i < V ? std::exp(z * M_LN2) / sum : 0;
            const double target = i == targets[r] && valid ? 1 : 0, d = (p - target) * kDlossScale;
            // p: its 2^z, the sum's error, the quotient and a product; then the subtraction and the rounding
            // to floatX. Below 2^-126 terms are flushed to zero, and results are subnormal.
            const double p_error =
                p == 0 ? 0 : p * (sum_error + term_error + kEx2Error + 2 * u * M_LN2 * std::fabs(z) + 3 * u);
            e.dlogits.push_back(d);
            e.dlogits_bound.push_back(
                i < V ? 1.01 * (kDlossScale * p_error + std::fabs(d) * (kUX + u)) + 0x1p-126 : 0);
        }
    }
    return e;
}

struct Result {
    std::vector<floatX> logits;
    std::vector<float> losses;
};

Result run(Harness& h, const std::vector<floatX>& logits, const std::vector<int>& targets, const Shape& shape,
           ClassifierMode mode) {
    auto device = h.to_device(logits);
    auto targets_device = h.to_device(targets);
    auto losses =
        h.to_device(std::vector<float>(shape.rows, -1.0f));  // not NaN: a bad target's loss must be made so
    classifier(device, losses, targets_device, kDlossScale, shape.rows, shape.V, shape.Vp, mode, h.gpu);
    return {h.to_host(device.get(), logits.size()), h.to_host(losses.get(), shape.rows)};
}

// logits hold one row more than shape.rows, which must stay as it is. Pad columns are NaN: nothing may come
// of them.
void test(Harness& h, const std::string& kind, std::vector<floatX> logits, const std::vector<int>& targets,
          const Shape& shape, float pad = NAN) {
    const std::string what = shape.name() + " " + kind;
    for (int r = 0; r < shape.rows; r++)
        for (int i = shape.V; i < shape.Vp; i++)
            logits[static_cast<size_t>(r) * shape.Vp + i] = static_cast<floatX>(pad);
    const Expected want = reference(logits, targets, shape);
    Result got = run(h, logits, targets, shape, ClassifierMode::LossAndGradient);
    const Result again = run(h, logits, targets, shape, ClassifierMode::LossAndGradient);
    h.same_bits(what + ": again the same bits, logits", got.logits, again.logits);
    h.same_bits(what + ": again the same bits, losses", got.losses, again.losses);
    const Result losses_only = run(h, logits, targets, shape, ClassifierMode::LossOnly);
    h.same_bits(what + ": losses alone leave the logits", losses_only.logits, logits);
    h.same_bits(what + ": losses alone are the same", losses_only.losses, got.losses);
    h.same_bits<floatX>(what + ": the row after the last",
                        {got.logits.begin() + shape.size(), got.logits.end()},
                        {logits.begin() + shape.size(), logits.end()});
    got.logits.resize(shape.size());
    h.compare(what + ", losses", got.losses, want.losses, {}, want.losses_bound);
    h.compare(what + ", dlogits", got.logits, want.dlogits, {}, want.dlogits_bound);
}

void test_random(Harness& h, const Shape& shape, double deviation) {
    test(h, "deviation " + std::to_string(static_cast<int>(deviation)),
         h.random<floatX>(shape.size() + shape.Vp, deviation), h.random_ints(shape.rows, shape.V), shape);
}

// Rows where an exponential overflows or vanishes unless the maximum is taken off, and where the maximum
// comes last.
void test_extremes(Harness& h, int V) {
    const Shape shape{6, V, padded(V)};
    auto logits = h.random<floatX>(shape.size() + shape.Vp);
    auto set = [&](int r, int i, float x) {
        logits[static_cast<size_t>(r) * shape.Vp + i] = static_cast<floatX>(x);
    };
    for (int i = 0; i < V; i++) {
        set(0, i, 10000.0f);                           // all large: the loss is log V
        set(1, i, -10000.0f);                          // all small: the same
        set(2, i, i == V - 1 ? 10000.0f : -10000.0f);  // certain, and right
        set(3, i, i == V - 1 ? 10000.0f : -10000.0f);  // certain, and wrong: the loss is 20000
        set(4, i, static_cast<float>(i % 200) - 100);  // the maximum grows on the way
        set(5, i, i % 3 ? -INFINITY : 1.0f);           // logits that are ruled out
    }
    test(h, "extremes", logits, {0, V / 2, V - 1, 0, V / 2, 0}, shape);
}

// Targets that aren't tokens: the loss is NaN, the gradient that of no target, and no memory beyond the row
// is touched. A row with a NaN has a NaN loss. Neither reaches other rows.
void test_bad_rows(Harness& h, int V) {
    const int Vp = padded(V);
    const Shape shape{7, V, Vp};
    test(h, "bad targets", h.random<floatX>(shape.size() + Vp), {0, -1, V, INT_MIN, INT_MAX, Vp, V - 1},
         shape, 0.5f);

    const Shape two{2, V, Vp};
    auto logits = h.random<floatX>(two.size() + Vp);
    logits[V / 2] = static_cast<floatX>(NAN);
    const Result got = run(h, logits, {0, 0}, two, ClassifierMode::LossAndGradient);
    h.check(two.name() + ": a NaN gives a NaN loss",
            std::isnan(got.losses[0]) && std::isfinite(got.losses[1]));
    bool pads_zero = true;
    for (int r = 0; r < 2; r++)
        for (int i = V; i < Vp; i++) pads_zero &= value(got.logits[static_cast<size_t>(r) * Vp + i]) == 0;
    h.check(two.name() + ": pad columns are 0 even so", pads_zero);
}

void test_loss_mean(Harness& h, int rows, Write write) {
    auto losses = h.random<float>(rows, 1.0, 5.0);
    losses[0] = 0x1p25f;  // a sum in float would lose what follows
    auto losses_device = h.to_device(losses),
         loss = h.to_device(std::vector<float>{write == Write::Add ? 3.0f : NAN});
    const float scale = 1.0f / static_cast<float>(rows);
    loss_mean(loss, losses_device, rows, scale, write, h.gpu);
    double want = 0;
    for (float x : losses) want += x;
    want = want * static_cast<double>(scale) + (write == Write::Add ? 3.0 : 0.0);
    // The sum in double is exact to 2^-53 rows; its rounding to float, and the addition's.
    h.compare("loss_mean " + std::to_string(rows) + (write == Write::Add ? " +=" : " ="),
              h.to_host(loss.get(), 1), {want}, {.relative = 2 * u + 0x1p-53 * rows});
}

// More than 2^31 logits, only where there is memory for them: the last row is right.
void test_beyond_2_31(Harness& h) {
    if (h.gpu.properties.totalGlobalMem < size_t{32} << 30) return;
    const Shape one{1, 50257, 50304};
    const int rows = static_cast<int>((size_t{1} << 31) / one.Vp) + 2;
    const auto x = h.random<floatX>(one.Vp);
    const size_t n = static_cast<size_t>(rows) * one.Vp, last = n - one.Vp;
    DeviceBuffer<floatX> logits(n);
    DeviceBuffer<float> losses(rows);
    DeviceBuffer<int> targets(rows);
    fill_zero(logits.get(), n, h.gpu);
    fill_zero(targets.get(), rows, h.gpu);
    copy_to_device(logits.get() + last, x.data(), one.Vp, h.gpu);
    classifier(logits, losses, targets, kDlossScale, rows, one.V, one.Vp, ClassifierMode::LossAndGradient,
               h.gpu);
    const Expected want = reference(x, {0}, one);
    h.compare("the last of 2^31 + .. logits, loss", h.to_host(losses.get() + rows - 1, 1), want.losses, {},
              want.losses_bound);
    h.compare("the last of 2^31 + .. logits", h.to_host(logits.get() + last, one.Vp), want.dlogits, {},
              want.dlogits_bound);
}

void bench(Harness& h, const std::string& what, const Shape& shape) {
    auto logits = h.to_device(h.random<floatX>(shape.size()));
    auto targets = h.to_device(h.random_ints(shape.rows, shape.V));
    DeviceBuffer<float> losses(shape.rows), loss(1);
    const double row = sizeof(floatX) * static_cast<double>(shape.rows);
    auto time = [&](ClassifierMode mode) {
        return h.median_us([&] {
            classifier(logits, losses, targets, kDlossScale, shape.rows, shape.V, shape.Vp, mode, h.gpu);
        });
    };
    h.report("classifier, loss alone, " + what, time(ClassifierMode::LossOnly), row * shape.V);
    h.report("classifier, loss and gradient, " + what, time(ClassifierMode::LossAndGradient),
             row * (shape.V + shape.Vp));
    h.report("loss_mean, " + what,
             h.median_us([&] { loss_mean(loss, losses, shape.rows, 1.0f, Write::Assign, h.gpu); }),
             4.0 * shape.rows);
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("classifier", argc, argv);
    if (h.bench) {
        bench(h, "16K rows of GPT-2", {16384, 50257, 50304});
        bench(h, "64K rows of bytes", {65536, 256, 256});
        bench(h, "16K rows of 8192", {16384, 8192, 8192});
        return h.finish();
    }
    // 8 lanes with up to 4 and 8 packs, warps with 4 and 8; a block; a block whose row doesn't fit into
    // shared memory.
    for (const Shape& shape :
         {Shape{1, 1, 128}, Shape{63, 2, 128}, Shape{65, 50, 128}, Shape{200, 256, 256},
          Shape{1024, 257, 384}, Shape{5, 512, 512}, Shape{9, 1000, 1024}, Shape{3, 2047, 2048},
          Shape{3, 2049, 2176}, Shape{4, 8192, 8192}, Shape{3, 50257, 50304}, Shape{1, 120001, 120064}}) {
        if (h.small && shape.rows > 300) continue;
        test_random(h, shape, 1);
        test_random(h, shape, 20);
    }
    for (int V : {2, 256, 1000, 2049, 50257}) test_extremes(h, V);
    for (int V : {203, 3001, 10001}) test_bad_rows(h, V);
    for (int rows : {1, 63, 1024, 40000})
        for (Write write : {Write::Assign, Write::Add}) test_loss_mean(h, rows, write);
    if (!h.small) test_beyond_2_31(h);
    return h.finish();
}
