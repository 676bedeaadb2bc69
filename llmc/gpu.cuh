// The device as the rest of the program sees it: precision, checks, and `Gpu`, which owns the stream, the
// cuBLASLt handle and the matmul workspace. In the simulator the same calls are dev/sim's.
#pragma once
#include <algorithm>  // min
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <cublasLt.h>      // cublasLtCreate, cublasLtDestroy
#include <cuda_bf16.h>     // __nv_bfloat16
#include <cuda_runtime.h>  // cudaStream_t, cudaMalloc, cudaGetDeviceProperties
#include "llmc/fatal.h"    // fatal

// ---- precision: the only place that chooses --------------------------------------------------------------

#if defined(PRECISION_FP32)
using floatX = float;
inline constexpr const char* kPrecisionName = "fp32";
#else
using floatX = __nv_bfloat16;
inline constexpr const char* kPrecisionName = "bf16";
#endif

// Whether a kernel's output replaces what was there or adds to it: weight gradients add from the second
// micro-step on.
enum class Write { Assign, Add };

// ---- checks ----------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status, const char* expression, const char* file, int line) {
    if (status == cudaSuccess) return;
    fatal("%s:%d: %s failed: %s (%s)", file, line, expression, cudaGetErrorName(status),
          cudaGetErrorString(status));
}

inline void check_cublas(cublasStatus_t status, const char* expression, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fatal("%s:%d: %s failed: %s", file, line, expression, cublasLtGetStatusString(status));
}

#define CUDA_CHECK(expression) check_cuda((expression), #expression, __FILE__, __LINE__)
#define CUBLAS_CHECK(expression) check_cublas((expression), #expression, __FILE__, __LINE__)

// ---- device memory ---------------------------------------------------------------------------------------

// Device memory of n elements of T with an owner; moves, never copies. The error for "does not fit" is the
// planner's business (tensors.h); one that comes here all the same names the size.
template <class T>
class DeviceBuffer {
  public:
    DeviceBuffer() = default;
    explicit DeviceBuffer(size_t n) : n_(n) {
        if (n == 0) return;
        cudaError_t status = cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T));
        if (status == cudaErrorMemoryAllocation)
            fatal(
                "out of device memory: wanted %zu bytes (%.2f GiB) more; use a smaller --batch-size or "
                "--recompute block",
                n * sizeof(T), static_cast<double>(n * sizeof(T)) / (1u << 30));
        check_cuda(status, "cudaMalloc", __FILE__, __LINE__);
    }
    DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
    DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
        swap(other);
        return *this;
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() {
        if (data_) cudaFree(data_);
    }
    T* get() const { return data_; }
    operator T*() const { return data_; }
    size_t size() const { return n_; }
    size_t bytes() const { return n_ * sizeof(T); }

  private:
    void swap(DeviceBuffer& other) {
        std::swap(data_, other.data_);
        std::swap(n_, other.n_);
    }
    T* data_ = nullptr;
    size_t n_ = 0;
};

// Page-locked host memory, the only kind that copies asynchronously.
template <class T>
class PinnedBuffer {
  public:
    PinnedBuffer() = default;
    explicit PinnedBuffer(size_t n) : n_(n) {
        if (n) CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&data_), n * sizeof(T)));
    }
    PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
    PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
        swap(other);
        return *this;
    }
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;
    ~PinnedBuffer() {
        if (data_) cudaFreeHost(data_);
    }
    T* get() const { return data_; }
    operator T*() const { return data_; }
    size_t size() const { return n_; }

  private:
    void swap(PinnedBuffer& other) {
        std::swap(data_, other.data_);
        std::swap(n_, other.n_);
    }
    T* data_ = nullptr;
    size_t n_ = 0;
};

// ---- the device ------------------------------------------------------------------------------------------

// One GPU of this process: device 0 of those that CUDA_VISIBLE_DEVICES shows. Not copied, not moved: kernels
// take a reference. All work goes to `stream`, in order.
struct Gpu {
    cudaDeviceProp properties{};
    cudaStream_t stream = nullptr;
    cublasLtHandle_t cublaslt = nullptr;
    DeviceBuffer<unsigned char> workspace;  // for cuBLASLt, split-K sums above all: 256 MiB on an 80 GB GPU

    // Errors: no device, or one below compute capability 8.0, ends the program with what was wanted and
    // found.
    Gpu() {
        int count = 0;
        cudaError_t status = cudaGetDeviceCount(&count);
        if (status != cudaSuccess || count == 0)
            fatal("no usable GPU: %s; build with DEVICE=sim to run on the CPU", cudaGetErrorString(status));
        CUDA_CHECK(cudaSetDevice(0));
        CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
        if (properties.major < 8)
            fatal(
                "%s has compute capability %d.%d, this program needs 8.0 or newer; build with DEVICE=sim to "
                "run on the CPU",
                properties.name, properties.major, properties.minor);
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUBLAS_CHECK(cublasLtCreate(&cublaslt));
        workspace = DeviceBuffer<unsigned char>(std::min(size_t{256} << 20, properties.totalGlobalMem / 256));
    }
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;
    ~Gpu() {
        if (cublaslt) cublasLtDestroy(cublaslt);
        if (stream) cudaStreamDestroy(stream);
    }

    void synchronize() const { CUDA_CHECK(cudaStreamSynchronize(stream)); }

    // Dense bf16 peak in FLOP/s by the vendor's data sheets (SXM parts), 0 where it isn't known: then no MFU
    // is printed.
    double peak_bf16_flops() const {
        struct Peak {
            const char* name;
            double tflops;
        };
        constexpr Peak kPeaks[] = {{"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989},     {"H200", 989},
                                   {"GH200", 989},     {"A100", 312},     {"RTX 4090", 165}, {"RTX 3090", 71},
                                   {"L40S", 362},      {"A10G", 70}};
        for (const Peak& peak : kPeaks)
            if (std::string(properties.name).find(peak.name) != std::string::npos) return peak.tflops * 1e12;
        return 0;
    }
};

// Asynchronous copies on the GPU's stream; n counts elements. Host memory that is not pinned makes them
// synchronous.
template <class T>
inline void copy_to_device(T* device, const T* host, size_t n, const Gpu& gpu) {
    CUDA_CHECK(cudaMemcpyAsync(device, host, n * sizeof(T), cudaMemcpyHostToDevice, gpu.stream));
}
template <class T>
inline void copy_to_host(T* host, const T* device, size_t n, const Gpu& gpu) {
    CUDA_CHECK(cudaMemcpyAsync(host, device, n * sizeof(T), cudaMemcpyDeviceToHost, gpu.stream));
}
template <class T>
inline void fill_zero(T* device, size_t n, const Gpu& gpu) {
    CUDA_CHECK(cudaMemsetAsync(device, 0, n * sizeof(T), gpu.stream));
}

// The mean time of f(), which puts work onto the GPU's stream, over `runs` runs back to back. Synchronous.
template <class F>
inline double mean_us(int runs, F f, const Gpu& gpu) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CUDA_CHECK(cudaEventRecord(begin, gpu.stream));
    for (int i = 0; i < runs; i++) f();
    CUDA_CHECK(cudaEventRecord(end, gpu.stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return ms * 1e3 / runs;
}
