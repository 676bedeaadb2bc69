// Test of llmc/grad_norm.cuh: the norm against long double, every decision of the step state, pads, offsets,
// bits.
#include "dev/kernels/update_fixture.h"

// Longest chain of additions that a term of the sum goes through, times u: the relative error of a sum of
// squares, one rounding for the square included. A thread adds its share of a chunk, a block 10 levels of a
// tree, a thread of the last kernel its share of the chunks, 10 levels more.
static double sum_bound(size_t num_chunks) {
    const double chain = kChunkElements / kChunkThreads + 10 + std::ceil(num_chunks / 1024.0) + 10 + 1;
    return chain * unit_roundoff<double>();
}

static double norm_of(const Arenas& arenas, const std::vector<float>& gradient) {
    long double sum = 0;
    const std::vector<int> owner = arenas.block_of();
    for (size_t i = 0; i < gradient.size(); i++)
        if (owner[i] >= 0) sum += static_cast<long double>(gradient[i]) * gradient[i];
    return static_cast<double>(std::sqrt(sum));
}

static void check_norm(Harness& h, Arenas& arenas, const std::string& name,
                       const std::vector<float>& gradient) {
    arenas.set_gradient(gradient);
    const double want = norm_of(arenas, gradient);
    const StepState state = arenas.norm(0);
    // The root halves the sum's relative error and adds one rounding; one more for the reference's own.
    const double allowed = want * (sum_bound(arenas.table().chunks.size()) / 2 + 2 * unit_roundoff<double>());
    h.check(name + ": norm, error " + std::to_string(std::fabs(state.grad_norm - want) / (want * 0x1p-53)) +
                " u of " + std::to_string(allowed / (want * 0x1p-53)),
            std::fabs(state.grad_norm - want) <= allowed);
    h.check(name + ": applied, no clipping, loss kept",
            state.apply() && state.clip_factor == 1 && state.loss == 3.0f);
}

static void test_shape(Harness& h, const NamedBlocks& shape) {
    Arenas arenas(h, shape.blocks);
    const std::vector<float> gradient = arenas.random_gradient();
    check_norm(h, arenas, shape.name, gradient);
    for (const double scale : {0x1p66, 0x1p-90}) {  // squares beyond the range of a float
        std::vector<float> scaled = gradient;
        for (float& g : scaled) g *= static_cast<float>(scale);
        check_norm(h, arenas, shape.name + (scale > 1 ? ", times 2^66" : ", times 2^-90"), scaled);
    }
    arenas.set_gradient(gradient);
    const StepState first = arenas.norm(1), again = arenas.norm(1);
    h.check(shape.name + ": the same bits twice", std::memcmp(&first, &again, sizeof(first)) == 0);
}

static void test_clip(Harness& h) {
    Arenas arenas(h, TensorTable({1, 64, 1, 65, 63}).blocks());
    arenas.set_gradient(arenas.random_gradient());
    const double norm = arenas.norm(0).grad_norm;
    h.check("clip above the norm: factor 1", arenas.norm(norm * 1.001).clip_factor == 1);
    h.check("clip at the norm: factor 1", arenas.norm(norm).clip_factor == 1);
    for (const double clip : {norm / 1.001, norm / 3, norm * 1e-6}) {
        const double error = std::fabs(arenas.norm(clip).clip_factor / (clip / norm) - 1);
        const double allowed = kU32 + 2 * unit_roundoff<double>();
        h.check("clip below the norm: clip / G rounded to float", error <= allowed);
    }
}

