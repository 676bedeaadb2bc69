// Test of llmc/sgd_sai.cuh: g-SNR against the authors' formula in long double, gains, every step against the
// formula in double from the step's own state before, and the method's own tests: units (T2), scale (T5),
// degenerate blocks (T6), state bytes (T7), the first step (T8), clipping (T9); skipped steps, checkpoints,
// offsets, bits.
#include "dev/kernels/update_fixture.h"
#include "llmc/optimizer.cuh"

static constexpr double kLearningRate = 3e-3, kEps = 1e-8;

static std::vector<TensorBlock> small_gpt2() { return TensorTable({2, 128, 2, 300, 200}).blocks(); }

static SgdSai::Options with_gain(const std::string& gain, double momentum = 0.9, double weight_decay = 0.02) {
    SgdSai::Options options;
    options.gain = gain, options.momentum = momentum, options.weight_decay = weight_decay;
    if (gain == "normalized") options.learning_rate = 1;  // in its own units, else the constructor warns
    return options;
}

// One step through the arenas, as the training loop makes it. What observe() gave with this step's state.
static std::optional<GainReport> run_step(Harness& h, Arenas& arenas, SgdSai& optimizer,
                                          const std::vector<float>& gradient, double lr, double clip) {
    arenas.set_gradient(gradient);
    arenas.norm(clip);
    optimizer.step(arenas.update(lr), h.gpu);
    return optimizer.observe(arenas.state_cpu(), h.gpu);
}

// norm(g) / (std(g) + eps) of the authors' program, two passes over the clipped gradient of one block.
static double authors_gsnr(const std::vector<float>& gradient, size_t begin, size_t n, double c, double eps) {
    long double sum = 0, squares = 0, spread = 0;
    for (size_t i = begin; i < begin + n; i++) sum += static_cast<long double>(c) * gradient[i];
    const long double mean = sum / n;
    for (size_t i = begin; i < begin + n; i++) {
        const long double g = static_cast<long double>(c) * gradient[i];
        squares += g * g, spread += (g - mean) * (g - mean);
    }
    return static_cast<double>(std::sqrt(squares) / (std::sqrt(spread / (n - 1)) + eps));
}

// The relative error that block_gsnr may have. Sums of n terms in chains of at most 32 + 10 + chunks / 32 + 5
// additions: S2 - S1^2 / n is off by at most (chain + 3) u64 (S2 + S1^2 / n) <= 2 (chain + 3) u64 S2; the
// variance's relative error is that over (n - 1) var, and S2 / ((n - 1) var) is about gsnr^2 / n. The result
// is rounded to float, as c was.
static double gsnr_bound(double gsnr, size_t n) {
    const double chain = kChunkElements / kChunkThreads + 10 + std::ceil(n / double{kChunkElements} / 32) + 5;
    const double variance =
        2 * (chain + 3) * unit_roundoff<double>() * gsnr * gsnr / static_cast<double>(n - 1);
    return 2 * kU32 + variance + chain * unit_roundoff<double>();
}

static void test_gsnr(Harness& h, const NamedBlocks& shape, double clip) {
    Arenas arenas(h, shape.blocks);
    SgdSai optimizer(with_gain("raw"), arenas.blocks, h.gpu);
    std::vector<float> gradient = arenas.random_gradient();
    for (size_t b = 0; b < arenas.blocks.size(); b += 3)  // a mean, so that the variance isn't S2 / n
        for (size_t i = 0; i < arenas.blocks[b].n; i++) gradient[arenas.blocks[b].offset + i] += 2e-3f;
    const std::optional<GainReport> report = run_step(h, arenas, optimizer, gradient, kLearningRate, clip);
    const std::string name = shape.name + (clip > 0 ? ", clip" : "") + ": ";
    if (!h.check(name + "a report after the first step, a row a tensor",
                 report && report->rows.size() == arenas.blocks.size()))
        return;
    const double c = arenas.state_cpu().clip_factor;
    h.check(name + "clipping as meant", (c < 1) == (clip > 0));
    std::vector<float> got;
    std::vector<double> want, allowed;
    float largest = 0;
    bool rows_match = true;
    for (size_t b = 0; b < arenas.blocks.size(); b++) {
        const TensorBlock& block = arenas.blocks[b];
        const GainRow& row = report->rows[b];
        rows_match = rows_match && row.tensor == block.hf_name && row.type == block.name &&
                     row.n == block.n && !row.zero && row.gain == row.gsnr;
        largest = std::max(largest, row.gsnr);
        got.push_back(row.gsnr);
        want.push_back(block.n == 1 ? 1 : authors_gsnr(gradient, block.offset, block.n, c, kEps));
        allowed.push_back(block.n == 1 ? 0 : want.back() * gsnr_bound(want.back(), block.n));
    }
    h.compare(name + "g-SNR of the authors' formula", got, want, {}, allowed);
    h.check(name + "rows and largest", rows_match && report->largest_gsnr == largest);
    h.check(name + "no second report", !optimizer.observe(arenas.state_cpu(), h.gpu));
}

