// GPT-2: parameters, activations, forward, backward, update. No kernel is written here; it reads like the
// architecture.
//
//     x_0     = wte[token] + wpe[t]
//     x'_l    = x_l  + proj(attention(layernorm_1(x_l)))
//     x_{l+1} = x'_l + proj(gelu(fc(layernorm_2(x'_l))))         l = 0 .. L - 1
//     logits  = layernorm_f(x_L) wte^T,   loss = -log softmax(logits)[target], the mean of an update's tokens
//
// A residual sum and the layernorm that follows it are one kernel, so the norm that opens block l + 1 is
// computed at the end of block l. Source: Radford et al. 2019, "Language models are unsupervised multitask
// learners", section 2.3.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>
#include "llmc/activations.cuh"         // Activations, ActivationTable, Recompute
#include "llmc/attention_backward.cuh"  // attention_backward
#include "llmc/attention_forward.cuh"   // attention_forward
#include "llmc/classifier.cuh"          // classifier, loss_mean
#include "llmc/dataloader.h"            // Batch
#include "llmc/embedding.cuh"           // embedding_forward, embedding_backward
#include "llmc/gelu.cuh"                // gelu_forward, gelu_backward
#include "llmc/initialise.cuh"          // initialise, round_weights
#include "llmc/layernorm.cuh"           // layernorm_forward, residual_layernorm_forward, layernorm_backward
#include "llmc/matmul.cuh"              // Matmuls, bias_backward
#include "llmc/profile.h"               // Profile, Group
#include "llmc/tensors.h"               // TensorTable, Parameters

// What a Gpt2 is built for. Sequences of at most seq_len tokens, batch_size of them in a micro-step.
struct Gpt2Config {
    ModelShape shape;
    int batch_size, seq_len;
    Recompute recompute = Recompute::none;
};

// Rows of logits that exist at once: at 16K rows the head's products still run at full speed, and V = 50304
// columns of bf16 take 1.5 GiB instead of 6.1 at 64K tokens.
inline constexpr int64_t kMaxLogitRows = 16384;

inline int64_t logit_rows(int64_t rows) { return ceil_div(rows, ceil_div(rows, kMaxLogitRows)); }

class Gpt2 {
  public:
    TensorTable table;
    ActivationTable activation_table;
    Gpt2Config config;

    // Elements of the buffer of logits, which holds a chunk of rows.
    static size_t logits_elements(const Gpt2Config& c) {
        const int64_t rows = logit_rows(static_cast<int64_t>(c.batch_size) * c.seq_len);
        return static_cast<size_t>(rows) * c.shape.padded_vocab_size();
    }

    // Floats of scratch: kernels use it one after the other, so the hungriest decides.
    static size_t scratch_floats(const Gpt2Config& c, const Gpu& gpu) {
        const int B = c.batch_size, T = c.seq_len, C = c.shape.channels, N = B * T;
        return std::max({embedding_backward_scratch_floats(N, C),
                         layernorm_backward_scratch_floats(N, C, gpu), bias_backward_scratch_floats(N, 4 * C),
                         attention_backward_scratch_floats(B, T, c.shape.heads, gpu)});
    }

    // Everything is allocated here; weights are undefined until initialise() or load_tensor() of every block.
    Gpt2(const Gpt2Config& config_, Matmuls& matmuls, Gpu& gpu)
        : table(config_.shape),
          activation_table(config_.shape, config_.batch_size, config_.seq_len, config_.recompute),
          config(config_),
          gpu_(gpu),
          matmuls_(matmuls),
          weights_(table.padded_parameters()),
          master_(kOneArena ? 0 : table.padded_parameters()),
          gradients_(table.padded_parameters()),
          activations_(activation_table.bytes()),
          logits_(logits_elements(config_)),
          scratch_(scratch_floats(config_, gpu_)),
          tokens_(3 * max_tokens()),
          staging_(2 * 3 * max_tokens()),
          loss_(1) {
        for (cudaEvent_t& event : staged_)
            CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        weights = table.view(weights_.get());
        gradients = table.view(gradients_.get());
        act = activation_table.view(activations_.get());
    }
    Gpt2(const Gpt2&) = delete;
    ~Gpt2() {
        for (cudaEvent_t event : staged_) cudaEventDestroy(event);
    }

