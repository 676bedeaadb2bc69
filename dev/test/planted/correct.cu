// Correct kernels and programs that look wrong: no check may accuse them, in any order and however late.
#include "planted.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

struct FloatsShared {
    alignas(16) float x[2][256];
};

// The last block to take a ticket adds up what all have written: fence, then atomic.
__global__ void last_block_adds_kernel(float* out, float* partial, unsigned* ticket) {
    FloatsShared& s = shared<FloatsShared>();
    partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.x[0][0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (s.x[0][0] == 0) return;
    for (unsigned i = 0; i < gridDim.x; i++) out[threadIdx.x] += partial[i * blockDim.x + threadIdx.x];
}

// Two tiles in turn; a thread waits for the older copy only, and a barrier before a tile is filled again.
__global__ void double_buffer_kernel(float* out, const float* in, int tiles) {
    FloatsShared& s = shared<FloatsShared>();
    const unsigned i = threadIdx.x;
    float sum = 0;
    ptx::cp_async_16(&s.x[0][4 * i], in + 4 * i);
    ptx::cp_async_commit();
    for (int t = 0; t < tiles; t++) {
        if (t + 1 < tiles) ptx::cp_async_16(&s.x[(t + 1) % 2][4 * i], in + (t + 1) * 256 + 4 * i);
        ptx::cp_async_commit();  // empty the last time round: the count of groups stays right
        ptx::cp_async_wait<1>();
        __syncthreads();
        for (unsigned k = 0; k < 4; k++) sum += s.x[t % 2][(4 * i + 64 * k + k) % 256];
        __syncthreads();
    }
    out[i] = sum;
}

// Rows past the end are zeros, and their source is not read.
__global__ void zero_fill_kernel(float* out, const float* in, int n) {
    FloatsShared& s = shared<FloatsShared>();
    const int i = 4 * static_cast<int>(threadIdx.x);
    ptx::cp_async_16_zfill(&s.x[0][i], in + i, i < n);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = s.x[0][4 * (blockDim.x - 1 - threadIdx.x)];
}

struct RingShared {
    alignas(128) float tile[2][256];
    ptx::Mbarrier full[2], empty[2];
};

// A warp that only loads, by bulk copies into two stages, and two that read at their own pace: one skips
// every other tile, but gives it back all the same.
__global__ void ring_kernel(float* out, const float* in, int tiles) {
    RingShared& s = shared<RingShared>();
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], 2);
        ptx::fence_async_proxy();
    }
    __syncthreads();
    if (warp == 2) {
        for (int t = 0; t < tiles && lane == 0; t++) {
            if (t >= 2) ptx::mbarrier_wait(&s.empty[t % 2], (t / 2 - 1) % 2);
            ptx::mbarrier_arrive_expect(&s.full[t % 2], 1024);
            ptx::bulk_load(s.tile[t % 2], in + t * 256, 512, &s.full[t % 2]);
            ptx::bulk_load(s.tile[t % 2] + 128, in + t * 256 + 128, 512, &s.full[t % 2]);
        }
        return;
    }
    float sum = 0;
    for (int t = 0; t < tiles; t++) {
        ptx::mbarrier_wait(&s.full[t % 2], t / 2 % 2);
        if (warp == 0 || t % 2 == 0)
            for (unsigned k = 0; k < 4; k++) sum += s.tile[t % 2][(8 * lane + 64 * k + k) % 256];
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.empty[t % 2]);
    }
    out[threadIdx.x] = sum;
}

// Producer warps and consumer warps meet at barriers of their own; nobody returns before the last one.
__global__ void specialised_warps_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    const unsigned group = threadIdx.x / 64, i = threadIdx.x % 64;
    for (int round = 0; round < 3; round++) {
        s.x[group][i] = static_cast<float>(round);
        ptx::barrier_sync(1 + static_cast<int>(group), 64);
        const float x = s.x[group][63 - i];
        ptx::barrier_sync(1 + static_cast<int>(group), 64);
        if (group == 1) __syncwarp();  // divergent between warps, not within one
        s.x[group][i + 64] = x;
    }
    out[threadIdx.x] = s.x[group][i + 64];
}

// Lanes that have returned need not come to __syncwarp.
__global__ void returned_lanes_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    if (threadIdx.x % 32 >= 20) return;
    s.x[0][threadIdx.x] = 1;
    __syncwarp();
    out[threadIdx.x] = s.x[0][threadIdx.x / 32 * 32 + 19 - threadIdx.x % 32];
}