static double gain_wanted(const std::string& rule, const GainRow& row, float largest) {
    if (rule == "raw") return row.gsnr;
    if (rule == "normalized") return static_cast<double>(row.gsnr) / largest;
    return rule == "sqrt_n" ? std::sqrt(static_cast<double>(row.n)) : 1.0;
}

// Steps against the formula in double. The gains are the report's, which test_gsnr and this check.
static void test_steps(Harness& h, const NamedBlocks& shape, const std::string& rule, double momentum,
                       double clip) {
    const double wd = 0.02;
    Arenas arenas(h, shape.blocks);
    SgdSai optimizer(with_gain(rule, momentum, wd), arenas.blocks, h.gpu);
    const std::vector<int> owner = arenas.block_of();
    std::vector<double> gain(arenas.blocks.size());
    for (int step = 1; step <= 3; step++) {
        const std::string name = shape.name + ", " + rule + ", mu " + option_text(momentum) +
                                 (clip > 0 ? ", clip" : "") + ", step " + std::to_string(step);
        const double lr = kLearningRate / step;
        const std::vector<float> gradient = arenas.random_gradient();
        const Snapshot before = arenas.snapshot();
        const std::vector<float> state_before = state_of(h, optimizer);
        const std::optional<GainReport> report = run_step(h, arenas, optimizer, gradient, lr, clip);
        const Snapshot after = arenas.snapshot();
        const std::vector<float> state = state_of(h, optimizer);
        if (step == 1) {
            bool ok = report.has_value();
            for (size_t b = 0; ok && b < gain.size(); b++) {
                gain[b] = gain_wanted(rule, report->rows[b], report->largest_gsnr);
                ok = std::fabs(report->rows[b].gain - gain[b]) <= kU32 * gain[b];
            }
            h.check(name + ", gains", ok);
        } else {
            bool kept = !report;
            for (size_t b = 0; b < gain.size(); b++)
                kept = kept &&
                       state[state.size() - gain.size() + b] == state_before[state.size() - gain.size() + b];
            h.check(name + ", g-SNRs are not measured again", kept);
        }
        const double c = clip > 0 && after.state.grad_norm > clip ? clip / after.state.grad_norm : 1,
                     u = kU32;
        std::vector<double> m_want(arenas.Np), p_want(arenas.Np), m_error(arenas.Np), p_error(arenas.Np);
        for (size_t i = 0; i < arenas.Np; i++) {
            p_want[i] = before.master[i], m_want[i] = momentum > 0 ? state_before[i] : 0;
            if (owner[i] < 0) continue;
            const bool first = step == 1 || momentum == 0;
            const double g = c * gradient[i], keep = first ? 0 : momentum * m_want[i],
                         take = first ? g : (1 - momentum) * g;
            m_want[i] = keep + take;
            // Constants, products and the sum round once each, g twice before.
            m_error[i] = u * (3 * std::fabs(keep) + 5 * std::fabs(take)) + 0x1p-148;
            const double lr_decay = arenas.blocks[owner[i]].rows > 1 ? lr * wd : 0,
                         lr_gain = lr * gain[owner[i]];
            const double p0 = p_want[i], move = lr_gain * m_want[i];
            p_want[i] = p0 * (1 - lr_decay) - move;
            // lr, the gain and their product round, and each multiply-add its result.
            p_error[i] = lr_gain * m_error[i] + 3 * u * std::fabs(move) + u * lr_decay * std::fabs(p0) +
                         u * (std::fabs(p0) + std::fabs(p_want[i]));
        }
        if (momentum > 0)
            h.compare(name + ", momentum", std::vector<float>(state.begin(), state.begin() + arenas.Np),
                      m_want, {}, m_error);
        h.compare(name + ", master", after.master, p_want, {}, p_error);
        h.check(name + ": weights are the master rounded, pads untouched, one update counted, gains ready",
                arenas.weights_are_rounded(after) && arenas.pads_are_untouched(after) &&
                    after.state.applied_updates == static_cast<uint64_t>(step) &&
                    after.state.gains_ready == 1);
    }
}

