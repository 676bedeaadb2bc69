// Fuzzes the readers of JSON, of config.json and of model.safetensors.index.json. JSON that is taken is
// written and read again; a config that is taken lies within the limits. Options: dev/test/fuzz.h.
#include "dev/test/fuzz.h"
#include "llmc/checkpoint.h"

namespace {

void check_error(const std::string& error) {
    FUZZ_CHECK(error.find('\n') == error.npos && error.size() < 1000);
}

void check_config(const std::string& text) {
    ModelShape s{};
    const std::string error = parse_config(s, text);
    check_error(error);
    if (!error.empty()) return;
    FUZZ_CHECK(s.layers >= 1 && s.layers <= kMostLayers && s.positions >= 1 && s.positions <= kMostPositions);
    FUZZ_CHECK(s.vocab_size >= 1 && s.vocab_size <= kMostVocabulary);
    FUZZ_CHECK(s.heads >= 1 && s.channels == 64LL * s.heads && s.channels <= kMostChannels);
}

void check_index(const std::string& text) {
    WeightMap map;
    const std::string error = parse_weight_index(map, text);
    check_error(error);
    if (!error.empty()) return;
    FUZZ_CHECK(!map.empty());
    for (const auto& [file, tensors] : map)
        FUZZ_CHECK(!tensors.empty() && file.find('/') == file.npos && file.ends_with(".safetensors"));
}

bool test(const std::string& text) {
    check_config(text);
    check_index(text);
    Json json, again;
    const std::string error = parse_json(json, text);
    check_error(error);
    if (!error.empty()) return false;
    for (int indent : {-1, 1}) {
        const std::string written = json_text(json, indent);
        FUZZ_CHECK(parse_json(again, written).empty());
        FUZZ_CHECK(json_text(again, indent) == written);
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> good = {
        config_text({12, 768, 12, 50257, 1024}), config_text({1, 64, 1, 256, 16}),
        R"({"metadata":{"total_size":1.5e3},"weight_map":{"wte.weight":"model-1-of-2.safetensors",)"
        R"("h.0.ln_1.bias":"model-2-of-2.safetensors"}})",
        R"([0, -1, 0.1, 1e-300, true, null, "\u00e9\ud83d\ude00\n", {"a": {"b": []}}])"};
    const std::vector<std::string> words = {"{",
                                            "}",
                                            "[",
                                            "]",
                                            ",",
                                            ":",
                                            "\"",
                                            "\\u0000",
                                            "\\ud800",
                                            "null",
                                            "true",
                                            "false",
                                            "\"n_embd\":",
                                            "\"n_head\":",
                                            "\"n_inner\":",
                                            "\"weight_map\":{",
                                            "\"gpt2\"",
                                            "GPT2Model",
                                            "../",
                                            ".safetensors",
                                            "1e999",
                                            "-0",
                                            "1.0",
                                            "[[[[[[[[[[[[[[[["};
    return fuzz(
        argc, argv, [&](FuzzRandom& random) { return mutate(random, good, words); }, test);
}
