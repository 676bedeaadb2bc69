// Matrix products over cuBLASLt, chosen by measurement. Weights are stored (in, out), as Hugging Face's GPT-2
// has them.
//
//     forward   out (N, OC)     = inp (N, C) weight (C, OC) + bias (OC)   NN   [then gelu; its input kept]
//     dgrad     dinp (N, C)     = dout (N, OC) weight^T                   TN   [times gelu'(pre_gelu)]
//     wgrad     dweight (C, OC) = or += inp^T dout, fp32                  NT   [and dout's column sums]
//     head      logits (N, Vp)  = x (N, C) wte (Vp, C)^T                  TN   tied to the token embedding
//               dx (N, C)       = dlogits wte                             NN
//               dwte (Vp, C)    = or += dlogits^T x, fp32                 NT
//
// Sums are fp32, in the fp32 build without TF32. A gelu, a bias or a bias's gradient may ride in the
// product's own kernel (an epilogue) or follow it in one of ours: which is faster depends on GPU and library,
// so both are candidates. For each distinct product `Matmuls` asks the library's heuristic for algorithms,
// tries each, times those that work on random numbers, keeps the fastest, and remembers it on disk; what was
// kept can be written down as text and used again, by other ranks and by a resumed run.
//
// Source: NVIDIA, cuBLAS library documentation, "Using the cuBLASLt API".
#pragma once
#include <algorithm>
#include <array>
#include <cfloat>
#include <cstdint>
#include <functional>  // function
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#include <cublasLt.h>
#include "llmc/bias.cuh"       // bias_forward, bias_backward
#include "llmc/fatal.h"        // fatal, warn
#include "llmc/gelu.cuh"       // gelu_forward, gelu_backward
#include "llmc/gpu.cuh"        // Gpu, floatX, Write
#include "llmc/launch.cuh"     // launch
#include "llmc/matmul_plan.h"  // MatmulKey, MatmulSettings, MatmulCache
#include "llmc/random.cuh"     // philox, uniform_open

// ---- a product's descriptors -----------------------------------------------------------------------------

// Owners of cuBLASLt's objects.
template <auto destroy>
struct MatmulDestroy {
    template <class T>
    void operator()(T* p) const {
        destroy(p);
    }
};
template <class Handle, auto destroy>
using MatmulOwned = std::unique_ptr<std::remove_pointer_t<Handle>, MatmulDestroy<destroy>>;
using MatmulOperation = MatmulOwned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using MatmulMatrix = MatmulOwned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using MatmulPreference = MatmulOwned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

inline constexpr cudaDataType_t kCudaTypeX = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
inline constexpr size_t kMatmulAlignment =
    16;  // bytes, of every operand: a vector access, and what TMA wants

// The product's own operands and what its epilogue touches. bias (m); pre_gelu (m, n) as D.
struct MatmulOperands {
    const floatX *a, *b;
    void* d;
    const floatX* bias = nullptr;
    floatX* pre_gelu_out = nullptr;              // GeluBias
    const floatX* pre_gelu = nullptr;            // Dgelu
    float *dbias = nullptr, *scratch = nullptr;  // Bgrad: (m), and bias_backward_scratch_floats(k, m)
};

// What cuBLASLt is told of a product, made once.
struct MatmulDescriptors {
    MatmulOperation operation;
    MatmulMatrix a, b, d;

    MatmulDescriptors(const MatmulKey& key, MatmulEpilogue epilogue) {
        cublasLtMatmulDesc_t made = nullptr;
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        operation.reset(made);
        const cublasOperation_t op_a = key.layout == MatmulLayout::TN ? CUBLAS_OP_T : CUBLAS_OP_N;
        const cublasOperation_t op_b = key.layout == MatmulLayout::NT ? CUBLAS_OP_T : CUBLAS_OP_N;
        set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(op_a));
        set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(op_b));
        constexpr cublasLtEpilogue_t kEpilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                                     CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
                                                     CUBLASLT_EPILOGUE_BGRADA};
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(kEpilogues[static_cast<int>(epilogue)]));
        // The heuristic reads no bias or auxiliary matrix, but takes its pointer's alignment for what may be
        // relied on.
        const void* aligned_as_ours = reinterpret_cast<const void*>(kMatmulAlignment);
        const bool has_aux = epilogue == MatmulEpilogue::GeluBias || epilogue == MatmulEpilogue::Dgelu;
        if (has_aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, static_cast<int64_t>(key.m));
        if (has_aux) set_aux(aligned_as_ours);
        if (epilogue == MatmulEpilogue::Bias || epilogue == MatmulEpilogue::GeluBias ||
            epilogue == MatmulEpilogue::Bgrad)
            set_bias(aligned_as_ours);
        a = matrix(kCudaTypeX, op_a == CUBLAS_OP_N ? key.m : key.k, op_a == CUBLAS_OP_N ? key.k : key.m);
        b = matrix(kCudaTypeX, op_b == CUBLAS_OP_N ? key.k : key.n, op_b == CUBLAS_OP_N ? key.n : key.k);
        d = matrix(key.fp32_out ? CUDA_R_32F : kCudaTypeX, key.m, key.n);
    }
    void set_bias(const void* bias) { set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }
    void set_aux(const void* aux) { set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux); }

  private:
    template <class T>
    void set(cublasLtMatmulDescAttributes_t attribute, T value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof(value)));
    }
    static MatmulMatrix matrix(cudaDataType_t type, size_t rows, size_t cols) {  // column-major, dense
        cublasLtMatrixLayout_t made = nullptr;
        CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&made, type, rows, cols, static_cast<int64_t>(rows)));
        return MatmulMatrix(made);
    }
};

