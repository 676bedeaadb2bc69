// Proves that the command line does what --help says: defaults, presets, what follows from what; that every
// wrong value of every flag, every unknown flag and every pair that can't go together is one line that says
// what to do; and that parsing, --help, the start-up table and the list of flags agree.
//     make build/host/test/options_test && build/host/test/options_test
#include "llmc/options.h"

#include <gtest/gtest.h>
#include <unistd.h>  // dup2

#include <set>
#include <sstream>

#include "dev/test/death.h"
#include "llmc/fatal.h"

namespace {

const BuildInfo kAdamW{"adamw", "bf16", "gpu"};
const BuildInfo kSgdSai{"sgd_sai", "fp32", "sim"};

Options parse(std::vector<std::string> words, const BuildInfo& build = kAdamW) {
    std::vector<const char*> argv = {"train_gpt2"};
    for (const std::string& word : words) argv.push_back(word.c_str());
    return parse_options(static_cast<int>(argv.size()), argv.data(), build);
}

// parse() of a command line that has the one flag no run can do without.
Options parse_run(std::vector<std::string> words, const BuildInfo& build = kAdamW) {
    words.insert(words.begin(), {"--train-data", "t.bin"});
    return parse(words, build);
}

std::vector<std::string> lines_of(const std::string& text) {
    std::vector<std::string> lines;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) lines.push_back(line);
    return lines;
}

TEST(Options, DefaultsAreThoseOfTheDesign) {
    const Options adamw = parse_run({}), sgd = parse_run({}, kSgdSai);
    EXPECT_EQ(adamw.learning_rate, 6e-4);
    EXPECT_EQ(adamw.weight_decay, 0.1);
    EXPECT_EQ(adamw.beta1, 0.9);
    EXPECT_EQ(adamw.beta2, 0.95);
    EXPECT_EQ(adamw.eps, 1e-8);
    EXPECT_EQ(sgd.learning_rate, 3e-3);
    EXPECT_EQ(sgd.weight_decay, 0.02);
    EXPECT_EQ(sgd.momentum, 0.9);
    EXPECT_EQ(sgd.gain, "raw");
    for (const Options& o : {adamw, sgd}) {
        EXPECT_EQ(o.grad_clip, 1);
        EXPECT_EQ(o.warmup_steps, 700);
        EXPECT_EQ(o.schedule, "cosine");
        EXPECT_EQ(o.final_lr_fraction, 0.1);
        EXPECT_TRUE(o.shuffle);
        EXPECT_EQ(o.layers, 12);
        EXPECT_EQ(o.channels, 768);
        EXPECT_EQ(o.heads, 12);
        EXPECT_EQ(o.vocab_size, 50257);
        EXPECT_EQ(o.total_batch, int64_t{o.batch_size} * o.seq_len);
        EXPECT_EQ(o.given_flags, std::vector<std::string>{"train-data"});
    }
}

// Every flag of a build takes a value that differs from its default, in both spellings, and reports that it
// was given.
TEST(Options, EveryFlagIsReadAndOnlyThatOne) {
    for (const BuildInfo& build : {kAdamW, kSgdSai}) {
        const Options defaults = parse_run({}, build);
        each_option(defaults, [&](const Flag& flag, const auto& variable, const char*) {
            if (!in_this_build(flag, build)) return;
            const std::string name = flag.name;
            std::string text = "some/where";
            if constexpr (std::is_same_v<std::decay_t<decltype(variable)>, bool>) text = variable ? "0" : "1";
            else if constexpr (!std::is_same_v<std::decay_t<decltype(variable)>, std::string>) text = "0.5";
            const std::string choices = flag.value;
            if (choices.find('|') != std::string::npos && text != "0")
                text = choices.substr(choices.rfind('|') + 1);
            if constexpr (std::is_integral_v<std::decay_t<decltype(variable)>>) {
                if (text == "0.5") text = std::to_string(variable + 1);
            }
            // These can't change alone: heads are 64 wide, and an update is whole micro-steps.
            std::vector<std::string> with;
            if (name == "channels") text = "832", with = {"--heads", "13"};
            if (name == "heads") text = "13", with = {"--channels", "832"};
            if (name == "total-batch") text = std::to_string(3 * defaults.total_batch);
            if (name == "init-from") with = {"--steps", "1000000"};
            if (name == "val-every") with = {"--val-data", "v.bin"};

            for (bool with_equals : {false, true}) {
                std::vector<std::string> words = with;
                if (flag.value[0] == '\0') words.push_back("--" + name);
                else if (with_equals) words.push_back("--" + name + "=" + text);
                else words.insert(words.end(), {"--" + name, text});
                const Options o = parse_run(words, build);
                EXPECT_TRUE(o.given(name)) << name;
                size_t given = 0;
                each_option(o, [&](const Flag& other, const auto& value, const char*) {
                    if (name == other.name) { EXPECT_EQ(option_text(value), text) << name; }
                    given += o.given(other.name);
                });
                EXPECT_EQ(given, 1 + with.size() / 2 + (name != "train-data")) << name;
            }
        });
    }
}

