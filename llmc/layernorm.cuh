// Layernorm over the channels of each row, forward and backward, fused with the residual additions around it.
//
//   forward:  out = xhat * weight + bias,  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + 1e-5)
//   backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dout * weight
//             dweight = column sums of dout * xhat,  dbias = column sums of dout
//
// Saved for backward: x, mean, rstd. (Ba, Kiros, Hinton 2016.) The residual stream's additions are fused:
// forward first adds two tensors (x = inp1 + inp2 is rounded and written, too); backward adds dx to the
// stream's gradient and sums the columns of the result, which is the bias gradient of the projection that fed
// the stream. Rows are (C) of floatX, C a multiple of 64; sums and statistics are fp32.
//
// Bytes a row in bf16, each element moved once: forward 4 C, with residual 8 C; backward 8 C, or 6 C where
// dresidual is assigned.
#pragma once
#include <algorithm>        // min, max
#include "llmc/fatal.h"     // fatal, ceil_div
#include "llmc/gpu.cuh"     // floatX, Gpu, Write
#include "llmc/launch.cuh"  // launch, shared
#include "llmc/reduce.cuh"  // block_sum
#include "llmc/vec.cuh"     // x128, f128, load128, store128

inline constexpr float kLayernormEps = 1e-5f;  // GPT-2's layer_norm_epsilon

// Rows are spread over at most 512 threads, which sets the limit on C: 4096 in bf16, 2048 in fp32.
inline constexpr int kLayernormMaxThreads = 512, kLayernormMaxC = kLayernormMaxThreads * x128::size;
// Forward: rows of up to 32 packs (C <= 256 in bf16) on 8 lanes, 4 rows a warp, which share the shuffles;
// rows of up to 256 packs on a warp; both in blocks of 128. Longer ones on a block of 256.
inline constexpr int kLayernormFewLanes = 8, kLayernormLongThreads = 256;
template <int kThreads>
inline constexpr int kLayernormRowsPerBlock = kThreads <= kWarpSize ? 128 / kThreads : 1;
// Backward: rows a block takes at a time. With 2, a thread has 96 bytes in flight in 128 registers, and the
// 512 threads of an SM 48 KiB, twice latency x bandwidth at 3 TB/s; with 4 it takes 215 registers, half the
// threads, or spills.
inline constexpr int kLayernormBackwardRows = 2, kLayernormBackwardThreadsPerSm = 512;

// ---- forward ---------------------------------------------------------------------------------------------

template <int kThreads>
struct LayernormShared {
    float sum[kWarpSize];
};