// ---- a plan: one product, ready to run -------------------------------------------------------------------

// The epilogue that stays in cuBLASLt's kernel where the plan isn't fused; the rest is a kernel of ours.
inline MatmulEpilogue plainer(MatmulEpilogue epilogue) {
    return epilogue == MatmulEpilogue::GeluBias ? MatmulEpilogue::Bias : MatmulEpilogue::None;
}

struct MatmulPlan {
    MatmulKey key;
    MatmulSettings settings;
    MatmulDescriptors descriptors;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace_bytes;
    // Where it was measured: the median time, the heuristic's first choice's, and how many were timed.
    double us = 0, first_us = 0;
    int candidates = 0;

    std::string text() const { return text_of_key(key) + " = " + text_of_settings(settings); }
};

// The algorithm that `settings` describe, checked by the library; nothing where it can't compute this product
// here, or wants more workspace than given.
inline std::optional<MatmulPlan> make_plan(const MatmulKey& key, const MatmulSettings& settings,
                                           size_t workspace_bytes, const Gpu& gpu) {
    const MatmulEpilogue epilogue = settings.fused ? key.epilogue : plainer(key.epilogue);
    MatmulPlan plan{key, settings, MatmulDescriptors(key, epilogue), {}, 0};
    const cudaDataType_t type_d = key.fp32_out ? CUDA_R_32F : kCudaTypeX;
    if (cublasLtMatmulAlgoInit(gpu.cublaslt, CUBLAS_COMPUTE_32F, CUDA_R_32F, kCudaTypeX, kCudaTypeX, type_d,
                               type_d, settings.algorithm, &plan.algorithm) != CUBLAS_STATUS_SUCCESS)
        return std::nullopt;
    bool accepted = true;
    each_setting(settings, [&](const char*, cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
        auto present = value;
        const bool readable =
            cublasLtMatmulAlgoConfigGetAttribute(&plan.algorithm, attribute, &present, sizeof(present),
                                                 nullptr) == CUBLAS_STATUS_SUCCESS;
        if (readable && present == value)
            return;  // the number can't be set; old algorithms lack new attributes
        accepted = accepted && cublasLtMatmulAlgoConfigSetAttribute(&plan.algorithm, attribute, &value,
                                                                    sizeof(value)) == CUBLAS_STATUS_SUCCESS;
    });
    cublasLtMatmulHeuristicResult_t result{};
    const MatmulDescriptors& t = plan.descriptors;
    if (!accepted || cublasLtMatmulAlgoCheck(gpu.cublaslt, t.operation.get(), t.a.get(), t.b.get(), t.d.get(),
                                             t.d.get(), &plan.algorithm, &result) != CUBLAS_STATUS_SUCCESS)
        return std::nullopt;
    plan.workspace_bytes = result.workspaceSize;
    if (plan.workspace_bytes > std::min(workspace_bytes, gpu.workspace.bytes())) return std::nullopt;
    return plan;
}

// An algorithm of the heuristic's: as settings that make_plan can take, and as it came.
struct MatmulAlgorithm {
    MatmulSettings settings;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace_bytes;
};
// For an algorithm that make_plan can't make from its settings. As nobody else could either, its text has
// algo -1, which no library knows: whoever reads that chooses anew.
inline MatmulPlan plan_as_it_came(const MatmulKey& key, const MatmulAlgorithm& given) {
    const bool fused = given.settings.fused;
    return {key,
            {.fused = fused},
            MatmulDescriptors(key, fused ? key.epilogue : plainer(key.epilogue)),
            given.algorithm,
            given.workspace_bytes};
}

