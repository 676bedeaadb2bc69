// cuBLASLt on a CPU: checks what the library would refuse, then OpenBLAS computes.
//
// bf16 operands become fp32, which is exact; sums are fp32; the epilogue works on the fp32 sum, which is
// rounded once. D is cut into tiles of a fixed size, each summed over all of k by one single-threaded call,
// so the bits don't depend on how many threads share the tiles.
//
// Stricter than the library: every operand must lie inside one allocation of device memory
// (AddressSanitizer's poison is asked too, since OpenBLAS isn't instrumented), outputs may overlap no input
// but C, pointers and leading dimensions are multiples of 16 bytes, which is what the program tells the
// heuristic. The algorithm asks for a little workspace, and overwrites it, so that nobody keeps anything
// there.
//
// SIM_CUBLASLT=LETTERS makes a library of as many algorithms as letters, all the same product, in the
// heuristic's order; it is read at every call, so that a test may change it. What becomes of each:
//
//     w   works                                       w alone is what there is without the variable
//     f   cublasLtMatmul refuses it, though cublasLtMatmulAlgoCheck does not
//     n   is refused when made anew by cublasLtMatmulAlgoInit: it needs what no attribute tells
//     x   the heuristic fails
//     F N X   the same where the epilogue has a GELU or a bias gradient; elsewhere it works
#pragma GCC optimize("O3")  // the loops over elements, as vectors
#include "cublasLt.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <cblas.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#include "cuda_bf16.h"
#include "runtime.h"  // sim::find_memory, sim::stop

struct cublasLtContext {
    int unused = 0;
};
struct cublasLtMatmulDescOpaque_t {
    int32_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_ld = 0;
};
struct cublasLtMatrixLayoutOpaque_t {  // column-major
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;

    size_t element_bytes() const { return type == CUDA_R_32F ? sizeof(float) : sizeof(__nv_bfloat16); }
    size_t bytes() const {
        return ((cols - 1) * ld + rows) * element_bytes();
    }  // from the first to the last element
    bool operator==(const cublasLtMatrixLayoutOpaque_t&) const = default;
};
struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t workspace_bytes = 0;
    uint32_t reduction_schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
    uint32_t alignment[4] = {256, 256, 256, 256};
};