// Sum over the kThreads threads of a row; each gets it. All threads of the warp, or of the block, must come.
template <int kThreads>
__device__ inline float row_sum(float x, float (&scratch)[kWarpSize]) {
    if constexpr (kThreads < kWarpSize) {
        for (int offset = kThreads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    } else {
        return block_sum<kThreads>(x, scratch);
    }
}

// kThreads threads (threadIdx.x) hold a row, kPacks packs each at most; a block has blockDim.y rows, one
// where kThreads > 32. kResidual: x = inp1 + inp2 is written to residual; else x = inp1. residual may be inp1
// or inp2.
template <int kThreads, int kPacks, bool kResidual>
__global__ __launch_bounds__(kThreads* kLayernormRowsPerBlock<kThreads>) void layernorm_forward_kernel(
    floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp1, const floatX* inp2,
    const floatX* weight, const floatX* bias, int rows, int C) {
    auto& s = shared<LayernormShared<kThreads>>();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t at = row * C;
    const int end = row < rows ? C : 0;  // threads beyond the last row have no columns, but come to the sums

    x128 x[kPacks];
    for (int i = 0; i < kPacks; i++) {
        const int c = (i * kThreads + threadIdx.x) * x128::size;
        x[i] = c < end ? load128_streaming(inp1 + at + c) : x128{};
    }
    if constexpr (kResidual) {
        x128 y[kPacks];
        for (int i = 0; i < kPacks; i++) {
            const int c = (i * kThreads + threadIdx.x) * x128::size;
            y[i] = c < end ? load128_streaming(inp2 + at + c) : x128{};
        }
        for (int i = 0; i < kPacks; i++) {
            const int c = (i * kThreads + threadIdx.x) * x128::size;
            for (int k = 0; k < x128::size; k++) x[i].set(k, x[i][k] + y[i][k]);
            if (c < end) store128_streaming(residual + at + c, x[i]);
        }
    }

    // Two passes over registers: the variance of x - mean loses nothing where the mean is large. Absent packs
    // are 0.
    float sum = 0, squares = 0;
    for (int i = 0; i < kPacks; i++)
        for (int k = 0; k < x128::size; k++) sum += x[i][k];
    const float m = row_sum<kThreads>(sum, s.sum) / C;
    for (int i = 0; i < kPacks; i++)
        if ((i * kThreads + static_cast<int>(threadIdx.x)) * x128::size < end)
            for (int k = 0; k < x128::size; k++) squares += (x[i][k] - m) * (x[i][k] - m);
    const float r = 1.0f / sqrtf(row_sum<kThreads>(squares, s.sum) / C + kLayernormEps);
    if (threadIdx.x == 0 && row < rows) mean[row] = m, rstd[row] = r;

    for (int i = 0; i < kPacks; i++) {
        const int c = (i * kThreads + threadIdx.x) * x128::size;
        if (c >= end) continue;
        const x128 w = load128(weight + c), b = load128(bias + c);
        x128 y;
        for (int k = 0; k < x128::size; k++) y.set(k, (x[i][k] - m) * r * w[k] + b[k]);
        store128(out + at + c, y);  // the next matmul's input
    }
}

// ---- backward --------------------------------------------------------------------------------------------

// Sums each of v[0 .. kValues - 1] over the warp with kValues - 1 + log2(32 / kValues) shuffles instead of 5
// kValues: in each step a lane gives half of its values away and adds the other half of its partner's. The
// sum of v[j] is returned to lanes j * 32 / kValues and on. kValues is a power of two.
template <int kValues>
__device__ inline float warp_sum_many(float (&v)[kValues]) {
    const int lane = threadIdx.x % kWarpSize;
    int offset = kWarpSize / 2;
#pragma unroll
    for (int half = kValues / 2; half > 0; half /= 2, offset /= 2) {
        const bool upper = lane & offset;
#pragma unroll
        for (int j = 0; j < half; j++) {
            const float given = upper ? v[j] : v[j + half], kept = upper ? v[j + half] : v[j];
            v[j] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
        }
    }
    float sum = v[0];
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

struct LayernormBackwardShared {
    float sums[2][kLayernormMaxThreads / kWarpSize][2 * kLayernormBackwardRows];  // [turn][warp][value]
};

// The block takes 2 rows at a time; thread t has the pack of columns t of both, and keeps the
// column sums of its rows in registers: dweight, dbias and, with_proj_bias, those of the new dresidual. They
// end in partials (gridDim.x, 3 or 2, C).
__global__ __launch_bounds__(kLayernormMaxThreads) void layernorm_backward_kernel(
    floatX* dresidual, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
    const float* mean, const float* rstd, int rows, int C, bool add_to_dresidual, bool with_proj_bias) {
    LayernormBackwardShared& s = shared<LayernormBackwardShared>();
    constexpr int kRows = kLayernormBackwardRows;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    const int c = threadIdx.x * x128::size;
    const bool active = c < C;
    const x128 w = active ? load128(weight + c) : x128{};
    float dweight[x128::size] = {}, dbias[x128::size] = {}, dproj_bias[x128::size] = {};

    int turn = 0;
    for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows; row0 < rows;
         row0 += static_cast<int64_t>(gridDim.x) * kRows, turn ^= 1) {
        // Rows beyond the last, and threads beyond the row, have dout = 0 and so add nothing.
        x128 dy[kRows], x[kRows], dres[kRows];
        float m[kRows], r[kRows];
        for (int j = 0; j < kRows; j++) {
            const int64_t row = row0 + j, at = row * C + c;
            const bool there = active && row < rows;
            dy[j] = there ? load128_streaming(dout + at) : x128{};
            x[j] = there ? load128_streaming(inp + at) : x128{};
            dres[j] = there && add_to_dresidual ? load128(dresidual + at) : x128{};
            m[j] = row < rows ? mean[row] : 0.0f;
            r[j] = row < rows ? rstd[row] : 0.0f;
        }

        // Each row's sums of g and g * xhat: over the warp, then over the block's warps in order.
        float sums[2 * kRows] = {};
        for (int j = 0; j < kRows; j++)
            for (int k = 0; k < x128::size; k++) {
                const float xhat = (x[j][k] - m[j]) * r[j], g = dy[j][k] * w[k];
                sums[2 * j] += g;
                sums[2 * j + 1] += g * xhat;
                dbias[k] += dy[j][k];
                dweight[k] += dy[j][k] * xhat;
            }
        constexpr int kLanesPerSum = kWarpSize / (2 * kRows);
        const float warp_total = warp_sum_many(sums);
        if (lane % kLanesPerSum == 0) s.sums[turn][warp][lane / kLanesPerSum] = warp_total;
        __syncthreads();  // one a step: this turn's sums are written again after the next
        for (int j = 0; j < 2 * kRows; j++) sums[j] = s.sums[turn][0][j];
        for (int other = 1; other < warps; other++)
            for (int j = 0; j < 2 * kRows; j++) sums[j] += s.sums[turn][other][j];

        for (int j = 0; j < kRows; j++) {
            const int64_t row = row0 + j;
            if (!active || row >= rows) continue;
            const float mean_g = sums[2 * j] / C, mean_g_xhat = sums[2 * j + 1] / C;
            for (int k = 0; k < x128::size; k++) {
                const float xhat = (x[j][k] - m[j]) * r[j], g = dy[j][k] * w[k];
                dres[j].set(k, dres[j][k] + r[j] * (g - mean_g - xhat * mean_g_xhat));
                dproj_bias[k] += dres[j][k];  // as rounded: what the projection's weight gradient sees, too
            }
            store128(dresidual + row * C + c, dres[j]);
        }
    }

    if (!active) return;
    float* out = partials + static_cast<int64_t>(blockIdx.x) * (with_proj_bias ? 3 : 2) * C + c;
    for (int k = 0; k < x128::size; k += f128::size) {
        store128(out + k, f128{dweight[k], dweight[k + 1], dweight[k + 2], dweight[k + 3]});
        store128(out + C + k, f128{dbias[k], dbias[k + 1], dbias[k + 2], dbias[k + 3]});
        if (with_proj_bias)
            store128(out + 2 * C + k,
                     f128{dproj_bias[k], dproj_bias[k + 1], dproj_bias[k + 2], dproj_bias[k + 3]});
    }
}

// Backward's end: 8 lanes take 128 bytes of columns; 32 of them share the partials, so that the loads of a
// few hundred blocks' sums are under way at once.
inline constexpr int kLayernormFinishLanes = 8, kLayernormFinishRows = 32;
struct LayernormFinishShared {
    f128 sum[kLayernormFinishRows][kLayernormFinishLanes];
};

struct LayernormGradients {
    float *dweight, *dbias, *dproj_bias;  // (C) each; dproj_bias may be null
};

// gradients = or += partials (blocks, 3 or 2, C) summed over blocks in a fixed order.
__global__
__launch_bounds__(kLayernormFinishLanes* kLayernormFinishRows) void layernorm_backward_finish_kernel(
    LayernormGradients gradients, const float* partials, int blocks, int C, bool add) {
    LayernormFinishShared& s = shared<LayernormFinishShared>();
    const int columns = (gradients.dproj_bias ? 3 : 2) * C;
    // C is a multiple of 64, so the grid fits exactly, and a pack lies in one of the three.
    const int column = (blockIdx.x * kLayernormFinishLanes + threadIdx.x) * f128::size;
    float sum[f128::size] = {};
    for (int block = threadIdx.y; block < blocks; block += kLayernormFinishRows) {
        const f128 x = load128(partials + static_cast<int64_t>(block) * columns + column);
        for (int k = 0; k < f128::size; k++) sum[k] += x[k];
    }
    for (int k = 0; k < f128::size; k++) s.sum[threadIdx.y][threadIdx.x].v[k] = sum[k];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int y = 1; y < kLayernormFinishRows; y++)
        for (int k = 0; k < f128::size; k++) sum[k] += s.sum[y][threadIdx.x][k];
    const int which = column / C;
    float* array = which == 0 ? gradients.dweight : which == 1 ? gradients.dbias : gradients.dproj_bias;
    float* out = array + column % C;
    f128 total = add ? load128(out) : f128{};
    for (int k = 0; k < f128::size; k++) total.v[k] += sum[k];
    store128(out, total);
}