TEST(Options, ModelGivesTheShapeAndItsPartsOverrideIt) {
    const struct {
        const char* name;
        int layers, channels, heads;
    } shapes[] = {{"d12", 12, 768, 12}, {"d24", 24, 1024, 16}, {"d36", 36, 1280, 20}, {"d48", 48, 1600, 25}};
    for (const auto& shape : shapes) {
        const Options o = parse_run({"--model", shape.name});
        EXPECT_EQ(o.model, shape.name);
        EXPECT_EQ(o.layers, shape.layers);
        EXPECT_EQ(o.channels, shape.channels);
        EXPECT_EQ(o.heads, shape.heads);
        EXPECT_FALSE(o.given("layers"));
    }
    const Options o = parse_run({"--layers", "6", "--model", "d24"});
    EXPECT_EQ(o.layers, 6);
    EXPECT_EQ(o.channels, 1024);
    EXPECT_EQ(o.model, "custom");
    EXPECT_EQ(parse_run({"--layers", "24", "--channels", "1024", "--heads", "16"}).model, "d24");
}

TEST(Options, SomeDefaultsFollowFromOtherFlags) {
    EXPECT_EQ(parse_run({"--batch-size", "3", "--seq-len", "100"}).total_batch, 300);
    EXPECT_EQ(parse_run({"--batch-size", "3", "--seq-len", "100", "--total-batch", "900"}).total_batch, 900);
    EXPECT_EQ(parse_run({"--batch-size", "1048576", "--seq-len", "1048576"}).total_batch, int64_t{1} << 40);
    EXPECT_EQ(parse_run({"--steps", "240"}).warmup_steps, 24);
    EXPECT_EQ(parse_run({"--steps", "240", "--warmup-steps", "240"}).warmup_steps, 240);
    EXPECT_EQ(parse_run({"--steps", "9"}).warmup_steps, 0);
    EXPECT_EQ(parse_run({"--steps", "7000"}).warmup_steps, 700);
    EXPECT_EQ(parse_run({"--steps", "1000000"}).warmup_steps, 700);
}

TEST(Options, TheLastOfTwoCounts) {
    EXPECT_EQ(parse_run({"--steps", "5", "--steps=7"}).steps, 7);
    EXPECT_EQ(parse_run({"--steps", "5", "--steps=7"}).given_flags.size(), 2u);
}

TEST(Options, LimitsAreInside) {
    const Options o =
        parse_run({"--grad-clip",   "0",   "--weight-decay",      "0", "--warmup-steps", "0",
                   "--beta1",       "0",   "--final-lr-fraction", "1", "--val-every",    "0",
                   "--seed",        "0",   "--learning-rate",     "1", "--vocab-size",   "65536",
                   "--total-batch", "8192"});
    EXPECT_EQ(o.grad_clip, 0);
    EXPECT_EQ(o.seed, 0);
    EXPECT_EQ(o.vocab_size, 65536);
    EXPECT_EQ(parse_run({"--seed", "1000000000000000"}).seed, 1000000000000000);
    EXPECT_EQ(parse_run({"--momentum", "0"}, kSgdSai).momentum, 0);
    EXPECT_EQ(parse_run({"--learning-rate", "6E-4"}).learning_rate, 6e-4);
}

TEST(Options, ADryRunNeedsNoData) { EXPECT_TRUE(parse({"--dry-run"}).dry_run); }

