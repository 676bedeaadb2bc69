// Parsing, --help, the start-up table and the checks of options.h. The only file that includes cxxopts, which
// costs seconds of compiling; built once for all variants, so nothing here depends on an axis of the build.
#include "llmc/options.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <charconv>
#include <numeric>

#define CXXOPTS_NO_REGEX  // its own small parser: std::regex costs seconds of compiling
#include <cxxopts.hpp>

#include "llmc/fatal.h"
#include "llmc/file.h"  // text_of

namespace {

// GPT-2's four published shapes: all have heads of 64 channels.
struct Preset {
    const char* name;
    int layers, channels, heads;
};
constexpr Preset kPresets[] = {
    {"d12", 12, 768, 12}, {"d24", 24, 1024, 16}, {"d36", 36, 1280, 20}, {"d48", 48, 1600, 25}};

bool is_switch(const Flag& flag) { return flag.value[0] == '\0'; }

// Edits (a letter inserted, deleted or replaced) between two words.
size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (size_t i = 1; i <= a.size(); i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); j++) {
            const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({row[j - 1] + 1, row[j] + 1, replaced});
        }
    }
    return row[b.size()];
}

// How far a misspelt name is from a flag's: 0 where it is its beginning ("output") or its initials ("lr"),
// else edits.
size_t distance(const std::string& name, const std::string& flag) {
    std::string initials;
    for (size_t i = 0; i < flag.size(); i++) {
        if (i == 0 || flag[i - 1] == '-') initials += flag[i];
    }
    if (name == initials || (name.size() >= 3 && flag.rfind(name, 0) == 0)) return 0;
    return edit_distance(name, flag);
}

// Reports a word of the command line that is no flag of this build: the other optimizer's, a misspelt one, or
// a stray.
[[noreturn]] void fatal_unknown(const std::string& word, const BuildInfo& build) {
    if (word.rfind("--", 0) != 0 || word == "--") {
        fatal("'%s' is not understood: wants --flag value; quote patterns: --train-data 'data/train_*.bin'",
              word.c_str());
    }
    const std::string name = word.substr(2, word.find('=') - 2);
    std::string nearest;
    size_t nearest_distance = std::max<size_t>(name.size() / 2, 2) + 1;  // beyond it, it is another word
    Options o;
    each_option(o, [&](const Flag& flag, auto&, const char*) {
        if (name == flag.name) {
            fatal("--%s: this build's optimizer is %s; for that flag, build with make OPTIMIZER=%s",
                  flag.name, optimizer_title(build.optimizer).c_str(), flag.optimizer);
        }
        if (!in_this_build(flag, build) || distance(name, flag.name) >= nearest_distance) return;
        nearest = flag.name;
        nearest_distance = distance(name, flag.name);
    });
    if (nearest.empty()) fatal("--%s: unknown flag; --help lists them all", name.c_str());
    fatal("--%s: unknown flag; did you mean --%s? --help lists them all", name.c_str(), nearest.c_str());
}

std::vector<std::string> choices_of(const Flag& flag) {
    std::vector<std::string> choices(1);
    for (const char* c = flag.value; *c; c++) {
        if (*c == '|') choices.emplace_back();
        else choices.back() += *c;
    }
    return choices;
}

// The range in words: "a number from 0 to below 1", "a whole number from 1 to 4096".
std::string wanted(const Flag& flag, bool whole) {
    const Range& range = flag.range;
    return text_of("%s %s %s %s %s", whole ? "a whole number" : "a number",
                   range.without_min ? "above" : "from", option_text(range.min).c_str(),
                   range.without_max ? "to below" : "to", option_text(range.max).c_str());
}

void set(std::string& variable, const Flag& flag, const std::string& text) {
    if (text.empty() || text.rfind("--", 0) == 0) {
        fatal("--%s: wants a value (%s), got '%s'", flag.name, flag.value, text.c_str());
    }
    const std::vector<std::string> choices = choices_of(flag);
    if (choices.size() > 1 && std::find(choices.begin(), choices.end(), text) == choices.end()) {
        fatal("--%s: wants one of %s, got '%s'", flag.name, flag.value, text.c_str());
    }
    variable = text;
}

void set(bool& variable, const Flag& flag, const std::string& text) {
    if (text != "0" && text != "1") fatal("--%s: wants 0 or 1, got '%s'", flag.name, text.c_str());
    variable = text == "1";
}

// A number: the whole text must be one, finite and inside the flag's range.
template <class Number>
void set(Number& variable, const Flag& flag, const std::string& text) {
    Number value{};
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || !flag.range.holds(static_cast<double>(value))) {
        fatal("--%s: wants %s, got '%s'", flag.name, wanted(flag, std::is_integral_v<Number>).c_str(),
              text.c_str());
    }
    variable = value;
}

