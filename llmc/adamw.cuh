// AdamW with decoupled weight decay, as torch.optim.AdamW defines it. For update t = 1, 2, ... and g = c x
// gradient:
//
//     p = p (1 - lr wd)                                              tensors of two dimensions only
//     m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//     p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// t counts applied updates and lives on the device, since only the device knows whether a step is applied. m
// and v are fp32, one of each a parameter. A skipped step changes no bit of weights, state or t.
// Source: Loshchilov & Hutter 2019, algorithm 2; torch.optim.AdamW.
//
// Bytes a parameter, bf16 build: gradient 4 + master 8 + m 8 + v 8 + weight 2 = 30.
#pragma once
#include <cmath>
#include <cstddef>
#include <optional>
#include <vector>
#include "llmc/options.h"   // ::Options
#include "llmc/update.cuh"  // Update, StateTensor, GainReport

// ---- kernels ---------------------------------------------------------------------------------------------

// What depends on t, in double until it is rounded once.
struct AdamWFactors {
    float step_size;    // lr / (1 - beta1^t)
    float root_factor;  // 1 / sqrt(1 - beta2^t)
};

struct AdamWConstants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    float lr_decay;  // lr wd
};

// Counts the update and computes its factors. One thread: it runs before the update so that all blocks see
// the same t.
__global__ void adamw_begin_kernel(StepState* state, AdamWFactors* factors, double learning_rate,
                                   double beta1, double beta2) {
    if (!state->apply()) return;
    const double t = static_cast<double>(++state->applied_updates);
    factors->step_size = static_cast<float>(learning_rate / (1.0 - pow(beta1, t)));
    factors->root_factor = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, t)));
}

// One CUDA block a chunk. The decay is one fused multiply-add on p: 1 - lr wd as a float would lose it, since
// lr wd is 6e-5 and less, and a float near 1 has steps of 6e-8.
__global__ __launch_bounds__(kChunkThreads) void adamw_update_kernel(
    floatX* __restrict__ weights, float* __restrict__ master, float* __restrict__ m, float* __restrict__ v,
    const float* __restrict__ gradient, const Chunk* __restrict__ chunks,
    const DeviceBlock* __restrict__ blocks, const StepState* __restrict__ state,
    const AdamWFactors* __restrict__ factors, AdamWConstants constants) {
    if (!state->apply()) return;
    const Chunk chunk = chunks[blockIdx.x];
    const float lr_decay = blocks[chunk.block].decay ? constants.lr_decay : 0.0f;
    const float clip_factor = state->clip_factor, step_size = factors->step_size,
                root_factor = factors->root_factor;
#pragma unroll 2
    for (uint32_t i = threadIdx.x * f128::size; i < chunk.count; i += kChunkThreads * f128::size) {
        const uint64_t at = chunk.begin + i;
        const f128 g = load128_streaming(gradient + at);
        f128 mm = load128_streaming(m + at), vv = load128_streaming(v + at),
             p = load128_streaming(master + at);
        for (int k = 0; k < f128::size; k++) {
            const float gk = clip_factor * g.v[k];
            const float mk = constants.beta1 * mm.v[k] + constants.one_minus_beta1 * gk;
            const float vk = constants.beta2 * vv.v[k] + constants.one_minus_beta2 * (gk * gk);
            const float denominator = sqrtf(vk) * root_factor + constants.eps;
            const float decayed = fmaf(-lr_decay, p.v[k], p.v[k]);
            p.v[k] = fmaf(-step_size, mk / denominator, decayed);
            mm.v[k] = mk;
            vv.v[k] = vk;
        }
        store128_streaming(m + at, mm);
        store128_streaming(v + at, vv);
        store128_streaming(master + at, p);
        store_weights(weights + at, p);
    }
}

// ---- host ------------------------------------------------------------------------------------------------

// One update of all chunks, unless the step is skipped: then nothing changes.
//   weights, master, m, v (Np) written (+ read), by the arena's offsets; factors (1) scratch. Async on
//   gpu.stream, deterministic.
inline void adamw_update(const Update& update, float* m, float* v, AdamWFactors* factors, double beta1,
                         double beta2, double eps, double weight_decay, const Gpu& gpu) {
    launch(adamw_begin_kernel, {1, 1}, gpu, update.state, factors, update.learning_rate, beta1, beta2);
    const AdamWConstants constants{
        static_cast<float>(beta1), static_cast<float>(1 - beta1),
        static_cast<float>(beta2), static_cast<float>(1 - beta2),
        static_cast<float>(eps),   static_cast<float>(update.learning_rate * weight_decay)};
    const DeviceTable& table = *update.table;
    launch(adamw_update_kernel, {table.chunks.size(), kChunkThreads}, gpu, update.weights, update.master, m,
           v, update.gradient, table.chunks.get(), table.blocks.get(), update.state, factors, constants);
}

class AdamW {
  public:
    static constexpr const char* kName = "AdamW";
    static constexpr const char* kAxisName = "adamw";

    struct Options {
        double learning_rate = 6e-4;  // peak, for the checks
        double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
        static Options from(const ::Options& o) {
            return {o.learning_rate, o.weight_decay, o.beta1, o.beta2, o.eps};
        }
    };

    // Bytes of the state that a checkpoint keeps, for an arena of padded_parameters elements in num_blocks
    // tensors.
    static size_t state_bytes(const Options&, size_t padded_parameters, size_t) {
        return 2 * sizeof(float) * padded_parameters;
    }

    // The start-up checks: options out of range are fatal.
    static void check_options(const Options& o, const std::vector<TensorBlock>&) {
        if (!(o.beta1 >= 0 && o.beta1 < 1)) fatal("--beta1 %g: wants a number from 0 to below 1", o.beta1);
        if (!(o.beta2 >= 0 && o.beta2 < 1)) fatal("--beta2 %g: wants a number from 0 to below 1", o.beta2);
        if (!(o.eps > 0)) fatal("--eps %g: wants a number above 0", o.eps);
        check_decay(o.learning_rate, o.weight_decay);
    }

    // Checks the options, allocates and zeroes the state.
    AdamW(const Options& options, const std::vector<TensorBlock>& blocks, const Gpu& gpu)
        : options_(options) {
        check_options(options, blocks);
        const size_t Np = arena_elements(blocks);
        m_ = DeviceBuffer<float>(Np);
        v_ = DeviceBuffer<float>(Np);
        factors_ = DeviceBuffer<AdamWFactors>(1);
        fill_zero(m_.get(), Np, gpu);
        fill_zero(v_.get(), Np, gpu);
    }

    // One update, or none where update.state says skip. Async on gpu.stream, deterministic.
    void step(const Update& update, const Gpu& gpu) {
        adamw_update(update, m_, v_, factors_, options_.beta1, options_.beta2, options_.eps,
                     options_.weight_decay, gpu);
    }

    // Takes the host's copy of a step's state, however late. AdamW learns nothing from it and has nothing to
    // report.
    std::optional<GainReport> observe(const StepState&, const Gpu&) { return std::nullopt; }

    // f(StateTensor) for each piece of state.
    template <class F>
    void each_state(F&& f) {
        f(StateTensor{"exp_avg", m_.get(), m_.size(), StateLayout::Arena});
        f(StateTensor{"exp_avg_sq", v_.get(), v_.size(), StateLayout::Arena});
    }

    const Options& options() const { return options_; }

  private:
    Options options_;
    DeviceBuffer<float> m_, v_;
    DeviceBuffer<AdamWFactors> factors_;
};
