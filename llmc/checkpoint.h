// Saves a model as a directory that Hugging Face opens: config.json beside model.safetensors (fp32, its
// names, no padding). pretrained.h reads it.
//
//   OUTPUT_DIR/step_00000240/{config.json, model.safetensors}, OUTPUT_DIR/latest -> step_00000240
//
// A directory under that name is whole: it is filled as .step_00000240.partial, brought to the disk, then
// renamed.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <system_error>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/file.h"
#include "llmc/model_config.h"
#include "llmc/pretrained.h"
#include "llmc/safetensors.h"

// Fills out (count) with elements first .. first + count of tensors[tensor].
using WeightSource = std::function<void(float* out_cpu, size_t tensor, size_t first, size_t count)>;

// "step_00000240"
inline std::string checkpoint_name(int64_t step) {
    return text_of("step_%08lld", static_cast<long long>(step));
}

// Brings a directory's entries to the disk: without it, a rename may not survive a power cut.
inline std::string sync_directory(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    std::string error;
    // Some network file systems can't do it and say EINVAL: they need no help then.
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL))
        error = path + " cannot be written: " + std::strerror(errno);
    if (fd >= 0) ::close(fd);
    return error;
}

// Writes config.json and model.safetensors into a directory that exists.
inline std::string write_model(const std::string& dir, const ModelShape& shape,
                               const std::vector<SavedTensor>& tensors, const WeightSource& source) {
    std::vector<NewTensor> list;
    for (const SavedTensor& t : tensors) list.push_back({t.name, kF32, t.shape});
    std::string error = write_safetensors(
        dir + "/model.safetensors", list, [&](void* out_cpu, size_t tensor, uint64_t first, uint64_t bytes) {
            source(static_cast<float*>(out_cpu), tensor, first / sizeof(float), bytes / sizeof(float));
        });
    if (!error.empty()) return error;
    const std::string config = config_text(shape);
    File file;
    error = file.create(dir + "/config.json");
    if (error.empty()) error = file.write(config.data(), config.size());
    return error.empty() ? file.sync_and_close() : error;
}

// Renames a filled directory to its final name and points `latest` at it. One of that name from an earlier
// run is moved aside first and removed last, so that at every moment a whole one is there.
inline std::string publish_checkpoint(const std::string& output_dir, const std::string& partial,
                                      const std::string& name) {
    const std::string final = output_dir + "/" + name, replaced = output_dir + "/." + name + ".replaced";
    const auto failure = [](const std::string& path) {
        return path + " cannot be renamed: " + std::strerror(errno);
    };
    std::error_code ignored;
    std::string error = sync_directory(partial);
    if (!error.empty()) return error;
    std::filesystem::remove_all(replaced, ignored);
    if (rename(final.c_str(), replaced.c_str()) != 0 && errno != ENOENT) return failure(final);
    if (rename(partial.c_str(), final.c_str()) != 0) {
        error = failure(partial);
        rename(replaced.c_str(), final.c_str());
        return error;
    }
    error = sync_directory(output_dir);
    if (!error.empty()) return error;
    std::filesystem::remove_all(replaced, ignored);

    const std::string link = output_dir + "/latest", new_link = output_dir + "/.latest.partial";
    unlink(new_link.c_str());
    if (symlink(name.c_str(), new_link.c_str()) != 0 || rename(new_link.c_str(), link.c_str()) != 0) {
        // The model is safe under its own name, and some file systems have no links: no reason to end a run.
        warn("%s cannot be pointed at %s: %s", link.c_str(), name.c_str(), std::strerror(errno));
        unlink(new_link.c_str());
    }
    return sync_directory(output_dir);
}

// Saves the model as OUTPUT_DIR/step_00000240/ and returns that path. OUTPUT_DIR is made where it is missing.
// A failure, a full disk, say, is fatal: the partial directory is removed, what was saved before stays. Host
// memory: 16 MiB.
inline std::string save_model(const std::string& output_dir, int64_t step, const ModelShape& shape,
                              const std::vector<SavedTensor>& tensors, const WeightSource& source) {
    const std::string name = checkpoint_name(step), partial = output_dir + "/." + name + ".partial";
    std::error_code failed;
    std::filesystem::remove_all(partial, failed);  // of a run that was killed while it saved
    std::filesystem::create_directories(partial, failed);
    if (failed) fatal("--output-dir: %s cannot be created: %s", partial.c_str(), failed.message().c_str());
    std::string error = write_model(partial, shape, tensors, source);
    if (error.empty()) error = publish_checkpoint(output_dir, partial, name);
    if (!error.empty()) {
        std::filesystem::remove_all(partial, failed);
        fatal("the model of step %lld is not saved: %s", static_cast<long long>(step), error.c_str());
    }
    return output_dir + "/" + name;
}
