// Pretrains GPT-2. Options in, model built, the training loop; every kernel is in llmc/.
//
//     make train_gpt2 OPTIMIZER=adamw|sgd_sai      the optimizer is chosen when this is compiled
//     build/gpu-bf16-adamw/train_gpt2 --train-data 'data/shakespeare_gpt2/train_*.bin' --steps 300
#include <algorithm>
#include <cstdio>  // printf
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>
#include "llmc/checkpoint.h"        // load_shape, load_model, save_model
#include "llmc/dataloader.h"        // TrainLoader, ValLoader
#include "llmc/gpt2.cuh"            // Gpt2
#include "llmc/gpu.cuh"             // Gpu, kPrecisionName
#include "llmc/interrupt.h"         // catch_interrupts, interrupt_signal
#include "llmc/logger.h"            // Logger, record
#include "llmc/memory_plan.cuh"     // plan_memory, print_memory_plan, check_memory, optimizer_state_bytes
#include "llmc/optimizer.cuh"       // Optimizer
#include "llmc/options.h"           // Options, parse_options
#include "llmc/profile_report.cuh"  // measure_ceilings, profile_report
#include "llmc/sampler.h"           // sample_token
#include "llmc/schedule.h"          // scheduled_learning_rate
#include "llmc/screen.h"            // Screen
#include "llmc/tokenizer.h"         // Tokenizer
#include "llmc/trainer.cuh"         // Trainer

extern const char kBuildCommit[];  // build/commit.cpp

// This many updates skipped in a row are no accident: the run has diverged or its data is broken.
constexpr int kMaxSkippedInARow = 10;

// Of --profile: first updates, which make plans and graphs. Then come so many as in training, and as many
// timed.
constexpr int64_t kProfileWarmUp = 3;
static int64_t updates_of(const Options& o) {
    return o.profile > 0 ? kProfileWarmUp + 2 * o.profile : o.steps;
}

// ---- set-up ----------------------------------------------------------------------------------------------

// Where the weights come from, and the shape that follows: the flags, or the model of --init-from.
static Gpt2Config gpt2_config(Options& o) {
    int positions = o.seq_len;
    if (!o.init_from.empty()) {
        const ModelShape shape = load_shape(o.init_from);
        adopt_shape(o, shape);
        positions = shape.positions;
    }
    return {{o.layers, o.channels, o.heads, o.vocab_size, positions},
            o.batch_size,
            o.seq_len,
            recompute_of(o.recompute)};
}

static std::unique_ptr<ValLoader> val_loader(const Options& o) {
    if (o.val_data.empty()) return nullptr;
    return std::make_unique<ValLoader>(
        LoaderConfig{"--val-data", o.val_data, o.vocab_size, o.batch_size, o.seq_len}, o.val_sequences);
}

// The table beside the shards. Fatal where no sample could be written: better now than after a thousand
// steps.
static std::unique_ptr<Tokenizer> sample_tokenizer(const Options& o) {
    if (o.sample_every == 0) return nullptr;
    const std::string path = std::filesystem::path(o.train_data).replace_filename("tokenizer.bin").string();
    auto tokenizer = std::make_unique<Tokenizer>(path);
    if (tokenizer->vocab_size() > o.vocab_size)
        fatal("--sample-every: %s has %d tokens, the model %d; give --vocab-size %d", path.c_str(),
              tokenizer->vocab_size(), o.vocab_size, tokenizer->vocab_size());
    return tokenizer;
}

// Plans are measured while the GPU's memory is still free. A product that applies GELU itself applies it to
// the unrounded sum, which recomputing from the kept tensor can't repeat to the bit: --recompute
// gelu-layernorm goes without.
static Matmuls prepared_matmuls(const Options& o, const Gpt2Config& config, Gpu& gpu) {
    Matmuls matmuls(
        {.measure = o.tune, .fuse_gelu = o.tune && config.recompute != Recompute::gelu_layernorm});
    const int64_t tokens = static_cast<int64_t>(o.batch_size) * o.seq_len;
    matmuls.prepare({.tokens = tokens,
                     .logit_rows = logit_rows(tokens),
                     .channels = o.channels,
                     .padded_vocab_size = config.shape.padded_vocab_size(),
                     .accumulate = o.total_batch > tokens || tokens > logit_rows(tokens)},
                    gpu, [](const MatmulPlan& plan, size_t done, size_t all) {
                        printf("product %zu/%zu %s: %.0f us, best of %d (first %.0f)\n", done, all,
                               text_of_key(plan.key).c_str(), plan.us, plan.candidates, plan.first_us);
                        fflush(stdout);
                    });
    return matmuls;
}

