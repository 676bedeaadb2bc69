// Token and position embedding, forward and backward.
//   out[b, t] = wte[token[b, t]] + wpe[t]
//   dwte[v] += sum of dout[b, t] over the positions with token v,   dwpe[t] = or += sum of dout[b, t] over b
// Rows are (C) of floatX, gradients fp32. Nothing is saved but the tokens.
//
// The backward pass is deterministic and has no atomics, although many positions share a token. The host
// sorts the positions by token (sort_positions() of dataloader.h); the sorted list is cut into segments of
// 32, whose warps add up runs of equal tokens in order:
//
//     tokens, sorted   | 3 3 3 7 | 7 7 7 7 | 7 9 9 9 | 9 9 9 9 |      (segments of 4 here)
//     added at once      3                         (none: 9 goes on)
//     to scratch               7   7 7 7 7   7 9 9 9   9 9 9 9
//
// A run inside one segment is added to dwte by its warp. A run that crosses a border leaves its part in
// scratch, in slot 0 of the segment if it came from the segment before, else in slot 1; a second kernel adds
// the parts of each such run, in order. So a token that fills half of the batch, a space in a vocabulary of
// bytes, is summed by as many warps as a rare one.
#pragma once
#include "llmc/fatal.h"     // fatal, ceil_div
#include "llmc/gpu.cuh"     // floatX, Gpu, Write
#include "llmc/launch.cuh"  // launch, shared
#include "llmc/reduce.cuh"  // kWarpSize
#include "llmc/vec.cuh"     // x128, f128, load128, store128

inline constexpr int kEmbeddingThreads = 256, kEmbeddingWarps = kEmbeddingThreads / kWarpSize;
// Positions a segment: enough that scratch, 2 C floats a segment, is an eighth of dout's bf16 bytes; few
// enough to have 2048 segments at 64K tokens.
inline constexpr int kEmbeddingSegment = 32;
// Rows a thread loads at once: 8 x 16 bytes in flight.
inline constexpr int kEmbeddingUnroll = 8;
// Warps that share the parts of one run.
inline constexpr int kEmbeddingMergeWarps = 4;

// out (x128::size floats, 16-byte aligned) = or += sum.
__device__ inline void write_columns(float* out, const float (&sum)[x128::size], bool add) {
    for (int k = 0; k < x128::size; k += f128::size) {
        f128 total = add ? load128(out + k) : f128{};
        for (int i = 0; i < f128::size; i++) total.v[i] += sum[k + i];
        store128(out + k, total);
    }
}

// ---- kernels ---------------------------------------------------------------------------------------------

// A warp a row.
__global__ __launch_bounds__(kEmbeddingThreads) void embedding_forward_kernel(floatX* out, const int* tokens,
                                                                              const floatX* wte,
                                                                              const floatX* wpe, int rows,
                                                                              int T, int C) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kEmbeddingWarps + threadIdx.x / kWarpSize;
    if (row >= rows) return;
    const floatX* token_row = wte + static_cast<int64_t>(tokens[row]) * C;
    const floatX* position_row = wpe + row % T * C;
    for (int c = threadIdx.x % kWarpSize * x128::size; c < C; c += kWarpSize * x128::size) {
        const x128 a = load128(token_row + c), b = load128(position_row + c);
        x128 sum;
        for (int k = 0; k < x128::size; k++) sum.set(k, a[k] + b[k]);
        store128(out + row * C + c, sum);
    }
}

