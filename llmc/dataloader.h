// Tokens from shards in llm.c's format, in an order that depends on the seed, the files and T alone.
//
// A shard: 256 int32 (20240520, 1, number of tokens, vocabulary size or 0 for 50257, 0 ...), then uint16 tokens.
// Sample i of a shard is the T + 1 tokens at i T: T inputs and, one further on, T targets. The tail is dropped. Update k,
// counted from 1, takes samples [(k - 1) S, k S) of the whole order, S = total batch / T; the order goes on from epoch to
// epoch without a gap. Ranks take equal contiguous parts of an update's samples, micro-steps equal contiguous parts of
// a rank's: so neither changes what an update sees.
//
// Files are read on a thread of their own, at most two batches ahead. Whatever is wrong with a file is found when it is
// opened, or, for a token beyond the vocabulary, when the batch is read: a pass over all tokens would take minutes.
#pragma once

#include <glob.h>

#include <algorithm>
#include <array>
#include <bit>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/file.h"

static_assert(std::endian::native == std::endian::little, "shards are little-endian and read as they lie");

// ---- shards ---------------------------------------------------------------------------------------------------------

constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
constexpr int kShardHeaderInts = 256;
constexpr uint64_t kShardHeaderBytes = kShardHeaderInts * sizeof(int32_t);
constexpr int64_t kVocabularyOfZero = 50257;   // llm.c's scripts write 0 for GPT-2's

using ShardHeader = std::array<int32_t, kShardHeaderInts>;

struct Shard {
    std::string path;
    int64_t tokens = 0;

    // Whole samples of T + 1 tokens that begin every T tokens.
    int64_t samples(int64_t T) const { return tokens > 0 ? (tokens - 1) / T : 0; }
};

// tokens = the number of tokens of a shard of file_bytes bytes whose header is given. Returns what is wrong with it.
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
        return text_of("was made with a vocabulary of %lld%s, the model has %lld: train with --vocab-size %lld",
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
    std::sort(paths.begin(), paths.end());   // by bytes: glob's own order is the locale's
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
    if (*std::max_element(tokens, tokens + n) < vocab_size) return n;   // n > 0; this loop vectorises, the next doesn't
    return static_cast<size_t>(std::find_if(tokens, tokens + n, [&](uint16_t t) { return t >= vocab_size; }) - tokens);
}

// Reads samples of shards. One file is open at a time: a dataset may have more shards than a process may open files.
class SampleReader {
  public:
    SampleReader(std::vector<Shard> shards, int64_t T, int64_t vocab_size)
        : shards_(std::move(shards)), T_(T), vocab_size_(vocab_size), text_(static_cast<size_t>(T) + 1) {}

    // inputs (T) and targets (T) = a sample of a shard. Every token lies in the vocabulary, or an error names it.
    std::string read(int32_t* inputs, int32_t* targets, size_t shard, int64_t sample) {
        std::string error;
        if (shard != open_shard_) {
            open_shard_ = shards_.size();   // none, until this one is open
            int64_t tokens = 0;
            error = open_shard(file_, tokens, shards_[shard].path, vocab_size_);
            if (!error.empty()) return error;
            if (tokens != shards_[shard].tokens)
                return shards_[shard].path + " has changed since the program began to read it";
            open_shard_ = shard;
        }
        const uint64_t first = static_cast<uint64_t>(sample) * static_cast<uint64_t>(T_);
        error = file_.read_at(text_.data(), text_.size() * sizeof(uint16_t), kShardHeaderBytes + sizeof(uint16_t) * first);
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
    std::vector<uint16_t> text_;   // T + 1
    File file_;
    size_t open_shard_ = SIZE_MAX;
};

// ---- order ----------------------------------------------------------------------------------------------------------

// Where each sample of an endless order lies. Not shuffled: the shards front to back, again and again. Shuffled: each
// epoch permutes the shards, and the samples within each shard, anew. Either way every sample comes once an epoch.
//
// A permutation is a Fisher-Yates shuffle fed by a counter-based generator with the key (seed, epoch, shard), so any place
// is found without going through those before it. It remembers the permutation of the shard asked for last, 4 bytes
// a sample; another shard costs one shuffle, and a loader goes from shard to shard once.
class SampleOrder {
  public:
    struct Place {
        size_t shard;
        int64_t sample;
        bool operator==(const Place&) const = default;
    };

