// llmc/dataloader.h: the order of the data is the one that is documented, whatever the batch size and the
// number of ranks; every bad file is one line that names it.
#include "llmc/dataloader.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <map>
#include <random>
#include <set>

#include "dev/test/temp_dir.h"

namespace {

constexpr int64_t kVocab = 50257;

// The bytes of a shard; claimed: the number of tokens that the header gives, where it lies.
std::string shard_bytes(const std::vector<uint16_t>& tokens, int32_t vocabulary = 0, int64_t claimed = -1) {
    ShardHeader header{};
    header[0] = kShardMagic;
    header[1] = kShardVersion;
    header[2] = claimed >= 0 ? static_cast<int32_t>(claimed) : static_cast<int32_t>(tokens.size());
    header[3] = vocabulary;
    return std::string(reinterpret_cast<const char*>(header.data()), kShardHeaderBytes) +
           std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(uint16_t));
}

// Tokens first, first + 1, ...: each says where it comes from.
std::vector<uint16_t> counting(int first, int count) {
    std::vector<uint16_t> tokens(static_cast<size_t>(count));
    std::iota(tokens.begin(), tokens.end(), static_cast<uint16_t>(first));
    return tokens;
}

// Three shards of 101, 40 and 3 tokens. With T = 8 they have 12, 4 and 0 samples.
struct Shards {
    TempDir dir;
    Shards() {
        write_file(dir / "train_000000.bin", shard_bytes(counting(1000, 101)));
        write_file(dir / "train_000001.bin", shard_bytes(counting(2000, 40)));
        write_file(dir / "train_000002.bin", shard_bytes(counting(3000, 3)));
    }
    std::string glob() const { return dir / "train_*.bin"; }
};

struct HostBatch {
    std::vector<int32_t> tokens, targets, order;
    explicit HostBatch(int64_t n) : tokens(static_cast<size_t>(n), -1), targets(tokens), order(tokens) {}
    Batch memory() { return {tokens, targets, order}; }
};

