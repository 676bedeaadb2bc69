// In which order samples are read: a function of the seed and of the shards' sizes alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

// Where each sample of an endless order lies. Not shuffled: the shards front to back, again and again.
// Shuffled: each epoch permutes the shards, and the samples within each shard, anew. Either way every sample
// comes once an epoch.
//
// A permutation is a Fisher-Yates shuffle fed by a counter-based generator with the key (seed, epoch, shard),
// so any place is found without going through those before it. It remembers the permutation of the shard
// asked for last, 4 bytes a sample; another shard costs one shuffle, and a loader goes from shard to shard
// once.
class SampleOrder {
  public:
    struct Place {
        size_t shard;
        int64_t sample;
        bool operator==(const Place&) const = default;
    };

    // samples[i]: of shard i; below 2^32 each, at least one in all.
    SampleOrder(std::vector<int64_t> samples, uint64_t seed, bool shuffle)
        : samples_(std::move(samples)),
          seed_(seed),
          shuffle_(shuffle),
          shards_(samples_.size()),
          ends_(samples_.size()) {
        total_ = std::accumulate(samples_.begin(), samples_.end(), int64_t{0});
        enter_epoch(0);
    }

    int64_t samples_per_epoch() const { return total_; }

    // The place of the index-th sample, from 0, of the whole order.
    Place locate(int64_t index) {
        if (index / total_ != epoch_) enter_epoch(index / total_);
        const int64_t within = index % total_;
        const size_t turn =
            static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), within) - ends_.begin());
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

    // A 64-bit permutation in which every bit of the input reaches every bit of the output (Steele, Lea,
    // Flood 2014, "Fast splittable pseudorandom number generators", mix64 with Stafford's variant 13).
    static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }

    // out = a permutation of 0 .. out.size(), of this epoch and shard; kNone for the permutation of the
    // shards.
    template <class Index>
    void permute(std::vector<Index>& out, size_t shard) const {
        constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // odd: the counter's multiples of it differ
        const uint64_t key = mix(mix(mix(seed_ + kStep) + static_cast<uint64_t>(epoch_)) + shard);
        std::iota(out.begin(), out.end(), Index{0});
        for (size_t left = out.size(); left > 1; left--) {
            // The high half of the product is uniform in [0, left) but for a bias of left / 2^64.
            const size_t pick =
                static_cast<size_t>(static_cast<unsigned __int128>(mix(key + kStep * left)) * left >> 64);
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
    std::vector<size_t> shards_;  // in the epoch's order
    std::vector<int64_t> ends_;   // samples of the epoch up to and with shards_[turn]
    size_t permuted_shard_ = kNone;
    std::vector<uint32_t> permutation_;
};