// ---- host ------------------------------------------------------------------------------------------------

inline void check_layernorm_shape(const char* op, int rows, int C) {
    if (rows < 1 || C < 64 || C % 64 != 0 || C > kLayernormMaxC)
        fatal("%s: %d rows of %d channels; wanted at least 1 row of a multiple of 64 channels, %d at most",
              op, rows, C, kLayernormMaxC);
}

template <bool kResidual>
inline void launch_layernorm_forward(floatX* residual, floatX* out, float* mean, float* rstd,
                                     const floatX* inp1, const floatX* inp2, const floatX* weight,
                                     const floatX* bias, int rows, int C, Gpu& gpu) {
    check_layernorm_shape("layernorm_forward", rows, C);
    const int packs = C / x128::size;
    auto start = [&]<int kThreads, int kPacks>() {
        constexpr unsigned kRows = kLayernormRowsPerBlock<kThreads>;
        const LaunchShape shape(dim3(static_cast<unsigned>(ceil_div(rows, kRows))), dim3(kThreads, kRows));
        launch<LayernormShared<kThreads>>(layernorm_forward_kernel<kThreads, kPacks, kResidual>, shape, gpu,
                                          residual, out, mean, rstd, inp1, inp2, weight, bias, rows, C);
    };
    if (packs <= 4 * kLayernormFewLanes) start.template operator()<kLayernormFewLanes, 4>();
    else if (packs <= 2 * kWarpSize) start.template operator()<kWarpSize, 2>();
    else if (packs <= 4 * kWarpSize) start.template operator()<kWarpSize, 4>();
    else if (packs <= 8 * kWarpSize) start.template operator()<kWarpSize, 8>();
    else start.template operator()<kLayernormLongThreads, kLayernormMaxThreads / kLayernormLongThreads>();
}

