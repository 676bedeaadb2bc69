// Which optimizer the program uses: chosen here, when it is compiled, and nowhere else.
#pragma once
#include <concepts>
#include <cstddef>
#include <optional>
#include <vector>
#include "llmc/adamw.cuh"
#include "llmc/options.h"
#include "llmc/sgd_sai.cuh"
#include "llmc/update.cuh"

// What the training program asks of an optimizer. What is special about some step is the optimizer's own
// business.
//     Optimizer optimizer(Optimizer::Options::from(options), table.blocks(), gpu);
//     each step:  grad_norm(state, ...);  optimizer.step(update, gpu);              no wait for the GPU
//     later, with the host's copy of the state:  if (auto report = optimizer.observe(state_cpu, gpu)) ...
template <class T>
concept IsOptimizer = std::constructible_from < T,
        const typename T::Options&, const std::vector<TensorBlock>
&, const Gpu& > &&requires(T optimizer, const T& constant, const ::Options& flags,
                           const typename T::Options& options, const Update& update, const StepState& state,
                           const Gpu& gpu, const std::vector<TensorBlock>& blocks, size_t count,
                           void (*visit)(StateTensor)) {
    { T::kName } -> std::convertible_to<const char*>;      // for people: "AdamW"
    { T::kAxisName } -> std::convertible_to<const char*>;  // for make's command line and the log: "adamw"
    { T::Options::from(flags) } -> std::same_as<typename T::Options>;
    { T::check_options(options, blocks) } -> std::same_as<void>;        // fatal, or a warning
    { T::state_bytes(options, count, count) } -> std::same_as<size_t>;  // of padded parameters, of blocks
    { constant.options() } -> std::same_as<const typename T::Options&>;
    { optimizer.step(update, gpu) } -> std::same_as<void>;
    { optimizer.observe(state, gpu) } -> std::same_as<std::optional<GainReport>>;
    { optimizer.each_state(visit) } -> std::same_as<void>;
};

static_assert(IsOptimizer<AdamW> && IsOptimizer<SgdSai>);  // both always compile, both are unit-tested

#ifndef OPTIMIZER
#define OPTIMIZER AdamW  // make OPTIMIZER=sgd_sai  ->  -DOPTIMIZER=SgdSai
#endif
using Optimizer = OPTIMIZER;  // the only place that chooses