// D = or += the plan's product, with everything its key asks for. Async on gpu.stream. cublasLtMatmul may
// refuse what cublasLtMatmulAlgoCheck let pass: its status.
inline cublasStatus_t start_plan(MatmulPlan& plan, const MatmulOperands& x, Gpu& gpu) {
    const MatmulKey& key = plan.key;
    const bool fused = plan.settings.fused;
    const MatmulEpilogue inside = fused ? key.epilogue : plainer(key.epilogue);
    if (inside == MatmulEpilogue::Bias || inside == MatmulEpilogue::GeluBias)
        plan.descriptors.set_bias(x.bias);
    if (inside == MatmulEpilogue::GeluBias) plan.descriptors.set_aux(x.pre_gelu_out);
    if (inside == MatmulEpilogue::Dgelu) plan.descriptors.set_aux(x.pre_gelu);
    // The library assigns a bias gradient, of D's type, whatever beta is.
    const bool adds_later = inside == MatmulEpilogue::Bgrad && key.write == Write::Add;
    if (inside == MatmulEpilogue::Bgrad) plan.descriptors.set_bias(adds_later ? x.scratch : x.dbias);
    void* d = key.epilogue == MatmulEpilogue::GeluBias && !fused ? x.pre_gelu_out : x.d;
    const float alpha = 1.0f, beta = key.write == Write::Add ? 1.0f : 0.0f;
    const MatmulDescriptors& t = plan.descriptors;
    const cublasStatus_t status = cublasLtMatmul(
        gpu.cublaslt, t.operation.get(), &alpha, x.a, t.a.get(), x.b, t.b.get(), &beta, d, t.d.get(), d,
        t.d.get(), &plan.algorithm, gpu.workspace.get(), plan.workspace_bytes, gpu.stream);
    if (status == CUBLAS_STATUS_SUCCESS && adds_later)
        add_bias_slices(x.dbias, x.scratch, 1, static_cast<int64_t>(key.m), Write::Add, gpu);
    if (fused || status != CUBLAS_STATUS_SUCCESS) return status;
    floatX* out = static_cast<floatX*>(x.d);
    if (key.epilogue == MatmulEpilogue::Bias)
        bias_forward(out, x.bias, static_cast<int64_t>(key.n), static_cast<int64_t>(key.m), gpu);
    if (key.epilogue == MatmulEpilogue::GeluBias) gelu_forward(out, x.pre_gelu_out, key.m * key.n, gpu);
    if (key.epilogue == MatmulEpilogue::Dgelu) gelu_backward(out, out, x.pre_gelu, key.m * key.n, gpu);
    if (key.epilogue == MatmulEpilogue::Bgrad)
        bias_backward(x.dbias, x.scratch, x.a, static_cast<int64_t>(key.k), static_cast<int64_t>(key.m),
                      key.write, gpu);
    return status;
}

inline void run_plan(MatmulPlan& plan, const MatmulOperands& x, Gpu& gpu) {
    const cublasStatus_t status = start_plan(plan, x, gpu);
    if (status != CUBLAS_STATUS_SUCCESS)
        fatal("matmul plan %s: cublasLtMatmul failed: %s", plan.text().c_str(),
              cublasLtGetStatusString(status));
}

// Whether the plan runs, found by running it to its end. A CUDA error that stays ends the program: nothing
// after it could be trusted.
inline bool try_plan(MatmulPlan& plan, const MatmulOperands& x, Gpu& gpu) {
    const cublasStatus_t status = start_plan(plan, x, gpu);
    const cudaError_t error = cudaStreamSynchronize(gpu.stream);
    if (status == CUBLAS_STATUS_SUCCESS && error == cudaSuccess) return true;
    cudaGetLastError();  // forgotten, so that the next check isn't told of it
    const cudaError_t stays = cudaStreamSynchronize(gpu.stream);
    if (stays != cudaSuccess)
        fatal("matmul plan %s failed: %s (%s)", plan.text().c_str(), cudaGetErrorName(stays),
              cudaGetErrorString(stays));
    return false;
}

// ---- candidates and their measurement --------------------------------------------------------------------

struct MatmulTuning {
    bool measure = true;                                   // or take the heuristic's first, untried
    bool fuse_gelu = true;                                 // see below
    int candidates = 32;                                   // algorithms timed, of each way to do the epilogue
    size_t workspace_bytes = SIZE_MAX;                     // at most, of the Gpu's
    std::string cache_path = default_matmul_cache_path();  // empty: measured anew in each run
};
// A fused gelu reads the fp32 sum before pre_gelu is rounded from it, and is the library's formula. Where
// backward computes gelu_forward(pre_gelu) again instead of keeping the result, only an unfused forward gives
// the same bits: fuse_gelu false.