std::string error_of(const std::string& bytes, int64_t vocab_size = kVocab) {
    TempDir dir;
    write_file(dir / "a.bin", bytes);
    std::vector<Shard> shards;
    const std::string error = find_shards(shards, dir / "a.bin", vocab_size);
    if (!error.empty()) {
        EXPECT_NE(error.find(dir / "a.bin"), error.npos) << error << ": the file is not named";
        EXPECT_EQ(error.find('\n'), error.npos) << error;
    }
    return error;
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// ---- shards -----------------------------------------------------------------------------------------------

TEST(Shards, GoodOnesAreFoundInTheOrderOfTheirNames) {
    Shards files;
    std::vector<Shard> shards;
    ASSERT_EQ(find_shards(shards, files.glob(), kVocab), "");
    ASSERT_EQ(shards.size(), 3u);
    EXPECT_EQ(shards[0].path, files.dir / "train_000000.bin");
    EXPECT_EQ(shards[2].path, files.dir / "train_000002.bin");
    EXPECT_EQ(shards[0].tokens, 101);
    EXPECT_EQ(shards[0].samples(8), 12);  // 12 * 8 + 1 = 97 <= 101 < 105
    EXPECT_EQ(shards[1].samples(8), 4);
    EXPECT_EQ(shards[1].samples(13), 3);  // 3 * 13 + 1 = 40: to the last token
    EXPECT_EQ(shards[1].samples(39), 1);
    EXPECT_EQ(shards[1].samples(40), 0);
    EXPECT_EQ(shards[2].samples(8), 0);
}

TEST(Shards, EveryBadFileIsNamedWithWhatWasWantedAndGot) {
    const std::vector<uint16_t> tokens = counting(0, 100);
    const std::string good = shard_bytes(tokens, kVocab);
    EXPECT_EQ(error_of(good), "");
    EXPECT_HAS(error_of(""), "is empty");
    EXPECT_HAS(error_of(good.substr(0, 1)), "has 1 bytes: a token shard's header alone has 1024");
    EXPECT_HAS(error_of(good.substr(0, 1023)), "has 1023 bytes");
    EXPECT_HAS(error_of(good.substr(0, 1024)), "is truncated: 100 tokens take 1224 bytes, it has 1024");
    EXPECT_HAS(error_of(good.substr(0, good.size() - 1)), "is truncated");
    EXPECT_HAS(error_of(good + "x"), "has trailing bytes: 100 tokens take 1224 bytes, it has 1225");
    EXPECT_HAS(error_of(shard_bytes({}, 0)), "has 0 tokens");
    EXPECT_HAS(error_of(shard_bytes(tokens, 0, INT32_MAX)),
               "is truncated: 2147483647 tokens take 4294968318 bytes");
    EXPECT_HAS(error_of(shard_bytes(tokens, -1)), "vocabulary of -1");

    ShardHeader header{};
    header[0] = 20240801;  // Llama's shards
    header[1] = 7;
    std::string foreign(reinterpret_cast<const char*>(header.data()), kShardHeaderBytes);
    EXPECT_HAS(error_of(foreign + "  "), "is no token shard: magic number 20240801, wants 20240520");
    header[0] = kShardMagic;
    foreign = std::string(reinterpret_cast<const char*>(header.data()), kShardHeaderBytes);
    EXPECT_HAS(error_of(foreign + "  "), "is a token shard of version 7: wants version 1");
    header[1] = 1;
    header[2] = -5;
    foreign = std::string(reinterpret_cast<const char*>(header.data()), kShardHeaderBytes);
    EXPECT_HAS(error_of(foreign + "  "), "has -5 tokens");
}

TEST(Shards, TheHeadersVocabularyMayBeSmallerThanTheModels) {
    const std::vector<uint16_t> tokens = counting(0, 100);
    EXPECT_EQ(error_of(shard_bytes(tokens, 256), 256), "");
    EXPECT_EQ(error_of(shard_bytes(tokens, 256), 50257), "");
    EXPECT_EQ(error_of(shard_bytes(tokens, 0), 50257), "");
    EXPECT_EQ(error_of(shard_bytes(tokens, 0), 50304), "");
    EXPECT_HAS(error_of(shard_bytes(tokens, 257), 256), "vocabulary of 257, the model has 256");
    EXPECT_HAS(error_of(shard_bytes(tokens, 0), 50256),
               "vocabulary of 50257 (0 in its header means GPT-2's)");
}

TEST(Shards, WhatIsNoFileIsAnError) {
    TempDir dir;
    std::vector<Shard> shards;
    EXPECT_HAS(find_shards(shards, dir / "none_*.bin", kVocab), "no file matches " + (dir / "none_*.bin"));
    EXPECT_HAS(find_shards(shards, dir / "none.bin", kVocab), "no file matches");
    EXPECT_HAS(find_shards(shards, "", kVocab), "no file matches");
    EXPECT_HAS(find_shards(shards, dir.path(), kVocab), dir.path() + " is not a regular file");
    ASSERT_EQ(mkfifo((dir / "pipe.bin").c_str(), 0600), 0);  // opening it would wait for a writer
    EXPECT_HAS(find_shards(shards, dir / "pipe.bin", kVocab), "is not a regular file");
    ASSERT_EQ(symlink("nowhere", (dir / "dangling.bin").c_str()), 0);
    EXPECT_HAS(find_shards(shards, dir / "dang*.bin", kVocab), "cannot be opened: No such file");
}

// ---- order ------------------------------------------------------------------------------------------------

TEST(Order, UnshuffledIsTheFilesFrontToBackAgainAndAgain) {
    SampleOrder order({3, 0, 2, 1}, 7, false);
    ASSERT_EQ(order.samples_per_epoch(), 6);
    const std::vector<SampleOrder::Place> epoch = {{0, 0}, {0, 1}, {0, 2}, {2, 0}, {2, 1}, {3, 0}};
    for (int64_t i = 0; i < 30; i++) EXPECT_EQ(order.locate(i), epoch[static_cast<size_t>(i % 6)]) << i;
}

std::vector<std::pair<size_t, int64_t>> epoch_of(SampleOrder& order, int64_t epoch) {
    std::vector<std::pair<size_t, int64_t>> places;
    for (int64_t i = 0; i < order.samples_per_epoch(); i++) {
        const auto place = order.locate(epoch * order.samples_per_epoch() + i);
        places.push_back({place.shard, place.sample});
    }
    return places;
}

TEST(Order, ShuffledHasEverySampleOnceAnEpochAndShardsInOnePiece) {
    const std::vector<int64_t> samples = {13, 0, 1, 200, 64};
    SampleOrder order(samples, 1337, true);
    std::set<std::vector<std::pair<size_t, int64_t>>> orders;
    for (int64_t epoch = 0; epoch < 20; epoch++) {
        const auto places = epoch_of(order, epoch);
        auto sorted = places;
        std::sort(sorted.begin(), sorted.end());
        std::vector<std::pair<size_t, int64_t>> all;
        for (size_t shard = 0; shard < samples.size(); shard++)
            for (int64_t i = 0; i < samples[shard]; i++) all.push_back({shard, i});
        EXPECT_EQ(sorted, all) << "epoch " << epoch;
        int changes = 0;
        for (size_t i = 1; i < places.size(); i++) changes += places[i].first != places[i - 1].first;
        EXPECT_EQ(changes, 3) << "4 shards have samples: each is read in one piece";
        orders.insert(places);
    }
    EXPECT_EQ(orders.size(), 20u) << "epochs repeat";
}

TEST(Order, IsAFunctionOfTheSeedAndNotOfTheQuestionsAskedBefore) {
    const std::vector<int64_t> samples = {13, 5, 200, 64};
    SampleOrder a(samples, 1, true), b(samples, 1, true), other(samples, 2, true);
    const int64_t n = 5 * a.samples_per_epoch();
    std::vector<SampleOrder::Place> forward;
    for (int64_t i = 0; i < n; i++) forward.push_back(a.locate(i));
    std::mt19937_64 random(3);
    int same_as_other = 0;
    for (int i = 0; i < 3000; i++) {
        const int64_t at = static_cast<int64_t>(random() % static_cast<uint64_t>(n));
        EXPECT_EQ(b.locate(at), forward[static_cast<size_t>(at)]) << at;
        same_as_other += other.locate(at) == forward[static_cast<size_t>(at)];
    }
    EXPECT_LT(same_as_other, 300) << "another seed gives the same order";  // by chance, below 1 in 50
}

// Chi-squared over all n! orders, 100 expected of each. The bound is 6 standard deviations above the mean.
void expect_uniform(const std::map<std::vector<int64_t>, int>& counts, size_t orders) {
    ASSERT_EQ(counts.size(), orders) << "some orders never come";
    double chi2 = 0;
    for (const auto& [order, count] : counts) chi2 += (count - 100.0) * (count - 100.0) / 100.0;
    const double freedom = static_cast<double>(orders) - 1;
    EXPECT_LT(chi2, freedom + 6 * std::sqrt(2 * freedom));
}

TEST(Order, AllOrdersOfSamplesAndOfShardsAreEquallyLikely) {
    std::map<std::vector<int64_t>, int> samples, shards;
    SampleOrder one_shard({4}, 5, true), four_shards({1, 1, 1, 1}, 5, true);
    for (int64_t epoch = 0; epoch < 2400; epoch++) {
        std::vector<int64_t> a, b;
        for (const auto& [shard, sample] : epoch_of(one_shard, epoch)) a.push_back(sample);
        for (const auto& [shard, sample] : epoch_of(four_shards, epoch))
            b.push_back(static_cast<int64_t>(shard));
        samples[a]++;
        shards[b]++;
    }
    expect_uniform(samples, 24);
    expect_uniform(shards, 24);
}

TEST(Order, ShardsOfOneSizeAreShuffledDifferently) {
    SampleOrder order({50, 50}, 9, true);
    const auto places = epoch_of(order, 0);
    int same = 0;
    for (size_t i = 0; i < 50; i++) same += places[i].second == places[50 + i].second;
    EXPECT_LT(same, 10);  // 1 expected by chance
}

// A run that is resumed must find its place again: the order may not change between versions of the program
// either. The expected places come from the same definition written a second time, in Python with its whole
// numbers of any size.
TEST(Order, StaysWhatItWasInTheFirstVersion) {
    SampleOrder order({5, 3}, 1337, true);
    std::string places;
    for (int64_t i = 0; i < 16; i++) {
        const auto place = order.locate(i);
        places += std::to_string(place.shard) + ":" + std::to_string(place.sample) + " ";
    }
    EXPECT_EQ(places, "0:2 0:1 0:4 0:3 0:0 1:1 1:2 1:0 0:0 0:3 0:2 0:4 0:1 1:2 1:0 1:1 ");
}

TEST(Order, PositionsAreSortedStablyByTheirToken) {
    std::mt19937 random(11);
    for (size_t n : {1, 2, 63, 1000}) {
        std::vector<int32_t> tokens(n), order(n), counts;
        for (int32_t& t : tokens) t = static_cast<int32_t>(random() % 37);
        sort_positions(order.data(), counts, tokens.data(), n, 37);
        std::vector<int32_t> expected(n);
        std::iota(expected.begin(), expected.end(), 0);
        std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
            return tokens[static_cast<size_t>(a)] < tokens[static_cast<size_t>(b)];
        });
        EXPECT_EQ(order, expected);
    }
}

