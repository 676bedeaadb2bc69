// llmc/checkpoint.h: a saved model is whole or isn't there, any Hugging Face GPT-2 directory is read, and a
// directory that is something else is an error that says what.
#include "llmc/checkpoint.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <limits>

#include "dev/test/temp_dir.h"

namespace {

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

constexpr ModelShape kSmall = {.layers = 2, .channels = 64, .heads = 1, .vocab_size = 5, .positions = 3};

// ---- a model to save --------------------------------------------------------------------------------------

// Element i of a tensor: other tensors and elements differ, and the values are exact in bf16 and fp16.
float value_of(size_t tensor, size_t i) {
    return static_cast<float>(static_cast<int>((i + 37 * tensor) % 251) - 125) / 8;
}

std::vector<float> values_of(size_t tensor, size_t n) {
    std::vector<float> values(n);
    for (size_t i = 0; i < n; i++) values[i] = value_of(tensor, i);
    return values;
}

void fill(float* out_cpu, size_t tensor, size_t first, size_t count) {
    for (size_t i = 0; i < count; i++) out_cpu[i] = value_of(tensor, first + i);
}

// A tensor as it lies in a file, to be changed before it is written.
struct RawTensor {
    std::string name;
    const FileDtype* dtype = kF32;
    std::vector<uint64_t> shape;
    std::string bytes;
};

uint16_t half_of(float x) {  // for values that a half holds exactly
    if (x == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::abs(x), &exponent);  // in [0.5, 1)
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent - 1 + 15) << 10 |
                                 (static_cast<int>(fraction * 2048) & 1023));
}

std::string bytes_of(const std::vector<float>& values, const FileDtype* dtype) {
    std::string bytes;
    for (float x : values) {
        const auto word = std::bit_cast<uint32_t>(x);
        const auto half = dtype == kF16 ? half_of(x) : static_cast<uint16_t>(word >> 16);
        bytes.append(
            dtype == kF32 ? reinterpret_cast<const char*>(&word) : reinterpret_cast<const char*>(&half),
            dtype->bytes);
    }
    return bytes;
}

std::vector<SavedTensor> wanted() { return saved_tensors(TensorTable(kSmall)); }

std::vector<RawTensor> raw_model(const FileDtype* dtype = kF32, bool prefix = true) {
    std::vector<RawTensor> raw;
    for (const SavedTensor& t : wanted())
        raw.push_back({prefix ? t.name : WeightFiles::plain_name(t.name), dtype, t.shape,
                       bytes_of(values_of(raw.size(), t.elements()), dtype)});
    return raw;
}

void write_raw(const std::string& path, const std::vector<RawTensor>& raw) {
    std::vector<NewTensor> list;
    for (const RawTensor& t : raw) list.push_back({t.name, t.dtype, t.shape});
    ASSERT_EQ(write_safetensors(path, list,
                                [&](void* out, size_t tensor, uint64_t first, uint64_t bytes) {
                                    std::memcpy(out, raw[tensor].bytes.data() + first, bytes);
                                }),
              "");
}

// Reads the directory as kSmall. Returns the error; without one, every value was what value_of() says.
std::string read_error(const std::string& dir) {
    const std::vector<SavedTensor> list = wanted();
    size_t given = 0;
    const std::string error =
        read_weights(dir, list, [&](size_t tensor, const float* data_cpu, size_t count) {
            EXPECT_EQ(tensor, given++);
            EXPECT_EQ(count, list[tensor].elements());
            EXPECT_EQ(std::vector<float>(data_cpu, data_cpu + count), values_of(tensor, count))
                << list[tensor].name;
        });
    EXPECT_TRUE(!error.empty() || given == list.size()) << given;
    EXPECT_EQ(error.find('\n'), error.npos) << error;
    return error;
}

std::string raw_error(const std::vector<RawTensor>& raw) {
    TempDir dir;
    write_raw(dir / "model.safetensors", raw);
    return read_error(dir.path());
}

