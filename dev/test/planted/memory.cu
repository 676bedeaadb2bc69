// Planted bugs: bounds, alignment, lifetime and freshness of device and shared memory.
#include <climits>
#include "planted.h"

namespace {

struct FloatsShared {
    float x[64];
};

__global__ void write_past_end_kernel(float* out) {
    out[threadIdx.x + (threadIdx.x == 63)] = 1;  // BUG write_past_end
}
__global__ void one_too_many_kernel(float* out) { out[threadIdx.x] = 1; }
__global__ void read_past_end_kernel(float* out) {
    const float next = out[threadIdx.x + 1];  // BUG read_past_end
    out[threadIdx.x] = next;
}
__global__ void write_before_start_kernel(float* out) {
    out[static_cast<int>(threadIdx.x) - 1] = 1;  // BUG write_before_start
}
__global__ void vector_past_end_kernel(float* out) {
    reinterpret_cast<float4*>(out + 4)[threadIdx.x] = float4{1, 1, 1, 1};  // BUG vector_past_end
}
__global__ void shared_past_end_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    float* x = s.x;
    x[threadIdx.x + (threadIdx.x == 63)] = 1;  // BUG shared_past_end
    __syncthreads();
    out[threadIdx.x] = x[63 - threadIdx.x];
}
__global__ void misaligned_kernel(float* out) {
    const float4 v = *reinterpret_cast<const float4*>(out + 2);  // BUG misaligned
    out[threadIdx.x] = v.x;
}
__global__ void misaligned_cached_kernel(float* out) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(out + 1));  // BUG misaligned_cached
    out[threadIdx.x] = v.x;
}
__global__ void misaligned_async_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    ptx::cp_async_16(&s.x[4 * (threadIdx.x % 8)], out + 1);  // BUG misaligned_async
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
__global__ void async_past_end_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    if (threadIdx.x < 16)
        ptx::cp_async_16(&s.x[4 * threadIdx.x], out + 4 * threadIdx.x);  // BUG async_past_end
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
__global__ void index_overflow_kernel(float* out, int rows, int columns) {
    const int i = rows * columns;  // BUG index_overflow
    if (i > 0) out[0] = static_cast<float>(i);
}
__global__ void wild_pointer_kernel(float* out) {
    out[0] = *reinterpret_cast<float*>(uintptr_t{64} + threadIdx.x);
}
__global__ void last_block_value_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    if (blockIdx.x == 0) s.x[threadIdx.x] = 1;  // the others rely on what the first block left
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = s.x[threadIdx.x];
}
__global__ void add_one_kernel(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x] + 1; }

__attribute__((noinline)) float deep(float* p, int depth) {
    volatile float frame[4096];
    frame[depth % 4096] = static_cast<float>(depth);
    return depth == 0 ? *p : deep(p, depth - 1) + frame[depth % 4096];
}
__global__ void deep_stack_kernel(float* out) { out[threadIdx.x] = deep(out, 100); }

__global__ void endless_kernel(volatile float* out) {
    while (out[0] != 1 && out[1] != 2) out[2] = 3;
}

template <void (*kernel)(float*), size_t n = 64>
void run(Gpu& gpu) {
    DeviceBuffer<float> out(n);
    fill_zero(out.get(), n, gpu);
    launch<FloatsShared>(kernel, {1, 64}, gpu, out.get());
    gpu.synchronize();
}

void index_overflow(Gpu& gpu) {
    DeviceBuffer<float> out(1);
    launch(index_overflow_kernel, {1, 1}, gpu, out.get(), 64 * 1024, 50304);
    gpu.synchronize();
}

void endless(Gpu& gpu) {
    DeviceBuffer<float> out(64);
    launch(endless_kernel, {1, 32}, gpu, out.get());
    gpu.synchronize();
}

void use_after_free(Gpu& gpu) {
    float* p;
    CUDA_CHECK(cudaMalloc(&p, 64 * sizeof(float)));
    CUDA_CHECK(cudaFree(p));
    launch(write_past_end_kernel, {1, 32}, gpu, p);
    gpu.synchronize();
}

void double_free(Gpu&) {
    float* p;
    CUDA_CHECK(cudaMalloc(&p, 64));
    CUDA_CHECK(cudaFree(p));
    CUDA_CHECK(cudaFree(p));  // BUG double_free
}

void free_inside(Gpu&) {
    DeviceBuffer<float> p(64);
    CUDA_CHECK(cudaFree(p.get() + 1));  // BUG free_inside
}

void free_host_as_device(Gpu&) {
    PinnedBuffer<float> p(64);
    CUDA_CHECK(cudaFree(p.get()));  // BUG free_host_as_device
}

void leak(Gpu&) {
    float* p;
    CUDA_CHECK(cudaMalloc(&p, 1000));  // BUG leak
}

void out_of_memory(Gpu&) { DeviceBuffer<float> p(size_t{3} << 20); }

void copy_past_end(Gpu& gpu) {
    DeviceBuffer<float> p(63);
    const std::vector<float> host(64);
    copy_to_device(p.get(), host.data(), host.size(), gpu);
}

void copy_wrong_way(Gpu& gpu) {
    DeviceBuffer<float> p(64);
    std::vector<float> host(64);
    float* to = host.data();
    CUDA_CHECK(cudaMemcpyAsync(to, p.get(), 256, cudaMemcpyHostToDevice, gpu.stream));  // BUG copy_wrong_way
}