// A number outside its range, of another kind, with something behind it, or none: for every flag with one.
TEST(OptionsErrors, EveryNumberIsChecked) {
    for (const BuildInfo& build : {kAdamW, kSgdSai}) {
        Options o = default_options(build);
        each_option(o, [&](const Flag& flag, auto& variable, const char*) {
            using Value = std::decay_t<decltype(variable)>;
            if constexpr (std::is_arithmetic_v<Value> && !std::is_same_v<Value, bool>) {
                if (!in_this_build(flag, build)) return;
                std::vector<std::string> bad = {"-1",
                                                "nan",
                                                "inf",
                                                "-inf",
                                                "1e400",
                                                "1x",
                                                "x",
                                                " 1",
                                                "0x10",
                                                "1,5",
                                                "99999999999999999999",
                                                "-0.5",
                                                "+1",
                                                "1e16"};
                if (std::is_integral_v<Value>) bad.insert(bad.end(), {"1.5", "1e3", "2.0"});
                for (const std::string& text : bad) {
                    const std::string pattern = std::string("^rank 0: --") + flag.name +
                                                ": wants a (whole )?number " +
                                                "(from|above) [0-9]+ to (below )?[^ ]+, got '.*'\n$";
                    EXPECT_EXIT(parse_run({std::string("--") + flag.name, text}, build),
                                ::testing::ExitedWithCode(1), pattern)
                        << flag.name << " " << text;
                }
            }
        });
    }
}

TEST(OptionsErrors, RangesInWords) {
    EXPECT_FATAL(parse_run({"--steps", "0"}), "--steps: wants a whole number from 1 to 1e+15, got '0'");
    EXPECT_FATAL(parse_run({"--beta2", "1"}), "--beta2: wants a number from 0 to below 1, got '1'");
    EXPECT_FATAL(parse_run({"--momentum", "1"}, kSgdSai),
                 "--momentum: wants a number from 0 to below 1, got '1'");
    EXPECT_FATAL(parse_run({"--learning-rate", "0"}),
                 "--learning-rate: wants a number above 0 to 1000, got '0'");
    EXPECT_FATAL(parse_run({"--learning-rate", "1e9"}),
                 "--learning-rate: wants a number above 0 to 1000, got '1e9'");
    EXPECT_FATAL(parse_run({"--final-lr-fraction", "1.01"}),
                 "--final-lr-fraction: wants a number from 0 to 1, got '1.01'");
    EXPECT_FATAL(parse_run({"--vocab-size", "65537"}),
                 "--vocab-size: wants a whole number from 1 to 65536, got '65537'");
    EXPECT_FATAL(parse_run({"--eps", "0"}), "--eps: wants a number above 0 to 1, got '0'");
    EXPECT_FATAL(parse_run({"--steps", "3\n4"}), "--steps: wants a whole number from 1 to 1e+15, got '3 4'");
}

TEST(OptionsErrors, ChoicesAndSwitches) {
    EXPECT_FATAL(parse_run({"--model", "d13"}), "--model: wants one of d12|d24|d36|d48, got 'd13'");
    EXPECT_FATAL(parse_run({"--schedule", "Cosine"}),
                 "--schedule: wants one of cosine|linear|constant, got 'Cosine'");
    EXPECT_FATAL(parse_run({"--recompute", "all"}),
                 "--recompute: wants one of none|gelu-layernorm|block, got 'all'");
    EXPECT_FATAL(parse_run({"--gain", "sqrt"}, kSgdSai),
                 "--gain: wants one of raw|normalized|sqrt_n|one, got 'sqrt'");
    for (const char* flag : {"--shuffle", "--tune", "--graph"}) {
        EXPECT_FATAL(parse_run({flag, "yes"}), std::string(flag) + ": wants 0 or 1, got 'yes'");
    }
    EXPECT_EXIT(parse_run({"--dry-run=maybe"}), ::testing::ExitedWithCode(1),
                "^rank 0: .*maybe.*see --help\n$");
    EXPECT_FATAL(
        parse_run({"--dry-run", "1"}),
        "'1' is not understood: wants --flag value; quote patterns: --train-data 'data/train_*.bin'");
}

TEST(OptionsErrors, AMissingValue) {
    EXPECT_FATAL(parse_run({"--steps"}), "--steps: its value (N) is missing");
    EXPECT_FATAL(parse_run({"--val-data="}), "--val-data: wants a value (GLOB), got ''");
    EXPECT_FATAL(parse_run({"--output-dir", ""}), "--output-dir: wants a value (DIR), got ''");
    EXPECT_FATAL(parse({"--train-data", "--steps", "5"}),
                 "--train-data: wants a value (GLOB), got '--steps'");
    EXPECT_FATAL(parse_run({"--steps", "--seed"}),
                 "--steps: wants a whole number from 1 to 1e+15, got '--seed'");
    EXPECT_FATAL(parse({}),
                 "--train-data is missing: wants token shards, such as 'data/NAME/train_*.bin'; "
                 "scripts in data/ make them, --help shows examples");
}