RawTensor& tensor_named(std::vector<RawTensor>& raw, const std::string& name) {
    for (RawTensor& t : raw)
        if (t.name == name) return t;
    throw std::runtime_error("the test's model has no " + name);
}

// ---- names ------------------------------------------------------------------------------------------------

TEST(Names, AreHuggingFacesInItsShapes) {
    std::string list;
    for (const SavedTensor& t : saved_tensors(TensorTable({1, 128, 2, 50257, 1024})))
        list += t.name + " " + shape_text(t.shape) + "\n";
    EXPECT_EQ(list,
              "transformer.wte.weight (50257, 128)\n"
              "transformer.wpe.weight (1024, 128)\n"
              "transformer.h.0.ln_1.weight (128)\n"
              "transformer.h.0.ln_1.bias (128)\n"
              "transformer.h.0.attn.c_attn.weight (128, 384)\n"
              "transformer.h.0.attn.c_attn.bias (384)\n"
              "transformer.h.0.attn.c_proj.weight (128, 128)\n"
              "transformer.h.0.attn.c_proj.bias (128)\n"
              "transformer.h.0.ln_2.weight (128)\n"
              "transformer.h.0.ln_2.bias (128)\n"
              "transformer.h.0.mlp.c_fc.weight (128, 512)\n"
              "transformer.h.0.mlp.c_fc.bias (512)\n"
              "transformer.h.0.mlp.c_proj.weight (512, 128)\n"
              "transformer.h.0.mlp.c_proj.bias (128)\n"
              "transformer.ln_f.weight (128)\n"
              "transformer.ln_f.bias (128)\n");
    // A context of one token is still a matrix.
    EXPECT_EQ(saved_tensors(TensorTable({1, 64, 1, 5, 1}))[1].shape, (std::vector<uint64_t>{1, 64}));
}

// ---- config.json ------------------------------------------------------------------------------------------

std::string config_error(const std::string& text) {
    ModelShape shape;
    return parse_config(shape, text);
}

// A config.json that is right but for one key.
std::string with(const std::string& key, const std::string& value) {
    Json config, changed;
    EXPECT_EQ(parse_json(config, config_text({12, 768, 12, 50257, 1024})), "");
    EXPECT_EQ(parse_json(changed, value), "") << value;
    for (size_t i = 0; i < config.keys.size(); i++)
        if (config.keys[i] == key) {
            config.items[i] = changed;
            return json_text(config);
        }
    return json_text(config.add(key, changed));
}

TEST(Config, WhatIsWrittenIsReadBack) {
    const ModelShape shape = {48, 1600, 25, 50257, 777};
    ModelShape read{};
    ASSERT_EQ(parse_config(read, config_text(shape)), "");
    EXPECT_EQ(read.layers, 48);
    EXPECT_EQ(read.channels, 1600);
    EXPECT_EQ(read.heads, 25);
    EXPECT_EQ(read.vocab_size, 50257);
    EXPECT_EQ(read.positions, 777);
}

TEST(Config, EndOfTextIsNamedWhereTheVocabularyHasIt) {
    Json config;
    for (const char* key : {"bos_token_id", "eos_token_id"}) {
        ASSERT_EQ(parse_json(config, config_text({4, 128, 2, 256, 128})), "");
        EXPECT_TRUE(config.find(key)->is(Json::Kind::null));
        ASSERT_EQ(parse_json(config, config_text({4, 128, 2, 50256, 128})), "");
        EXPECT_TRUE(config.find(key)->is(Json::Kind::null));
        ASSERT_EQ(parse_json(config, config_text({4, 128, 2, 50257, 128})), "");
        EXPECT_EQ(config.find(key)->integer, 50256);
    }
    for (const char* key : {"attn_pdrop", "embd_pdrop", "resid_pdrop"})
        EXPECT_EQ(config.find(key)->number, 0);
    EXPECT_EQ(config.find("layer_norm_epsilon")->number, 1e-5);
}