// The heuristic's algorithms for a product, best guess first; none where it fails, for whatever reason.
inline std::vector<MatmulAlgorithm> heuristic_algorithms(const MatmulKey& key, bool fused, int count,
                                                         size_t workspace_bytes, const Gpu& gpu) {
    cublasLtMatmulPreference_t made = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&made));
    MatmulPreference preference(made);
    auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(made, attribute, &value, sizeof(value)));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
    for (auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        set(attribute, static_cast<uint32_t>(kMatmulAlignment));
    // Parts of a split sum are added in fp32: in place or in the output's type only where that is fp32.
    const bool fp32_sums = key.fp32_out || kCudaTypeX == CUDA_R_32F;
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(fp32_sums ? CUBLASLT_REDUCTION_SCHEME_MASK
                                        : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));

    const MatmulDescriptors t(key, fused ? key.epilogue : plainer(key.epilogue));
    const int wanted = std::max(count, 1);
    const auto results = std::make_unique<cublasLtMatmulHeuristicResult_t[]>(wanted);
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(gpu.cublaslt, t.operation.get(), t.a.get(), t.b.get(), t.d.get(),
                                       t.d.get(), made, wanted, results.get(), &found);
    if (status != CUBLAS_STATUS_SUCCESS) return {};
    std::vector<MatmulAlgorithm> all;
    for (int i = 0; i < found; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
        MatmulSettings settings;
        settings.fused = fused;
        each_setting(settings, [&](const char*, cublasLtMatmulAlgoConfigAttributes_t attribute, auto& value) {
            if (cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, attribute, &value, sizeof(value),
                                                     nullptr) != CUBLAS_STATUS_SUCCESS)
                value = 0;
        });
        all.push_back({settings, results[i].algo, results[i].workspaceSize});
    }
    return all;
}

// x (n) = random numbers of mean 0 and variance 1, bell-shaped: the sum of four uniform ones. Never measure
// on zeros, which cost less power and so run faster.
template <class T>
__global__ void fill_random_kernel(T* x, int64_t n, uint64_t stream) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint4 bits = philox(0, stream, static_cast<uint64_t>(i));
    const float sum =
        uniform_open(bits.x) + uniform_open(bits.y) + uniform_open(bits.z) + uniform_open(bits.w);
    constexpr float kSqrt3 = 1.7320508f;  // a uniform number's variance is 1/12
    x[i] = static_cast<T>((sum - 2.0f) * kSqrt3);
}
template <class T>
inline void fill_random(T* x, size_t n, uint64_t stream, const Gpu& gpu) {
    constexpr int kThreads = 256;
    const int64_t elements = static_cast<int64_t>(n);
    launch(fill_random_kernel<T>, {ceil_div(elements, kThreads), kThreads}, gpu, x, elements, stream);
}

// Operands of a product for measuring, full of random numbers; empty where they don't fit beside what is
// there.
class MatmulTuningMemory {
  public:
    MatmulTuningMemory(const MatmulKey& key, const Gpu& gpu) {
        const size_t d_bytes = key.m * key.n * (key.fp32_out ? sizeof(float) : sizeof(floatX));
        const bool has_pre_gelu =
            key.epilogue == MatmulEpilogue::GeluBias || key.epilogue == MatmulEpilogue::Dgelu;
        const bool has_dbias = key.epilogue == MatmulEpilogue::Bgrad;
        const size_t scratch_floats =
            has_dbias ? bias_backward_scratch_floats(static_cast<int64_t>(key.k), static_cast<int64_t>(key.m))
                      : 0;
        const size_t random[] = {key.m * key.k, key.k * key.n, key.m, has_pre_gelu ? key.m * key.n : 1};
        const size_t zeros[] = {d_bytes, has_dbias ? key.m * sizeof(float) : 1,
                                scratch_floats * sizeof(float)};
        size_t offsets[7], total = 0, part = 0;
        auto place = [&](size_t bytes) {
            offsets[part++] = total;
            total += (bytes + 255) / 256 * 256;
        };
        for (const size_t elements : random) place(elements * sizeof(floatX));
        const size_t random_bytes = total;
        for (const size_t bytes : zeros) place(bytes);
        unsigned char* memory = nullptr;
        if (cudaMalloc(reinterpret_cast<void**>(&memory), total) != cudaSuccess) {
            cudaGetLastError();  // forgotten: it was only a question
            return;
        }
        memory_.reset(memory);
        floatX* parts[4];
        for (int i = 0; i < 4; i++) {
            parts[i] = reinterpret_cast<floatX*>(memory + offsets[i]);
            fill_random(parts[i], random[i], static_cast<uint64_t>(i), gpu);
        }
        CUDA_CHECK(cudaMemsetAsync(memory + random_bytes, 0, total - random_bytes, gpu.stream));
        operands_ = {.a = parts[0],
                     .b = parts[1],
                     .d = memory + offsets[4],
                     .bias = parts[2],
                     .pre_gelu_out = parts[3],
                     .pre_gelu = parts[3],
                     .dbias = reinterpret_cast<float*>(memory + offsets[5]),
                     .scratch = reinterpret_cast<float*>(memory + offsets[6])};
    }
    explicit operator bool() const { return memory_ != nullptr; }
    const MatmulOperands& operands() const { return operands_; }