// T2: raw (lr, wd) and normalized (M lr, wd / M) are one trajectory, to rounding.
static void test_units(Harness& h) {
    const int steps = 6;
    const double wd = 0.5, lr = kLearningRate;
    Arenas raw_arenas(h, small_gpt2()), normalized_arenas(h, small_gpt2());
    normalized_arenas.set_master(raw_arenas.snapshot().master);
    const std::vector<float> first_gradient = raw_arenas.random_gradient();
    SgdSai raw(with_gain("raw", 0.9, wd), raw_arenas.blocks, h.gpu);
    const std::optional<GainReport> report = run_step(h, raw_arenas, raw, first_gradient, lr, 1);
    const double M = report->largest_gsnr;
    SgdSai normalized(with_gain("normalized", 0.9, wd / M), normalized_arenas.blocks, h.gpu);
    run_step(h, normalized_arenas, normalized, first_gradient, M * lr, 1);
    // A step rounds p twice (u |p| each, at most), and in one unit or the other lr, wd lr, gain and lr gain.
    // Where p hardly changes in size, the two runs are apart by steps x (2 x 2 u |p| + 2 x 4 u x the step's
    // move).
    const std::vector<int> owner = raw_arenas.block_of();
    std::vector<double> allowed(raw_arenas.Np, 0.0);
    std::vector<float> previous = raw_arenas.snapshot().master;
    std::vector<float> largest_p(raw_arenas.Np, 0.0f);
    for (int step = 1; step <= steps; step++) {
        if (step > 1) {
            const std::vector<float> gradient = raw_arenas.random_gradient();
            run_step(h, raw_arenas, raw, gradient, lr, 1);
            run_step(h, normalized_arenas, normalized, gradient, M * lr, 1);
        }
        const std::vector<float> master = raw_arenas.snapshot().master;
        for (size_t i = 0; i < master.size(); i++) {
            const double p = std::max(std::fabs(master[i]), std::fabs(previous[i]));
            allowed[i] += kU32 * (2 * 2 * p + 2 * 4 * std::fabs(master[i] - previous[i]) + 2 * lr * wd * p);
            if (step == 1)  // the first move isn't seen in the difference above
                allowed[i] += kU32 * 8 * lr * (owner[i] < 0 ? 0 : report->rows[owner[i]].gain) *
                              std::fabs(first_gradient[i]);
            if (owner[i] < 0) allowed[i] = 0;
        }
        previous = master;
    }
    const std::vector<float> a = raw_arenas.snapshot().master, b = normalized_arenas.snapshot().master;
    h.compare(
        "T2: raw (lr, wd) and normalized (M lr, wd / M) agree after " + std::to_string(steps) + " steps", b,
        std::vector<double>(a.begin(), a.end()), {}, allowed);
}

static std::vector<float> measured(Harness& h, const std::vector<float>& gradient, double clip) {
    Arenas arenas(h, small_gpt2());
    SgdSai optimizer(with_gain("raw"), arenas.blocks, h.gpu);
    const std::optional<GainReport> report = run_step(h, arenas, optimizer, gradient, kLearningRate, clip);
    std::vector<float> gsnr;
    for (const GainRow& row : report->rows) gsnr.push_back(row.gsnr);
    return gsnr;
}

// T5: a gradient times 2^k; T9: clipped or not. Only eps sees the difference: g-SNR is norm / (std + eps /
// c), so it moves by eps / c over std, and std is about norm / gsnr of the gradient in question.
static void test_scale(Harness& h) {
    Arenas arenas(h, small_gpt2());
    const std::vector<float> gradient = arenas.random_gradient();
    const std::vector<float> base = measured(h, gradient, 0);
    const double norm = [&] {
        arenas.set_gradient(gradient);
        return arenas.norm(0).grad_norm;
    }();
    auto compare = [&](const std::string& name, const std::vector<float>& got, double scale) {
        std::vector<double> allowed;
        for (size_t b = 0; b < base.size(); b++) {
            long double squares = 0;
            for (size_t i = 0; i < arenas.blocks[b].n; i++)
                squares += std::pow(static_cast<long double>(gradient[arenas.blocks[b].offset + i]), 2);
            const double deviation = static_cast<double>(std::sqrt(squares)) / base[b];
            const double of_eps = kEps / deviation * (1 + 1 / std::min(scale, 1.0));
            allowed.push_back(base[b] * (of_eps + 2 * kU32));
        }
        h.compare(name, got, std::vector<double>(base.begin(), base.end()), {}, allowed);
    };
    for (const int k : {-6, 3, 20}) {
        std::vector<float> scaled = gradient;
        for (float& g : scaled) g = std::ldexp(g, k);
        compare("T5: g-SNR of the gradient times 2^" + std::to_string(k), measured(h, scaled, 0),
                std::ldexp(1.0, k));
    }
    for (const double clip : {norm / 2, norm / 50})
        compare("T9: g-SNR with clip factor " + option_text(clip / norm), measured(h, gradient, clip),
                clip / norm);
}