// The command line as cxxopts reads it. Everything but a switch is a string to it: values are read by set()
// above, whose errors name what is wanted.
cxxopts::ParseResult read_words(int argc, const char* const* argv, const BuildInfo& build) {
    cxxopts::Options parser(argc > 0 ? argv[0] : "train_gpt2");
    parser.allow_unrecognised_options();
    parser.add_options()("help", "");
    Options o;
    each_option(o, [&](const Flag& flag, auto&, const char* help) {
        if (!in_this_build(flag, build)) return;
        if (is_switch(flag)) parser.add_options()(flag.name, help);
        else parser.add_options()(flag.name, help, cxxopts::value<std::string>());
    });
    try {
        return parser.parse(argc, argv);
    } catch (const std::exception& error) {  // its class differs between versions of cxxopts
        const std::string last = argc > 1 ? argv[argc - 1] : "";
        each_option(o, [&](const Flag& flag, auto&, const char*) {
            if (last != std::string("--") + flag.name || is_switch(flag)) return;
            fatal("--%s: its value (%s) is missing", flag.name, flag.value);
        });
        fatal("%s; wants --flag value, see --help", error.what());
    }
}

// The name of the published shape that o has, or "custom".
std::string name_of_shape(const Options& o) {
    for (const Preset& preset : kPresets) {
        if (o.layers == preset.layers && o.channels == preset.channels && o.heads == preset.heads)
            return preset.name;
    }
    return "custom";
}

// The values that follow from other options: --model gives the shape, and two defaults depend on the run.
void complete(Options& o) {
    for (const Preset& preset : kPresets) {
        if (o.model != preset.name) continue;
        if (!o.given("layers")) o.layers = preset.layers;
        if (!o.given("channels")) o.channels = preset.channels;
        if (!o.given("heads")) o.heads = preset.heads;
    }
    o.model = name_of_shape(o);
    if (!o.given("total-batch")) o.total_batch = int64_t{o.batch_size} * o.seq_len;
    if (!o.given("warmup-steps")) o.warmup_steps = std::min(Options().warmup_steps, o.steps / 10);
}

void check_shape(const Options& o) {
    if (o.channels % kHeadSize != 0) {
        fatal("--channels %d is not a multiple of %d, the head size; use --channels %d --heads %d",
              o.channels, kHeadSize, o.channels / kHeadSize * kHeadSize, o.channels / kHeadSize);
    }
    if (o.channels / kHeadSize != o.heads) {
        fatal("--channels %d wants %d --heads, of %d channels each, got %d; use --heads %d or --channels %d",
              o.channels, o.channels / kHeadSize, kHeadSize, o.heads, o.channels / kHeadSize,
              o.heads * kHeadSize);
    }
}

void check_batch(const Options& o) {
    const int64_t micro = int64_t{o.batch_size} * o.seq_len;
    if (o.total_batch % micro == 0) return;
    const int64_t below = o.total_batch / micro * micro;
    const std::string first = below > 0 ? std::to_string(below) + " or " : "";
    fatal("--total-batch %lld tokens is not a multiple of batch-size x seq-len = %d x %d = %lld; use %s%lld",
          (long long)o.total_batch, o.batch_size, o.seq_len, (long long)micro, first.c_str(),
          (long long)(below + micro));
}

// What the rate can't be, and (SGD-SaI) what looks like the other variant's units: raw g-SNR is thousands of
// times the normalised one, so the rates that fit the two are as far apart.
void check_learning_rate(const Options& o) {
    if (o.warmup_steps > o.steps) {
        fatal("--warmup-steps %lld is more than --steps %lld; use at most as many", (long long)o.warmup_steps,
              (long long)o.steps);
    }
    if (o.learning_rate * o.weight_decay >= 1) {
        fatal("--learning-rate %g x --weight-decay %g = %g flips signs of weights, wants below 1; lower one",
              o.learning_rate, o.weight_decay, o.learning_rate * o.weight_decay);
    }
    if (o.build.optimizer == "adamw") {
        if (o.learning_rate <= 1) return;
        fatal("--learning-rate %g: that is how far AdamW moves a weight; wants at most 1, such as 6e-4",
              o.learning_rate);
    }
    if ((o.gain == "raw" || o.gain == "sqrt_n") && o.learning_rate > 0.5) {
        warn("--learning-rate %g is large for --gain %s: 1e-3 to 1e-2 is usual; for normalized, 6 to 60",
             o.learning_rate, o.gain.c_str());
    }
    if (o.gain == "normalized" && o.learning_rate < 0.5) {
        warn("--learning-rate %g is small for --gain normalized: 6 to 60 is usual; for raw, 1e-3 to 1e-2",
             o.learning_rate);
    }
}