    // samples[i]: of shard i; below 2^32 each, at least one in all.
    SampleOrder(std::vector<int64_t> samples, uint64_t seed, bool shuffle)
        : samples_(std::move(samples)), seed_(seed), shuffle_(shuffle), shards_(samples_.size()),
          ends_(samples_.size()) {
        total_ = std::accumulate(samples_.begin(), samples_.end(), int64_t{0});
        enter_epoch(0);
    }

    int64_t samples_per_epoch() const { return total_; }

    // The place of the index-th sample, from 0, of the whole order.
    Place locate(int64_t index) {
        if (index / total_ != epoch_) enter_epoch(index / total_);
        const int64_t within = index % total_;
        const size_t turn = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), within) - ends_.begin());
        const size_t shard = shards_[turn];
        const int64_t sample = within - (ends_[turn] - samples_[shard]);
        if (!shuffle_) return {shard, sample};
        if (shard != permuted_shard_) {
            permutation_.resize(static_cast<size_t>(samples_[shard]));
            permute(permutation_, shard);
            permuted_shard_ = shard;
        }
        return {shard, permutation_[static_cast<size_t>(sample)]};
    }

  private:
    static constexpr size_t kNone = SIZE_MAX;

    // A 64-bit permutation in which every bit of the input reaches every bit of the output (Steele, Lea, Flood 2014,
    // "Fast splittable pseudorandom number generators", mix64 with Stafford's variant 13).
    static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }

    // out = a permutation of 0 .. out.size(), of this epoch and shard; kNone for the permutation of the shards.
    template <class Index>
    void permute(std::vector<Index>& out, size_t shard) const {
        constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;   // odd: the counter's multiples of it differ
        const uint64_t key = mix(mix(mix(seed_ + kStep) + static_cast<uint64_t>(epoch_)) + shard);
        std::iota(out.begin(), out.end(), Index{0});
        for (size_t left = out.size(); left > 1; left--) {
            // The high half of the product is uniform in [0, left) but for a bias of left / 2^64.
            const size_t pick = static_cast<size_t>(static_cast<unsigned __int128>(mix(key + kStep * left)) * left >> 64);
            std::swap(out[left - 1], out[pick]);
        }
    }

    void enter_epoch(int64_t epoch) {
        epoch_ = epoch;
        permuted_shard_ = kNone;
        std::iota(shards_.begin(), shards_.end(), size_t{0});
        if (shuffle_) permute(shards_, kNone);
        int64_t end = 0;
        for (size_t turn = 0; turn < shards_.size(); turn++) ends_[turn] = end += samples_[shards_[turn]];
    }

    std::vector<int64_t> samples_;
    uint64_t seed_;
    bool shuffle_;
    int64_t total_ = 0;
    int64_t epoch_ = 0;
    std::vector<size_t> shards_;   // in the epoch's order
    std::vector<int64_t> ends_;    // samples of the epoch up to and with shards_[turn]
    size_t permuted_shard_ = kNone;
    std::vector<uint32_t> permutation_;
};

// order (n) = the positions 0 .. n sorted by their token, equal ones by position: the backward pass of the embedding adds
// the rows of one token in this order, the same on every run. counts: scratch, resized to vocab_size + 1.
inline void sort_positions(int32_t* order, std::vector<int32_t>& counts, const int32_t* tokens, size_t n,
                           int64_t vocab_size) {
    counts.assign(static_cast<size_t>(vocab_size) + 1, 0);
    for (size_t i = 0; i < n; i++) counts[static_cast<size_t>(tokens[i]) + 1]++;
    for (size_t v = 1; v < counts.size(); v++) counts[v] += counts[v - 1];
    for (size_t i = 0; i < n; i++) order[counts[static_cast<size_t>(tokens[i])]++] = static_cast<int32_t>(i);
}

// ---- batches --------------------------------------------------------------------------------------------------------

// Where a batch goes: the caller's memory, pinned for instance. order may be empty: then it isn't wanted.
struct Batch {
    std::span<int32_t> tokens;    // (B, T)
    std::span<int32_t> targets;   // (B, T)
    std::span<int32_t> order;     // (B T), see sort_positions()
};

// Calls read(number, slot) for the batches first, first + 1, ... on a thread of its own, at most two ahead of next().
class BatchQueue {
  public:
    struct Slot {
        std::vector<int32_t> tokens, targets, order;
        int64_t rows = 0;    // how many of the B rows hold a sample; the others are zero
        std::string error;   // nothing else holds where this isn't empty
    };
    using Read = std::function<void(Slot& slot, int64_t number)>;

