// Planted bugs: races on shared and device memory.
#include "planted.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

struct FloatsShared {
    float x[128];
};

__global__ void no_barrier_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    s.x[threadIdx.x] = 0;
    __syncthreads();
    s.x[threadIdx.x] = 1;
    out[threadIdx.x] = s.x[(threadIdx.x + 1) % blockDim.x];  // BUG no_barrier
}

__global__ void no_syncwarp_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    s.x[threadIdx.x] = 0;
    __syncthreads();
    s.x[threadIdx.x] = 1;
    out[threadIdx.x] = s.x[threadIdx.x ^ 1];  // BUG no_syncwarp
}

// A shuffle makes lanes meet, but orders no memory.
__global__ void shuffle_is_no_barrier_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    s.x[threadIdx.x] = 1;
    const float y = __shfl_xor_sync(kFull, 1.0f, 1);
    out[threadIdx.x] = y + s.x[threadIdx.x ^ 1];  // BUG shuffle_is_no_barrier
}

// __syncwarp where the other warp's values are read.
__global__ void syncwarp_too_weak_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    s.x[threadIdx.x] = 0;
    __syncthreads();
    s.x[threadIdx.x] = 1;
    __syncwarp();
    out[threadIdx.x] = s.x[threadIdx.x ^ 32];  // BUG syncwarp_too_weak
}

// The buffer is filled again while others still read it.
__global__ void buffer_reuse_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        s.x[threadIdx.x] = static_cast<float>(i);  // BUG buffer_reuse
        __syncthreads();
        sum += s.x[blockDim.x - 1 - threadIdx.x];
    }
    out[threadIdx.x] = sum;
}

__global__ void same_element_kernel(float* out) {
    if (threadIdx.x % 64 == 3) out[0] = static_cast<float>(threadIdx.x);  // BUG same_element
}

__global__ void two_blocks_kernel(float* out) {
    if (threadIdx.x == 0) out[0] += 1;  // BUG two_blocks
}

// Neighbouring blocks overlap by one element.
__global__ void overlapping_tiles_kernel(float* out) {
    const unsigned i = blockIdx.x * (blockDim.x - 1) + threadIdx.x;
    out[i] = static_cast<float>(i);  // BUG overlapping_tiles
}

__global__ void atomic_and_plain_kernel(float* out) {
    if (blockIdx.x == 0) atomicAdd(out, 1.0f);
    else if (threadIdx.x == 0) out[0] = 0;  // BUG atomic_and_plain
}

// "The last block adds up", but without a fence before the ticket.
__global__ void no_fence_kernel(float* out, float* partial, unsigned* ticket) {
    if (threadIdx.x != 0) return;
    partial[blockIdx.x] = 1;
    if (atomicAdd(ticket, 1u) != gridDim.x - 1) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += partial[i];  // BUG no_fence
    out[0] = sum;
}

// bar.sync of two warps orders nothing for the third.
__global__ void third_warp_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    s.x[threadIdx.x] = 1;
    if (threadIdx.x < 64) ptx::barrier_sync(1, 64);
    out[threadIdx.x] = s.x[threadIdx.x < 64 ? threadIdx.x ^ 32 : threadIdx.x - 64];  // BUG third_warp
}

struct TileShared {
    alignas(16) uint16_t tile[32][8];
};

