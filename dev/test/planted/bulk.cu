// Planted bugs: barriers in shared memory (mbarrier) and the bulk copies that count at them.
#include "planted.h"

namespace {

constexpr int kFloats = 256, kStages = 2, kThreads = 64;

struct RingShared {
    alignas(128) float tile[kStages][kFloats];
    ptx::Mbarrier full[kStages], empty[kStages];
};

enum class Bug {
    None,
    NoWait,            // nobody waits for a tile
    WarpWithoutWait,   // one warp relies on the other's wait
    ParityStays,       // the stage's second tile is waited for as its first
    PhaseSkipped,      // a warp doesn't wait for the first tiles
    LaterSkipped,      // or for a later one
    NoEmpty,           // a stage is filled again without waiting for its readers
    EarlyRelease,      // a stage is given back before it is read
    NoSyncwarp,        // one lane gives it back while others still read
    NoFence,           // copies may not see the barriers' initialisation
    NoSyncthreads,     // nor other threads
    NotInitialised,    // a barrier is used that nobody has initialised,
    TwiceInitialised,  // or that was initialised before
    Overwritten,       // a barrier's own bytes
    TooFewBytes,       // fewer are announced than come,
    TooManyBytes,      // or more,
    HugeBytes,         // or more than a barrier can count
    TooFewArrivals,    // than the barrier counts,
    TooManyArrivals,   // or more
    NotWaitedFor,      // a tile is loaded that nobody reads
};

// A ring of two stages: thread 0 loads, both warps add up what all threads of the block have loaded.
template <Bug bug, int kTiles>
__global__ void ring_kernel(float* out, const float* in) {
    RingShared& s = shared<RingShared>();
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            if (bug != Bug::NotInitialised) ptx::mbarrier_init(&s.full[i], 1);    // BUG init
            if (bug == Bug::TwiceInitialised) ptx::mbarrier_init(&s.full[i], 1);  // BUG twice
            ptx::mbarrier_init(&s.empty[i], bug == Bug::TooFewArrivals ? 3 : 2);
        }
        if (bug != Bug::NoFence) ptx::fence_async_proxy();
    }
    if (bug != Bug::NoSyncthreads) __syncthreads();
    if (bug == Bug::Overwritten && threadIdx.x == 0) s.full[1] = 0;
    const int loaded = bug == Bug::NotWaitedFor ? kTiles + 1 : kTiles;
    const auto load = [&](int tile) {
        const int stage = tile % kStages;
        if (tile >= kStages && bug != Bug::NoEmpty)
            ptx::mbarrier_wait(&s.empty[stage], (tile / kStages - 1) % 2);  // BUG empty
        const unsigned bytes = bug == Bug::TooFewBytes    ? 1008
                               : bug == Bug::TooManyBytes ? 1040
                               : bug == Bug::HugeBytes    ? 1 << 20
                                                          : 1024;
        ptx::mbarrier_arrive_expect(&s.full[stage], bytes);                        // BUG arrive
        ptx::bulk_load(s.tile[stage], in + tile * kFloats, 1024, &s.full[stage]);  // BUG load
        if (bug == Bug::TooManyArrivals) ptx::mbarrier_arrive(&s.full[stage]);     // BUG too_many
    };
    const auto release = [&](int tile) {
        if (bug != Bug::NoSyncwarp) __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.empty[tile % kStages]);
    };
    float sum = 0;
    if (threadIdx.x == 0) load(0);
    for (int tile = 0; tile < kTiles; tile++) {
        if (threadIdx.x == 0 && tile + 1 < loaded) load(tile + 1);
        const int stage = tile % kStages;
        const bool waits = bug != Bug::NoWait && !(bug == Bug::WarpWithoutWait && warp == 1) &&
                           !(bug == Bug::PhaseSkipped && warp == 1 && tile < kStages) &&
                           !(bug == Bug::LaterSkipped && warp == 1 && tile == kStages);
        if (waits)
            ptx::mbarrier_wait(&s.full[stage], bug == Bug::ParityStays ? 0 : tile / kStages % 2);  // BUG wait
        if (bug == Bug::EarlyRelease) release(tile);
        for (int i = 0; i < 4; i++)
            sum += s.tile[stage][(threadIdx.x * 4 + 64 * i + i) % kFloats];  // BUG read
        if (bug != Bug::EarlyRelease) release(tile);
    }
    out[threadIdx.x] = sum;
}

__global__ void ones_kernel(float* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f; }

template <Bug bug, int kTiles = 5>
void ring(Gpu& gpu) {
    DeviceBuffer<float> in((kTiles + 1) * kFloats), out(kThreads);
    launch(ones_kernel, {kTiles + 1, kFloats}, gpu, in.get());
    launch<RingShared>(ring_kernel<bug, kTiles>, {1, kThreads}, gpu, out.get(), in.get());
    expect("sum of the tiles", fetch(out.get(), kThreads, gpu), [](size_t) { return 4 * kTiles; });
}

// ---- boxes ------------------------------------------------------------------------------------------------

struct BoxShared {
    alignas(1024) uint16_t tile[64][64];
    ptx::Mbarrier full;
};

// Loads the box at (0, row, 0) into a tile that begins at `offset` bytes.
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, int row, int offset) {
    BoxShared& s = shared<BoxShared>();
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive_expect(&s.full, sizeof(s.tile));
    unsigned char* to = reinterpret_cast<unsigned char*>(s.tile) + offset;
    ptx::bulk_load_box(to, map, 0, row, 0, &s.full);  // BUG box
    ptx::mbarrier_wait(&s.full, 0);
}

