// Test and bench of llmc/attention_forward.cuh and attention_backward.cuh by mma.sync, and of their _sm90.cuh
// by wgmma (on a GPU of compute capability 9.0, and in the simulator).
//
// The reference is attention in double precision from the same (rounded) inputs. With it goes an error bound
// for every element, made of what the kernels do, u the unit roundoff of floatX (of the P and dS operands and
// of the outputs; none of the former in fp32), v that of fp32, and a = 2 v the error of an addition (tensor
// cores truncate):
//
//     S    s = 64 a max_j sum_d |q_id k_jd| / 8 + 4 v max_j |S_ij| + 2^-22   sum of 64 products, scaling, 2^x
//     P    2 s (numerator and denominator) + T a in forward; L: s + T a + rounding; in backward p = s + L's
//     O    |dO| <= (u + P's) sum_j P_ij |v_jd| + u |O_id|
//     D    d_i   = sum_d |dO_id| (O's bound) + 64 a sum_d |dO_id O_id|
//     dS   e_ij  = |dS_ij| (u + p) + P_ij (64 a sum_d |dO_id v_jd| + d_i)
//     dQ   sum_j e_ij |k_jd| / 8 + T a sum_j |dS_ij k_jd| / 8 + u |dQ_id|;    dK, dV alike
//
// and 1e-30 for numbers below 2^-126, which the kernels take for zeros.
//
// These hold for every element, but are far above typical errors where T is long. So the bf16 build also
// bounds the norm of the error of a whole tensor: roundings to bf16 are independent with variance u^2 / 3 of
// the rounded number at most (it would be that if every mantissa were 1.0), and variances add.
#include "dev/kernels/harness.h"
#include "llmc/attention_backward.cuh"
#include "llmc/attention_forward.cuh"

namespace {

constexpr int kD = 64;
constexpr bool kIsBf16 = sizeof(floatX) == 2;
constexpr double kOperand = kIsBf16 ? kUX : 0;  // rounding of P and dS before they are multiplied
constexpr double kAdd = 2 * kU32;

struct Shape {
    int B, T, NH;
    size_t heads() const { return static_cast<size_t>(B) * NH; }
    size_t out() const { return static_cast<size_t>(B) * T * NH * kD; }
    size_t qkv() const { return 3 * out(); }
    size_t lse() const { return heads() * T; }
    size_t width() const { return static_cast<size_t>(3) * NH * kD; }
    size_t out_at(int head, int t) const {
        return ((head / NH * static_cast<size_t>(T) + t) * NH + head % NH) * kD;
    }
    size_t qkv_at(int which, int head, int t) const {
        return (((head / NH * static_cast<size_t>(T) + t) * 3 + which) * NH + head % NH) * kD;
    }
    std::string text() const {
        return "B " + std::to_string(B) + " T " + std::to_string(T) + " NH " + std::to_string(NH);
    }
};

// A tensor with the error that is allowed in each element, and the variance that is to be expected of it.
struct Bounded {
    std::vector<double> value, bound, variance;
    explicit Bounded(size_t n) : value(n), bound(n), variance(n) {}
    void set(size_t i, double x, double exact_bound, double exact_variance, double u) {
        value[i] = x;
        bound[i] = exact_bound + u * (std::fabs(x) + exact_bound);
        variance[i] = exact_variance + u * u / 3 * x * x;
    }
};

struct Reference {
    Bounded out, lse, dqkv, bias;
    Reference(const Shape& s, const std::vector<floatX>& qkv, const std::vector<floatX>& dout);