TEST(OptionsErrors, UnknownFlags) {
    const auto unknown = [](const std::string& word, const std::string& nearest) {
        EXPECT_FATAL(parse_run({word, "1"}),
                     word + ": unknown flag; did you mean --" + nearest + "? --help lists them all");
    };
    unknown("--learning_rate", "learning-rate");
    unknown("--lr", "learning-rate");
    unknown("--wd", "weight-decay");
    unknown("--bs", "batch-size");
    unknown("--stpes", "steps");
    unknown("--layer", "layers");
    unknown("--output", "output-dir");
    unknown("--beta_1", "beta1");
    unknown("--vocabsize", "vocab-size");
    EXPECT_FATAL(parse_run({"--sedd=3"}), "--sedd: unknown flag; did you mean --seed? --help lists them all");
    EXPECT_FATAL(parse_run({"--use-flash-attention", "1"}),
                 "--use-flash-attention: unknown flag; --help lists them all");
    EXPECT_FATAL(parse_run({"--x", "1"}), "--x: unknown flag; --help lists them all");
    for (const char* stray : {"-x", "data.bin", "-1", "--", "-lr=3"}) {
        EXPECT_EXIT(parse_run({stray, "stray"}), ::testing::ExitedWithCode(1),
                    "^rank 0: '.*' is not understood: wants --flag value; quote patterns: .*\n$")
            << stray;
    }
}

// Both ways round: a flag of one optimizer, for every such flag, is refused by the other's build with the
// reason.
TEST(OptionsErrors, TheOtherOptimizersFlags) {
    Options o;
    std::set<std::string> refused;
    each_option(o, [&](const Flag& flag, auto&, const char*) {
        if (flag.optimizer[0] == '\0') return;
        const bool adamws = flag.optimizer == kAdamW.optimizer;
        const std::string name = std::string("--") + flag.name;
        EXPECT_FATAL(parse_run({name, "0.5"}, adamws ? kSgdSai : kAdamW),
                     name + ": this build's optimizer is " + (adamws ? "SGD-SaI" : "AdamW") +
                         "; for that flag, build with make OPTIMIZER=" + flag.optimizer);
        refused.insert(name);
    });
    EXPECT_EQ(refused, (std::set<std::string>{"--beta1", "--beta2", "--momentum", "--gain"}));
}

TEST(OptionsErrors, WhatDoesNotGoTogether) {
    EXPECT_FATAL(parse_run({"--total-batch", "500000", "--batch-size", "64"}),
                 "--total-batch 500000 tokens is not a multiple of batch-size x seq-len = 64 x 1024 = 65536; "
                 "use 458752 or 524288");
    EXPECT_FATAL(parse_run({"--total-batch", "100"}),
                 "--total-batch 100 tokens is not a multiple of batch-size x seq-len = 8 x 1024 = 8192; "
                 "use 8192");
    EXPECT_FATAL(parse_run({"--channels", "100"}),
                 "--channels 100 is not a multiple of 64, the head size; use --channels 64 --heads 1");
    EXPECT_FATAL(parse_run({"--heads", "16"}),
                 "--channels 768 wants 12 --heads, of 64 channels each, got 16; "
                 "use --heads 12 or --channels 1024");
    EXPECT_FATAL(parse_run({"--steps", "10", "--warmup-steps", "11"}),
                 "--warmup-steps 11 is more than --steps 10; use at most as many");
    EXPECT_FATAL(
        parse_run({"--learning-rate", "0.5", "--weight-decay", "2"}),
        "--learning-rate 0.5 x --weight-decay 2 = 1 flips signs of weights, wants below 1; lower one");
    EXPECT_FATAL(parse_run({"--learning-rate", "2"}),
                 "--learning-rate 2: that is how far AdamW moves a weight; wants at most 1, such as 6e-4");
    EXPECT_FATAL(parse_run({"--val-every", "10"}),
                 "--val-every 10 needs --val-data, which is missing; give it, or --val-every 0");
}