// Half warps shuffle apart, each under its own mask.
__global__ void half_warps_kernel(float* out) {
    const unsigned lane = threadIdx.x % 32;
    float x = 1;
    if (lane < 16) {
        for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0x0000ffffu, x, offset);
    } else {
        for (int offset = 8; offset > 0; offset /= 2) x += __shfl_down_sync(0xffff0000u, x, offset, 16);
    }
    out[threadIdx.x] = lane <= 16 ? x : 16;
}

// Neighbours write the two halves of one 32-bit word.
__global__ void neighbouring_halves_kernel(__nv_bfloat16* out) {
    out[threadIdx.x] = static_cast<__nv_bfloat16>(1.0f);
}

// All blocks count in integers, in any order.
__global__ void count_kernel(int* out) { atomicAdd(&out[threadIdx.x % 2], 1); }

// Whole blocks and whole warps return early; the others still meet in their own warp.
__global__ void early_warps_kernel(float* out, unsigned rows) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= rows) return;
    float x = 1;
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFull, x, offset);
    if (threadIdx.x % 32 == 0) out[row] = x;
}

// A barrier in a branch that the whole block takes alike, and in a loop of the same length for all.
__global__ void uniform_branch_kernel(float* out, int rounds) {
    FloatsShared& s = shared<FloatsShared>();
    float x = 0;
    if (blockIdx.x % 2 == 0) {
        for (int i = 0; i < rounds; i++) {
            s.x[0][threadIdx.x] = static_cast<float>(i);
            __syncthreads();
            x += s.x[0][blockDim.x - 1 - threadIdx.x];
            __syncthreads();
        }
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

// 33 threads, three dimensions, no warp word: a warp of one lane is nothing special.
__global__ void odd_block_kernel(float* out) {
    const unsigned i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    FloatsShared& s = shared<FloatsShared>();
    s.x[0][i] = static_cast<float>(i);
    __syncthreads();
    out[i] = s.x[0][32 - i];
}

// A warp's values in shared memory, read by its own lanes only: __syncwarp is enough, also between rounds.
__global__ void warp_private_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    float x = static_cast<float>(threadIdx.x % 32);
    for (int offset = 16; offset > 0; offset /= 2) {
        s.x[0][threadIdx.x] = x;
        __syncwarp();
        x += s.x[0][threadIdx.x ^ offset];
        __syncwarp();
    }
    out[threadIdx.x] = x;
}

__global__ void add_kernel(float* out, const float* in, float value) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = in[i] + value;  // out may be in
}

__global__ void mirror_kernel(float* out, const float* in) {
    out[threadIdx.x] = in[blockDim.x - 1 - threadIdx.x];
}

void last_block_adds(Gpu& gpu) {
    DeviceBuffer<float> out(64), partial(8 * 64);
    DeviceBuffer<unsigned> ticket(1);
    fill_zero(out.get(), 64, gpu);
    fill_zero(ticket.get(), 1, gpu);
    launch<FloatsShared>(last_block_adds_kernel, {8, 64}, gpu, out.get(), partial.get(), ticket.get());
    expect("sum", fetch(out.get(), 64, gpu), [](size_t) { return 8; });
}

void ring(Gpu& gpu) {
    constexpr int kTiles = 7;
    DeviceBuffer<float> in(kTiles * 256), out(64);
    std::vector<float> x(in.size());
    for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i / 256 + 1);
    copy_to_device(in.get(), x.data(), x.size(), gpu);
    launch<RingShared>(ring_kernel, {1, 96}, gpu, out.get(), in.get(), kTiles);
    expect("sums of a ring", fetch(out.get(), 64, gpu), [](size_t i) { return i < 32 ? 4 * 28 : 4 * 16; });
}

void double_buffer(Gpu& gpu) {
    DeviceBuffer<float> out(64), in(5 * 256);
    const std::vector<float> ones(in.size(), 1);
    copy_to_device(in.get(), ones.data(), ones.size(), gpu);
    launch<FloatsShared>(double_buffer_kernel, {1, 64}, gpu, out.get(), in.get(), 5);
    expect("sum", fetch(out.get(), 64, gpu), [](size_t) { return 20; });
}

void zero_fill(Gpu& gpu) {
    DeviceBuffer<float> out(64), in(100);
    const std::vector<float> ones(in.size(), 1);
    copy_to_device(in.get(), ones.data(), ones.size(), gpu);
    launch<FloatsShared>(zero_fill_kernel, {1, 64}, gpu, out.get(), in.get(), 100);
    expect("tile", fetch(out.get(), 64, gpu), [](size_t i) { return 63 - i < 25 ? 1 : 0; });
}