    // 6 N + 6 L C T, what MFU counts.
    double model_flops_per_token() const {
        return 6.0 * static_cast<double>(table.parameters()) +
               6.0 * shape().layers * static_cast<double>(shape().channels) * config.seq_len;
    }

    // ---- arenas, for the optimizer, checkpoints and tests; Np elements each ------------------------------

    floatX* weights_arena() { return weights_.get(); }
    float* master_arena() { return kOneArena ? reinterpret_cast<float*>(weights_.get()) : master_.get(); }
    float* gradients_arena() { return gradients_.get(); }
    const float* loss() const { return loss_.get(); }
    const floatX* logits() const { return logits_.get(); }

    // ---- weights -----------------------------------------------------------------------------------------

    void initialise_weights(uint64_t seed) { initialise(weights_.get(), master_arena(), table, seed, gpu_); }

    // Pads zero; then load_tensor() once for every block, then finish_loading().
    void begin_loading() { fill_zero(master_arena(), table.padded_parameters(), gpu_); }
    void load_tensor(size_t block, const float* data_cpu, size_t n) {
        copy_to_device(master_arena() + table.blocks()[block].offset, data_cpu, n, gpu_);
        gpu_.synchronize();  // data_cpu is lent for the call
    }
    void finish_loading() {
        if constexpr (!kOneArena)
            round_weights(weights_.get(), master_.get(), table.padded_parameters(), gpu_);
    }
    // out_cpu (count) = master weights first .. first + count of a block. Synchronous.
    void read_tensor(float* out_cpu, size_t block, size_t first, size_t count) {
        copy_to_host(out_cpu, master_arena() + table.blocks()[block].offset + first, count, gpu_);
        gpu_.synchronize();
    }

    // ---- a micro-step ------------------------------------------------------------------------------------

    // Pinned memory for the next batch, (B, T) each; waits until the copy before the last has left it. A
    // loader fills it, then upload() sends it: inputs, targets, and the positions sorted by input token
    // (sort_positions()).
    Batch staging() {
        turn_ ^= 1;
        CUDA_CHECK(cudaEventSynchronize(staged_[turn_]));
        const size_t N = max_tokens();
        const std::span<int32_t> all(staging_.get() + turn_ * 3 * N, 3 * N);
        return {all.subspan(0, N), all.subspan(N, N), all.subspan(2 * N, N)};
    }

    // Copies what staging() gave to the device. Async.
    void upload() {
        const size_t n = 3 * max_tokens();
        copy_to_device(tokens_.get(), staging_.get() + turn_ * n, n, range(Upload));
        CUDA_CHECK(cudaEventRecord(staged_[turn_], gpu_.stream));
    }

    // Forward and backward of the uploaded batch. Gradients and loss = (Write::Assign, an update's first
    // micro-step) or += what this batch gives, each token counting `token_weight` (1 over the tokens of the
    // update). Async.
    void micro_step(Write write, float token_weight) {
        forward(config.batch_size);
        head(write, token_weight);
        backward(write);
    }

    // loss = or += token_weight * (summed loss of the first `sequences` sequences of the uploaded batch).
    // Async.
    void validate(int sequences, Write write, float token_weight) {
        forward(config.batch_size);
        const int64_t rows = static_cast<int64_t>(sequences) * config.seq_len;
        for_logit_chunks(
            rows, [&](int64_t first, int64_t n) { classify(first, n, 0.0f, ClassifierMode::LossOnly); });
        loss_mean(loss_.get(), act.losses, static_cast<int>(rows), token_weight, write, range(Classifier));
    }

    // A product is a line or two here, with its operands side by side.
    // clang-format off

