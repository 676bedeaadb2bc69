// The switch from one stack to another, which every collective costs once a lane.
//
// On x86-64 it is a dozen instructions in line: the compiler saves the few registers that live, and every
// `ret` meets the call it belongs to, as the branch predictor expects; with jump_fcontext each switch costs a
// misprediction (measured: 17 ns a lane of a shuffle, against 7). Elsewhere, or with -DSIM_BOOST_CONTEXT, it
// is Boost.Context's.
#pragma once
#include <cstddef>
#include <cstring>
#if !defined(__x86_64__) || defined(SIM_BOOST_CONTEXT)
#define SIM_USES_BOOST 1
#include <boost/context/detail/fcontext.hpp>
#endif

namespace sim {

using Context = void*;  // where a stack stopped

#if defined(SIM_USES_BOOST)

inline void switch_context(Context& from, Context to) {
    const auto back = boost::context::detail::jump_fcontext(to, &from);
    *static_cast<Context*>(back.data) = back.fctx;
}
// entry() never returns; it is called on the new stack at the first switch.
template <void (*entry)()>
Context make_context(unsigned char* lowest, size_t bytes) {
    return boost::context::detail::make_fcontext(lowest + bytes, bytes,
                                                 [](boost::context::detail::transfer_t back) {
                                                     *static_cast<Context*>(back.data) = back.fctx;
                                                     entry();
                                                 });
}

#else

#if defined(__AVX512F__)
#define SIM_MORE_CLOBBERS                                                                                \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", \
        "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#else
#define SIM_MORE_CLOBBERS
#endif

// Always in line, or the `ret` of this function would be the one that is mispredicted. A stopped stack holds,
// from its pointer up: the address to go on at, rbp, and the 128 bytes that a leaf function may use below its
// stack pointer.
__attribute__((always_inline)) inline void switch_context(Context& from, Context to) {
    Context* save = &from;
    asm volatile(
        "leaq -128(%%rsp), %%rsp\n\t"
        "pushq %%rbp\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "pushq %%rax\n\t"
        "movq %%rsp, (%%rdi)\n\t"
        "movq %%rsi, %%rsp\n\t"
        "popq %%rax\n\t"
        "jmpq *%%rax\n"
        "1:\n\t"
        "popq %%rbp\n\t"
        "leaq 128(%%rsp), %%rsp"
        : "+D"(save), "+S"(to)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15" SIM_MORE_CLOBBERS);
}
#undef SIM_MORE_CLOBBERS

// entry() never returns; it is called on the new stack at the first switch.
template <void (*entry)()>
Context make_context(unsigned char* lowest, size_t bytes) {
    auto top = reinterpret_cast<uintptr_t>(lowest + bytes) / 16 * 16;
    auto* stack = reinterpret_cast<void**>(top) - 2;
    stack[0] = reinterpret_cast<void*>(entry);
    stack[1] =
        nullptr;  // where a caller's address would be: backtraces end here, and the alignment is a call's
    return stack;
}

#endif

}  // namespace sim
