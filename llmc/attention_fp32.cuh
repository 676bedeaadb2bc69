// Attention of the fp32 build: the reference, plain FFMA, O(T) memory, no shared memory and no thread that
// waits for another. A thread owns one row, a query or a key, keeps its 64 numbers and their sums in
// registers, and walks the rows on the other side of the causal triangle; the lanes of a warp read the same
// row at the same time, from cache.
//
// The formulas are those of attention_forward.cuh and attention_backward.cuh. Backward has a kernel each for
// dQ, dK, dV: three rows of 64 numbers a thread fit in the registers, four don't.
#pragma once
#include <cstddef>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_tile.cuh"  // HeadRows, kHeadSize, kScale
#include "llmc/launch.cuh"          // launch

namespace attention {

inline constexpr int kRowThreads = 64;  // rows a block owns: few, so that small problems spread over the SMs

// 64 numbers of a row in registers; rows are 256-byte aligned.
struct Row {
    float x[kHeadSize];

    __device__ void load(const float* row, float factor = 1.0f) {
#pragma unroll
        for (int i = 0; i < kHeadSize; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(row + i);
            x[i] = v.x * factor, x[i + 1] = v.y * factor, x[i + 2] = v.z * factor, x[i + 3] = v.w * factor;
        }
    }
    __device__ void store(float* row, float factor) const {
#pragma unroll
        for (int i = 0; i < kHeadSize; i += 4)
            *reinterpret_cast<float4*>(row + i) =
                float4{x[i] * factor, x[i + 1] * factor, x[i + 2] * factor, x[i + 3] * factor};
    }
    __device__ void clear() {
#pragma unroll
        for (float& v : x) v = 0.0f;
    }
    __device__ void scale(float factor) {
#pragma unroll
        for (float& v : x) v *= factor;
    }
    // __ldg on purpose: were it the same instruction as dot's, the compiler would keep the row from dot to
    // add, and spill.
    __device__ void add(float factor, const float* row) {
#pragma unroll
        for (int i = 0; i < kHeadSize; i += 4) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(row + i));
            x[i] += factor * v.x, x[i + 1] += factor * v.y, x[i + 2] += factor * v.z,
                x[i + 3] += factor * v.w;
        }
    }
    __device__ float dot(const float* row) const {
        float sum[4] = {};  // four chains, so that a sum doesn't wait for its own last addition
#pragma unroll
        for (int i = 0; i < kHeadSize; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(row + i);
            sum[0] += x[i] * v.x, sum[1] += x[i + 1] * v.y, sum[2] += x[i + 2] * v.z,
                sum[3] += x[i + 3] * v.w;
        }
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
};

// What a thread works on; row may be T or more. Grid: the row blocks of a head, head by head.
struct ThreadRow {
    int head, row;
    __device__ explicit ThreadRow(int T) {
        const int blocks = (T + kRowThreads - 1) / kRowThreads;
        head = blockIdx.x / blocks;
        row = blockIdx.x % blocks * kRowThreads + threadIdx.x;
    }
};

__global__ void __launch_bounds__(kRowThreads)
    attention_forward_fp32_kernel(float* out, float* lse, const float* qkv, int T, int NH) {
    const auto [head, query] = ThreadRow(T);
    if (query >= T) return;
    const HeadRows<const float> keys = packed_rows(qkv, kKey, head, T, NH),
                                values = packed_rows(qkv, kValue, head, T, NH);
    Row q, o;
    q.load(packed_rows(qkv, kQuery, head, T, NH).row(query), kScaleLog2);
    o.clear();
    float top = -INFINITY, sum = 0.0f;
    for (int key = 0; key <= query; key++) {
        const float score = q.dot(keys.row(key));
        if (score > top) {
            const float correction = exp2f(top - score);
            o.scale(correction);
            sum *= correction;
            top = score;
        }
        const float p = exp2f(score - top);
        sum += p;
        o.add(p, values.row(key));
    }
    o.store(plain_rows(out, head, T, NH).row(query), 1.0f / sum);
    lse[static_cast<size_t>(head) * T + query] = top + log2f(sum);
}

// Also writes row_dots (B, NH, T) = rowsum(dout o out), which the dK kernel reads.
__global__ void __launch_bounds__(kRowThreads)
    attention_dq_fp32_kernel(float* dqkv, float* row_dots, const float* dout, const float* out,
                             const float* qkv, const float* lse, int T, int NH) {
    const auto [head, query] = ThreadRow(T);
    if (query >= T) return;
    const HeadRows<const float> keys = packed_rows(qkv, kKey, head, T, NH),
                                values = packed_rows(qkv, kValue, head, T, NH);
    const size_t row = static_cast<size_t>(head) * T + query;
    Row q, d_o, dq;
    q.load(packed_rows(qkv, kQuery, head, T, NH).row(query), kScaleLog2);
    d_o.load(plain_rows(dout, head, T, NH).row(query));
    dq.clear();
    const float row_lse = lse[row], row_dot = d_o.dot(plain_rows(out, head, T, NH).row(query));
    row_dots[row] = row_dot;
    for (int key = 0; key <= query; key++) {
        const float p = exp2f(q.dot(keys.row(key)) - row_lse);
        dq.add(p * (d_o.dot(values.row(key)) - row_dot), keys.row(key));
    }
    dq.store(packed_rows(dqkv, kQuery, head, T, NH).row(query), kScale);
}

__global__ void __launch_bounds__(kRowThreads)
    attention_dk_fp32_kernel(float* dqkv, const float* row_dots, const float* dout, const float* qkv,
                             const float* lse, int T, int NH) {
    const auto [head, key] = ThreadRow(T);
    if (key >= T) return;
    const HeadRows<const float> queries = packed_rows(qkv, kQuery, head, T, NH),
                                d_os = plain_rows(dout, head, T, NH);
    const size_t rows = static_cast<size_t>(head) * T;
    Row k, v, dk;
    k.load(packed_rows(qkv, kKey, head, T, NH).row(key), kScaleLog2);
    v.load(packed_rows(qkv, kValue, head, T, NH).row(key));
    dk.clear();
    for (int query = key; query < T; query++) {
        const float dp = v.dot(d_os.row(query)) - row_dots[rows + query];
        const float p = exp2f(k.dot(queries.row(query)) - lse[rows + query]);
        dk.add(p * dp, queries.row(query));
    }
    // The address is computed here: the loop has no register left to keep it in.
    dk.store(packed_rows(dqkv, kKey, ptx::opaque(head), T, NH).row(key), kScale);
}

__global__ void __launch_bounds__(kRowThreads)
    attention_dv_fp32_kernel(float* dqkv, const float* dout, const float* qkv, const float* lse, int T,
                             int NH) {
    const auto [head, key] = ThreadRow(T);
    if (key >= T) return;
    const HeadRows<const float> queries = packed_rows(qkv, kQuery, head, T, NH),
                                d_os = plain_rows(dout, head, T, NH);
    const size_t rows = static_cast<size_t>(head) * T;
    Row k, dv;
    k.load(packed_rows(qkv, kKey, head, T, NH).row(key), kScaleLog2);
    dv.clear();
    for (int query = key; query < T; query++)
        dv.add(exp2f(k.dot(queries.row(query)) - lse[rows + query]), d_os.row(query));
    dv.store(packed_rows(dqkv, kValue, head, T, NH).row(key), 1.0f);
}

}  // namespace attention
