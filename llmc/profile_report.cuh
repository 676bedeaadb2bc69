// --profile's table: what a step spends in each kernel group, beside the least that this GPU needs for it,
// its floor:
//
//     floor = max(FLOP / rate of a large matrix product, bytes / rate of a large copy)
//
// Both rates are measured here, on random numbers, in the same run. FLOP and bytes follow from shapes by
// formula: the arithmetic of the model (causal attention counted half), and each tensor that a launch reads
// or writes, once. So a kernel that reads twice what it could read once is at a smaller share of its floor.
// dev/roofline.py counts the same.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>
#include "llmc/file.h"      // text_of
#include "llmc/gpt2.cuh"    // Gpt2
#include "llmc/json.h"      // Json
#include "llmc/logger.h"    // record
#include "llmc/matmul.cuh"  // time_plan_us, MatmulTuningMemory
#include "llmc/profile.h"   // Group, GroupTimes

// ---- ceilings --------------------------------------------------------------------------------------------

// What this GPU can do, measured.
struct Ceilings {
    double flops = 0;             // FLOP/s of a product (size x size x size) in the build's precision
    double bytes_per_second = 0;  // of a device copy, read plus written
    int64_t product_size = 0;
    size_t copy_bytes = 0;
};

// Sizes double until one run takes a millisecond, far more than a launch, or until the size at which a Hopper
// is at its best (8192; 1 GiB, beyond any L2) or memory ends: so it takes a fraction of a second on a GPU and
// on the simulator.
inline constexpr double kCeilingSeconds = 1e-3;

inline void measure_product(Ceilings& ceilings, bool tune, Gpu& gpu) {
    Matmuls matmuls({.measure = tune});
    for (int64_t size = 512; size <= 8192; size *= 2) {
        const MatmulKey key = Matmuls::forward_key(size, size, size, MatmulEpilogue::None);
        const MatmulTuningMemory memory(key, gpu);
        if (!memory) break;
        MatmulPlan& plan = matmuls.plan(key, gpu);
        const double first = time_plan_us(plan, memory.operands(), 2, gpu) * 1e-6;
        const int runs = static_cast<int>(std::clamp(50 * kCeilingSeconds / first, 3.0, 200.0));
        const double seconds = time_plan_us(plan, memory.operands(), runs, gpu) * 1e-6;
        const double flops = 2.0 * static_cast<double>(size) * size * size / seconds;
        if (flops > ceilings.flops) ceilings.flops = flops, ceilings.product_size = size;
        if (seconds >= kCeilingSeconds) break;
    }
}

inline void measure_copy(Ceilings& ceilings, Gpu& gpu) {
    for (size_t bytes = size_t{16} << 20; bytes <= size_t{1} << 30; bytes *= 2) {
        size_t free_bytes = 0, device_bytes = 0;
        CUDA_CHECK(cudaMemGetInfo(&free_bytes, &device_bytes));
        if (2 * bytes > free_bytes / 2) break;
        const DeviceBuffer<uint32_t> from(bytes / 4), to(bytes / 4);
        CUDA_CHECK(cudaMemsetAsync(from.get(), 0x5a, bytes, gpu.stream));
        auto copy = [&] {
            CUDA_CHECK(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, gpu.stream));
        };
        const double first = mean_us(2, copy, gpu) * 1e-6;
        const int runs = static_cast<int>(std::clamp(20 * kCeilingSeconds / first, 3.0, 200.0));
        const double seconds = mean_us(runs, copy, gpu) * 1e-6;
        // The last size counts, not the best: small ones fit a cache.
        ceilings.bytes_per_second = 2.0 * static_cast<double>(bytes) / seconds, ceilings.copy_bytes = bytes;
        if (seconds >= kCeilingSeconds) break;
    }
}