// ---- a run -----------------------------------------------------------------------------------------------

// Everything that a run has, made in the order in which mistakes are cheapest to find: data and log before
// weights.
struct Run {
    const Options& o;
    Gpu& gpu;
    const Gpt2Config config;
    const Optimizer::Options optimizer_options = Optimizer::Options::from(o);
    std::unique_ptr<Tokenizer> tokenizer = sample_tokenizer(o);
    TrainLoader train_data{{"--train-data", o.train_data, o.vocab_size, o.batch_size, o.seq_len},
                           o.total_batch / o.seq_len,
                           static_cast<uint64_t>(o.seed),
                           o.shuffle};
    std::unique_ptr<ValLoader> val_data = val_loader(o);
    Logger logger{o.output_dir};
    const Ceilings ceilings = o.profile > 0 ? measure_ceilings(o.tune, gpu) : Ceilings{};
    Matmuls matmuls = prepared_matmuls(o, config, gpu);
    Gpt2 model{config, matmuls, gpu};
    Optimizer optimizer{optimizer_options, model.table.blocks(), gpu};
    Trainer trainer{model, optimizer, {train_data.micro_steps(), o.grad_clip, o.graph}, gpu};
    Screen screen{updates_of(o)};
    int64_t applied = 0, skipped_in_a_row = 0;
    bool diverged = false;  // too many skipped in a row
    std::string skip_text = "";
    std::vector<double> step_ms = {};

    void load_or_initialise();
    void log_head(Json run);
    void validate(int64_t step);
    void sample(int64_t step);
    void save(int64_t step);
    void tell(const StepResult& result);
    int profile();
    void tell_speed();
    int finish(int64_t step);
};

void Run::load_or_initialise() {
    if (o.init_from.empty()) return model.initialise_weights(static_cast<uint64_t>(o.seed));
    model.begin_loading();
    load_model(o.init_from, saved_tensors(model.table), [&](size_t tensor, const float* data_cpu, size_t n) {
        model.load_tensor(tensor, data_cpu, n);
    });
    model.finish_loading();
}

template <class Loader>
static Json data_json(const Loader& loader) {
    Json files = Json::array();
    for (const Shard& shard : loader.shards()) files.push(shard.path);
    return std::move(Json::object().add("files", files).add("tokens", loader.tokens()));
}

// The `run` and `memory` records: all that explains what follows.
void Run::log_head(Json run) {
    int runtime = 0, driver = 0;
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    const double peak = gpu.peak_bf16_flops();
    const cudaDeviceProp& p = gpu.properties;
    run.add("gpu", Json::object()
                       .add("name", p.name)
                       .add("memory_bytes", p.totalGlobalMem)
                       .add("sms", p.multiProcessorCount)
                       .add("compute_capability", text_of("%d.%d", p.major, p.minor))
                       .add("peak_bf16_tflops", peak > 0 ? Json(peak * 1e-12) : Json()));
    run.add("cuda_runtime", runtime).add("cuda_driver", driver).add("cublaslt", cublasLtGetVersion());
    const ModelShape& s = config.shape;
    run.add("model", Json::object()
                         .add("layers", s.layers)
                         .add("channels", s.channels)
                         .add("heads", s.heads)
                         .add("vocab_size", s.vocab_size)
                         .add("padded_vocab_size", s.padded_vocab_size())
                         .add("positions", s.positions)
                         .add("seq_len", o.seq_len));
    run.add("parameters", model.table.parameters()).add("padded_parameters", model.table.padded_parameters());
    Json data = Json::object().add("train", data_json(train_data));
    run.add("data", data.add("val", val_data ? data_json(*val_data) : Json()));
    Json plans = Json::array();
    for (const std::string& line : matmuls.record()) plans.push(line);
    logger.write(run.add("plans", plans));
    for (const MemoryOwner& owner :
         plan_memory(config, optimizer_state_bytes(model.table, optimizer_options), gpu))
        logger.write(record("memory").add("owner", owner.name).add("bytes", owner.bytes));
}