  private:
    struct Free {
        void operator()(unsigned char* p) const { cudaFree(p); }
    };
    std::unique_ptr<unsigned char, Free> memory_;
    MatmulOperands operands_{};
};

// Mean time of `runs` runs, back to back.
inline double time_plan_us(MatmulPlan& plan, const MatmulOperands& operands, int runs, Gpu& gpu) {
    return mean_us(
        runs, [&] { run_plan(plan, operands, gpu); }, gpu);
}

// Runs something until a GPU that stood idle has its clocks up, else what is timed first looks slow: 200 ms,
// by time_us(runs), the mean of so many runs. Something very short ends before, by the number of its runs.
template <class Time>
inline void warm_up(Time time_us) {
    constexpr double kWarmUs = 200e3;
    constexpr int kMostRuns = 1024;  // at once
    double us = 0;
    for (int runs = 1; runs <= kMostRuns && us < kWarmUs; runs *= 2) us += runs * time_us(runs);
}

// The first, unless the fastest beats it by more than 2%: less is within a measurement's noise, and staying
// with the heuristic keeps runs alike.
inline size_t choose_fastest(const std::vector<double>& us) {
    const size_t best = std::min_element(us.begin(), us.end()) - us.begin();
    return us[best] < 0.98 * us[0] ? best : 0;
}

// Times of `count` candidates by time_us(i, runs), the mean of so many runs of candidate i. Each is looked at
// twice, and the better look counts: the other may have met what won't be there again. What isn't hopeless is
// then timed in rounds, one after the other, so that a clock that changes meets all of them; their medians.
template <class Time>
inline std::vector<double> measure_candidates(size_t count, Time time_us) {
    constexpr int kRounds = 5;
    constexpr double kHopeless = 1.2;  // times the fastest of the first looks
    constexpr double kRoundUs = 2000;  // of each candidate in each round: far above the events' resolution
    std::vector<double> first_look(count, DBL_MAX);
    for (int look = 0; look < 2; look++)
        for (size_t i = 0; i < count; i++) first_look[i] = std::min(first_look[i], time_us(i, 1));
    const double fastest = *std::min_element(first_look.begin(), first_look.end());
    auto hopeless = [&](size_t i) { return i > 0 && first_look[i] > kHopeless * fastest; };
    std::vector<std::array<double, kRounds>> rounds(count);
    for (int round = 0; round < kRounds; round++)
        for (size_t i = 0; i < count; i++) {
            if (hopeless(i)) continue;
            const int runs = static_cast<int>(std::clamp(kRoundUs / std::max(first_look[i], 1.0), 1.0, 50.0));
            rounds[i][round] = time_us(i, runs);
        }
    std::vector<double> us = first_look;
    for (size_t i = 0; i < count; i++) {
        if (hopeless(i)) continue;
        std::nth_element(rounds[i].begin(), rounds[i].begin() + kRounds / 2, rounds[i].end());
        us[i] = rounds[i][kRounds / 2];
    }
    return us;
}

// The index of the plan to use, with its times filled in. All of them run: try_plan.
inline size_t measure_plans(std::vector<MatmulPlan>& plans, const MatmulOperands& operands, Gpu& gpu) {
    const std::vector<double> us = measure_candidates(
        plans.size(), [&](size_t i, int runs) { return time_plan_us(plans[i], operands, runs, gpu); });
    for (size_t i = 0; i < plans.size(); i++) {
        plans[i].us = us[i];
        plans[i].first_us = us[0];
        plans[i].candidates = static_cast<int>(plans.size());
    }
    return choose_fastest(us);
}

// ---- the products of the model ---------------------------------------------------------------------------

// N rows; C, OC the widths of inp and out. All pointers on the device, 16-byte aligned, and not overlapping;
// C and OC multiples of 8 (bf16) or 4 (fp32). For the head weight is wte (OC, C) and OC = Vp.
struct MatmulForward {
    floatX* out;                   // (N, OC) =
    const floatX *inp, *weight;    // (N, C), (C, OC)
    const floatX* bias = nullptr;  // (OC), or none
    int64_t N, C, OC;
};
struct MatmulForwardGelu {
    floatX *out, *pre_gelu;             // (N, OC) =, both
    const floatX *inp, *weight, *bias;  // (N, C), (C, OC), (OC)
    int64_t N, C, OC;
};
struct MatmulDgrad {
    floatX* dinp;                 // (N, C) =
    const floatX *dout, *weight;  // (N, OC), (C, OC)
    int64_t N, C, OC;
};
struct MatmulDgradGelu {
    floatX* dinp;                            // (N, C) =, the gradient of pre_gelu
    const floatX *pre_gelu, *dout, *weight;  // (N, C), (N, OC), (C, OC)
    int64_t N, C, OC;
};
struct MatmulWgrad {
    float* dweight;            // (C, OC) = or +=; for the head (OC, C)
    const floatX *inp, *dout;  // (N, C), (N, OC)
    int64_t N, C, OC;
    Write write;
    // (OC) = or += dout's column sums, or none; scratch: bias_backward_scratch_floats(N, OC), contents lost.
    float *dbias = nullptr, *scratch = nullptr;
};