// A thread a pack of columns of a row of wpe (P, C); rows from T on have no positions, and the sum 0.
__global__ __launch_bounds__(kEmbeddingThreads) void embedding_backward_wpe_kernel(float* dwpe,
                                                                                   const floatX* dout, int B,
                                                                                   int T, int P, int C,
                                                                                   bool add) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kEmbeddingThreads + threadIdx.x) * x128::size;
    const int64_t used = static_cast<int64_t>(T) * C;
    if (at >= static_cast<int64_t>(P) * C) return;
    float sum[x128::size] = {};
    for (int b0 = 0; b0 < B && at < used; b0 += kEmbeddingUnroll) {
        x128 x[kEmbeddingUnroll];
        for (int i = 0; i < kEmbeddingUnroll; i++)
            x[i] = b0 + i < B ? load128(dout + (b0 + i) * used + at) : x128{};
        for (int i = 0; i < kEmbeddingUnroll; i++)
            for (int k = 0; k < x128::size; k++) sum[k] += x[i][k];
    }
    write_columns(dwpe + at, sum, add);
}

// A warp a segment and 32 packs of columns. borders (segments, 2, C).
__global__ __launch_bounds__(kEmbeddingThreads) void embedding_backward_segments_kernel(
    float* dwte, float* borders, const floatX* dout, const int* tokens, const int* order, int n, int C) {
    const int column_blocks = (C + kWarpSize * x128::size - 1) / (kWarpSize * x128::size);
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kEmbeddingWarps + threadIdx.x / kWarpSize;
    const int64_t segment = warp / column_blocks, begin = segment * kEmbeddingSegment;
    const int c = (static_cast<int>(warp % column_blocks) * kWarpSize + threadIdx.x % kWarpSize) * x128::size;
    if (begin >= n || c >= C) return;
    const int64_t end = min(begin + kEmbeddingSegment, static_cast<int64_t>(n));
    const int first = tokens[order[begin]], last = tokens[order[end - 1]];
    const bool from_left = begin > 0 && tokens[order[begin - 1]] == first;
    const bool to_right = end < n && tokens[order[end]] == last;

    int token = first;
    float sum[x128::size] = {};
    auto end_run = [&] {
        if (token == first && from_left) write_columns(borders + 2 * segment * C + c, sum, false);
        else if (token == last && to_right) write_columns(borders + (2 * segment + 1) * C + c, sum, false);
        else write_columns(dwte + static_cast<int64_t>(token) * C + c, sum, true);
    };
    for (int64_t i0 = begin; i0 < end; i0 += kEmbeddingUnroll) {
        int token_at[kEmbeddingUnroll];
        x128 x[kEmbeddingUnroll];
        for (int i = 0; i < kEmbeddingUnroll; i++) {
            const int64_t position = order[min(i0 + i, end - 1)];
            token_at[i] = tokens[position];
            x[i] = load128(dout + position * C + c);
        }
        for (int i = 0; i < kEmbeddingUnroll && i0 + i < end; i++) {
            if (token_at[i] != token) {
                end_run();
                token = token_at[i];
                for (float& v : sum) v = 0;
            }
            for (int k = 0; k < x128::size; k++) sum[k] += x[i][k];
        }
    }
    end_run();
}

struct EmbeddingMergeShared {
    f128 sum[kEmbeddingMergeWarps][kWarpSize];
};

