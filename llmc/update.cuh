// What every optimizer is given and gives back: the vocabulary of the contract in optimizer.cuh.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>
#include "llmc/grad_norm.cuh"  // StepState, DeviceTable

// One update of the weights. All pointers are device memory; arenas have Np elements, pads are neither read
// nor written.
struct Update {
    floatX* weights;  // written: the master rounded to nearest; the same memory as master in the fp32 build
    float* master;    // read and written
    const float* gradient;  // the whole step's, unclipped; read
    StepState* state;       // grad_norm() wrote it for this step; the optimizer counts applied_updates
    const DeviceTable* table;
    double learning_rate;  // of this update, after the schedule
};

// One piece of an optimizer's state, for checkpoints and the memory report: fp32 on the device.
// Arena: elements lie as the parameters do (Np). Block: one a TensorBlock, in their order.
enum class StateLayout { Arena, Block };
struct StateTensor {
    const char* name;
    float* data;
    size_t elements;
    StateLayout layout;
    size_t bytes() const { return elements * sizeof(float); }
};

// What an optimizer has to tell after its first applied update: a row a tensor and layer, in the arena's
// order.
struct GainRow {
    std::string tensor;  // its Hugging Face name
    std::string type;    // "qkvw": the same for all layers
    uint64_t n;
    float gsnr, gain;
    bool zero;  // its first gradient was all zero, gsnr is sqrt(n) instead
};
struct GainReport {
    std::string rule;    // --gain
    float largest_gsnr;  // M
    std::vector<GainRow> rows;
};

// The report as a table, a line a type of tensor: layers, n, sqrt(n), the range of g-SNR and of the gain over
// its layers.
inline std::string gain_table(const GainReport& report) {
    char line[160];
    std::snprintf(line, sizeof(line), "g-SNR of the first gradient, --gain %s, largest %.6g\n",
                  report.rule.c_str(), static_cast<double>(report.largest_gsnr));
    std::string text = line;
    std::snprintf(line, sizeof(line), "%-9s %6s %12s %10s %23s %25s\n", "tensor", "blocks", "n", "sqrt(n)",
                  "g-SNR", "gain");
    text += line;
    std::vector<std::string> types;
    for (const GainRow& row : report.rows)
        if (std::find(types.begin(), types.end(), row.type) == types.end()) types.push_back(row.type);
    for (const std::string& type : types) {
        int blocks = 0;
        uint64_t n = 0;
        float gsnr_min = INFINITY, gsnr_max = 0, gain_min = INFINITY, gain_max = 0;
        for (const GainRow& row : report.rows) {
            if (row.type != type) continue;
            blocks++, n = row.n;
            gsnr_min = std::min(gsnr_min, row.gsnr), gsnr_max = std::max(gsnr_max, row.gsnr);
            gain_min = std::min(gain_min, row.gain), gain_max = std::max(gain_max, row.gain);
        }
        auto range = [](float low, float high) {
            char both[64];
            const char* format = low == high ? "%.5g" : "%.5g .. %.5g";  // one number needs the first only
            std::snprintf(both, sizeof(both), format, static_cast<double>(low), static_cast<double>(high));
            return std::string(both);
        };
        std::snprintf(line, sizeof(line), "%-9s %6d %12llu %10.1f %23s %25s\n", type.c_str(), blocks,
                      static_cast<unsigned long long>(n), std::sqrt(static_cast<double>(n)),
                      range(gsnr_min, gsnr_max).c_str(), range(gain_min, gain_max).c_str());
        text += line;
    }
    text.pop_back();  // the last line break: who prints it ends the line
    return text;
}

// ---- checks that the optimizers share --------------------------------------------------------------------

// Elements of the arena that holds the blocks, pads included.
inline size_t arena_elements(const std::vector<TensorBlock>& blocks) {
    size_t elements = 0;
    for (const TensorBlock& block : blocks) elements = std::max(elements, block.offset + block.padded);
    return elements;
}

// p (1 - lr wd) must keep the sign of p.
inline void check_decay(double learning_rate, double weight_decay) {
    if (!(learning_rate > 0)) fatal("--learning-rate %g: wants a number above 0", learning_rate);
    if (!(weight_decay >= 0)) fatal("--weight-decay %g: wants a number of at least 0", weight_decay);
    if (!(learning_rate * weight_decay < 1))
        fatal(
            "--learning-rate %g x --weight-decay %g = %g, but a step multiplies the weights by 1 minus "
            "this; wants less than 1",
            learning_rate, weight_decay, learning_rate * weight_decay);
}

// ---- device helpers --------------------------------------------------------------------------------------

// Four neighbouring weights from the master, rounded to nearest even. In the fp32 build weights and master
// are one memory, so there is nothing to write. 8 bytes a lane: neighbouring lanes fill whole 128-byte lines,
// as 16 would.
__device__ inline void store_weights(floatX* weights, const f128& master) {
    if constexpr (!std::is_same_v<floatX, float>) {
        struct alignas(8) Half {
            floatX v[4];
        } half;
        for (int k = 0; k < 4; k++) half.v[k] = static_cast<floatX>(master.v[k]);
        *reinterpret_cast<Half*>(weights) = half;
    }
}
