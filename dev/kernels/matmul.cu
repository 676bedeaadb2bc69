// Test of llmc/matmul.cuh, llmc/matmul_plan.h and llmc/bias.cuh: every product and epilogue of the model
// against double precision, plans as text, the file that remembers them, graph capture. --bench: the products
// of 124M and 1558M.
//
// Error of a product of K terms. Products of bf16 numbers are exact in fp32. Each of the at most K + 1
// additions, in any order, is off by at most 2^-23 of a partial sum (tensor cores may truncate, which costs
// twice a rounding), so
//     |error| <= (K + 1) 2^-23 sum |a b|,
// to which the output's rounding adds kUX |result|. That bound must hold for truncation that always goes one
// way. A second one is sharp enough to see a single wrong or missing term: errors that are independent or
// follow the growth of a random partial sum (about sqrt(k) |a b|) add up to less than sqrt(K) 2^-23 sum |a b|
// in the root mean square.
#include <cfloat>
#include <chrono>
#include <cinttypes>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include "dev/kernels/harness.h"
#include "llmc/matmul.cuh"

// ---- reference --------------------------------------------------------------------------------------------

// Elements of a row-major product out (rows, cols) = x (rows, K) y (K, cols), in double: all where that is
// cheap, else a sample with the four corners. `sum` and the sum of magnitudes, each for the element at `at`.
struct Reference {
    std::vector<size_t> at;
    std::vector<double> sum, magnitude;
};

template <class X, class Y>
Reference reference(Harness& h, size_t rows, size_t cols, size_t K, X x, Y y) {
    constexpr size_t kTerms = 20'000'000;
    Reference r;
    if (rows * cols * K <= kTerms) {
        for (size_t i = 0; i < rows * cols; i++) r.at.push_back(i);
    } else {
        const size_t count = std::max<size_t>(1000, kTerms / K / 4);
        const std::vector<int> row = h.random_ints(count, static_cast<int>(rows));
        const std::vector<int> col = h.random_ints(count, static_cast<int>(cols));
        for (size_t i = 0; i < count; i++) r.at.push_back(static_cast<size_t>(row[i]) * cols + col[i]);
        for (size_t corner : {size_t{0}, cols - 1, (rows - 1) * cols, rows * cols - 1})
            r.at.push_back(corner);
    }
    for (size_t at : r.at) {
        double sum = 0, magnitude = 0;
        for (size_t k = 0; k < K; k++) {
            const double term = static_cast<double>(x(at / cols, k)) * static_cast<double>(y(k, at % cols));
            sum += term, magnitude += std::fabs(term);
        }
        r.sum.push_back(sum), r.magnitude.push_back(magnitude);
    }
    return r;
}