// SGD-SaI's two variants differ in units by thousands: a rate that fits the other one is allowed, but said.
TEST(OptionsWarnings, RatesInTheOtherVariantsUnits) {
    const auto warning = [](const char* gain, const char* lr) {
        ::testing::internal::CaptureStderr();
        parse_run({"--gain", gain, "--learning-rate", lr}, kSgdSai);
        return ::testing::internal::GetCapturedStderr();
    };
    EXPECT_EQ(warning("raw", "20"),
              "rank 0: warning: --learning-rate 20 is large for --gain raw: 1e-3 to 1e-2 is usual; "
              "for normalized, 6 to 60\n");
    EXPECT_EQ(warning("normalized", "0.003"),
              "rank 0: warning: --learning-rate 0.003 is small for --gain normalized: 6 to 60 is "
              "usual; for raw, 1e-3 to 1e-2\n");
    EXPECT_NE(warning("sqrt_n", "20"), "");
    EXPECT_EQ(warning("raw", "0.003"), "");
    EXPECT_EQ(warning("normalized", "20"), "");
    EXPECT_EQ(warning("one", "2"), "");
}

TEST(AdoptShape, TakesTheModelsShape) {
    Options o = parse_run({"--init-from", "m", "--batch-size", "4"});
    adopt_shape(o, {24, 1024, 16, 50257, 512});
    EXPECT_EQ(o.layers, 24);
    EXPECT_EQ(o.channels, 1024);
    EXPECT_EQ(o.heads, 16);
    EXPECT_EQ(o.seq_len, 512);
    EXPECT_EQ(o.total_batch, 4 * 512);
    EXPECT_EQ(o.model, "d24");

    o = parse_run({"--init-from", "m", "--seq-len", "100", "--layers", "2", "--vocab-size", "256"});
    adopt_shape(o, {2, 128, 2, 256, 512});
    EXPECT_EQ(o.seq_len, 100);
    EXPECT_EQ(o.vocab_size, 256);
    EXPECT_EQ(o.model, "custom");
    EXPECT_EQ(o.total_batch, 8 * 100);
}

TEST(AdoptShape, DisagreementIsAnError) {
    const ModelShape model{24, 1024, 16, 50257, 512};
    const auto adopt = [&](std::vector<std::string> words, const ModelShape& shape) {
        words.insert(words.begin(), {"--init-from", "m"});
        Options o = parse_run(words);
        adopt_shape(o, shape);
    };
    adopt({"--model", "d24", "--heads", "16"}, model);
    const auto error = [](const std::string& flag, const std::string& wrong, const std::string& has) {
        return flag + ": " + wrong + " disagrees with the model in --init-from m, which has " + has +
               "; leave that flag away";
    };
    EXPECT_FATAL(adopt({"--layers", "12"}, model), error("--layers", "layers 12", "24"));
    EXPECT_FATAL(adopt({"--channels", "768"}, model), error("--channels", "channels 768", "1024"));
    EXPECT_FATAL(adopt({"--heads", "12"}, model), error("--heads", "heads 12", "16"));
    EXPECT_FATAL(adopt({"--vocab-size", "256"}, model), error("--vocab-size", "vocab-size 256", "50257"));
    EXPECT_FATAL(adopt({"--model", "d12"}, model), error("--model", "layers 12", "24"));
    EXPECT_FATAL(adopt({"--seq-len", "513"}, model),
                 "--seq-len 513 is longer than the 512 positions of the model in --init-from m; "
                 "use at most that");
    EXPECT_FATAL(adopt({"--total-batch", "100"}, model),
                 "--total-batch 100 tokens is not a multiple of batch-size x seq-len = 8 x 512 = 4096; "
                 "use 4096");
    EXPECT_FATAL(adopt({}, {12, 768, 6, 50257, 512}),
                 "--init-from m: the model has 768 channels and 6 heads, wants heads of 64 channels");
    EXPECT_FATAL(adopt({}, {0, 768, 12, 50257, 512}),
                 "--init-from m: the model has layers 0, wants a whole number from 1 to 4096");
    EXPECT_FATAL(adopt({}, {12, 768, 12, 70000, 512}),
                 "--init-from m: the model has vocab-size 70000, wants a whole number from 1 to 65536");
    EXPECT_FATAL(adopt({}, {12, 768, 12, 256, -1}),
                 "--init-from m: the model has seq-len -1, wants a whole number from 1 to 1048576");
}