void check_data(const Options& o) {
    if (o.train_data.empty() && !o.dry_run) {
        fatal(
            "--train-data is missing: wants token shards, such as 'data/NAME/train_*.bin'; scripts in data/ "
            "make them, --help shows examples");
    }
    if (o.val_data.empty() && o.val_every > 0 && o.given("val-every")) {
        fatal("--val-every %lld needs --val-data, which is missing; give it, or --val-every 0",
              (long long)o.val_every);
    }
}

// One size of --init-from's model against its flag, and against setter, the flag that the command line gave
// it by: itself, or --model; "" for neither.
void check_size(const Options& o, const char* name, const char* setter, int flags_value, int models_value) {
    each_option(o, [&](const Flag& flag, const auto&, const char*) {
        if (std::string_view(flag.name) != name || flag.range.holds(models_value)) return;
        fatal("--init-from %s: the model has %s %d, wants %s", o.init_from.c_str(), name, models_value,
              wanted(flag, true).c_str());
    });
    if (setter[0] == '\0' || flags_value == models_value) return;
    fatal("--%s: %s %d disagrees with the model in --init-from %s, which has %d; leave that flag away",
          setter, name, flags_value, o.init_from.c_str(), models_value);
}

constexpr const char* kHelpHead = R"(Pretrains GPT-2 with OPTIMIZER.

Usage: PROGRAM --train-data GLOB [--flag value ...]

First run, a small model on bytes of Shakespeare (make demo does this, for both optimizers):
  .venv/bin/python data/shakespeare.py --tokenizer bytes
  PROGRAM --train-data 'data/shakespeare_bytes/train_*.bin' \
      --val-data 'data/shakespeare_bytes/val_*.bin' --vocab-size 256 --layers 4 --channels 128 \
      --heads 2 --seq-len 128 --steps 240 --learning-rate SMALL_LR --output-dir out/first

GPT-2 124M on one GPU, half a million tokens an update:
  PROGRAM --train-data 'data/shakespeare_gpt2/train_*.bin' \
      --val-data 'data/shakespeare_gpt2/val_*.bin' --model d12 --batch-size 32 \
      --total-batch 524288 --output-dir out/124m

Fine-tuning, from a GPT-2 directory of Hugging Face's (config.json, model.safetensors):
  PROGRAM --init-from gpt2/ --train-data 'data/mine/train_*.bin' \
      --learning-rate TUNING_LR --warmup-steps 20 --steps 500 --output-dir out/mine

Defaults stand in [brackets]. They are starting points, not tuned values: compare optimizers at
several learning rates each. Where a flag comes twice, the last one counts.
)";

constexpr const char* kHelpTail = R"(
Other
  --help                        print this and stop

An update takes total-batch tokens, in micro-steps of batch-size x seq-len. Losses are in nats a
token. MFU, printed where the GPU's dense bf16 peak is known, is
  tokens/s x (6 N + 6 L C T) / peak
with N all parameters without padding, the head counted once, L layers, C channels and T seq-len.
)";

constexpr size_t kHelpColumns = 100;  // the width of --help, and where its texts begin
constexpr size_t kHelpIndent = 32;

// "  --flag VALUE      text [default]", the text broken at spaces. A long flag has a line of its own.
std::string help_entry(const Flag& flag, const std::string& help, const std::string& default_text) {
    std::string out = std::string("  --") + flag.name + (is_switch(flag) ? "" : " ") + flag.value;
    if (out.size() + 2 > kHelpIndent) out += "\n" + std::string(kHelpIndent, ' ');
    else out.resize(kHelpIndent, ' ');
    size_t column = kHelpIndent;
    const std::string text = help + (default_text.empty() ? "" : " [" + default_text + "]") + " ";
    for (size_t begin = 0, end; (end = text.find(' ', begin)) != std::string::npos; begin = end + 1) {
        const std::string word = text.substr(begin, end - begin);
        if (column + 1 + word.size() > kHelpColumns) {
            out += "\n" + std::string(kHelpIndent, ' ');
            column = kHelpIndent;
        }
        if (column > kHelpIndent) out += " ";
        column += word.size() + (column > kHelpIndent);
        out += word;
    }
    return out + "\n";
}

}  // namespace

std::string optimizer_title(std::string_view optimizer) { return optimizer == "adamw" ? "AdamW" : "SGD-SaI"; }

