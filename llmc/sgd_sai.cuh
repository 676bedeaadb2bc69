// SGD-SaI: SGD with momentum, every tensor's learning rate scaled by a constant that is measured once, on the
// first gradient: its gradient signal-to-noise ratio. With g = c x gradient, for each block (one tensor of
// one layer):
//
//     once, on the first applied step, from S1 = sum g and S2 = sum g^2 over the block's n real elements:
//         gsnr = sqrt(S2) / (sqrt((S2 - S1^2 / n) / (n - 1)) + eps)
//         gain = gsnr (raw) | gsnr / max over blocks (normalized) | sqrt(n) (sqrt_n) | 1 (one)
//     each step:
//         m = first ? g : mu m + (1 - mu) g
//         p = p (1 - lr wd) - lr gain m           decay on tensors of two dimensions, not scaled by the gain
//
// raw is the authors' program, normalized their paper: the same method in other units, (lr, wd) raw = (M lr,
// wd / M) normalized, with M the largest g-SNR. sqrt_n and one are controls: where a block's mean gradient is
// 0, as in every weight matrix at GPT-2's initialisation, gsnr is sqrt(n - 1) whatever the gradient is. The
// sums are taken of the unclipped gradient, in double; dividing eps by c instead gives the ratio of the
// clipped one.
// Source: Xu, Xiang, Cai, Wen, "No More Adam: Learning Rate Scaling at Initialization is All You Need", arXiv
// 2412.11768, algorithm 1; variance unbiased and ratio not normalised as in the authors' package sgd-sai
// 1.0.3.
//
// Bytes a parameter, bf16 build: gradient 4 + master 8 + m 8 + weight 2 = 22, and once 4 more for the sums.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>
#include "llmc/options.h"   // ::Options
#include "llmc/update.cuh"  // Update, StateTensor, GainReport

enum class GainRule : uint32_t { Raw, Normalized, SqrtN, One };

// S1 and S2 of a chunk or a block.
struct GradientSums {
    double s1, s2;
};

// What the device keeps of the gains beside the g-SNRs; all of it can be derived from them again.
struct GainFlags {
    float largest_gsnr;  // M
    uint32_t derived;    // largest_gsnr and the gains are there
    uint32_t first;      // this step measured them, so m is set to g
    uint32_t unused;
};

// The table that SgdSai keeps, one element a block.
struct GainTable {
    float* gsnr;
    float* gain;
    uint32_t* zero;    // 1: the block's first gradient was all zero
    GainFlags* flags;  // (1)
};

// The g-SNR of a block of n elements, by the formula above; eps_over_c = eps / c since the sums are
// unclipped. Where it says nothing: one element, which has no variance, gives 1; a block of zeros, whose gain
// would be 0 for ever, sqrt(n).
__host__ __device__ inline float block_gsnr(uint64_t n, GradientSums sums, double eps_over_c) {
    if (n == 1) return 1.0f;
    const double count = static_cast<double>(n);
    if (sums.s2 == 0) return static_cast<float>(sqrt(count));
    const double spread = sums.s2 - sums.s1 * (sums.s1 / count);  // rounding can make it slightly negative
    const double variance = spread > 0 ? spread / (count - 1) : 0;
    return static_cast<float>(sqrt(sums.s2) / (sqrt(variance) + eps_over_c));
}

__host__ __device__ inline float gain_of(GainRule rule, uint64_t n, float gsnr, float largest_gsnr) {
    switch (rule) {
        case GainRule::Raw: return gsnr;
        case GainRule::Normalized: return gsnr / largest_gsnr;
        case GainRule::SqrtN: return static_cast<float>(sqrt(static_cast<double>(n)));
        case GainRule::One: return 1.0f;
    }
    return 1.0f;
}

// ---- kernels ---------------------------------------------------------------------------------------------

// Whether this step measures: the first that is applied, unless its gradient is all zero, which has no ratio.
__device__ inline bool measures_gains(const StepState& state) {
    return state.apply() && !state.gains_ready && state.grad_norm > 0;
}

struct GradientSumsShared {
    double scratch[kWarpSize];
};