// T6: blocks that have no g-SNR, and first steps that must not measure.
static void test_degenerate(Harness& h) {
    const std::vector<TensorBlock> blocks =
        block_list({{64, 128}, {1, 1}, {1, 128}, {1, 256}, {1, 1}, {130, 64, 192}});
    Arenas arenas(h, blocks);
    std::vector<float> gradient = arenas.random_gradient();
    for (size_t i = 0; i < 128; i++) gradient[blocks[2].offset + i] = 0;      // all zero
    for (size_t i = 0; i < 256; i++) gradient[blocks[3].offset + i] = 0.01f;  // constant
    gradient[blocks[4].offset] = 0;                                           // one element, zero
    SgdSai optimizer(with_gain("raw"), blocks, h.gpu);
    arenas.set_gradient(gradient);
    arenas.norm(0);
    const Snapshot before = arenas.snapshot();
    optimizer.step(arenas.update(kLearningRate), h.gpu);
    const StepState state = arenas.state_cpu();
    ChildResult printed;
    std::optional<GainReport> report;
    {  // the warnings of observe(), read back from a pipe in place of standard error
        int ends[2];
        const int saved = dup(STDERR_FILENO);
        if (pipe(ends) != 0) fatal("pipe failed");
        dup2(ends[1], STDERR_FILENO);
        report = optimizer.observe(state, h.gpu);
        dup2(saved, STDERR_FILENO);
        close(ends[1]);
        char buffer[4096];
        for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;)
            printed.text.append(buffer, static_cast<size_t>(n));
        close(ends[0]), close(saved);
    }
    const std::vector<GainRow>& rows = report->rows;
    h.check("T6: one element: 1, zero or not", rows[1].gsnr == 1 && rows[4].gsnr == 1);
    h.check("T6: a zero block: sqrt(n), and the report says so",
            rows[2].gsnr == static_cast<float>(std::sqrt(128.0)) && rows[2].zero && !rows[0].zero);
    h.check("T6: a warning names the zero block, and the constant one, and no other",
            printed.text.find("block.2: ") != std::string::npos &&
                printed.text.find("block.3: ") != std::string::npos &&
                printed.text.find("block.0: ") == std::string::npos &&
                printed.text.find("block.1: ") == std::string::npos &&
                printed.text.find("block.5: ") == std::string::npos);
    // A constant block has variance 0, but for rounding: at most 2 (42 + 3) u64 S2 / (n - 1), so std <= 1e-7
    // |g|.
    const double g = 0.01f, norm = 16 * g,
                 noise = std::sqrt(2 * 45 * unit_roundoff<double>() * norm * norm / 255);
    h.check("T6: a constant block: norm / eps, finite",
            rows[3].gsnr <= norm / kEps * (1 + 2 * kU32) &&
                rows[3].gsnr >= norm / (kEps + noise) * (1 - 2 * kU32));
    const Snapshot after = arenas.snapshot();
    bool zero_block_kept = true;
    for (size_t i = 0; i < 128; i++)
        zero_block_kept =
            zero_block_kept && after.master[blocks[2].offset + i] == before.master[blocks[2].offset + i];
    h.check("T6: a zero block does not move in the first step, others do",
            zero_block_kept && after.master[0] != before.master[0]);
    run_step(h, arenas, optimizer, arenas.random_gradient(), kLearningRate, 0);
    h.check("T6: it moves in the second",
            arenas.snapshot().master[blocks[2].offset] != after.master[blocks[2].offset]);
}

