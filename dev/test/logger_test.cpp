// Proves that log.jsonl is what other programs rely on: every line is valid JSON whatever goes in, numbers
// come back with the same bits, nothing is overwritten, and what can't be written is one line that says so.
// And that the screen's lines fit 80 columns, with a bar on a terminal and without a control character
// elsewhere.
//     make build/host/test/logger_test && build/host/test/logger_test
#include "llmc/logger.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <bit>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "dev/test/death.h"
#include "dev/test/temp_dir.h"
#include "llmc/screen.h"

namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

class Log : public ::testing::Test {
  protected:
    // The records of the log in dir_ / "run", each line parsed strictly by another library.
    std::vector<ordered_json> records() const {
        const std::string text = read_file(dir_ + "/run/log.jsonl");
        EXPECT_TRUE(text.empty() || text.back() == '\n');
        std::vector<ordered_json> out;
        std::stringstream stream(text);
        for (std::string line; std::getline(stream, line);) {
            out.push_back(ordered_json::parse(line));
            EXPECT_EQ(out.back().begin().key(), "kind");
        }
        return out;
    }

    TempDir temp_;
    const std::string dir_ = temp_.path();
};

StepReport some_step() {
    return {.step = 240,
            .tokens = 245760,
            .loss = 3.2911f,
            .grad_norm = 0.842f,
            .learning_rate = 6e-4,
            .step_ms = 1234.4,
            .optimizer_ms = 1.25,
            .tokens_per_second = 424813};
}

TEST_F(Log, RecordsInOrderWithTheFieldsOfTheDesign) {
    {
        Logger logger(dir_ + "/run");
        logger.write(train_record(some_step()));
        EXPECT_EQ(records().size(), 1u) << "a record is in the file as soon as write() returns";
        logger.write(record("end").add("step", 240).add("status", "done"));
    }
    const auto out = records();
    ASSERT_EQ(out.size(), 2u);
    std::vector<std::string> names;
    for (const auto& item : out[0].items()) names.push_back(item.key());
    EXPECT_EQ(names, (std::vector<std::string>{"kind", "step", "tokens", "loss", "grad_norm", "learning_rate",
                                               "step_ms", "optimizer_ms", "tokens_per_second"}));
    EXPECT_EQ(out[0]["kind"], "train");
    EXPECT_EQ(out[0]["step"], 240);
    EXPECT_EQ(out[0]["tokens"], 245760);
    EXPECT_EQ(out[0]["loss"].dump(), "3.2911") << "short, yet exact";
    EXPECT_EQ(out[0]["learning_rate"], 6e-4);
    EXPECT_EQ(out[1].dump(), R"({"kind":"end","step":240,"status":"done"})");
}

TEST_F(Log, FloatsComeBackBitForBit) {
    std::mt19937 random(1);
    Logger logger(dir_ + "/run");
    std::vector<float> floats = {0.0f,     -0.0f, 1e-45f,     3.4028235e38f, 1.17549435e-38f,
                                 10.8249f, 0.1f,  16777217.0f};
    while (floats.size() < 3000) {
        const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
        if (std::isfinite(x)) floats.push_back(x);
    }
    for (float x : floats) logger.write(record("val").add("loss", short_decimal(x)));
    const auto out = records();
    ASSERT_EQ(out.size(), floats.size());
    for (size_t i = 0; i < floats.size(); i++) {
        EXPECT_EQ(std::bit_cast<uint32_t>(out[i]["loss"].get<float>()), std::bit_cast<uint32_t>(floats[i]));
    }
}

TEST_F(Log, NonFiniteNumbersAreNull) {
    Logger logger(dir_ + "/run");
    StepReport r = some_step();
    r.loss = NAN;
    r.grad_norm = INFINITY;
    r.step_ms = -INFINITY;
    logger.write(train_record(r));
    const auto out = records();
    EXPECT_TRUE(out[0]["loss"].is_null());
    EXPECT_TRUE(out[0]["grad_norm"].is_null());
    EXPECT_TRUE(out[0]["step_ms"].is_null());
    EXPECT_EQ(out[0]["step"], 240);
}

TEST_F(Log, WholeNumbersBeyond32Bits) {
    Logger logger(dir_ + "/run");
    logger.write(record("memory").add("owner", "parameters").add("bytes", int64_t{1} << 53));
    EXPECT_EQ(records()[0]["bytes"].get<int64_t>(), int64_t{1} << 53);
}