TEST(Config, OpenAIsIsRead) {
    ModelShape shape{};
    ASSERT_EQ(parse_config(shape, R"({"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16,
        "n_layer": 24,
        "n_positions": 1024, "n_special": 0, "predict_special_tokens": true, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
        "vocab_size": 50257})"),
              "");
    EXPECT_EQ(shape.layers, 24);
    EXPECT_EQ(shape.channels, 1024);
    EXPECT_EQ(shape.heads, 16);
    // What a config leaves out is what transformers takes.
    ASSERT_EQ(parse_config(shape, R"({"model_type": "gpt2"})"), "");
    EXPECT_EQ(shape.layers, 12);
    EXPECT_EQ(shape.channels, 768);
    EXPECT_EQ(shape.vocab_size, 50257);
}

TEST(Config, WhatComputesTheSameIsTaken) {
    EXPECT_EQ(config_error(with("activation_function", "\"gelu_pytorch_tanh\"")), "");
    EXPECT_EQ(config_error(with("layer_norm_epsilon", "9.999999747378752e-06")), "");  // 1e-5 as a float
    EXPECT_EQ(config_error(with("n_inner", "3072")), "");
    EXPECT_EQ(config_error(with("architectures", "[\"GPT2Model\"]")), "");
    EXPECT_EQ(config_error(with("architectures", "null")), "");
    EXPECT_EQ(config_error(with("resid_pdrop", "0.5")), "");
    EXPECT_EQ(config_error(with("reorder_and_upcast_attn", "true")), "");
}

TEST(Config, AnotherModelIsAnErrorThatNamesIt) {
    EXPECT_HAS(config_error(with("architectures", "[\"LlamaForCausalLM\"]")),
               "architecture is \"LlamaForCausalLM\": wants GPT2LMHeadModel");
    EXPECT_HAS(config_error(with("architectures", "[\"GPT2LMHeadModel\", 7]")), "architecture is 7");
    EXPECT_HAS(config_error(with("model_type", "\"gptj\"")), "model_type is \"gptj\": wants \"gpt2\"");
    EXPECT_HAS(config_error(with("model_type", "null")), "model_type is null");
    EXPECT_HAS(config_error("{}"), "model_type is missing");
    EXPECT_HAS(config_error("[]"), "is not a JSON object");
    EXPECT_HAS(config_error(""), "bad JSON at byte");
    EXPECT_HAS(config_error("{\"model_type\": \"gpt2\", \"n_layer\": 12, \"n_layer\": 24}"),
               "\"n_layer\" comes twice");
    EXPECT_HAS(config_error(with("activation_function", "\"gelu\"")), "activation_function is \"gelu\"");
    EXPECT_HAS(config_error(with("activation_function", "\"relu\"")), "this program has \"gelu_new\" alone");
    EXPECT_HAS(config_error(with("activation_function", "null")), "activation_function is null");
    EXPECT_HAS(config_error(with("layer_norm_epsilon", "1e-6")), "layer_norm_epsilon is 1e-06");
    EXPECT_HAS(config_error(with("layer_norm_epsilon", "\"x\"")), "layer_norm_epsilon is \"x\"");
    EXPECT_HAS(config_error(with("scale_attn_weights", "false")), "scale_attn_weights is false");
    EXPECT_HAS(config_error(with("scale_attn_by_inverse_layer_idx", "true")),
               "scale_attn_by_inverse_layer_idx is true");
    EXPECT_HAS(config_error(with("scale_attn_by_inverse_layer_idx", "1")),
               "scale_attn_by_inverse_layer_idx is 1");
    EXPECT_HAS(config_error(with("add_cross_attention", "true")), "add_cross_attention is true");
    EXPECT_HAS(config_error(with("tie_word_embeddings", "false")), "tie_word_embeddings is false");
    EXPECT_HAS(config_error(with("n_inner", "768")),
               "n_inner is 768: this program has 4 x n_embd = 3072 alone");
}

