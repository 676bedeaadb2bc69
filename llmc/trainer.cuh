// One update after the other, without waiting for any: micro-steps, norm, optimizer go onto the stream, and
// what came of them is read one step late. The host never waits for the GPU inside the loop but for that,
// when it is done already.
#pragma once
#include <optional>
#include "llmc/dataloader.h"   // TrainLoader
#include "llmc/gpt2.cuh"       // Gpt2
#include "llmc/grad_norm.cuh"  // grad_norm, StepState
#include "llmc/optimizer.cuh"  // Optimizer

// What an update did, as the device reports it.
struct StepResult {
    int64_t step;  // from 1
    StepState state;
    double step_ms;       // from the end of the step before (or the start, after something else) to its end
    double optimizer_ms;  // the optimizer's launches alone, without the norm
};

struct TrainerConfig {
    int64_t micro_steps;  // of an update
    double grad_clip;     // 0: none
    bool graph;           // replay the micro-step as a CUDA graph from the second update on
};

class Trainer {
  public:
    Trainer(Gpt2& model, Optimizer& optimizer, const TrainerConfig& config, Gpu& gpu)
        : gpu_(gpu),
          model_(model),
          optimizer_(optimizer),
          config_(config),
          table_(model.table.blocks(), gpu),
          partial_(table_.chunks.size()),
          state_(1),
          reports_(kTurns) {
        fill_zero(state_.get(), 1, gpu);
        for (Turn& turn : turns_)
            for (cudaEvent_t* event : {&turn.begin, &turn.optimizer, &turn.end, &turn.read})
                CUDA_CHECK(cudaEventCreate(event));
    }
    Trainer(const Trainer&) = delete;
    ~Trainer() {
        for (Turn& turn : turns_)
            for (cudaEvent_t event : {turn.begin, turn.optimizer, turn.end, turn.read})
                cudaEventDestroy(event);
        for (cudaGraphExec_t graph : graphs_)
            if (graph) cudaGraphExecDestroy(graph);
    }

    // Puts update `step` (from 1, each once and in order) on the stream and returns the report of the one
    // before, if that wasn't collected yet.
    std::optional<StepResult> step(int64_t step, double learning_rate, TrainLoader& loader) {
        Turn& turn = turns_[step % kTurns];
        turn.chained = pending_;
        if (!turn.chained) CUDA_CHECK(cudaEventRecord(turn.begin, gpu_.stream));
        const float token_weight = 1.0f / (static_cast<float>(config_.micro_steps) *
                                           model_.config.batch_size * model_.config.seq_len);
        for (int64_t micro_step = 0; micro_step < config_.micro_steps; micro_step++) {
            loader.next(model_.staging());
            model_.upload();
            run_micro_step(step, micro_step == 0 ? Write::Assign : Write::Add, token_weight);
        }
        grad_norm(state_.get(), partial_.get(), model_.gradients_arena(), model_.loss(), table_,
                  config_.grad_clip, model_.profile.range(Group::Norm, gpu_));
        CUDA_CHECK(cudaEventRecord(turn.optimizer, gpu_.stream));
        optimizer_.step({model_.weights_arena(), model_.master_arena(), model_.gradients_arena(),
                         state_.get(), &table_, learning_rate},
                        model_.profile.range(Group::Optimizer, gpu_));
        CUDA_CHECK(cudaEventRecord(turn.end, gpu_.stream));
        copy_to_host(&reports_[step % kTurns], state_.get(), 1, gpu_);
        CUDA_CHECK(cudaEventRecord(turn.read, gpu_.stream));
        std::optional<StepResult> report;
        if (pending_) report = collect(last_);
        pending_ = true;
        last_ = step;
        return report;
    }

    // The report of the last update, waiting for it; nothing where it was given already. What the caller does
    // next on the stream counts to no step's time.
    std::optional<StepResult> flush() {
        if (!pending_) return std::nullopt;
        pending_ = false;
        return collect(last_);
    }

  private:
    static constexpr int kTurns =
        3;  // a step on the stream, the one before it that is read, and that one's begin
    struct Turn {
        bool chained = false;  // begins where the step before ends, else at its own event
        cudaEvent_t begin, optimizer, end, read;
    };

    // The first update runs plainly: plans are made and buffers touched for the first time. Then each of the
    // two kinds of micro-step is captured once and replayed: same kernels, same addresses, so the same bits.
    // What is profiled runs plainly again, since a graph is one launch.
    void run_micro_step(int64_t step, Write write, float token_weight) {
        if (!config_.graph || step == 1 || model_.profile.measuring())
            return model_.micro_step(write, token_weight);
        cudaGraphExec_t& executable = graphs_[write == Write::Add];
        if (!executable) {
            cudaGraph_t graph;
            CUDA_CHECK(cudaStreamBeginCapture(gpu_.stream, cudaStreamCaptureModeThreadLocal));
            model_.micro_step(write, token_weight);
            CUDA_CHECK(cudaStreamEndCapture(gpu_.stream, &graph));
            CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
            CUDA_CHECK(cudaGraphDestroy(graph));
        }
        CUDA_CHECK(cudaGraphLaunch(executable, gpu_.stream));
    }

    StepResult collect(int64_t step) {
        const Turn& turn = turns_[step % kTurns];
        CUDA_CHECK(cudaEventSynchronize(turn.read));
        const Turn& before = turns_[(step + kTurns - 1) % kTurns];
        float step_ms = 0, optimizer_ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&step_ms, turn.chained ? before.end : turn.begin, turn.end));
        CUDA_CHECK(cudaEventElapsedTime(&optimizer_ms, turn.optimizer, turn.end));
        return {step, reports_[step % kTurns], step_ms, optimizer_ms};
    }

    Gpu& gpu_;
    Gpt2& model_;
    Optimizer& optimizer_;
    TrainerConfig config_;
    DeviceTable table_;
    DeviceBuffer<double> partial_;
    DeviceBuffer<StepState> state_;
    PinnedBuffer<StepState> reports_;
    Turn turns_[kTurns];
    cudaGraphExec_t graphs_[2] = {};
    bool pending_ = false;  // the report of step last_ was not given yet
    int64_t last_ = 0;
};