void box_without_map(Gpu& gpu) {
    launch<BoxShared>(box_kernel, {1, 1}, gpu, CUtensorMap{}, 0, 0);
    gpu.synchronize();
}

CUresult encode(CUtensorMap* map, const void* address, uint64_t row_bytes, uint32_t box_columns) {
    const cuuint64_t shape[] = {64, 100, 1}, strides[] = {row_bytes, 100 * row_bytes};
    const cuuint32_t box[] = {box_columns, 64, 1}, steps[] = {1, 1, 1};
    return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(address), shape,
                                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

void box_misaligned(Gpu& gpu) {
    DeviceBuffer<uint16_t> x(64 * 100);
    fill_zero(x.get(), x.size(), gpu);
    CUtensorMap map;
    if (encode(&map, x.get(), 128, 64) != CUDA_SUCCESS) fatal("no map");
    launch<BoxShared>(box_kernel, {1, 1}, gpu, map, 0, 64);
    gpu.synchronize();
}

// A map whose rows say that they are longer than the tensor's: the last ones lie beyond its memory.
void box_past_end(Gpu& gpu) {
    DeviceBuffer<uint16_t> x(64 * 100);
    fill_zero(x.get(), x.size(), gpu);
    CUtensorMap map;
    if (encode(&map, x.get(), 256, 64) != CUDA_SUCCESS) fatal("no map");
    launch<BoxShared>(box_kernel, {1, 1}, gpu, map, 0, 0);
    gpu.synchronize();
}

void maps_that_cuda_refuses(Gpu&) {
    alignas(16) static uint16_t x[128];
    CUtensorMap map;
    const bool refused[] = {encode(&map, x, 128, 64) == CUDA_SUCCESS,
                            encode(&map, x + 1, 128, 64) == CUDA_ERROR_INVALID_VALUE,
                            encode(&map, x, 120, 64) == CUDA_ERROR_INVALID_VALUE,
                            encode(&map, x, 128, 128) == CUDA_ERROR_INVALID_VALUE};
    for (const bool good : refused)
        if (!good) fatal("a map was taken or refused that should not be");
    fatal("all four as they should be");
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"no_wait", "normal", "", "all threads have returned while a bulk copy is under way",
         ring<Bug::NoWait, kStages>},
        {"warp_without_wait", "normal", "", "sum of the tiles: element 32 is -?nan",
         ring<Bug::WarpWithoutWait, kStages>},
        {"parity_stays", "normal", "",
         "ring_kernel.*(nobody has waited for them.*@arrive|mbarrier_wait for parity 0.*@wait)",
         ring<Bug::ParityStays>},
        {"phase_skipped", "normal", "", "ring_kernel.*mbarrier_wait for parity 1.*waited.*@wait",
         ring<Bug::PhaseSkipped>},
        {"later_skipped", "normal", "", "ring_kernel.*mbarrier_wait for parity.*waited.*@wait",
         ring<Bug::LaterSkipped, 7>},
        {"overwritten", "normal", "", "ring_kernel.*eight bytes were written.*@arrive",
         ring<Bug::Overwritten>},
        {"huge_bytes", "normal", "", "ring_kernel.*1048576 bytes for one phase.*@arrive",
         ring<Bug::HugeBytes>},
        {"no_empty", "normal", "", "sum of the tiles: element \\d+ is -?nan", ring<Bug::NoEmpty>},
        {"early_release", "race", "", "ring_kernel.*(@read.*@load|@load.*@read|under way)",
         ring<Bug::EarlyRelease>},
        {"no_syncwarp", "race", "", "race in kernel .*ring_kernel.*shared memory.*@read.*@load",
         ring<Bug::NoSyncwarp>},
        {"no_init_fence", "normal", "", "ring_kernel.*bulk_load.*without a fence_async_proxy.*@load",
         ring<Bug::NoFence>},
        {"no_syncthreads", "race", "", "race in kernel .*ring_kernel.*writes at .*@init.*reads at .*@wait",
         ring<Bug::NoSyncthreads>},
        {"not_initialised", "normal", "", "ring_kernel.*nobody has initialised the barrier at offset.*@wait",
         ring<Bug::NotInitialised>},
        {"twice_initialised", "normal", "", "ring_kernel.*was initialised before.*@twice",
         ring<Bug::TwiceInitialised>},
        {"too_few_bytes", "normal", "", "ring_kernel.*16 bytes more than.*announced.*@load",
         ring<Bug::TooFewBytes>},
        {"too_many_bytes", "normal", "",
         "the block is stuck: 64 threads wait at mbarrier_wait \\(@wait\\) for phase 0, which lacks 0 of 1 "
         "arrivals and 16 bytes",
         ring<Bug::TooManyBytes>},
        {"too_few_arrivals", "normal", "",
         "the block is stuck: .*mbarrier_wait \\(@empty\\) for phase 0, which lacks 1 of 3 arrivals",
         ring<Bug::TooFewArrivals>},
        {"too_many_arrivals", "normal", "", "ring_kernel.*all 1 arrivals of the barrier's phase.*@too_many",
         ring<Bug::TooManyArrivals>},
        {"not_waited_for", "normal", "", "all threads have returned while a bulk copy is under way.*@load",
         ring<Bug::NotWaitedFor>},
        {"box_without_map", "normal", "", "box_kernel.*no tensor map.*@box", box_without_map},
        {"box_misaligned", "normal", "", "box_kernel.*offset 64, which is not a multiple of 128.*@box",
         box_misaligned},
        {"box_past_end", "memory", "", "a bulk copy reads .* of device memory of 12800 bytes.*@box",
         box_past_end},
        {"maps", "normal", "", "all four as they should be", maps_that_cuda_refuses},
    };
    return run_cases(cases, argc, argv);
}