// Text is what a model wrote: any bytes at all. A valid text comes back as it was; a line break can't end the
// record.
TEST_F(Log, AnyTextIsOneValidLine) {
    std::vector<std::string> texts = {"",
                                      "plain",
                                      "a\"b\\c/",
                                      "two\nlines\r\n\ttab",
                                      std::string("nul\0byte", 8),
                                      "\x01\x1f\x7f",
                                      "h\xC3\xA9, \xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\x98\x80",
                                      "\xE2\x80\xA8"};
    const size_t valid = texts.size();
    for (const char* bad : {"\xFF", "a\xC3", "\xC3(", "\xE4\xBD", "\xED\xA0\x80", "\xC0\x80",
                            "\xF4\x90\x80\x80", "\xF0\x9F\x98", "\x80\x80"}) {
        texts.push_back(bad);
    }
    std::mt19937 random(2);
    while (texts.size() < 2000) {
        std::string text(random() % 40, ' ');
        for (char& c : text) c = static_cast<char>(random());
        texts.push_back(text);
    }
    Logger logger(dir_ + "/run");
    for (const std::string& text : texts) logger.write(record("sample").add("step", 1).add("text", text));
    const auto out = records();
    ASSERT_EQ(out.size(), texts.size());
    for (size_t i = 0; i < valid; i++) EXPECT_EQ(out[i]["text"].get<std::string>(), texts[i]);
    EXPECT_EQ(out[valid]["text"].get<std::string>(), "\xEF\xBF\xBD");
    EXPECT_EQ(out[valid + 1]["text"].get<std::string>(), "a\xEF\xBF\xBD");
}

TEST_F(Log, RunRecordExplainsTheRun) {
    const char* argv[] = {"train_gpt2", "--train-data", "a b.bin", "--shuffle", "0", "--steps", "240"};
    const Options o = parse_options(7, argv, BuildInfo{"sgd_sai", "fp32", "sim"});
    Logger logger(dir_ + "/run");
    logger.write(run_record(7, argv, o, "abc123"));
    const ordered_json run = records()[0];
    EXPECT_EQ(run["kind"], "run");
    EXPECT_EQ(run["version"], 1);
    EXPECT_EQ(run["command"].get<std::vector<std::string>>(), std::vector<std::string>(argv, argv + 7));
    EXPECT_EQ(run["device"], "sim");
    EXPECT_EQ(run["precision"], "fp32");
    EXPECT_EQ(run["optimizer"], "sgd_sai");
    EXPECT_EQ(run["commit"], "abc123");
    const std::string time = run["time"];
    EXPECT_EQ(time.size(), std::string("2025-01-31T23:59:59Z").size());
    struct tm parts = {};
    const char* rest = strptime(time.c_str(), "%Y-%m-%dT%H:%M:%SZ", &parts);
    ASSERT_NE(rest, nullptr) << time;
    EXPECT_EQ(*rest, '\0');
    EXPECT_NEAR(static_cast<double>(timegm(&parts)), static_cast<double>(::time(nullptr)), 60);
    size_t flags = 0;
    each_option(o, [&](const Flag& flag, const auto& variable, const char*) {
        EXPECT_EQ(run["options"].contains(flag.name), in_this_build(flag, o.build)) << flag.name;
        if (!in_this_build(flag, o.build)) return;
        flags++;
        const auto& logged = run["options"][flag.name];
        if constexpr (std::is_same_v<std::decay_t<decltype(variable)>, bool>)
            EXPECT_EQ(logged, variable ? 1 : 0);
        else EXPECT_EQ(logged, variable) << flag.name;
    });
    EXPECT_EQ(run["options"].size(), flags);
    EXPECT_EQ(run["options"]["learning-rate"].dump(), "0.003");
    EXPECT_EQ(run["options"]["shuffle"].dump(), "0");
}

TEST_F(Log, CreatesParents) {
    Logger logger(dir_ + "/a/b/c/");
    logger.write(record("end"));
    EXPECT_EQ(read_file(dir_ + "/a/b/c/log.jsonl"), "{\"kind\":\"end\"}\n");
}

