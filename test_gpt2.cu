// The whole model against an independent one: PyTorch and transformers in double precision (dev/reference/).
//
//     build/sim-fp32-adamw/test_gpt2 [DIR ...]  directories of make_reference.py; default: the committed ones
//
// For each: the set of tensors both ways and their shapes; logits, loss and every gradient elementwise; g-SNR
// of each block; updates fed with the reference's gradient, every weight elementwise; a training run of its
// own: loss, norm and rate of each update, the error of each tensor at the end. A row a tensor; exits 1 if
// anything is beyond its bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <vector>
#include "llmc/checkpoint.h"   // load_shape, load_model, saved_tensors
#include "llmc/dataloader.h"   // sort_positions
#include "llmc/gpt2.cuh"       // Gpt2
#include "llmc/grad_norm.cuh"  // grad_norm, StepState, DeviceTable
#include "llmc/json.h"         // parse_json
#include "llmc/optimizer.cuh"  // Optimizer
#include "llmc/safetensors.h"  // SafetensorsFile
#include "llmc/schedule.h"     // scheduled_learning_rate

// ---- the reference ---------------------------------------------------------------------------------------

struct Reference {
    std::string dir;
    Json settings;
    std::map<std::string, std::vector<float>> tensors;
    std::map<std::string, std::vector<uint64_t>> shapes;
    std::set<std::string> halves;  // tensors stored as fp16 times a power of two

    explicit Reference(const std::string& dir_) : dir(dir_) {
        std::string text, error = read_text_file(text, dir + "/expected.json", 1 << 20);
        if (error.empty()) error = parse_json(settings, text);
        SafetensorsFile file;
        if (error.empty()) error = file.open(dir + "/expected.safetensors");
        if (!error.empty())
            fatal("%s: %s; make it with dev/reference/make_reference.py", dir.c_str(), error.c_str());
        for (const FileTensor& t : file.tensors()) {
            std::vector<float>& x = tensors[t.name];
            x.resize(t.elements());
            shapes[t.name] = t.shape;
            error = file.read(x.data(), t, 0, x.size());
            if (!error.empty()) fatal("%s", error.c_str());
            if (t.dtype == kF16) halves.insert(t.name);
        }
        for (auto& [name, x] : tensors)
            if (const auto exponent = tensors.find(name + ".exponent"); exponent != tensors.end())
                for (float& v : x) v = std::ldexp(v, static_cast<int>(exponent->second[0]));
    }
    int64_t integer(const char* key) const { return settings.find(key)->integer; }
    double number(const char* key) const { return settings.find(key)->number; }
    // What storing has moved element i of a tensor by, at most: 2^-11 of it, and where fp16 has no more
    // exponents 2^-25 of the largest, which lies between 1/2 and 1 times the power of two.
    double storage_error(const std::string& name, float x, float largest) const {
        return halves.count(name) == 0 ? 0 : 0x1p-11 * std::fabs(x) + 0x1p-24 * std::fabs(largest);
    }
    bool has(const std::string& name) const { return tensors.count(name) > 0; }
    const std::vector<float>& at(const std::string& name) const {
        const auto found = tensors.find(name);
        if (found == tensors.end())
            fatal("%s/expected.safetensors has no tensor %s", dir.c_str(), name.c_str());
        return found->second;
    }
};

// ---- comparing -------------------------------------------------------------------------------------------

// How far rounding may take a result. Each of the `ops` operations between the weights and a value adds
// errors of u x (size) x sqrt(length): u the unit roundoff of what is stored and length 1, or of the fp32
// sums and their length, whichever is larger. Errors of different operations add up like a random walk. Of
// 10^6 normal deviates the largest is about 5; 6 leaves room for the distribution's tails.
static double rounding(const Gpt2& model) {
    const ModelShape& s = model.config.shape;
    const double ops = 10.0 * s.layers + 5;
    const double length =
        std::max({4 * s.channels, s.vocab_size, model.config.batch_size * model.config.seq_len});
    const double stored =
        sizeof(floatX) == 2 ? 0x1p-9 : 0x1p-25;  // a rounding's mean size is half its largest
    return 6 * std::sqrt(ops) * std::max(stored, 0x1p-25 * std::sqrt(length));
}

struct Rows {
    int passed = 0, failed = 0;

    bool row(const std::string& what, double error, double allowed) {
        const bool ok = error <= allowed;  // false for NaN
        std::printf("%-4s %-58s error %.2e allowed %.2e\n", ok ? "ok" : "FAIL", what.c_str(), error, allowed);
        (ok ? passed : failed)++;
        return ok;
    }

