// Who needs how much device memory, computed before anything is allocated: printed at start-up, logged, and
// where it does not fit, what would.
#pragma once
#include <cstdio>
#include <string>
#include <vector>
#include "llmc/gpt2.cuh"       // Gpt2, Gpt2Config
#include "llmc/optimizer.cuh"  // AdamW, SgdSai, Optimizer

struct MemoryOwner {
    const char* name;
    size_t bytes;
};
using MemoryPlan = std::vector<MemoryOwner>;

inline double gib(size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); }

inline size_t total_bytes(const MemoryPlan& plan) {
    size_t sum = 0;
    for (const MemoryOwner& owner : plan) sum += owner.bytes;
    return sum;
}

// Bytes of this build's optimizer's state for a model.
inline size_t optimizer_state_bytes(const TensorTable& table, const Optimizer::Options& options) {
    return Optimizer::state_bytes(options, table.padded_parameters(), table.blocks().size());
}

// Device memory by owner for a model in training; state_bytes is the optimizer's. Nothing is allocated.
inline MemoryPlan plan_memory(const Gpt2Config& config, size_t state_bytes, const Gpu& gpu) {
    const size_t Np = TensorTable(config.shape).padded_parameters();
    const ActivationTable activations(config.shape, config.batch_size, config.seq_len, config.recompute);
    const bool has_master = sizeof(floatX) < sizeof(float);
    return {{"parameters", Np * sizeof(floatX)},
            {"master_weights", has_master ? Np * sizeof(float) : 0},
            {"gradients", Np * sizeof(float)},
            {"optimizer_state", state_bytes},
            {"activations", activations.bytes()},
            {"logits", Gpt2::logits_elements(config) * sizeof(floatX)},
            {"scratch", Gpt2::scratch_floats(config, gpu) * sizeof(float)},
            {"workspace", gpu.workspace.size()}};
}

// The largest batch, in sequences, that fits `available` bytes; 0 if none does.
inline int largest_batch(Gpt2Config config, size_t state_bytes, size_t available, const Gpu& gpu) {
    int low = 0, high = 1;
    auto fits = [&](int batch) {
        config.batch_size = batch;
        return total_bytes(plan_memory(config, state_bytes, gpu)) <= available;
    };
    while (high <= (1 << 16) && fits(high)) low = high, high *= 2;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low;
}

// What the CUDA context, cuBLASLt's kernels and fragmentation take beside the plan; about what they take on
// an H100.
inline constexpr size_t kMemoryReserve = size_t{1} << 30;

// Device memory that a plan may use: what is free now and what `gpu` holds already, less the reserve.
inline size_t available_memory(const Gpu& gpu) {
    size_t free_bytes = 0, device_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &device_bytes));
    const size_t usable = free_bytes + gpu.workspace.size();
    return usable > kMemoryReserve ? usable - kMemoryReserve : 0;
}

// The plan as a table, and below it the largest batch for each way to recompute and either optimizer.
inline void print_memory_plan(const Gpt2Config& config, const Optimizer::Options& options, const Gpu& gpu) {
    const TensorTable table(config.shape);
    const size_t Np = table.padded_parameters(), blocks = table.blocks().size();
    const MemoryPlan plan = plan_memory(config, optimizer_state_bytes(table, options), gpu);
    const size_t available = available_memory(gpu);
    std::printf("parameters: %zu, padded %zu\n", table.parameters(), Np);
    std::printf("%-18s %15s %9s\n", "device memory", "bytes", "GiB");
    for (const MemoryOwner& owner : plan)
        std::printf("  %-16s %15zu %9.3f\n", owner.name, owner.bytes, gib(owner.bytes));
    std::printf("  %-16s %15zu %9.3f of %.3f GiB available on %s\n", "total", total_bytes(plan),
                gib(total_bytes(plan)), gib(available), gpu.properties.name);

    const size_t adamw_bytes = AdamW::state_bytes({}, Np, blocks);
    const size_t sgd_sai_bytes = SgdSai::state_bytes({}, Np, blocks);
    const double saved = static_cast<double>(adamw_bytes) - static_cast<double>(sgd_sai_bytes);
    std::printf("optimizer state: AdamW %zu bytes, SGD-SaI %zu; SGD-SaI saves %.3f GB = %.3f GiB\n",
                adamw_bytes, sgd_sai_bytes, saved * 1e-9, saved / (size_t{1} << 30));
    std::printf("largest --batch-size that fits   %14s %14s\n", "AdamW", "SGD-SaI");
    for (const char* name : {"none", "gelu-layernorm", "block"}) {
        Gpt2Config other = config;
        other.recompute = recompute_of(name);
        std::printf("  --recompute %-20s %14d %14d\n", name,
                    largest_batch(other, adamw_bytes, available, gpu),
                    largest_batch(other, sgd_sai_bytes, available, gpu));
    }
}

// Ends the program where the plan does not fit, with what would: the largest batch for each way to recompute.
inline void check_memory(const Gpt2Config& config, const Optimizer::Options& options, const Gpu& gpu) {
    const size_t state_bytes = optimizer_state_bytes(TensorTable(config.shape), options);
    const size_t wanted = total_bytes(plan_memory(config, state_bytes, gpu)),
                 available = available_memory(gpu);
    if (wanted <= available) return;
    std::string remedies;
    for (const char* name : {"none", "gelu-layernorm", "block"}) {
        Gpt2Config other = config;
        other.recompute = recompute_of(name);
        const int batch = largest_batch(other, state_bytes, available, gpu);
        if (batch == 0) continue;
        remedies += (remedies.empty() ? "" : ", or ") + std::string("--batch-size ") +
                    std::to_string(std::min(batch, config.batch_size)) + " --recompute " + name;
    }
    fatal("--batch-size %d: %.2f GiB of device memory are wanted, %.2f GiB are available on %s; %s",
          config.batch_size, gib(wanted), gib(available), gpu.properties.name,
          remedies.empty() ? "no batch fits: take a smaller model or a larger GPU"
                           : ("what fits: " + remedies).c_str());
}
