// The options of the program, declared once. each_option() is the only list of flags: parsing, --help, the
// start-up table and the log walk it, so that they can't disagree.
#pragma once

#include <stdint.h>
#include <stdio.h>   // snprintf
#include <stdlib.h>  // strtod

#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "llmc/shape.h"  // ModelShape, which --init-from brings

// How this program was built, in make's words. options.cpp is compiled once for all variants, so it is told
// at run time.
struct BuildInfo {
    std::string optimizer;  // "adamw" or "sgd_sai"
    std::string precision;  // "bf16" or "fp32"
    std::string device;     // "gpu" or "sim"
};

struct Options {
    // Data and files
    std::string train_data;
    std::string val_data;
    std::string output_dir = "out";
    std::string init_from;
    bool shuffle = true;
    int64_t seed = 1337;
    // Model
    std::string model = "d12";
    int layers = 12;
    int channels = 768;
    int heads = 12;
    int vocab_size = 50257;
    int seq_len = 1024;
    // Length of the run
    int batch_size = 8;
    int64_t total_batch = 0;  // tokens; after parse_options never 0
    int64_t steps = 20000;
    // Learning rate
    double learning_rate = 0;  // default_options() sets the optimizer's
    int64_t warmup_steps = 700;
    std::string schedule = "cosine";
    double final_lr_fraction = 0.1;
    // Optimizer
    double weight_decay = 0;  // default_options() sets the optimizer's
    double grad_clip = 1.0;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double momentum = 0.9;
    std::string gain = "raw";
    // Watching the run
    int64_t val_every = 250;
    int64_t val_sequences = 256;
    int64_t sample_every = 0;
    // Speed and memory
    std::string recompute = "none";
    bool tune = true;
    bool graph = true;
    int64_t profile = 0;
    bool dry_run = false;

    // Not flags
    BuildInfo build;
    std::vector<std::string> given_flags;  // names without dashes, in the order of each_option()

    // Whether the command line held the flag: given("layers"). A value equal to the default counts as given.
    bool given(std::string_view flag) const {
        for (const std::string& name : given_flags) {
            if (name == flag) return true;
        }
        return false;
    }
};

// The numbers that a flag accepts. NaN lies in none.
struct Range {
    double min, max;
    bool without_min = false, without_max = false;

    bool holds(double x) const {
        return (without_min ? x > min : x >= min) && (without_max ? x < max : x <= max);
    }
};
constexpr Range from_to(double min, double max) { return {min, max}; }
constexpr Range from_below(double min, double max) { return {min, max, false, true}; }  // [min, max)
constexpr Range above_to(double min, double max) { return {min, max, true, false}; }    // (min, max]

struct Flag {
    const char* group;           // heading in --help and in the start-up table
    const char* name;            // without the dashes
    const char* value;           // what --help shows for it: a unit, or all choices "a|b|c"; "" for a switch
    Range range = {0, 0};        // numbers only
    const char* optimizer = "";  // "adamw" or "sgd_sai" where the other build lacks the flag
    const char* default_text = "";  // what --help says where the default follows from other flags
};

// Upper limits of whole numbers. No sensible run comes near them; they keep products of sizes inside 63 bits.
constexpr double kMaxDim = 1 << 20;
constexpr double kMaxCount = 1e15;   // steps, tokens, seeds: exact in a double, so in JSON readers too
constexpr double kMaxVocab = 65536;  // a token is 16 bits in the shards