static void test_skip(Harness& h) {
    Arenas arenas(h, TensorTable({1, 64, 1, 65, 63}).blocks());
    const std::vector<float> good = arenas.random_gradient();
    StepState before{};
    before.applied_updates = 41;
    before.gains_ready = 1;
    arenas.set_state(before);
    const size_t last = arenas.Np - 1;
    auto with = [&](size_t at, float value) {
        std::vector<float> gradient = good;
        gradient[at] = value;
        arenas.set_gradient(gradient);
    };
    auto expect = [&](const std::string& what, const StepState& state, Skip skip) {
        h.check(what, state.skip == skip && state.apply() == (skip == Skip::None) &&
                          state.applied_updates == 41 && state.gains_ready == 1 &&
                          (skip == Skip::None || state.clip_factor == 1));
    };
    for (const float bad : {NAN, INFINITY, -INFINITY})
        for (const size_t at : {size_t{0}, last}) {
            with(at, bad);
            expect("gradient " + std::to_string(bad) + " at " + std::to_string(at) + ": skipped",
                   arenas.norm(1), Skip::GradientNorm);
        }
    arenas.set_gradient(good);
    for (const float bad : {NAN, INFINITY, -INFINITY})
        expect("loss " + std::to_string(bad) + ": skipped", arenas.norm(1, bad), Skip::Loss);
    with(last, 3e38f);
    expect("gradient 3e38, no clipping: a finite norm, applied", arenas.norm(0), Skip::None);
    expect("gradient 3e38, clip 1e-3: the factor underflows, skipped", arenas.norm(1e-3), Skip::GradientNorm);
    arenas.set_gradient(good);
    expect("a good step after bad ones: applied", arenas.norm(1), Skip::None);
    std::vector<float> zero(arenas.Np, 0.0f);
    arenas.set_gradient(zero);
    const StepState state = arenas.norm(1);
    expect("zero gradient: the norm is 0, applied", state, Skip::None);
    h.check("zero gradient: norm 0, factor 1", state.grad_norm == 0 && state.clip_factor == 1);
}

// The same gradient at offsets beyond 2^33 gives the same bits: no 32-bit arithmetic on the way.
static void test_offsets(Harness& h) {
    const std::vector<BlockShape> shapes = {{130, 65, 192}, {1, 8256}, {3, 4096}};
    const size_t origin = (size_t{1} << 33) + 64;
    Arenas near(h, block_list(shapes)), far(h, block_list(shapes, origin), origin);
    const std::vector<float> gradient = near.random_gradient();
    near.set_gradient(gradient);
    far.set_gradient(gradient);
    const StepState a = near.norm(1), b = far.norm(1);
    h.check("offsets beyond 2^33: the same bits", std::memcmp(&a, &b, sizeof(a)) == 0 && a.grad_norm > 0);
}

static void bench(Harness& h, const std::string& name, const ModelShape& shape) {
    const TensorTable parameters(shape);
    DeviceTable table(parameters.blocks(), h.gpu);
    const size_t Np = parameters.padded_parameters();
    DeviceBuffer<float> gradient(Np), loss(1);
    DeviceBuffer<StepState> state(1);
    DeviceBuffer<double> partial(table.chunks.size());
    const std::vector<float> some = h.random<float>(size_t{1} << 20, 1e-3);
    for (size_t at = 0; at < Np; at += some.size())
        copy_to_device(gradient.get() + at, some.data(), std::min(some.size(), Np - at), h.gpu);
    fill_zero(loss.get(), 1, h.gpu);
    fill_zero(state.get(), 1, h.gpu);
    const double us = h.median_us([&] { grad_norm(state, partial, gradient, loss, table, 1.0, h.gpu); });
    h.report("norm " + name + ", 4 bytes a parameter", us, 4.0 * parameters.parameters());
}

int main(int argc, char** argv) {
    Harness h("grad_norm", argc, argv);
    if (h.bench) {
        bench(h, "124M", {12, 768, 12, 50257, 1024});
        bench(h, "1558M", {48, 1600, 25, 50257, 1024});
        return h.finish();
    }
    for (const NamedBlocks& shape : test_shapes()) test_shape(h, shape);
    test_clip(h);
    test_skip(h);
    test_offsets(h);
    return h.finish();
}
