// Test of llmc/adamw.cuh: every step against the formula in double from the step's own state before, skipped
// steps, the bias correction of any t, decay, pads, offsets, bits.
#include "dev/kernels/update_fixture.h"
#include "llmc/optimizer.cuh"

static constexpr double kLearningRate = 6e-4;

struct Moments {
    std::vector<float> m, v;
};
static Moments moments_of(Harness& h, AdamW& optimizer) {
    Moments moments;
    optimizer.each_state([&](const StateTensor& tensor) {
        (moments.m.empty() ? moments.m : moments.v) = h.to_host(tensor.data, tensor.elements);
    });
    return moments;
}

// One step of the formula in double, and how far fp32 may be from it.
struct Expected {
    std::vector<double> m, v, p, m_error, v_error, p_error;
};
static Expected expected_step(const Arenas& arenas, const Snapshot& before, const Moments& moments, double lr,
                              double t, double c, const AdamW::Options& o) {
    const std::vector<int> owner = arenas.block_of();
    const size_t n = before.master.size();
    Expected e{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n),
               std::vector<double>(n), std::vector<double>(n), std::vector<double>(n)};
    const double bias1 = 1 - std::pow(o.beta1, t), bias2 = 1 - std::pow(o.beta2, t), u = kU32;
    for (size_t i = 0; i < n; i++) {
        e.m[i] = moments.m[i], e.v[i] = moments.v[i], e.p[i] = before.master[i];
        if (owner[i] < 0) continue;
        const double g = c * before.gradient[i];
        const double lr_decay = arenas.blocks[owner[i]].rows > 1 ? lr * o.weight_decay : 0;
        const double m_keep = o.beta1 * e.m[i], m_take = (1 - o.beta1) * g;
        e.m[i] = m_keep + m_take;
        // Each term: its constant is rounded to float (u), the product (u); g itself once more; the sum (u).
        e.m_error[i] = u * (3 * std::fabs(m_keep) + 4 * std::fabs(m_take)) + 0x1p-148;
        e.v[i] = o.beta2 * e.v[i] + (1 - o.beta2) * g * g;
        // Terms are positive; the worse is (1 - beta2) (c g)^2: 2 for g, 1 for its square, 2 for the factor,
        // 1 for the sum.
        e.v_error[i] = 6 * u * e.v[i] + 0x1p-148;
        const double denominator = std::sqrt(e.v[i]) / std::sqrt(bias2) + o.eps, step_size = lr / bias1;
        const double step = step_size * e.m[i] / denominator;
        // sqrt(v): 3 u from v, 1 its own; root_factor and its product 2; eps and the sum 2: 8. Then the
        // quotient 1, step_size 1, and the last multiply-add rounds p, as the decay's does; lr_decay is
        // rounded too.
        e.p_error[i] = step_size * e.m_error[i] / denominator + 11 * u * std::fabs(step) +
                       u * lr_decay * std::fabs(e.p[i]) + 2 * u * (std::fabs(e.p[i]) + std::fabs(step));
        e.p[i] = e.p[i] * (1 - lr_decay) - step;
    }
    return e;
}

// Runs one step and compares it with the formula.
static void check_step(Harness& h, const std::string& name, Arenas& arenas, AdamW& optimizer, double lr,
                       double clip) {
    const Moments moments_before = moments_of(h, optimizer);
    const StepState state = arenas.norm(clip);
    const Snapshot before = arenas.snapshot();
    optimizer.step(arenas.update(lr), h.gpu);
    const Snapshot after = arenas.snapshot();
    const Moments moments = moments_of(h, optimizer);
    const double t = static_cast<double>(state.applied_updates) + 1;
    const double c = clip > 0 && state.grad_norm > clip ? clip / state.grad_norm : 1;
    const Expected e = expected_step(arenas, before, moments_before, lr, t, c, optimizer.options());
    h.compare(name + ", m", moments.m, e.m, {}, e.m_error);
    h.compare(name + ", v", moments.v, e.v, {}, e.v_error);
    h.compare(name + ", master", after.master, e.p, {}, e.p_error);
    h.check(name + ": weights are the master rounded, pads untouched, one update counted",
            arenas.weights_are_rounded(after) && arenas.pads_are_untouched(after) &&
                after.state.applied_updates == state.applied_updates + 1 && after.state.gains_ready == 0);
}

static void test_steps(Harness& h, const NamedBlocks& shape, double clip) {
    Arenas arenas(h, shape.blocks);
    AdamW optimizer({}, arenas.blocks, h.gpu);
    for (int step = 1; step <= 4; step++) {
        arenas.set_gradient(arenas.random_gradient(step == 3 ? 1e-7 : 1e-3));
        const std::string name = shape.name + (clip > 0 ? ", clip" : "") + ", step " + std::to_string(step);
        check_step(h, name, arenas, optimizer, kLearningRate / step, clip);
    }
}

