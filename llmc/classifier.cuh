// Cross-entropy of a softmax, fused with its gradient, and the mean of the losses.
//   loss = log(sum_i exp(x_i)) - x_target,   dlogits = (softmax(x) - onehot(target)) * dloss_scale,   over i
//   < V
// x is a row of logits (Vp), the vocabulary padded; pad columns count in nothing and get gradient 0. Nothing
// is saved: the gradient replaces the logits in place.
//
// A row is read once from HBM, so a row costs 2 V + 2 Vp bytes in bf16 with gradients and 2 V without. The
// maximum and the sum are taken in one pass, rescaling the sum as the maximum grows (Milakov & Gimelshein
// 2018), and the row waits where it is cheap:
//   V <= 2048 (1024 in fp32): a warp a row, or 8 lanes up to a quarter of that, the row in registers;
//   above: a block a row, the row in shared memory. 50304 bf16 are 98.25 KiB: two blocks live on an SM of an
//   H100 (227 KiB), one on an A100 (163 KiB), and it still fits the 99 KiB of an RTX 4090. What a longer row
//   has beyond that is read twice, the second time from L2: 132 SMs x 2 blocks x 100 KB = 26 MB in flight of
//   its 50.
// Exponentials: two a logit, 6,300 cycles of an SM's special-function units a row of 50304, while its 201 KB
// take 15,500 cycles of the SM's share of 3 TB/s: memory stays the bound.
//
// Scores are kept in units of log2: z = x log2(e) - M, one FFMA, with M the rounded x_max log2(e). Every use
// of the row takes the same M, so its rounding cancels in the loss and in the probabilities, even at |x| =
// 1e4.
#pragma once
#include <ptx.cuh>          // ex2
#include "llmc/gpu.cuh"     // floatX, Gpu, Write
#include "llmc/launch.cuh"  // launch, shared
#include "llmc/reduce.cuh"  // block_sum, kWarpSize
#include "llmc/vec.cuh"     // x128, load128, store128

enum class ClassifierMode { LossOnly, LossAndGradient };

// Short rows: packs a lane holds at most (32 registers of logits); lanes a row where they are enough, so that
// 4 rows share a warp's shuffles; threads a block.
inline constexpr int kClassifierPacks = 8, kClassifierFewLanes = 8, kClassifierShortThreads = 128;
// Long rows: loads under way per thread. 1024 threads x 4 x 16 bytes = 64 KiB an SM, latency x bandwidth
// needs about 20.
inline constexpr int kClassifierUnroll = 4;
// Long rows: packs held in shared memory, and threads: 16 KiB and 256, or 98.25 KiB (one row of GPT-2) and
// 512.
inline constexpr int kClassifierMediumPacks = 1024, kClassifierMediumThreads = 256;
inline constexpr int kClassifierLargePacks = 6288, kClassifierLargeThreads = 512;

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// max = M: at least the largest x log2(e) seen; sum = sum of 2^(x log2(e) - M). Both 0-element and -infinity
// safe.
struct SoftmaxState {
    float max = -1e30f, sum = 0;
};

__device__ inline void rescale(SoftmaxState& state, float max) {
    state.sum *= ptx::ex2(state.max - max);
    state.max = max;
}

// The state of each group of kLanes lanes, to all of them: the same tree for every lane, so they agree bit
// for bit.
template <int kLanes = kWarpSize>
__device__ inline SoftmaxState warp_reduce(SoftmaxState state) {
    float max = state.max;
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
    rescale(state, max);
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        state.sum += __shfl_xor_sync(0xffffffffu, state.sum, offset);
    return state;
}

// The pack at column c of a row, with the columns from V on as -infinity, which counts in no maximum and no
// sum.
__device__ inline x128 load_logits(const floatX* row_logits, int c, int V) {
    x128 x = load128(row_logits + c);
    if (c + x128::size > V)
        for (int k = 0; k < x128::size; k++)
            if (c + k >= V) x.set(k, -INFINITY);
    return x;
}

__device__ inline void add_pack(SoftmaxState& state, const x128& x) {
    float max = x[0];
    for (int k = 1; k < x128::size; k++) max = fmaxf(max, x[k]);
    max = fmaxf(state.max, max * kLog2E);
    rescale(state, max);
    for (int k = 0; k < x128::size; k++) state.sum += ptx::ex2(fmaf(x[k], kLog2E, -max));
}

// What turns a row of logits into its gradient, and its loss.
struct RowResult {
    SoftmaxState state;
    float dloss_scale,
        probability_scale;  // dlogit = 2^(x log2(e) - M) probability_scale - (dloss_scale at the target)