    // logits() (Vp) = those that follow tokens_cpu, one sequence of at most seq_len tokens. Async.
    void next_token_logits(std::span<const int32_t> tokens_cpu) {
        const Batch batch = staging();
        std::fill(batch.tokens.begin(), batch.tokens.end(), 0);  // what comes later, attention does not see
        std::copy(tokens_cpu.begin(), tokens_cpu.end(), batch.tokens.begin());
        upload();
        forward(1);
        const size_t last = tokens_cpu.size() - 1;
        matmuls_.head_forward({.out = logits_.get(), .inp = act.lnf + last * shape().channels,
                               .weight = weights.wte, .N = 1, .C = shape().channels, .OC = Vp()},
                              range(HeadGemms));
    }

    Parameters<floatX> weights{};
    Parameters<float> gradients{};  // of the update so far, summed over its micro-steps
    Activations act{};
    Profile profile;  // of everything here and of the update

  private:
    static constexpr bool kOneArena = std::is_same_v<floatX, float>;  // fp32: weights are their own master

    const ModelShape& shape() const { return config.shape; }
    int Vp() const { return shape().padded_vocab_size(); }
    using enum Group;
    Profile::Range range(Group group) { return profile.range(group, gpu_); }  // passed on as the Gpu

    // ---- forward -----------------------------------------------------------------------------------------

    // The residual stream that enters block l, (B, T, C).
    const floatX* block_input(int l) const { return l == 0 ? act.encoded : act.layer(l - 1).residual3; }

    // act.lnf (B, T, C) = everything before the head, for the first B sequences of the batch.
    void forward(int B) {
        const int T = config.seq_len, C = shape().channels, N = B * T, L = shape().layers;
        embedding_forward(act.encoded, tokens_.get(), weights.wte, weights.wpe, B, T, C, range(Embedding));
        const Activations first = act.layer(0);
        const Parameters<floatX> w0 = weights.layer(0);
        layernorm_forward(first.ln1, first.ln1_mean, first.ln1_rstd, act.encoded, w0.ln1w, w0.ln1b, N, C,
                          range(Layernorm));
        for (int l = 0; l < L; l++) {
            const Activations a = act.layer(l);
            const Parameters<floatX> w = weights.layer(l);
            block_forward(l, B);
            matmuls_.forward({.out = act.proj, .inp = a.fch_gelu, .weight = w.fcprojw, .bias = w.fcprojb,
                              .N = N, .C = 4 * C, .OC = C}, range(BlockGemms));
            if (l + 1 < L) {
                const Activations next = act.layer(l + 1);
                const Parameters<floatX> wn = weights.layer(l + 1);
                residual_layernorm_forward(a.residual3, next.ln1, next.ln1_mean, next.ln1_rstd, a.residual2,
                                           act.proj, wn.ln1w, wn.ln1b, N, C, range(Layernorm));
            } else {
                residual_layernorm_forward(a.residual3, act.lnf, act.lnf_mean, act.lnf_rstd, a.residual2,
                                           act.proj, weights.lnfw, weights.lnfb, N, C, range(Layernorm));
            }
        }
    }

