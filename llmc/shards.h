// Token shards in llm.c's format: 256 int32 (20240520, 1, number of tokens, vocabulary size or 0 for 50257, 0
// ...), then uint16 tokens.
//
// Whatever is wrong with a shard is found when it is opened, or, for a token beyond the vocabulary, when its
// sample is read: a pass over all tokens of a large dataset would take minutes. Errors are one line of text
// that names the file; empty means that all went well.
#pragma once

#include <glob.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "llmc/file.h"

static_assert(std::endian::native == std::endian::little, "shards are little-endian and read as they lie");

constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
constexpr int kShardHeaderInts = 256;
constexpr uint64_t kShardHeaderBytes = kShardHeaderInts * sizeof(int32_t);
constexpr int64_t kVocabularyOfZero = 50257;  // llm.c's scripts write 0 for GPT-2's

using ShardHeader = std::array<int32_t, kShardHeaderInts>;

struct Shard {
    std::string path;
    int64_t tokens = 0;

    // Whole samples of T + 1 tokens that begin every T tokens.
    int64_t samples(int64_t T) const { return tokens > 0 ? (tokens - 1) / T : 0; }
};

// tokens = the number of tokens of a shard of file_bytes bytes whose header is given. Returns what is wrong
// with it.
inline std::string parse_shard_header(int64_t& tokens, const ShardHeader& header, uint64_t file_bytes,
                                      int64_t vocab_size) {
    if (header[0] != kShardMagic)
        return text_of("is no token shard: magic number %d, wants %d", header[0], kShardMagic);
    if (header[1] != kShardVersion)
        return text_of("is a token shard of version %d: wants version %d", header[1], kShardVersion);
    if (header[2] <= 0) return text_of("has %d tokens in its header: wants at least 1", header[2]);
    if (header[3] < 0) return text_of("has a vocabulary of %d in its header", header[3]);
    const int64_t vocabulary = header[3] == 0 ? kVocabularyOfZero : header[3];
    if (vocabulary > vocab_size)
        return text_of(
            "was made with a vocabulary of %lld%s, the model has %lld: train with --vocab-size %lld",
            vocabulary + 0LL, header[3] == 0 ? " (0 in its header means GPT-2's)" : "", vocab_size + 0LL,
            vocabulary + 0LL);
    const uint64_t wanted = kShardHeaderBytes + sizeof(uint16_t) * static_cast<uint64_t>(header[2]);
    if (file_bytes != wanted)
        return text_of("%s: %d tokens take %llu bytes, it has %llu",
                       file_bytes < wanted ? "is truncated" : "has trailing bytes", header[2], wanted + 0ULL,
                       file_bytes + 0ULL);
    tokens = header[2];
    return "";
}

// Opens a shard and checks its header. vocab_size: the model's.
inline std::string open_shard(File& file, int64_t& tokens, const std::string& path, int64_t vocab_size) {
    std::string error = file.open_to_read(path);
    if (!error.empty()) return error;
    if (file.bytes() == 0) return path + " is empty: wants a token shard";
    if (file.bytes() < kShardHeaderBytes)
        return text_of("%s has %llu bytes: a token shard's header alone has %llu", path.c_str(),
                       file.bytes() + 0ULL, kShardHeaderBytes + 0ULL);
    ShardHeader header;
    error = file.read_at(header.data(), kShardHeaderBytes, 0);
    if (!error.empty()) return error;
    error = parse_shard_header(tokens, header, file.bytes(), vocab_size);
    return error.empty() ? "" : path + " " + error;
}

// out = the shards that match a glob, by name, each opened once and checked.
inline std::string find_shards(std::vector<Shard>& out, const std::string& pattern, int64_t vocab_size) {
    glob_t found{};
    const int failed = glob(pattern.c_str(), GLOB_ERR | GLOB_NOSORT | GLOB_TILDE, nullptr, &found);
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    if (failed == GLOB_NOMATCH || (failed == 0 && paths.empty()))
        return "no file matches " + pattern + " (data/shakespeare.py and data/text.py make token shards)";
    if (failed != 0) return pattern + " cannot be searched for files: " + std::strerror(errno);
    std::sort(paths.begin(), paths.end());  // by bytes: glob's own order is the locale's
    for (const std::string& path : paths) {
        File file;
        Shard shard{path, 0};
        const std::string error = open_shard(file, shard.tokens, path, vocab_size);
        if (!error.empty()) return error;
        out.push_back(std::move(shard));
    }
    return "";
}

// The position of the first token that the vocabulary lacks, or n.
inline size_t first_foreign_token(const uint16_t* tokens, size_t n, int64_t vocab_size) {
    if (*std::max_element(tokens, tokens + n) < vocab_size)
        return n;  // n > 0; this loop vectorises, the next doesn't
    return static_cast<size_t>(std::find_if(tokens, tokens + n, [&](uint16_t t) { return t >= vocab_size; }) -
                               tokens);
}

// Reads samples of shards. One file is open at a time: a dataset may have more shards than a process may open
// files.
class SampleReader {
  public:
    SampleReader(std::vector<Shard> shards, int64_t T, int64_t vocab_size)
        : shards_(std::move(shards)), T_(T), vocab_size_(vocab_size), text_(static_cast<size_t>(T) + 1) {}

    // inputs (T) and targets (T) = a sample of a shard. Every token lies in the vocabulary, or an error names
    // it.
    std::string read(int32_t* inputs, int32_t* targets, size_t shard, int64_t sample) {
        std::string error;
        if (shard != open_shard_) {
            open_shard_ = shards_.size();  // none, until this one is open
            int64_t tokens = 0;
            error = open_shard(file_, tokens, shards_[shard].path, vocab_size_);
            if (!error.empty()) return error;
            if (tokens != shards_[shard].tokens)
                return shards_[shard].path + " has changed since the program began to read it";
            open_shard_ = shard;
        }
        const uint64_t first = static_cast<uint64_t>(sample) * static_cast<uint64_t>(T_);
        error = file_.read_at(text_.data(), text_.size() * sizeof(uint16_t),
                              kShardHeaderBytes + sizeof(uint16_t) * first);
        if (!error.empty()) return error;
        const size_t foreign = first_foreign_token(text_.data(), text_.size(), vocab_size_);
        if (foreign < text_.size())
            return text_of("%s: token %llu is %d, the model's vocabulary has %lld", file_.path().c_str(),
                           first + foreign + 0ULL, text_[foreign], vocab_size_ + 0LL);
        std::copy(text_.begin(), text_.end() - 1, inputs);
        std::copy(text_.begin() + 1, text_.end(), targets);
        return "";
    }

  private:
    std::vector<Shard> shards_;
    int64_t T_, vocab_size_;
    std::vector<uint16_t> text_;  // T + 1
    File file_;
    size_t open_shard_ = SIZE_MAX;
};