    // Elementwise: |got - want| <= bound (rms + |want|), stored[i] of the difference not counted. rms is that
    // of the tensor, or of the element's row (`cols` elements) where that is larger: rows of wte's gradient
    // differ as much as their tokens' counts do, and an element near zero is still a sum of its row's terms.
    void compare(const std::string& what, const std::vector<float>& got, const std::vector<float>& want,
                 double bound, const std::vector<double>& stored = {}, size_t cols = 0) {
        if (got.size() != want.size()) {
            row(what + text_of(": %zu elements, wanted %zu", got.size(), want.size()), INFINITY, 0);
            return;
        }
        const auto rms_of = [&](size_t first, size_t n) {
            double squares = 0;
            for (size_t i = first; i < first + n; i++) squares += static_cast<double>(want[i]) * want[i];
            return std::sqrt(squares / static_cast<double>(n));
        };
        const double whole = rms_of(0, want.size());
        double worst = 0, rms = whole;
        for (size_t i = 0; i < want.size(); i++) {
            if (cols > 0 && i % cols == 0) rms = std::max(whole, rms_of(i, cols));
            const double difference =
                std::fabs(static_cast<double>(got[i]) - want[i]) - (stored.empty() ? 0 : stored[i]);
            const double ratio = difference <= 0 ? 0 : difference / (rms + std::fabs(want[i]));
            worst = ratio <= worst ? worst : ratio;  // takes a NaN, and keeps it out of max()'s way
            if (std::isnan(ratio)) worst = INFINITY;
        }
        row(what + text_of(" (%zu)", want.size()), worst, bound);
    }
};

// Gradients of the K third of the qkv bias are zero but for rounding: softmax doesn't see what is added to a
// whole row of scores. AdamW makes full steps of that noise, so trajectories leave the third out; nothing
// else.
static std::vector<float> without_key_bias(const std::string& name, std::vector<float> x) {
    if (name.ends_with("attn.c_attn.bias")) x.erase(x.begin() + x.size() / 3, x.begin() + 2 * (x.size() / 3));
    return x;
}

static double norm_of(const std::vector<float>& x) {
    double squares = 0;
    for (float v : x) squares += static_cast<double>(v) * v;
    return std::sqrt(squares);
}

// ---- the model under test --------------------------------------------------------------------------------

// A model loaded from the reference's directory, with what a training step needs.
struct Subject {
    const Reference& reference;
    Gpu& gpu;
    Matmuls matmuls{{.measure = false}};
    Gpt2 model;
    DeviceTable table;
    DeviceBuffer<double> partial;
    DeviceBuffer<StepState> state;

    Subject(const Reference& r, Gpu& gpu_)
        : reference(r),
          gpu(gpu_),
          model({load_shape(r.dir), static_cast<int>(r.integer("batch_size")),
                 static_cast<int>(r.integer("seq_len"))},
                matmuls, gpu_),
          table(model.table.blocks(), gpu_),
          partial(table.chunks.size()),
          state(1) {
        restart();
    }
    void load() {
        model.begin_loading();
        load_model(
            reference.dir, saved_tensors(model.table),
            [&](size_t tensor, const float* data_cpu, size_t n) { model.load_tensor(tensor, data_cpu, n); });
        model.finish_loading();
    }
    void restart() {
        load();
        fill_zero(state.get(), 1, gpu);
    }
    // The reference's micro-batch, on the device.
    void upload(int64_t update, int64_t micro_step) {
        const size_t B = model.config.batch_size, T = model.config.seq_len;
        const float* tokens = reference.at("tokens").data() +
                              (update * reference.integer("micro_steps") + micro_step) * B * (T + 1);
        const Batch batch = model.staging();
        for (size_t b = 0; b < B; b++)
            for (size_t t = 0; t < T; t++) {
                batch.tokens[b * T + t] = static_cast<int32_t>(tokens[b * (T + 1) + t]);
                batch.targets[b * T + t] = static_cast<int32_t>(tokens[b * (T + 1) + t + 1]);
            }
        std::vector<int32_t> counts;
        sort_positions(batch.order.data(), counts, batch.tokens.data(), B * T, model.config.shape.vocab_size);
        model.upload();
    }
    void update(Optimizer& optimizer, double learning_rate) {
        grad_norm(state.get(), partial.get(), model.gradients_arena(), model.loss(), table,
                  reference.number("grad_clip"), gpu);
        optimizer.step({model.weights_arena(), model.master_arena(), model.gradients_arena(), state.get(),
                        &table, learning_rate},
                       gpu);
    }
    template <class T>
    std::vector<float> to_host(const T* device, size_t n) {
        std::vector<T> x(n);
        copy_to_host(x.data(), device, n, gpu);
        gpu.synchronize();
        return std::vector<float>(x.begin(), x.end());
    }
    std::vector<float> block(const float* arena, const TensorBlock& b) {
        return to_host(arena + b.offset, b.n);
    }
    StepState read_state() {
        StepState host;
        copy_to_host(&host, state.get(), 1, gpu);
        gpu.synchronize();
        return host;
    }
};