// ---- training batches -------------------------------------------------------------------------------------

LoaderConfig config(const std::string& glob, int64_t B, int64_t T, int rank = 0, int ranks = 1) {
    return {.files = glob, .vocab_size = kVocab, .B = B, .T = T, .rank = rank, .ranks = ranks};
}

// The inputs of updates 1 .. updates as all ranks and micro-steps see them, put together.
std::vector<int32_t> inputs_of(const std::string& glob, int64_t S, int64_t B, int ranks, int64_t updates,
                               uint64_t seed, bool shuffle) {
    const int64_t T = 8, micro_steps = S / (B * ranks);
    std::vector<int32_t> all(static_cast<size_t>(updates * S * T), -1);
    for (int rank = 0; rank < ranks; rank++) {
        TrainLoader loader(config(glob, B, T, rank, ranks), S, seed, shuffle);
        EXPECT_EQ(loader.micro_steps(), micro_steps);
        HostBatch batch(B * T);
        for (int64_t update = 0; update < updates; update++)
            for (int64_t m = 0; m < micro_steps; m++) {
                loader.next(batch.memory());
                const int64_t row = update * S + rank * (S / ranks) + m * B;
                std::copy(batch.tokens.begin(), batch.tokens.end(), all.begin() + row * T);
                for (size_t i = 0; i < batch.tokens.size();
                     i++)  // counting tokens: the target is the next number
                    EXPECT_EQ(batch.targets[i], batch.tokens[i] + 1);
                for (size_t i = 1; i < batch.order.size(); i++) {
                    const int32_t a = batch.order[i - 1], b = batch.order[i];
                    const int32_t token_a = batch.tokens[static_cast<size_t>(a)];
                    const int32_t token_b = batch.tokens[static_cast<size_t>(b)];
                    EXPECT_TRUE(token_a < token_b || (token_a == token_b && a < b));
                }
            }
    }
    return all;
}

