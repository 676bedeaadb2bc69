// What the tests of the norm and of the optimizers share: arenas over a list of tensors, with traps in the
// pads, and a step through them.
#pragma once
#include <sys/wait.h>
#include <unistd.h>
#include <cstring>
#include <string>
#include <vector>
#include "dev/kernels/harness.h"
#include "llmc/grad_norm.cuh"
#include "llmc/update.cuh"

inline constexpr float kPadMaster = 7.25f;  // no kernel may read or write a pad; the gradient's pads are NaN

// A tensor list of the given rows and columns; padded_rows of the first only.
struct BlockShape {
    size_t rows, cols, padded_rows = 0;
};
inline std::vector<TensorBlock> block_list(const std::vector<BlockShape>& shapes, size_t first_offset = 0) {
    std::vector<TensorBlock> blocks;
    size_t offset = first_offset;
    for (size_t b = 0; b < shapes.size(); b++) {
        const BlockShape& shape = shapes[b];
        TensorBlock block{};
        block.name = shape.rows > 1 ? "matrix" : "vector";
        block.hf_name = "block." + std::to_string(b);
        block.layer = -1;
        block.type = static_cast<int>(b);
        block.decay = shape.rows > 1;
        block.rows = shape.rows, block.cols = shape.cols, block.n = shape.rows * shape.cols;
        block.offset = offset;
        block.padded = std::max(shape.rows, shape.padded_rows) * shape.cols;
        block.padded = (block.padded + 63) / 64 * 64;
        offset += block.padded;
        blocks.push_back(block);
    }
    return blocks;
}

// Everything that a step touches but the optimizer, as vectors of the host.
struct Snapshot {
    std::vector<floatX> weights;
    std::vector<float> master, gradient;
    StepState state{};
};

// The arenas hold `blocks`, whose offsets count from origin: an origin beyond 2^32 shows any 32-bit offset,
// since the pointers handed to kernels are moved back by as much.
class Arenas {
  public:
    std::vector<TensorBlock> blocks;
    size_t origin, Np;

    Arenas(Harness& h, std::vector<TensorBlock> blocks_, size_t origin_ = 0)
        : blocks(std::move(blocks_)),
          origin(origin_),
          Np(arena_elements(blocks) - origin_),
          h_(h),
          table_(blocks, h.gpu),
          weights_(std::is_same_v<floatX, float> ? 0 : Np),
          master_(Np),
          gradient_(Np),
          loss_(1),
          state_(1),
          partial_(table_.chunks.size()) {
        fill_zero(state_.get(), 1, h.gpu);
        std::vector<float> master = h.random<float>(Np, 0.02);
        for (const TensorBlock& block : blocks)  // what rounds a tensor up to 64 is part of its last chunk
            for (size_t i = block.n; i < (block.n + 63) / 64 * 64; i++) master[block.offset - origin + i] = 0;
        for_pads([&](size_t i) { master[i] = kPadMaster; });
        set_master(master);
    }
    const DeviceTable& table() const { return table_; }
    StepState* state() const { return state_; }

    // f(i) for every arena element of no chunk.
    template <class F>
    void for_pads(F f) const {
        for (const TensorBlock& block : blocks)
            for (size_t i = block.offset + (block.n + 63) / 64 * 64; i < block.offset + block.padded; i++)
                f(i - origin);
    }
    // Which block each element belongs to; -1 for pads.
    std::vector<int> block_of() const {
        std::vector<int> owner(Np, -1);
        for (size_t b = 0; b < blocks.size(); b++)
            for (size_t i = 0; i < blocks[b].n; i++)
                owner[blocks[b].offset - origin + i] = static_cast<int>(b);
        return owner;
    }
    void set_master(const std::vector<float>& master) {
        copy_to_device(master_.get(), master.data(), Np, h_.gpu);
        if constexpr (!std::is_same_v<floatX, float>) {
            std::vector<floatX> weights(Np);
            for (size_t i = 0; i < Np; i++) weights[i] = static_cast<floatX>(master[i]);
            copy_to_device(weights_.get(), weights.data(), Np, h_.gpu);
        }
        h_.gpu.synchronize();
    }
    // Normal numbers, another deviation for each block; NaN in whole pad rows, 0 in what rounds a tensor up
    // to 64.
    std::vector<float> random_gradient(double deviation = 1e-3) {
        std::vector<float> gradient = h_.random<float>(Np, deviation);
        const std::vector<int> owner = block_of();
        for (size_t i = 0; i < Np; i++)
            gradient[i] *= owner[i] < 0 ? 0.0f : 1.0f + 0.5f * static_cast<float>(owner[i] % 7);
        for_pads([&](size_t i) { gradient[i] = NAN; });
        return gradient;
    }
    void set_gradient(const std::vector<float>& gradient) {
        copy_to_device(gradient_.get(), gradient.data(), Np, h_.gpu);
        h_.gpu.synchronize();
    }
    void set_state(const StepState& state) {
        copy_to_device(state_.get(), &state, 1, h_.gpu);
        h_.gpu.synchronize();
    }
    StepState state_cpu() { return h_.to_host(state_.get(), 1)[0]; }