Options default_options(const BuildInfo& build) {
    if (build.optimizer != "adamw" && build.optimizer != "sgd_sai") {
        fatal("BuildInfo: wants the optimizer adamw or sgd_sai, got '%s'", build.optimizer.c_str());
    }
    Options o;
    o.build = build;
    const bool adamw = build.optimizer == "adamw";
    o.learning_rate = adamw ? 6e-4 : 3e-3;  // SGD-SaI's is for the raw gain
    o.weight_decay = adamw ? 0.1 : 0.02;    // so that rate x decay is 6e-5 with both
    complete(o);
    return o;
}

Options parse_options(int argc, const char* const* argv, const BuildInfo& build) {
    Options o = default_options(build);
    const cxxopts::ParseResult words = read_words(argc, argv, build);
    if (words.count("help") > 0) {
        fputs(help_text(build).c_str(), stdout);
        exit(0);
    }
    each_option(o, [&](const Flag& flag, auto& variable, const char*) {
        if (!in_this_build(flag, build) || words.count(flag.name) == 0) return;
        const cxxopts::OptionValue& word = words[flag.name];
        set(variable, flag, is_switch(flag) ? option_text(word.as<bool>()) : word.as<std::string>());
        o.given_flags.push_back(flag.name);
    });
    if (!words.unmatched().empty()) fatal_unknown(words.unmatched().front(), build);
    complete(o);
    if (o.init_from.empty()) validate(o);
    return o;
}

std::string help_text(const BuildInfo& build) {
    const bool adamw = build.optimizer == "adamw";
    std::string text = kHelpHead;
    const auto fill_in = [&](const std::string& word, const std::string& value) {
        for (size_t at; (at = text.find(word)) != std::string::npos;) text.replace(at, word.size(), value);
    };
    fill_in("PROGRAM",
            "build/" + build.device + "-" + build.precision + "-" + build.optimizer + "/train_gpt2");
    fill_in("OPTIMIZER", optimizer_title(build.optimizer));
    fill_in("SMALL_LR", adamw ? "4e-3" : "3e-3");
    fill_in("TUNING_LR", adamw ? "3e-5" : "3e-4");
    const Options defaults = default_options(build);
    std::string_view group;
    each_option(defaults, [&](const Flag& flag, const auto& variable, const char* help) {
        if (!in_this_build(flag, build)) return;
        if (group != flag.group) text += std::string("\n") + flag.group + "\n";
        group = flag.group;
        const std::string value = is_switch(flag) ? "" : option_text(variable);
        text += help_entry(flag, help, flag.default_text[0] ? flag.default_text : value);
    });
    return text + kHelpTail;
}

void validate(const Options& o) {
    check_data(o);
    check_shape(o);
    check_batch(o);
    check_learning_rate(o);
}

void adopt_shape(Options& o, const ModelShape& shape) {
    const auto setter = [&](const char* flag) {
        return o.given(flag) ? flag : o.given("model") ? "model" : "";
    };
    check_size(o, "layers", setter("layers"), o.layers, shape.layers);
    check_size(o, "channels", setter("channels"), o.channels, shape.channels);
    check_size(o, "heads", setter("heads"), o.heads, shape.heads);
    check_size(o, "vocab-size", o.given("vocab-size") ? "vocab-size" : "", o.vocab_size, shape.vocab_size);
    check_size(o, "seq-len", "", o.seq_len, shape.positions);
    if (shape.channels != int64_t{kHeadSize} * shape.heads) {
        fatal("--init-from %s: the model has %d channels and %d heads, wants heads of %d channels",
              o.init_from.c_str(), shape.channels, shape.heads, kHeadSize);
    }
    if (!o.given("seq-len")) o.seq_len = shape.positions;
    if (o.seq_len > shape.positions) {
        fatal("--seq-len %d is longer than the %d positions of the model in --init-from %s; use at most that",
              o.seq_len, shape.positions, o.init_from.c_str());
    }
    o.layers = shape.layers;
    o.channels = shape.channels;
    o.heads = shape.heads;
    o.vocab_size = shape.vocab_size;
    o.model = name_of_shape(o);
    complete(o);
    validate(o);
}

void print_options(const Options& o) {
    std::string_view group;
    each_option(o, [&](const Flag& flag, const auto& variable, const char*) {
        if (!in_this_build(flag, o.build)) return;
        if (group != flag.group) printf("%s\n", flag.group);
        group = flag.group;
        const std::string value = option_text(variable);
        printf("  --%-18s %s%s\n", flag.name, value.empty() ? "-" : value.c_str(),
               o.given(flag.name) ? " *" : "");
    });
    printf("* given on the command line\n");
}