TEST(Train, TheUpdatesSamplesFollowTheOrderWhateverTheBatchSizeAndRanks) {
    Shards files;
    const int64_t S = 12, T = 8, updates = 7;  // 84 samples: 5 epochs and a bit
    for (bool shuffle : {false, true}) {
        SampleOrder order({12, 4, 0}, 42, shuffle);
        std::vector<int32_t> expected;
        for (int64_t i = 0; i < updates * S; i++) {
            const auto place = order.locate(i);
            for (int64_t t = 0; t < T; t++)
                expected.push_back(static_cast<int32_t>(1000 * (place.shard + 1)) +
                                   static_cast<int32_t>(place.sample * T + t));
        }
        const std::pair<int64_t, int> layouts[] = {{12, 1}, {1, 1}, {4, 1}, {3, 1},
                                                   {6, 2},  {1, 2}, {4, 3}, {1, 12}};
        for (auto [B, ranks] : layouts)
            EXPECT_EQ(inputs_of(files.glob(), S, B, ranks, updates, 42, shuffle), expected)
                << "B " << B << ", ranks " << ranks << ", shuffle " << shuffle;
    }
}

TEST(Train, TheSeedDecidesAndTheDirectoryDoesNot) {
    Shards here, there;
    const auto a = inputs_of(here.glob(), 4, 2, 1, 8, 1, true);
    EXPECT_EQ(inputs_of(there.glob(), 4, 2, 1, 8, 1, true), a);
    EXPECT_NE(inputs_of(here.glob(), 4, 2, 1, 8, 2, true), a);
}