void specialised_warps(Gpu& gpu) {
    DeviceBuffer<float> out(128);
    launch<FloatsShared>(specialised_warps_kernel, {1, 128}, gpu, out.get());
    expect("last round", fetch(out.get(), 128, gpu), [](size_t) { return 2; });
}

void returned_lanes(Gpu& gpu) {
    DeviceBuffer<float> out(64);
    fill_zero(out.get(), 64, gpu);
    launch<FloatsShared>(returned_lanes_kernel, {1, 64}, gpu, out.get());
    expect("value", fetch(out.get(), 64, gpu), [](size_t i) { return i % 32 < 20; });
}

void half_warps(Gpu& gpu) {
    DeviceBuffer<float> out(64);
    launch(half_warps_kernel, {1, 64}, gpu, out.get());
    expect("sum of 16", fetch(out.get(), 64, gpu), [](size_t) { return 16; });
}

void neighbouring_halves(Gpu& gpu) {
    DeviceBuffer<__nv_bfloat16> out(255);
    launch(neighbouring_halves_kernel, {1, 255}, gpu, out.get());
    gpu.synchronize();
}

void count(Gpu& gpu) {
    DeviceBuffer<int> out(2);
    fill_zero(out.get(), 2, gpu);
    launch(count_kernel, {100, 64}, gpu, out.get());
    std::vector<int> host = fetch(out.get(), 2, gpu);
    if (host[0] != 3200 || host[1] != 3200) fatal("counted %d and %d, not 3200", host[0], host[1]);
}

void early_warps(Gpu& gpu) {
    DeviceBuffer<float> out(5);
    launch(early_warps_kernel, {3, 128}, gpu, out.get(), 5u);
    expect("sum of a warp", fetch(out.get(), 5, gpu), [](size_t) { return 32; });
}

void uniform_branch(Gpu& gpu) {
    DeviceBuffer<float> out(4 * 96);
    launch<FloatsShared>(uniform_branch_kernel, {4, 96}, gpu, out.get(), 4);
    expect("sum of rounds", fetch(out.get(), out.size(), gpu),
           [](size_t i) { return i / 96 % 2 == 0 ? 6 : 0; });
}

void odd_block(Gpu& gpu) {
    DeviceBuffer<float> out(33);
    launch<FloatsShared>(odd_block_kernel, {dim3(1), dim3(3, 1, 11)}, gpu, out.get());
    expect("mirrored", fetch(out.get(), 33, gpu), [](size_t i) { return 32 - i; });
}

void warp_private(Gpu& gpu) {
    DeviceBuffer<float> out(256);
    launch<FloatsShared>(warp_private_kernel, {1, 256}, gpu, out.get());
    expect("sum of a warp", fetch(out.get(), 256, gpu), [](size_t) { return 496; });
}

void in_place(Gpu& gpu) {
    DeviceBuffer<float> x(4 * 64);
    fill_zero(x.get(), x.size(), gpu);
    for (int i = 0; i < 3; i++) launch(add_kernel, {4, 64}, gpu, x.get(), x.get(), 1.0f);
    expect("x + 3", fetch(x.get(), x.size(), gpu), [](size_t) { return 3; });
}

// A pinned buffer is filled again after the event that follows its copy.
void pinned_ring(Gpu& gpu) {
    PinnedBuffer<float> staging(2 * 64);
    DeviceBuffer<float> x(8 * 64);
    cudaEvent_t copied[2];
    for (cudaEvent_t& event : copied) CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    for (size_t i = 0; i < 8; i++) {
        CUDA_CHECK(cudaEventSynchronize(copied[i % 2]));
        float* slot = staging.get() + 64 * (i % 2);
        for (size_t k = 0; k < 64; k++) slot[k] = static_cast<float>(i);
        copy_to_device(x.get() + 64 * i, slot, 64, gpu);
        CUDA_CHECK(cudaEventRecord(copied[i % 2], gpu.stream));
    }
    expect("ring", fetch(x.get(), x.size(), gpu), [](size_t i) { return i / 64; });
    for (cudaEvent_t event : copied) CUDA_CHECK(cudaEventDestroy(event));
}

// Pageable memory may be changed as soon as the call returns, and is filled when it does.
void pageable(Gpu& gpu) {
    DeviceBuffer<float> x(64), y(64);
    std::vector<float> host(64, 1.0f), back(64);
    copy_to_device(x.get(), host.data(), 64, gpu);
    for (float& h : host) h = 7;
    launch(add_kernel, {1, 64}, gpu, y.get(), x.get(), 1.0f);
    copy_to_host(back.data(), y.get(), 64, gpu);
    expect("x + 1", back, [](size_t) { return 2; });
}

