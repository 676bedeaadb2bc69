// Where a step's time goes: a range around each launch, with the name of its kernel group. Profilers (Nsight
// Systems) always see the ranges, through NVTX; --profile measures them with CUDA events besides.
//
//     attention_forward(atty, lse, qkv, B, T, NH, profile.range(Group::AttentionForward, gpu));
//
// A range stands where the Gpu would: it converts to it, and ends with the statement. What is not being
// measured costs the call of NVTX, some nanoseconds of the host where no profiler is attached.
#pragma once
#include <array>
#include <cstddef>
#include <vector>
#include <nvtx3/nvToolsExt.h>  // nvtxRangePushA, nvtxRangePop
#include "llmc/gpu.cuh"        // Gpu, CUDA_CHECK

// Launches that share a ceiling and a row of the table.
enum class Group {
    Upload,
    Embedding,
    BlockGemms,
    AttentionForward,
    AttentionBackward,
    Layernorm,
    Gelu,
    BiasGradient,
    HeadGemms,
    Classifier,
    Norm,
    Optimizer,
};
inline constexpr size_t kGroups = 12;
inline constexpr const char* kGroupNames[] = {
    "token upload",
    "embedding",
    "block GEMMs",
    "attention forward",
    "attention backward",
    "layernorm + residual",
    "gelu",
    "bias gradients",
    "head GEMMs",
    "classifier",
    "norm",
    "optimizer",
};
static_assert(std::size(kGroupNames) == kGroups && static_cast<size_t>(Group::Optimizer) + 1 == kGroups);

// Milliseconds and number of the ranges of each group.
struct GroupTimes {
    std::array<double, kGroups> ms{};
    std::array<int64_t, kGroups> calls{};
};

class Profile {
  public:
    Profile() = default;
    Profile(const Profile&) = delete;
    ~Profile() {
        for (const Interval& interval : intervals_)
            cudaEventDestroy(interval.begin), cudaEventDestroy(interval.end);
    }

    // Not copied, so that it begins and ends once.
    class Range {
      public:
        Range(Profile& profile, Group group, Gpu& gpu) : gpu_(gpu) {
            nvtxRangePushA(kGroupNames[static_cast<size_t>(group)]);
            if (profile.measuring_) end_ = profile.begin(group, gpu);
        }
        Range(const Range&) = delete;
        ~Range() {
            if (end_) CUDA_CHECK(cudaEventRecord(end_, gpu_.stream));
            nvtxRangePop();
        }
        operator Gpu&() const { return gpu_; }

      private:
        Gpu& gpu_;
        cudaEvent_t end_ = nullptr;
    };
    Range range(Group group, Gpu& gpu) { return Range(*this, group, gpu); }

    // Ranges from here on are measured; never while a graph is captured.
    void start() { measuring_ = true; }
    bool measuring() const { return measuring_; }

    // What was measured since the last call. Waits for the GPU.
    GroupTimes collect(const Gpu& gpu) {
        gpu.synchronize();
        GroupTimes times;
        for (size_t i = 0; i < used_; i++) {
            float ms = 0;
            CUDA_CHECK(cudaEventElapsedTime(&ms, intervals_[i].begin, intervals_[i].end));
            times.ms[static_cast<size_t>(intervals_[i].group)] += ms;
            times.calls[static_cast<size_t>(intervals_[i].group)]++;
        }
        used_ = 0;
        return times;
    }

  private:
    struct Interval {
        Group group;
        cudaEvent_t begin, end;
    };

    // Records the begin of a new interval; returns the event that ends it.
    cudaEvent_t begin(Group group, const Gpu& gpu) {
        if (used_ == intervals_.size()) {
            intervals_.push_back({});
            CUDA_CHECK(cudaEventCreate(&intervals_.back().begin));
            CUDA_CHECK(cudaEventCreate(&intervals_.back().end));
        }
        Interval& interval = intervals_[used_++];
        interval.group = group;
        CUDA_CHECK(cudaEventRecord(interval.begin, gpu.stream));
        return interval.end;
    }

    bool measuring_ = false;
    std::vector<Interval> intervals_;  // their events are used again after each collect()
    size_t used_ = 0;
};