// The weights that kernels read are the master rounded to nearest.
static void check_rounded(Rows& rows, Subject& s, const TensorBlock& b) {
    std::vector<float> master = s.block(s.model.master_arena(), b);
    for (float& x : master) x = static_cast<float>(static_cast<floatX>(x));
    const bool same = master == s.to_host(s.model.weights_arena() + b.offset, b.n);
    rows.row("weights are the rounded master: " + b.hf_name, same ? 0 : 1, 0);
}

// How far a run's changes may lie from the reference's, over their norm. SGD is linear in the gradient, so
// its error is the gradient's. AdamW divides by the gradient's size: an element whose gradient is below the
// rounding error e takes a step of any sign, and a fraction of about e of the elements is; errors of up to
// twice the step there make 2 sqrt(e) of the norm.
static double run_bound(double rounding) {
    return std::string(Optimizer::kAxisName) == "adamw" ? 2 * std::sqrt(rounding) : rounding;
}

// ---- tests -----------------------------------------------------------------------------------------------

// Every tensor of ours is in the reference with its shape, and nothing else is.
static void test_names(Rows& rows, Subject& s) {
    std::map<std::string, std::vector<uint64_t>> ours;
    for (const SavedTensor& t : saved_tensors(s.model.table)) ours[t.name] = t.shape;
    size_t theirs = 0, wrong = 0;
    for (const auto& [name, shape] : s.reference.shapes) {
        if (!name.starts_with("grad.") || name.ends_with(".exponent")) continue;
        theirs++;
        const auto found = ours.find(name.substr(5));
        if (found == ours.end() || found->second != shape) wrong++;
    }
    rows.row(
        text_of("%zu tensors, by name and shape", ours.size()),
        static_cast<double>(wrong + (theirs > ours.size() ? theirs - ours.size() : ours.size() - theirs)), 0);
}

// Logits, loss and every gradient of the first micro-batch.
static void test_gradients(Rows& rows, Subject& s) {
    const Gpt2Config& c = s.model.config;
    const size_t N = static_cast<size_t>(c.batch_size) * c.seq_len, V = c.shape.vocab_size;
    const size_t Vp = c.shape.padded_vocab_size();
    const double bound = rounding(s.model);
    s.upload(0, 0);
    s.model.validate(c.batch_size, Write::Assign,
                     1.0f / static_cast<float>(N));  // leaves logits; all rows in one chunk
    const std::vector<float> padded = s.to_host(s.model.logits(), N * Vp);
    std::vector<float> logits;
    for (size_t row = 0; row < N; row++)
        logits.insert(logits.end(), padded.begin() + row * Vp, padded.begin() + row * Vp + V);
    rows.compare("logits", logits, s.reference.at("logits"), bound);
    const float validation_loss = s.to_host(s.model.loss(), 1)[0];
    s.upload(0, 0);
    s.model.micro_step(Write::Assign, 1.0f / static_cast<float>(N));
    const std::vector<float> loss = s.to_host(s.model.loss(), 1);
    rows.compare("loss", loss, s.reference.at("loss"), bound);
    rows.row("the loss of validation is that of training", std::fabs(validation_loss - loss[0]), 0);
    for (const TensorBlock& b : s.model.table.blocks()) {
        const std::vector<float>& want = s.reference.at("grad." + b.hf_name);
        const float largest = *std::max_element(want.begin(), want.end(),
                                                [](float x, float y) { return std::fabs(x) < std::fabs(y); });
        std::vector<double> stored;
        for (float x : want) stored.push_back(s.reference.storage_error("grad." + b.hf_name, x, largest));
        rows.compare("gradient " + b.hf_name, s.block(s.model.gradients_arena(), b), want, bound, stored,
                     b.cols);
    }
}