    StepState norm(double clip, float loss = 3.0f) {
        copy_to_device(loss_.get(), &loss, 1, h_.gpu);
        grad_norm(state_, partial_, gradient_.get() - origin, loss_, table_, clip, h_.gpu);
        return state_cpu();
    }
    Update update(double learning_rate) const {
        return {weights() - origin, master_.get() - origin, gradient_.get() - origin, state_, &table_,
                learning_rate};
    }
    Snapshot snapshot() {
        Snapshot s;
        s.weights = h_.to_host(weights(), Np);
        s.master = h_.to_host(master_.get(), Np);
        s.gradient = h_.to_host(gradient_.get(), Np);
        s.state = state_cpu();
        return s;
    }
    bool weights_are_rounded(const Snapshot& s) const {
        for (size_t i = 0; i < Np; i++) {
            const floatX rounded = static_cast<floatX>(s.master[i]);
            if (std::memcmp(&rounded, &s.weights[i], sizeof(floatX)) != 0) return false;
        }
        return true;
    }
    bool pads_are_untouched(const Snapshot& s) const {
        bool ok = true;
        for_pads([&](size_t i) { ok = ok && s.master[i] == kPadMaster && std::isnan(s.gradient[i]); });
        return ok;
    }

  private:
    floatX* weights() const {  // in the fp32 build the master itself
        return weights_.size() ? weights_.get() : reinterpret_cast<floatX*>(master_.get());
    }

    Harness& h_;
    DeviceTable table_;
    DeviceBuffer<floatX> weights_;
    DeviceBuffer<float> master_, gradient_, loss_;
    DeviceBuffer<StepState> state_;
    DeviceBuffer<double> partial_;
};

template <class T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Every piece of an optimizer's state, one after the other.
template <class Optimizer>
std::vector<float> state_of(Harness& h, Optimizer& optimizer) {
    std::vector<float> all;
    optimizer.each_state([&](const StateTensor& tensor) {
        const std::vector<float> part = h.to_host(tensor.data, tensor.elements);
        all.insert(all.end(), part.begin(), part.end());
    });
    return all;
}

// Runs f in a child process, which may end by fatal(). What it wrote to standard error, and its exit status.
// f must not use the device: a forked process can't.
struct ChildResult {
    int status = -1;
    std::string text;
};
template <class F>
ChildResult in_child(F f) {
    int ends[2];
    if (pipe(ends) != 0) return {};
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        f();
        _exit(0);
    }
    close(ends[1]);
    ChildResult result;
    char buffer[512];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;)
        result.text.append(buffer, static_cast<size_t>(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    return result;
}

// The shapes of the tests: GPT-2 tables, odd ones, and lists whose tensors end in the middle of a chunk.
struct NamedBlocks {
    std::string name;
    std::vector<TensorBlock> blocks;
};
inline std::vector<NamedBlocks> test_shapes() {
    return {{"L 1, C 64, V 65, P 63", TensorTable({1, 64, 1, 65, 63}).blocks()},
            {"L 2, C 128, V 300, P 200", TensorTable({2, 128, 2, 300, 200}).blocks()},
            {"tensors of 64 .. 1600 columns",
             block_list(
                 {{257, 1600, 384}, {1, 64}, {1, 8192}, {1, 8256}, {65, 768}, {1, 4800}, {1, 1}, {63, 65}})}};
}