TEST(Config, AbsurdSizesAreErrors) {
    for (const char* key : {"n_layer", "n_embd", "n_head", "vocab_size", "n_positions"})
        for (const char* value :
             {"0", "-1", "1.5", "12.0", "null", "\"12\"", "2147483648", "1e30", "[]", "18446744073709551615"})
            EXPECT_HAS(config_error(with(key, value)), std::string(key) + " is ");
    EXPECT_HAS(config_error(with("vocab_size", "65537")),
               "vocab_size is 65537: wants a whole number from 1 to 65536");
    EXPECT_HAS(config_error(with("n_head", "6")),
               "n_embd 768 over n_head 6 gives a head size of 128: this program has 64");
    EXPECT_HAS(config_error(with("n_head", "13")), "gives a head size of 59.07");
}

// ---- loading ----------------------------------------------------------------------------------------------

TEST(Load, EveryTypeWithAndWithoutThePrefix) {
    for (const FileDtype* dtype : {kF32, kF16, kBF16})
        for (bool prefix : {true, false}) EXPECT_EQ(raw_error(raw_model(dtype, prefix)), "") << dtype->name;
    std::vector<RawTensor> mixed = raw_model();
    mixed[3] = raw_model(kF16)[3];
    mixed[4] = raw_model(kBF16, false)[4];
    std::reverse(mixed.begin(), mixed.end());  // the order in the file doesn't matter
    EXPECT_EQ(raw_error(mixed), "");
}

TEST(Load, MaskBuffersAndATiedHeadArePassedOver) {
    std::vector<RawTensor> raw = raw_model();
    raw.push_back({"transformer.h.0.attn.bias", &kFileDtypes[11], {1, 1, 3, 3}, std::string(9, '\1')});
    raw.push_back({"transformer.h.1.attn.masked_bias", kF32, {}, bytes_of({-10000}, kF32)});
    raw.push_back({"lm_head.weight", kF32, raw[0].shape, raw[0].bytes});
    EXPECT_EQ(raw_error(raw), "");
    raw.back().dtype = kBF16;  // the same numbers in another type
    raw.back().bytes = raw_model(kBF16)[0].bytes;
    EXPECT_EQ(raw_error(raw), "");
    raw.back().bytes[raw.back().bytes.size() - 1] ^= 1;
    EXPECT_HAS(raw_error(raw), "lm_head.weight differs from wte.weight");
    raw.back() = {"lm_head.weight", kF32, {64, 5}, raw[0].bytes};
    EXPECT_HAS(raw_error(raw), "lm_head.weight differs from wte.weight");
    raw.back() = {"transformer.lm_head.bias", kF32, {5}, bytes_of(values_of(0, 5), kF32)};
    EXPECT_HAS(raw_error(raw), "tensor \"transformer.lm_head.bias\" is unknown");
}

TEST(Load, UnknownAndMissingTensorsAreErrors) {
    for (const char* name : {"transformer.h.2.ln_1.weight", "transformer.h.0.attn.c_attn.lora_A",
                             "h.0.attn.biases", "h.x.attn.bias", "h..attn.bias", "xh.0.attn.bias",
                             "score.weight", "", "transformer.transformer.wte.weight"}) {
        std::vector<RawTensor> raw = raw_model();
        raw.push_back({name, kF32, {64}, std::string(256, '\0')});
        EXPECT_HAS(raw_error(raw), std::string("tensor \"") + name + "\" is unknown");
    }
    for (size_t i = 0; i < raw_model().size(); i++) {
        std::vector<RawTensor> raw = raw_model();
        const std::string name = raw[i].name;
        raw.erase(raw.begin() + static_cast<ptrdiff_t>(i));
        EXPECT_HAS(raw_error(raw), "tensor \"" + name + "\" is missing");
    }
    std::vector<RawTensor> raw = raw_model();
    raw.push_back(raw_model(kF32, false)[2]);
    EXPECT_HAS(raw_error(raw), "comes twice");
}