// The sizes that a training run multiplies by: tokens of a micro-step, rows of logits at once.
struct MatmulModel {
    int64_t tokens, logit_rows, channels, padded_vocab_size;
    bool accumulate;  // gradients are added to as well: several micro-steps, or several chunks of logits
};

// Told of each plan that was measured: the done-th of all.
using MatmulMeasured = std::function<void(const MatmulPlan& plan, size_t done, size_t all)>;

// The plans of a program, one for each distinct product, made at first use or by prepare(). One for a Gpu,
// used by one thread; the work is asynchronous on gpu.stream and, plans given, deterministic.
class Matmuls {
  public:
    explicit Matmuls(const MatmulTuning& tuning = {}) : tuning_(tuning) {}

    // out = inp weight [+ bias].
    void forward(const MatmulForward& x, Gpu& gpu) {
        const MatmulEpilogue epilogue = x.bias ? MatmulEpilogue::Bias : MatmulEpilogue::None;
        product(forward_key(x.N, x.C, x.OC, epilogue),
                {.a = x.weight, .b = x.inp, .d = x.out, .bias = x.bias}, gpu);
    }
    // pre_gelu = inp weight + bias; out = gelu(pre_gelu), of the sum before or after rounding.
    void forward_gelu(const MatmulForwardGelu& x, Gpu& gpu) {
        product(forward_key(x.N, x.C, x.OC, MatmulEpilogue::GeluBias),
                {.a = x.weight, .b = x.inp, .d = x.out, .bias = x.bias, .pre_gelu_out = x.pre_gelu}, gpu);
    }
    // dinp = dout weight^T.
    void dgrad(const MatmulDgrad& x, Gpu& gpu) {
        product(dgrad_key(x.N, x.C, x.OC, MatmulEpilogue::None), {.a = x.weight, .b = x.dout, .d = x.dinp},
                gpu);
    }
    // dinp = (dout weight^T) gelu'(pre_gelu), elementwise.
    void dgrad_gelu(const MatmulDgradGelu& x, Gpu& gpu) {
        product(dgrad_key(x.N, x.C, x.OC, MatmulEpilogue::Dgelu),
                {.a = x.weight, .b = x.dout, .d = x.dinp, .pre_gelu = x.pre_gelu}, gpu);
    }
    // dweight = or += inp^T dout [and dbias].
    void wgrad(const MatmulWgrad& x, Gpu& gpu) {
        const MatmulEpilogue epilogue = x.dbias ? MatmulEpilogue::Bgrad : MatmulEpilogue::None;
        product(wgrad_key(x.OC, x.C, x.N, x.write, epilogue),
                {.a = x.dout, .b = x.inp, .d = x.dweight, .dbias = x.dbias, .scratch = x.scratch}, gpu);
    }

    // The head: weight is wte (OC = Vp, C), its rows the outputs.  out = inp wte^T.
    void head_forward(const MatmulForward& x, Gpu& gpu) {
        if (x.bias) fatal("the head's product has no bias");
        product(dgrad_key(x.N, x.OC, x.C, MatmulEpilogue::None), {.a = x.weight, .b = x.inp, .d = x.out},
                gpu);
    }
    // dinp = dout wte.
    void head_dgrad(const MatmulDgrad& x, Gpu& gpu) {
        product(forward_key(x.N, x.OC, x.C, MatmulEpilogue::None), {.a = x.weight, .b = x.dout, .d = x.dinp},
                gpu);
    }
    // dwte (OC, C) = or += dout^T inp.
    void head_wgrad(const MatmulWgrad& x, Gpu& gpu) {
        product(wgrad_key(x.C, x.OC, x.N, x.write), {.a = x.inp, .b = x.dout, .d = x.dweight}, gpu);
    }

