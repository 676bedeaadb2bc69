// Fuzzes the reader of token shards (llmc/dataloader.h). What is taken is read to its last token and compared
// with the bytes of the file. Options: dev/test/fuzz.h.
#include "dev/test/fuzz.h"
#include "llmc/dataloader.h"

namespace {

constexpr int64_t kVocab = 300;

std::string shard(int count, int32_t vocabulary) {
    ShardHeader header{};
    header[0] = kShardMagic;
    header[1] = kShardVersion;
    header[2] = count;
    header[3] = vocabulary;
    std::string bytes(reinterpret_cast<const char*>(header.data()), kShardHeaderBytes);
    for (int i = 0; i < count; i++) {
        const auto token = static_cast<uint16_t>(i * 7 % kVocab);
        bytes.append(reinterpret_cast<const char*>(&token), sizeof(token));
    }
    return bytes;
}

template <class Integer>
Integer integer_at(const std::string& bytes, size_t at) {
    Integer value;
    std::memcpy(&value, bytes.data() + at, sizeof(value));
    return value;
}

// Reads every sample of a shard that was opened; the tokens are the file's, or one of them lies beyond the
// vocabulary.
void check_samples(const std::vector<Shard>& shards, const std::string& bytes, int64_t T) {
    SampleReader reader(shards, T, kVocab);
    std::vector<int32_t> inputs(static_cast<size_t>(T)), targets(inputs);
    for (int64_t sample = 0; sample < shards[0].samples(T); sample++) {
        const std::string error = reader.read(inputs.data(), targets.data(), 0, sample);
        bool foreign = false;
        for (int64_t t = 0; t <= T; t++) {
            const auto token =
                integer_at<uint16_t>(bytes, kShardHeaderBytes + 2 * static_cast<size_t>(sample * T + t));
            foreign |= token >= kVocab;
            if (!error.empty()) continue;
            if (t < T) FUZZ_CHECK(inputs[static_cast<size_t>(t)] == token);
            if (t > 0) FUZZ_CHECK(targets[static_cast<size_t>(t - 1)] == token);
        }
        FUZZ_CHECK(foreign == !error.empty());
    }
}

bool test(MemoryFile& file, const std::string& bytes) {
    const std::string& path = file.path();
    file.fill(bytes);
    std::vector<Shard> shards;
    const std::string error = find_shards(shards, path, kVocab);
    if (!error.empty()) {
        FUZZ_CHECK(error.find(path) != error.npos && error.find('\n') == error.npos && error.size() < 1000);
        return false;
    }
    FUZZ_CHECK(integer_at<int32_t>(bytes, 0) == 20240520 && integer_at<int32_t>(bytes, 4) == 1);
    FUZZ_CHECK(shards.size() == 1 && shards[0].tokens == integer_at<int32_t>(bytes, 8));
    FUZZ_CHECK(bytes.size() == 1024 + 2 * static_cast<size_t>(shards[0].tokens));
    FUZZ_CHECK(integer_at<int32_t>(bytes, 12) >= 1 && integer_at<int32_t>(bytes, 12) <= kVocab);
    for (int64_t T : {1, 5, 16}) check_samples(shards, bytes, T);
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    MemoryFile file;
    const std::vector<std::string> good = {shard(20, 300), shard(1, 256), shard(300, 1)};
    const std::vector<std::string> words = {std::string("\xa8\xf0\x34\x01\1\0\0\0", 8),
                                            std::string("\x14\0\0\0", 4), "\xff\xff"};
    const auto input_of = [&](FuzzRandom& random) {
        std::string bytes = mutate(random, good, words);
        // Half of them get a token count that fits, so that more than the sizes is looked at.
        if (random.below(2) && bytes.size() >= kShardHeaderBytes) {
            const auto count = static_cast<int32_t>((bytes.size() - kShardHeaderBytes) / 2);
            std::memcpy(bytes.data() + 8, &count, sizeof(count));
        }
        return bytes;
    };
    return fuzz(argc, argv, input_of, [&](const std::string& bytes) { return test(file, bytes); });
}
