// Planted bugs: what is used before it is there. A GPU would often let them pass; SIM_LATE=1 never does.
#include "planted.h"

namespace {

constexpr size_t kCount = 256;

__global__ void fill_kernel(float* out, float value) { out[threadIdx.x] = value; }
__global__ void add_kernel(float* out, const float* in, float value) {
    out[threadIdx.x] = in[threadIdx.x] + value;
}

struct TileShared {
    alignas(16) float x[2][kCount];
};

// kGroupsLeft = 0 is right. With 1 the newest tile is read before it has landed; without a wait, all are.
template <int kGroupsLeft>
__global__ void copy_kernel(float* out, const float* in) {
    TileShared& s = shared<TileShared>();
    for (int i = 0; i < 2; i++) {
        ptx::cp_async_16(&s.x[i][4 * threadIdx.x], in + 4 * threadIdx.x);
        ptx::cp_async_commit();
    }
    if constexpr (kGroupsLeft >= 0) ptx::cp_async_wait<kGroupsLeft>();
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kCount; i += blockDim.x) out[i] = s.x[0][i] + s.x[1][i];
}

template <int kGroupsLeft>
void copy(Gpu& gpu) {
    DeviceBuffer<float> in(kCount), out(kCount);
    launch(fill_kernel, {1, kCount}, gpu, in.get(), 1.0f);
    launch<TileShared>(copy_kernel<kGroupsLeft>, {1, kCount / 4}, gpu, out.get(), in.get());
    expect("sum of two tiles", fetch(out.get(), kCount, gpu), [](size_t) { return 2; });
}

struct ProductShared {
    alignas(1024) unsigned char bytes[64 * 128];
};

enum class Product { NoFence, NoCommit, NoWait, TileReused };

// The sum of 16 products of 1 and 1, on all places.
template <Product bug>
__global__ void product_kernel(float* out) {
    ProductShared& s = shared<ProductShared>();
    auto* tile = reinterpret_cast<uint16_t*>(s.bytes);
    for (unsigned i = threadIdx.x; i < sizeof(s.bytes) / 2; i += blockDim.x) tile[i] = 0x3f80;
    ptx::fence_async_proxy();
    __syncthreads();
    const uint32_t ones = 0x3f803f80, a[4] = {ones, ones, ones, ones};
    float d[8][4];
    if (bug != Product::NoFence) ptx::wgmma_fence();
    ptx::wgmma_transposed<false>(d, a, s.bytes, 0);  // BUG product_fence
    if (bug != Product::NoCommit) ptx::wgmma_commit();
    if (bug == Product::TileReused) {
        for (unsigned i = threadIdx.x; i < sizeof(s.bytes) / 2; i += blockDim.x) tile[i] = 0;
        __syncthreads();
    }
    if (bug != Product::NoWait) ptx::wgmma_wait<0>(d);
    out[threadIdx.x] = d[7][3];
}

template <Product bug>
void product(Gpu& gpu) {
    DeviceBuffer<float> out(128);
    launch<ProductShared>(product_kernel<bug>, {1, 128}, gpu, out.get());
    expect("product", fetch(out.get(), 128, gpu), [](size_t) { return 16; });
}

struct EarlyShared {
    alignas(1024) unsigned char bytes[64 * 128];
    ptx::Mbarrier full;
};

// A product that is started before the wait for its tile, though it is waited for after it.
__global__ void early_product_kernel(float* out, const float* in) {
    EarlyShared& s = shared<EarlyShared>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s.full, 1);
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive_expect(&s.full, sizeof(s.bytes));
        ptx::bulk_load(s.bytes, in, sizeof(s.bytes), &s.full);
    }
    __syncthreads();
    const uint32_t a[4] = {};
    float d[8][4];
    ptx::wgmma_fence();
    ptx::wgmma_transposed<false>(d, a, s.bytes, 0);  // BUG early_product
    ptx::mbarrier_wait(&s.full, 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    out[threadIdx.x] = d[0][0];
}

void early_product(Gpu& gpu) {
    DeviceBuffer<float> out(128), in(64 * 128 / 4);
    fill_zero(in.get(), in.size(), gpu);
    launch<EarlyShared>(early_product_kernel, {1, 128}, gpu, out.get(), in.get());
    expect("product of zeros", fetch(out.get(), 128, gpu), [](size_t) { return 0; });
}