    // From ln1 to fch_gelu: what a block computes but for its last product.
    void block_forward(int l, int B) {
        const int T = config.seq_len, C = shape().channels, N = B * T, NH = shape().heads;
        const Activations a = act.layer(l);
        const Parameters<floatX> w = weights.layer(l);
        matmuls_.forward({.out = a.qkv, .inp = a.ln1, .weight = w.qkvw, .bias = w.qkvb,
                          .N = N, .C = C, .OC = 3 * C}, range(BlockGemms));
        attention_forward(a.atty, a.att_lse, a.qkv, B, T, NH, range(AttentionForward));
        matmuls_.forward({.out = act.proj, .inp = a.atty, .weight = w.attprojw, .bias = w.attprojb,
                          .N = N, .C = C, .OC = C}, range(BlockGemms));
        residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, block_input(l), act.proj,
                                   w.ln2w, w.ln2b, N, C, range(Layernorm));
        matmuls_.forward_gelu({.out = a.fch_gelu, .pre_gelu = a.fch, .inp = a.ln2, .weight = w.fcw,
                               .bias = w.fcb, .N = N, .C = C, .OC = 4 * C}, range(BlockGemms));
    }

    // ---- head --------------------------------------------------------------------------------------------

    // Calls f(first, rows) for chunks of rows whose logits fit the buffer.
    template <class F>
    void for_logit_chunks(int64_t rows, F f) {
        const int64_t chunk = logit_rows(max_tokens());
        for (int64_t first = 0; first < rows; first += chunk) f(first, std::min(chunk, rows - first));
    }

    // losses of the chunk =; logits of the chunk become their gradient, each token weighing token_weight, if
    // wanted.
    void classify(int64_t first, int64_t rows, float token_weight, ClassifierMode mode) {
        const int n = static_cast<int>(rows);
        matmuls_.head_forward({.out = logits_.get(), .inp = act.lnf + first * shape().channels,
                               .weight = weights.wte, .N = n, .C = shape().channels, .OC = Vp()},
                              range(HeadGemms));
        classifier(logits_.get(), act.losses + first, targets() + first, token_weight, n, shape().vocab_size,
                   Vp(), mode, range(Classifier));
    }

    // act.dnorm = gradient of act.lnf; gradients.wte = or +=; loss = or +=.
    void head(Write write, float token_weight) {
        const int C = shape().channels;
        for_logit_chunks(max_tokens(), [&](int64_t first, int64_t rows) {
            const int n = static_cast<int>(rows);
            classify(first, rows, token_weight, ClassifierMode::LossAndGradient);
            matmuls_.head_dgrad({.dinp = act.dnorm + first * C, .dout = logits_.get(), .weight = weights.wte,
                                 .N = n, .C = C, .OC = Vp()}, range(HeadGemms));
            matmuls_.head_wgrad({.dweight = gradients.wte, .inp = act.lnf + first * C, .dout = logits_.get(),
                                 .N = n, .C = C, .OC = Vp(), .write = first == 0 ? write : Write::Add},
                                range(HeadGemms));
        });
        loss_mean(loss_.get(), act.losses, static_cast<int>(max_tokens()), token_weight, write,
                  range(Classifier));
    }

    // ---- backward ----------------------------------------------------------------------------------------

    // All gradients = or += from act.dnorm; those of the residual stream pass through act.dresidual.
    void backward(Write write) {
        const int B = config.batch_size, T = config.seq_len, C = shape().channels, L = shape().layers;
        const int N = B * T;
        // The bias of a projection onto the residual stream has that stream's gradient summed over its rows;
        // the layernorm that completes the gradient sums it on the way.
        layernorm_backward(act.dresidual, {gradients.lnfw, gradients.lnfb, gradients.layer(L - 1).fcprojb},
                           scratch_.get(), act.dnorm, act.layer(L - 1).residual3, weights.lnfw, act.lnf_mean,
                           act.lnf_rstd, N, C, Write::Assign, write, range(Layernorm));
        for (int l = L - 1; l >= 0; l--) {
            recompute(l);
            mlp_backward(l, write);
            attention_block_backward(l, write);
        }
        embedding_backward(gradients.wte, gradients.wpe, scratch_.get(), act.dresidual, tokens_.get(),
                           order(), B, T, shape().positions, C, write, range(Embedding));
    }

    // Brings back what the forward pass of block l did not keep, by the same kernels, so to the same bits.
    void recompute(int l) {
        const int C = shape().channels, N = static_cast<int>(max_tokens());
        const Activations a = act.layer(l);
        const Parameters<floatX> w = weights.layer(l);
        if (config.recompute == Recompute::none) return;
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, block_input(l), w.ln1w, w.ln1b, N, C,
                          range(Layernorm));
        if (config.recompute == Recompute::block) {
            block_forward(l, config.batch_size);
        } else {
            layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln2w, w.ln2b, N, C,
                              range(Layernorm));
            gelu_forward(a.fch_gelu, a.fch, static_cast<size_t>(N) * 4 * C, range(Gelu));
        }
    }

    // Through the second half of block l: dresidual, the gradient of residual3, becomes that of residual2.
    void mlp_backward(int l, Write write) {
        const int C = shape().channels, N = static_cast<int>(max_tokens());
        const Activations a = act.layer(l);
        const Parameters<floatX> w = weights.layer(l);
        const Parameters<float> d = gradients.layer(l);
        matmuls_.dgrad_gelu({.dinp = act.dfch, .pre_gelu = a.fch, .dout = act.dresidual, .weight = w.fcprojw,
                             .N = N, .C = 4 * C, .OC = C}, range(BlockGemms));
        matmuls_.wgrad({.dweight = d.fcprojw, .inp = a.fch_gelu, .dout = act.dresidual,
                        .N = N, .C = 4 * C, .OC = C, .write = write}, range(BlockGemms));
        matmuls_.dgrad({.dinp = act.dnorm, .dout = act.dfch, .weight = w.fcw,
                        .N = N, .C = C, .OC = 4 * C}, range(BlockGemms));
        matmuls_.wgrad({.dweight = d.fcw, .inp = a.ln2, .dout = act.dfch, .N = N, .C = C, .OC = 4 * C,
                        .write = write, .dbias = d.fcb, .scratch = scratch_.get()}, range(BlockGemms));
        layernorm_backward(act.dresidual, {d.ln2w, d.ln2b, d.attprojb}, scratch_.get(), act.dnorm,
                           a.residual2, w.ln2w, a.ln2_mean, a.ln2_rstd, N, C, Write::Add, write,
                           range(Layernorm));
    }

    // Through the first half of block l: dresidual, the gradient of residual2, becomes that of the block's
    // input.
    void attention_block_backward(int l, Write write) {
        const int B = config.batch_size, T = config.seq_len, C = shape().channels, NH = shape().heads;
        const int N = B * T;
        const Activations a = act.layer(l);
        const Parameters<floatX> w = weights.layer(l);
        const Parameters<float> d = gradients.layer(l);
        matmuls_.dgrad({.dinp = act.datty, .dout = act.dresidual, .weight = w.attprojw,
                        .N = N, .C = C, .OC = C}, range(BlockGemms));
        matmuls_.wgrad({.dweight = d.attprojw, .inp = a.atty, .dout = act.dresidual,
                        .N = N, .C = C, .OC = C, .write = write}, range(BlockGemms));
        attention_backward(act.dqkv, d.qkvb, scratch_.get(), act.datty, a.atty, a.qkv, a.att_lse, B, T, NH,
                           write, range(AttentionBackward));
        matmuls_.dgrad({.dinp = act.dnorm, .dout = act.dqkv, .weight = w.qkvw,
                        .N = N, .C = C, .OC = 3 * C}, range(BlockGemms));
        matmuls_.wgrad({.dweight = d.qkvw, .inp = a.ln1, .dout = act.dqkv,
                        .N = N, .C = C, .OC = 3 * C, .write = write}, range(BlockGemms));
        float* projection_bias = l > 0 ? gradients.layer(l - 1).fcprojb : nullptr;  // wte and wpe have none
        layernorm_backward(act.dresidual, {d.ln1w, d.ln1b, projection_bias}, scratch_.get(), act.dnorm,
                           block_input(l), w.ln1w, a.ln1_mean, a.ln1_rstd, N, C, Write::Add, write,
                           range(Layernorm));
    }

    // clang-format on
    // ---- what is owned ------------------------------------------------------------------------------------

    size_t max_tokens() const { return static_cast<size_t>(config.batch_size) * config.seq_len; }
    const int* targets() const { return tokens_.get() + max_tokens(); }
    const int* order() const { return tokens_.get() + 2 * max_tokens(); }

    Gpu& gpu_;
    Matmuls& matmuls_;
    DeviceBuffer<floatX> weights_;
    DeviceBuffer<float> master_, gradients_;
    DeviceBuffer<unsigned char> activations_;
    DeviceBuffer<floatX> logits_;
    DeviceBuffer<float> scratch_;
    DeviceBuffer<int> tokens_;   // inputs, targets, order: (B, T) each
    PinnedBuffer<int> staging_;  // two turns of the same
    cudaEvent_t staged_[2];
    size_t turn_ = 0;
    DeviceBuffer<float> loss_;
};