double gelu_reference(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_derivative_reference(double x) {
    const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
}
// Relative error allowed for the tanh inside a gelu. NVIDIA documents no error of cuBLASLt's GELU, in either
// precision; the coarsest tanh that its kernels could use is tanh.approx, 2^-11 by the PTX ISA. Ours is off
// by a few roundings (gelu.cu), and in bf16 by one more that is as coarse.
constexpr double tanh_error(bool fused) {
    return fused || !std::is_same_v<floatX, float> ? 0x1p-11 : 0x1p-21;
}
constexpr double kGeluSlope = 1.13;  // the largest |gelu'|

// ---- a product and its check ------------------------------------------------------------------------------

// An output between two guards that nothing may touch.
template <class T>
struct Guarded {
    static constexpr size_t kGuard = 64;
    size_t n;
    DeviceBuffer<T> buffer;
    Guarded(Harness& h, size_t n_) : n(n_), buffer(h.poisoned<T>(n_ + 2 * kGuard)) {}
    T* get() const { return buffer.get() + kGuard; }
    std::vector<T> to_host(Harness& h) const { return h.to_host(get(), n); }
    bool untouched(Harness& h) const {
        const std::vector<T> all = h.to_host(buffer.get(), buffer.size());
        for (size_t i = 0; i < kGuard; i++)
            for (const T& x : {all[i], all[all.size() - 1 - i]}) {
                unsigned char bytes[sizeof(T)];
                std::memcpy(bytes, &x, sizeof(T));
                for (unsigned char byte : bytes)
                    if (byte != 0xff) return false;
            }
        return true;
    }
};

// got at the reference's places against want, element by element and in the root mean square.
template <class T>
void compare_product(Harness& h, const std::string& what, const Guarded<T>& out, const Reference& r, size_t K,
                     const std::vector<double>& want, const std::vector<double>& magnitude,
                     const std::vector<double>& more = {}) {
    const std::vector<T> all = out.to_host(h);
    std::vector<T> got;
    std::vector<double> bound;
    double square_error = 0, square_magnitude = 0, square_want = 0, square_more = 0;
    size_t nan = 0;
    for (const T& x : all) nan += std::isnan(static_cast<float>(x));
    for (size_t i = 0; i < r.at.size(); i++) {
        got.push_back(all[r.at[i]]);
        const double extra = more.empty() ? 0 : more[i];
        // A gelu behind the product makes its error larger by at most its slope.
        bound.push_back((static_cast<double>(K) + 1) * 0x1p-23 * magnitude[i] * kGeluSlope + extra + DBL_MIN);
        const double error = static_cast<double>(static_cast<float>(got[i])) - want[i];
        square_error += error * error, square_magnitude += magnitude[i] * magnitude[i];
        square_want += want[i] * want[i], square_more += extra * extra;
    }
    const double unit = unit_roundoff<T>();
    h.compare(what, got, want, {.relative = unit}, bound);
    const double allowed =
        std::sqrt(static_cast<double>(K)) * 0x1p-23 * kGeluSlope * std::sqrt(square_magnitude) +
        unit * std::sqrt(square_want) + std::sqrt(square_more);
    const bool ok = nan == 0 && std::sqrt(square_error) <= allowed && out.untouched(h);
    char text[200];
    std::snprintf(text, sizeof(text),
                  "%s: norm of the error %.1e of %.1e; every element and only those written", what.c_str(),
                  std::sqrt(square_error), allowed);
    if (!ok) h.check(text, false);
}

struct Shape {
    int64_t N, C, OC;
    std::string text() const { return text_of("N %d C %d OC %d", int(N), int(C), int(OC)); }
};

// Every candidate for a product runs, through replay(), so that what is tested is what a recorded plan does.
// As in tuning, what can't be made again from its settings, or is refused when it is run, is none.
// f(matmuls, label, fused) computes and compares.
using RunAndCompare = std::function<void(Matmuls&, const std::string& label, bool fused)>;
void for_candidates(Harness& h, const MatmulKey& key, int count, const RunAndCompare& f) {
    const bool plain = key.epilogue == MatmulEpilogue::None;
    const MatmulTuningMemory memory(key, h.gpu);
    size_t candidates = 0, left_out = 0;
    for (bool fused : {true, false}) {
        if (!fused && plain) continue;
        const auto all = heuristic_algorithms(key, fused, count, h.gpu.workspace.bytes(), h.gpu);
        for (size_t i = 0; i < all.size(); i++) {
            auto plan = make_plan(key, all[i].settings, SIZE_MAX, h.gpu);
            if (!plan || !memory || !try_plan(*plan, memory.operands(), h.gpu)) {
                left_out++;
                continue;
            }
            candidates++;
            Matmuls matmuls({.measure = false, .cache_path = ""});
            const std::string line = text_of_key(key) + " = " + text_of_settings(all[i].settings);
            matmuls.replay({line});
            const std::string label = plain ? "" : fused ? " fused" : " unfused";
            f(matmuls, label + (i > 0 ? text_of(" candidate %zu", i) : ""), fused);
            if (matmuls.record() != std::vector<std::string>{line})
                h.check("what was replayed is recorded: " + line, false);
        }
    }
    if (candidates == 0 || left_out > 0)
        h.check(text_of("%s: %zu candidates, %zu left out", text_of_key(key).c_str(), candidates, left_out),
                candidates > 0);
}

// ---- the five products of a linear layer ------------------------------------------------------------------

void test_forward(Harness& h, Shape s, int candidates) {
    auto key = [&](MatmulEpilogue epilogue) { return Matmuls::forward_key(s.N, s.C, s.OC, epilogue); };
    const auto inp = h.random<floatX>(s.N * s.C);
    const auto weight = h.random<floatX>(s.C * s.OC, 1 / std::sqrt(double(s.C)));
    const auto bias = h.random<floatX>(s.OC);
    const auto d_inp = h.to_device(inp), d_weight = h.to_device(weight), d_bias = h.to_device(bias);
    const Reference r = reference(
        h, s.N, s.OC, s.C, [&](size_t i, size_t k) { return float(inp[i * s.C + k]); },
        [&](size_t k, size_t j) { return float(weight[k * s.OC + j]); });
    std::vector<double> pre(r.sum), magnitude(r.magnitude), gelu(r.sum.size()), plain_error;
    std::vector<double> gelu_error[2];  // [fused]
    for (size_t i = 0; i < pre.size(); i++) {
        const double b = static_cast<double>(float(bias[r.at[i] % s.OC]));
        pre[i] += b, magnitude[i] += std::fabs(b);
        gelu[i] = gelu_reference(pre[i]);
        plain_error.push_back(kUX * std::fabs(r.sum[i]));  // unfused: rounded before the bias is added
        for (bool fused : {false, true})
            gelu_error[fused].push_back(std::fabs(pre[i]) * (kGeluSlope * kUX + 0.5 * tanh_error(fused)));
    }
    for_candidates(h, key(MatmulEpilogue::Bias), candidates, [&](Matmuls& m, auto& label, bool) {
        Guarded<floatX> out(h, s.N * s.OC);
        m.forward({.out = out.get(),
                   .inp = d_inp,
                   .weight = d_weight,
                   .bias = d_bias,
                   .N = s.N,
                   .C = s.C,
                   .OC = s.OC},
                  h.gpu);
        compare_product(h, "forward + bias " + s.text() + label, out, r, s.C + 1, pre, magnitude,
                        plain_error);
    });
    for_candidates(h, key(MatmulEpilogue::None), 1, [&](Matmuls& m, auto& label, bool) {
        Guarded<floatX> out(h, s.N * s.OC);
        m.forward({.out = out.get(), .inp = d_inp, .weight = d_weight, .N = s.N, .C = s.C, .OC = s.OC},
                  h.gpu);
        compare_product(h, "forward " + s.text() + label, out, r, s.C, r.sum, r.magnitude);
    });
    for_candidates(h, key(MatmulEpilogue::GeluBias), candidates, [&](Matmuls& m, auto& label, bool fused) {
        Guarded<floatX> out(h, s.N * s.OC), pre_gelu(h, s.N * s.OC);
        m.forward_gelu({.out = out.get(),
                        .pre_gelu = pre_gelu.get(),
                        .inp = d_inp,
                        .weight = d_weight,
                        .bias = d_bias,
                        .N = s.N,
                        .C = s.C,
                        .OC = s.OC},
                       h.gpu);
        compare_product(h, "forward_gelu, pre_gelu " + s.text() + label, pre_gelu, r, s.C + 1, pre,
                        magnitude);
        compare_product(h, "forward_gelu, out " + s.text() + label, out, r, s.C + 1, gelu, magnitude,
                        gelu_error[fused]);
    });
}

void test_dgrad(Harness& h, Shape s, int candidates) {
    auto key = [&](MatmulEpilogue epilogue) { return Matmuls::dgrad_key(s.N, s.C, s.OC, epilogue); };
    const auto dout = h.random<floatX>(s.N * s.OC);
    const auto weight = h.random<floatX>(s.C * s.OC, 1 / std::sqrt(double(s.OC)));
    const auto pre_gelu = h.random<floatX>(s.N * s.C, 2.0);
    const auto d_dout = h.to_device(dout), d_weight = h.to_device(weight), d_pre_gelu = h.to_device(pre_gelu);
    const Reference r = reference(
        h, s.N, s.C, s.OC, [&](size_t i, size_t k) { return float(dout[i * s.OC + k]); },
        [&](size_t k, size_t j) { return float(weight[j * s.OC + k]); });
    std::vector<double> want(r.sum), error[2];  // [fused]
    for (size_t i = 0; i < want.size(); i++) {
        const double x = static_cast<double>(float(pre_gelu[r.at[i]])), slope = gelu_derivative_reference(x);
        want[i] *= slope;
        // d slope / d tanh = 1/2 - x tanh du/dx; the tanh's error is relative, and 1 - tanh^2 is as far off
        // as tanh is.
        const double slope_error = 0.5 + 0.8 * std::fabs(x) * (1 + 3 * 0.044715 * x * x);
        // Unfused: rounded before the slope too.
        for (bool fused : {false, true})
            error[fused].push_back(std::fabs(r.sum[i]) * tanh_error(fused) * slope_error +
                                   kUX * std::fabs(want[i]));
    }
    for_candidates(h, key(MatmulEpilogue::None), candidates, [&](Matmuls& m, auto& label, bool) {
        Guarded<floatX> dinp(h, s.N * s.C);
        m.dgrad({.dinp = dinp.get(), .dout = d_dout, .weight = d_weight, .N = s.N, .C = s.C, .OC = s.OC},
                h.gpu);
        compare_product(h, "dgrad " + s.text() + label, dinp, r, s.OC, r.sum, r.magnitude);
    });
    for_candidates(h, key(MatmulEpilogue::Dgelu), candidates, [&](Matmuls& m, auto& label, bool fused) {
        Guarded<floatX> dinp(h, s.N * s.C);
        m.dgrad_gelu({.dinp = dinp.get(),
                      .pre_gelu = d_pre_gelu,
                      .dout = d_dout,
                      .weight = d_weight,
                      .N = s.N,
                      .C = s.C,
                      .OC = s.OC},
                     h.gpu);
        compare_product(h, "dgrad_gelu " + s.text() + label, dinp, r, s.OC, want, r.magnitude, error[fused]);
    });
}

// Sums over the rows of dout, for the bias, and the bound of fp32 sums in any order.
struct ColumnSums {
    std::vector<double> sum, bound;
    ColumnSums(const std::vector<floatX>& dout, const std::vector<float>& before, int64_t N, int64_t OC)
        : sum(OC), bound(OC) {
        for (int64_t j = 0; j < OC; j++) {
            double magnitude = std::fabs(static_cast<double>(before[j]));
            sum[j] = static_cast<double>(before[j]);
            for (int64_t i = 0; i < N; i++) {
                const double x = static_cast<double>(float(dout[i * OC + j]));
                sum[j] += x, magnitude += std::fabs(x);
            }
            bound[j] = 2 * kU32 * static_cast<double>(N + 1) * magnitude;
        }
    }
};

// dweight, and with Bgrad the bias's gradient too.
void test_wgrad(Harness& h, Shape s, MatmulEpilogue epilogue, int candidates) {
    const auto inp = h.random<floatX>(s.N * s.C), dout = h.random<floatX>(s.N * s.OC);
    const auto before = h.random<float>(s.C * s.OC, std::sqrt(double(s.N)));
    const auto bias_before = h.random<float>(s.OC, std::sqrt(double(s.N)));
    const auto d_inp = h.to_device(inp), d_dout = h.to_device(dout);
    const auto scratch = h.poisoned<float>(bias_backward_scratch_floats(s.N, s.OC));
    const Reference r = reference(
        h, s.C, s.OC, s.N, [&](size_t i, size_t k) { return float(inp[k * s.C + i]); },
        [&](size_t k, size_t j) { return float(dout[k * s.OC + j]); });
    for (Write write : {Write::Assign, Write::Add}) {
        const bool adds = write == Write::Add, with_bias = epilogue == MatmulEpilogue::Bgrad;
        std::vector<double> want(r.sum), magnitude(r.magnitude);
        for (size_t i = 0; adds && i < want.size(); i++)
            want[i] += before[r.at[i]], magnitude[i] += std::fabs(double(before[r.at[i]]));
        const ColumnSums columns(dout, adds ? bias_before : std::vector<float>(s.OC), s.N, s.OC);
        for_candidates(h, Matmuls::wgrad_key(s.OC, s.C, s.N, write, epilogue), candidates,
                       [&](Matmuls& m, auto& label, bool) {
                           struct Output {
                               Guarded<float> dweight, dbias;
                           };
                           Output once{{h, size_t(s.C * s.OC)}, {h, size_t(s.OC)}},
                               again{{h, size_t(s.C * s.OC)}, {h, size_t(s.OC)}};
                           for (const Output* d : {&once, &again}) {
                               if (adds)
                                   copy_to_device(d->dweight.get(), before.data(), before.size(), h.gpu);
                               if (adds)
                                   copy_to_device(d->dbias.get(), bias_before.data(), bias_before.size(),
                                                  h.gpu);
                               m.wgrad({.dweight = d->dweight.get(),
                                        .inp = d_inp,
                                        .dout = d_dout,
                                        .N = s.N,
                                        .C = s.C,
                                        .OC = s.OC,
                                        .write = write,
                                        .dbias = with_bias ? d->dbias.get() : nullptr,
                                        .scratch = with_bias ? scratch.get() : nullptr},
                                       h.gpu);
                           }
                           const std::string what = (adds ? "wgrad += " : "wgrad = ") + s.text() + label;
                           compare_product(h, what, once.dweight, r, s.N + 1, want, magnitude);
                           bool same = once.dweight.to_host(h) == again.dweight.to_host(h);
                           if (with_bias) {
                               const std::vector<float> dbias = once.dbias.to_host(h);
                               h.compare(what + ": dbias", dbias, columns.sum, {}, columns.bound);
                               same = same && dbias == again.dbias.to_host(h);
                               if (!once.dbias.untouched(h)) h.check(what + ": only dbias is written", false);
                           }
                           if (!same) h.check(what + ": the same bits twice", false);
                       });
    }
}

// The tied head: weight is wte (Vp, C).
void test_head(Harness& h, int64_t N, int64_t C, int64_t Vp) {
    const Shape s{N, C, Vp};
    const auto inp = h.random<floatX>(N * C), wte = h.random<floatX>(Vp * C, 1 / std::sqrt(double(C)));
    const auto dlogits = h.random<floatX>(N * Vp, 1 / std::sqrt(double(Vp)));
    const auto before = h.random<float>(Vp * C);
    const auto d_inp = h.to_device(inp), d_wte = h.to_device(wte), d_dlogits = h.to_device(dlogits);
    auto at = [](const std::vector<floatX>& x, size_t width) {
        return [&x, width](size_t i, size_t j) { return float(x[i * width + j]); };
    };
    auto transposed = [](const std::vector<floatX>& x, size_t width) {
        return [&x, width](size_t i, size_t j) { return float(x[j * width + i]); };
    };
    Matmuls m({.measure = false, .cache_path = ""});
    {
        const Reference r = reference(h, N, Vp, C, at(inp, C), transposed(wte, C));
        Guarded<floatX> logits(h, N * Vp);
        m.head_forward({.out = logits.get(), .inp = d_inp, .weight = d_wte, .N = N, .C = C, .OC = Vp}, h.gpu);
        compare_product(h, "head_forward " + s.text(), logits, r, C, r.sum, r.magnitude);
    }
    {
        const Reference r = reference(h, N, C, Vp, at(dlogits, Vp), at(wte, C));
        Guarded<floatX> dinp(h, N * C);
        m.head_dgrad({.dinp = dinp.get(), .dout = d_dlogits, .weight = d_wte, .N = N, .C = C, .OC = Vp},
                     h.gpu);
        compare_product(h, "head_dgrad " + s.text(), dinp, r, Vp, r.sum, r.magnitude);
    }
    const Reference r = reference(h, Vp, C, N, transposed(dlogits, Vp), at(inp, C));
    std::vector<double> want(r.sum), magnitude(r.magnitude);
    Guarded<float> dwte(h, Vp * C);
    MatmulWgrad x{.dweight = dwte.get(),
                  .inp = d_inp,
                  .dout = d_dlogits,
                  .N = N,
                  .C = C,
                  .OC = Vp,
                  .write = Write::Assign};
    m.head_wgrad(x, h.gpu);
    compare_product(h, "head_wgrad = " + s.text(), dwte, r, N, want, magnitude);
    for (size_t i = 0; i < want.size(); i++)
        want[i] += before[r.at[i]], magnitude[i] += std::fabs(double(before[r.at[i]]));
    copy_to_device(dwte.get(), before.data(), before.size(), h.gpu);
    x.write = Write::Add;
    m.head_wgrad(x, h.gpu);
    compare_product(h, "head_wgrad += " + s.text(), dwte, r, N + 1, want, magnitude);
}

// ---- bias -------------------------------------------------------------------------------------------------

void test_bias(Harness& h, int64_t rows, int64_t cols) {
    const std::string shape = text_of("rows %d cols %d", int(rows), int(cols));
    const auto dout = h.random<floatX>(rows * cols, 1.0, 0.25), bias = h.random<floatX>(cols);
    const auto before = h.random<float>(cols);
    const auto d_dout = h.to_device(dout), d_bias = h.to_device(bias);
    // Additions that an element goes through: a warp's rows, the warps, a thread's slices, the threads, what
    // was there.
    const int64_t slices = bias_backward_slices(rows, cols);
    const double depth = double(ceil_div(ceil_div(rows, slices), kBiasWarps) + kBiasWarps +
                                ceil_div(slices, kBiasFinishRows) + kBiasFinishRows + 1);
    std::vector<double> sum(cols), bound(cols);
    for (int64_t i = 0; i < rows * cols; i++) {
        sum[i % cols] += double(float(dout[i]));
        bound[i % cols] += depth * kU32 * std::fabs(double(float(dout[i])));
    }
    DeviceBuffer<float> scratch = h.poisoned<float>(bias_backward_scratch_floats(rows, cols));
    Guarded<float> dbias(h, cols), again(h, cols);
    bias_backward(dbias.get(), scratch, d_dout, rows, cols, Write::Assign, h.gpu);
    bias_backward(again.get(), scratch, d_dout, rows, cols, Write::Assign, h.gpu);
    h.compare("bias_backward = " + shape, dbias.to_host(h), sum, {}, bound);
    h.same_bits("bias_backward twice " + shape, dbias.to_host(h), again.to_host(h));
    copy_to_device(dbias.get(), before.data(), before.size(), h.gpu);
    bias_backward(dbias.get(), scratch, d_dout, rows, cols, Write::Add, h.gpu);
    for (int64_t i = 0; i < cols; i++)
        sum[i] += before[i], bound[i] += depth * kU32 * std::fabs(double(before[i]));
    h.compare("bias_backward += " + shape, dbias.to_host(h), sum, {}, bound);
    if (!dbias.untouched(h)) h.check("bias_backward writes only its columns " + shape, false);

    Guarded<floatX> out(h, rows * cols);
    copy_to_device(out.get(), dout.data(), dout.size(), h.gpu);
    bias_forward(out.get(), d_bias, rows, cols, h.gpu);
    std::vector<double> want(rows * cols), want_bound(rows * cols);
    for (int64_t i = 0; i < rows * cols; i++) {
        want[i] = double(float(dout[i])) + double(float(bias[i % cols]));
        want_bound[i] = kU32 * std::fabs(want[i]);  // the fp32 sum's rounding, before the output's
    }
    h.compare("bias_forward " + shape, out.to_host(h), want, {.relative = kUX}, want_bound);
    if (!out.untouched(h)) h.check("bias_forward writes only its rows " + shape, false);
}

// ---- plans ------------------------------------------------------------------------------------------------

void test_plan_text(Harness& h) {
    const MatmulSettings settings{.algorithm = 66,
                                  .tile = 20,
                                  .stages = 36,
                                  .split_k = 3,
                                  .reduction = 2,
                                  .swizzle = 1,
                                  .custom = 4000000000u,
                                  .inner_shape = 7,
                                  .cluster_shape = 65535,
                                  .fused = false};
    MatmulSettings back;
    h.check("settings as text and back",
            parse_settings(back, text_of_settings(settings)) && back == settings);
    const std::string product = text_of_key(Matmuls::forward_key(64, 768, 3072, MatmulEpilogue::GeluBias));
    const std::string line = product + " = " + text_of_settings(settings);
    std::string key;
    h.check("a plan's line and back: " + line,
            parse_plan(key, back, line) && back == settings && key == product);
    bool refused = true;
    for (size_t cut = 0; cut < line.size(); cut++) refused &= !parse_plan(key, back, line.substr(0, cut));
    for (const char* wrong : {" ", " fused 1", "x"}) refused &= !parse_plan(key, back, line + wrong);
    std::string other = line;
    other.replace(other.find("tile"), 4, "tyle");
    refused &= !parse_plan(key, back, other);
    other = line;
    other.replace(other.find("cluster 65535"), 13, "cluster 65536");  // beyond the setting's 16 bits
    refused &= !parse_plan(key, back, other);
    h.check("a line cut short, with more, with another name or a number too large is refused", refused);

    h.check("the first is kept unless beaten by more than 2%",
            choose_fastest({100, 98.5, 99}) == 0 && choose_fastest({100, 97.9, 99}) == 1 &&
                choose_fastest({100, 97, 96}) == 2 && choose_fastest({5}) == 0 &&
                choose_fastest({100, 120}) == 0);
}

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}
void write_file(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

void test_cache(Harness& h) {
    char name[] = "/tmp/matmul_cache_XXXXXX";
    if (!mkdtemp(name)) fatal("cannot make a directory in /tmp");
    const std::string directory = name, path = directory + "/a/b/plans.txt";
    const MatmulSettings one{.algorithm = 1}, two{.algorithm = 2, .fused = false};
    {
        MatmulCache cache(path, "gpu one");
        h.check("no file, nothing remembered, no complaint", !cache.find("key 1"));
        cache.remember("key 1", one);
        cache.save();
        MatmulCache other(path, "gpu two");
        h.check("rows of another device aren't found", !other.find("key 1"));
        other.remember("key 1", two);
        other.save();
    }
    MatmulCache again(path, "gpu one");
    h.check("remembered in the next run, beside another device's",
            again.find("key 1") && *again.find("key 1") == one && MatmulCache(path, "gpu two").find("key 1"));
    const std::string sound = read_file(path);
    bool safe = true, said = true, replaced = true;
    for (size_t i = 0; i < sound.size(); i++) {  // a bit of any byte
        std::string damaged = sound;
        damaged[i] ^= 1;
        write_file(path, damaged);
        const MatmulCache reader(path, "gpu one");
        const MatmulSettings* found = reader.find("key 1");
        safe &= !found || *found == one;
        said &= !reader.complaint().empty();
    }
    h.check("a damaged file gives no wrong plan", safe);
    h.check("damage is noticed, in whatever byte", said);
    write_file(path, sound.substr(0, sound.size() - 9));
    MatmulCache cut(path, "gpu one");
    replaced &= !cut.find("key 1");
    cut.remember("key 2", one);
    cut.save();
    replaced &= MatmulCache(path, "gpu one").find("key 2") != nullptr;
    h.check("a damaged file is replaced", replaced);
    write_file(path, "a letter to my mother\n");
    MatmulCache foreign(path, "gpu one");
    foreign.remember("key 1", one);
    h.check("a file that isn't ours is left alone",
            !foreign.save() && read_file(path) == "a letter to my mother\n");
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    MatmulCache blocked(path, "gpu one");
    blocked.remember("key 1", one);
    h.check("what can't be read or written is no error", !blocked.save() && blocked.find("key 1") != nullptr);
    h.check("no temporary file is left",
            std::distance(std::filesystem::directory_iterator(directory + "/a/b"), {}) == 1);
    std::filesystem::remove_all(directory);
}

void test_choosing(Harness& h) {
    char name[] = "/tmp/matmul_choice_XXXXXX";
    if (!mkdtemp(name)) fatal("cannot make a directory in /tmp");
    const std::string path = std::string(name) + "/plans.txt";
    const MatmulKey key = Matmuls::forward_key(256, 128, 512, MatmulEpilogue::GeluBias);
    const MatmulModel model{
        .tokens = 256, .logit_rows = 128, .channels = 128, .padded_vocab_size = 256, .accumulate = true};
    Matmuls first({.candidates = 8, .cache_path = path});
    first.prepare(model, h.gpu);
    const std::vector<std::string> lines = first.record();
    h.check(text_of("prepare makes %zu plans, one a line", lines.size()),
            lines.size() == 20 && first.plans().size() == 20);
    Matmuls second({.candidates = 8, .cache_path = path});
    second.prepare(model, h.gpu);
    h.check("the next run chooses the same, from the file where there was a choice",
            second.record() == lines);
    Matmuls third({.measure = false, .cache_path = ""});
    third.replay(lines);
    third.prepare(model, h.gpu);
    h.check("replayed plans are recorded as they were", third.record() == lines);
    Matmuls fourth({.cache_path = ""});
    fourth.replay({text_of_key(key) + " = " + text_of_settings({.algorithm = 9999})});
    h.check("a plan that the library refuses is replaced",
            fourth.plan(key, h.gpu).settings.algorithm != 9999);
    Matmuls unfused({.fuse_gelu = false, .candidates = 4, .cache_path = path});
    h.check("fuse_gelu false never fuses, whatever is remembered", !unfused.plan(key, h.gpu).settings.fused);

    // Measuring itself, where the simulator's library would offer nothing to choose from.
    const MatmulTuningMemory memory(key, h.gpu);
    if (!memory) fatal("no memory for the operands of %s", text_of_key(key).c_str());
    std::vector<MatmulPlan> plans;
    for (bool fused : {true, false})
        for (const MatmulAlgorithm& given :
             heuristic_algorithms(key, fused, 2, h.gpu.workspace.bytes(), h.gpu)) {
            auto plan = make_plan(key, given.settings, SIZE_MAX, h.gpu);
            if (plan && try_plan(*plan, memory.operands(), h.gpu)) plans.push_back(std::move(*plan));
        }
    std::filesystem::remove_all(name);
    if (!h.check(text_of("%zu candidates to measure", plans.size()), !plans.empty())) return;
    const size_t chosen = measure_plans(plans, memory.operands(), h.gpu);
    h.check("every candidate is timed, and one is chosen",
            chosen < plans.size() &&
                std::all_of(plans.begin(), plans.end(), [](const MatmulPlan& p) { return p.us > 0; }));
    const auto a = h.to_host(memory.operands().a, key.m * key.k);
    double square = 0;
    for (floatX x : a) square += double(float(x)) * double(float(x));
    // The mean square of n such numbers has a deviation below a normal's, sqrt(2 / n): 5 of them, and bf16's
    // rounding.
    h.check("measured on random numbers",
            std::fabs(square / a.size() - 1) < 5 * std::sqrt(2.0 / a.size()) + 2 * kUX);
}

// The times of candidates as they are asked for, one after the other.
struct Clock {
    std::vector<std::vector<double>> us;  // the last stands for all that follow
    std::vector<size_t> asked = std::vector<size_t>(us.size(), 0);
    double operator()(size_t i, int) { return us[i][std::min(asked[i]++, us[i].size() - 1)]; }
};

void test_measuring(Harness& h) {
    Clock clock{{{100}, {150, 90}, {90, 150, 95}, {121}, {105, 105, 500, 80, 500, 80, 100}}};
    const std::vector<double> us =
        measure_candidates(clock.us.size(), [&](size_t i, int runs) { return clock(i, runs); });
    h.check("the better of two looks says what is hopeless", us[1] == 90 && us[2] == 95);
    h.check("the hopeless is timed no more, the first always",
            us[3] == 121 && clock.asked[3] == 2 && clock.asked[0] == 7);
    h.check("the median of five rounds counts", us[4] == 100 && clock.asked[4] == 7);
    Clock slow_first{{{200}, {100}}};
    measure_candidates(2, [&](size_t i, int runs) { return slow_first(i, runs); });
    h.check("the first is timed though hopeless, as the others are compared with it",
            slow_first.asked[0] == 7);

    auto warmed = [](double us_of_a_run) {
        int all = 0;
        warm_up([&](int runs) { return all += runs, us_of_a_run; });
        return all;
    };
    h.check("warming up takes 200 ms or little more",
            warmed(400) >= 500 && warmed(400) <= 1000 && warmed(100e3) == 3 && warmed(1e6) == 1);
    h.check("warming up ends, however short the product", warmed(0.001) < 3000);
}

// Sets the simulator's cuBLASLt, while it lives: a letter an algorithm (dev/sim/cublaslt.cpp).
struct Library {
    explicit Library(const char* letters) { setenv("SIM_CUBLASLT", letters, 1); }
    ~Library() { unsetenv("SIM_CUBLASLT"); }
};

// What becomes of algorithms that the library proposes and then refuses. Only the simulator's can be told to.
void test_refused(Harness& h) {
    if (!std::strstr(h.gpu.properties.name, "simulator")) return;
    const Shape s{64, 64, 128};
    const MatmulKey plain = Matmuls::forward_key(s.N, s.C, s.OC, MatmulEpilogue::None);
    const MatmulKey gelu = Matmuls::forward_key(s.N, s.C, s.OC, MatmulEpilogue::GeluBias);
    auto chosen = [&](const char* letters, const MatmulKey& key, bool measure = true) {
        const Library library(letters);
        Matmuls m({.measure = measure, .cache_path = ""});
        const MatmulPlan& plan = m.plan(key, h.gpu);
        return std::pair(plan.settings, plan.candidates);
    };
    auto is = [&](const std::string& what, const char* letters, const MatmulKey& key, int algorithm,
                  bool fused, int candidates, bool measure = true) {
        const auto [settings, timed] = chosen(letters, key, measure);
        h.check(text_of("library %s: ", letters) + what,
                settings.algorithm == algorithm && settings.fused == fused && timed == candidates);
    };
    is("the first fails when run, the second is taken", "fw", plain, 2, true, 0);
    is("of two that fail and one that works none is timed", "ffw", plain, 3, true, 0);
    is("fused all fail, unfused is left", "F", gelu, 1, false, 0);
    is("fused can't be asked for, unfused is left", "X", gelu, 1, false, 0);
    is("fused can't be made again, unfused is left", "N", gelu, 1, false, 0);
    is("the same untimed", "N", gelu, 1, false, 0, false);
    is("none can be made again, fused or not: the first as it came", "nn", gelu, -1, true, 0);
    is("what can be made again fails when run: as it came", "fn", plain, -1, true, 0);
    is("as it came, untimed", "n", plain, -1, true, 0, false);
    {
        const auto [settings, timed] = chosen("nwfw", plain);
        h.check("library nwfw: two work and are timed, the baseline is the first of them",
                (settings.algorithm == 2 || settings.algorithm == 4) && timed == 2);
        const auto [either, both] = chosen("Fw", gelu);
        h.check("library Fw: the fused that works is timed beside two unfused",
                both == 3 && (either.fused ? either.algorithm == 2 : either.algorithm > 0));
    }

    // As it came: it computes, is nowhere remembered, and who reads its line chooses anew.
    const auto d_inp = h.to_device(h.random<floatX>(s.N * s.C)),
               d_weight = h.to_device(h.random<floatX>(s.C * s.OC));
    auto product = [&](Matmuls& m) {
        Guarded<floatX> out(h, s.N * s.OC);
        m.forward({.out = out.get(), .inp = d_inp, .weight = d_weight, .N = s.N, .C = s.C, .OC = s.OC},
                  h.gpu);
        return out.to_host(h);
    };
    char name[] = "/tmp/matmul_refused_XXXXXX";
    if (!mkdtemp(name)) fatal("cannot make a directory in /tmp");
    const std::string path = std::string(name) + "/plans.txt";
    Matmuls usual({.cache_path = ""}), as_it_came({.cache_path = path});
    const auto want = product(usual);
    {
        const Library library("nn");
        h.same_bits("an algorithm as it came computes the product", product(as_it_came), want);
    }
    h.check("and isn't remembered", !std::filesystem::exists(path));
    const std::vector<std::string> lines = as_it_came.record();
    h.check("its line says algo -1", lines.size() == 1 && lines[0].find(" = algo -1 ") != std::string::npos);
    Matmuls reader({.cache_path = ""});
    reader.replay(lines);
    h.check("who reads that chooses anew", reader.plan(plain, h.gpu).settings.algorithm == 1);
    std::filesystem::remove_all(name);

    // Two work, and there is a choice: the clocks come first.
    const Library library("ww");
    const MatmulKey large = Matmuls::forward_key(512, 256, 1024, MatmulEpilogue::None);
    Matmuls timed({.cache_path = ""});
    const auto begin = std::chrono::steady_clock::now();
    timed.plan(large, h.gpu);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    h.check(text_of("a first measurement is warmed up for: %.2f s", took.count()), took.count() >= 0.2);
}

// A captured product runs again with the operands of its capture, though its descriptors served others
// meanwhile.
void test_graph(Harness& h) {
    const Shape s{200, 128, 512};
    const auto d_inp = h.to_device(h.random<floatX>(s.N * s.C)),
               d_weight = h.to_device(h.random<floatX>(s.C * s.OC));
    const auto d_bias = h.to_device(h.random<floatX>(s.OC)), d_other = h.to_device(h.random<floatX>(s.OC));
    Guarded<floatX> want(h, s.N * s.OC), got(h, s.N * s.OC), other(h, s.N * s.OC), pre_gelu(h, s.N * s.OC);
    Matmuls m({.measure = false, .cache_path = ""});
    auto run = [&](floatX* out, const floatX* bias) {
        m.forward_gelu({.out = out,
                        .pre_gelu = pre_gelu.get(),
                        .inp = d_inp,
                        .weight = d_weight,
                        .bias = bias,
                        .N = s.N,
                        .C = s.C,
                        .OC = s.OC},
                       h.gpu);
    };
    run(want.get(), d_bias);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamBeginCapture(h.gpu.stream, cudaStreamCaptureModeThreadLocal));
    run(got.get(), d_bias);
    CUDA_CHECK(cudaStreamEndCapture(h.gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    run(other.get(), d_other);
    CUDA_CHECK(cudaGraphLaunch(exec, h.gpu.stream));
    h.same_bits("a captured product, replayed, gives the bits of the call", want.to_host(h), got.to_host(h));
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
}

// ---- bench ------------------------------------------------------------------------------------------------

double tflops(const MatmulKey& key, double us) {
    return 2.0 * double(key.m) * double(key.n) * double(key.k) / us * 1e-6;
}

// The measured plan, or the only one, timed.
MatmulPlan& timed(Matmuls& m, const MatmulKey& key, Harness& h) {
    MatmulPlan& plan = m.plan(key, h.gpu);
    if (plan.us == 0) {
        const MatmulTuningMemory memory(key, h.gpu);
        if (!memory) fatal("no memory to time %s", text_of_key(key).c_str());
        time_plan_us(plan, memory.operands(), 3, h.gpu);
        plan.us = plan.first_us = time_plan_us(plan, memory.operands(), 10, h.gpu);
    }
    return plan;
}

// All products of a micro-step, and what a step spends in them.
void bench_model(Harness& h, const char* name, int64_t layers, const MatmulModel& model, double ceiling) {
    std::printf("%s: %" PRId64 " tokens, logits in chunks of %" PRId64
                "; us of the heuristic's first and of the best of "
                "%d; share of the large product's %.0f TFLOP/s\n",
                name, model.tokens, model.logit_rows, 32, ceiling);
    std::printf("%-48s %21s %21s %9s %6s  %s\n", "", "workspace 32 MiB", "256 MiB", "TFLOP/s", "share",
                "chosen");
    Matmuls small({.workspace_bytes = size_t{32} << 20, .cache_path = ""}), large({.cache_path = ""});
    large.prepare(model, h.gpu);
    double first_ms = 0, best_small_ms = 0, best_ms = 0;
    for (const auto& [key, unused] : large.plans()) {
        const MatmulPlan& s = timed(small, key, h);
        const MatmulPlan& l = timed(large, key, h);
        std::printf("%-48s %10.1f %10.1f %10.1f %10.1f %9.1f %5.1f%%  %s\n", text_of_key(key).c_str(),
                    s.first_us, s.us, l.first_us, l.us, tflops(key, l.us), 100 * tflops(key, l.us) / ceiling,
                    text_of_settings(l.settings).c_str());
        std::fflush(stdout);
        const bool head =
            int64_t(std::max({key.m, key.n, key.k})) == model.padded_vocab_size && key.write == Write::Assign;
        const double times = head                         ? double(model.tokens) / double(model.logit_rows)
                             : key.write == Write::Assign ? double(layers)
                                                          : 0;
        first_ms += times * l.first_us * 1e-3, best_small_ms += times * s.us * 1e-3,
            best_ms += times * l.us * 1e-3;
    }
    std::printf("%s: products of a micro-step: heuristic's first %.2f ms, best %.2f ms (32 MiB: %.2f ms)\n",
                name, first_ms, best_ms, best_small_ms);
}

void bench_bias(Harness& h, int64_t rows, int64_t cols) {
    DeviceBuffer<floatX> dout(rows * cols);
    fill_random(dout.get(), dout.size(), 7, h.gpu);
    DeviceBuffer<float> dbias(cols), scratch(bias_backward_scratch_floats(rows, cols));
    const double us =
        h.median_us([&] { bias_backward(dbias, scratch, dout, rows, cols, Write::Assign, h.gpu); });
    h.report(text_of("bias_backward rows %d cols %d", int(rows), int(cols)), us,
             double(rows) * cols * sizeof(floatX) + 4.0 * cols);
}

void bench(Harness& h) {
    Matmuls m({.cache_path = ""});
    double ceiling = 0;
    for (const MatmulKey& key : {Matmuls::forward_key(8192, 8192, 8192, MatmulEpilogue::None),
                                 Matmuls::dgrad_key(8192, 8192, 8192, MatmulEpilogue::None)})
        ceiling = std::max(ceiling, tflops(key, timed(m, key, h).us));
    std::printf("large product, 8192 x 8192 x 8192: %.0f TFLOP/s\n", ceiling);
    const int64_t tokens = 65536, chunk = 16384, Vp = 50304;
    bench_model(
        h, "124M", 12,
        {.tokens = tokens, .logit_rows = chunk, .channels = 768, .padded_vocab_size = Vp, .accumulate = true},
        ceiling);
    bench_model(h, "1558M", 48,
                {.tokens = tokens,
                 .logit_rows = chunk,
                 .channels = 1600,
                 .padded_vocab_size = Vp,
                 .accumulate = true},
                ceiling);
    for (int64_t C : {int64_t{768}, int64_t{1600}})
        for (int64_t width : {int64_t{1}, int64_t{3}, int64_t{4}}) bench_bias(h, tokens, width * C);
}

int main(int argc, char** argv) {
    Harness h("matmul", argc, argv);
    if (h.bench) {
        bench(h);
        return h.finish();
    }
    test_plan_text(h);
    test_cache(h);
    test_choosing(h);
    test_measuring(h);
    test_refused(h);
    test_graph(h);
    for (const Shape& s : {Shape{1, 64, 192}, Shape{63, 128, 512}, Shape{200, 64, 64}, Shape{1024, 128, 384},
                           Shape{63, 3072, 768}, Shape{200, 1600, 4800}}) {
        if (h.small && (s.N > 300 || s.C == 3072)) continue;
        // All that tuning may choose from, once.
        const int candidates = s.N == 200 && s.C == 1600 && !h.small ? 32 : 1;
        test_forward(h, s, candidates);
        test_dgrad(h, s, candidates);
        test_wgrad(h, s, MatmulEpilogue::None, candidates);
        test_wgrad(h, s, MatmulEpilogue::Bgrad, candidates);
    }
    test_head(h, 1, 64, 256);
    test_head(h, 63, 128, 384);
    if (!h.small) test_head(h, 200, 768, 50304);
    for (auto [rows, cols] :
         {std::pair<int64_t, int64_t>{1, 64}, {63, 64}, {200, 200}, {1024, 2304}, {33, 6400}, {5000, 768}})
        if (!h.small || rows <= 300) test_bias(h, rows, cols);
    return h.finish();
}