// Mean loss in nats over the validation sequences; the same ones every time.
void Run::validate(int64_t step) {
    const float token_weight =
        1.0f / (static_cast<float>(val_data->samples()) * static_cast<float>(o.seq_len));
    val_data->rewind();
    for (int64_t batch = 0; batch < val_data->batches(); batch++) {
        const int64_t sequences = val_data->next(model.staging());
        model.upload();
        model.validate(static_cast<int>(sequences), batch == 0 ? Write::Assign : Write::Add, token_weight);
    }
    float loss_cpu = 0;
    copy_to_host(&loss_cpu, model.loss(), 1, gpu);
    gpu.synchronize();
    logger.write(record("val").add("step", step).add("loss", short_decimal(loss_cpu)));
    screen.message("step %lld validation loss %.4f", static_cast<long long>(step), loss_cpu);
}

// Text that the model writes after an end-of-text: kSampleTokens tokens, fewer where it ends by itself.
void Run::sample(int64_t step) {
    std::vector<int32_t> tokens = {tokenizer->end_of_text()};
    std::vector<floatX> row(config.shape.padded_vocab_size());
    std::vector<float> logits_cpu(row.size());
    for (int i = 0; i < kSampleTokens; i++) {
        model.next_token_logits(std::span(tokens).last(std::min<size_t>(tokens.size(), o.seq_len)));
        copy_to_host(row.data(), model.logits(), row.size(), gpu);
        gpu.synchronize();
        std::transform(row.begin(), row.end(), logits_cpu.begin(),
                       [](floatX x) { return static_cast<float>(x); });
        const int token =
            sample_token(logits_cpu.data(), tokenizer->vocab_size(), {}, static_cast<uint64_t>(o.seed), i);
        if (token < 0 || token == tokenizer->end_of_text()) break;
        tokens.push_back(token);
    }
    const std::string text = printable_utf8(tokenizer->decode(std::span(tokens).subspan(1)));
    logger.write(record("sample").add("step", step).add("text", text));
    screen.message("step %lld sample:\n%s", static_cast<long long>(step), text.c_str());
}

void Run::save(int64_t step) {
    const std::string path = save_model(o.output_dir, step, config.shape, saved_tensors(model.table),
                                        [&](float* out_cpu, size_t tensor, size_t first, size_t count) {
                                            model.read_tensor(out_cpu, tensor, first, count);
                                        });
    logger.write(record("checkpoint").add("step", step).add("path", path));
    screen.message("saved %s", path.c_str());
}

// What an update did, to log and screen. The optimizer hears of it too: SGD-SaI reports its gains once.
void Run::tell(const StepResult& result) {
    const StepState& state = result.state;
    if (!state.apply()) {
        skipped_in_a_row++;
        diverged = diverged || skipped_in_a_row >= kMaxSkippedInARow;
        skip_text = skip_reason(state.skip);
        logger.write(record("skip").add("step", result.step).add("reason", skip_text));
        screen.message("step %lld skipped: %s", static_cast<long long>(result.step), skip_text.c_str());
        return;
    }
    applied++, skipped_in_a_row = 0;
    if (const std::optional<GainReport> gains = optimizer.observe(state, gpu)) {
        for (const GainRow& row : gains->rows)
            logger.write(record("gsnr")
                             .add("tensor", row.tensor)
                             .add("n", row.n)
                             .add("gsnr", short_decimal(row.gsnr))
                             .add("gain", short_decimal(row.gain)));
        screen.message("%s", gain_table(*gains).c_str());
    }
    const StepReport report{
        .step = result.step,
        .tokens = result.step * o.total_batch,
        .loss = state.loss,
        .grad_norm = static_cast<float>(state.grad_norm),
        .learning_rate = scheduled_learning_rate(o, result.step),
        .step_ms = result.step_ms,
        .optimizer_ms = result.optimizer_ms,
        .tokens_per_second = static_cast<double>(o.total_batch) / (result.step_ms * 1e-3)};
    logger.write(train_record(report));
    screen.step(report);
    step_ms.push_back(result.step_ms);
}

