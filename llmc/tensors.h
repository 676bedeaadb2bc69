// The tensors of GPT-2, declared once: a row a tensor. Allocation, initialisation, weight decay, checkpoints,
// g-SNR blocks, gradient tests and the memory report are loops over these tables.
//
// Host only: no kernel, no CUDA call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>
#include "llmc/shape.h"  // ModelShape

// ---- parameters ------------------------------------------------------------------------------------------

enum class Scope { model, layer };
enum class Init { zeros, ones, normal, residual };  // normal: std 0.02; residual: 0.02 / sqrt(2 L)

// Matrices are stored (in, out), as Hugging Face's GPT-2 stores them; the head is wte. Decay goes to the
// tensors of two dimensions. The order is the arena's but for the layers, which lie between wpe and lnfw, one
// after the other.
// clang-format off
//    name      Hugging Face's name    scope  rows  cols    decay  init
#define GPT2_PARAMETERS(X)                                              \
    X(wte,      "wte.weight",           model, Vp, C,       true,  normal)   \
    X(wpe,      "wpe.weight",           model, P,  C,       true,  normal)   \
    X(ln1w,     "ln_1.weight",          layer, 1,  C,       false, ones)     \
    X(ln1b,     "ln_1.bias",            layer, 1,  C,       false, zeros)    \
    X(qkvw,     "attn.c_attn.weight",   layer, C,  3 * C,   true,  normal)   \
    X(qkvb,     "attn.c_attn.bias",     layer, 1,  3 * C,   false, zeros)    \
    X(attprojw, "attn.c_proj.weight",   layer, C,  C,       true,  residual) \
    X(attprojb, "attn.c_proj.bias",     layer, 1,  C,       false, zeros)    \
    X(ln2w,     "ln_2.weight",          layer, 1,  C,       false, ones)     \
    X(ln2b,     "ln_2.bias",            layer, 1,  C,       false, zeros)    \
    X(fcw,      "mlp.c_fc.weight",      layer, C,  4 * C,   true,  normal)   \
    X(fcb,      "mlp.c_fc.bias",        layer, 1,  4 * C,   false, zeros)    \
    X(fcprojw,  "mlp.c_proj.weight",    layer, 4 * C, C,    true,  residual) \
    X(fcprojb,  "mlp.c_proj.bias",      layer, 1,  C,       false, zeros)    \
    X(lnfw,     "ln_f.weight",          model, 1,  C,       false, ones)     \
    X(lnfb,     "ln_f.bias",            model, 1,  C,       false, zeros)
// clang-format on

// One tensor of one layer: the unit of weight decay, of g-SNR, and of a checkpoint.
struct TensorBlock {
    const char* name;     // the field's name, "qkvw"
    std::string hf_name;  // "transformer.h.3.attn.c_attn.weight"
    int layer;            // -1 for the model's own
    int type;             // row of GPT2_PARAMETERS
    Init init;
    bool decay;
    size_t rows, cols;  // real ones, without pads; rows is 1 for vectors
    size_t offset;      // first element in the arena
    size_t n;           // rows * cols
    size_t padded;      // elements that it takes in the arena
};

// Pointers to every tensor by name, over one arena of T; those of scope layer point to one layer's.
template <class T>
struct Parameters {
#define X(name, hf, scope, rows, cols, decay, init) T* name;
    GPT2_PARAMETERS(X)
#undef X
    size_t layer_stride;  // elements from a layer's tensor to the next layer's

    // The same fields, those of scope layer moved from layer 0 to layer l.
    Parameters layer(int l) const {
        Parameters moved = *this;
#define X(name, hf, scope, rows, cols, decay, init) \
    if (Scope::scope == Scope::layer) moved.name += static_cast<size_t>(l) * layer_stride;
        GPT2_PARAMETERS(X)
#undef X
        return moved;
    }
};

// A run of elements of one block: the unit of the multi-tensor kernels, one CUDA block each. Pads lie in no
// chunk.
struct Chunk {
    uint64_t begin;  // arena element, a multiple of 64
    uint32_t count;  // a multiple of 64
    uint32_t block;  // TensorBlock it belongs to
};

// Where every parameter lies. Arena order: wte, wpe, layer 0's tensors, layer 1's, ..., lnfw, lnfb; no gaps
// but the pad rows of wte, since all sizes are multiples of 64.
class TensorTable {
  public:
    explicit TensorTable(const ModelShape& shape) : shape_(shape) {
        struct Row {
            const char *name, *hf_name;
            Scope scope;
            size_t rows, cols, padded_rows;
            bool decay;
            Init init;
        };
        auto rows_with = [&](size_t Vp) {
            const size_t C = shape.channels, P = shape.positions;
            std::vector<Row> rows_of_table;
#define X(name, hf, scope, rows, cols, decay, init) \
    rows_of_table.push_back({#name, hf, Scope::scope, size_t(rows), size_t(cols), 0, decay, Init::init});
            GPT2_PARAMETERS(X)
#undef X
            return rows_of_table;
        };
        std::vector<Row> table = rows_with(shape.vocab_size), padded = rows_with(shape.padded_vocab_size());
        auto add = [&](size_t type, int layer) {
            const Row& row = table[type];
            std::string prefix = layer < 0 ? "transformer." : "transformer.h." + std::to_string(layer) + ".";
            size_t taken = padded[type].rows * row.cols;
            blocks_.push_back({row.name, prefix + row.hf_name, layer, static_cast<int>(type), row.init,
                               row.decay, row.rows, row.cols, padded_parameters_, row.rows * row.cols,
                               taken});
            padded_parameters_ += taken;
            parameters_ += row.rows * row.cols;
        };
        size_t first_layer = 0, after_layers = table.size();
        while (table[first_layer].scope == Scope::model) first_layer++;
        while (table[after_layers - 1].scope == Scope::model) after_layers--;
        for (size_t type = 0; type < first_layer; type++) add(type, -1);
        for (int l = 0; l < shape.layers; l++)
            for (size_t type = first_layer; type < after_layers; type++) add(type, l);
        for (size_t type = after_layers; type < table.size(); type++) add(type, -1);
    }

    const ModelShape& shape() const { return shape_; }
    const std::vector<TensorBlock>& blocks() const { return blocks_; }
    size_t parameters() const { return parameters_; }                // N: real ones, the tied head once
    size_t padded_parameters() const { return padded_parameters_; }  // Np: elements of an arena

    // Typed pointers into an arena of padded_parameters() elements.
    template <class T>
    Parameters<T> view(T* arena) const {
        Parameters<T> p{};
        size_t first = 0;  // block of each tensor's first layer: types come in the table's order
        p.layer_stride = 0;
        auto offset_of = [&](const char* name) {
            for (first = 0; std::string(blocks_[first].name) != name;) first++;
            return blocks_[first].offset;
        };
#define X(name, hf, scope, rows, cols, decay, init) \
    p.name = arena + offset_of(#name);              \
    if (Scope::scope == Scope::layer) p.layer_stride += blocks_[first].padded;
        GPT2_PARAMETERS(X)
#undef X
        return p;
    }

  private:
    ModelShape shape_;
    std::vector<TensorBlock> blocks_;
    size_t parameters_ = 0, padded_parameters_ = 0;
};
