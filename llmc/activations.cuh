// The activations of GPT-2, declared once: a row a tensor, with its type and until when it is kept for
// backward. What --recompute does is in this table's last column, and in `Gpt2::backward`, which computes
// again what wasn't kept.
//
// Host only: sizes and pointers, no kernel.
#pragma once
#include <string>
#include <vector>
#include "llmc/gpu.cuh"    // floatX
#include "llmc/tensors.h"  // Scope

// What backward computes again instead of keeping it: nothing; the outputs of the two layernorms and of GELU,
// from their inputs and statistics; or all of a block, from the residual stream that entered it.
enum class Recompute { none, gelu_layernorm, block };

inline Recompute recompute_of(const std::string& name) {
    if (name == "none") return Recompute::none;
    if (name == "gelu-layernorm") return Recompute::gelu_layernorm;
    if (name == "block") return Recompute::block;
    fatal("--recompute %s: wanted none, gelu-layernorm or block", name.c_str());
}

// A tensor is kept for every layer while the run's Recompute is at most this; beyond, all layers share one
// buffer.
enum class KeptUpTo { none, gelu_layernorm, block };

// Rows and columns in terms of N = B T, C, B, T, NH. Gradient tensors (d + name) are of one layer at a time.
// clang-format off
//    name       scope  type    rows     cols   kept up to
#define GPT2_ACTIVATIONS(X)                                        \
    X(encoded,   model, floatX, N,       C,     block)          \
    X(ln1,       layer, floatX, N,       C,     none)           \
    X(ln1_mean,  layer, float,  N,       1,     gelu_layernorm) \
    X(ln1_rstd,  layer, float,  N,       1,     gelu_layernorm) \
    X(qkv,       layer, floatX, N,       3 * C, gelu_layernorm) \
    X(atty,      layer, floatX, N,       C,     gelu_layernorm) \
    X(att_lse,   layer, float,  B * NH,  T,     gelu_layernorm) \
    X(residual2, layer, floatX, N,       C,     gelu_layernorm) \
    X(ln2,       layer, floatX, N,       C,     none)           \
    X(ln2_mean,  layer, float,  N,       1,     gelu_layernorm) \
    X(ln2_rstd,  layer, float,  N,       1,     gelu_layernorm) \
    X(fch,       layer, floatX, N,       4 * C, gelu_layernorm) \
    X(fch_gelu,  layer, floatX, N,       4 * C, none)           \
    X(residual3, layer, floatX, N,       C,     block)          \
    X(proj,      model, floatX, N,       C,     block)          \
    X(lnf,       model, floatX, N,       C,     block)          \
    X(lnf_mean,  model, float,  N,       1,     block)          \
    X(lnf_rstd,  model, float,  N,       1,     block)          \
    X(losses,    model, float,  N,       1,     block)          \
    X(dresidual, model, floatX, N,       C,     block)          \
    X(dnorm,     model, floatX, N,       C,     block)          \
    X(datty,     model, floatX, N,       C,     block)          \
    X(dqkv,      model, floatX, N,       3 * C, block)          \
    X(dfch,      model, floatX, N,       4 * C, block)
// clang-format on

// Pointers to every activation by name; those of scope layer point to one layer's.
struct Activations {
#define X(name, scope, type, rows, cols, kept) \
    type* name;                                \
    size_t name##_stride; /* elements to the next layer's; 0 where layers share it */
    GPT2_ACTIVATIONS(X)
#undef X

    // The same fields, those of scope layer moved from layer 0 to layer l.
    Activations layer(int l) const {
        Activations moved = *this;
#define X(name, scope, type, rows, cols, kept) moved.name += static_cast<size_t>(l) * name##_stride;
        GPT2_ACTIVATIONS(X)
#undef X
        return moved;
    }
};

// Where every activation lies in one arena of bytes; starts are multiples of 256 bytes.
class ActivationTable {
  public:
    ActivationTable(const ModelShape& shape, int batch, int seq_len, Recompute recompute) {
        const size_t B = batch, T = seq_len, N = B * T, C = shape.channels, NH = shape.heads;
        auto add = [&](Scope scope, size_t element_bytes, size_t n, KeptUpTo kept) {
            const bool each_layer =
                scope == Scope::layer && static_cast<int>(recompute) <= static_cast<int>(kept);
            const size_t stride = (n * element_bytes + 255) / 256 * 256;
            rows_.push_back({bytes_, each_layer ? stride / element_bytes : 0});
            bytes_ += stride * (each_layer ? shape.layers : 1);
        };
#define X(name, scope, type, rows, cols, kept) \
    add(Scope::scope, sizeof(type), size_t(rows) * size_t(cols), KeptUpTo::kept);
        GPT2_ACTIVATIONS(X)
#undef X
    }

    size_t bytes() const { return bytes_; }

    Activations view(unsigned char* arena) const {
        Activations a{};
        size_t row = 0;
#define X(name, scope, type, rows, cols, kept)                   \
    a.name = reinterpret_cast<type*>(arena + rows_[row].offset); \
    a.name##_stride = rows_[row++].stride;
        GPT2_ACTIVATIONS(X)
#undef X
        return a;
    }

  private:
    struct Row {
        size_t offset;  // bytes
        size_t stride;  // elements to the next layer's, 0 where layers share it
    };
    std::vector<Row> rows_;
    size_t bytes_ = 0;
};