    __device__ RowResult(SoftmaxState state_, float dloss_scale_)
        : state(state_), dloss_scale(dloss_scale_), probability_scale(dloss_scale_ / state_.sum) {}
    __device__ float loss(float target_logit) const {
        return kLn2 * (log2f(state.sum) - fmaf(target_logit, kLog2E, -state.max));
    }
    // The gradients of the logits at columns c .. c + x128::size - 1.
    __device__ x128 gradient(const x128& x, int c, int V, int target) const {
        float d[x128::size];
        for (int k = 0; k < x128::size; k++)
            d[k] = ptx::ex2(fmaf(x[k], kLog2E, -state.max)) * probability_scale;
        if (target >= c && target < c + x128::size)
            for (int k = 0; k < x128::size; k++)
                if (c + k == target) d[k] -= dloss_scale;
        if (c + x128::size > V)
            for (int k = 0; k < x128::size; k++)
                if (c + k >= V) d[k] = 0;
        x128 dx;
        for (int k = 0; k < x128::size; k++) dx.set(k, d[k]);
        return dx;
    }
};

// ---- short rows: a warp or 8 lanes a row, the row in registers -------------------------------------------

// Lane l of a row's kLanes holds packs l, l + kLanes, ..., kPacks of them. The lane that holds the target
// writes the loss: no lane reads memory that another one overwrites.
template <int kLanes, int kPacks>
__global__ __launch_bounds__(kClassifierShortThreads,
                             4) void classifier_warp_kernel(floatX* logits, float* losses, const int* targets,
                                                            float dloss_scale, int rows, int V, int Vp,
                                                            bool with_gradient) {
    const int64_t row =
        static_cast<int64_t>(blockIdx.x) * (kClassifierShortThreads / kLanes) + threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    const bool there = row < rows;  // lanes beyond the last row still come to the shuffles
    floatX* row_logits = logits + row * Vp;
    const int target = there ? targets[row] : -1;
    const bool valid = target >= 0 && target < V;

    x128 x[kPacks];
    SoftmaxState state;
    for (int i = 0; i < kPacks; i++) {
        const int c = (i * kLanes + lane) * x128::size;
        x[i] = there && c < V ? load_logits(row_logits, c, V) : x128{};
    }
    for (int i = 0; i < kPacks; i++)
        if (there && (i * kLanes + lane) * x128::size < V) add_pack(state, x[i]);
    float target_logit = 0;
    const bool owns_target = valid && target / x128::size % kLanes == lane;
    if (owns_target) target_logit = static_cast<float>(row_logits[target]);

    const RowResult result(warp_reduce<kLanes>(state), dloss_scale);
    if (!there) return;
    if (owns_target) losses[row] = result.loss(target_logit);
    if (!valid && lane == 0) losses[row] = NAN;
    if (!with_gradient) return;
    for (int i = 0; i < kPacks; i++) {
        const int c = (i * kLanes + lane) * x128::size;
        if (c < V) store128(row_logits + c, result.gradient(x[i], c, V, target));
        else if (c < Vp) store128(row_logits + c, x128{});
    }
}

// ---- long rows: a block a row, the row in shared memory --------------------------------------------------

template <int kThreads, int kHeldPacks>
struct ClassifierShared {
    x128 row[kHeldPacks];  // a thread reads only what it wrote
    float max[kWarpSize], sum[kWarpSize];
};

// All threads get the block's state; one barrier, which also parts the reads of the row from the writes that
// replace it.
template <int kThreads>
__device__ inline SoftmaxState block_reduce(SoftmaxState state, float (&max)[kWarpSize],
                                            float (&sum)[kWarpSize]) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    state = warp_reduce(state);
    if (lane == 0) max[warp] = state.max, sum[warp] = state.sum;
    __syncthreads();
    SoftmaxState other;
    if (lane < kThreads / kWarpSize) other.max = max[lane], other.sum = sum[lane];
    return warp_reduce(other);
}

template <int kThreads, int kHeldPacks>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void classifier_block_kernel(
    floatX* logits, float* losses, const int* targets, float dloss_scale, int V, int Vp, bool with_gradient) {
    auto& s = shared<ClassifierShared<kThreads, kHeldPacks>>();
    const int64_t row = blockIdx.x;
    const int thread = threadIdx.x;
    floatX* row_logits = logits + row * Vp;
    const int packs = (V + x128::size - 1) / x128::size;  // those with a logit of the vocabulary
    const int target = targets[row];
    const bool valid = target >= 0 && target < V;

    // pass 1: from HBM; maximum and sum
    SoftmaxState state;
    for (int p0 = thread; p0 < packs; p0 += kClassifierUnroll * kThreads) {
        x128 x[kClassifierUnroll];
        for (int i = 0; i < kClassifierUnroll; i++)
            if (const int p = p0 + i * kThreads; p < packs) x[i] = load_logits(row_logits, p * x128::size, V);
        for (int i = 0; i < kClassifierUnroll; i++) {
            const int p = p0 + i * kThreads;
            if (p >= packs) continue;
            if (p < kHeldPacks) s.row[p] = x[i];
            add_pack(state, x[i]);
        }
    }
    float target_logit = 0;
    const bool owns_target = valid && target / x128::size % kThreads == thread;
    if (owns_target) target_logit = static_cast<float>(row_logits[target]);

    const RowResult result(block_reduce<kThreads>(state, s.max, s.sum), dloss_scale);
    if (owns_target) losses[row] = result.loss(target_logit);
    if (!valid && thread == 0) losses[row] = NAN;
    if (!with_gradient) return;

    // pass 2: from shared memory, or from L2 beyond what it holds; gradient in place
    for (int p = thread; p < Vp / x128::size; p += kThreads) {
        x128 dx{};
        if (p < packs) {
            const x128 x = p < kHeldPacks ? s.row[p] : load_logits(row_logits, p * x128::size, V);
            dx = result.gradient(x, p * x128::size, V, target);
        }
        store128_streaming(row_logits + p * x128::size, dx);
    }
}