// t is whatever the state says, so a run may be resumed; the corrections fade out without loss.
static void test_bias_correction(Harness& h) {
    for (const uint64_t applied : {uint64_t{1}, uint64_t{999}, uint64_t{599999}, uint64_t{1} << 40}) {
        Arenas arenas(h, TensorTable({1, 64, 1, 65, 63}).blocks());
        AdamW optimizer({kLearningRate, 0.1, 0.9, 0.999, 1e-8}, arenas.blocks, h.gpu);
        StepState state{};
        state.applied_updates = applied;
        arenas.set_state(state);
        arenas.set_gradient(arenas.random_gradient());
        check_step(h, "t = " + std::to_string(applied + 1), arenas, optimizer, kLearningRate, 1);
    }
    for (const double beta : {0.0, 0.999999}) {
        Arenas arenas(h, TensorTable({1, 64, 1, 65, 63}).blocks());
        AdamW optimizer({kLearningRate, 0.1, beta, beta, 1e-8}, arenas.blocks, h.gpu);
        arenas.set_gradient(arenas.random_gradient());
        check_step(h, "both betas " + std::to_string(beta), arenas, optimizer, kLearningRate, 0);
    }
}

static void test_decay(Harness& h) {
    Arenas arenas(h, TensorTable({1, 64, 1, 65, 63}).blocks());
    AdamW optimizer({kLearningRate, 0.1, 0.9, 0.95, 1e-8}, arenas.blocks, h.gpu);
    std::vector<float> zero(arenas.Np, 0.0f);
    arenas.for_pads([&](size_t i) { zero[i] = NAN; });
    arenas.set_gradient(zero);
    arenas.norm(1);
    const Snapshot before = arenas.snapshot();
    optimizer.step(arenas.update(kLearningRate), h.gpu);
    const Snapshot after = arenas.snapshot();
    bool vectors_kept = true, matrices_decay = true;
    const std::vector<int> owner = arenas.block_of();
    for (size_t i = 0; i < arenas.Np; i++) {
        if (owner[i] < 0) continue;
        const double p0 = before.master[i], want = p0 * (1 - kLearningRate * 0.1);
        if (arenas.blocks[owner[i]].rows == 1)
            vectors_kept = vectors_kept && after.master[i] == before.master[i];
        else  // the rounding of p, and that of lr wd
            matrices_decay =
                matrices_decay && std::fabs(after.master[i] - want) <= kU32 * std::fabs(p0) * 1.001;
    }
    h.check("zero gradient: vectors keep every bit", vectors_kept);
    h.check("zero gradient: tensors of two dimensions are times 1 - lr wd", matrices_decay);
}

// Bad steps between good ones leave no trace: the same bits as without them.
static void test_skip(Harness& h) {
    const std::vector<TensorBlock> blocks = TensorTable({1, 64, 1, 65, 63}).blocks();
    Arenas clean(h, blocks), dirty(h, blocks);
    dirty.set_master(clean.snapshot().master);
    AdamW a({}, blocks, h.gpu), b({}, blocks, h.gpu);
    for (int step = 0; step < 3; step++) {
        const std::vector<float> good = clean.random_gradient();
        for (const float bad : {NAN, INFINITY}) {
            std::vector<float> gradient = good;
            gradient[gradient.size() - 1] = bad;
            dirty.set_gradient(gradient);
            const Snapshot before = dirty.snapshot();
            const std::vector<float> state_before = state_of(h, b);
            dirty.norm(1);
            b.step(dirty.update(kLearningRate), h.gpu);
            const Snapshot after = dirty.snapshot();
            h.check("skipped step: no bit changes, no update counted",
                    equal_bits(before.master, after.master) && equal_bits(before.weights, after.weights) &&
                        equal_bits(state_before, state_of(h, b)) &&
                        before.state.applied_updates == after.state.applied_updates);
        }
        dirty.set_gradient(good);
        dirty.norm(1, NAN);
        b.step(dirty.update(kLearningRate), h.gpu);
        for (Arenas* arenas : {&clean, &dirty}) {
            arenas->set_gradient(good);
            arenas->norm(1);
        }
        a.step(clean.update(kLearningRate), h.gpu);
        b.step(dirty.update(kLearningRate), h.gpu);
    }
    const Snapshot x = clean.snapshot(), y = dirty.snapshot();
    h.check("good steps between skipped ones: the same bits as without them",
            equal_bits(x.master, y.master) && equal_bits(x.weights, y.weights) &&
                equal_bits(state_of(h, a), state_of(h, b)) && x.state.applied_updates == 3 &&
                y.state.applied_updates == 3);
}

