// How a matrix product is computed, as a value and as a line of text: the settings that make a cuBLASLt
// algorithm, so that a run's choices can be logged, sent to other ranks and used again, and the file that
// remembers measured ones.
//
//     nn 3072x65536x768 bf16>bf16 gelu_bias assign = algo 66 tile 20 stages 36 splitk 1 ... cluster 2 fused 1
//
// Host only. Settings mean something to one version of cuBLASLt on one GPU; whoever uses a line again has it
// checked by cublasLtMatmulAlgoCheck first (matmul.cuh).
#pragma once

#include <compare>  // operator<=>
#include <cstdint>
#include <cstdio>      // rename
#include <cstdlib>     // getenv
#include <filesystem>  // create_directories
#include <map>
#include <sstream>  // istringstream
#include <string>
#include <type_traits>
#include <utility>   // pair
#include <unistd.h>  // getpid

#include <cublasLt.h>    // the names of an algorithm's settings
#include "llmc/file.h"   // File, text_of
#include "llmc/gpu.cuh"  // kPrecisionName, Write

// ---- what is computed ------------------------------------------------------------------------------------

// Operands as cuBLASLt sees them, which reads our row-major tensors as their column-major transposes:
// D (m, n) = op(A) (m, k) op(B) (k, n). First letter: A as stored (N) or transposed (T); second: B.
enum class MatmulLayout { NN, TN, NT };

// What follows the product before it is rounded and stored.
enum class MatmulEpilogue {
    None,
    Bias,      // + bias
    GeluBias,  // pre_gelu = product + bias is stored too, then gelu
    Dgelu,     // times gelu'(pre_gelu)
    Bgrad,     // of a weight gradient: the bias's gradient too, op(A)'s sums over k
};

// One product of the program; equal keys share a plan.
struct MatmulKey {
    MatmulLayout layout = MatmulLayout::NN;
    MatmulEpilogue epilogue = MatmulEpilogue::None;
    bool fp32_out = false;  // fp32 sums kept as they are (weight gradients) or rounded to floatX
    Write write = Write::Assign;
    size_t m = 0, n = 0, k = 0;

    auto operator<=>(const MatmulKey&) const = default;
};

inline std::string text_of_key(const MatmulKey& key) {
    constexpr const char* kLayouts[] = {"nn", "tn", "nt"};
    constexpr const char* kEpilogues[] = {"none", "bias", "gelu_bias", "dgelu", "bgrad"};
    return text_of("%s %zux%zux%zu %s>%s %s %s", kLayouts[static_cast<int>(key.layout)], key.m, key.n, key.k,
                   kPrecisionName, key.fp32_out ? "fp32" : kPrecisionName,
                   kEpilogues[static_cast<int>(key.epilogue)], key.write == Write::Add ? "add" : "assign");
}

// ---- how -------------------------------------------------------------------------------------------------

struct MatmulSettings {
    int32_t algorithm = -1;  // -1: one that can't be made again; plan_as_it_came() of matmul.cuh
    uint32_t tile = 0, stages = 0;
    int32_t split_k = 1;
    uint32_t reduction = 0, swizzle = 0, custom = 0;
    uint16_t inner_shape = 0, cluster_shape = 0;
    bool fused = true;  // the epilogue inside cuBLASLt's kernel, or a kernel of ours after a plainer product

    bool operator==(const MatmulSettings&) const = default;
};

// The settings exist once: f(name, attribute, value) for each that cuBLASLt knows, the algorithm's number
// first. Written and parsed as text, read from and set in an algorithm by walking this.
template <class Settings, class F>
inline void each_setting(Settings& s, F f) {
    f("algo", CUBLASLT_ALGO_CONFIG_ID, s.algorithm);
    f("tile", CUBLASLT_ALGO_CONFIG_TILE_ID, s.tile);
    f("stages", CUBLASLT_ALGO_CONFIG_STAGES_ID, s.stages);
    f("splitk", CUBLASLT_ALGO_CONFIG_SPLITK_NUM, s.split_k);
    f("reduction", CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, s.reduction);
    f("swizzle", CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, s.swizzle);
    f("custom", CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, s.custom);
    f("inner", CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, s.inner_shape);
    f("cluster", CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, s.cluster_shape);
}

inline std::string text_of_settings(const MatmulSettings& settings) {
    std::string text;
    each_setting(settings, [&](const char* name, cublasLtMatmulAlgoConfigAttributes_t, auto value) {
        text += std::string(name) + " " + std::to_string(value) + " ";
    });
    return text + (settings.fused ? "fused 1" : "fused 0");
}

// False, and `out` as it was, where the text isn't exactly what text_of_settings writes.
inline bool parse_settings(MatmulSettings& out, const std::string& text) {
    std::istringstream words(text);
    MatmulSettings settings;
    each_setting(settings, [&](const char*, cublasLtMatmulAlgoConfigAttributes_t, auto& value) {
        std::string word;
        int64_t number = 0;
        words >> word >> number;
        value = static_cast<std::remove_reference_t<decltype(value)>>(number);
    });
    std::string word;
    int fused = 0;
    words >> word >> fused;
    settings.fused = fused != 0;
    if (text_of_settings(settings) != text) return false;  // wrong names, ranges, order or rest all show here
    out = settings;
    return true;
}