// The first applied step measures; bad ones before it, and an all-zero gradient, change nothing.
static void test_first_applied_step(Harness& h) {
    Arenas clean(h, small_gpt2()), dirty(h, small_gpt2());
    dirty.set_master(clean.snapshot().master);
    SgdSai a(with_gain("raw"), clean.blocks, h.gpu), b(with_gain("raw"), dirty.blocks, h.gpu);
    const Snapshot before = dirty.snapshot();
    const std::vector<float> state_before = state_of(h, b), good = clean.random_gradient();
    auto refuse = [&](const std::string& what, const std::vector<float>& gradient, float loss, Skip reason) {
        dirty.set_gradient(gradient);
        dirty.norm(1, loss);
        b.step(dirty.update(kLearningRate), h.gpu);
        const Snapshot after = dirty.snapshot();
        h.check("T6: " + what + ": no bit changes, nothing is measured or counted",
                equal_bits(before.master, after.master) && equal_bits(before.weights, after.weights) &&
                    equal_bits(state_before, state_of(h, b)) && after.state.skip == reason &&
                    after.state.gains_ready == 0 && after.state.applied_updates == 0 &&
                    !b.observe(after.state, h.gpu));
    };
    for (const float bad : {NAN, INFINITY}) {
        std::vector<float> gradient = good;
        gradient[5] = bad;
        refuse("a first gradient with " + std::to_string(bad), gradient, 3, Skip::GradientNorm);
    }
    refuse("a first loss of nan", good, NAN, Skip::Loss);
    std::vector<float> zero(dirty.Np, 0.0f);
    dirty.for_pads([&](size_t i) { zero[i] = NAN; });
    refuse("a first gradient that is all zero", zero, 3, Skip::ZeroGradient);
    for (int step = 0; step < 3; step++) {
        const std::vector<float> gradient = step == 0 ? good : clean.random_gradient();
        run_step(h, clean, a, gradient, kLearningRate, 1);
        run_step(h, dirty, b, gradient, kLearningRate, 1);
        std::vector<float> bad = gradient;
        bad[77] = NAN;
        dirty.set_gradient(bad);
        dirty.norm(1);
        b.step(dirty.update(kLearningRate), h.gpu);
    }
    const Snapshot x = clean.snapshot(), y = dirty.snapshot();
    h.check("the same bits as without the skipped steps, which count nothing",
            equal_bits(x.master, y.master) && equal_bits(x.weights, y.weights) &&
                equal_bits(state_of(h, a), state_of(h, b)) && x.state.applied_updates == 3 &&
                y.state.applied_updates == 3);
    run_step(h, clean, a, zero, kLearningRate, 1);
    h.check("a zero gradient later on is applied", clean.state_cpu().applied_updates == 4);
}

// T8: whatever mu, the first step is p0 (1 - lr wd) - lr gain c g: momentum starts as g, not as (1 - mu) g.
static void test_first_step(Harness& h) {
    const double lr = kLearningRate, wd = 0.02;
    for (const double momentum : {0.0, 0.5, 0.99}) {
        Arenas arenas(h, small_gpt2());
        SgdSai optimizer(with_gain("raw", momentum, wd), arenas.blocks, h.gpu);
        const std::vector<float> gradient = arenas.random_gradient(), p0 = arenas.snapshot().master;
        const GainReport report = *run_step(h, arenas, optimizer, gradient, lr, 0.01);
        const Snapshot after = arenas.snapshot();
        const double c = 0.01 / after.state.grad_norm;
        const std::vector<int> owner = arenas.block_of();
        std::vector<double> want(p0.begin(), p0.end()), allowed(arenas.Np, 0.0);
        for (size_t i = 0; i < arenas.Np; i++) {
            if (owner[i] < 0) continue;
            const double decay = arenas.blocks[owner[i]].rows > 1 ? lr * wd : 0;
            const double move = lr * report.rows[owner[i]].gain * c * gradient[i];
            want[i] = p0[i] * (1 - decay) - move;
            // c, c g, lr and lr gain round once each, then each multiply-add; lr wd rounds too.
            allowed[i] = kU32 * (4 * std::fabs(move) + std::fabs(p0[i]) * (1 + decay) + std::fabs(want[i]));
        }
        h.compare("T8: first step, mu " + option_text(momentum), after.master, want, {}, allowed);
    }
}