TEST(Help, FitsAPageNamesEveryFlagOnceAndItsDefault) {
    for (const BuildInfo& build : {kAdamW, kSgdSai}) {
        const std::string help = help_text(build);
        for (const std::string& line : lines_of(help)) {
            EXPECT_LE(line.size(), 100u) << line;
            EXPECT_TRUE(line.empty() || line.back() != ' ') << line;
        }
        const Options defaults = default_options(build);
        each_option(defaults, [&](const Flag& flag, const auto& variable, const char*) {
            const std::string entry =
                std::string("\n  --") + flag.name + (flag.value[0] ? " " : "") + flag.value;
            const size_t at = help.find(entry);
            EXPECT_EQ(at != std::string::npos, in_this_build(flag, build)) << flag.name;
            if (at == std::string::npos) return;
            EXPECT_EQ(help.find(entry + " ", at + 1), std::string::npos) << flag.name << " twice";
            std::string value = option_text(variable);
            if (flag.value[0] == '\0' || value.empty()) return;
            if (flag.default_text[0]) value = flag.default_text;
            const size_t next = help.find("\n  --", at + 1);
            EXPECT_NE(help.substr(at, next - at).find("[" + value + "]"), std::string::npos) << flag.name;
        });
        for (const char* text :
             {"6 N + 6 L C T", "not tuned values", "Fine-tuning", "on one GPU", "First run"}) {
            EXPECT_NE(help.find(text), std::string::npos) << text;
        }
    }
}

// The examples that --help shows are command lines that this build takes.
TEST(Help, ExamplesParse) {
    for (const BuildInfo& build : {kAdamW, kSgdSai}) {
        std::string help = help_text(build);
        for (size_t at; (at = help.find("\\\n")) != std::string::npos;) help.replace(at, 2, " ");
        int examples = 0;
        for (const std::string& line : lines_of(help)) {
            if (line.rfind("  build/", 0) != 0) continue;
            std::istringstream stream(line);
            std::vector<std::string> words;
            for (std::string word; stream >> word;) words.push_back(word);
            words.erase(words.begin());
            EXPECT_GE(parse(words, build).given_flags.size(), 5u) << line;
            examples++;
        }
        EXPECT_EQ(examples, 3);
    }
}

// --help wins over whatever else is wrong, and goes to standard output.
TEST(Help, PrintsAndEndsWell) {
    const auto parse_shown = [](std::vector<std::string> words) {
        dup2(STDERR_FILENO, STDOUT_FILENO);  // a death test sees standard error alone
        parse(words, kSgdSai);
    };
    const char* text = "^Pretrains GPT-2 with SGD-SaI.*--momentum X.*\n$";
    EXPECT_EXIT(parse_shown({"--help"}), ::testing::ExitedWithCode(0), text);
    EXPECT_EXIT(parse_shown({"--steps", "nonsense", "--help", "--no-such-flag"}),
                ::testing::ExitedWithCode(0), text);
}

TEST(PrintOptions, MarksWhatWasGiven) {
    ::testing::internal::CaptureStdout();
    print_options(parse_run({"--steps", "240"}, kSgdSai));
    const std::vector<std::string> lines = lines_of(::testing::internal::GetCapturedStdout());
    const std::set<std::string> set(lines.begin(), lines.end());
    EXPECT_TRUE(set.count("  --steps              240 *"));
    EXPECT_TRUE(set.count("  --warmup-steps       24"));
    EXPECT_TRUE(set.count("  --momentum           0.9"));
    EXPECT_TRUE(set.count("  --val-data           -"));
    for (const std::string& line : lines) EXPECT_EQ(line.find("beta"), std::string::npos);
}

TEST(OptionText, ReadsBackAndIsShort) {
    for (double x : {0.1, 6e-4, 1e-8, 1.0 / 3, 1e15, 123456.0, 0.30000000000000004, 1000.0, 0.0, 5e-324}) {
        EXPECT_EQ(strtod(option_text(x).c_str(), nullptr), x);
    }
    EXPECT_EQ(option_text(6e-4), "0.0006");
    EXPECT_EQ(option_text(1e-8), "1e-08");
    EXPECT_EQ(option_text(1000.0), "1000");
    EXPECT_EQ(option_text(2.5317f), "2.5317");
    EXPECT_EQ(option_text(true), "1");
}

TEST(Fatal, OneLineWithTheRankAndStatusOne) {
    EXPECT_FATAL(fatal("%s: wants %d\nlines, got %d", "file", 1, 2), "file: wants 1 lines, got 2");
    EXPECT_EXIT(
        {
            process_rank() = 7;
            fatal("x");
        },
        ::testing::ExitedWithCode(1), "^rank 7: x\n$");
    EXPECT_EQ(div_exact(12, 4, "a", "b"), 3);
    EXPECT_FATAL(div_exact(13, 4, "a", "b"), "a 13 is not a multiple of b 4");
    EXPECT_EQ(ceil_div(7, 3), 3);
    EXPECT_EQ(ceil_div(6, 3), 2);
    EXPECT_EQ(ceil_div(int64_t{1} << 40, 3), 366503875926);
}

}  // namespace