// Needs up to 2 GiB of memory that is free now: call it before the model takes it.
inline Ceilings measure_ceilings(bool tune, Gpu& gpu) {
    Ceilings ceilings;
    measure_product(ceilings, tune, gpu);
    measure_copy(ceilings, gpu);
    if (!(ceilings.flops > 0 && ceilings.bytes_per_second > 0))
        fatal("--profile: no device memory to measure what this GPU can do; use a smaller --batch-size");
    return ceilings;
}

// ---- work by formula -------------------------------------------------------------------------------------

struct Work {
    double flop = 0, bytes = 0;
    Work& operator+=(const Work& other) {
        flop += other.flop, bytes += other.bytes;
        return *this;
    }
};
inline Work operator*(double times, const Work& work) { return {times * work.flop, times * work.bytes}; }
using GroupWork = std::array<Work, kGroups>;

inline double floor_seconds(const Work& work, const Ceilings& ceilings) {
    return std::max(work.flop / ceilings.flops, work.bytes / ceilings.bytes_per_second);
}

// What the work of an update depends on beside the model.
struct UpdateShape {
    int64_t micro_steps;
    double parameters;             // N
    double optimizer_state_bytes;  // a parameter
    bool gelu_fused_forward, gelu_fused_backward, bias_gradient_fused;
};

inline constexpr double kBytesX = sizeof(floatX);

// (rows, k) x (k, columns), each element of the result costing out_bytes.
inline Work product_work(double rows, double k, double columns, double out_bytes) {
    return {2 * rows * k * columns, kBytesX * (rows * k + k * columns) + out_bytes * rows * columns};
}

// The products of all blocks in one micro-step; `adds` where weight gradients are added to what is there.
inline Work block_product_work(const Gpt2Config& c, const UpdateShape& u, bool adds) {
    const double N = static_cast<double>(c.batch_size) * c.seq_len, C = c.shape.channels;
    const double gelu_operand = kBytesX * N * 4 * C;  // pre_gelu, written forward and read backward
    const double shapes[][2] = {{C, 3 * C}, {C, C}, {C, 4 * C}, {4 * C, C}};
    Work block;
    for (const auto& [in, out] : shapes) {
        const int forwards =
            c.recompute == Recompute::block && in == C ? 2 : 1;  // all but the last are recomputed
        block += forwards * product_work(N, in, out, kBytesX);
        block += product_work(N, out, in, kBytesX);
        block += product_work(in, N, out, adds ? 8 : 4);
    }
    if (u.gelu_fused_forward) block.bytes += (c.recompute == Recompute::block ? 2 : 1) * gelu_operand;
    if (u.gelu_fused_backward) block.bytes += gelu_operand;
    return c.shape.layers * block;
}

inline Work head_product_work(const Gpt2Config& c, bool adds) {
    const int64_t tokens = static_cast<int64_t>(c.batch_size) * c.seq_len, rows = logit_rows(tokens);
    const double C = c.shape.channels, Vp = c.shape.padded_vocab_size();
    Work head;
    for (int64_t first = 0; first < tokens; first += rows) {
        const double R = static_cast<double>(std::min(rows, tokens - first));
        head += product_work(R, C, Vp, kBytesX);
        head += product_work(R, Vp, C, kBytesX);
        head += product_work(Vp, R, C, adds || first > 0 ? 8 : 4);
    }
    return head;
}