// ---- the mean of the losses ------------------------------------------------------------------------------

inline constexpr int kLossMeanThreads = 256;
struct LossMeanShared {
    double partial[kWarpSize];
};

__global__ __launch_bounds__(kLossMeanThreads) void loss_mean_kernel(float* loss, const float* losses,
                                                                     int rows, float scale, bool add) {
    LossMeanShared& s = shared<LossMeanShared>();
    constexpr int kUnroll = 8;  // loads under way: one block has to hide the latency alone
    double sum = 0;
    for (int64_t r0 = threadIdx.x; r0 < rows; r0 += kUnroll * kLossMeanThreads) {
        float x[kUnroll];
        for (int i = 0; i < kUnroll; i++)
            x[i] = r0 + i * kLossMeanThreads < rows ? losses[r0 + i * kLossMeanThreads] : 0.0f;
        for (int i = 0; i < kUnroll; i++) sum += static_cast<double>(x[i]);
    }
    sum = block_sum<kLossMeanThreads>(sum, s.partial);
    if (threadIdx.x == 0) *loss = (add ? *loss : 0.0f) + static_cast<float>(sum * static_cast<double>(scale));
}

// ---- host ------------------------------------------------------------------------------------------------

// losses = cross-entropy of each row; with LossAndGradient, logits = dlogits in place, scaled by dloss_scale,
// pad columns 0. With LossOnly logits stay as they are.
//   logits (rows, Vp), read and written; losses (rows) written; targets (rows) read. 1 <= V <= Vp, Vp a
//   multiple of x128::size, logits 16-byte aligned. A target outside [0, V) gives a NaN loss and no gradient
//   of its own. Async on gpu.stream, deterministic.
inline void classifier(floatX* logits, float* losses, const int* targets, float dloss_scale, int rows, int V,
                       int Vp, ClassifierMode mode, Gpu& gpu) {
    if (rows < 1 || V < 1 || V > Vp || Vp % x128::size != 0)
        fatal(
            "classifier: %d rows of %d logits padded to %d; wanted rows and logits, padded to a multiple of "
            "%d",
            rows, V, Vp, x128::size);
    const bool with_gradient = mode == ClassifierMode::LossAndGradient;
    const int packs = Vp / x128::size;
    auto start = [&]<int kLanes, int kPacks>() {
        launch(classifier_warp_kernel<kLanes, kPacks>,
               {ceil_div(rows, kClassifierShortThreads / kLanes), kClassifierShortThreads}, gpu, logits,
               losses, targets, dloss_scale, rows, V, Vp, with_gradient);
    };
    if (packs <= 4 * kClassifierFewLanes) {
        start.template operator()<kClassifierFewLanes, 4>();
    } else if (packs <= kClassifierPacks * kClassifierFewLanes) {
        start.template operator()<kClassifierFewLanes, kClassifierPacks>();
    } else if (packs <= 4 * kWarpSize) {
        start.template operator()<kWarpSize, 4>();
    } else if (packs <= kClassifierPacks * kWarpSize) {
        start.template operator()<kWarpSize, kClassifierPacks>();
    } else if (Vp <= kClassifierMediumPacks * x128::size) {
        launch<ClassifierShared<kClassifierMediumThreads, kClassifierMediumPacks>>(
            classifier_block_kernel<kClassifierMediumThreads, kClassifierMediumPacks>,
            {rows, kClassifierMediumThreads}, gpu, logits, losses, targets, dloss_scale, V, Vp,
            with_gradient);
    } else {
        launch<ClassifierShared<kClassifierLargeThreads, kClassifierLargePacks>>(
            classifier_block_kernel<kClassifierLargeThreads, kClassifierLargePacks>,
            {rows, kClassifierLargeThreads}, gpu, logits, losses, targets, dloss_scale, V, Vp, with_gradient);
    }
}

// loss = or += scale * sum(losses), summed in double in a fixed order.
//   loss (1) written, losses (rows) read; rows >= 1. Async on gpu.stream, deterministic.
inline void loss_mean(float* loss, const float* losses, int rows, float scale, Write write, Gpu& gpu) {
    launch<LossMeanShared>(loss_mean_kernel, {1, kLossMeanThreads}, gpu, loss, losses, rows, scale,
                           write == Write::Add);
}