// Updates fed with the reference's gradient: g-SNR of each block, and the weights elementwise. Optimizers are
// fp32 in every build: an update is about 16 operations, each right to 2^-24 of the weight or of what it is
// changed by.
static void test_fed(Rows& rows, Subject& s, const std::string& variant, const Optimizer::Options& options) {
    Optimizer optimizer(options, s.model.table.blocks(), s.gpu);
    s.restart();
    const Json& factors = *s.reference.settings.find("fed_factors");
    std::vector<std::vector<float>> before;
    for (const TensorBlock& b : s.model.table.blocks()) before.push_back(s.block(s.model.master_arena(), b));
    for (const Json& factor : factors.items) {
        for (const TensorBlock& b : s.model.table.blocks()) {
            std::vector<float> g = s.reference.at("grad." + b.hf_name);
            for (float& v : g) v *= static_cast<float>(factor.number);
            copy_to_device(s.model.gradients_arena() + b.offset, g.data(), g.size(), s.gpu);
            s.gpu.synchronize();
        }
        s.update(optimizer, options.learning_rate);
        if (const auto report = optimizer.observe(s.read_state(), s.gpu))
            for (const GainRow& row : report->rows)
                rows.compare("g-SNR " + row.tensor, {row.gsnr}, s.reference.at("gsnr." + row.tensor),
                             4 * 0x1p-24);
    }
    for (size_t i = 0; i < before.size(); i++) {
        const TensorBlock& b = s.model.table.blocks()[i];
        const std::vector<float> got = s.block(s.model.master_arena(), b);
        const std::vector<float>& want = s.reference.at("fed." + variant + "." + b.hf_name);
        double worst = 0, change_squares = 0;
        for (size_t j = 0; j < want.size(); j++)
            change_squares += std::pow(static_cast<double>(want[j]) - before[i][j], 2);
        const double change_rms = std::sqrt(change_squares / static_cast<double>(want.size()));
        for (size_t j = 0; j < want.size(); j++) {
            const double size =
                std::fabs(want[j]) + std::fabs(static_cast<double>(want[j]) - before[i][j]) + change_rms;
            const double ratio = std::fabs(static_cast<double>(got[j]) - want[j]) / size;
            worst = ratio <= worst ? worst : std::isnan(ratio) ? INFINITY : ratio;
        }
        rows.row(text_of("fed %s %s (%zu)", variant.c_str(), b.hf_name.c_str(), want.size()), worst,
                 static_cast<double>(factors.items.size()) * 4 * 0x1p-24);
        check_rounded(rows, s, b);
    }
}

// A run of its own: loss, norm and rate of each update, then the error of each tensor over what the run
// changed it by.
static void test_run(Rows& rows, Subject& s, const std::string& variant, const Optimizer::Options& options) {
    const Reference& r = s.reference;
    const Gpt2Config& c = s.model.config;
    const int64_t updates = r.integer("updates"), micro_steps = r.integer("micro_steps");
    Options schedule = default_options({Optimizer::kAxisName, kPrecisionName, "test"});
    schedule.learning_rate = options.learning_rate;
    schedule.steps = updates;
    schedule.warmup_steps = r.integer("warmup_steps");
    schedule.final_lr_fraction = r.number("final_lr_fraction");
    Optimizer optimizer(options, s.model.table.blocks(), s.gpu);
    s.restart();
    std::vector<std::vector<float>> before;
    for (const TensorBlock& b : s.model.table.blocks()) before.push_back(s.block(s.model.master_arena(), b));
    std::vector<float> losses, norms, rates;
    for (int64_t k = 1; k <= updates; k++) {
        for (int64_t m = 0; m < micro_steps; m++) {
            s.upload(k - 1, m);
            s.model.micro_step(m == 0 ? Write::Assign : Write::Add,
                               1.0f / static_cast<float>(micro_steps * c.batch_size * c.seq_len));
        }
        rates.push_back(static_cast<float>(scheduled_learning_rate(schedule, k)));
        s.update(optimizer, scheduled_learning_rate(schedule, k));
        const StepState state = s.read_state();
        losses.push_back(state.loss);
        norms.push_back(static_cast<float>(state.grad_norm));
    }
    // Errors of an update's weights go into the next one's gradients: they grow at most in proportion to the
    // updates.
    const double bound = rounding(s.model);
    rows.compare("run " + variant + " losses", losses, r.at("run." + variant + ".loss"), bound);
    rows.compare("run " + variant + " gradient norms", norms, r.at("run." + variant + ".grad_norm"), bound);
    rows.compare("run " + variant + " learning rates", rates, r.at("run." + variant + ".learning_rate"),
                 2 * 0x1p-24);
    for (size_t i = 0; i < before.size(); i++) {
        const TensorBlock& b = s.model.table.blocks()[i];
        const std::vector<float> after = without_key_bias(b.hf_name, s.block(s.model.master_arena(), b));
        const std::vector<float> first = without_key_bias(b.hf_name, before[i]);
        rows.row(text_of("run %s norm of %s", variant.c_str(), b.hf_name.c_str()),
                 std::fabs(norm_of(after) / r.at("run." + variant + ".norm." + b.hf_name)[0] - 1), bound);
        if (!r.has("run." + variant + "." + b.hf_name)) continue;
        const std::vector<float> want = without_key_bias(b.hf_name, r.at("run." + variant + "." + b.hf_name));
        std::vector<float> error(after.size());
        for (size_t j = 0; j < after.size(); j++) error[j] = after[j] - first[j] - want[j];
        // The master itself rounds to 2^-24 of the weight in each update, however small the change.
        rows.row(text_of("run %s change of %s", variant.c_str(), b.hf_name.c_str()),
                 norm_of(error) / norm_of(want),
                 run_bound(bound) + (r.halves.count("run." + variant + "." + b.hf_name) ? 0x1p-11 : 0) +
                     static_cast<double>(updates) * 0x1p-24 * norm_of(after) / norm_of(want));
    }
}