// T4, of the optimizer alone: state and StepState moved into a fresh optimizer go on with the same bits;
// another gain may go on too.
static void test_checkpoint(Harness& h) {
    Arenas arenas(h, small_gpt2()), resumed(h, small_gpt2());
    SgdSai a(with_gain("normalized"), arenas.blocks, h.gpu);
    std::vector<std::vector<float>> gradients;
    for (int step = 0; step < 4; step++) gradients.push_back(arenas.random_gradient());
    std::optional<GainReport> report;
    for (int step = 0; step < 2; step++) {
        std::optional<GainReport> now = run_step(h, arenas, a, gradients[step], 5, 1);
        if (now) report = now;
    }
    auto load_into = [&](SgdSai& b) {
        std::vector<std::vector<float>> pieces;
        a.each_state([&](const StateTensor& t) { pieces.push_back(h.to_host(t.data, t.elements)); });
        size_t piece = 0;
        b.each_state(
            [&](const StateTensor& t) { copy_to_device(t.data, pieces[piece++].data(), t.elements, h.gpu); });
        resumed.set_master(arenas.snapshot().master);
        resumed.set_state(arenas.state_cpu());
    };
    SgdSai b(with_gain("normalized"), arenas.blocks, h.gpu), c(with_gain("sqrt_n"), arenas.blocks, h.gpu);
    load_into(c);
    const GainReport other = *run_step(h, resumed, c, gradients[2], kLearningRate, 1);
    bool ok = true;
    for (size_t i = 0; i < other.rows.size(); i++)
        ok = ok && other.rows[i].gsnr == report->rows[i].gsnr &&
             other.rows[i].gain == static_cast<float>(std::sqrt(static_cast<double>(other.rows[i].n)));
    h.check("T4: another gain after loading: g-SNRs as they were, gains anew", ok);
    load_into(b);
    for (int step = 2; step < 4; step++) {
        run_step(h, arenas, a, gradients[step], 5, 1);
        run_step(h, resumed, b, gradients[step], 5, 1);
    }
    const Snapshot x = arenas.snapshot(), y = resumed.snapshot();
    h.check("T4: loaded state goes on with the same bits",
            equal_bits(x.master, y.master) && equal_bits(x.weights, y.weights) &&
                equal_bits(state_of(h, a), state_of(h, b)) && y.state.applied_updates == 4);
}

// A host that never looks, looks late or at once: the same bits. And the same bits twice.
static void test_observed_or_not(Harness& h) {
    std::vector<Snapshot> results;
    std::vector<std::vector<float>> states;
    Arenas source(h, small_gpt2());
    std::vector<std::vector<float>> gradients;
    for (int step = 0; step < 4; step++) gradients.push_back(source.random_gradient());
    for (const int observe_from : {0, 0, 2, 99}) {
        Arenas arenas(h, small_gpt2());
        arenas.set_master(source.snapshot().master);
        SgdSai optimizer(with_gain("raw"), arenas.blocks, h.gpu);
        for (int step = 0; step < 4; step++) {
            arenas.set_gradient(gradients[step]);
            arenas.norm(1);
            optimizer.step(arenas.update(kLearningRate), h.gpu);
            if (step >= observe_from) optimizer.observe(arenas.state_cpu(), h.gpu);
        }
        results.push_back(arenas.snapshot());
        states.push_back(state_of(h, optimizer));
    }
    for (size_t i = 1; i < results.size(); i++)
        h.check(i == 1 ? "the same bits twice" : "observed late or never: the same bits",
                equal_bits(results[0].master, results[i].master) &&
                    equal_bits(results[0].weights, results[i].weights) && equal_bits(states[0], states[i]));
}