// What one micro-step does beside products, per group.
inline GroupWork elementwise_work(const Gpt2Config& c, const UpdateShape& u) {
    const double T = c.seq_len, N = static_cast<double>(c.batch_size) * T, C = c.shape.channels,
                 L = c.shape.layers;
    const double V = c.shape.vocab_size, row = kBytesX * N * C;  // bytes of a (B, T, C)
    const bool again = c.recompute != Recompute::none, block_again = c.recompute == Recompute::block;
    GroupWork w;
    auto work = [&](Group group) -> Work& { return w[static_cast<size_t>(group)]; };
    work(Group::Upload).bytes =
        3 * sizeof(int) * N;  // written once; the link to the host is slower, and no kernel's
    // Forward reads wte's rows, wpe once, writes x; backward reads dx once, writes dwpe, updates dwte's rows,
    // as many as differ: at most the vocabulary.
    work(Group::Embedding).bytes =
        3 * row + (kBytesX + sizeof(float)) * T * C + 2 * sizeof(float) * std::min(V, N) * C;
    // Two products of (T, T, 64) forward and five backward, half of each; packed qkv in, (B, T, C) out, and
    // backward qkv, out, dout in and dqkv out.
    const Work attention = {2 * N * T * C, 4 * row};
    work(Group::AttentionForward) = (block_again ? 2 : 1) * L * attention;
    work(Group::AttentionBackward) = L * Work{5 * N * T * C, 8 * row};
    // The first norm has no residual sum and the last one's backward assigns; the 2 L others read and write 4
    // each way.
    const double recomputed = !again ? 0 : block_again ? 2 + 4 : 2 + 2;
    work(Group::Layernorm).bytes = ((2 + 2 * L * 4) + (3 + 2 * L * 4) + L * recomputed) * row;
    const double gelu_forwards = (u.gelu_fused_forward ? 0
                                  : block_again        ? 2
                                                       : 1) +
                                 (c.recompute == Recompute::gelu_layernorm ? 1 : 0);
    work(Group::Gelu).bytes = L * 4 * row * (2 * gelu_forwards + (u.gelu_fused_backward ? 0 : 3));
    // Of fc, where its weight gradient doesn't bring it; the others ride in attention and layernorm.
    work(Group::BiasGradient).bytes = u.bias_gradient_fused ? 0 : L * 4 * row;
    work(Group::Classifier).bytes =
        2 * kBytesX * N * c.shape.padded_vocab_size();  // logits read, gradient written
    return w;
}

inline GroupWork update_work(const Gpt2Config& config, const UpdateShape& u) {
    GroupWork w = elementwise_work(config, u);
    for (Work& group : w) group = static_cast<double>(u.micro_steps) * group;
    for (int64_t i = 0; i < u.micro_steps; i++) {
        w[static_cast<size_t>(Group::BlockGemms)] += block_product_work(config, u, i > 0);
        w[static_cast<size_t>(Group::HeadGemms)] += head_product_work(config, i > 0);
    }
    w[static_cast<size_t>(Group::Norm)].bytes = sizeof(float) * u.parameters;
    // The gradient is read; master weights and state are read and written; bf16 weights are written.
    const double weights = sizeof(floatX) < sizeof(float) ? kBytesX : 0;
    w[static_cast<size_t>(Group::Optimizer)].bytes =
        u.parameters * (sizeof(float) + 2 * sizeof(float) + 2 * u.optimizer_state_bytes + weights);
    return w;
}

// ---- what rides in products ------------------------------------------------------------------------------

// Where a product's plan leaves GELU or a bias gradient to a kernel of ours, that kernel runs inside the
// product's range. It is timed alone here, and its time moved to its own group. Overwrites activations and
// gradients of the model.
inline void split_epilogues(GroupTimes& times, Gpt2& model, const UpdateShape& u, double steps, Gpu& gpu) {
    constexpr int kRuns = 10;
    const Gpt2Config& c = model.config;
    const int64_t N = static_cast<int64_t>(c.batch_size) * c.seq_len, width = 4 * int64_t{c.shape.channels};
    const size_t n = static_cast<size_t>(N * width);
    const Activations a = model.act.layer(0);
    const double launches = steps * static_cast<double>(u.micro_steps) * c.shape.layers;
    auto move = [&](Group group, double calls, auto f) {
        f();
        double& products_ms = times.ms[static_cast<size_t>(Group::BlockGemms)];
        const double ms = std::min(calls * 1e-3 * mean_us(kRuns, f, gpu), products_ms);  // no time twice
        products_ms -= ms;
        times.ms[static_cast<size_t>(group)] += ms;
        times.calls[static_cast<size_t>(group)] += static_cast<int64_t>(calls);
    };
    if (!u.gelu_fused_forward)
        move(Group::Gelu, (c.recompute == Recompute::block ? 2 : 1) * launches,
             [&] { gelu_forward(a.fch_gelu, a.fch, n, gpu); });
    if (!u.gelu_fused_backward)
        move(Group::Gelu, launches, [&] { gelu_backward(a.dfch, a.dfch, a.fch, n, gpu); });
    if (!u.bias_gradient_fused) {
        const DeviceBuffer<float> scratch(bias_backward_scratch_floats(N, width));
        move(Group::BiasGradient, launches, [&] {
            bias_backward(model.gradients.layer(0).fcb, scratch, a.dfch, N, width, Write::Assign, gpu);
        });
    }
}