    // Makes every plan of a training micro-step. Measuring wants memory for operands: call it before the big
    // arenas are taken. Products of other shapes (sampling, a last partial batch) get theirs at first use.
    // measured, where given, is called after each product that had to be measured: that takes a second.
    void prepare(const MatmulModel& model, Gpu& gpu, const MatmulMeasured& measured = {}) {
        const int64_t N = model.tokens, R = model.logit_rows, C = model.channels,
                      Vp = model.padded_vocab_size;
        std::vector<MatmulKey> keys = {
            forward_key(N, C, 3 * C, MatmulEpilogue::Bias),      // qkv
            forward_key(N, C, C, MatmulEpilogue::Bias),          // attproj
            forward_key(N, C, 4 * C, MatmulEpilogue::GeluBias),  // fc
            forward_key(N, 4 * C, C, MatmulEpilogue::Bias),      // fcproj
            dgrad_key(N, C, 3 * C, MatmulEpilogue::None),
            dgrad_key(N, C, C, MatmulEpilogue::None),
            dgrad_key(N, C, 4 * C, MatmulEpilogue::None),
            dgrad_key(N, 4 * C, C, MatmulEpilogue::Dgelu),
            dgrad_key(R, Vp, C, MatmulEpilogue::None),
            forward_key(R, Vp, C, MatmulEpilogue::None),  // head
        };
        for (Write write : {Write::Assign, Write::Add}) {
            if (write == Write::Add && !model.accumulate) continue;
            for (int64_t width : {int64_t{3}, int64_t{1}}) keys.push_back(wgrad_key(width * C, C, N, write));
            keys.push_back(wgrad_key(4 * C, C, N, write, MatmulEpilogue::Bgrad));  // fc
            keys.push_back(wgrad_key(C, 4 * C, N, write));
            keys.push_back(wgrad_key(C, Vp, R, write));
        }
        for (size_t i = 0; i < keys.size(); i++)
            if (const MatmulPlan& plan = plan_untold(keys[i], gpu); plan.candidates > 0 && measured)
                measured(plan, i + 1, keys.size());
        tell_left_out();
    }

    // Plans as text, a line each: for the log, checkpoints and other ranks. One with algo -1 is the library's
    // own choice, which can't be made again from text: replay() chooses anew, and says so.
    std::vector<std::string> record() const {
        std::vector<std::string> lines;
        for (const auto& [key, plan] : plans_) lines.push_back(plan.text());
        return lines;
    }
    // Plans of an earlier run, from record(): used for their products instead of choosing anew. Before the
    // first product.
    void replay(const std::vector<std::string>& lines) {
        for (const std::string& line : lines) {
            std::string key;
            MatmulSettings settings;
            if (!parse_plan(key, settings, line))
                fatal("matmul plan '%s': not one that this program wrote", line.c_str());
            replayed_[key] = settings;
        }
    }
    const std::map<MatmulKey, MatmulPlan>& plans() const { return plans_; }

    // Keys of the three layouts, in the model's terms: out (N, OC) = inp (N, C) weight, dinp (N, C) = dout
    // (N, OC) weight^T, dweight (rows, cols) over N.
    static MatmulKey forward_key(int64_t N, int64_t C, int64_t OC, MatmulEpilogue epilogue) {
        return {MatmulLayout::NN, epilogue, false, Write::Assign, size_t(OC), size_t(N), size_t(C)};
    }
    static MatmulKey dgrad_key(int64_t N, int64_t C, int64_t OC, MatmulEpilogue epilogue) {
        return {MatmulLayout::TN, epilogue, false, Write::Assign, size_t(C), size_t(N), size_t(OC)};
    }
    static MatmulKey wgrad_key(int64_t cols, int64_t rows, int64_t N, Write write,
                               MatmulEpilogue epilogue = MatmulEpilogue::None) {
        return {MatmulLayout::NT, epilogue, true, write, size_t(cols), size_t(rows), size_t(N)};
    }

    // The plan of a product, made now if there is none yet.
    MatmulPlan& plan(const MatmulKey& key, Gpu& gpu) {
        MatmulPlan& plan = plan_untold(key, gpu);
        tell_left_out();
        return plan;
    }

  private:
    void product(const MatmulKey& key, const MatmulOperands& operands, Gpu& gpu) {
        run_plan(plan(key, gpu), operands, gpu);
    }

    MatmulPlan& plan_untold(const MatmulKey& key, Gpu& gpu) {
        const auto found = plans_.find(key);
        if (found != plans_.end()) return found->second;
        const size_t multiple = kMatmulAlignment / sizeof(floatX);
        if (key.m == 0 || key.n == 0 || key.k == 0)
            fatal("product %s: a dimension is zero", text_of_key(key).c_str());
        if (key.m % multiple || (key.layout == MatmulLayout::NT ? key.n : key.k) % multiple)
            fatal("product %s: widths must be multiples of %zu", text_of_key(key).c_str(), multiple);
        cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
        CUDA_CHECK(cudaStreamIsCapturing(gpu.stream, &capturing));
        if (capturing != cudaStreamCaptureStatusNone)
            fatal("product %s has no plan, and none can be made while a graph is captured",
                  text_of_key(key).c_str());
        return plans_.emplace(key, choose(key, gpu)).first->second;
    }

    // Said once: a plan must be one that can be written down, so what can't be made again isn't a candidate.
    void tell_left_out() {
        if (left_out_ == 0 || std::exchange(told_left_out_, true)) return;
        const std::string alone =
            as_they_came_ == 0
                ? ""
                : text_of("; products that have no other, and use one for this run only: %zu", as_they_came_);
        warn(
            "matmul plans: %zu of the %zu algorithms that cuBLASLt proposes can't be made again from their "
            "settings and are left out%s",
            left_out_, proposed_, alone.c_str());
    }