static void test_offsets(Harness& h) {
    const std::vector<BlockShape> shapes = {{130, 65, 192}, {1, 8256}, {3, 4096}};
    const size_t origin = (size_t{1} << 33) + 64;
    Arenas near(h, block_list(shapes)), far(h, block_list(shapes, origin), origin);
    far.set_master(near.snapshot().master);
    const std::vector<float> gradient = near.random_gradient();
    std::vector<std::vector<float>> states;
    for (Arenas* arenas : {&near, &far}) {
        DeviceBuffer<float> m(arenas->Np), gsnr(3), gain(3);
        DeviceBuffer<uint32_t> zero(3);
        DeviceBuffer<GainFlags> flags(1);
        DeviceBuffer<GradientSums> partial(arenas->table().chunks.size());
        fill_zero(m.get(), m.size(), h.gpu);
        fill_zero(flags.get(), 1, h.gpu);
        const GainTable gains{gsnr, gain, zero, flags};
        arenas->set_gradient(gradient);
        arenas->norm(1);
        const Update update = arenas->update(kLearningRate);
        measure_gsnr(gains, partial, update.gradient, update.state, arenas->table(), kEps, h.gpu);
        sgd_sai_begin(update.state, gains, arenas->table(), GainRule::Raw, h.gpu);
        sgd_sai_update(update, m.get() - arenas->origin, gains, 0.9, 0.02, h.gpu);
        states.push_back(h.to_host(m.get(), m.size()));
        states.push_back(h.to_host(gsnr.get(), 3));
    }
    const Snapshot a = near.snapshot(), b = far.snapshot();
    h.check("offsets beyond 2^33: the same bits",
            equal_bits(a.master, b.master) && equal_bits(a.weights, b.weights) &&
                equal_bits(states[0], states[2]) && equal_bits(states[1], states[3]) && states[1][0] > 0);
    // n of 2^40 elements of +-1: S1 = 0, S2 = n, so g-SNR is sqrt(n - 1).
    const double n = 0x1p40;
    h.check("n of 2^40: no 32-bit arithmetic",
            std::fabs(block_gsnr(uint64_t{1} << 40, {0, n}, 1e-20) / std::sqrt(n - 1) - 1) <= 2 * kU32);
}

static void test_options(Harness& h) {
    const std::vector<TensorBlock> blocks = TensorTable({1, 768, 12, 50257, 64}).blocks();  // M is about 6213
    auto outcome = [&](const std::string& gain, double lr, double wd, double mu, double eps) {
        return in_child([&] { SgdSai::check_options({lr, wd, mu, eps, gain}, blocks); });
    };
    auto dies = [&](const std::string& word, const ChildResult& result) {
        h.check("refused, and named: " + word,
                result.status == 1 && result.text.find(word) != std::string::npos);
    };
    dies("--momentum", outcome("raw", 3e-3, 0.02, 1, kEps));
    dies("--momentum", outcome("raw", 3e-3, 0.02, -0.1, kEps));
    dies("--momentum", outcome("raw", 3e-3, 0.02, NAN, kEps));
    dies("--eps", outcome("raw", 3e-3, 0.02, 0.9, 0));
    dies("--gain", outcome("rew", 3e-3, 0.02, 0.9, kEps));
    dies("--learning-rate", outcome("raw", NAN, 0.02, 0.9, kEps));
    dies("--weight-decay", outcome("raw", 3e-3, 400, 0.9, kEps));
    auto warns = [&](const std::string& what, const ChildResult& result, bool wanted) {
        h.check(what,
                result.status == 0 && (result.text.find("--learning-rate") != std::string::npos) == wanted);
    };
    warns("raw 3e-3: no warning", outcome("raw", 3e-3, 0.02, 0.9, kEps), false);
    warns("raw 3e-2: no warning", outcome("raw", 3e-2, 2e-3, 0.9, kEps), false);
    warns("raw 18.6: looks normalized", outcome("raw", 18.6, 3e-6, 0.9, kEps), true);
    warns("normalized 18.6: no warning", outcome("normalized", 18.6, 3e-6, 0.9, kEps), false);
    warns("normalized 3e-3: looks raw", outcome("normalized", 3e-3, 0.02, 0.9, kEps), true);
    warns("one, 1: no warning", outcome("one", 1, 1e-4, 0.9, kEps), false);

    Options flags;
    flags.learning_rate = 1, flags.weight_decay = 2, flags.momentum = 3, flags.eps = 4, flags.gain = "one";
    const SgdSai::Options o = SgdSai::Options::from(flags);
    h.check("every option comes from its flag",
            o.learning_rate == 1 && o.weight_decay == 2 && o.momentum == 3 && o.eps == 4 && o.gain == "one");

    // T7: state bytes.
    const std::vector<TensorBlock> small = small_gpt2();
    const size_t Np = arena_elements(small), num_blocks = 12 * 2 + 4;
    for (const double momentum : {0.9, 0.0}) {
        SgdSai optimizer(with_gain("raw", momentum), small, h.gpu);
        size_t bytes = 0;
        optimizer.each_state([&](const StateTensor& tensor) { bytes += tensor.bytes(); });
        const size_t want = (momentum > 0 ? 4 * Np : 0) + 4 * num_blocks;
        h.check("T7: state bytes, mu " + option_text(momentum),
                bytes == want && SgdSai::state_bytes(optimizer.options(), Np, small.size()) == want);
    }
}

