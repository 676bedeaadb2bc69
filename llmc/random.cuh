// A counter-based generator: the n-th number of a stream is a pure function of (seed, stream, n), so that
// initialisation and sampling do not depend on who computes them, in what order, or on how many ranks.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include <cmath>
#include <cstdint>
#include <cuda_runtime.h>

// Four independent uniform 32-bit words for the 128-bit counter (n, stream) under the 64-bit key `seed`.
__host__ __device__ inline uint4 philox(uint64_t seed, uint64_t stream, uint64_t n) {
    uint32_t c0 = static_cast<uint32_t>(n), c1 = static_cast<uint32_t>(n >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return uint4{c0, c1, c2, c3};
}

// Uniform in (0, 1): the top 24 bits, centred, so that neither end is reached.
__host__ __device__ inline float uniform_open(uint32_t bits) {
    return (static_cast<float>(bits >> 8) + 0.5f) * (1.0f / 16777216.0f);
}

// Two standard normal numbers of two words (Box and Muller 1958). sincospif, since it reduces its argument
// without the table in local memory that sinf has for large ones.
__device__ inline float2 normal_pair(uint32_t a, uint32_t b) {
    const float radius = sqrtf(-2.0f * logf(uniform_open(a)));
    float sine, cosine;
    sincospif(2.0f * uniform_open(b), &sine, &cosine);
    return float2{radius * cosine, radius * sine};
}