  private:
    using Rows = std::vector<double>;  // (T, 64)
    void forward_row(const Shape& s, int head, int i);
    void backward_row(const Shape& s, int head, int i);
    void finish(const Shape& s, int head);
    Rows q, k, v, d_o, p, p_error;
    Rows dk, dk_bound, dk_variance, dv, dv_bound, dv_variance;
};

double dot(const double* a, const double* b) {
    double sum = 0;
    for (int d = 0; d < kD; d++) sum += a[d] * b[d];
    return sum;
}
double dot_abs(const double* a, const double* b) {
    double sum = 0;
    for (int d = 0; d < kD; d++) sum += std::fabs(a[d] * b[d]);
    return sum;
}

// Row i of O and L, and p[j] = P_ij, p_error[i] = the relative error of P_ij that backward makes.
void Reference::forward_row(const Shape& s, int head, int i) {
    double top = -INFINITY, largest = 0, largest_abs = 0, sum = 0;
    for (int j = 0; j <= i; j++) {
        p[j] = dot(&q[i * kD], &k[j * kD]) / 8;
        top = std::max(top, p[j]);
        largest = std::max(largest, std::fabs(p[j]));
        largest_abs = std::max(largest_abs, dot_abs(&q[i * kD], &k[j * kD]) / 8);
    }
    for (int j = 0; j <= i; j++) sum += p[j] = std::exp(p[j] - top);
    for (int j = 0; j <= i; j++) p[j] /= sum;
    const double score_error = 64 * kAdd * largest_abs + 4 * kU32 * largest + 0x1p-22;
    const double sum_error = s.T * kAdd, log2e = 1 / std::log(2.0);
    const double l = top * log2e + std::log2(sum);
    const double lse_error =
        (score_error + sum_error) * log2e + 2 * kU32 * (std::fabs(l) + largest * log2e) + 0x1p-22;
    lse.set(static_cast<size_t>(head) * s.T + i, l, lse_error, 0, 0);
    p_error[i] = std::expm1(score_error + lse_error / log2e);
    for (int d = 0; d < kD; d++) {
        double o = 0, absolute = 0, square = 0;
        for (int j = 0; j <= i; j++) {
            const double x = p[j] * v[j * kD + d];
            o += x, absolute += std::fabs(x), square += x * x;
        }
        const double relative = kOperand + std::expm1(2 * score_error) + 2 * sum_error;
        out.set(s.out_at(head, i) + d, o, relative * absolute, kOperand * kOperand / 3 * square, kUX);
    }
}

// Row i of dQ, and its share of dK and dV.
void Reference::backward_row(const Shape& s, int head, int i) {
    const size_t row = s.out_at(head, i);
    double d_error = 64 * kAdd * dot_abs(&d_o[i * kD], &out.value[row]), d_variance = 0;
    for (int d = 0; d < kD; d++) {
        d_error += std::fabs(d_o[i * kD + d]) * out.bound[row + d];
        d_variance += d_o[i * kD + d] * d_o[i * kD + d] * out.variance[row + d];
    }
    const double D = dot(&d_o[i * kD], &out.value[row]), round = kOperand * kOperand / 3;
    double dq[kD] = {}, dq_bound[kD] = {}, dq_rounding[kD] = {}, mean_k[kD] = {};
    for (int j = 0; j <= i; j++) {
        const double dp = dot(&d_o[i * kD], &v[j * kD]), ds = p[j] * (dp - D);
        const double error =
            std::fabs(ds) * (kOperand + p_error[i]) * (1 + kOperand) +
            p[j] * (64 * kAdd * (dot_abs(&d_o[i * kD], &v[j * kD]) + std::fabs(D)) + d_error) +
            s.T * kAdd * std::fabs(ds);
        for (int d = 0; d < kD; d++) {
            const double kx = k[j * kD + d] / 8, qx = q[i * kD + d] / 8, ox = d_o[i * kD + d];
            dq[d] += ds * kx, dq_bound[d] += error * std::fabs(kx);
            dq_rounding[d] += round * ds * ds * kx * kx, mean_k[d] += p[j] * kx;
            dk[j * kD + d] += ds * qx, dk_bound[j * kD + d] += error * std::fabs(qx);
            dk_variance[j * kD + d] += (round * ds * ds + p[j] * p[j] * d_variance) * qx * qx;
            dv[j * kD + d] += p[j] * ox;
            dv_bound[j * kD + d] += (kOperand + p_error[i] + s.T * kAdd) * p[j] * std::fabs(ox);
            dv_variance[j * kD + d] += round * p[j] * p[j] * ox * ox;
        }
    }
    for (int d = 0; d < kD; d++)
        dqkv.set(s.qkv_at(0, head, i) + d, dq[d], dq_bound[d],
                 dq_rounding[d] + d_variance * mean_k[d] * mean_k[d], kUX);
}

// dK, dV of the head, and what the bias sums: dqkv before its rounding, plus the summation over all rows.
void Reference::finish(const Shape& s, int head) {
    const size_t rows = static_cast<size_t>(s.B) * s.T;
    for (int t = 0; t < s.T; t++)
        for (int d = 0; d < kD; d++) {
            const int i = t * kD + d;
            dqkv.set(s.qkv_at(1, head, t) + d, dk[i], dk_bound[i], dk_variance[i], kUX);
            dqkv.set(s.qkv_at(2, head, t) + d, dv[i], dv_bound[i], dv_variance[i], kUX);
            for (int which = 0; which < 3; which++) {
                const size_t at = s.qkv_at(which, head, t) + d,
                             column = (which * s.NH + head % s.NH) * kD + d;
                const double x = dqkv.value[at];
                bias.value[column] += x;
                bias.bound[column] += dqkv.bound[at] + rows * kAdd * std::fabs(x);
                bias.variance[column] += dqkv.variance[at];
            }
        }
}

Reference::Reference(const Shape& s, const std::vector<floatX>& qkv, const std::vector<floatX>& dout)
    : out(s.out()), lse(s.lse()), dqkv(s.qkv()), bias(s.width()) {
    p.resize(s.T), p_error.resize(s.T);
    for (int head = 0; head < s.B * s.NH; head++) {
        for (Rows* x : {&q, &k, &v, &d_o}) x->resize(static_cast<size_t>(s.T) * kD);
        for (Rows* x : {&dk, &dk_bound, &dk_variance, &dv, &dv_bound, &dv_variance})
            x->assign(static_cast<size_t>(s.T) * kD, 0.0);
        for (int t = 0; t < s.T; t++)
            for (int d = 0; d < kD; d++) {
                q[t * kD + d] = static_cast<float>(qkv[s.qkv_at(0, head, t) + d]);
                k[t * kD + d] = static_cast<float>(qkv[s.qkv_at(1, head, t) + d]);
                v[t * kD + d] = static_cast<float>(qkv[s.qkv_at(2, head, t) + d]);
                d_o[t * kD + d] = static_cast<float>(dout[s.out_at(head, t) + d]);
            }
        for (int i = 0; i < s.T; i++) {
            forward_row(s, head, i);
            backward_row(s, head, i);
        }
        finish(s, head);
    }
}

// Every element within its bound; in bf16 also the norm of the error within what the variances say (the fp32
// parts of the bounds, which the variances leave out, are added).
template <class T>
void compare(Harness& h, const std::string& what, const std::vector<T>& got, const Bounded& want,
             bool check_norm) {
    h.compare(what, got, want.value, Tolerance{.absolute = 1e-30}, want.bound);
    if (!check_norm) return;
    double error = 0, variance = 0, fp32 = 0;
    for (size_t i = 0; i < got.size(); i++) {
        const double x = static_cast<float>(got[i]) - want.value[i], rest = want.bound[i] * (kU32 / kUX) * 64;
        error += x * x, variance += want.variance[i], fp32 += rest * rest;
    }
    char text[160];
    std::snprintf(text, sizeof text, "%s: norm of the error %.3e, at most %.3e", what.c_str(),
                  std::sqrt(error), std::sqrt(variance + fp32));
    h.check(text, error <= variance + fp32);
}

struct Tensors {
    DeviceBuffer<floatX> out, dqkv;
    DeviceBuffer<float> lse, bias, scratch;
};

// A way to compute attention: the kernels' products and how many heads backward walks, or what the program
// gets.
struct Variant {
    const char* name;
    attention::Products products;
    int walked_heads;  // -1: by plan_walked_heads()
};
constexpr Variant kPreferred{"", attention::Products::Preferred, -1};

// wgmma runs in bf16 on compute capability 9.0, for which these programs are built as sm_90a.
bool has_wgmma(const Harness& h) { return kIsBf16 && h.gpu.properties.major == 9; }

std::vector<Variant> variants(const Harness& h, const Shape& s) {
    using attention::Products;
    if (!kIsBf16) return {kPreferred};
    std::vector<Variant> list{{" walked", Products::MmaSync, s.B * s.NH}, {" split", Products::MmaSync, 0}};
    if (has_wgmma(h)) list.push_back({" wgmma", Products::Wgmma, -1});
    return list;
}

// Runs forward and backward into poisoned memory; what the program gets, by the calls that it makes.
Tensors run(Harness& h, const Shape& s, const floatX* qkv, const floatX* dout, const Variant& v,
            const float* bias_before) {
    Tensors t;
    t.out = h.poisoned<floatX>(s.out());
    t.dqkv = h.poisoned<floatX>(s.qkv());
    t.lse = h.poisoned<float>(s.lse());
    t.bias = h.poisoned<float>(s.width());
    t.scratch = h.poisoned<float>(attention_backward_scratch_floats(s.B, s.T, s.NH, h.gpu));
    const Write write = bias_before ? Write::Add : Write::Assign;
    if (bias_before)
        CUDA_CHECK(cudaMemcpyAsync(t.bias.get(), bias_before, t.bias.bytes(), cudaMemcpyDeviceToDevice,
                                   h.gpu.stream));
    if (v.products == attention::Products::Preferred && v.walked_heads < 0) {
        attention_forward(t.out, t.lse, qkv, s.B, s.T, s.NH, h.gpu);
        attention_backward(t.dqkv, t.bias, t.scratch, dout, t.out, qkv, t.lse, s.B, s.T, s.NH, write, h.gpu);
    } else {
        attention::forward(t.out.get(), t.lse, qkv, s.B, s.T, s.NH, h.gpu, v.products);
        attention::backward(t.dqkv.get(), t.bias, t.scratch, dout, t.out.get(), qkv, t.lse, s.B, s.T, s.NH,
                            write, h.gpu, v.products, v.walked_heads);
    }
    return t;
}

void test_against_reference(Harness& h, const Shape& s, double deviation, const std::string& note = "") {
    const std::vector<floatX> qkv = h.random<floatX>(s.qkv(), deviation), dout = h.random<floatX>(s.out());
    const Reference want(s, qkv, dout);
    const DeviceBuffer<floatX> qkv_d = h.to_device(qkv), dout_d = h.to_device(dout);
    for (const Variant& v : variants(h, s)) {
        const std::string name = s.text() + v.name + note;
        const bool check_norm = kIsBf16 && note.empty();
        const Tensors t = run(h, s, qkv_d, dout_d, v, nullptr);
        compare(h, name + " out", h.to_host(t.out.get(), s.out()), want.out, check_norm);
        compare(h, name + " lse", h.to_host(t.lse.get(), s.lse()), want.lse, false);
        compare(h, name + " dqkv", h.to_host(t.dqkv.get(), s.qkv()), want.dqkv, check_norm);
        compare(h, name + " dqkv_bias", h.to_host(t.bias.get(), s.width()), want.bias, check_norm);
    }
}

// The same bits twice, for every variant and what the program gets, and Add adds to what was there.
void test_determinism(Harness& h, const Shape& s) {
    const DeviceBuffer<floatX> qkv = h.to_device(h.random<floatX>(s.qkv())),
                               dout = h.to_device(h.random<floatX>(s.out()));
    const std::vector<float> before = h.random<float>(s.width());
    const DeviceBuffer<float> before_d = h.to_device(before);
    std::vector<Variant> list = variants(h, s);
    if (kIsBf16) {
        list.push_back(kPreferred);
        list.push_back({" one head walked", attention::Products::MmaSync, 1});
    }
    for (const Variant& v : list) {
        const Tensors a = run(h, s, qkv, dout, v, nullptr), b = run(h, s, qkv, dout, v, nullptr);
        const Tensors added = run(h, s, qkv, dout, v, before_d);
        const std::string name = s.text() + v.name + ": ";
        const std::vector<float> bias = h.to_host(a.bias.get(), s.width());
        h.same_bits(name + "out twice", h.to_host(a.out.get(), s.out()), h.to_host(b.out.get(), s.out()));
        h.same_bits(name + "lse twice", h.to_host(a.lse.get(), s.lse()), h.to_host(b.lse.get(), s.lse()));
        h.same_bits(name + "dqkv twice", h.to_host(a.dqkv.get(), s.qkv()), h.to_host(b.dqkv.get(), s.qkv()));
        h.same_bits(name + "dqkv_bias twice", bias, h.to_host(b.bias.get(), s.width()));
        std::vector<float> sum(s.width());
        for (size_t i = 0; i < sum.size(); i++) sum[i] = before[i] + bias[i];
        h.same_bits(name + "dqkv_bias added", h.to_host(added.bias.get(), s.width()), sum);
    }
}

// What comes after position t changes nothing before it, to the bit; where dO is zero from t on, so are the
// gradients.
void test_causality(Harness& h, const Shape& s, int t) {
    std::vector<floatX> qkv = h.random<floatX>(s.qkv()), other = qkv, dout = h.random<floatX>(s.out());
    const std::vector<floatX> noise = h.random<floatX>(s.qkv(), 30.0);
    for (int head = 0; head < s.B * s.NH; head++)
        for (int row = t; row < s.T; row++)
            for (int d = 0; d < kD; d++) {
                for (int which = 0; which < 3; which++)
                    other[s.qkv_at(which, head, row) + d] = noise[s.qkv_at(which, head, row) + d];
                dout[s.out_at(head, row) + d] = static_cast<floatX>(0.0f);
            }
    const DeviceBuffer<floatX> qkv_d = h.to_device(qkv), other_d = h.to_device(other),
                               dout_d = h.to_device(dout);
    for (const Variant& v : variants(h, s)) {
        const Tensors a = run(h, s, qkv_d, dout_d, v, nullptr), b = run(h, s, other_d, dout_d, v, nullptr);
        const auto out_a = h.to_host(a.out.get(), s.out()), out_b = h.to_host(b.out.get(), s.out());
        const auto grad_a = h.to_host(a.dqkv.get(), s.qkv()), grad_b = h.to_host(b.dqkv.get(), s.qkv());
        bool same = true, zero = true;
        for (int head = 0; head < s.B * s.NH; head++)
            for (int row = 0; row < s.T; row++)
                for (int d = 0; d < kD; d++)
                    for (int which = 0; which < 3; which++) {
                        const size_t at = s.qkv_at(which, head, row) + d, out_at = s.out_at(head, row) + d;
                        const float x = static_cast<float>(grad_a[at]), y = static_cast<float>(grad_b[at]);
                        if (row < t) {
                            same = same && x == y;
                            same = same &&
                                   static_cast<float>(out_a[out_at]) == static_cast<float>(out_b[out_at]);
                        } else {
                            zero = zero && x == 0.0f && y == 0.0f;
                        }
                    }
        const std::string name = s.text() + v.name + " from " + std::to_string(t) + ": ";
        h.check(name + "the future changes nothing", same);
        h.check(name + "no gradient after the last dO", zero);
    }
}

// Adding one vector to all keys of a head adds a constant to each row of scores, which softmax forgets. Keys
// and shift lie on a grid that floatX holds exactly; what differs then is the rounding of larger scores, and
// P's roundings that flip.
void test_key_shift(Harness& h, const Shape& s) {
    std::vector<floatX> qkv = h.random<floatX>(s.qkv()), dout = h.random<floatX>(s.out());
    std::vector<floatX> shifted = qkv;
    const std::vector<int> steps = h.random_ints(s.qkv(), 33), shift = h.random_ints(kD, 65);
    for (int head = 0; head < s.B * s.NH; head++)
        for (int t = 0; t < s.T; t++)
            for (int d = 0; d < kD; d++) {
                const size_t at = s.qkv_at(1, head, t) + d;
                const float key = 0.125f * static_cast<float>(steps[at] - 16);
                qkv[at] = static_cast<floatX>(key);
                shifted[at] = static_cast<floatX>(key + 0.125f * static_cast<float>(shift[d] - 32));
            }
    const Reference plain(s, qkv, dout), moved(s, shifted, dout);
    const DeviceBuffer<floatX> shifted_d = h.to_device(shifted), dout_d = h.to_device(dout);
    const Tensors t = run(h, s, shifted_d, dout_d, kPreferred, nullptr);
    Bounded want = plain.out;
    want.bound = moved.out.bound;  // the larger scores' bounds, around the unshifted values
    compare(h, s.text() + " keys shifted: out unchanged", h.to_host(t.out.get(), s.out()), want, false);
}

void test_plan(Harness& h) {
    using attention::plan_walked_heads;
    h.check("plan: few heads are split", plan_walked_heads(48, 264) == 0);
    h.check("plan: 768 heads on 264 blocks, the last wave 91% full, are walked",
            plan_walked_heads(768, 264) == 768);
    h.check("plan: 800 heads on 264 blocks leave 8 to split", plan_walked_heads(800, 264) == 792);
    h.check("plan: whole waves are walked", plan_walked_heads(528, 264) == 528);
}

// Where a head's rows, statistics and bias sums lie, in elements from the tensors' beginnings. No memory is touched.
__global__ void offsets_kernel(int64_t* offsets, const floatX* x, attention::BackwardArguments a, int head,
                               int row, int block) {
    offsets[0] = attention::packed_rows(x, attention::kValue, head, a.T, a.NH).row(row) - x;
    offsets[1] = attention::plain_rows(x, head, a.T, a.NH).row(row) - x;
    offsets[2] = a.stats_of(head) - a.row_stats;
    offsets[3] = a.bias_row(attention::kValue, head, block) - a.bias_partial;
}

// Index arithmetic beyond 2^31 elements: 300,000 sequences, which no GPU holds, but whose offsets it must count.
void test_offsets(Harness& h) {
    constexpr int64_t b = 300000, NH = 12, head_in_sequence = 11, T = 1000, row = 999, block = 7;
    constexpr int64_t blocks = (T + attention::kBlockRows - 1) / attention::kBlockRows;
    DeviceBuffer<int64_t> offsets(4);
    attention::BackwardArguments a{};
    a.T = T, a.NH = NH;
    a.row_stats = reinterpret_cast<float2*>(offsets.get());
    a.bias_partial = reinterpret_cast<float*>(offsets.get());
    launch(offsets_kernel, {1, 1}, h.gpu, offsets.get(), reinterpret_cast<const floatX*>(offsets.get()), a,
           static_cast<int>(b * NH + head_in_sequence), static_cast<int>(row), static_cast<int>(block));
    const std::vector<int64_t> want = {(((b * T + row) * 3 + 2) * NH + head_in_sequence) * kD,
                                       ((b * T + row) * NH + head_in_sequence) * kD,
                                       (b * NH + head_in_sequence) * blocks * attention::kBlockRows,
                                       (((b * blocks + block) * 3 + 2) * NH + head_in_sequence) * kD};
    bool beyond = true;
    for (int64_t offset : want) beyond = beyond && offset > (int64_t{1} << 31);
    h.check("offsets beyond 2^31 elements", beyond && h.to_host(offsets.get(), 4) == want);
}

void test(Harness& h) {
    test_offsets(h);
    for (int T : {1, 2, 63, 64, 65, 127, 128, 129, 200})
        test_against_reference(h, {T < 100 ? 2 : 1, T, T % 2 ? 1 : 2}, 1.0);
    test_against_reference(h, {3, 33, 3}, 1.0);
    test_against_reference(h, {1, 96, 12}, 1.0);
    test_against_reference(h, {1, 300, 1}, 2.0);
    if (!h.small) test_against_reference(h, {1, 1024, 2}, 1.0);
    test_against_reference(h, {1, 129, 2}, 60.0, " scores to 1e4");
    test_against_reference(h, {1, 200, 1}, 0.0, " zeros");
    test_determinism(h, {2, 260, 2});
    test_causality(h, {2, 200, 2}, 77);
    test_causality(h, {1, 256, 1}, 128);
    test_key_shift(h, {1, 150, 2});
    test_plan(h);
}

// ---- bench ------------------------------------------------------------------------------------------------

// FLOP of the products, causal counted half: two products of T x T x 64 forward, five backward (seven in the
// split scheme, of which five count).
void bench(Harness& h, const Shape& s, const char* model) {
    const DeviceBuffer<floatX> qkv = h.to_device(h.random<floatX>(s.qkv())),
                               dout = h.to_device(h.random<floatX>(s.out()));
    const Tensors t = run(h, s, qkv, dout, kPreferred, nullptr);
    const double products = static_cast<double>(s.heads()) * s.T * s.T * kD;
    const double element = sizeof(floatX), n = static_cast<double>(s.out());
    const std::string name = std::string(model) + " " + s.text();
    std::vector<Variant> list = variants(h, s);
    if (kIsBf16) list.insert(list.begin(), kPreferred);
    for (const Variant& v : list) {
        if (v.walked_heads != 0)  // the schemes of mma.sync have one forward
            h.report(name + v.name + " forward", h.median_us([&] {
                attention::forward(t.out.get(), t.lse, qkv.get(), s.B, s.T, s.NH, h.gpu, v.products);
            }),
                     4 * n * element, 2 * products);
        h.report(name + v.name + " backward", h.median_us([&] {
            attention::backward(t.dqkv.get(), t.bias, t.scratch, dout.get(), t.out.get(), qkv.get(), t.lse,
                                s.B, s.T, s.NH, Write::Assign, h.gpu, v.products, v.walked_heads);
        }),
                 8 * n * element, 5 * products);
    }
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("attention", argc, argv);
    if (!h.bench) {
        test(h);
    } else {
        bench(h, {64, 1024, 12}, "124M");
        bench(h, {4, 1024, 12}, "124M");
        bench(h, {32, 1024, 25}, "1558M");
        bench(h, {4, 1024, 25}, "1558M");
    }
    return h.finish();
}
