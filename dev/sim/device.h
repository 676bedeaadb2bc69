// CUDA's device functions for g++: barriers, warp words, atomics, cached loads, arithmetic. Included by
// <cuda_runtime.h>.
#pragma once
#include <math.h>
#include <bit>
#include <cstring>
#include <type_traits>
#include "fibers.h"

// ---- barriers ---------------------------------------------------------------------------------------------

SIM_QUIET inline void __syncthreads(sim::Where where = sim::Where::current()) {
    sim::barrier("__syncthreads", 0, sim::worker->threads, where);
}
SIM_QUIET inline void __syncwarp(unsigned mask = 0xffffffffu, sim::Where where = sim::Where::current()) {
    sim::Warp& warp = *sim::worker->warp;
    const uint32_t bit = 1u << sim::worker->lane;
    if (mask & bit) mask &= warp.exists & ~warp.exited;  // it alone may name lanes that are gone
    sim::meet("__syncwarp", mask, where, [mask](sim::Exchange&) {
        if (sim::race_on) [[unlikely]]
            sim::race_warp_ordered(mask);
    });
}
inline void __threadfence() { sim::fence(); }
inline void __threadfence_block() { sim::fence(); }
[[noreturn]] inline void __trap(sim::Where where = sim::Where::current()) { sim::fail(where, "__trap()"); }

// ---- warp words -------------------------------------------------------------------------------------------

namespace sim {

// Every lane of the mask gives v and gets the v of lane `source`.
template <class T>
SIM_QUIET inline T shuffle(const char* word, unsigned mask, T v, int source, Where where) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    const unsigned lane = worker->lane;
    Exchange& x = worker->warp->exchange;
    if (mask >> lane & ~(mask >> source) & 1) [[unlikely]]  // a caller outside the mask is meet()'s error
        fail(where, "%s reads lane %d, which the mask %08x leaves out", word, source, mask);
    uint64_t bits = 0;  // all 8 bytes are stored: the last lane's loads are as wide
    memcpy(&bits, &v, sizeof(T));
    x.in[lane] = bits;
    x.source[lane] = source;
    meet(word, mask, where, [mask](Exchange& all) {
        if (mask == 0xffffffffu) {
            for (int l = 0; l < 32; l++) all.out[l] = all.in[all.source[l]];
        } else {
            for (uint32_t rest = mask; rest; rest &= rest - 1) {
                const int l = __builtin_ctz(rest);
                all.out[l] = all.in[all.source[l]];
            }
        }
    });
    T result;
    memcpy(&result, &x.out[lane], sizeof(T));
    return result;
}

// Every lane of the mask gives 32 bits and gets reduce(mask, in).
template <class Reduce>
SIM_QUIET inline uint32_t warp_reduce(const char* word, unsigned mask, uint32_t v, Where where,
                                      Reduce reduce) {
    const unsigned lane = worker->lane;
    Exchange& x = worker->warp->exchange;
    x.in[lane] = v;
    meet(word, mask, where, [mask, reduce](Exchange& all) {
        const uint32_t first = static_cast<uint32_t>(all.in[__builtin_ctz(mask)]);
        uint32_t result = first;
        for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1)
            result = reduce(result, static_cast<uint32_t>(all.in[__builtin_ctz(rest)]));
        for (uint32_t rest = mask; rest; rest &= rest - 1) all.out[__builtin_ctz(rest)] = result;
    });
    return static_cast<uint32_t>(x.out[lane]);
}

}  // namespace sim