TEST_F(Log, ALoggerThatWasNotOpenedWritesNothing) {
    Logger logger;
    logger.write(record("end"));
    Logger moved = std::move(logger);
    moved.write(record("end"));
    EXPECT_EQ(moved.path(), "");
}

TEST_F(Log, AMovedLoggerGoesOn) {
    Logger first(dir_ + "/run");
    first.write(record("run"));
    Logger second;
    second = std::move(first);
    second.write(record("end"));
    EXPECT_EQ(records().size(), 2u);
}

using LogErrors = Log;

TEST_F(LogErrors, NothingIsOverwritten) {
    { Logger(dir_ + "/run").write(record("end")); }
    const std::string before = read_file(dir_ + "/run/log.jsonl");
    EXPECT_FATAL(Logger(dir_ + "/run"), "--output-dir " + dir_ +
                                            "/run holds another run's log.jsonl; give another directory or "
                                            "move it away");
    EXPECT_EQ(read_file(dir_ + "/run/log.jsonl"), before);
    // A link that leads nowhere is something there, too.
    fs::create_directory(dir_ + "/link");
    fs::create_symlink(dir_ + "/elsewhere", dir_ + "/link/log.jsonl");
    EXPECT_EXIT(Logger(dir_ + "/link"), ::testing::ExitedWithCode(1), "holds another run's log.jsonl");
    EXPECT_FALSE(fs::exists(dir_ + "/elsewhere"));
}

TEST_F(LogErrors, ADirectoryThatCannotBe) {
    write_file(dir_ + "/file", "x");
    EXPECT_FATAL(Logger(dir_ + "/file"), "--output-dir " + dir_ +
                                             "/file can't be created: Not a directory; give a "
                                             "directory that can be written");
    EXPECT_FATAL(Logger(dir_ + "/file/below"), "--output-dir " + dir_ +
                                                   "/file/below can't be created: Not a "
                                                   "directory; give a directory that can be written");
    EXPECT_EXIT(
        Logger("/proc/none"), ::testing::ExitedWithCode(1),
        "^rank 0: --output-dir /proc/none can't be created: .*; give a directory that can be written\n$");
    EXPECT_EXIT(Logger("/proc"), ::testing::ExitedWithCode(1),
                "^rank 0: --output-dir /proc: log.jsonl can't be created: .*; give a directory .*\n$");
    EXPECT_EQ(read_file(dir_ + "/file"), "x");
}

TEST_F(LogErrors, AFullDisk) {
    const auto fill = [&] {
        signal(SIGXFSZ, SIG_IGN);
        const rlimit limit{4000, 4000};  // the message itself goes into a file of the death test
        setrlimit(RLIMIT_FSIZE, &limit);
        Logger logger(dir_ + "/run");
        for (int i = 0; i < 1000; i++) logger.write(record("val").add("step", i));
    };
    EXPECT_FATAL(fill(), dir_ + "/run/log.jsonl can't be written: File too large; make room and start again");
}

// ---- the screen ------------------------------------------------------------------------------------------

TEST(ScreenText, CountsAndDurations) {
    EXPECT_EQ(short_count(0), "0");
    EXPECT_EQ(short_count(999), "999");
    EXPECT_EQ(short_count(999.6), "1.00k");
    EXPECT_EQ(short_count(1234), "1.23k");
    EXPECT_EQ(short_count(12345), "12.3k");
    EXPECT_EQ(short_count(424813), "425k");
    EXPECT_EQ(short_count(999600), "1.00M");
    EXPECT_EQ(short_count(1.5e9), "1.50G");
    EXPECT_EQ(short_count(NAN), "nan");
    EXPECT_EQ(short_duration(0), "0s");
    EXPECT_EQ(short_duration(59.4), "59s");
    EXPECT_EQ(short_duration(59.6), "1m00s");
    EXPECT_EQ(short_duration(754), "12m34s");
    EXPECT_EQ(short_duration(6 * 3600 + 46 * 60 + 59), "6h46m");
    EXPECT_EQ(short_duration(12 * 86400 + 3 * 3600), "12d03h");
    EXPECT_EQ(short_duration(480 * 86400.0), "480d");
    EXPECT_EQ(short_duration(-1), "?");
    EXPECT_EQ(short_duration(NAN), "?");
}

