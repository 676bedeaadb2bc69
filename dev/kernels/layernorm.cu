// Test of llmc/layernorm.cuh against the formulas in double precision; --bench times it.
//
// Bounds are first order in the unit roundoff u of float, with `depth` the most additions an element passes
// through on its way to a sum (Higham, Accuracy and Stability, 4.2: |error| <= depth u sum |terms|), plus the
// rounding of the result to floatX.
#include "llmc/layernorm.cuh"
#include "dev/kernels/harness.h"

namespace {

constexpr double u = kU32;
constexpr size_t kGuard = 64;  // elements after the last that must stay as they were

template <class T>
double value(T x) {
    return static_cast<double>(static_cast<float>(x));
}

std::string name_of(int rows, int C) { return "rows " + std::to_string(rows) + " C " + std::to_string(C); }

// Additions on the way to a row's sum: a lane's elements one after the other, then trees. A lane has C / 32,
// or up to 32 of a short row on 8 lanes.
double row_depth(int C) { return C / 32.0 + 32 + 16; }

// Rows that a sum of plain normal numbers would not test.
enum class Rows { normal, offset, constant, outlier };
const char* const kRowsNames[] = {"normal", "offset 100", "constant", "with an outlier"};

std::vector<floatX> make_rows(Harness& h, Rows kind, int rows, int C) {
    auto x = h.random<floatX>(static_cast<size_t>(rows) * C, 1.0, kind == Rows::offset ? 100.0 : 0.3);
    for (int r = 0; r < rows; r++) {
        floatX* row = &x[static_cast<size_t>(r) * C];
        if (kind == Rows::constant)
            std::fill(row, row + C, static_cast<floatX>(0.3f + static_cast<float>(r)));
        if (kind == Rows::outlier) row[r % C] = static_cast<floatX>(1000.0f);
    }
    return x;
}

struct Forward {
    std::vector<double> out, out_bound, mean, mean_bound, rstd, rstd_bound;
};

Forward reference_forward(const std::vector<floatX>& x, const std::vector<floatX>& weight,
                          const std::vector<floatX>& bias, int rows, int C) {
    Forward f;
    for (int r = 0; r < rows; r++) {
        const floatX* row = &x[static_cast<size_t>(r) * C];
        double sum = 0, magnitude = 0, squares = 0;
        for (int c = 0; c < C; c++) sum += value(row[c]), magnitude += std::fabs(value(row[c]));
        const double mean = sum / C;
        for (int c = 0; c < C; c++) squares += (value(row[c]) - mean) * (value(row[c]) - mean);
        const double variance = squares / C + 1e-5, rstd = 1 / std::sqrt(variance);
        // The sum, then the division. The variance about a mean that is d off is d^2 larger; its terms are
        // squares (2 u from the difference, 1 from the product), its sum's error relative since they are
        // positive; then / C, + eps, sqrt, 1 /.
        const double mean_bound = (row_depth(C) + 1) * u * magnitude / C;
        const double rstd_relative =
            0.5 * ((row_depth(C) + 5) * u + mean_bound * mean_bound / variance) + 2 * u;
        f.mean.push_back(mean), f.mean_bound.push_back(1.01 * mean_bound);
        f.rstd.push_back(rstd), f.rstd_bound.push_back(1.01 * rstd_relative * rstd);
        for (int c = 0; c < C; c++) {
            const double w = value(weight[c]), scaled = (value(row[c]) - mean) * rstd * w,
                         out = scaled + value(bias[c]);
            f.out.push_back(out);
            f.out_bound.push_back(1.01 *
                                  (rstd * std::fabs(w) * mean_bound +
                                   std::fabs(scaled) * (rstd_relative + 3 * u) + std::fabs(out) * (u + kUX)));
        }
    }
    return f;
}

// One forward call on the device: all that it writes, and what lies behind it.
struct ForwardResult {
    std::vector<floatX> residual, out;
    std::vector<float> mean, rstd;
    bool operator==(const ForwardResult& other) const {
        auto same = [](const auto& a, const auto& b) {  // memcmp takes no null pointers, not even for 0 bytes
            return a.size() == b.size() &&
                   (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
        };
        return same(residual, other.residual) && same(out, other.out) && same(mean, other.mean) &&
               same(rstd, other.rstd);
    }
};

void check_forward(Harness& h, const std::string& what, ForwardResult got, const Forward& want) {
    const auto poison = h.to_host(h.poisoned<floatX>(kGuard).get(), kGuard);
    h.same_bits(what + ": nothing written beyond the end", {got.out.end() - kGuard, got.out.end()}, poison);
    got.out.resize(want.out.size());
    h.compare(what, got.out, want.out, {}, want.out_bound);
    h.compare(what + ", mean", got.mean, want.mean, {}, want.mean_bound);
    h.compare(what + ", rstd", got.rstd, want.rstd, {}, want.rstd_bound);
}

void test_forward(Harness& h, Rows kind, int rows, int C) {
    const std::string what = "forward " + name_of(rows, C) + " " + kRowsNames[static_cast<int>(kind)];
    const size_t n = static_cast<size_t>(rows) * C;
    const auto x = make_rows(h, kind, rows, C), weight = h.random<floatX>(C, 0.3, 1.0),
               bias = h.random<floatX>(C);
    auto x_device = h.to_device(x), weight_device = h.to_device(weight), bias_device = h.to_device(bias);
    auto run = [&] {
        auto out = h.poisoned<floatX>(n + kGuard);
        auto mean = h.poisoned<float>(rows), rstd = h.poisoned<float>(rows);
        layernorm_forward(out, mean, rstd, x_device, weight_device, bias_device, rows, C, h.gpu);
        return ForwardResult{
            {}, h.to_host(out.get(), n + kGuard), h.to_host(mean.get(), rows), h.to_host(rstd.get(), rows)};
    };
    const ForwardResult got = run();
    h.check(what + ": again the same bits", got == run());
    check_forward(h, what, got, reference_forward(x, weight, bias, rows, C));

    auto mean = h.poisoned<float>(rows), rstd = h.poisoned<float>(rows);
    layernorm_forward(x_device, mean, rstd, x_device, weight_device, bias_device, rows, C, h.gpu);
    h.same_bits(what + ": in place", h.to_host(x_device.get(), n), {got.out.begin(), got.out.end() - kGuard});
}

void test_residual_forward(Harness& h, int rows, int C) {
    const std::string what = "residual + layernorm " + name_of(rows, C);
    const size_t n = static_cast<size_t>(rows) * C;
    const auto inp1 = h.random<floatX>(n), inp2 = h.random<floatX>(n), weight = h.random<floatX>(C, 0.3, 1.0),
               bias = h.random<floatX>(C);
    auto inp2_device = h.to_device(inp2), weight_device = h.to_device(weight),
         bias_device = h.to_device(bias);
    std::vector<floatX> sum(n);  // one rounding to float and one to floatX: the same bits
    for (size_t i = 0; i < n; i++)
        sum[i] = static_cast<floatX>(static_cast<float>(inp1[i]) + static_cast<float>(inp2[i]));
    auto run = [&](bool in_place, bool fused) {
        auto inp1_device = h.to_device(fused ? inp1 : sum);
        auto residual_device = h.poisoned<floatX>(n), out = h.poisoned<floatX>(n + kGuard);
        auto mean = h.poisoned<float>(rows), rstd = h.poisoned<float>(rows);
        floatX* residual = in_place ? inp1_device.get() : residual_device.get();
        if (fused)
            residual_layernorm_forward(residual, out, mean, rstd, inp1_device, inp2_device, weight_device,
                                       bias_device, rows, C, h.gpu);
        else layernorm_forward(out, mean, rstd, inp1_device, weight_device, bias_device, rows, C, h.gpu);
        return ForwardResult{fused ? h.to_host(residual, n) : sum, h.to_host(out.get(), n + kGuard),
                             h.to_host(mean.get(), rows), h.to_host(rstd.get(), rows)};
    };
    const ForwardResult got = run(false, true);
    h.check(what + ": again the same bits", got == run(false, true));
    h.check(what + ": residual in place of inp1", got == run(true, true));
    h.check(what + ": as the sum, then layernorm", got == run(false, false));
    check_forward(h, what, got, reference_forward(sum, weight, bias, rows, C));
}

struct Backward {
    std::vector<double> dresidual, dresidual_bound, dweight, dbias, dproj_bias, dweight_size, dbias_size,
        dproj_bias_size;
};

// dresidual, and column sums with the sums of their terms' magnitudes. dproj_bias sums what the device wrote.
Backward reference_backward(const std::vector<floatX>& dout, const std::vector<floatX>& x,
                            const std::vector<floatX>& weight, const std::vector<float>& mean,
                            const std::vector<float>& rstd, const std::vector<floatX>& dresidual_before,
                            const std::vector<floatX>& dresidual_got, int rows, int C) {
    Backward b;
    for (auto* column :
         {&b.dweight, &b.dbias, &b.dproj_bias, &b.dweight_size, &b.dbias_size, &b.dproj_bias_size})
        column->resize(C);
    const double depth =
        x128::size + 5 + kLayernormMaxThreads / 32.0;  // a thread's pack, its warp, the block's warps
    std::vector<double> xhat(C), g(C);
    for (int r = 0; r < rows; r++) {
        const size_t at = static_cast<size_t>(r) * C;
        double sum_g = 0, sum_gx = 0, size_g = 0, size_gx = 0;
        for (int c = 0; c < C; c++) {
            xhat[c] = (value(x[at + c]) - value(mean[r])) * value(rstd[r]);
            g[c] = value(dout[at + c]) * value(weight[c]);
            sum_g += g[c], size_g += std::fabs(g[c]);
            sum_gx += g[c] * xhat[c], size_gx += std::fabs(g[c] * xhat[c]);
        }
        for (int c = 0; c < C; c++) {
            const double mean_g = sum_g / C, mean_gx = sum_gx / C,
                         before = dresidual_before.empty() ? 0 : value(dresidual_before[at + c]);
            const double want = before + value(rstd[r]) * (g[c] - mean_g - xhat[c] * mean_gx);
            // g: 1 u; xhat: 2; the means: depth, their terms' 1 and 3, / C; two subtractions, a product or
            // two; the sum with `before`.
            const double size = std::fabs(g[c]) + size_g / C + std::fabs(xhat[c]) * size_gx / C;
            b.dresidual.push_back(want);
            b.dresidual_bound.push_back(
                1.01 * (value(rstd[r]) * u * (depth + 10) * size + std::fabs(want) * (u + kUX)));
            const double dy = value(dout[at + c]), proj = value(dresidual_got[at + c]);
            b.dweight[c] += dy * xhat[c], b.dweight_size[c] += std::fabs(dy * xhat[c]);
            b.dbias[c] += dy, b.dbias_size[c] += std::fabs(dy);
            b.dproj_bias[c] += proj, b.dproj_bias_size[c] += std::fabs(proj);
        }
    }
    return b;
}

struct BackwardCase {
    Write write_dresidual, write_gradients;
    bool with_proj_bias;
    enum { apart, in_dout, in_inp } place = apart;  // where dresidual is written
    const char* name;
};

void test_backward(Harness& h, const BackwardCase& how, int rows, int C) {
    const std::string what = "backward " + name_of(rows, C) + " " + how.name;
    const size_t n = static_cast<size_t>(rows) * C;
    const bool add = how.write_dresidual == Write::Add;
    const auto x = h.random<floatX>(n, 1.0, 0.3), dout = h.random<floatX>(n),
               weight = h.random<floatX>(C, 0.3, 1.0);
    const auto before = add ? h.random<floatX>(n) : std::vector<floatX>();
    const auto gradients_before = h.random<float>(static_cast<size_t>(3) * C);
    std::vector<float> mean, rstd;
    const Forward statistics = reference_forward(x, weight, weight, rows, C);
    for (int r = 0; r < rows; r++) {
        mean.push_back(static_cast<float>(statistics.mean[r]));
        rstd.push_back(static_cast<float>(statistics.rstd[r]));
    }
    auto weight_device = h.to_device(weight);
    auto mean_device = h.to_device(mean), rstd_device = h.to_device(rstd);

    std::vector<floatX> dresidual;
    std::vector<float> gradients;
    for (int run = 0; run < 2; run++) {
        auto x_device = h.to_device(x), dout_device = h.to_device(dout);
        auto own = add ? h.to_device(before) : h.poisoned<floatX>(n);
        auto gradients_device = how.write_gradients == Write::Add
                                    ? h.to_device(gradients_before)
                                    : h.poisoned<float>(gradients_before.size());
        auto scratch = h.poisoned<float>(layernorm_backward_scratch_floats(rows, C, h.gpu));
        floatX* target = how.place == BackwardCase::in_dout  ? dout_device
                         : how.place == BackwardCase::in_inp ? x_device
                                                             : own;
        float* d = gradients_device;
        layernorm_backward(target, {d, d + C, how.with_proj_bias ? d + 2 * C : nullptr}, scratch, dout_device,
                           x_device, weight_device, mean_device, rstd_device, rows, C, how.write_dresidual,
                           how.write_gradients, h.gpu);
        const auto dresidual_now = h.to_host(target, n);
        const auto gradients_now = h.to_host(d, gradients_before.size());
        if (run == 1)
            h.check(what + ": again the same bits",
                    std::memcmp(dresidual.data(), dresidual_now.data(), n * sizeof(floatX)) == 0 &&
                        std::memcmp(gradients.data(), gradients_now.data(),
                                    gradients.size() * sizeof(float)) == 0);
        dresidual = dresidual_now, gradients = gradients_now;
    }

    Backward want = reference_backward(dout, x, weight, mean, rstd, before, dresidual, rows, C);
    h.compare(what + ", dresidual", dresidual, want.dresidual, {}, want.dresidual_bound);
    // A block's rows one after the other, then the finish: every 32nd block, 32 sums, and what was there.
    const double blocks = layernorm_backward_blocks(rows, C, h.gpu),
                 depth = rows / blocks + 2 + blocks / 32 + 32 + 2;
    struct {
        const char* name;
        std::vector<double>&want, &size;
        double term_error;
    } sums[] = {{"dweight", want.dweight, want.dweight_size, 3},
                {"dbias", want.dbias, want.dbias_size, 0},
                {"dproj_bias", want.dproj_bias, want.dproj_bias_size, 0}};
    for (int i = 0; i < (how.with_proj_bias ? 3 : 2); i++) {
        for (int c = 0; c < C && how.write_gradients == Write::Add; c++) {
            sums[i].want[c] += gradients_before[i * C + c];
            sums[i].size[c] += std::fabs(gradients_before[i * C + c]);
        }
        for (double& v : sums[i].size) v *= 1.01 * u * (depth + sums[i].term_error);
        h.compare(what + ", " + sums[i].name, std::vector<float>(&gradients[i * C], &gradients[i * C] + C),
                  sums[i].want, {}, sums[i].size);
    }
}

constexpr BackwardCase kBackwardCases[] = {
    {Write::Assign, Write::Assign, true, BackwardCase::apart, "= ="},
    {Write::Add, Write::Add, true, BackwardCase::apart, "+= +="},
    {Write::Add, Write::Assign, false, BackwardCase::apart, "+= = no projection"},
    {Write::Assign, Write::Add, true, BackwardCase::in_dout, "= += in dout"},
    {Write::Assign, Write::Assign, true, BackwardCase::in_inp, "= = in inp"},
};

// More than 2^31 elements, only where there is memory for them: the last row is right.
void test_beyond_2_31(Harness& h) {
    if (h.gpu.properties.totalGlobalMem < size_t{32} << 30) return;
    const int C = 1600, rows = static_cast<int>((size_t{1} << 31) / C) + 64;
    const auto x = h.random<floatX>(C), weight = h.random<floatX>(C, 0.3, 1.0), bias = h.random<floatX>(C);
    const size_t n = static_cast<size_t>(rows) * C, last = n - C;
    DeviceBuffer<floatX> device(n);
    DeviceBuffer<float> mean(rows), rstd(rows);
    auto weight_device = h.to_device(weight), bias_device = h.to_device(bias);
    fill_zero(device.get(), n, h.gpu);
    copy_to_device(device.get() + last, x.data(), C, h.gpu);
    layernorm_forward(device, mean, rstd, device, weight_device, bias_device, rows, C, h.gpu);
    const Forward want = reference_forward(x, weight, bias, 1, C);
    h.compare("forward, the last of 2^31 + ..", h.to_host(device.get() + last, C), want.out, {},
              want.out_bound);
}

void bench(Harness& h, const std::string& model, int rows, int C) {
    const size_t n = static_cast<size_t>(rows) * C;
    auto a = h.to_device(h.random<floatX>(n)), b = h.to_device(h.random<floatX>(n)),
         c = h.to_device(h.random<floatX>(n));
    auto weight = h.to_device(h.random<floatX>(C)), bias = h.to_device(h.random<floatX>(C));
    DeviceBuffer<floatX> d(n);
    DeviceBuffer<float> mean(rows), rstd(rows), gradients(static_cast<size_t>(3) * C);
    DeviceBuffer<float> scratch(layernorm_backward_scratch_floats(rows, C, h.gpu));
    const double bytes = static_cast<double>(n * sizeof(floatX));
    float* g = gradients;
    auto time = [&](const char* op, double moved, auto f) {
        h.report(std::string(op) + " " + model, h.median_us(f), moved * bytes);
    };
    time("layernorm_forward", 2, [&] { layernorm_forward(d, mean, rstd, a, weight, bias, rows, C, h.gpu); });
    time("residual_layernorm_forward", 4,
         [&] { residual_layernorm_forward(c, d, mean, rstd, a, b, weight, bias, rows, C, h.gpu); });
    time("layernorm_backward =", 3, [&] {
        layernorm_backward(d, {g, g + C, g + 2 * C}, scratch, a, b, weight, mean, rstd, rows, C,
                           Write::Assign, Write::Assign, h.gpu);
    });
    time("layernorm_backward +=", 4, [&] {
        layernorm_backward(c, {g, g + C, g + 2 * C}, scratch, a, b, weight, mean, rstd, rows, C, Write::Add,
                           Write::Add, h.gpu);
    });
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("layernorm", argc, argv);
    if (h.bench) {
        bench(h, "124M, 64 x 1024 x 768", 64 * 1024, 768);
        bench(h, "1558M, 32 x 1024 x 1600", 32 * 1024, 1600);
        return h.finish();
    }
    struct {
        int rows, C;
    } const shapes[] = {{1, 64},  {63, 128},  {1024, 128}, {65, 192},           {200, 768},
                        {1, 768}, {63, 1280}, {65, 1600},  {3, kLayernormMaxC}, {2, kLayernormMaxC / 2 + 64}};
    for (const auto& shape : shapes) {
        if (h.small && shape.rows > 300) continue;
        test_forward(h, Rows::normal, shape.rows, shape.C);
        test_residual_forward(h, shape.rows, shape.C);
        for (const BackwardCase& how : kBackwardCases) test_backward(h, how, shape.rows, shape.C);
    }
    for (int C : {64, 768, 1600})
        for (Rows kind : {Rows::offset, Rows::constant, Rows::outlier}) test_forward(h, kind, 5, C);
    if (!h.small) test_beyond_2_31(h);
    return h.finish();
}