TEST(Train, SeekingIsLikeReadingUpToThere) {
    Shards files;
    const int64_t B = 2, T = 8, S = 6;
    TrainLoader loader(config(files.glob(), B, T), S, 5, true);
    std::vector<std::vector<int32_t>> read;
    HostBatch batch(B * T);
    for (int i = 0; i < 60; i++) {
        loader.next(batch.memory());
        read.push_back(batch.tokens);
    }
    std::mt19937 random(1);
    for (int i = 0; i < 300; i++) {  // at any state of the reading thread, forward and backward
        const int64_t update = 1 + static_cast<int64_t>(random() % 18);
        loader.seek(update);
        for (uint32_t j = 0; j < random() % 5; j++) {
            loader.next(batch.memory());
            ASSERT_EQ(batch.tokens, read[static_cast<size_t>((update - 1) * 3) + j]) << update << " " << j;
        }
    }
}

TEST(Train, TokensNextToTheEndOfAShardAreReadAndNotPassed) {
    TempDir dir;
    write_file(dir / "a.bin", shard_bytes(counting(0, 17)));  // T = 16: one sample, to the last token
    TrainLoader loader(config(dir / "a.bin", 1, 16), 1, 0, false);
    HostBatch batch(16);
    for (int epoch = 0; epoch < 3; epoch++) {
        loader.next(batch.memory());
        EXPECT_EQ(batch.tokens.front(), 0);
        EXPECT_EQ(batch.targets.back(), 16);
    }
    EXPECT_EQ(loader.tokens(), 17);
    EXPECT_EQ(loader.samples_per_epoch(), 1);
}

TEST(Train, AShardBeyondTwoGiBIsReadToItsEnd) {
    TempDir dir;
    const int64_t tokens = 1'600'000'001, T = 1000;  // 3.2 GB, nearly all of it a hole that takes no disk
    write_file(dir / "big.bin", shard_bytes({}, 0, tokens));
    const uint64_t last = kShardHeaderBytes + 2 * static_cast<uint64_t>(tokens - T - 1);
    ASSERT_EQ(truncate((dir / "big.bin").c_str(), static_cast<off_t>(kShardHeaderBytes + 2 * tokens)), 0);
    std::fstream file(dir / "big.bin", std::ios::in | std::ios::out | std::ios::binary);
    const auto text = counting(7, T + 1);
    file.seekp(static_cast<std::streamoff>(last));
    file.write(reinterpret_cast<const char*>(text.data()), static_cast<std::streamsize>(text.size() * 2));
    file.close();

    TrainLoader loader(config(dir / "big.bin", 1, T), 1, 0, false);
    ASSERT_EQ(loader.samples_per_epoch(), 1'600'000);
    HostBatch batch(T);
    loader.seek(1'600'000);
    loader.next(batch.memory());
    EXPECT_EQ(batch.tokens.front(), 7);
    EXPECT_EQ(batch.targets.back(), 7 + T);
}