    BatchQueue(int64_t first, Read read) : read_(std::move(read)), read_to_(first), taken_to_(first) {
        thread_ = std::thread([this] { run(); });
    }
    BatchQueue(const BatchQueue&) = delete;
    ~BatchQueue() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    // Copies the next batch out and returns its rows. Fatal, here on the caller's thread, where it couldn't be read.
    int64_t next(const Batch& out) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return read_to_ > taken_to_; });
        const Slot& slot = slots_[static_cast<size_t>(taken_to_) % slots_.size()];
        lock.unlock();   // the reader keeps off this slot until taken_to_ has passed it
        if (!slot.error.empty()) fatal("%s", slot.error.c_str());
        const int64_t rows = slot.rows;
        std::copy(slot.tokens.begin(), slot.tokens.end(), out.tokens.begin());
        std::copy(slot.targets.begin(), slot.targets.end(), out.targets.begin());
        if (!out.order.empty()) std::copy(slot.order.begin(), slot.order.end(), out.order.begin());
        lock.lock();
        taken_to_++;
        lock.unlock();
        changed_.notify_all();
        return rows;
    }

    // The number of the batch that next() gives.
    int64_t position() const {
        std::lock_guard lock(mutex_);
        return taken_to_;
    }

    // Drops what is read ahead: next() gives batch `first`.
    void restart(int64_t first) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !reading_; });
        read_to_ = taken_to_ = first;
        lock.unlock();
        changed_.notify_all();
    }

  private:
    void run() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] {
                return stop_ || read_to_ - taken_to_ < static_cast<int64_t>(slots_.size());
            });
            if (stop_) return;
            reading_ = true;
            const int64_t number = read_to_;
            lock.unlock();
            read_(slots_[static_cast<size_t>(number) % slots_.size()], number);
            lock.lock();
            reading_ = false;
            read_to_++;
            changed_.notify_all();
        }
    }

    Read read_;
    std::array<Slot, 2> slots_;
    mutable std::mutex mutex_;             // guards what follows
    std::condition_variable changed_;
    int64_t read_to_, taken_to_;           // batches below these are read, and given out
    bool reading_ = false, stop_ = false;
    std::thread thread_;
};

// What both loaders need to know. B, T, ranks at least 1.
struct LoaderConfig {
    const char* flag = "--train-data";   // for messages
    std::string files;                   // a glob
    int64_t vocab_size = 0;              // the model's
    int64_t B = 0, T = 0;                // sequences a rank and batch, tokens a sequence
    int rank = 0, ranks = 1;
};

// The shards of a loader, and how many samples they have. Fatal where they can't be used.
struct ShardSet {
    std::vector<Shard> shards;
    int64_t tokens = 0, samples = 0;

    explicit ShardSet(const LoaderConfig& c) {
        const std::string error = find_shards(shards, c.files, c.vocab_size);
        if (!error.empty()) fatal("%s: %s", c.flag, error.c_str());
        for (const Shard& shard : shards) {
            tokens += shard.tokens;
            samples += shard.samples(c.T);
        }
        if (samples == 0)
            fatal("%s: %s has %lld tokens in %zu shards: one sample takes seq-len + 1 = %lld of one shard", c.flag,
                  c.files.c_str(), tokens + 0LL, shards.size(), c.T + 1LL);
        if (c.B * c.T > INT32_MAX)
            fatal("--batch-size x --seq-len = %lld x %lld: positions in a batch have 32 bits", c.B + 0LL, c.T + 0LL);
    }

    std::vector<int64_t> samples_of_shards(int64_t T) const {
        std::vector<int64_t> counts;
        for (const Shard& shard : shards) counts.push_back(shard.samples(T));
        return counts;
    }
};

// Fills a slot with `rows` samples of the order from index `first` on, and zeros below them.
class BatchReader {
  public:
    BatchReader(const LoaderConfig& c, const ShardSet& set, uint64_t seed, bool shuffle)
        : c_(c), order_(set.samples_of_shards(c.T), seed, shuffle), reader_(set.shards, c.T, c.vocab_size) {}

    void read(BatchQueue::Slot& slot, int64_t first, int64_t rows) {
        const size_t n = static_cast<size_t>(c_.B * c_.T);
        slot.tokens.assign(n, 0);
        slot.targets.assign(n, 0);
        slot.order.resize(n);
        slot.rows = rows;
        slot.error.clear();
        for (int64_t row = 0; row < rows && slot.error.empty(); row++) {
            const SampleOrder::Place place = order_.locate(first + row);
            const size_t at = static_cast<size_t>(row * c_.T);
            slot.error = reader_.read(&slot.tokens[at], &slot.targets[at], place.shard, place.sample);
        }
        if (slot.error.empty())
            sort_positions(slot.order.data(), counts_, slot.tokens.data(), n, c_.vocab_size);
        else
            slot.error = c_.flag + (": " + slot.error);
    }