void no_synchronize(Gpu& gpu) {
    DeviceBuffer<float> x(kCount);
    PinnedBuffer<float> host(kCount);
    launch(fill_kernel, {1, kCount}, gpu, x.get(), 1.0f);
    copy_to_host(host.get(), x.get(), kCount, gpu);
    expect("copied to the host", host.get(), kCount,
           [](size_t) { return 1; });  // gpu.synchronize() is missing
}

void pinned_reused(Gpu& gpu) {
    DeviceBuffer<float> a(kCount), b(kCount);
    PinnedBuffer<float> staging(kCount);
    for (float* device : {a.get(), b.get()}) {
        for (size_t i = 0; i < kCount; i++)
            staging.get()[i] = device == a.get() ? 1 : 2;  // while the copy may still read it
        copy_to_device(device, staging.get(), kCount, gpu);
    }
    expect("first buffer", fetch(a.get(), kCount, gpu), [](size_t) { return 1; });
}

struct TwoStreams {
    cudaStream_t other;
    cudaEvent_t event;
    TwoStreams() {
        CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
    ~TwoStreams() {
        cudaEventDestroy(event);
        cudaStreamDestroy(other);
    }
};

enum class Order { NoEvent, RecordedTooEarly, WaitedTooEarly };

// x = 1 on one stream, y = x + 1 on the other.
template <Order order>
void two_streams(Gpu& gpu) {
    TwoStreams s;
    DeviceBuffer<float> x(kCount), y(kCount);
    if (order == Order::RecordedTooEarly) CUDA_CHECK(cudaEventRecord(s.event, s.other));
    if (order == Order::WaitedTooEarly) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, s.event));
    std::swap(s.other, gpu.stream);
    launch(fill_kernel, {1, kCount}, gpu, x.get(), 1.0f);
    std::swap(s.other, gpu.stream);
    if (order == Order::WaitedTooEarly) CUDA_CHECK(cudaEventRecord(s.event, s.other));
    if (order == Order::RecordedTooEarly) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, s.event));
    launch(add_kernel, {1, kCount}, gpu, y.get(), x.get(), 1.0f);
    expect("x + 1", fetch(y.get(), kCount, gpu), [](size_t) { return 2; });
}

void default_stream(Gpu& gpu) {  // a non-blocking stream does not wait for the default stream's work
    DeviceBuffer<float> x(kCount), y(kCount);
    CUDA_CHECK(cudaMemset(x.get(), 0, kCount * sizeof(float)));
    launch(add_kernel, {1, kCount}, gpu, y.get(), x.get(), 1.0f);
    expect("x + 1", fetch(y.get(), kCount, gpu), [](size_t) { return 1; });
}

void graph_input_changed(Gpu& gpu) {
    DeviceBuffer<float> x(kCount), y(kCount);
    PinnedBuffer<float> in(kCount);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    copy_to_device(x.get(), in.get(), kCount, gpu);
    launch(add_kernel, {1, kCount}, gpu, y.get(), x.get(), 1.0f);
    CUDA_CHECK(cudaStreamEndCapture(gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph));
    for (size_t i = 0; i < kCount; i++) in.get()[i] = 1;
    CUDA_CHECK(cudaGraphLaunch(exec, gpu.stream));
    for (size_t i = 0; i < kCount; i++)
        in.get()[i] = 7;  // the next input, before the graph has read this one
    expect("graph's output", fetch(y.get(), kCount, gpu), [](size_t) { return 2; });
}

void graph_missing_edge(Gpu& gpu) {  // the fork's kernel is joined, but what follows it does not wait for it
    TwoStreams s;
    cudaEvent_t joined;
    CUDA_CHECK(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
    DeviceBuffer<float> x(kCount), y(kCount);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    CUDA_CHECK(cudaEventRecord(s.event, gpu.stream));
    CUDA_CHECK(cudaStreamWaitEvent(s.other, s.event));
    std::swap(s.other, gpu.stream);
    launch(fill_kernel, {1, kCount}, gpu, x.get(), 1.0f);
    std::swap(s.other, gpu.stream);
    launch(add_kernel, {1, kCount}, gpu, y.get(), x.get(), 1.0f);  // belongs after the wait
    CUDA_CHECK(cudaEventRecord(joined, s.other));
    CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, joined));
    CUDA_CHECK(cudaStreamEndCapture(gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph));
    CUDA_CHECK(cudaGraphLaunch(exec, gpu.stream));
    expect("x + 1", fetch(y.get(), kCount, gpu), [](size_t) { return 2; });
}

void synchronize_in_capture(Gpu& gpu) {
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    CUDA_CHECK(cudaStreamSynchronize(gpu.stream));  // BUG synchronize_in_capture
}