TEST(Train, ThousandsOfShardsNeedFewDescriptors) {
    TempDir dir;
    for (int i = 0; i < 300; i++)
        write_file(dir / ("t_" + std::to_string(1000 + i)), shard_bytes(counting(10 * i, 9)));
    rlimit before;
    getrlimit(RLIMIT_NOFILE, &before);
    const rlimit few = {64, before.rlim_max};
    setrlimit(RLIMIT_NOFILE, &few);
    {
        TrainLoader loader(config(dir / "t_*", 1, 8), 1, 3, true);
        HostBatch batch(8);
        std::set<int32_t> seen;
        for (int i = 0; i < 300; i++) {
            loader.next(batch.memory());
            seen.insert(batch.tokens.front());
        }
        EXPECT_EQ(seen.size(), 300u);
    }
    setrlimit(RLIMIT_NOFILE, &before);
}

// ---- validation batches -----------------------------------------------------------------------------------

TEST(Validation, AllRanksTogetherSeeTheFirstSamplesOnceInTheFilesOrder) {
    Shards files;
    const int64_t T = 8;
    for (int64_t sequences : {0, 1, 5, 11, 16, 99})
        for (auto [B, ranks] :
             std::initializer_list<std::pair<int64_t, int>>{{4, 1}, {3, 2}, {1, 4}, {32, 1}}) {
            const int64_t expected = sequences == 0 ? 16 : std::min<int64_t>(sequences, 16);
            std::map<int64_t, std::vector<int32_t>> rows_by_index;
            for (int rank = 0; rank < ranks; rank++) {
                ValLoader loader(config(files.glob(), B, T, rank, ranks), sequences);
                ASSERT_EQ(loader.samples(), expected);
                ASSERT_EQ(loader.batches(), (expected + B * ranks - 1) / (B * ranks));
                HostBatch batch(B * T);
                for (int64_t i = 0; i < loader.batches(); i++) {
                    const int64_t rows = loader.next({batch.tokens, batch.targets, {}});
                    for (int64_t row = 0; row < B; row++) {
                        const auto at = batch.tokens.begin() + row * T;
                        if (row < rows) rows_by_index[(i * ranks + rank) * B + row] = {at, at + T};
                        else
                            for (int64_t i = row * T; i < (row + 1) * T; i++)
                                EXPECT_EQ(at[i - row * T] | batch.targets[static_cast<size_t>(i)], 0)
                                    << "a row without a sample is not zero";
                    }
                }
            }
            ASSERT_EQ(static_cast<int64_t>(rows_by_index.size()), expected);
            int64_t index = 0;
            for (const auto& [key, row] : rows_by_index) {
                ASSERT_EQ(key, index) << "a sample is missing";
                const int64_t first = index < 12 ? 1000 + index * T : 2000 + (index - 12) * T;
                EXPECT_EQ(row.front(), first);
                EXPECT_EQ(row.back(), first + T - 1);
                index++;
            }
        }
}

TEST(Validation, EveryPassIsTheSame) {
    Shards files;
    ValLoader loader(config(files.glob(), 3, 8), 7);
    HostBatch batch(24);
    std::vector<std::vector<int32_t>> first;
    for (int pass = 0; pass < 6; pass++) {
        loader.rewind();
        for (int64_t i = 0; i < loader.batches(); i++) {
            EXPECT_EQ(loader.next(batch.memory()), i < 2 ? 3 : 1);
            if (pass == 0) first.push_back(batch.targets);
            EXPECT_EQ(batch.targets, first[static_cast<size_t>(i)]) << "pass " << pass;
            if (pass == 3 && i == 1) break;  // a pass that is broken off
        }
    }
}