    // A recorded plan, else a remembered one, else the best of the candidates.
    MatmulPlan choose(const MatmulKey& key, Gpu& gpu) {
        const std::string name = text_of_key(key);
        const size_t workspace_bytes = std::min(tuning_.workspace_bytes, gpu.workspace.bytes());
        const bool may_fuse = key.epilogue != MatmulEpilogue::GeluBias || tuning_.fuse_gelu;
        if (const auto recorded = replayed_.find(name); recorded != replayed_.end()) {
            auto plan = make_plan(key, recorded->second, SIZE_MAX, gpu);
            if (plan && (may_fuse || !plan->settings.fused)) return std::move(*plan);
            warn(
                "matmul plan %s of an earlier run can't be used with this GPU, library or options; results "
                "may differ in "
                "the last bits",
                name.c_str());
        }
        if (tuning_.measure)
            if (const MatmulSettings* remembered = cache(gpu).find(name))
                if (auto plan = make_plan(key, *remembered, workspace_bytes, gpu)) return std::move(*plan);

        const int count = tuning_.measure ? tuning_.candidates : 1;
        std::optional<MatmulTuningMemory> memory;
        if (tuning_.measure) memory.emplace(key, gpu);
        auto works = [&](MatmulPlan& plan) {
            return !memory || !*memory || try_plan(plan, memory->operands(), gpu);
        };
        std::vector<MatmulPlan> plans;
        std::vector<MatmulAlgorithm> left_out;
        size_t proposed = 0;
        auto propose = [&](bool fused) {
            for (const MatmulAlgorithm& given :
                 heuristic_algorithms(key, fused, count, workspace_bytes, gpu)) {
                proposed++;
                auto plan = make_plan(key, given.settings, workspace_bytes, gpu);
                if (!plan) left_out.push_back(given);
                else if (works(*plan)) plans.push_back(std::move(*plan));
            }
        };
        // A bias gradient rides only where that was tried and measured.
        if (may_fuse && (key.epilogue != MatmulEpilogue::Bgrad || tuning_.measure)) propose(true);
        // The epilogue in a kernel of ours is another way, and the only one where the library's own fail.
        // Where the library offers one algorithm, and it works, there is nothing to choose.
        if (key.epilogue != MatmulEpilogue::None && (proposed != 1 || plans.empty())) propose(false);
        proposed_ += proposed, left_out_ += left_out.size();
        if (plans.empty())
            for (const MatmulAlgorithm& given : left_out) {
                MatmulPlan plan = plan_as_it_came(key, given);
                if (!works(plan)) continue;
                as_they_came_++;
                return plan;
            }
        if (plans.empty())
            fatal("product %s: cuBLASLt proposes %zu algorithms, and none works", name.c_str(), proposed);
        if (!tuning_.measure || plans.size() == 1) return std::move(plans[0]);

        if (!*memory) {
            warn("no memory to measure product %s; the heuristic's first algorithm is used", name.c_str());
            return std::move(plans[0]);
        }
        if (!std::exchange(warm_, true))
            warm_up([&](int runs) { return time_plan_us(plans[0], memory->operands(), runs, gpu); });
        const size_t chosen = measure_plans(plans, memory->operands(), gpu);
        cache(gpu).remember(name, plans[chosen].settings);
        if (!cache(gpu).save() && !std::exchange(unsaved_, true))
            warn("matmul plans can't be kept in %s; the next run measures again", tuning_.cache_path.c_str());
        return std::move(plans[chosen]);
    }

    MatmulCache& cache(const Gpu& gpu) {
        if (!cache_) {
            int driver = 0;
            CUDA_CHECK(cudaDriverGetVersion(&driver));
            const size_t workspace_bytes = std::min(tuning_.workspace_bytes, gpu.workspace.bytes());
            cache_.emplace(tuning_.cache_path,
                           text_of("%s driver %d cublaslt %zu workspace %zu candidates %d fuse_gelu %d",
                                   gpu.properties.name, driver, cublasLtGetVersion(), workspace_bytes,
                                   tuning_.candidates, tuning_.fuse_gelu));
            if (const std::string& complaint = cache_->complaint(); !complaint.empty())
                warn("matmul plans: %s; products are measured anew", complaint.c_str());
        }
        return *cache_;
    }

    MatmulTuning tuning_;
    std::map<MatmulKey, MatmulPlan> plans_;
    std::map<std::string, MatmulSettings> replayed_;
    std::optional<MatmulCache> cache_;
    size_t proposed_ = 0, left_out_ = 0, as_they_came_ = 0;  // algorithms, of them not made again; products
    bool warm_ = false, told_left_out_ = false, unsaved_ = false;
};