// Calls f(flag, variable, help) for every flag of both optimizers, in the order of --help; variable is a
// reference to the member of o (const if o is): std::string, int, int64_t, double or bool.
//     each_option(o, [&](const Flag& flag, auto& variable, const char* help) { ... });
template <class OptionsOrConst, class F>
void each_option(OptionsOrConst& o, F&& f) {
    const char* group = "Data and files";
    f(Flag{group, "train-data", "GLOB"}, o.train_data, "token shards to train on; quote the pattern");
    f(Flag{group, "val-data", "GLOB"}, o.val_data, "token shards for validation; without it there is none");
    f(Flag{group, "output-dir", "DIR"}, o.output_dir,
      "log.jsonl and the saved model go here; must hold no log yet");
    f(Flag{group, "init-from", "DIR"}, o.init_from,
      "start from the weights of this Hugging Face GPT-2 directory, which also gives the model's shape");
    f(Flag{group, "shuffle", "0|1"}, o.shuffle,
      "1 permutes shards and samples, anew each epoch; 0 reads front to back");
    f(Flag{group, "seed", "N", from_to(0, kMaxCount)}, o.seed,
      "of the initial weights, the data's order and samples");

    group = "Model";
    f(Flag{group, "model", "d12|d24|d36|d48"}, o.model,
      "GPT-2 of 124M, 350M, 774M or 1558M parameters; the flags below override its parts");
    f(Flag{group, "layers", "N", from_to(1, 4096)}, o.layers, "transformer blocks (L)");
    f(Flag{group, "channels", "N", from_to(64, kMaxDim)}, o.channels, "width (C); 64 x heads");
    f(Flag{group, "heads", "N", from_to(1, kMaxDim / 64)}, o.heads, "attention heads, each 64 channels wide");
    f(Flag{group, "vocab-size", "N", from_to(1, kMaxVocab)}, o.vocab_size,
      "tokens known: 50257 is GPT-2's, 256 bytes");
    f(Flag{group, "seq-len", "TOKENS", from_to(1, kMaxDim)}, o.seq_len, "context, tokens a sequence (T)");

    group = "Length of the run";
    f(Flag{group, "batch-size", "SEQUENCES", from_to(1, kMaxDim)}, o.batch_size,
      "sequences a micro-step; memory");
    f(Flag{group, "total-batch", "TOKENS", from_to(1, kMaxCount), "", "batch-size x seq-len"}, o.total_batch,
      "tokens an update, a multiple of its default; gradients of the micro-steps are accumulated");
    f(Flag{group, "steps", "N", from_to(1, kMaxCount)}, o.steps, "updates of the weights");

    group = "Learning rate";
    f(Flag{group, "learning-rate", "LR", above_to(0, 1000)}, o.learning_rate,
      "peak, reached after the warm-up");
    f(Flag{group, "warmup-steps", "N", from_to(0, kMaxCount), "", "700, or steps / 10 if fewer"},
      o.warmup_steps, "updates of linear warm-up");
    f(Flag{group, "schedule", "cosine|linear|constant"}, o.schedule, "how the rate falls after the warm-up");
    f(Flag{group, "final-lr-fraction", "X", from_to(0, 1)}, o.final_lr_fraction,
      "where cosine and linear end, as a fraction of --learning-rate");

    group = "Optimizer";
    f(Flag{group, "weight-decay", "X", from_to(0, 1000)}, o.weight_decay,
      "decoupled, times the learning rate; on tensors of two dimensions");
    f(Flag{group, "grad-clip", "NORM", from_to(0, 1e9)}, o.grad_clip,
      "largest global gradient norm; 0: no clipping");
    f(Flag{group, "beta1", "X", from_below(0, 1), "adamw"}, o.beta1, "decay of the first moment");
    f(Flag{group, "beta2", "X", from_below(0, 1), "adamw"}, o.beta2, "decay of the second moment");
    f(Flag{group, "momentum", "X", from_below(0, 1), "sgd_sai"}, o.momentum,
      "decay of the momentum; 0: none is kept");
    f(Flag{group, "gain", "raw|normalized|sqrt_n|one", {}, "sgd_sai"}, o.gain,
      "a block's factor on the rate: its g-SNR, that over the largest, or the controls sqrt(n) and 1");
    f(Flag{group, "eps", "X", above_to(0, 1)}, o.eps, "added to denominators");

    group = "Watching the run";
    f(Flag{group, "val-every", "STEPS", from_to(0, kMaxCount)}, o.val_every,
      "validation loss every so often; 0: never");
    f(Flag{group, "val-sequences", "SEQUENCES", from_to(0, kMaxCount)}, o.val_sequences,
      "validate on the first so many; 0: on all");
    f(Flag{group, "sample-every", "STEPS", from_to(0, kMaxCount)}, o.sample_every,
      "print text that the model writes every so often; 0: never");

    group = "Speed and memory";
    f(Flag{group, "recompute", "none|gelu-layernorm|block"}, o.recompute,
      "activations to compute again in backward instead of keeping them: less memory, the same result");
    f(Flag{group, "tune", "0|1"}, o.tune,
      "1 times the matrix-product algorithms first; 0 takes cuBLASLt's choice");
    f(Flag{group, "graph", "0|1"}, o.graph, "1 runs the micro-step as a CUDA graph");
    f(Flag{group, "profile", "STEPS", from_to(0, kMaxCount)}, o.profile,
      "time so many steps by kernel, then stop; 0: off");
    f(Flag{group, "dry-run", ""}, o.dry_run, "print the options and the memory plan, then stop");
}

// Whether the build that o was parsed for has this flag.
inline bool in_this_build(const Flag& flag, const BuildInfo& build) {
    return flag.optimizer[0] == '\0' || build.optimizer == flag.optimizer;
}

// "adamw" -> "AdamW", "sgd_sai" -> "SGD-SaI".
std::string optimizer_title(std::string_view optimizer);

// The options of an empty command line, with the optimizer's own learning rate and weight decay.
Options default_options(const BuildInfo& build);

// The options of a command line: read, completed (--model gives the shape; --total-batch and --warmup-steps
// their defaults) and checked by validate(), but without --init-from's shape: see adopt_shape(). Anything
// wrong is fatal and names the flag. --help prints help_text() to standard output and exits with status 0.
Options parse_options(int argc, const char* const* argv, const BuildInfo& build);

// What --help prints: at most 100 columns.
std::string help_text(const BuildInfo& build);

// Every check that needs no file. Fatal at the first that fails.
void validate(const Options& o);

// Takes the shape of --init-from's model and checks it as validate() does. A shape flag that was given and
// disagrees is fatal; so is --seq-len beyond positions. Without --seq-len, all positions are used.
void adopt_shape(Options& o, const ModelShape& shape);

// One value as the command line would take it: "cosine", "1"; a double in the fewest digits that read back as
// the same number: "0.0006", "1e-08", "1000".
template <class T>
std::string option_text(const T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
        return value;
    } else if constexpr (std::is_floating_point_v<T>) {
        char text[32];
        for (int digits = 1; digits <= std::numeric_limits<T>::max_digits10; digits++) {
            snprintf(text, sizeof(text), "%.*g", digits, value);
            if (static_cast<T>(strtod(text, nullptr)) == value) break;
        }
        if (value > -1e6 && value < 1e6 && value == static_cast<int64_t>(value))
            snprintf(text, sizeof(text), "%.0f", value);
        return text;
    } else {
        return std::to_string(value);
    }
}

// The start-up table on standard output: every flag of this build and its value; a * marks the given ones.
void print_options(const Options& o);