// ---- the report ------------------------------------------------------------------------------------------

struct ProfileReport {
    int64_t steps, micro_steps, tokens;  // steps measured; of an update
    double trained_ms, profiled_ms;      // an update as training runs it, and with events around its launches
    bool graph;                          // training replays the micro-step as a CUDA graph
    double model_flops_per_token;        // 6 N + 6 L C T
    double peak_flops;                   // for MFU; 0: not known
    Ceilings ceilings;
    GroupTimes times;  // of all steps together
    GroupWork work;    // of one update
};

// What the training loop knows: of each update its time, as trained and as profiled.
struct ProfiledUpdates {
    int64_t micro_steps;
    size_t state_bytes;  // of the optimizer
    bool graph;
    const std::vector<double>&trained_ms, &profiled_ms;
};

// The report on the intervals that model.profile holds. Waits for the GPU; overwrites activations.
inline ProfileReport profile_report(Gpt2& model, Matmuls& matmuls, const Ceilings& ceilings,
                                    const ProfiledUpdates& updates, Gpu& gpu) {
    const Gpt2Config& c = model.config;
    const int64_t tokens = static_cast<int64_t>(c.batch_size) * c.seq_len, C = c.shape.channels;
    const double N = static_cast<double>(model.table.parameters());
    const double state_elements = static_cast<double>(model.table.padded_parameters());
    const double steps = static_cast<double>(updates.profiled_ms.size());
    auto mean = [](const std::vector<double>& ms) {
        return std::accumulate(ms.begin(), ms.end(), 0.0) / static_cast<double>(ms.size());
    };
    auto fused = [&](const MatmulKey& key) { return matmuls.plan(key, gpu).settings.fused; };
    const UpdateShape update = {
        .micro_steps = updates.micro_steps,
        .parameters = N,
        .optimizer_state_bytes = static_cast<double>(updates.state_bytes) / state_elements,
        .gelu_fused_forward = fused(Matmuls::forward_key(tokens, C, 4 * C, MatmulEpilogue::GeluBias)),
        .gelu_fused_backward = fused(Matmuls::dgrad_key(tokens, 4 * C, C, MatmulEpilogue::Dgelu)),
        .bias_gradient_fused = fused(Matmuls::wgrad_key(
            4 * C, C, tokens, updates.micro_steps > 1 ? Write::Add : Write::Assign, MatmulEpilogue::Bgrad)),
    };
    GroupTimes times = model.profile.collect(gpu);
    split_epilogues(times, model, update, steps, gpu);
    return {.steps = static_cast<int64_t>(steps),
            .micro_steps = updates.micro_steps,
            .tokens = updates.micro_steps * tokens,
            .trained_ms = mean(updates.trained_ms),
            .profiled_ms = mean(updates.profiled_ms),
            .graph = updates.graph,
            .model_flops_per_token = model.model_flops_per_token(),
            .peak_flops = gpu.peak_bf16_flops(),
            .ceilings = ceilings,
            .times = times,
            .work = update_work(c, update)};
}

inline std::string profile_row(const char* name, double calls, double ms, double total_ms, const Work& work,
                               double floor_ms) {
    const std::string tflops = work.flop > 0 ? text_of("%.4g", work.flop / ms * 1e-9) : "-";
    return text_of("%-21s %7.0f %10.3f %6.1f%% %8s %8.1f %10.3f %6.1f%%\n", name, calls, ms,
                   100 * ms / total_ms, tflops.c_str(), work.bytes / ms * 1e-6, floor_ms,
                   100 * floor_ms / ms);
}

