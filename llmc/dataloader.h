// Batches of tokens from shards, in an order that depends on the seed, the files and T alone.
//
// Sample i of a shard is the T + 1 tokens at i T: T inputs and, one further on, T targets. The tail is
// dropped. Update k, counted from 1, takes samples [(k - 1) S, k S) of the whole order, S = total batch / T;
// the order goes on from epoch to epoch without a gap. Ranks take equal contiguous parts of an update's
// samples, micro-steps equal contiguous parts of a rank's: so neither changes what an update sees.
//
// Files are read on a thread of their own, at most two batches ahead.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/sample_order.h"
#include "llmc/shards.h"

// order (n) = the positions 0 .. n sorted by their token, equal ones by position: the backward pass of the
// embedding adds the rows of one token in this order, the same on every run. counts: scratch, resized to
// vocab_size + 1.
inline void sort_positions(int32_t* order, std::vector<int32_t>& counts, const int32_t* tokens, size_t n,
                           int64_t vocab_size) {
    counts.assign(static_cast<size_t>(vocab_size) + 1, 0);
    for (size_t i = 0; i < n; i++) counts[static_cast<size_t>(tokens[i]) + 1]++;
    for (size_t v = 1; v < counts.size(); v++) counts[v] += counts[v - 1];
    for (size_t i = 0; i < n; i++) order[counts[static_cast<size_t>(tokens[i])]++] = static_cast<int32_t>(i);
}

// Where a batch goes: the caller's memory, pinned for instance. order may be empty: then it isn't wanted.
struct Batch {
    std::span<int32_t> tokens;   // (B, T)
    std::span<int32_t> targets;  // (B, T)
    std::span<int32_t> order;    // (B T), see sort_positions()
};

// Calls read(number, slot) for the batches first, first + 1, ... on a thread of its own, at most two ahead of
// next().
class BatchQueue {
  public:
    struct Slot {
        std::vector<int32_t> tokens, targets, order;
        int64_t rows = 0;   // how many of the B rows hold a sample; the others are zero
        std::string error;  // nothing else holds where this isn't empty
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

    // Copies the next batch out and returns its rows. Fatal, here on the caller's thread, where it couldn't
    // be read.
    int64_t next(const Batch& out) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return read_to_ > taken_to_; });
        const Slot& slot = slots_[static_cast<size_t>(taken_to_) % slots_.size()];
        lock.unlock();  // the reader keeps off this slot until taken_to_ has passed it
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
            changed_.wait(
                lock, [&] { return stop_ || read_to_ - taken_to_ < static_cast<int64_t>(slots_.size()); });
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
    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    int64_t read_to_, taken_to_;  // batches below these are read, and given out
    bool reading_ = false, stop_ = false;
    std::thread thread_;
};

// What both loaders need to know. B, T, ranks at least 1.
struct LoaderConfig {
    const char* flag = "--train-data";  // for messages
    std::string files;                  // a glob
    int64_t vocab_size = 0;             // the model's
    int64_t B = 0, T = 0;               // sequences a rank and batch, tokens a sequence
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
            fatal("%s: %s has %lld tokens in %zu shards: one sample takes seq-len + 1 = %lld of one shard",
                  c.flag, c.files.c_str(), tokens + 0LL, shards.size(), c.T + 1LL);
        if (c.B * c.T > INT32_MAX)
            fatal("--batch-size x --seq-len = %lld x %lld: positions in a batch have 32 bits", c.B + 0LL,
                  c.T + 0LL);
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
        else slot.error = c_.flag + (": " + slot.error);
    }

  private:
    LoaderConfig c_;
    SampleOrder order_;
    SampleReader reader_;
    std::vector<int32_t> counts_;
};

// Training batches without an end: for update 1, 2, ..., micro-step 0, 1, ... of each, those of this rank.
//
//   TrainLoader loader({.files = "train_*.bin", .vocab_size = 50257, .B = 8, .T = 1024}, S, seed, shuffle);
//   loader.next({tokens, targets, order});   // each B T numbers, pinned or not
class TrainLoader {
  public:
    // samples_per_update: S, a multiple of B x ranks. Fatal where the files can't be used or hold fewer than
    // S samples.
    TrainLoader(const LoaderConfig& c, int64_t samples_per_update, uint64_t seed, bool shuffle)
        : c_(c),
          set_(c),
          S_(samples_per_update),
          micro_steps_(div_exact(S_, c.B * c.ranks, "--total-batch's samples", "batch-size x ranks")),
          reader_(c, set_, seed, shuffle),
          queue_(0, [this](BatchQueue::Slot& slot, int64_t number) {
              const int64_t update = number / micro_steps_, micro_step = number % micro_steps_;
              reader_.read(slot, update * S_ + S_ / c_.ranks * c_.rank + micro_step * c_.B, c_.B);
          }) {
        if (set_.samples < S_)
            fatal(
                "%s: %s has %lld samples of %lld tokens, one update takes %lld: give more data, or a smaller "
                "--total-batch",
                c.flag, c.files.c_str(), set_.samples + 0LL, c.T + 0LL, S_ + 0LL);
    }

    const std::vector<Shard>& shards() const { return set_.shards; }
    int64_t tokens() const { return set_.tokens; }  // in all shards, tails included
    int64_t samples_per_epoch() const { return set_.samples; }
    int64_t micro_steps() const { return micro_steps_; }  // batches of this rank an update

    // The next batch, in the caller's memory when this returns. Fatal where it can't be read.
    void next(const Batch& out) { queue_.next(out); }

    // Goes to the first micro-step of an update, counted from 1. At once: nothing before it is read.
    void seek(int64_t update) { queue_.restart((update - 1) * micro_steps_); }

  private:
    LoaderConfig c_;
    ShardSet set_;
    int64_t S_, micro_steps_;
    BatchReader reader_;  // the queue's thread alone touches it
    BatchQueue queue_;    // last: its thread ends before the rest
};

// Validation batches: the first `sequences` samples of all ranks together, files front to back, the same on
// each pass.
//
//   loader.rewind();
//   for (int64_t i = 0; i < loader.batches(); i++) { int64_t rows = loader.next({tokens, targets, {}}); ... }
class ValLoader {
  public:
    // sequences: 0 for all; more than there are means all too.
    ValLoader(const LoaderConfig& c, int64_t sequences)
        : c_(c),
          set_(c),
          samples_(sequences == 0 ? set_.samples : std::min(sequences, set_.samples)),
          batches_(ceil_div(samples_, c.B * c.ranks)),
          reader_(c, set_, 0, false),
          queue_(0, [this](BatchQueue::Slot& slot, int64_t number) {
              const int64_t first = (number % batches_ * c_.ranks + c_.rank) * c_.B;
              reader_.read(slot, first, std::clamp<int64_t>(samples_ - first, 0, c_.B));
          }) {}

    const std::vector<Shard>& shards() const { return set_.shards; }
    int64_t tokens() const { return set_.tokens; }
    int64_t samples() const { return samples_; }  // of a pass, all ranks together
    int64_t batches() const { return batches_; }  // of a pass, the same on every rank

    // The next batch. Returns how many of its B rows hold a sample: fewer, even none, in the last batch of a
    // pass. The other rows are zero, tokens and targets. After the last batch comes the first.
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