// Fork and join with events, directly and as a graph that is launched three times.
void fork_and_join(Gpu& gpu) {
    cudaStream_t other;
    cudaEvent_t fork, join;
    CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    DeviceBuffer<float> x(64), y(64), z(64);
    fill_zero(x.get(), 64, gpu);
    fill_zero(z.get(), 64, gpu);
    auto step = [&] {  // y = x + 1 here, x += 2 there after y's, z = y + z at the end
        launch(add_kernel, {1, 64}, gpu, y.get(), x.get(), 1.0f);
        CUDA_CHECK(cudaEventRecord(fork, gpu.stream));
        CUDA_CHECK(cudaStreamWaitEvent(other, fork));
        std::swap(other, gpu.stream);
        launch(add_kernel, {1, 64}, gpu, x.get(), x.get(), 2.0f);
        CUDA_CHECK(cudaEventRecord(join, gpu.stream));
        std::swap(other, gpu.stream);
        launch(add_kernel, {1, 64}, gpu, z.get(), y.get(), 0.0f);
        CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, join));
    };
    step();
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    step();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamEndCapture(gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph));
    CUDA_CHECK(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) CUDA_CHECK(cudaGraphLaunch(exec, gpu.stream));
    expect("z", fetch(z.get(), 64, gpu), [](size_t) { return 7; });
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaEventDestroy(fork));
    CUDA_CHECK(cudaEventDestroy(join));
    CUDA_CHECK(cudaStreamDestroy(other));
}

// The kernels of a graph are other launches each time it runs.
void replay(Gpu& gpu) {
    DeviceBuffer<float> x(64), y(64);
    std::vector<float> host(64);
    for (size_t i = 0; i < 64; i++) host[i] = static_cast<float>(i);
    copy_to_device(x.get(), host.data(), 64, gpu);
    CUDA_CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeGlobal));
    launch(mirror_kernel, {1, 64}, gpu, y.get(), x.get());
    launch(add_kernel, {1, 64}, gpu, x.get(), y.get(), 1.0f);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamEndCapture(gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph));
    CUDA_CHECK(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) CUDA_CHECK(cudaGraphLaunch(exec, gpu.stream));
    expect("x", fetch(x.get(), 64, gpu), [](size_t i) { return 63 - i + 3; });
    CUDA_CHECK(cudaGraphExecDestroy(exec));
}

// Blocking streams wait for the default stream, and it for them.
void default_stream(Gpu& gpu) {
    cudaStream_t blocking;
    CUDA_CHECK(cudaStreamCreate(&blocking));
    DeviceBuffer<float> x(64), y(64);
    CUDA_CHECK(cudaMemset(x.get(), 0, 64 * sizeof(float)));
    std::swap(blocking, gpu.stream);
    launch(add_kernel, {1, 64}, gpu, y.get(), x.get(), 1.0f);
    std::swap(blocking, gpu.stream);
    std::vector<float> host(64);
    CUDA_CHECK(cudaMemcpy(host.data(), y.get(), 64 * sizeof(float), cudaMemcpyDeviceToHost));
    expect("x + 1", host, [](size_t) { return 1; });
    CUDA_CHECK(cudaStreamDestroy(blocking));
}

// A refused allocation is an answer, not the end.
void refused(Gpu&) {
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    void* p = nullptr;
    if (cudaMalloc(&p, free_bytes + 1) != cudaErrorMemoryAllocation || p)
        fatal("more than the device's memory was given");
    if (cudaGetLastError() != cudaErrorMemoryAllocation || cudaGetLastError() != cudaSuccess)
        fatal("not the last error");
    CUDA_CHECK(cudaMalloc(&p, free_bytes / 2));
    CUDA_CHECK(cudaFree(p));
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<Case> cases;
    auto add = [&](const char* name, void (*run)(Gpu&)) { cases.push_back({name, "normal", "", "", run}); };
    add("last_block_adds", last_block_adds);
    add("double_buffer", double_buffer);
    add("ring", ring);
    add("zero_fill", zero_fill);
    add("specialised_warps", specialised_warps);
    add("returned_lanes", returned_lanes);
    add("half_warps", half_warps);
    add("neighbouring_halves", neighbouring_halves);
    add("count", count);
    add("early_warps", early_warps);
    add("uniform_branch", uniform_branch);
    add("odd_block", odd_block);
    add("warp_private", warp_private);
    add("in_place", in_place);
    add("pinned_ring", pinned_ring);
    add("pageable", pageable);
    add("fork_and_join", fork_and_join);
    add("replay", replay);
    add("default_stream", default_stream);
    add("refused", refused);
    return run_cases(cases, argc, argv);
}