namespace {

constexpr size_t kWorkspaceBytes = 4096;
constexpr size_t kAlignment = 16;

using Layout = cublasLtMatrixLayoutOpaque_t;

// Copies an attribute if it has the size of the field; what cuBLASLt answers otherwise.
template <class T>
cublasStatus_t copy_attribute(T& field, const void* value, size_t bytes) {
    if (!value || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&field, value, sizeof(T));
    return CUBLAS_STATUS_SUCCESS;
}

bool has_bias(uint32_t epilogue) { return epilogue & CUBLASLT_EPILOGUE_BIAS; }
bool has_bias_gradient(uint32_t epilogue) { return epilogue == CUBLASLT_EPILOGUE_BGRADA; }
bool has_aux(uint32_t epilogue) { return epilogue & 128; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

// Shapes, types and epilogue, which every call that takes the descriptors checks.
cublasStatus_t check_problem(const cublasLtMatmulDescOpaque_t* t, const Layout* a, const Layout* b,
                             const Layout* c, const Layout* d) {
    if (!t || !a || !b || !c || !d) return CUBLAS_STATUS_INVALID_VALUE;
    for (const Layout* x : {a, b, c, d}) {
        if (x->rows == 0 || x->cols == 0 || x->ld < static_cast<int64_t>(x->rows))
            return CUBLAS_STATUS_INVALID_VALUE;
        if (x->ld * x->element_bytes() % kAlignment) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const bool na = t->transa == CUBLAS_OP_N, nb = t->transb == CUBLAS_OP_N;
    const uint64_t m = na ? a->rows : a->cols, k = na ? a->cols : a->rows;
    const uint64_t kb = nb ? b->rows : b->cols, n = nb ? b->cols : b->rows;
    if (k != kb || d->rows != m || d->cols != n || c->rows != m || c->cols != n)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (m > INT32_MAX || n > INT32_MAX || k > INT32_MAX) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a->type != b->type || c->type != d->type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a->type == CUDA_R_32F && d->type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool keeps_type = t->epilogue == CUBLASLT_EPILOGUE_DEFAULT || has_bias_gradient(t->epilogue);
    if (!keeps_type && d->type != a->type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((has_bias(t->epilogue) || has_bias_gradient(t->epilogue)) && !t->bias)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (has_aux(t->epilogue) && (!t->aux || t->aux_ld < static_cast<int64_t>(m)))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (has_aux(t->epilogue) && t->aux_ld % 8) return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

// The letters of SIM_CUBLASLT for a product, an algorithm each; numbered from 1.
std::string algorithms(bool capitals) {
    const char* setting = getenv("SIM_CUBLASLT");
    std::string letters = setting && *setting ? setting : "w";
    if (letters.find_first_not_of("wfnxFNX") != std::string::npos)
        sim::stop("SIM_CUBLASLT=%s: wants letters of wfnxFNX", setting);
    for (char& c : letters)
        if (isupper(c)) c = capitals ? static_cast<char>(tolower(c)) : 'w';
    return letters;
}

bool rides(uint32_t epilogue) { return has_aux(epilogue) || has_bias_gradient(epilogue); }

// What becomes of an algorithm in this product; 0 where there is no such algorithm.
char fate_of(const cublasLtMatmulAlgo_t* algo, const cublasLtMatmulDescOpaque_t* desc) {
    const std::string letters = algorithms(rides(desc->epilogue));
    const uint32_t id = algo->values[CUBLASLT_ALGO_CONFIG_ID];
    for (int i = 0; i < 9; i++)
        if (i != CUBLASLT_ALGO_CONFIG_ID && algo->values[i] != (i == CUBLASLT_ALGO_CONFIG_SPLITK_NUM))
            return 0;
    if (id < 1 || id > letters.size()) return 0;
    const char letter = letters[id - 1];
    return letter == 'n' && !algo->proposed ? 0 : letter;
}

// Bytes that a product reads or writes: device memory, in one allocation, not poisoned.
struct Range {
    const char* name;
    const void* p;
    size_t bytes;
};

void check_memory(const Range& range) {
    bool inside = false;
    const sim::Memory where = sim::find_memory(range.p, range.bytes, &inside);
    if (where != sim::Memory::Device)
        sim::stop("cublasLtMatmul: %s at %p is not device memory", range.name, range.p);
    if (!inside)
        sim::stop("cublasLtMatmul: %s, %zu bytes at %p, reaches beyond its allocation", range.name,
                  range.bytes, range.p);
#if defined(__SANITIZE_ADDRESS__)
    if (void* bad = __asan_region_is_poisoned(const_cast<void*>(range.p), range.bytes))
        sim::stop("cublasLtMatmul: %s, %zu bytes at %p, has no memory at %p", range.name, range.bytes,
                  range.p, bad);
#endif
}

bool overlap(const Range& x, const Range& y) {
    const char *a = static_cast<const char*>(x.p), *b = static_cast<const char*>(y.p);
    return a < b + y.bytes && b < a + x.bytes;
}

// A product with everything that it needs later, when the stream comes to it.
struct Product {
    cublasLtMatmulDescOpaque_t t;
    Layout a, b, c, d;
    const void *A, *B, *C;
    void* D;
    float alpha, beta;
    void* workspace;
    size_t workspace_bytes;

    uint64_t m() const { return d.rows; }
    uint64_t n() const { return d.cols; }
    uint64_t k() const { return t.transa == CUBLAS_OP_N ? a.cols : a.rows; }
    size_t aux_bytes() const { return ((n() - 1) * t.aux_ld + m()) * d.element_bytes(); }
};

void check_operands(const Product& x) {
    const Range a{"A", x.A, x.a.bytes()}, b{"B", x.B, x.b.bytes()}, c{"C", x.C, x.c.bytes()},
        d{"D", x.D, x.d.bytes()};
    const Range bias{"the bias", x.t.bias, x.m() * x.d.element_bytes()},
        aux{"the auxiliary matrix", x.t.aux, x.aux_bytes()};
    const Range workspace{"the workspace", x.workspace, x.workspace_bytes};
    auto apart = [](const Range& written, const Range& other) {
        if (overlap(written, other)) sim::stop("cublasLtMatmul: %s overlaps %s", written.name, other.name);
    };
    for (const Range& range : {a, b, d}) check_memory(range);
    for (const Range& input : {a, b}) apart(d, input);
    if (x.beta != 0) check_memory(c);
    if (x.beta != 0 && x.C != x.D) apart(d, c);
    if (has_bias(x.t.epilogue)) check_memory(bias), apart(d, bias);
    if (has_bias_gradient(x.t.epilogue)) {
        check_memory(bias);
        for (const Range& other : {a, b, d, workspace}) apart(bias, other);
    }
    if (has_aux(x.t.epilogue)) check_memory(aux), apart(d, aux);
    if (x.workspace_bytes > 0) {
        check_memory(workspace);
        for (const Range& other : {a, b, d}) apart(workspace, other);
    }
}

// ---- computing --------------------------------------------------------------------------------------------

// An operand as fp32: itself, or a dense copy of a bf16 one.
struct Floats {
    const float* p;
    int ld;
    std::unique_ptr<float[]> copy;
};

Floats as_floats(const void* p, const Layout& layout) {
    if (layout.type == CUDA_R_32F)
        return {static_cast<const float*>(p), static_cast<int>(layout.ld), nullptr};
    Floats floats{nullptr, static_cast<int>(layout.rows),
                  std::make_unique_for_overwrite<float[]>(layout.rows * layout.cols)};
    floats.p = floats.copy.get();
    float* to = floats.copy.get();
    const auto* from = static_cast<const __nv_bfloat16*>(p);
    constexpr uint64_t kElements = 1 << 16;  // about what a piece converts
    const uint64_t columns = std::max<uint64_t>(1, kElements / layout.rows);
    sim::parallel_for((layout.cols + columns - 1) / columns, [&](size_t piece) {
        for (uint64_t j = piece * columns; j < std::min(layout.cols, (piece + 1) * columns); j++)
            for (uint64_t i = 0; i < layout.rows; i++)
                to[j * layout.rows + i] = sim::bf16_value(from[j * layout.ld + i].bits);
    });
    return floats;
}

// 2^x for x <= 0, relative error below 2^-22, written so that the compiler makes vectors of it: a rounded
// exponent and the Taylor series of 2^f, |f| <= 1/2, whose eighth term is below 2^-24. Results below 2^-126
// become 2^-126; NaN stays.
inline float exp2_nonpositive(float x) {
    x = x < -126.0f ? -126.0f : x;
    const float whole = (x + 12582912.0f) - 12582912.0f, f = (x - whole) * 0.6931471805599453f;
    float sum = 1.0f / 5040;
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * f + c;
    return sum * std::bit_cast<float>(static_cast<int32_t>(whole + 127.0f) << 23);
}

// tanh form, by the sigmoid that it equals: gelu(x) = x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
inline float sigmoid_2u(float x) {
    const float two_u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const float e = exp2_nonpositive(-1.4426950408889634f * fabsf(two_u)), large = 1.0f / (1.0f + e);
    return two_u < 0 ? e * large : large;
}
inline float gelu(float x) { return x * sigmoid_2u(x); }
inline float gelu_derivative(float x) {
    const float s = sigmoid_2u(x);
    return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 3 * 0.044715f * x * x);
}

// D = epilogue(alpha sum + beta C) of a tile: rows i0 .. i0 + mb, columns j0 .. j0 + nb; sum (mb, nb)
// column-major is worked on in place, one plain loop a stage.
template <class T>
void finish_tile(const Product& x, float* sum, uint64_t i0, uint64_t j0, uint64_t mb, uint64_t nb) {
    const uint32_t epilogue = x.t.epilogue;
    for (uint64_t j = 0; j < nb; j++) {
        T* d = static_cast<T*>(x.D) + (j0 + j) * x.d.ld + i0;
        const T* c = static_cast<const T*>(x.C) + (j0 + j) * x.c.ld + i0;
        T* aux = static_cast<T*>(x.t.aux) + (j0 + j) * x.t.aux_ld + i0;
        const T* bias = static_cast<const T*>(x.t.bias) + i0;
        float* value = sum + j * mb;
        for (uint64_t i = 0; i < mb; i++) value[i] *= x.alpha;
        if (x.beta != 0)
            for (uint64_t i = 0; i < mb; i++) value[i] += x.beta * static_cast<float>(c[i]);
        if (has_bias(epilogue))
            for (uint64_t i = 0; i < mb; i++) value[i] += static_cast<float>(bias[i]);
        if (epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
            for (uint64_t i = 0; i < mb; i++) aux[i] = static_cast<T>(value[i]);
            for (uint64_t i = 0; i < mb; i++) value[i] = gelu(value[i]);
        }
        if (epilogue == CUBLASLT_EPILOGUE_DGELU)
            for (uint64_t i = 0; i < mb; i++) value[i] *= gelu_derivative(static_cast<float>(aux[i]));
        for (uint64_t i = 0; i < mb; i++) d[i] = static_cast<T>(value[i]);
    }
}

// The bias gradient of BGRADA: row i's sum of op(A) (m, k), of D's type, assigned whatever beta is.
void sum_rows(const Product& x, const Floats& a) {
    const bool transposed = x.t.transa == CUBLAS_OP_T;
    void* gradient = const_cast<void*>(x.t.bias);
    for (uint64_t i = 0; i < x.m(); i++) {
        double sum = 0;
        for (uint64_t k = 0; k < x.k(); k++) sum += a.p[transposed ? i * a.ld + k : k * a.ld + i];
        const float value = static_cast<float>(x.alpha * sum);
        if (x.d.type == CUDA_R_32F) static_cast<float*>(gradient)[i] = value;
        else static_cast<__nv_bfloat16*>(gradient)[i] = static_cast<__nv_bfloat16>(value);
    }
}

void compute(const Product& x) {
    // Small enough that a training step of a small model has work for several cores, large enough for
    // OpenBLAS.
    constexpr uint64_t kTileM = 256, kTileN = 128;
    check_operands(x);
    if (x.workspace_bytes) memset(x.workspace, 0xff, x.workspace_bytes);
    const Floats a = as_floats(x.A, x.a), b = as_floats(x.B, x.b);
    if (has_bias_gradient(x.t.epilogue)) sum_rows(x, a);
    const bool ta = x.t.transa == CUBLAS_OP_T, tb = x.t.transb == CUBLAS_OP_T;
    const uint64_t m = x.m(), n = x.n(), tiles_m = (m + kTileM - 1) / kTileM,
                   tiles_n = (n + kTileN - 1) / kTileN;
    sim::parallel_for(tiles_m * tiles_n, [&](size_t tile) {
        thread_local std::unique_ptr<float[]> sum;
        if (!sum) sum = std::make_unique_for_overwrite<float[]>(kTileM * kTileN);
        const uint64_t i0 = tile % tiles_m * kTileM, j0 = tile / tiles_m * kTileN;
        const uint64_t mb = std::min(kTileM, m - i0), nb = std::min(kTileN, n - j0);
        cblas_sgemm(CblasColMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                    static_cast<int>(mb), static_cast<int>(nb), static_cast<int>(x.k()), 1.0f,
                    a.p + (ta ? i0 * a.ld : i0), a.ld, b.p + (tb ? j0 : j0 * b.ld), b.ld, 0.0f, sum.get(),
                    static_cast<int>(mb));
        if (x.d.type == CUDA_R_32F) finish_tile<float>(x, sum.get(), i0, j0, mb, nb);
        else finish_tile<__nv_bfloat16>(x, sum.get(), i0, j0, mb, nb);
    });
}

}  // namespace

// ---- handle -----------------------------------------------------------------------------------------------

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    openblas_set_num_threads(1);  // the tiles are what runs in parallel
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "CUBLAS_STATUS_UNKNOWN";
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
size_t cublasLtGetVersion() { return 130100; }  // the version whose rules these are

// ---- descriptors ------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = new cublasLtMatmulDescOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              size_t bytes) {
    if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
    cublasLtMatmulDescOpaque_t t = *desc;
    cublasStatus_t status = CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA: status = copy_attribute(t.transa, value, bytes); break;
        case CUBLASLT_MATMUL_DESC_TRANSB: status = copy_attribute(t.transb, value, bytes); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE: status = copy_attribute(t.epilogue, value, bytes); break;
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: status = copy_attribute(t.bias, value, bytes); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: status = copy_attribute(t.aux, value, bytes); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: status = copy_attribute(t.aux_ld, value, bytes); break;
    }
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    for (const int32_t op : {t.transa, t.transb})
        if (op != CUBLAS_OP_N && op != CUBLAS_OP_T) return CUBLAS_STATUS_INVALID_VALUE;
    constexpr uint32_t kEpilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                       CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
                                       CUBLASLT_EPILOGUE_BGRADA};
    if (std::find(std::begin(kEpilogues), std::end(kEpilogues), t.epilogue) == std::end(kEpilogues))
        return CUBLAS_STATUS_INVALID_VALUE;
    *desc = t;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
    if (type != CUDA_R_32F && type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
    *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
    *preference = new cublasLtMatmulPreferenceOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return copy_attribute(preference->workspace_bytes, value, bytes);
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            return copy_attribute(preference->reduction_schemes, value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            return copy_attribute(
                preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

// ---- algorithms -------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!preference || !results || !found || wanted <= 0) return CUBLAS_STATUS_INVALID_VALUE;
    *found = 0;
    if (const cublasStatus_t status = check_problem(desc, a, b, c, d); status != CUBLAS_STATUS_SUCCESS)
        return status;
    for (const uint32_t bytes : preference->alignment)
        if (bytes < kAlignment) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (preference->workspace_bytes < kWorkspaceBytes) return CUBLAS_STATUS_NOT_SUPPORTED;
    const std::string letters = algorithms(rides(desc->epilogue));
    if (letters.find('x') != std::string::npos) return CUBLAS_STATUS_INTERNAL_ERROR;
    for (; *found < wanted && *found < static_cast<int>(letters.size()); ++*found) {
        cublasLtMatmulHeuristicResult_t& result = results[*found] = {};
        result.algo.values[CUBLASLT_ALGO_CONFIG_ID] = *found + 1;
        result.algo.values[CUBLASLT_ALGO_CONFIG_SPLITK_NUM] = 1;
        result.algo.proposed = true;
        result.workspaceSize = kWorkspaceBytes;
        result.state = CUBLAS_STATUS_SUCCESS;
        result.wavesCount = 1.0f;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoInit(cublasLtHandle_t handle, cublasComputeType_t compute,
                                      cudaDataType_t scale, cudaDataType_t a, cudaDataType_t b,
                                      cudaDataType_t c, cudaDataType_t d, int id,
                                      cublasLtMatmulAlgo_t* algo) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!algo || id < 1 || id > static_cast<int>(algorithms(false).size()))
        return CUBLAS_STATUS_INVALID_VALUE;
    const bool types = a == b && c == d && (a == CUDA_R_16BF || d == CUDA_R_32F);
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F || !types) return CUBLAS_STATUS_NOT_SUPPORTED;
    *algo = {};
    algo->values[CUBLASLT_ALGO_CONFIG_ID] = id;
    algo->values[CUBLASLT_ALGO_CONFIG_SPLITK_NUM] = 1;
    return CUBLAS_STATUS_SUCCESS;
}

namespace {
size_t attribute_bytes(cublasLtMatmulAlgoConfigAttributes_t attribute) {
    const bool is_short = attribute == CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID ||
                          attribute == CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID;
    return is_short ? sizeof(uint16_t) : sizeof(uint32_t);
}
}  // namespace

cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    if (!algo || !value || attribute == CUBLASLT_ALGO_CONFIG_ID || bytes != attribute_bytes(attribute))
        return CUBLAS_STATUS_INVALID_VALUE;
    algo->values[attribute] = 0;
    memcpy(&algo->values[attribute], value, bytes);  // little-endian, as the GPU's hosts are
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void* value, size_t bytes, size_t* written) {
    if (!algo || !value || bytes != attribute_bytes(attribute)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(value, &algo->values[attribute], bytes);
    if (written) *written = bytes;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!algo || !result) return CUBLAS_STATUS_INVALID_VALUE;
    if (const cublasStatus_t status = check_problem(desc, a, b, c, d); status != CUBLAS_STATUS_SUCCESS)
        return status;
    if (!fate_of(algo, desc)) return CUBLAS_STATUS_NOT_SUPPORTED;
    result->workspaceSize = kWorkspaceBytes;
    result->state = CUBLAS_STATUS_SUCCESS;
    result->wavesCount = 1.0f;
    return CUBLAS_STATUS_SUCCESS;
}

// ---- the product ------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta || !A || !B || !C || !D || !algo) return CUBLAS_STATUS_INVALID_VALUE;
    if (const cublasStatus_t status = check_problem(desc, a, b, c, d); status != CUBLAS_STATUS_SUCCESS)
        return status;
    if (C == D && !(*c == *d)) return CUBLAS_STATUS_INVALID_VALUE;
    const char fate = fate_of(algo, desc);
    if (!fate || fate == 'f') return CUBLAS_STATUS_NOT_SUPPORTED;
    if (workspace_bytes < kWorkspaceBytes || !workspace) return CUBLAS_STATUS_INVALID_VALUE;
    for (const void* p : {A, B, C, static_cast<const void*>(D), static_cast<const void*>(workspace)})
        if (!aligned(p)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((has_bias(desc->epilogue) || has_bias_gradient(desc->epilogue)) && !aligned(desc->bias))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (has_aux(desc->epilogue) && !aligned(desc->aux)) return CUBLAS_STATUS_NOT_SUPPORTED;

    const Product product{*desc,
                          *a,
                          *b,
                          *c,
                          *d,
                          A,
                          B,
                          C,
                          D,
                          *static_cast<const float*>(alpha),
                          *static_cast<const float*>(beta),
                          workspace,
                          kWorkspaceBytes};
    const cudaError_t error = sim::enqueue(stream, "cublasLtMatmul", [product] { compute(product); });
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