// The table, lines of at most 85 columns.
inline std::string profile_table(const ProfileReport& r) {
    const double steps = static_cast<double>(r.steps);
    const Ceilings& c = r.ceilings;
    std::string text =
        text_of("profile: %lld updates of %lld tokens in %lld micro-steps, launches timed one by one\n",
                (long long)r.steps, (long long)r.tokens, (long long)r.micro_steps) +
        text_of("ceilings: product of %lld %.4g TFLOP/s, copy of %.2f GiB %.4g GB/s\n",
                (long long)c.product_size, c.flops * 1e-12, static_cast<double>(c.copy_bytes) / (1 << 30),
                c.bytes_per_second * 1e-9) +
        text_of("%-21s %7s %10s %7s %8s %8s %10s %7s\n", "an update", "calls", "ms", "share", "TFLOP/s",
                "GB/s", "floor ms", "floor");
    double sum_ms = 0, floor_ms = 0;
    for (size_t g = 0; g < kGroups; g++) {
        if (r.times.calls[g] == 0) continue;
        const double ms = r.times.ms[g] / steps, group_floor_ms = 1e3 * floor_seconds(r.work[g], c);
        text += profile_row(kGroupNames[g], static_cast<double>(r.times.calls[g]) / steps, ms, r.profiled_ms,
                            r.work[g], group_floor_ms);
        sum_ms += ms, floor_ms += group_floor_ms;
    }
    const double between_ms = r.profiled_ms - sum_ms;
    text += text_of("%-21s %7s %10.3f %6.1f%%\n", "between launches", "", between_ms,
                    100 * between_ms / r.profiled_ms);
    auto total = [&](const char* name, double ms) {
        text += text_of("%-21s %7s %10.3f %25s %10.3f %6.1f%%\n", name, "", ms, "", floor_ms,
                        100 * floor_ms / ms);
    };
    total("all, as timed", r.profiled_ms);
    total(r.graph ? "in training, a graph" : "in training", r.trained_ms);
    const double tokens_per_second = static_cast<double>(r.tokens) / (r.trained_ms * 1e-3);
    text += text_of("in training: %.0f tokens/s", tokens_per_second);
    if (r.peak_flops > 0)
        text +=
            text_of(", MFU %.1f%% (6 N + 6 L C T over %.0f TFLOP/s)",
                    100 * tokens_per_second * r.model_flops_per_token / r.peak_flops, r.peak_flops * 1e-12);
    return text;
}

// The `profile` record: the table's numbers, of one update.
inline Json profile_record(const ProfileReport& r) {
    Json groups = Json::array();
    const double steps = static_cast<double>(r.steps);
    for (size_t g = 0; g < kGroups; g++) {
        if (r.times.calls[g] == 0) continue;
        groups.push(Json::object()
                        .add("group", kGroupNames[g])
                        .add("calls", static_cast<double>(r.times.calls[g]) / steps)
                        .add("ms", r.times.ms[g] / steps)
                        .add("flop", r.work[g].flop)
                        .add("bytes", r.work[g].bytes)
                        .add("floor_ms", 1e3 * floor_seconds(r.work[g], r.ceilings)));
    }
    Json out = record("profile");
    out.add("steps", r.steps).add("micro_steps", r.micro_steps).add("tokens", r.tokens);
    out.add("trained_ms", r.trained_ms).add("profiled_ms", r.profiled_ms).add("graph", r.graph ? 1 : 0);
    out.add("product_flops", r.ceilings.flops).add("product_size", r.ceilings.product_size);
    out.add("copy_bytes_per_second", r.ceilings.bytes_per_second).add("copy_bytes", r.ceilings.copy_bytes);
    return std::move(out.add("groups", groups));
}