// partial[chunk] = S1 and S2 of the chunk, in one read. One CUDA block a chunk. Nothing where there is
// nothing to measure.
__global__ __launch_bounds__(kChunkThreads) void gradient_sums_kernel(GradientSums* partial,
                                                                      const float* gradient,
                                                                      const Chunk* chunks,
                                                                      const StepState* state) {
    if (!measures_gains(*state)) return;
    GradientSumsShared& s = shared<GradientSumsShared>();
    const Chunk chunk = chunks[blockIdx.x];
    const float* g = gradient + chunk.begin;
    GradientSums sums{0, 0};
#pragma unroll 4
    for (uint32_t i = threadIdx.x * f128::size; i < chunk.count; i += kChunkThreads * f128::size) {
        const f128 pack = load128(g + i);
        for (int k = 0; k < f128::size; k++) {
            const double x = static_cast<double>(pack[k]);
            sums.s1 += x;
            sums.s2 += x * x;
        }
    }
    sums.s1 = block_sum<kChunkThreads>(sums.s1, s.scratch);
    sums.s2 = block_sum<kChunkThreads>(sums.s2, s.scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// gsnr[b] and zero[b] of tensor block b, from its chunks' sums, added in a fixed order. One warp, which is
// one CUDA block, a tensor block.
__global__ __launch_bounds__(kWarpSize) void gsnr_kernel(GainTable table, const GradientSums* partial,
                                                         const DeviceBlock* blocks, const StepState* state,
                                                         double eps) {
    if (!measures_gains(*state)) return;
    const DeviceBlock block = blocks[blockIdx.x];
    GradientSums sums{0, 0};
    for (uint32_t i = threadIdx.x; i < block.num_chunks; i += kWarpSize) {
        const GradientSums chunk_sums = partial[size_t{block.first_chunk} + i];
        sums.s1 += chunk_sums.s1;
        sums.s2 += chunk_sums.s2;
    }
    sums.s1 = warp_sum(sums.s1);
    sums.s2 = warp_sum(sums.s2);
    if (threadIdx.x != 0) return;
    table.gsnr[blockIdx.x] = block_gsnr(block.n, sums, eps / static_cast<double>(state->clip_factor));
    table.zero[blockIdx.x] = sums.s2 == 0;
}

inline constexpr int kBeginThreads = 256;

struct BeginShared {
    float warp_largest[kWarpSize];
};

// Counts the update, and derives M and the gains where that isn't done. Where a first gradient was all zero,
// nothing was measured, and the step is skipped. One CUDA block, before the update.
__global__ __launch_bounds__(kBeginThreads) void sgd_sai_begin_kernel(StepState* state, GainTable table,
                                                                      const DeviceBlock* blocks,
                                                                      uint32_t num_blocks, GainRule rule) {
    BeginShared& s = shared<BeginShared>();
    const bool apply = state->apply(), ready = state->gains_ready, measured = measures_gains(*state);
    const bool derive = measured || !table.flags->derived;
    __syncthreads();  // every thread has read what one thread writes below
    if (!apply) return;
    if (!ready && !measured) {
        if (threadIdx.x == 0) state->skip = Skip::ZeroGradient;
        return;
    }
    if (derive) {
        float largest = 0;
        for (uint32_t b = threadIdx.x; b < num_blocks; b += kBeginThreads)
            largest = fmaxf(largest, table.gsnr[b]);
        largest = warp_max(largest);
        if (threadIdx.x % kWarpSize == 0) s.warp_largest[threadIdx.x / kWarpSize] = largest;
        __syncthreads();
        for (int warp = 0; warp < kBeginThreads / kWarpSize; warp++)
            largest = fmaxf(largest, s.warp_largest[warp]);
        for (uint32_t b = threadIdx.x; b < num_blocks; b += kBeginThreads)
            table.gain[b] = gain_of(rule, blocks[b].n, table.gsnr[b], largest);
        if (threadIdx.x == 0) table.flags->largest_gsnr = largest;
    }
    if (threadIdx.x == 0) {
        table.flags->derived = 1;
        table.flags->first = measured;
        state->gains_ready = 1;
        state->applied_updates++;
    }
}

struct SgdSaiConstants {
    float momentum, one_minus_momentum;
    float learning_rate;
    float lr_decay;  // lr wd
};

// One CUDA block a chunk. Without kMomentum m is null, and the update is the gradient itself. The first
// update needs no case of its own: m holds zeros, so 0 m + 1 g is g, exactly.
template <bool kMomentum>
__global__ __launch_bounds__(kChunkThreads) void sgd_sai_update_kernel(
    floatX* __restrict__ weights, float* __restrict__ master, float* __restrict__ m,
    const float* __restrict__ gradient, const Chunk* __restrict__ chunks,
    const DeviceBlock* __restrict__ blocks, const StepState* __restrict__ state,
    const float* __restrict__ gain, const GainFlags* __restrict__ flags, SgdSaiConstants constants) {
    if (!state->apply()) return;
    const Chunk chunk = chunks[blockIdx.x];
    const float lr_decay = blocks[chunk.block].decay ? constants.lr_decay : 0.0f;
    const float lr_gain = constants.learning_rate * gain[chunk.block];
    const float clip_factor = state->clip_factor;
    const bool first = flags->first;
    const float keep = first ? 0.0f : constants.momentum, take = first ? 1.0f : constants.one_minus_momentum;
#pragma unroll 2
    for (uint32_t i = threadIdx.x * f128::size; i < chunk.count; i += kChunkThreads * f128::size) {
        const uint64_t at = chunk.begin + i;
        const f128 g = load128_streaming(gradient + at);
        f128 p = load128_streaming(master + at), mm{};
        if constexpr (kMomentum) mm = load128_streaming(m + at);
        for (int k = 0; k < f128::size; k++) {
            const float gk = clip_factor * g.v[k];
            mm.v[k] = kMomentum ? keep * mm.v[k] + take * gk : gk;
            p.v[k] = fmaf(-lr_gain, mm.v[k], fmaf(-lr_decay, p.v[k], p.v[k]));
        }
        if constexpr (kMomentum) store128_streaming(m + at, mm);
        store128_streaming(master + at, p);
        store_weights(weights + at, p);
    }
}

// ---- host ------------------------------------------------------------------------------------------------

// gains.gsnr and .zero of every block from this step's gradient, where the state says that they are needed;
// else nothing is written. partial (table.chunks.size()) is scratch. Async on gpu.stream, deterministic.
inline void measure_gsnr(const GainTable& gains, GradientSums* partial, const float* gradient,
                         const StepState* state, const DeviceTable& table, double eps, const Gpu& gpu) {
    launch<GradientSumsShared>(gradient_sums_kernel, {table.chunks.size(), kChunkThreads}, gpu, partial,
                               gradient, table.chunks.get(), state);
    launch(gsnr_kernel, {table.blocks.size(), kWarpSize}, gpu, gains, partial, table.blocks.get(), state,
           eps);
}

// Counts the update of a step that is applied, and writes gains.gain where only gains.gsnr is there: just
// measured, or loaded from a checkpoint. Async on gpu.stream, deterministic.
inline void sgd_sai_begin(StepState* state, const GainTable& gains, const DeviceTable& table, GainRule rule,
                          const Gpu& gpu) {
    launch<BeginShared>(sgd_sai_begin_kernel, {1, kBeginThreads}, gpu, state, gains, table.blocks.get(),
                        table.blocks.size(), rule);
}

// One update of all chunks, unless the step is skipped: then nothing changes.
//   update.weights, .master, m (Np) written (+ read); m null for momentum 0. Async on gpu.stream,
//   deterministic.
inline void sgd_sai_update(const Update& update, float* m, const GainTable& gains, double momentum,
                           double weight_decay, const Gpu& gpu) {
    const SgdSaiConstants constants{static_cast<float>(momentum), static_cast<float>(1 - momentum),
                                    static_cast<float>(update.learning_rate),
                                    static_cast<float>(update.learning_rate * weight_decay)};
    const DeviceTable& table = *update.table;
    launch(m ? sgd_sai_update_kernel<true> : sgd_sai_update_kernel<false>,
           {table.chunks.size(), kChunkThreads}, gpu, update.weights, update.master, m, update.gradient,
           table.chunks.get(), table.blocks.get(), update.state, gains.gain, gains.flags, constants);
}

class SgdSai {
  public:
    static constexpr const char* kName = "SGD-SaI";
    static constexpr const char* kAxisName = "sgd_sai";

    struct Options {
        double learning_rate = 3e-3;  // peak, for the checks
        double weight_decay = 0.02, momentum = 0.9, eps = 1e-8;
        std::string gain = "raw";
        static Options from(const ::Options& o) {
            return {o.learning_rate, o.weight_decay, o.momentum, o.eps, o.gain};
        }
    };

    // Bytes of the state that a checkpoint keeps: the momentum, where there is one, and a g-SNR a block.
    static size_t state_bytes(const Options& o, size_t padded_parameters, size_t num_blocks) {
        return sizeof(float) * ((o.momentum > 0 ? padded_parameters : 0) + num_blocks);
    }

    // The start-up checks: options out of range are fatal; a learning rate that looks like the other unit's
    // gets a warning.
    static void check_options(const Options& o, const std::vector<TensorBlock>& blocks) {
        if (!(o.momentum >= 0 && o.momentum < 1))
            fatal("--momentum %g: wants a number from 0 to below 1", o.momentum);
        if (!(o.eps > 0)) fatal("--eps %g: wants a number above 0", o.eps);
        check_decay(o.learning_rate, o.weight_decay);
        warn_of_units(o, gain_rule(o.gain), blocks);
    }

    // Checks the options, allocates and zeroes the state.
    SgdSai(const Options& options, const std::vector<TensorBlock>& blocks, const Gpu& gpu)
        : options_(options), rule_(gain_rule(options.gain)), blocks_(blocks) {
        check_options(options, blocks);
        size_t num_chunks = 0;
        for (const TensorBlock& block : blocks) num_chunks += ceil_div(block.n, kChunkElements);
        m_ = DeviceBuffer<float>(options.momentum > 0 ? arena_elements(blocks) : 0);
        gsnr_ = DeviceBuffer<float>(blocks.size());
        gain_ = DeviceBuffer<float>(blocks.size());
        zero_ = DeviceBuffer<uint32_t>(blocks.size());
        flags_ = DeviceBuffer<GainFlags>(1);
        partial_ = DeviceBuffer<GradientSums>(num_chunks);
        if (m_.size()) fill_zero(m_.get(), m_.size(), gpu);
        fill_zero(gsnr_.get(), gsnr_.size(), gpu);
        fill_zero(zero_.get(), zero_.size(), gpu);
        fill_zero(flags_.get(), 1, gpu);
    }

    // One update, or none where update.state says skip. The first that is applied measures the gains before.
    // Async on gpu.stream, deterministic.
    void step(const Update& update, const Gpu& gpu) {
        if (!measured_)
            measure_gsnr(gains(), partial_, update.gradient, update.state, *update.table, options_.eps, gpu);
        sgd_sai_begin(update.state, gains(), *update.table, rule_, gpu);
        sgd_sai_update(update, m_, gains(), options_.momentum, options_.weight_decay, gpu);
    }

    // Takes the host's copy of a step's state, however late. The first that says that the gains are ready
    // ends the launches that measure, and gives the report; this waits for the GPU, once a run. Warns of
    // tensors whose g-SNR says little.
    std::optional<GainReport> observe(const StepState& state, const Gpu& gpu) {
        if (measured_ || !state.gains_ready) return std::nullopt;
        measured_ = true;
        std::vector<float> gsnr_cpu(blocks_.size()), gain_cpu(blocks_.size());
        std::vector<uint32_t> zero_cpu(blocks_.size());
        GainFlags flags_cpu{};
        copy_to_host(gsnr_cpu.data(), gsnr_.get(), gsnr_cpu.size(), gpu);
        copy_to_host(gain_cpu.data(), gain_.get(), gain_cpu.size(), gpu);
        copy_to_host(zero_cpu.data(), zero_.get(), zero_cpu.size(), gpu);
        copy_to_host(&flags_cpu, flags_.get(), 1, gpu);
        gpu.synchronize();
        GainReport report{options_.gain, flags_cpu.largest_gsnr, {}};
        for (size_t b = 0; b < blocks_.size(); b++) {
            report.rows.push_back({blocks_[b].hf_name, blocks_[b].name, blocks_[b].n, gsnr_cpu[b],
                                   gain_cpu[b], zero_cpu[b] != 0});
            warn_of_row(report.rows.back());
        }
        return report;
    }

    // f(StateTensor) for each piece of state. M and the gains aren't state: they are derived from the g-SNRs,
    // so that another --gain may go on from a checkpoint.
    template <class F>
    void each_state(F&& f) {
        if (m_.size()) f(StateTensor{"momentum_buffer", m_.get(), m_.size(), StateLayout::Arena});
        f(StateTensor{"gsnr", gsnr_.get(), gsnr_.size(), StateLayout::Block});
    }

    const Options& options() const { return options_; }

  private:
    GainTable gains() const { return {gsnr_, gain_, zero_, flags_}; }

    static GainRule gain_rule(const std::string& name) {
        if (name == "raw") return GainRule::Raw;
        if (name == "normalized") return GainRule::Normalized;
        if (name == "sqrt_n") return GainRule::SqrtN;
        if (name == "one") return GainRule::One;
        fatal("--gain %s: wants raw, normalized, sqrt_n or one", name.c_str());
    }

    // A rate is raw or normalized, a factor M apart, and M is about the square root of the largest tensor's n
    // (6213 of 124M). Raw rates that train GPT-2 lie between 3e-4 and 3e-2; this warns outside 3e-5 .. 3e-1.
    static void warn_of_units(const Options& o, GainRule rule, const std::vector<TensorBlock>& blocks) {
        size_t n = 1;
        for (const TensorBlock& block : blocks) n = std::max(n, block.n);
        const double M = std::sqrt(static_cast<double>(n));
        if ((rule == GainRule::Raw || rule == GainRule::SqrtN) && o.learning_rate > 0.3)
            warn(
                "--learning-rate %g with --gain %s is very large: it looks like a rate for --gain "
                "normalized, about %.0f times as large as the same raw one; --learning-rate %.3g "
                "--weight-decay "
                "%.3g is the same in raw units",
                o.learning_rate, o.gain.c_str(), M, o.learning_rate / M, o.weight_decay * M);
        if (rule == GainRule::Normalized && o.learning_rate / M < 3e-5)
            warn(
                "--learning-rate %g with --gain normalized is very small: it looks like a rate for --gain "
                "raw, about %.0f times smaller than the same normalized one; --learning-rate %.3g "
                "--weight-decay %.3g is the same in normalized units",
                o.learning_rate, M, o.learning_rate * M, o.weight_decay / M);
    }

    // By its formula g-SNR is at least sqrt(n - 1), but for eps: below that the gradient drowned in eps, far
    // above it the block's gradient is nearly constant. Neither is what the method means by a gain.
    static void warn_of_row(const GainRow& row) {
        const double root = std::sqrt(static_cast<double>(row.n));
        if (row.n > 1 && row.zero)
            warn("%s: its first gradient is all zero, so it has no g-SNR; sqrt(n) = %.4g is taken instead",
                 row.tensor.c_str(), root);
        else if (row.n > 1 && (row.gsnr < 0.5 * root || row.gsnr > 100 * root))
            warn("%s: g-SNR %.4g is far from sqrt(n) = %.4g: its first gradient is %s", row.tensor.c_str(),
                 static_cast<double>(row.gsnr), root,
                 row.gsnr < root ? "no larger than --eps" : "nearly constant");
    }

    Options options_;
    GainRule rule_;
    std::vector<TensorBlock> blocks_;
    bool measured_ = false;  // the host has seen that the gains are ready
    DeviceBuffer<float> m_, gsnr_, gain_;
    DeviceBuffer<uint32_t> zero_;
    DeviceBuffer<GainFlags> flags_;
    DeviceBuffer<GradientSums> partial_;
};