void malloc_in_capture(Gpu& gpu) {
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    void* p;
    CUDA_CHECK(cudaMalloc(&p, 16));  // BUG malloc_in_capture
}

void unjoined_capture(Gpu& gpu) {
    TwoStreams s;
    DeviceBuffer<float> x(kCount);
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    CUDA_CHECK(cudaEventRecord(s.event, gpu.stream));
    CUDA_CHECK(cudaStreamWaitEvent(s.other, s.event));
    CUDA_CHECK(cudaMemsetAsync(x.get(), 0, 16, s.other));
    CUDA_CHECK(cudaStreamEndCapture(gpu.stream, &graph));  // BUG unjoined_capture
}

// The order of blocks decides where each value goes.
__global__ void ticket_kernel(float* out, unsigned* ticket) {
    out[atomicAdd(ticket, 1u)] = static_cast<float>(blockIdx.x);
}

void block_order(Gpu& gpu) {
    DeviceBuffer<float> out(64);
    DeviceBuffer<unsigned> ticket(1);
    fill_zero(ticket.get(), 1, gpu);
    launch(ticket_kernel, {64, 1}, gpu, out.get(), ticket.get());
    expect("block's place", fetch(out.get(), 64, gpu), [](size_t i) { return i; });
}

// The sum of floats depends on the order of threads.
__global__ void float_atomics_kernel(float* out) { atomicAdd(out, threadIdx.x == 0 ? 16777216.0f : 1.0f); }

void thread_order(Gpu& gpu) {
    DeviceBuffer<float> out(1);
    fill_zero(out.get(), 1, gpu);
    launch(float_atomics_kernel, {1, 256}, gpu, out.get());
    expect("sum in the order of threads", fetch(out.get(), 1, gpu), [](size_t) { return 16777216; });
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"no_wait", "normal", "", "sum of two tiles: element 0 is -?nan", copy<-1>},
        {"wait_too_weak", "normal", "", "sum of two tiles: element 0 is -?nan", copy<1>},
        {"product_fence", "normal", "", "product_kernel.*without a wgmma_fence.*@product_fence",
         product<Product::NoFence>},
        {"product_commit", "normal", "", "product: element 0 is -?nan", product<Product::NoCommit>},
        {"product_wait", "normal", "", "product: element 0 is -?nan", product<Product::NoWait>},
        {"product_tile_reused", "normal", "", "product: element 0 is 0, not 16",
         product<Product::TileReused>},
        {"early_product", "normal", "", "early_product_kernel.*before its operand is there.*@early_product",
         early_product},
        {"no_synchronize", "normal", "SIM_LATE=1", "copied to the host: element 0 is .*nothing has written",
         no_synchronize},
        {"pinned_reused", "normal", "SIM_LATE=1", "first buffer: element 0 is 2, not 1", pinned_reused},
        {"no_event", "normal", "SIM_LATE=1", "x \\+ 1: element 0 is -?nan", two_streams<Order::NoEvent>},
        {"recorded_too_early", "normal", "SIM_LATE=1", "x \\+ 1: element 0 is -?nan",
         two_streams<Order::RecordedTooEarly>},
        {"waited_too_early", "normal", "SIM_LATE=1", "x \\+ 1: element 0 is -?nan",
         two_streams<Order::WaitedTooEarly>},
        {"default_stream", "normal", "SIM_LATE=1", "x \\+ 1: element 0 is -?nan", default_stream},
        {"graph_input_changed", "normal", "SIM_LATE=1", "graph's output: element 0 is 8, not 2",
         graph_input_changed},
        {"graph_missing_edge", "normal", "SIM_LATE=1", "x \\+ 1: element 0 is -?nan", graph_missing_edge},
        {"synchronize_in_capture", "normal", "",
         "@synchronize_in_capture: .*cudaErrorStreamCaptureUnsupported", synchronize_in_capture},
        {"malloc_in_capture", "normal", "", "@malloc_in_capture: .*cudaErrorStreamCaptureUnsupported",
         malloc_in_capture},
        {"unjoined_capture", "normal", "", "@unjoined_capture: .*cudaErrorStreamCaptureUnjoined",
         unjoined_capture},
        {"block_order", "normal", "SIM_SHUFFLE=1", "block's place: element", block_order},
        {"thread_order", "normal", "SIM_SHUFFLE=1", "sum in the order of threads: element 0", thread_order},
    };
    return run_cases(cases, argc, argv);
}