// "KEY = SETTINGS" taken apart; false where it isn't that.
inline bool parse_plan(std::string& key, MatmulSettings& settings, const std::string& line) {
    const size_t at = line.find(" = ");
    if (at == std::string::npos || at == 0 || !parse_settings(settings, line.substr(at + 3))) return false;
    key = line.substr(0, at);
    return true;
}

// ---- the file that remembers -----------------------------------------------------------------------------

// Where measured plans are kept between runs; empty, and so nowhere, for a user without a home.
inline std::string default_matmul_cache_path() {
    const char* cache = std::getenv("XDG_CACHE_HOME");
    const char* home = std::getenv("HOME");
    if (cache && cache[0] == '/') return std::string(cache) + "/train_gpt2/matmul_plans.txt";
    if (home && home[0] == '/') return std::string(home) + "/.cache/train_gpt2/matmul_plans.txt";
    return "";
}

// A text file: a title, then a line a plan: device TAB plan TAB checksum. Rows of other devices are kept, so
// that machines may share a home. It is a convenience: a failure to read or write it never ends the program.
class MatmulCache {
  public:
    // `device` holds all that a measurement depends on beside the key: GPU, driver, library, workspace,
    // candidates. An empty path is a cache that is always empty. A damaged file is ignored and replaced; one
    // that isn't ours is ignored and left alone.
    MatmulCache(const std::string& path, const std::string& device) : path_(path), device_(device) {
        std::error_code nothing;
        if (path_.empty() || !std::filesystem::exists(path_, nothing)) return;
        complaint_ = load(rows_);
        if (!complaint_.empty()) rows_.clear();
    }

    // What is wrong with the file, for one line of warning; empty where it was read, or isn't there.
    const std::string& complaint() const { return complaint_; }

    // The settings remembered for a product on this device, or null.
    const MatmulSettings* find(const std::string& key) const {
        const auto row = rows_.find({device_, key});
        return row == rows_.end() ? nullptr : &row->second;
    }

    void remember(const std::string& key, const MatmulSettings& settings) {
        rows_[{device_, key}] = settings;
        changed_ = true;
    }

    // Replaces the file in one step, if there is something new; what another process wrote meanwhile stays.
    // False, and the file as it was, where that can't be done.
    bool save() {
        if (!changed_ || path_.empty()) return true;
        if (foreign_) return false;
        changed_ = false;
        std::error_code error;
        std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), error);
        Rows all;
        if (!std::filesystem::exists(path_, error) || !load(all).empty()) all.clear();
        for (const auto& [key, settings] : rows_)
            if (key.first == device_) all[key] = settings;
        if (foreign_) return false;
        std::string text = std::string(kTitle) + "\n";
        for (const auto& [key, settings] : all) {
            const std::string row = key.first + "\t" + key.second + " = " + text_of_settings(settings);
            text += row + "\t" + checksum(row) + "\n";
        }
        const std::string temporary = path_ + "." + std::to_string(getpid());
        File file;
        std::string failure = file.create(temporary);
        if (failure.empty()) failure = file.write(text.data(), text.size());
        if (file.is_open() && failure.empty()) failure = file.sync_and_close();
        if (failure.empty() && std::rename(temporary.c_str(), path_.c_str()) == 0) return true;
        std::remove(temporary.c_str());
        return false;
    }

  private:
    static constexpr const char* kTitle = "train_gpt2 matmul plans 1";
    static constexpr uint64_t kLargestBytes = uint64_t{16} << 20;
    using Rows = std::map<std::pair<std::string, std::string>, MatmulSettings>;  // (device, key)

    // FNV-1a, 64 bits: finds what an editor or a full disk did to a row.
    static std::string checksum(const std::string& row) {
        uint64_t hash = 14695981039346656037u;
        for (unsigned char c : row) hash = (hash ^ c) * 1099511628211u;
        return text_of("%016llx", static_cast<unsigned long long>(hash));
    }

    // Adds the file's rows; an error names what is wrong with it.
    std::string load(Rows& rows) {
        std::string text;
        const std::string error = read_text_file(text, path_, kLargestBytes);
        foreign_ = !error.empty();
        if (foreign_) return error;
        std::istringstream lines(text);
        std::string line;
        std::getline(lines, line);
        foreign_ =
            line != kTitle && std::string(kTitle).rfind(text, 0) != 0;  // a title cut short is damage of ours
        if (foreign_)
            return path_ + " does not begin with '" + kTitle + "': not written by this program, left alone";
        if (line != kTitle) return path_ + " is damaged in line 1";
        for (int number = 2; std::getline(lines, line); number++) {
            const size_t second = line.rfind('\t'), first = line.find('\t');
            std::string key;
            MatmulSettings settings;
            const bool sound = first < second && second != std::string::npos &&
                               checksum(line.substr(0, second)) == line.substr(second + 1) &&
                               parse_plan(key, settings, line.substr(first + 1, second - first - 1));
            if (!sound) return text_of("%s is damaged in line %d", path_.c_str(), number);
            rows[{line.substr(0, first), key}] = settings;
        }
        return "";
    }

    std::string path_, device_, complaint_;
    Rows rows_;
    bool changed_ = false, foreign_ = false;
};