TEST(Load, AnotherShapeOrTypeIsAnError) {
    std::vector<RawTensor> raw = raw_model();
    std::swap(tensor_named(raw, "transformer.h.1.mlp.c_fc.weight").shape[0],
              tensor_named(raw, "transformer.h.1.mlp.c_fc.weight").shape[1]);
    EXPECT_HAS(raw_error(raw),
               "tensor \"transformer.h.1.mlp.c_fc.weight\" has shape (256, 64): wants (64, 256)");
    raw = raw_model();
    tensor_named(raw, "transformer.ln_f.bias").shape = {1, 64};
    EXPECT_HAS(raw_error(raw), "has shape (1, 64): wants (64)");
    raw = raw_model();
    tensor_named(raw, "transformer.ln_f.bias").dtype = &kFileDtypes[5];
    EXPECT_HAS(raw_error(raw), "tensor \"transformer.ln_f.bias\" is of type I32: wants F32, F16 or BF16");
}

TEST(Load, NumbersThatAreNotFiniteAreErrorsThatNameTheTensor) {
    for (float bad : {std::nanf(""), INFINITY, -INFINITY})
        for (size_t tensor : {size_t{0}, size_t{13}, raw_model().size() - 1}) {
            std::vector<RawTensor> raw = raw_model();
            std::memcpy(raw[tensor].bytes.data() + raw[tensor].bytes.size() - 4, &bad,
                        4);  // the last element
            const size_t last = raw[tensor].bytes.size() / 4 - 1;
            EXPECT_HAS(raw_error(raw),
                       "tensor \"" + raw[tensor].name + "\": element " + std::to_string(last) + " is ");
            raw.push_back(
                {"lm_head.weight", kF32, raw[0].shape, raw[0].bytes});  // a tied copy changes nothing
            EXPECT_HAS(raw_error(raw), "tensor \"" + raw[tensor].name + "\": element ");
        }
    std::vector<RawTensor> raw = raw_model(kF16);
    raw[5].bytes[1] = 0x7e;  // a half that is NaN
    EXPECT_HAS(raw_error(raw), "element 0 is nan");
}

// A sharded model: every third tensor in a file.
void write_sharded(const TempDir& dir, std::vector<RawTensor> raw, Json* map_out = nullptr) {
    Json map = Json::object();
    for (size_t part = 0; part < 3; part++) {
        const std::string file = "model-0000" + std::to_string(part + 1) + "-of-00003.safetensors";
        std::vector<RawTensor> tensors;
        for (size_t i = part; i < raw.size(); i += 3) {
            tensors.push_back(raw[i]);
            map.add(raw[i].name, file);
        }
        write_raw(dir / file, tensors);
    }
    Json index = Json::object();
    index.add("metadata", Json::object().add("total_size", 1)).add("weight_map", map);
    write_file(dir / "model.safetensors.index.json", json_text(index));
    if (map_out) *map_out = map;
}

void write_map(const TempDir& dir, const Json& map) {
    write_file(dir / "model.safetensors.index.json", json_text(Json::object().add("weight_map", map)));
}

TEST(Sharded, FilesWithAnIndexAreRead) {
    for (bool prefix : {true, false}) {
        TempDir dir;
        write_sharded(dir, raw_model(kF32, prefix));
        EXPECT_EQ(read_error(dir.path()), "");
        write_file(dir / "other-1-of-1.safetensors", "not looked at");
        EXPECT_EQ(read_error(dir.path()), "");
        write_raw(dir / "model.safetensors", {});  // as in transformers: the single file goes first
        EXPECT_HAS(read_error(dir.path()), "is missing");
    }
}