// A block a segment (blockIdx.x) and 128 columns (blockIdx.y): if a run begins in the segment and crosses its
// right border, adds the run's parts, slot 1 of this segment and slot 0 of those that follow, to dwte.
__global__ __launch_bounds__(kEmbeddingMergeWarps* kWarpSize) void embedding_backward_merge_kernel(
    float* dwte, const float* borders, const int* tokens, const int* order, int n, int C) {
    EmbeddingMergeShared& s = shared<EmbeddingMergeShared>();
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kEmbeddingSegment;
    const int64_t end = begin + kEmbeddingSegment;
    if (end >= n) return;
    const int token = tokens[order[end - 1]];
    if (tokens[order[end]] != token) return;
    if (begin > 0 && tokens[order[begin - 1]] == token) return;  // the run began before: another block's

    // Segments low .. high - 1 hold the run's other parts: by bisection, since tokens are sorted.
    const int64_t low = blockIdx.x + 1;
    int64_t high = (n + kEmbeddingSegment - 1) / kEmbeddingSegment;
    for (int64_t known = low; known + 1 < high;) {
        const int64_t middle = (known + high) / 2;
        (tokens[order[middle * kEmbeddingSegment]] == token ? known : high) = middle;
    }

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int c = (blockIdx.y * kWarpSize + lane) * f128::size;
    float sum[f128::size] = {};
    if (c < C)
        for (int64_t segment = low + warp; segment < high; segment += kEmbeddingMergeWarps) {
            const f128 x = load128(borders + 2 * segment * C + c);
            for (int k = 0; k < f128::size; k++) sum[k] += x[k];
        }
    for (int k = 0; k < f128::size; k++) s.sum[warp][lane].v[k] = sum[k];
    __syncthreads();
    if (warp != 0 || c >= C) return;
    f128 total = load128(borders + (2 * static_cast<int64_t>(blockIdx.x) + 1) * C + c);
    for (int w = 0; w < kEmbeddingMergeWarps; w++)
        for (int k = 0; k < f128::size; k++) total.v[k] += s.sum[w][lane][k];
    float* out = dwte + static_cast<int64_t>(token) * C + c;
    const f128 old = load128(out);
    for (int k = 0; k < f128::size; k++) total.v[k] += old[k];
    store128(out, total);
}

// ---- host ------------------------------------------------------------------------------------------------

// out[b, t] = wte[tokens[b, t]] + wpe[t], rounded once.
//   out (B, T, C) written; tokens (B, T), each a row of wte (Vp, C), and wpe (T or more, C) read; no
//   aliasing. C a multiple of x128::size. Async on gpu.stream, deterministic.
inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int B,
                              int T, int C, Gpu& gpu) {
    const int rows = B * T;
    launch(embedding_forward_kernel, {ceil_div(rows, kEmbeddingWarps), kEmbeddingThreads}, gpu, out, tokens,
           wte, wpe, rows, T, C);
}

// Floats of scratch that embedding_backward takes for n = B T positions.
inline size_t embedding_backward_scratch_floats(int64_t n, int C) {
    return static_cast<size_t>(ceil_div(n, kEmbeddingSegment)) * 2 * C;
}

// dwte[v] += the rows of dout whose token is v; dwpe = or += dout summed over B.
//   dwte (Vp, C) read and written, where a token occurs; dwpe (P, C), P >= T, written: with Write::Assign
//   rows from T on become 0, with Write::Add they stay. scratch of embedding_backward_scratch_floats(B T, C);
//   dout (B, T, C), tokens (B, T) and order (B T), their sort_positions(), read. C a multiple of x128::size,
//   B T < 2^31. Async on gpu.stream, deterministic: the bits depend on the tokens and shapes alone.
inline void embedding_backward(float* dwte, float* dwpe, float* scratch, const floatX* dout,
                               const int* tokens, const int* order, int B, int T, int P, int C,
                               Write write_wpe, Gpu& gpu) {
    const int n = B * T, wpe_rows = write_wpe == Write::Assign ? P : T;
    const int64_t segments = ceil_div(n, kEmbeddingSegment);
    launch(embedding_backward_wpe_kernel,
           {ceil_div(static_cast<int64_t>(wpe_rows) * C, kEmbeddingThreads * x128::size), kEmbeddingThreads},
           gpu, dwpe, dout, B, T, wpe_rows, C, write_wpe == Write::Add);
    launch(embedding_backward_segments_kernel,
           {ceil_div(segments * ceil_div(C, kWarpSize * x128::size), kEmbeddingWarps), kEmbeddingThreads},
           gpu, dwte, scratch, dout, tokens, order, n, C);
    const dim3 grid(static_cast<unsigned>(segments),
                    static_cast<unsigned>(ceil_div(C, kWarpSize * f128::size)));
    launch<EmbeddingMergeShared>(embedding_backward_merge_kernel,
                                 {grid, dim3(kEmbeddingMergeWarps * kWarpSize)}, gpu, dwte, scratch, tokens,
                                 order, n, C);
}