static void test_table(Harness& h) {
    Arenas arenas(h, small_gpt2());
    SgdSai optimizer(with_gain("normalized"), arenas.blocks, h.gpu);
    const std::string text = gain_table(*run_step(h, arenas, optimizer, arenas.random_gradient(), 1, 1));
    std::printf("%s\n", text.c_str());
    h.check(
        "the table has a line a type, and two of heading",
        std::count(text.begin(), text.end(), '\n') + 1 == 2 + 16 && text.find("qkvw") != std::string::npos);
}

// Both optimizers on the same arenas: time of a step and their ratio, and of the first step's measurement.
static void bench(Harness& h, const std::string& name, const ModelShape& shape) {
    constexpr bool kMixed = !std::is_same_v<floatX, float>;
    const TensorTable parameters(shape);
    DeviceTable table(parameters.blocks(), h.gpu);
    const size_t Np = parameters.padded_parameters();
    const double N = static_cast<double>(parameters.parameters());
    DeviceBuffer<floatX> weights(kMixed ? Np : 0);
    DeviceBuffer<float> master(Np), gradient(Np);
    DeviceBuffer<StepState> state(1);
    const std::vector<float> some = h.random<float>(size_t{1} << 20, 1e-3);
    for (float* arena : {master.get(), gradient.get()})
        for (size_t at = 0; at < Np; at += some.size())
            copy_to_device(arena + at, some.data(), std::min(some.size(), Np - at), h.gpu);
    StepState state_cpu{};
    state_cpu.grad_norm = state_cpu.clip_factor = 1;
    copy_to_device(state.get(), &state_cpu, 1, h.gpu);
    h.gpu.synchronize();
    const Update update{weights, master, gradient, state, &table, 1e-4};
    auto time_of = [&](auto& optimizer) { return h.median_us([&] { optimizer.step(update, h.gpu); }); };
    double adamw_us;
    {
        AdamW adamw({}, parameters.blocks(), h.gpu);
        adamw_us = time_of(adamw);
        h.report("AdamW " + name + ", bytes a parameter " + std::to_string(kMixed ? 30 : 28), adamw_us,
                 (kMixed ? 30 : 28) * N);
    }
    SgdSai sgd_sai({}, parameters.blocks(), h.gpu);
    sgd_sai.step(update, h.gpu);
    state_cpu = h.to_host(state.get(), 1)[0];
    sgd_sai.observe(state_cpu, h.gpu);
    const double us = time_of(sgd_sai);
    h.report("SGD-SaI " + name + ", bytes a parameter " + std::to_string(kMixed ? 22 : 20), us,
             (kMixed ? 22 : 20) * N);
    std::printf("%-52s %10.3f (at most 0.75 wanted)\n", ("SGD-SaI / AdamW " + name).c_str(), us / adamw_us);
    DeviceBuffer<float> gsnr(parameters.blocks().size());
    DeviceBuffer<uint32_t> zero(parameters.blocks().size());
    DeviceBuffer<GradientSums> partial(table.chunks.size());
    state_cpu.gains_ready = 0;
    copy_to_device(state.get(), &state_cpu, 1, h.gpu);
    h.gpu.synchronize();
    const double measure_us = h.median_us([&] {
        measure_gsnr({gsnr, nullptr, zero, nullptr}, partial, gradient, state, table, kEps, h.gpu);
    });
    h.report("g-SNR " + name + ", bytes a parameter 4, once a run", measure_us, 4 * N);
}

int main(int argc, char** argv) {
    Harness h("sgd_sai", argc, argv);
    if (h.bench) {
        bench(h, "124M", {12, 768, 12, 50257, 1024});
        bench(h, "1558M", {48, 1600, 25, 50257, 1024});
        return h.finish();
    }
    for (const NamedBlocks& shape : test_shapes())
        for (const double clip : {0.0, 0.01}) test_gsnr(h, shape, clip);
    const std::vector<NamedBlocks> shapes = test_shapes();
    for (const char* rule : {"raw", "normalized", "sqrt_n", "one"}) test_steps(h, shapes[1], rule, 0.9, 0.01);
    for (const NamedBlocks& shape : shapes) test_steps(h, shape, "raw", 0.9, 0);
    test_steps(h, shapes[0], "raw", 0, 0.01);
    test_units(h);
    test_scale(h);
    test_degenerate(h);
    test_first_applied_step(h);
    test_first_step(h);
    test_checkpoint(h);
    test_observed_or_not(h);
    test_offsets(h);
    test_options(h);
    test_table(h);
    return h.finish();
}
