// 128-bit packs: the widest load and store that a thread has, and what every elementwise kernel moves memory
// with.
#pragma once
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include "llmc/gpu.cuh"

// 16 bytes of T, aligned, read as floats: pack[i] converts. 8 bf16 or 4 float.
template <class T>
struct alignas(16) Pack128 {
    static constexpr int size = 16 / sizeof(T);
    T v[size];

    __host__ __device__ float operator[](int i) const { return static_cast<float>(v[i]); }
    __host__ __device__ void set(int i, float x) { v[i] = static_cast<T>(x); }  // rounds to nearest even
};

using x128 = Pack128<floatX>;
using f128 = Pack128<float>;

// p is 16-byte aligned device memory. The _streaming forms mark data that is touched once, so that it leaves
// the cache first (ld.global.cs, st.global.cs).
template <class T>
__device__ inline Pack128<T> load128(const T* p) {
    const int4 bits = *reinterpret_cast<const int4*>(p);  // an int4 is always one instruction, a struct not
    Pack128<T> pack;
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
}
template <class T>
__device__ inline Pack128<T> load128_streaming(const T* p) {
    int4 bits = __ldcs(reinterpret_cast<const int4*>(p));
    Pack128<T> pack;
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
}
template <class T>
__device__ inline void store128(T* p, const Pack128<T>& pack) {
    int4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    *reinterpret_cast<int4*>(p) = bits;
}
template <class T>
__device__ inline void store128_streaming(T* p, const Pack128<T>& pack) {
    int4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stcs(reinterpret_cast<int4*>(p), bits);
}
