// Fuzzes the reader of safetensors files (llmc/safetensors.h) and of the weights in them (llmc/checkpoint.h).
// What is taken has its tensors within the data, none over another, no byte without one. Options:
// dev/test/fuzz.h.
#include "dev/test/fuzz.h"
#include "dev/test/temp_dir.h"
#include "llmc/checkpoint.h"

namespace {

// A head in front of data that makes every tensor's first element 1.
std::string good_file(const std::vector<NewTensor>& tensors) {
    std::string bytes = safetensors_head(tensors);
    for (const NewTensor& t : tensors) {
        std::string data(t.bytes(), '\0');
        if (t.dtype == kF32) std::memcpy(data.data(), "\0\0\x80\x3f", std::min<size_t>(4, data.size()));
        bytes += data;
    }
    return bytes;
}

const std::vector<SavedTensor> kWanted = {{"transformer.wte.weight", {3, 2}},
                                          {"transformer.h.0.ln_1.bias", {2}}};

void check_tensors(const SafetensorsFile& file, const std::string& bytes) {
    uint64_t header_bytes;
    std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
    FUZZ_CHECK(header_bytes <= bytes.size() - 8);
    const size_t data_begin = 8 + header_bytes;
    std::vector<int> owners(bytes.size() - data_begin);
    std::vector<float> out;
    for (const FileTensor& t : file.tensors()) {
        FUZZ_CHECK(t.begin <= t.end && t.end <= owners.size());
        for (uint64_t byte = t.begin; byte < t.end; byte++) owners[byte]++;
        unsigned __int128 elements = 1;
        for (uint64_t size : t.shape) elements *= size;
        FUZZ_CHECK(elements * t.dtype->bytes == t.end - t.begin && elements == t.elements());
        out.assign(t.elements() + 1, 77);
        const std::string error = file.read(out.data(), t, 0, t.elements());
        FUZZ_CHECK(error.empty() == (t.dtype == kF32 || t.dtype == kF16 || t.dtype == kBF16));
        FUZZ_CHECK(out.back() == 77);
        if (error.empty() && t.dtype == kF32)
            FUZZ_CHECK(std::memcmp(out.data(), bytes.data() + data_begin + t.begin, t.end - t.begin) == 0);
    }
    FUZZ_CHECK(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }));
}

// dir holds a link model.safetensors to the file in memory.
bool test(const TempDir& dir, MemoryFile& memory, const std::string& bytes) {
    const std::string path = dir / "model.safetensors";
    memory.fill(bytes);
    SafetensorsFile file;
    const std::string error = file.open(path);
    if (error.empty()) check_tensors(file, bytes);
    else FUZZ_CHECK(error.find(path) != error.npos && error.find('\n') == error.npos && error.size() < 1000);
    size_t given = 0;
    const std::string weights_error =
        read_weights(dir.path(), kWanted, [&](size_t tensor, const float* data, size_t n) {
            FUZZ_CHECK(tensor == given++ && n == kWanted[tensor].elements());
            FUZZ_CHECK(std::all_of(data, data + n, [](float x) { return std::isfinite(x); }));
        });
    FUZZ_CHECK(weights_error.empty() ? given == kWanted.size() : given < kWanted.size());
    FUZZ_CHECK(error.empty() || !weights_error.empty());
    FUZZ_CHECK(weights_error.find('\n') == weights_error.npos && weights_error.size() < 1000);
    return error.empty();
}

}  // namespace

int main(int argc, char** argv) {
    TempDir dir;
    MemoryFile memory;
    std::filesystem::create_symlink(memory.path(), dir / "model.safetensors");
    const std::vector<std::string> good = {
        good_file({{"transformer.wte.weight", kF32, {3, 2}}, {"transformer.h.0.ln_1.bias", kF32, {2}}}),
        good_file({{"wte.weight", kF16, {3, 2}},
                   {"h.0.ln_1.bias", kBF16, {2}},
                   {"lm_head.weight", kF16, {3, 2}},
                   {"h.0.attn.bias", &kFileDtypes[12], {1, 1, 2, 2}},
                   {"h.0.attn.masked_bias", kF32, {}}}),
        good_file({{"a", &kFileDtypes[3], {2}}, {"b", kF32, {0, 3}}, {"c", &kFileDtypes[11], {5}}}),
        good_file({})};
    const std::vector<std::string> words = {"{",
                                            "}",
                                            "[",
                                            "]",
                                            ",",
                                            ":",
                                            "\"",
                                            "\\",
                                            "\"F32\"",
                                            "\"F16\"",
                                            "\"BF16\"",
                                            "\"U8\"",
                                            "\"dtype\":",
                                            "\"shape\":[",
                                            "\"data_offsets\":[0,4]",
                                            "\"__metadata__\":{",
                                            "null",
                                            "1e999",
                                            "[[[[[[[[",
                                            "\"wte.weight\":{",
                                            "transformer.",
                                            "h.0.attn.bias",
                                            "18446744073709551616"};
    const auto input_of = [&](FuzzRandom& random) {
        std::string bytes = mutate(random, good, words);
        // Half of them get a header length that reaches to the last '}', so that more than the length is
        // looked at.
        const size_t brace = bytes.rfind('}');
        if (random.below(2) && bytes.size() > 8 && brace != bytes.npos && brace >= 8) {
            const uint64_t header_bytes = brace + 1 - 8;
            std::memcpy(bytes.data(), &header_bytes, sizeof(header_bytes));
        }
        return bytes;
    };
    return fuzz(argc, argv, input_of, [&](const std::string& bytes) { return test(dir, memory, bytes); });
}