// The updates of --profile, then its table. The model is not saved. Returns the program's exit status.
int Run::profile() {
    const int64_t first_timed = kProfileWarmUp + o.profile + 1, last = updates_of(o);
    std::vector<double> trained_ms, profiled_ms;
    auto take = [&](const std::optional<StepResult>& result) {
        if (!result) return;
        tell(*result);
        if (result->step > kProfileWarmUp)
            (result->step < first_timed ? trained_ms : profiled_ms).push_back(result->step_ms);
    };
    for (int64_t step = 1; step <= last; step++) {
        if (step == first_timed) take(trainer.flush()), model.profile.start();
        take(trainer.step(step, scheduled_learning_rate(o, std::min(step, o.steps)), train_data));
    }
    take(trainer.flush());
    const ProfileReport report =
        profile_report(model, matmuls, ceilings,
                       {.micro_steps = train_data.micro_steps(),
                        .state_bytes = optimizer_state_bytes(model.table, optimizer_options),
                        .graph = o.graph,
                        .trained_ms = trained_ms,
                        .profiled_ms = profiled_ms},
                       gpu);
    logger.write(profile_record(report));
    logger.write(record("end").add("step", last).add("status", "profiled"));
    screen.message("%s", profile_table(report).c_str());
    return 0;
}

// The median update's time and speed and, where the GPU's peak is known, the MFU.
void Run::tell_speed() {
    if (step_ms.empty()) return;
    std::nth_element(step_ms.begin(), step_ms.begin() + step_ms.size() / 2, step_ms.end());
    const double ms = step_ms[step_ms.size() / 2],
                 tokens_per_second = static_cast<double>(o.total_batch) / (ms * 1e-3);
    const double peak = gpu.peak_bf16_flops();
    std::string mfu;
    if (peak > 0)
        mfu = text_of(", MFU %.1f%% of %.0f TFLOP/s by 6 N + 6 L C T",
                      100 * tokens_per_second * model.model_flops_per_token() / peak, peak * 1e-12);
    screen.message("median update %.1f ms, %s tokens/s%s", ms, short_count(tokens_per_second).c_str(),
                   mfu.c_str());
}

// The last records, and the program's exit status. A run that diverged, or applied nothing, fails; its
// weights, which are those of the last applied update, are saved all the same. So are those of a run that a
// signal ended.
int Run::finish(int64_t step) {
    save(step);
    tell_speed();
    const int signal = step < o.steps && !diverged ? interrupt_signal() : 0;
    const bool failed = diverged || (applied == 0 && signal == 0);
    logger.write(record("end")
                     .add("step", step)
                     .add("status", failed   ? "diverged"
                                    : signal ? "interrupted"
                                             : "finished"));
    if (signal)
        screen.message("interrupted at step %lld of %lld", static_cast<long long>(step),
                       static_cast<long long>(o.steps));
    if (signal) return 128 + signal;
    if (failed)
        fatal(
            "step %lld: %lld updates in a row were skipped, the last since %s; the weights of the last "
            "applied update "
            "are saved; a lower --learning-rate or --grad-clip, or a longer warm-up, may help",
            static_cast<long long>(step), static_cast<long long>(skipped_in_a_row), skip_text.c_str());
    return 0;
}

int main(int argc, char** argv) {
    Options o = parse_options(argc, argv, {Optimizer::kAxisName, kPrecisionName, BUILD_DEVICE});
    const Gpt2Config config = gpt2_config(o);
    Gpu gpu;
    print_options(o);
    print_memory_plan(config, Optimizer::Options::from(o), gpu);
    if (o.dry_run) return 0;
    check_memory(config, Optimizer::Options::from(o), gpu);

    Run run{o, gpu, config};
    run.load_or_initialise();
    run.log_head(run_record(argc, argv, o, kBuildCommit));
    catch_interrupts();
    if (o.profile > 0) return run.profile();

    int64_t step = 0;  // updates done
    for (;; step++) {
        const bool last = step == o.steps, stop = last || run.diverged || interrupt_signal();
        const bool validate = run.val_data && (last || (o.val_every > 0 && step % o.val_every == 0));
        const bool sample = run.tokenizer && (last || (step > 0 && step % o.sample_every == 0));

        // Once in a while: look at the model. What the last update did is told first, so that the log is in
        // order.
        if (validate || sample || stop)
            if (const auto result = run.trainer.flush()) run.tell(*result);
        if (validate) run.validate(step);
        if (sample) run.sample(step);
        if (stop) break;

        // An update goes onto the GPU's stream; by then it is known what the one before did.
        const double learning_rate = scheduled_learning_rate(o, step + 1);
        if (const auto result = run.trainer.step(step + 1, learning_rate, run.train_data)) run.tell(*result);
    }
    return run.finish(step);
}
