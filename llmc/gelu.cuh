// GELU, tanh form, forward and backward (Hendrycks & Gimpel 2016, eq. 2; GPT-2's "gelu_new"):
//   gelu(x)  = x/2 (1 + tanh u) = x s,   u = sqrt(2/pi) (x + 0.044715 x^3),   s = sigmoid(2u)
//   gelu'(x) = s + x s (1 - s) 2 du/dx,  du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
// Nothing is saved but x: backward computes s again. Each direction moves its bytes once: forward 2, backward
// 3 elements of floatX per value.
#pragma once
#include <ptx.cuh>          // ex2
#include "llmc/gpu.cuh"     // floatX, Gpu
#include "llmc/launch.cuh"  // launch
#include "llmc/vec.cuh"     // x128, load128, store128

// Bytes in flight hide the memory's latency, so blocks only have to fill an SM: 2048 threads on 8 blocks, 16
// bytes each.
inline constexpr int kGeluThreads = 256;

// sigmoid(2u) and 1 - sigmoid(2u), neither by a subtraction from 1 that would cancel. e = exp(-2|u|) lies in
// [0, 1], so nothing overflows for any x, and 1 + e in [1, 2] keeps the division off its slow path. exp by
// ex2.approx: relative error 2^-22, and |2u| eps from rounding the argument. NaN stays NaN.
struct GeluGate {
    float s, one_minus_s;
};
__device__ inline GeluGate gelu_gate(float x) {
    constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kCubic = 0.044715f, kLog2E = 1.4426950408889634f;
    const float two_u = kTwoSqrt2OverPi * (x + kCubic * x * x * x);
    const float e = ptx::ex2(-kLog2E * fabsf(two_u));
    const float large = 1.0f / (1.0f + e), small = e * large;
    return two_u >= 0 ? GeluGate{large, small} : GeluGate{small, large};
}

__device__ inline float gelu(float x) { return x * gelu_gate(x).s; }

__device__ inline float gelu_derivative(float x) {
    constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kThreeCubic = 3 * 0.044715f;
    const GeluGate gate = gelu_gate(x);
    return gate.s + x * gate.s * gate.one_minus_s * (kTwoSqrt2OverPi * (1.0f + kThreeCubic * x * x));
}

__global__ __launch_bounds__(kGeluThreads) void gelu_forward_kernel(floatX* out, const floatX* inp,
                                                                    size_t N) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * kGeluThreads + threadIdx.x) * x128::size;
    if (i >= N) return;
    const x128 x = load128_streaming(inp + i);  // not read again before backward
    x128 y;
    for (int k = 0; k < x128::size; k++) y.set(k, gelu(x[k]));
    store128(out + i, y);  // the next matmul's input
}

__global__ __launch_bounds__(kGeluThreads) void gelu_backward_kernel(floatX* dinp, const floatX* dout,
                                                                     const floatX* inp, size_t N) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * kGeluThreads + threadIdx.x) * x128::size;
    if (i >= N) return;
    const x128 x = load128_streaming(inp + i), dy = load128_streaming(dout + i);
    x128 dx;
    for (int k = 0; k < x128::size; k++) dx.set(k, dy[k] * gelu_derivative(x[k]));
    store128(dinp + i, dx);
}

inline void check_gelu_size(size_t N) {
    if (N == 0 || N % x128::size != 0)
        fatal("gelu: %zu values, wanted a positive multiple of %d", N, x128::size);
}

// out = gelu(inp). Backward recomputes from inp.
//   out (N) written, inp (N) read; may be the same. N a positive multiple of x128::size. Async on gpu.stream,
//   deterministic.
inline void gelu_forward(floatX* out, const floatX* inp, size_t N, Gpu& gpu) {
    check_gelu_size(N);
    launch(gelu_forward_kernel, {ceil_div(N, kGeluThreads * x128::size), kGeluThreads}, gpu, out, inp, N);
}

// dinp = dout * gelu'(inp).
//   dinp (N) written; dout, inp (N) read; dinp may be dout or inp. N a positive multiple of x128::size. Async
//   on gpu.stream, deterministic.
inline void gelu_backward(floatX* dinp, const floatX* dout, const floatX* inp, size_t N, Gpu& gpu) {
    check_gelu_size(N);
    launch(gelu_backward_kernel, {ceil_div(N, kGeluThreads * x128::size), kGeluThreads}, gpu, dinp, dout, inp,
           N);
}