// Pad rows of wte and of its gradient are zero, to the bit, whatever was done.
static void test_pads(Rows& rows, Subject& s) {
    const TensorBlock& wte = s.model.table.blocks()[0];
    const size_t pads = wte.padded - wte.n;
    double largest = 0;
    for (const float* arena : {s.model.master_arena(), s.model.gradients_arena()})
        for (float x : s.to_host(arena + wte.offset + wte.n, pads))
            largest = std::max<double>(largest, std::fabs(x));
    for (float x : s.to_host(s.model.weights_arena() + wte.offset + wte.n, pads))
        largest = std::max<double>(largest, std::fabs(x));
    rows.row(text_of("%zu pads of wte stay zero", pads), largest, 0);
}

// The variants of the reference that this build's optimizer computes, and their options.
static std::vector<std::pair<std::string, Optimizer::Options>> variants_of(const Reference& r) {
    std::vector<std::pair<std::string, Optimizer::Options>> list;
    const Json& variants = *r.settings.find("variants");
    for (size_t i = 0; i < variants.keys.size(); i++) {
        if (!variants.keys[i].starts_with(Optimizer::kAxisName)) continue;
        const Json& v = variants.items[i];
        Options o = default_options({Optimizer::kAxisName, kPrecisionName, "test"});
        auto number = [&](const char* key, double otherwise) {
            return v.find(key) ? v.find(key)->number : otherwise;
        };
        o.learning_rate = number("learning_rate", 0);
        o.weight_decay = number("weight_decay", 0);
        o.beta1 = number("beta1", 0), o.beta2 = number("beta2", 0), o.momentum = number("momentum", 0);
        o.eps = number("eps", 0);
        o.gain = variants.keys[i].ends_with("normalized") ? "normalized" : "raw";
        list.push_back({variants.keys[i], Optimizer::Options::from(o)});
    }
    return list;
}

int main(int argc, char** argv) {
    std::vector<std::string> dirs(argv + 1, argv + argc);
    if (dirs.empty()) dirs = {"dev/reference/l2c64", "dev/reference/l1c128"};
    Gpu gpu;
    Rows rows;
    for (const std::string& dir : dirs) {
        const Reference reference(dir);
        Subject s(reference, gpu);
        std::printf("%s: %s, %s, %zu parameters\n", dir.c_str(), kPrecisionName, Optimizer::kName,
                    s.model.table.parameters());
        test_names(rows, s);
        test_gradients(rows, s);
        for (const auto& [variant, options] : variants_of(reference)) {
            if (reference.has("fed." + variant + ".transformer.wte.weight"))
                test_fed(rows, s, variant, options);
            test_run(rows, s, variant, options);
            test_pads(rows, s);
        }
    }
    std::printf("%d passed, %d failed\n", rows.passed, rows.failed);
    return rows.failed == 0 && rows.passed > 0 ? 0 : 1;
}
