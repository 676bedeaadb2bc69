// config.json of a GPT-2: the shape of a model, and whether it is a GPT-2 that this program computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "llmc/fatal.h"
#include "llmc/file.h"
#include "llmc/json.h"
#include "llmc/shape.h"  // ModelShape, kHeadSize

constexpr uint64_t kLargestJsonFile = uint64_t{16} << 20;

// Limits of a shape that is read; no GPT-2 comes near. They keep products of two of them far inside 64 bits.
constexpr int64_t kMostLayers = 4096, kMostChannels = 1 << 20, kMostPositions = 1 << 20;
constexpr int64_t kMostVocabulary = 65536;  // token shards have 16 bits a token

// out = the integer under `key`, or `otherwise` (what transformers' GPT2Config takes) where it is absent.
inline std::string config_size(int& out, const Json& config, const char* key, int otherwise,
                               int64_t largest) {
    const Json* value = config.find(key);
    out = otherwise;
    if (!value) return "";
    if (!value->is(Json::Kind::integer) || value->integer < 1 || value->integer > largest)
        return text_of("%s is %s: wants a whole number from 1 to %lld", key,
                       printable(json_text(*value)).c_str(), static_cast<long long>(largest));
    out = static_cast<int>(value->integer);
    return "";
}

// Whether the architecture is GPT-2's with a language-model head, or its body alone.
inline std::string check_architecture(const Json& config) {
    const Json *type = config.find("model_type"), *names = config.find("architectures");
    const bool has_names = names && names->is(Json::Kind::array) && !names->items.empty();
    if (has_names)
        for (const Json& name : names->items)
            if (name.string != "GPT2LMHeadModel" && name.string != "GPT2Model")
                return "its architecture is " + printable(json_text(name)) + ": wants GPT2LMHeadModel";
    if (type ? type->string != "gpt2" : !has_names)
        return "its model_type is " + (type ? printable(json_text(*type)) : "missing") + ": wants \"gpt2\"";
    return "";
}

// Whether what the config asks of the computation is what this program computes. Absent means transformers'
// default, which is the value wanted here. Dropouts are no matter: they aren't part of the weights, and here
// there are none.
inline std::string check_variant(const Json& config, const ModelShape& shape) {
    const auto refused = [](const char* key, const Json& value, const std::string& wanted) {
        return text_of("%s is %s: this program has %s alone", key, printable(json_text(value)).c_str(),
                       wanted.c_str());
    };
    const std::pair<const char*, bool> flags[] = {{"scale_attn_weights", true},
                                                  {"scale_attn_by_inverse_layer_idx", false},
                                                  {"add_cross_attention", false},
                                                  {"tie_word_embeddings", true}};
    for (const auto& [key, wanted] : flags)
        if (const Json* v = config.find(key); v && (!v->is(Json::Kind::boolean) || v->boolean != wanted))
            return refused(key, *v, wanted ? "true" : "false");
    // Two names of the same function, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    if (const Json* v = config.find("activation_function");
        v && v->string != "gelu_new" && v->string != "gelu_pytorch_tanh")
        return refused("activation_function", *v, "\"gelu_new\"");
    // Not compared exactly: the value may have gone through a float on its way.
    if (const Json* v = config.find("layer_norm_epsilon"); v && !(std::abs(v->number - 1e-5) < 1e-11))
        return refused("layer_norm_epsilon", *v, "1e-05");
    if (const Json* v = config.find("n_inner");
        v && !v->is(Json::Kind::null) && !(v->is(Json::Kind::integer) && v->integer == 4LL * shape.channels))
        return refused("n_inner", *v, text_of("4 x n_embd = %lld", 4LL * shape.channels));
    return "";
}

// out = the shape that a config.json gives. Returns an error where it isn't a GPT-2 that this program
// computes.
inline std::string parse_config(ModelShape& out, std::string_view text) {
    Json config;
    std::string error = parse_json(config, text);
    if (error.empty() && !config.is(Json::Kind::object)) error = "is not a JSON object";
    if (error.empty()) error = check_architecture(config);
    if (error.empty()) error = config_size(out.layers, config, "n_layer", 12, kMostLayers);
    if (error.empty()) error = config_size(out.channels, config, "n_embd", 768, kMostChannels);
    if (error.empty()) error = config_size(out.heads, config, "n_head", 12, kMostChannels);
    if (error.empty()) error = config_size(out.vocab_size, config, "vocab_size", 50257, kMostVocabulary);
    if (error.empty()) error = config_size(out.positions, config, "n_positions", 1024, kMostPositions);
    if (error.empty() && out.channels != int64_t{kHeadSize} * out.heads)
        error = text_of("n_embd %d over n_head %d gives a head size of %g: this program has %d alone",
                        out.channels, out.heads, static_cast<double>(out.channels) / out.heads, kHeadSize);
    return error.empty() ? check_variant(config, out) : error;
}

// The config.json of a model. Its vocabulary holds GPT-2's end-of-text token or none.
inline std::string config_text(const ModelShape& shape) {
    constexpr int kEndOfText = 50256;
    const Json end_of_text = shape.vocab_size > kEndOfText ? Json(kEndOfText) : Json();
    Json config = Json::object();
    config.add("activation_function", "gelu_new")
        .add("architectures", Json::array().push("GPT2LMHeadModel"))
        .add("attn_pdrop", 0.0)
        .add("bos_token_id", end_of_text)
        .add("dtype", "float32")
        .add("embd_pdrop", 0.0)
        .add("eos_token_id", end_of_text)
        .add("initializer_range", 0.02)
        .add("layer_norm_epsilon", 1e-5)
        .add("model_type", "gpt2")
        .add("n_ctx", shape.positions)
        .add("n_embd", shape.channels)
        .add("n_head", shape.heads)
        .add("n_inner", Json())
        .add("n_layer", shape.layers)
        .add("n_positions", shape.positions)
        .add("reorder_and_upcast_attn", false)
        .add("resid_pdrop", 0.0)
        .add("scale_attn_by_inverse_layer_idx", false)
        .add("scale_attn_weights", true)
        .add("tie_word_embeddings", true)
        .add("torch_dtype", "float32")  // the name that transformers before 4.56 knows
        .add("use_cache", true)
        .add("vocab_size", shape.vocab_size);
    return json_text(config, 2) + "\n";
}

// The shape of the model in a directory, or an error.
inline std::string read_shape(ModelShape& out, const std::string& dir) {
    const std::string path = dir + "/config.json";
    std::string text;
    std::string error = read_text_file(text, path, kLargestJsonFile);
    if (!error.empty()) return error;
    error = parse_config(out, text);
    return error.empty() ? "" : path + ": " + error;
}

// The shape of the model in a Hugging Face GPT-2 directory. Fatal where there is none that this program
// computes.
inline ModelShape load_shape(const std::string& dir) {
    ModelShape shape{};
    const std::string error = read_shape(shape, dir);
    if (!error.empty()) fatal("--init-from: %s", error.c_str());
    return shape;
}