__global__ void ldmatrix_no_barrier_kernel(uint32_t* out) {
    TileShared& s = shared<TileShared>();
    for (int i = 0; i < 8; i++) s.tile[i * 4 + threadIdx.x / 8][threadIdx.x % 8] = 1;
    uint32_t r[4];
    ptx::ldmatrix_x4(r, s.tile[threadIdx.x]);  // BUG ldmatrix_no_barrier
    out[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}

struct CopyShared {
    alignas(16) float tile[2][128];
};

// Another thread's copies are there after its wait and a barrier; the barrier is missing.
__global__ void async_no_barrier_kernel(float* out, const float* in) {
    CopyShared& s = shared<CopyShared>();
    ptx::cp_async_16(&s.tile[0][4 * threadIdx.x], in + 4 * threadIdx.x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    out[threadIdx.x] = s.tile[0][threadIdx.x];  // BUG async_no_barrier
}

// One wait too few: the second tile is still under way.
__global__ void async_under_way_kernel(float* out, const float* in) {
    CopyShared& s = shared<CopyShared>();
    for (int i = 0; i < 2; i++) {
        ptx::cp_async_16(&s.tile[i][4 * threadIdx.x], in + 4 * threadIdx.x);
        ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = s.tile[1][threadIdx.x];  // BUG async_under_way
}

__global__ void fresh_device_kernel(float* out, const float* in) {
    out[threadIdx.x] = in[threadIdx.x] + 1;  // BUG fresh_device
}

__global__ void fresh_shared_kernel(float* out) {
    FloatsShared& s = shared<FloatsShared>();
    if (threadIdx.x < 31) s.x[threadIdx.x] = 1;
    __syncwarp();
    out[threadIdx.x] = s.x[threadIdx.x];  // BUG fresh_shared
}

template <void (*kernel)(float*), unsigned blocks, unsigned threads, class Shared = FloatsShared>
void run(Gpu& gpu) {
    DeviceBuffer<float> out(1024);
    fill_zero(out.get(), out.size(), gpu);
    launch<Shared>(kernel, {blocks, threads}, gpu, out.get());
    gpu.synchronize();
}

void run_no_fence(Gpu& gpu) {
    DeviceBuffer<float> out(1), partial(4);
    DeviceBuffer<unsigned> ticket(1);
    fill_zero(ticket.get(), 1, gpu);
    launch(no_fence_kernel, {4, 32}, gpu, out.get(), partial.get(), ticket.get());
    gpu.synchronize();
}

void run_ldmatrix(Gpu& gpu) {
    DeviceBuffer<uint32_t> out(32);
    launch<TileShared>(ldmatrix_no_barrier_kernel, {1, 32}, gpu, out.get());
    gpu.synchronize();
}

template <void (*kernel)(float*, const float*), bool fresh = false, class Shared = CopyShared,
          unsigned threads = 32>
void run_copy(Gpu& gpu) {
    DeviceBuffer<float> out(128), in(128);
    if (!fresh) fill_zero(in.get(), 128, gpu);
    launch<Shared>(kernel, {1, threads}, gpu, out.get(), in.get());
    gpu.synchronize();
}

void host_read(Gpu&) {
    DeviceBuffer<float> out(4);
    const volatile float* p = out.get();
    printf("%g\n", p[1]);  // BUG host_read
}

struct SwizzledShared {
    alignas(1024) unsigned char bytes[64 * 128];
};

// Tensor cores read a tile that ordinary stores have written, through another proxy.
__global__ void no_proxy_fence_kernel(float* out) {
    SwizzledShared& s = shared<SwizzledShared>();
    for (unsigned i = threadIdx.x; i < sizeof(s.bytes) / 2; i += blockDim.x)
        reinterpret_cast<uint16_t*>(s.bytes)[i] = 0x3f80;  // BUG stored
    __syncthreads();
    const uint32_t a[4] = {};
    float d[8][4];
    ptx::wgmma_fence();
    ptx::wgmma_transposed<false>(d, a, s.bytes, 0);  // BUG no_proxy_fence
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    out[threadIdx.x] = d[0][0];
}

struct CopyTarget {
    alignas(16) float x[128];
    ptx::Mbarrier full;
};

// A bulk copy over what ordinary stores have written.
__global__ void no_fence_before_copy_kernel(float* out, const float* in) {
    CopyTarget& s = shared<CopyTarget>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s.full, 1);
        ptx::fence_async_proxy();
    }
    s.x[threadIdx.x] = 1;  // BUG stored_before
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&s.full, sizeof(s.x));
        ptx::bulk_load(s.x, in, sizeof(s.x), &s.full);  // BUG copied_over
    }
    ptx::mbarrier_wait(&s.full, 0);
    out[threadIdx.x] = s.x[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"no_barrier", "race", "",
         "race in kernel .*no_barrier_kernel on byte \\d+ of the block's 512 of shared memory: .* reads at "
         ".*@no_barrier",
         run<no_barrier_kernel, 1, 64>},
        {"no_syncwarp", "race", "", "race in kernel .*no_syncwarp_kernel on .*shared memory.*@no_syncwarp",
         run<no_syncwarp_kernel, 1, 32>},
        {"shuffle_is_no_barrier", "race", "", "race in kernel .*shared memory.*@shuffle_is_no_barrier",
         run<shuffle_is_no_barrier_kernel, 1, 32>},
        {"syncwarp_too_weak", "race", "", "race in kernel .*shared memory.*@syncwarp_too_weak",
         run<syncwarp_too_weak_kernel, 1, 64>},
        {"buffer_reuse", "race", "", "race in kernel .*shared memory.*@buffer_reuse",
         run<buffer_reuse_kernel, 1, 64>},
        {"same_element", "race", "",
         "race in kernel .* on byte 0 of device memory of 4096 bytes, allocated at .*: thread \\(3, 0, 0\\) "
         "of block \\(0, 0, 0\\) writes at "
         ".*@same_element, and thread \\(67, 0, 0\\) of block \\(0, 0, 0\\) writes at .*@same_element",
         run<same_element_kernel, 1, 128>},
        {"two_blocks", "race", "",
         "race in kernel .* on byte 0 of device memory.*thread \\(0, 0, 0\\) of block \\(0, 0, 0\\) "
         "writes.*thread \\(0, 0, 0\\) of block "
         "\\(1, 0, 0\\) reads at .*@two_blocks",
         run<two_blocks_kernel, 2, 32>},
        {"overlapping_tiles", "race", "", "race in kernel .*byte 124 of device memory.*@overlapping_tiles",
         run<overlapping_tiles_kernel, 3, 32>},
        {"atomic_and_plain", "race", "", "race in kernel .*writes atomically.*writes at .*@atomic_and_plain",
         run<atomic_and_plain_kernel, 2, 32>},
        {"no_fence", "race", "", "race in kernel .*device memory.*reads at .*@no_fence", run_no_fence},
        {"third_warp", "race", "", "race in kernel .*shared memory.*@third_warp",
         run<third_warp_kernel, 1, 96>},
        {"ldmatrix_no_barrier", "race", "", "race in kernel .*shared memory.*@ldmatrix_no_barrier",
         run_ldmatrix},
        {"async_no_barrier", "race", "",
         "(race in kernel|kernel) .*async_no_barrier_kernel.*reads at .*@async_no_barrier",
         run_copy<async_no_barrier_kernel>},
        {"async_under_way", "race", "",
         "kernel .*async_under_way_kernel: .*reads at .*@async_under_way.*a copy is still under way",
         run_copy<async_under_way_kernel>},
        {"no_proxy_fence", "race", "",
         "no_proxy_fence_kernel.*writes at .*@stored, and a warpgroup product.*@no_proxy_fence, without a "
         "fence_async_proxy",
         run<no_proxy_fence_kernel, 1, 128, SwizzledShared>},
        {"no_fence_before_copy", "race", "",
         "no_fence_before_copy_kernel.*writes at .*@stored_before, and a bulk copy.*@copied_over, without a "
         "fence_async_proxy",
         run_copy<no_fence_before_copy_kernel, false, CopyTarget, 128>},
        {"fresh_device", "race", "",
         "kernel .*fresh_device_kernel.*thread \\(0, 0, 0\\): reads memory that nothing has written yet, at "
         ".*@fresh_device: byte 0 of device memory",
         run_copy<fresh_device_kernel, true>},
        {"fresh_shared", "race", "",
         "thread \\(31, 0, 0\\): reads memory that nothing has written yet, at .*@fresh_shared.*shared "
         "memory",
         run<fresh_shared_kernel, 1, 32>},
        {"host_read", "race", "", "host code reads device memory at .*@host_read", host_read},
    };
    return run_cases(cases, argc, argv);
}