  private:
    LoaderConfig c_;
    SampleOrder order_;
    SampleReader reader_;
    std::vector<int32_t> counts_;
};

// Training batches without an end: for update 1, 2, ..., micro-step 0, 1, ... of each, those of this rank.
//
//   TrainLoader loader({.files = "data/train_*.bin", .vocab_size = 50257, .B = 8, .T = 1024}, S, seed, shuffle);
//   loader.next({tokens, targets, order});   // each B T numbers, pinned or not
class TrainLoader {
  public:
    // samples_per_update: S, a multiple of B x ranks. Fatal where the files can't be used or hold fewer than S samples.
    TrainLoader(const LoaderConfig& c, int64_t samples_per_update, uint64_t seed, bool shuffle)
        : c_(c), set_(c), S_(samples_per_update),
          micro_steps_(div_exact(S_, c.B * c.ranks, "--total-batch's samples", "batch-size x ranks")),
          reader_(c, set_, seed, shuffle), queue_(0, [this](BatchQueue::Slot& slot, int64_t number) {
              const int64_t update = number / micro_steps_, micro_step = number % micro_steps_;
              reader_.read(slot, update * S_ + S_ / c_.ranks * c_.rank + micro_step * c_.B, c_.B);
          }) {
        if (set_.samples < S_)
            fatal("%s: %s has %lld samples of %lld tokens, one update takes %lld: give more data, or a smaller "
                  "--total-batch",
                  c.flag, c.files.c_str(), set_.samples + 0LL, c.T + 0LL, S_ + 0LL);
    }

    const std::vector<Shard>& shards() const { return set_.shards; }
    int64_t tokens() const { return set_.tokens; }              // in all shards, tails included
    int64_t samples_per_epoch() const { return set_.samples; }
    int64_t micro_steps() const { return micro_steps_; }        // batches of this rank an update

    // The next batch, in the caller's memory when this returns. Fatal where it can't be read.
    void next(const Batch& out) { queue_.next(out); }

    // Goes to the first micro-step of an update, counted from 1. At once: nothing before it is read.
    void seek(int64_t update) { queue_.restart((update - 1) * micro_steps_); }

  private:
    LoaderConfig c_;
    ShardSet set_;
    int64_t S_, micro_steps_;
    BatchReader reader_;   // the queue's thread alone touches it
    BatchQueue queue_;     // last: its thread ends before the rest
};

// Validation batches: the first `sequences` samples of all ranks together, files front to back, the same on each pass.
//
//   loader.rewind();
//   for (int64_t i = 0; i < loader.batches(); i++) { int64_t rows = loader.next({tokens, targets, {}}); ... }
class ValLoader {
  public:
    // sequences: 0 for all; more than there are means all too.
    ValLoader(const LoaderConfig& c, int64_t sequences)
        : c_(c), set_(c), samples_(sequences == 0 ? set_.samples : std::min(sequences, set_.samples)),
          batches_(ceil_div(samples_, c.B * c.ranks)), reader_(c, set_, 0, false),
          queue_(0, [this](BatchQueue::Slot& slot, int64_t number) {
              const int64_t first = (number % batches_ * c_.ranks + c_.rank) * c_.B;
              reader_.read(slot, first, std::clamp<int64_t>(samples_ - first, 0, c_.B));
          }) {}

    const std::vector<Shard>& shards() const { return set_.shards; }
    int64_t tokens() const { return set_.tokens; }
    int64_t samples() const { return samples_; }   // of a pass, all ranks together
    int64_t batches() const { return batches_; }   // of a pass, the same on every rank

    // The next batch. Returns how many of its B rows hold a sample: fewer, even none, in the last batch of a pass. The
    // other rows are zero, tokens and targets. After the last batch comes the first.
    int64_t next(const Batch& out) { return queue_.next(out); }

    // Goes back to the first batch. Costs nothing after a whole pass: the first is read ahead by then.
    void rewind() {
        if (queue_.position() % batches_ != 0) queue_.restart(0);
    }

  private:
    LoaderConfig c_;
    ShardSet set_;
    int64_t samples_, batches_;
    BatchReader reader_;
    BatchQueue queue_;
};