// Segments of `width` lanes, a power of two (PTX ISA, shfl.sync): a source outside the segment gives one's
// own value.
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32,
                     sim::Where where = sim::Where::current()) {
    const int lane = sim::worker->lane;
    return sim::shuffle("__shfl_sync", mask, v, (lane & ~(width - 1)) | (source & (width - 1)), where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                         sim::Where where = sim::Where::current()) {
    const int lane = sim::worker->lane, source = lane ^ bits;
    return sim::shuffle("__shfl_xor_sync", mask, v, source > (lane | (width - 1)) ? lane : source & 31,
                        where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                        sim::Where where = sim::Where::current()) {
    const int lane = sim::worker->lane, source = lane - static_cast<int>(delta);
    return sim::shuffle("__shfl_up_sync", mask, v, source < (lane & ~(width - 1)) ? lane : source, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                          sim::Where where = sim::Where::current()) {
    const int lane = sim::worker->lane, source = lane + static_cast<int>(delta);
    return sim::shuffle("__shfl_down_sync", mask, v, source > (lane | (width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return sim::warp_reduce("__ballot_sync", mask, predicate ? 1u << sim::worker->lane : 0u, where,
                            [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return sim::warp_reduce("__any_sync", mask, predicate != 0, where,
                            [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return sim::warp_reduce("__all_sync", mask, predicate != 0, where,
                            [](uint32_t a, uint32_t b) { return a & b; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, sim::Where where = sim::Where::current()) {
    return sim::warp_reduce("__reduce_add_sync", mask, v, where,
                            [](uint32_t a, uint32_t b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, sim::Where where = sim::Where::current()) {
    return sim::warp_reduce("__reduce_max_sync", mask, v, where,
                            [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline int __reduce_add_sync(unsigned mask, int v, sim::Where where = sim::Where::current()) {
    return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(v), where));
}

// ---- atomics: relaxed, on device or shared memory ---------------------------------------------------------

namespace sim {
template <class T, class Change>
inline T atomic_change(T* p, Change change) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static_assert(sizeof(T) == sizeof(Bits));
    Bits* bits = reinterpret_cast<Bits*>(p);
    Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &old, std::bit_cast<Bits>(change(std::bit_cast<T>(old))), true,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return std::bit_cast<T>(old);
}
}  // namespace sim

template <class T>
requires std::is_arithmetic_v<T>
inline T atomicAdd(T* p, std::type_identity_t<T> v) {
    if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    else return sim::atomic_change(p, [v](T old) { return old + v; });
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> v) {
    return sim::atomic_change(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
inline T atomicMin(T* p, std::type_identity_t<T> v) {
    return sim::atomic_change(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
inline T atomicOr(T* p, std::type_identity_t<T> v) {
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
inline T atomicExch(T* p, std::type_identity_t<T> v) {
    return sim::atomic_change(p, [v](T) { return v; });
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    return sim::atomic_change(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- loads and stores with a cache hint -------------------------------------------------------------------

namespace sim {
template <class T>
inline void check_aligned(const T* p, const char* word, Where where) {
    if (reinterpret_cast<uintptr_t>(p) % alignof(T)) [[unlikely]]
        fail(where, "%s of %zu bytes at %p, which is not a multiple of %zu", word, sizeof(T),
             static_cast<const void*>(p), alignof(T));
}
}  // namespace sim

#define SIM_CACHED_LOAD(name)                                             \
    template <class T>                                                    \
    inline T name(const T* p, sim::Where where = sim::Where::current()) { \
        sim::check_aligned(p, #name, where);                              \
        return *p;                                                        \
    }
#define SIM_CACHED_STORE(name)                                                                    \
    template <class T>                                                                            \
    inline void name(T* p, std::type_identity_t<T> v, sim::Where where = sim::Where::current()) { \
        sim::check_aligned(p, #name, where);                                                      \
        *p = v;                                                                                   \
    }
SIM_CACHED_LOAD(__ldg)
SIM_CACHED_LOAD(__ldcs)
SIM_CACHED_LOAD(__ldcg)
SIM_CACHED_LOAD(__ldca)
SIM_CACHED_STORE(__stcs)
SIM_CACHED_STORE(__stcg)
SIM_CACHED_STORE(__stwt)
#undef SIM_CACHED_LOAD
#undef SIM_CACHED_STORE

// ---- arithmetic -------------------------------------------------------------------------------------------

// The GPU's fast forms have a few ulp more error than these; no test may rely on either.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = static_cast<float>(sin(M_PI * x));
    *cosine = static_cast<float>(cos(M_PI * x));
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

// Never contracted into an FMA: the empty asm hides where the result comes from.
inline float __fadd_rn(float a, float b) {
    float sum = a + b;
    asm("" : "+x"(sum));
    return sum;
}
inline float __fmul_rn(float a, float b) {
    float product = a * b;
    asm("" : "+x"(product));
    return product;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#define SIM_MIN_MAX(T)                                         \
    inline constexpr T min(T a, T b) { return b < a ? b : a; } \
    inline constexpr T max(T a, T b) { return a < b ? b : a; }
SIM_MIN_MAX(int)
SIM_MIN_MAX(unsigned)
SIM_MIN_MAX(long)
SIM_MIN_MAX(unsigned long)
SIM_MIN_MAX(long long)
SIM_MIN_MAX(unsigned long long)
#undef SIM_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