TEST(Sharded, AnIndexThatLiesIsAnError) {
    TempDir dir;
    Json map;
    write_sharded(dir, raw_model(), &map);

    Json changed = map;
    changed.items[0] = "model-00003-of-00003.safetensors";
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "model-00001-of-00003.safetensors has ");
    changed = map;
    std::swap(changed.items.front(), changed.items.back());  // as many tensors, but others
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "which the index says it has");
    changed = map;
    changed.add("transformer.new", "model-00002-of-00003.safetensors");
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "model-00002-of-00003.safetensors lacks tensor \"transformer.new\"");
    changed = map;
    changed.keys.erase(changed.keys.begin());
    changed.items.erase(changed.items.begin());
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "the index gives it");
    changed = map;
    for (Json& item : changed.items)
        if (item.string == "model-00003-of-00003.safetensors") item = "model-00009-of-00003.safetensors";
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "model-00009-of-00003.safetensors cannot be opened");
    for (const char* name : {"../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "x.bin"}) {
        changed.items[4] = name;
        write_map(dir, changed);
        EXPECT_HAS(read_error(dir.path()), "wants the name of a .safetensors file") << name;
    }
    changed.items[4] = 7;
    write_map(dir, changed);
    EXPECT_HAS(read_error(dir.path()), "is 7: wants the name");
    for (const char* text :
         {"{}", "[]", R"({"weight_map":{}})", R"({"weight_map":[]})", R"({"weight_map":"a"})"}) {
        write_file(dir / "model.safetensors.index.json", text);
        EXPECT_HAS(read_error(dir.path()), "has no weight_map");
    }
    write_file(dir / "model.safetensors.index.json", "{");
    EXPECT_HAS(read_error(dir.path()), "index.json: bad JSON");
    write_map(dir, map);
    EXPECT_EQ(read_error(dir.path()), "");
    std::vector<RawTensor> twice = raw_model();
    write_raw(dir / "model-00003-of-00003.safetensors", {twice[2], twice[0]});
    EXPECT_HAS(read_error(dir.path()), "tensor \"transformer.wte.weight\" comes twice");
}

#define EXPECT_FATAL(statement, message) \
    EXPECT_EXIT(statement, testing::ExitedWithCode(1), "^rank 0: " message "[^\n]*\n$")

TEST(Load, WhatIsNoModelIsFatal) {
    TempDir dir;
    const auto ignore = [](size_t, const float*, size_t) {};
    EXPECT_FATAL(load_shape(dir / "none"), "--init-from: .*/none/config.json cannot be opened: No such file");
    EXPECT_FATAL(load_model(dir.path(), wanted(), ignore),
                 "--init-from: .* has neither model.safetensors nor ");
    write_file(dir / "config.json", R"({"model_type":"bert"})");
    EXPECT_FATAL(load_shape(dir.path()), "--init-from: .*/config.json: its model_type is \"bert\"");
    write_file(dir / "config.json", config_text(kSmall));
    EXPECT_EQ(load_shape(dir.path()).positions, 3);
    write_file(dir / "model.safetensors", "short");
    EXPECT_FATAL(load_model(dir.path(), wanted(), ignore), "--init-from: .*/model.safetensors has 5 bytes");
    std::filesystem::resize_file(dir / "config.json", 17 << 20);
    EXPECT_FATAL(load_shape(dir.path()), "--init-from: .*/config.json has 17825792 bytes, at most 16777216");
}

// ---- saving -----------------------------------------------------------------------------------------------

std::vector<std::string> entries(const std::string& dir) {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(dir))
        names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

std::string save(const std::string& output_dir, int64_t step) {
    return save_model(output_dir, step, kSmall, wanted(), fill);
}

TEST(Save, IsReadBackUnderItsNameAndTheLatest) {
    TempDir dir;
    const std::string out = dir / "runs/a";  // made with its parents
    EXPECT_EQ(save(out, 240), out + "/step_00000240");
    EXPECT_EQ(entries(out), (std::vector<std::string>{"latest", "step_00000240"}));
    EXPECT_EQ(entries(out + "/step_00000240"),
              (std::vector<std::string>{"config.json", "model.safetensors"}));
    EXPECT_EQ(std::filesystem::read_symlink(out + "/latest"),
              "step_00000240");  // relative: the tree may be moved
    EXPECT_EQ(read_error(out + "/latest"), "");
    const ModelShape shape = load_shape(out + "/latest");
    EXPECT_EQ(shape.layers, kSmall.layers);
    EXPECT_EQ(shape.vocab_size, kSmall.vocab_size);

    save(out, 123456789);
    EXPECT_EQ(entries(out), (std::vector<std::string>{"latest", "step_00000240", "step_123456789"}));
    EXPECT_EQ(std::filesystem::read_symlink(out + "/latest"), "step_123456789");
}