// out = layernorm(inp) * weight + bias, row by row.
//   out (rows, C), mean, rstd (rows) written; inp (rows, C), weight, bias (C) read; out may be inp. C a
//   multiple of 64, up to kLayernormMaxC. Async on gpu.stream, deterministic.
inline void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                              const floatX* bias, int rows, int C, Gpu& gpu) {
    launch_layernorm_forward<false>(nullptr, out, mean, rstd, inp, nullptr, weight, bias, rows, C, gpu);
}

// residual = inp1 + inp2, rounded to floatX; out = layernorm(residual) * weight + bias, the same bits as
// layernorm_forward of that.
//   residual, out (rows, C), mean, rstd (rows) written; inp1, inp2 (rows, C), weight, bias (C) read. residual
//   may be inp1 or inp2, out may be inp2. C a multiple of 64, up to kLayernormMaxC. Async on gpu.stream,
//   deterministic.
inline void residual_layernorm_forward(floatX* residual, floatX* out, float* mean, float* rstd,
                                       const floatX* inp1, const floatX* inp2, const floatX* weight,
                                       const floatX* bias, int rows, int C, Gpu& gpu) {
    launch_layernorm_forward<true>(residual, out, mean, rstd, inp1, inp2, weight, bias, rows, C, gpu);
}

inline int layernorm_backward_threads(int C) {
    return static_cast<int>(ceil_div(C / x128::size, kWarpSize) * kWarpSize);
}

// As many blocks as are resident at once: each writes 12 C bytes of partial sums, so more would only cost.
inline int layernorm_backward_blocks(int rows, int C, const Gpu& gpu) {
    const int per_sm = kLayernormBackwardThreadsPerSm / layernorm_backward_threads(C);
    return static_cast<int>(std::min<int64_t>(per_sm * gpu.properties.multiProcessorCount,
                                              ceil_div(rows, kLayernormBackwardRows)));
}

// Floats of scratch that layernorm_backward takes on this GPU.
inline size_t layernorm_backward_scratch_floats(int rows, int C, const Gpu& gpu) {
    return static_cast<size_t>(layernorm_backward_blocks(rows, C, gpu)) * 3 * C;
}

// dresidual = or += the gradient of the layernorm's input; gradients.dweight, dbias (C) = or += its
// parameters'; gradients.dproj_bias (C), unless null, = or += the column sums of the new dresidual, as
// rounded to floatX: the bias gradient of the projection whose output went into the residual stream, equal to
// what bias_backward(dresidual) computes but for the order of summation.
//   dresidual (rows, C) written, and read with Write::Add; scratch of layernorm_backward_scratch_floats(rows,
//   C); dout, inp (rows, C), weight (C), mean, rstd (rows) read, as the forward pass left them. With
//   Write::Assign dresidual may be dout or inp. C a multiple of 64, up to kLayernormMaxC. Async on
//   gpu.stream, deterministic; the bits depend on the shape and the GPU's number of SMs.
inline void layernorm_backward(floatX* dresidual, LayernormGradients gradients, float* scratch,
                               const floatX* dout, const floatX* inp, const floatX* weight, const float* mean,
                               const float* rstd, int rows, int C, Write write_dresidual,
                               Write write_gradients, Gpu& gpu) {
    check_layernorm_shape("layernorm_backward", rows, C);
    const unsigned threads = layernorm_backward_threads(C), blocks = layernorm_backward_blocks(rows, C, gpu);
    const bool with_proj_bias = gradients.dproj_bias != nullptr;
    launch<LayernormBackwardShared>(layernorm_backward_kernel, {blocks, threads}, gpu, dresidual, scratch,
                                    dout, inp, weight, mean, rstd, rows, C, write_dresidual == Write::Add,
                                    with_proj_bias);
    const unsigned columns = (with_proj_bias ? 3 : 2) * C;
    const LaunchShape finish(dim3(columns / (kLayernormFinishLanes * f128::size)),
                             dim3(kLayernormFinishLanes, kLayernormFinishRows));
    launch<LayernormFinishShared>(layernorm_backward_finish_kernel, finish, gpu, gradients, scratch,
                                  static_cast<int>(blocks), C, write_gradients == Write::Add);
}