// The update at offsets beyond 2^33 gives the same bits as at 0.
static void test_offsets(Harness& h) {
    const std::vector<BlockShape> shapes = {{130, 65, 192}, {1, 8256}, {3, 4096}};
    const size_t origin = (size_t{1} << 33) + 64;
    Arenas near(h, block_list(shapes)), far(h, block_list(shapes, origin), origin);
    far.set_master(near.snapshot().master);
    const std::vector<float> gradient = near.random_gradient();
    std::vector<std::vector<float>> states;
    for (Arenas* arenas : {&near, &far}) {
        DeviceBuffer<float> moments(2 * arenas->Np);
        DeviceBuffer<AdamWFactors> factors(1);
        fill_zero(moments.get(), moments.size(), h.gpu);
        arenas->set_gradient(gradient);
        arenas->norm(1);
        float* m = moments.get() - arenas->origin;
        adamw_update(arenas->update(kLearningRate), m, m + arenas->Np, factors, 0.9, 0.95, 1e-8, 0.1, h.gpu);
        states.push_back(h.to_host(moments.get(), moments.size()));
    }
    const Snapshot a = near.snapshot(), b = far.snapshot();
    h.check("offsets beyond 2^33: the same bits", equal_bits(a.master, b.master) &&
                                                      equal_bits(a.weights, b.weights) &&
                                                      equal_bits(states[0], states[1]));
}

static void test_options(Harness& h) {
    const std::vector<TensorBlock> blocks = TensorTable({1, 64, 1, 65, 63}).blocks();
    auto dies = [&](const std::string& word, const AdamW::Options& options) {
        const ChildResult result = in_child([&] { AdamW::check_options(options, blocks); });
        h.check("refused, and named: " + word,
                result.status == 1 && result.text.find(word) != std::string::npos);
    };
    dies("--beta1", {6e-4, 0.1, 1.0, 0.95, 1e-8});
    dies("--beta1", {6e-4, 0.1, NAN, 0.95, 1e-8});
    dies("--beta2", {6e-4, 0.1, 0.9, -0.1, 1e-8});
    dies("--eps", {6e-4, 0.1, 0.9, 0.95, 0});
    dies("--learning-rate", {0, 0.1, 0.9, 0.95, 1e-8});
    dies("--weight-decay", {6e-4, -1, 0.9, 0.95, 1e-8});
    dies("--weight-decay", {2, 0.5, 0.9, 0.95, 1e-8});
    const ChildResult fine = in_child([&] { AdamW::check_options({}, blocks); });
    h.check("the defaults pass without a word", fine.status == 0 && fine.text.empty());
    Options flags;
    flags.learning_rate = 1, flags.weight_decay = 2, flags.beta1 = 3, flags.beta2 = 4, flags.eps = 5;
    const AdamW::Options o = AdamW::Options::from(flags);
    h.check("every option comes from its flag",
            o.learning_rate == 1 && o.weight_decay == 2 && o.beta1 == 3 && o.beta2 == 4 && o.eps == 5);
    const size_t Np = arena_elements(blocks);
    AdamW optimizer({}, blocks, h.gpu);
    size_t bytes = 0;
    optimizer.each_state([&](const StateTensor& tensor) { bytes += tensor.bytes(); });
    h.check("state is 8 bytes a padded parameter",
            bytes == 8 * Np && AdamW::state_bytes({}, Np, blocks.size()) == bytes);
    h.check("nothing to report", !optimizer.observe(StepState{}, h.gpu));
}

static void bench(Harness& h, const std::string& name, const ModelShape& shape) {
    const TensorTable parameters(shape);
    DeviceTable table(parameters.blocks(), h.gpu);
    const size_t Np = parameters.padded_parameters();
    const double N = static_cast<double>(parameters.parameters());
    constexpr bool kMixed = !std::is_same_v<floatX, float>;
    DeviceBuffer<floatX> weights(kMixed ? Np : 0);
    DeviceBuffer<float> master(Np), gradient(Np);
    DeviceBuffer<StepState> state(1);
    AdamW optimizer({}, parameters.blocks(), h.gpu);
    const std::vector<float> some = h.random<float>(size_t{1} << 20, 1e-3);
    for (float* arena : {master.get(), gradient.get()})
        for (size_t at = 0; at < Np; at += some.size())
            copy_to_device(arena + at, some.data(), std::min(some.size(), Np - at), h.gpu);
    fill_zero(state.get(), 1, h.gpu);
    const StepState ready{0, 0, 0, 1, Skip::None, 0};
    copy_to_device(state.get(), &ready, 1, h.gpu);
    h.gpu.synchronize();
    const double bytes = kMixed ? 30 : 28;
    const double us = h.median_us(
        [&] {
            optimizer.step({weights, master, gradient, state, &table, kLearningRate}, h.gpu);
        },
        30);
    h.report("AdamW " + name + ", " + std::to_string(static_cast<int>(bytes)) + " bytes a parameter", us,
             bytes * N);
}

int main(int argc, char** argv) {
    Harness h("adamw", argc, argv);
    if (h.bench) {
        bench(h, "124M", {12, 768, 12, 50257, 1024});
        bench(h, "1558M", {48, 1600, 25, 50257, 1024});
        return h.finish();
    }
    for (const NamedBlocks& shape : test_shapes())
        for (const double clip : {0.0, 0.05}) test_steps(h, shape, clip);
    test_bias_correction(h);
    test_decay(h);
    test_skip(h);
    test_offsets(h);
    test_options(h);
    return h.finish();
}