// ---- fatal errors -----------------------------------------------------------------------------------------

void train(const std::string& glob, int64_t B, int64_t T, int64_t S, int batches,
           int64_t vocab_size = kVocab) {
    LoaderConfig c = config(glob, B, T);
    c.vocab_size = vocab_size;
    TrainLoader loader(c, S, 1, false);
    HostBatch batch(B * T);
    for (int i = 0; i < batches; i++) loader.next(batch.memory());
}

#define EXPECT_FATAL(statement, message) \
    EXPECT_EXIT(statement, testing::ExitedWithCode(1), "^rank 0: " message "[^\n]*\n$")

TEST(Fatal, FilesThatCannotBeTrainedOn) {
    Shards files;
    EXPECT_FATAL(train(files.dir / "x*", 1, 8, 1, 0), "--train-data: no file matches .*/x\\* ");
    EXPECT_FATAL(train(files.glob(), 1, 101, 1, 0),
                 "--train-data: .* has 144 tokens in 3 shards: one sample takes "
                 "seq-len \\+ 1 = 102");
    EXPECT_FATAL(train(files.glob(), 1, 8, 17, 0),
                 "--train-data: .* has 16 samples of 8 tokens, one update takes 17");
    EXPECT_FATAL(train(files.glob(), 3, 8, 10, 0), "--total-batch's samples 10 is not a multiple of");
    EXPECT_FATAL(train(files.glob(), 1, 8, 1, 0, 256),
                 "--train-data: .*train_000000.bin was made with a vocabulary");
    EXPECT_FATAL(
        ValLoader({.flag = "--val-data", .files = files.dir / "v*", .vocab_size = 9, .B = 1, .T = 1}, 0),
        "--val-data: no file matches");
}

TEST(Fatal, ATokenBeyondTheVocabularyIsFoundWhenItsBatchIsRead) {
    TempDir dir;
    std::vector<uint16_t> tokens(100, 3);
    tokens[41] = 256;  // a target in the fifth sample of 8
    tokens[77] = 60000;
    write_file(dir / "a.bin", shard_bytes(tokens, 256));
    HostBatch batch(8);
    train(dir / "a.bin", 1, 8, 1, 5, 256);  // samples 0 .. 4 end with token 40, and the thread reads ahead
    EXPECT_FATAL(train(dir / "a.bin", 1, 8, 1, 6, 256),
                 "--train-data: .*/a.bin: token 41 is 256, the model's "
                 "vocabulary has 256");
    train(dir / "a.bin", 1, 8, 1, 9, 257);
    EXPECT_FATAL(train(dir / "a.bin", 1, 8, 1, 10, 257), ".*/a.bin: token 77 is 60000");
}

TEST(Fatal, AShardThatChangesUnderTheRunIsSaid) {
    const auto shrink_while_training = [] {
        TempDir dir;
        write_file(dir / "a.bin", shard_bytes(counting(0, 1000)));
        TrainLoader loader(config(dir / "a.bin", 1, 8), 1, 1, false);
        HostBatch batch(8);
        loader.next(batch.memory());
        if (truncate((dir / "a.bin").c_str(), 1024) != 0) return;
        for (int i = 0; i < 5; i++) loader.next(batch.memory());
    };
    EXPECT_FATAL(shrink_while_training(), "--train-data: .*/a.bin ends at byte 10..: it was 3024 bytes long");
    const auto replace_while_training = [] {
        TempDir dir;
        for (const char* name : {"a.bin", "b.bin"}) write_file(dir / name, shard_bytes(counting(0, 1000)));
        TrainLoader loader(config(dir / "*.bin", 1, 8), 1, 1, false);
        write_file(dir / "b.bin", shard_bytes(counting(0, 500)));
        HostBatch batch(8);
        for (int i = 0; i < 130; i++) loader.next(batch.memory());
    };
    EXPECT_FATAL(replace_while_training(), "--train-data: .*/b.bin has changed since");
}

}  // namespace