TEST(Save, OneOfTheSameNameAndWhatAKilledRunLeftAreReplaced) {
    TempDir dir;
    std::filesystem::create_directories(dir / ".step_00000007.partial/junk");
    std::filesystem::create_directories(dir / ".step_00000007.replaced/junk");
    std::filesystem::create_directories(dir / "step_00000007/old");
    ASSERT_EQ(symlink("nowhere", (dir / ".latest.partial").c_str()), 0);
    save(dir.path(), 7);
    EXPECT_EQ(entries(dir.path()), (std::vector<std::string>{"latest", "step_00000007"}));
    EXPECT_EQ(entries(dir / "step_00000007"), (std::vector<std::string>{"config.json", "model.safetensors"}));
    EXPECT_EQ(read_error(dir / "latest"), "");
}

TEST(Save, ADiskThatIsFullIsFatalAndLosesNothing) {
    TempDir dir;
    save(dir.path(), 7);
    const auto save_into_little_space = [&](int64_t step) {
        signal(SIGXFSZ, SIG_IGN);
        const rlimit little = {100000, 100000};  // stands for a full disk: a write fails half way
        setrlimit(RLIMIT_FSIZE, &little);
        save(dir.path(), step);
    };
    for (int64_t step : {7, 8}) {
        EXPECT_FATAL(save_into_little_space(step),
                     "the model of step .* is not saved: .*/model.safetensors cannot be "
                     "written: File too large");
        EXPECT_EQ(entries(dir.path()), (std::vector<std::string>{"latest", "step_00000007"}))
            << "the partial one stays";
        EXPECT_EQ(read_error(dir / "latest"), "");
    }
}

TEST(Save, ADirectoryThatCannotBeWrittenIsFatal) {
    TempDir dir;
    write_file(dir / "file", "text");
    EXPECT_FATAL(save(dir / "file", 1),
                 "--output-dir: .*/file/.step_00000001.partial cannot be created: Not a directory");
    EXPECT_FATAL(save("/proc/none", 1), "--output-dir: /proc/none/.* cannot be created: ");
    EXPECT_EQ(read_file(dir / "file"), "text");
}

TEST(Save, ALatestThatIsNoLinkIsLeftAndSaid) {
    TempDir dir;
    std::filesystem::create_directories(dir / "latest/mine");
    testing::internal::CaptureStderr();
    save(dir.path(), 3);
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_HAS(said, "rank 0: warning: ");
    EXPECT_HAS(said, "/latest cannot be pointed at step_00000003");
    EXPECT_EQ(entries(dir.path()), (std::vector<std::string>{"latest", "step_00000003"}));
    EXPECT_EQ(entries(dir / "latest"), (std::vector<std::string>{"mine"}));
}

// The trainer copies from the device in pieces: each element is asked for once, in order, within bounds.
TEST(Save, AsksForEveryElementOnceAndInPieces) {
    TempDir dir;
    const ModelShape shape = {1, 64, 1, 65536,
                              100000};  // wpe is larger than the 16 MiB buffer, by no whole number
    const std::vector<SavedTensor> list = saved_tensors(TensorTable(shape));
    std::vector<size_t> asked(list.size());
    size_t largest = 0;
    save_model(dir.path(), 1, shape, list, [&](float* out_cpu, size_t tensor, size_t first, size_t count) {
        EXPECT_EQ(first, asked[tensor]);
        asked[tensor] += count;
        largest = std::max(largest, count);
        fill(out_cpu, tensor, first, count);
    });
    for (size_t i = 0; i < list.size(); i++) EXPECT_EQ(asked[i], list[i].elements()) << list[i].name;
    EXPECT_EQ(largest, size_t{4} << 20);
    size_t wrong = 0;
    EXPECT_EQ(read_weights(dir / "latest", list,
                           [&](size_t tensor, const float* data_cpu, size_t count) {
                               for (size_t i = 0; i < count; i++) wrong += data_cpu[i] != value_of(tensor, i);
                           }),
              "");
    EXPECT_EQ(wrong, 0u);
}

}  // namespace