TEST(ScreenText, StepLine) {
    EXPECT_EQ(step_line(some_step(), 20000, 24390),
              "  240/20000 loss 3.2911 norm 0.842 lr 6.00e-04 1234 ms 425k tok/s 6h46m left");
    StepReport r = some_step();
    r.loss = NAN;
    r.step_ms = 2.345;
    EXPECT_EQ(step_line(r, 240, 0), "240/240 loss nan norm 0.842 lr 6.00e-04 2.3 ms 425k tok/s 0s left");
}

TEST(ScreenText, EveryLineFits) {
    for (int64_t steps : {int64_t{1}, int64_t{20000}, int64_t{1000000}, int64_t{9999999}}) {
        for (float loss : {0.0f, 10.8249f, 999.99997f, 3e38f, INFINITY}) {
            for (float norm : {1e-30f, 1.0f, 123456.0f, 3e38f}) {
                for (double ms : {0.1, 99.96, 99999.4, 1e6, 1e9}) {
                    for (double left : {-1.0, 3599.0, 86399.0, 8e7}) {
                        const StepReport r{steps, 1, loss, norm, 6e-4, ms, 1, 999400};
                        const std::string line = step_line(r, steps, left);
                        EXPECT_LE(line.size(), 79u) << line;
                        EXPECT_EQ(line.substr(line.size() - 5), " left") << "nothing is cut: " << line;
                    }
                }
            }
        }
    }
    EXPECT_EQ(step_line({int64_t{1} << 60, 1, -3e38f, 3e38f, 6e-4, 1e300, 1, 1e300}, int64_t{1} << 60, 1e300)
                  .size(),
              79u);
}

TEST(ScreenText, ProgressBar) {
    for (int64_t step = 0; step <= 1000; step++) EXPECT_EQ(progress_bar(step, 1000).size(), 79u);
    EXPECT_EQ(progress_bar(0, 240), "[>" + std::string(69, ' ') + "]   0.0%");
    EXPECT_EQ(progress_bar(120, 240), "[" + std::string(35, '=') + ">" + std::string(34, ' ') + "]  50.0%");
    EXPECT_EQ(progress_bar(240, 240), "[" + std::string(70, '=') + "] 100.0%");
}

StepReport last_step() {
    StepReport last = some_step();
    last.step = 242;
    return last;
}

// The text without the words before " left", which depend on the clock.
std::string without_time(std::string text) {
    for (size_t at = 0; (at = text.find(" left", at + 1)) != std::string::npos;) {
        const size_t word = text.rfind(' ', at - 1);
        text.erase(word, at - word);
        at = word;
    }
    return text;
}

std::string shown(bool terminal) {
    ::testing::internal::CaptureStdout();
    {
        Screen screen(242, terminal);
        screen.message("begin");
        screen.step(some_step());
        screen.message("validation loss %.4f", 3.25);
        screen.step(last_step());
    }
    return ::testing::internal::GetCapturedStdout();
}

TEST(Screen, PlainLinesWhereItIsNoTerminal) {
    const std::string text = shown(false);
    EXPECT_EQ(text.find('\r'), std::string::npos);
    EXPECT_EQ(text.find('\x1b'), std::string::npos);
    EXPECT_EQ(without_time(text), "begin\n" + without_time(step_line(some_step(), 242, 1)) +
                                      "\nvalidation loss 3.2500\n" +
                                      without_time(step_line(last_step(), 242, 0)) + "\n");
    EXPECT_NE(text.find(" 0s left\n"), std::string::npos) << "after the last step nothing is left";
}

// What is left on a terminal that clears lines as told: the same lines, and no rest of a bar.
TEST(Screen, OnATerminalTheBarLeavesNoTrace) {
    const std::string text = shown(true);
    const std::string bar = "\n" + progress_bar(240, 242);
    EXPECT_NE(text.find(bar + "\r" + "\r\x1b[K"), std::string::npos) << "the cursor waits at the left";
    std::string seen, line;
    for (size_t i = 0; i < text.size(); i++) {
        if (text.compare(i, 4, "\r\x1b[K") == 0) line = "", i += 3;
        else if (text[i] == '\n') seen += line + "\n", line = "";
        else if (text[i] != '\r') line += text[i];
    }
    EXPECT_EQ(line, "");
    EXPECT_EQ(without_time(seen), without_time(shown(false)));
}

}  // namespace