void fresh_device(Gpu& gpu) {
    DeviceBuffer<float> in(64), out(64);
    launch(add_one_kernel, {1, 64}, gpu, out.get(), in.get());
    expect("in + 1", fetch(out.get(), 64, gpu), [](size_t) { return 1; });
}

void last_block_value(Gpu& gpu) {
    DeviceBuffer<float> out(128);
    launch<FloatsShared>(last_block_value_kernel, {2, 64}, gpu, out.get());
    expect("value of block 0", fetch(out.get(), 128, gpu), [](size_t) { return 1; });
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"write_past_end", "memory", "",
         "@write_past_end.*simulator: kernel .*write_past_end_kernel, block \\(0, 0, 0\\), thread \\(63, 0, "
         "0\\): "
         "byte 256 of device memory of 256 bytes, allocated at",
         run<write_past_end_kernel>},
        {"read_past_end", "memory", "", "@read_past_end.*thread \\(63, 0, 0\\): byte 256 of device memory",
         run<read_past_end_kernel>},
        {"write_before_start", "memory", "",
         "@write_before_start.*thread \\(0, 0, 0\\): byte -4 of device memory",
         run<write_before_start_kernel>},
        {"vector_past_end", "memory", "",
         "@vector_past_end.*thread \\(15, 0, 0\\): byte 256 of device memory", run<vector_past_end_kernel>},
        {"shared_past_end", "memory", "",
         "@shared_past_end.*thread \\(63, 0, 0\\): byte 256 of the block's 256 of shared memory",
         run<shared_past_end_kernel>},
        {"async_past_end", "memory", "",
         "thread \\(15, 0, 0\\): cp.async reads byte 248 of device memory of 248 bytes.*@async_past_end",
         run<async_past_end_kernel, 62>},
        {"misaligned", "memory", "", "@misaligned.*misaligned address.*simulator: kernel .*misaligned_kernel",
         run<misaligned_kernel>},
        {"index_overflow", "memory", "",
         "@index_overflow.*signed integer overflow.*simulator: kernel .*index_overflow_kernel",
         index_overflow},
        {"use_after_free", "memory", "",
         "simulator: kernel .*write_past_end_kernel.*device memory of 256 bytes.*, freed at .*memory.cu",
         use_after_free},
        {"write_past_end_fault", "normal", "",
         "kernel .*thread \\(63, 0, 0\\): bad access to byte 256 of device memory of 256 bytes, allocated at",
         run<write_past_end_kernel>},
        {"write_past_end_late", "normal", "",
         "byte 252 of device memory of 252 bytes, allocated at .*, was written",
         run<one_too_many_kernel, 63>},
        {"write_before_start_late", "normal", "",
         "byte -1 of device memory of 256 bytes, allocated at .*, was written",
         run<write_before_start_kernel>},
        {"shared_past_end_late", "normal", "",
         "shared_past_end_kernel.*byte 256 of its 256 bytes of shared memory was written",
         run<shared_past_end_kernel>},
        {"misaligned_cached", "normal", "",
         "thread \\(0, 0, 0\\): __ldcs of 16 bytes at .*not a multiple of 16 \\(@misaligned_cached\\)",
         run<misaligned_cached_kernel>},
        {"misaligned_async", "normal", "",
         "thread \\(0, 0, 0\\): cp.async: source .* not a multiple of 16 \\(@misaligned_async\\)",
         run<misaligned_async_kernel>},
        {"wild_pointer", "normal", "",
         "kernel .*wild_pointer_kernel.*thread \\(0, 0, 0\\): bad access to memory that is not the device's",
         run<wild_pointer_kernel>},
        {"deep_stack", "normal", "", "kernel .*deep_stack_kernel.*stack overflow", run<deep_stack_kernel>},
        {"endless", "normal", "SIM_TIMEOUT_S=1",
         "kernel .*endless_kernel.*thread \\(0, 0, 0\\): for \\d s no thread.*endless loop", endless},
        {"use_after_free_normal", "normal", "",
         "kernel .*bad access to byte 0 of device memory of 256 bytes, .*, freed at .*memory.cu",
         use_after_free},
        {"double_free", "normal", "",
         "cudaFree.*freed already at .*was device memory of 64 bytes, allocated at .*memory.cu.*@double_free",
         double_free},
        {"free_inside", "normal", "", "cudaFree.*not the start of a piece of device memory.*@free_inside",
         free_inside},
        {"free_host_as_device", "normal", "",
         "cudaFree.*not the start of a piece of device memory.*@free_host_as_device", free_host_as_device},
        {"leak", "normal", "",
         "1000 bytes, were not freed at exit; .*device memory of 1000 bytes, allocated at .*@leak", leak},
        {"out_of_memory", "normal", "SIM_MEMORY_BYTES=8388608", "out of device memory: wanted 12582912 bytes",
         out_of_memory},
        {"copy_past_end", "normal", "", "cudaMemcpyAsync.*cudaErrorInvalidValue", copy_past_end},
        {"copy_wrong_way", "normal", "", "@copy_wrong_way: .*cudaErrorInvalidValue", copy_wrong_way},
        {"fresh_device", "normal", "", "in \\+ 1: element 0 is -?nan", fresh_device},
        {"last_block_value", "normal", "",
         "value of block 0: element 64 is -?nan, not 1: memory that nothing has written", last_block_value},
    };
    return run_cases(cases, argc, argv);
}
