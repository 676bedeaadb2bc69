// OUTPUT_DIR/log.jsonl: one JSON object a line, "kind" first. Each line is one write, so that a reader that
// follows the file, or finds it after a crash, sees whole records.
//
//     Logger logger(options.output_dir);
//     logger.write(record("val").add("step", 250).add("loss", short_decimal(loss)));
#pragma once

#include <errno.h>
#include <fcntl.h>  // open
#include <stdint.h>
#include <stdlib.h>  // strtod
#include <string.h>  // strerror
#include <time.h>    // gmtime_r
#include <unistd.h>  // write, close

#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "llmc/fatal.h"
#include "llmc/json.h"     // Json, json_text
#include "llmc/options.h"  // each_option

// The double that prints as the fewest digits from which x can be read back: 2.5317f -> 2.5317, not
// 2.53169989585876... NaN and infinities stay; json_text writes them as null.
inline double short_decimal(float x) { return x == x ? strtod(option_text(x).c_str(), nullptr) : x; }

// {"kind": kind}, to be added to.
inline Json record(const char* kind) { return std::move(Json::object().add("kind", kind)); }

// Now in UTC: "2025-01-31T23:59:59Z".
inline std::string utc_time() {
    const time_t now = time(nullptr);
    struct tm parts;
    gmtime_r(&now, &parts);
    char text[32];
    strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
    return text;
}

// What one update did. A record of step k (from 1) has the loss and the unclipped gradient norm of the k-th
// update's samples, before that update.
struct StepReport {
    int64_t step;
    int64_t tokens;  // from the run's start, this step included
    float loss;      // nats a token
    float grad_norm;
    double learning_rate;
    double step_ms;       // the whole step
    double optimizer_ms;  // the update alone, without the norm
    double tokens_per_second;
};

inline Json train_record(const StepReport& r) {
    Json out = record("train");
    out.add("step", r.step).add("tokens", r.tokens).add("loss", short_decimal(r.loss));
    out.add("grad_norm", short_decimal(r.grad_norm)).add("learning_rate", r.learning_rate);
    out.add("step_ms", r.step_ms).add("optimizer_ms", r.optimizer_ms);
    out.add("tokens_per_second", r.tokens_per_second);
    return out;
}

// Every flag of this build and its value, by the flag's name without dashes; 0|1 flags as numbers.
inline Json options_json(const Options& o) {
    Json out = Json::object();
    each_option(o, [&](const Flag& flag, const auto& value, const char*) {
        if (!in_this_build(flag, o.build)) return;
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, bool>) out.add(flag.name, value ? 1 : 0);
        else out.add(flag.name, value);
    });
    return out;
}

// The head of the `run` record: time, command line, axes of the build, commit, options. The caller adds the
// GPU, the versions, the model and the data.
inline Json run_record(int argc, const char* const* argv, const Options& o, const char* commit) {
    Json command = Json::array();
    for (int i = 0; i < argc; i++) command.push(argv[i]);
    Json out = record("run");
    out.add("version", 1).add("time", utc_time()).add("command", command);
    out.add("device", o.build.device).add("precision", o.build.precision).add("optimizer", o.build.optimizer);
    out.add("commit", commit).add("options", options_json(o));
    return out;
}

class Logger {
  public:
    // Writes nothing: for the ranks that don't log.
    Logger() = default;

    // Creates output_dir and its parents where they are missing. Fatal where that can't be done or no log
    // could be written there, or where one is there already: a run never overwrites another. The log itself
    // comes with the first record, so that a run which fails before can be started again by the same command.
    explicit Logger(const std::string& output_dir)
        : output_dir_(output_dir), path_(output_dir + "/log.jsonl") {
        std::error_code error;
        std::filesystem::create_directories(output_dir, error);
        if (error) {
            fatal("--output-dir %s can't be created: %s; give a directory that can be written",
                  output_dir.c_str(), error.message().c_str());
        }
        create();
        close(std::exchange(fd_, -1));
        unlink(path_.c_str());
    }

    Logger(Logger&& other) noexcept
        : output_dir_(std::move(other.output_dir_)),
          path_(std::move(other.path_)),
          fd_(std::exchange(other.fd_, -1)) {}
    Logger& operator=(Logger&& other) noexcept {
        std::swap(output_dir_, other.output_dir_);
        std::swap(path_, other.path_);
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Logger() {
        if (fd_ >= 0) close(fd_);
    }

    const std::string& path() const { return path_; }

    // Appends one record. The line is with the system when this returns: it outlives the program.
    void write(const Json& record) {
        if (path_.empty()) return;
        if (fd_ < 0) create();
        const std::string line = json_text(record) + "\n";
        for (size_t done = 0; done < line.size();) {
            const ssize_t put = ::write(fd_, line.data() + done, line.size() - done);
            if (put < 0 && errno == EINTR) continue;
            if (put <= 0)
                fatal("%s can't be written: %s; make room and start again", path_.c_str(), strerror(errno));
            done += static_cast<size_t>(put);
        }
    }

  private:
    void create() {
        fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
        if (fd_ >= 0) return;
        if (errno == EEXIST)
            fatal("--output-dir %s holds another run's log.jsonl; give another directory or move it away",
                  output_dir_.c_str());
        fatal("--output-dir %s: log.jsonl can't be created: %s; give a directory that can be written",
              output_dir_.c_str(), strerror(errno));
    }

    std::string output_dir_, path_;
    int fd_ = -1;
};
