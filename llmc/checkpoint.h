// A saved model: a directory that Hugging Face opens as GPT-2, config.json beside model.safetensors (fp32, its names,
// no padding). Reading takes any such directory, OpenAI's included.
//
//   OUTPUT_DIR/step_00000240/{config.json, model.safetensors}, OUTPUT_DIR/latest -> step_00000240
//
// A directory under that name is whole: it is filled as .step_00000240.partial, brought to the disk, then renamed.
#pragma once

#include <sys/stat.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/file.h"
#include "llmc/json.h"
#include "llmc/safetensors.h"
#include "llmc/tensors.h"   // ModelShape

// One tensor of a model under its Hugging Face name, "transformer.h.3.attn.c_attn.weight", with the shape it has there:
// (in, out) for matrices, (n) for biases and layernorms, (V, C) for wte without pad rows.
struct SavedTensor {
    std::string name;
    std::vector<uint64_t> shape;
    uint64_t elements() const {
        uint64_t n = 1;
        for (uint64_t size : shape) n *= size;
        return n;
    }
};

// The tensors of a model as they are saved, one for each of table.blocks(), in their order.
inline std::vector<SavedTensor> saved_tensors(const TensorTable& table) {
    std::vector<SavedTensor> list;
    for (const TensorBlock& block : table.blocks()) {
        const bool matrix = block.decay;   // decay goes to the tensors of two dimensions
        list.push_back({block.hf_name, matrix ? std::vector<uint64_t>{block.rows, block.cols}
                                              : std::vector<uint64_t>{block.cols}});
    }
    return list;
}

// Fills out (count) with elements first .. first + count of tensors[tensor].
using WeightSource = std::function<void(float* out_cpu, size_t tensor, size_t first, size_t count)>;

// Takes the whole of tensors[tensor], data (count); the memory is lent for the call.
using WeightSink = std::function<void(size_t tensor, const float* data_cpu, size_t count)>;

// ---- config.json ----------------------------------------------------------------------------------------------------

// Limits of a shape that is read; no GPT-2 comes near. They keep products of two of them far inside 64 bits.
constexpr int64_t kMostLayers = 4096, kMostChannels = 1 << 20, kMostPositions = 1 << 20;
constexpr int64_t kMostVocabulary = 65536;   // token shards have 16 bits a token

// out = the integer under `key`, or `otherwise` (what transformers' GPT2Config takes) where it is absent.
inline std::string config_size(int& out, const Json& config, const char* key, int otherwise, int64_t largest) {
    const Json* value = config.find(key);
    out = otherwise;
    if (!value) return "";
    if (!value->is(Json::Kind::integer) || value->integer < 1 || value->integer > largest)
        return text_of("%s is %s: wants a whole number from 1 to %lld", key, printable(json_text(*value)).c_str(),
                       static_cast<long long>(largest));
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

// Whether what the config asks of the computation is what this program computes. Absent means transformers' default,
// which is the value wanted here. Dropouts are no matter: they aren't part of the weights, and here there are none.
inline std::string check_variant(const Json& config, const ModelShape& shape) {
    const auto refused = [](const char* key, const Json& value, const std::string& wanted) {
        return text_of("%s is %s: this program has %s alone", key, printable(json_text(value)).c_str(), wanted.c_str());
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

// out = the shape that a config.json gives. Returns an error where it isn't a GPT-2 that this program computes.
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
        error = text_of("n_embd %d over n_head %d gives a head size of %g: this program has %d alone", out.channels,
                        out.heads, static_cast<double>(out.channels) / out.heads, kHeadSize);
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
        .add("torch_dtype", "float32")   // the name that transformers before 4.56 knows
        .add("use_cache", true)
        .add("vocab_size", shape.vocab_size);
    return json_text(config, 2) + "\n";
}

// ---- loading --------------------------------------------------------------------------------------------------------

constexpr uint64_t kLargestJsonFile = uint64_t{16} << 20;

// The files of a model.safetensors.index.json, and the tensors that each is said to hold.
using WeightMap = std::map<std::string, std::vector<std::string>>;

// out = the weight map of an index. A file's name is a plain one: it can't lead out of the directory.
inline std::string parse_weight_index(WeightMap& out, std::string_view text) {
    Json index;
    const std::string bad = parse_json(index, text);
    if (!bad.empty()) return bad;
    const Json* map = index.find("weight_map");
    if (!map || !map->is(Json::Kind::object) || map->items.empty()) return "has no weight_map";
    for (size_t i = 0; i < map->items.size(); i++) {
        const std::string& file = map->items[i].string;
        if (!map->items[i].is(Json::Kind::string) || !file.ends_with(".safetensors") ||
            file.find('/') != file.npos || file.find('\0') != file.npos)
            return "the file of \"" + printable(map->keys[i]) + "\" is " + printable(json_text(map->items[i])) +
                   ": wants the name of a .safetensors file";
        out[file].push_back(map->keys[i]);
    }
    return "";
}

// The safetensors files of a directory, open, and where each tensor lies. Names are kept without "transformer.".
class WeightFiles {
  public:
    struct Place {
        size_t file;
        const FileTensor* tensor;
    };

    static std::string plain_name(std::string_view name) {
        constexpr std::string_view kPrefix = "transformer.";
        return std::string(name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name);
    }

    // One model.safetensors, or the files of an index, which hold its tensors and no others.
    std::string open(const std::string& dir) {
        const std::string single = dir + "/model.safetensors", index = single + ".index.json";
        WeightMap map;
        std::string error;
        if (access(single.c_str(), F_OK) == 0) {
            map["model.safetensors"] = {};
        } else if (access(index.c_str(), F_OK) == 0) {
            std::string text;
            error = read_text_file(text, index, kLargestJsonFile);
            if (!error.empty()) return error;
            error = parse_weight_index(map, text);
            if (!error.empty()) return index + ": " + error;
        } else {
            return dir + " has neither model.safetensors nor model.safetensors.index.json (files of another kind: open "
                         "the model in transformers and save_pretrained() it)";
        }
        files_.reserve(map.size());
        for (const auto& [name, tensors] : map) {
            error = add(dir + "/" + name, tensors);
            if (!error.empty()) return error;
        }
        return "";
    }

    const std::map<std::string, Place>& places() const { return places_; }

    const std::string& path(const Place& place) const { return files_[place.file].path(); }

    // out (count) = elements first .. first + count.
    std::string read(float* out_cpu, const Place& place, uint64_t first, uint64_t count) const {
        return files_[place.file].read(out_cpu, *place.tensor, first, count);
    }

  private:
    // Opens one file. `promised`: the names that the index gives for it; none without an index.
    std::string add(const std::string& path, const std::vector<std::string>& promised) {
        SafetensorsFile& file = files_.emplace_back();
        const std::string error = file.open(path);
        if (!error.empty()) return error;
        for (const FileTensor& t : file.tensors())
            if (!places_.insert({plain_name(t.name), {files_.size() - 1, &t}}).second)
                return path + ": tensor \"" + printable(t.name) + "\" comes twice";
        for (const std::string& name : promised) {
            const auto found = places_.find(plain_name(name));
            if (found == places_.end() || found->second.file != files_.size() - 1)
                return path + " lacks tensor \"" + printable(name) + "\", which the index says it has";
        }
        if (!promised.empty() && promised.size() != file.tensors().size())
            return text_of("%s has %zu tensors, the index gives it %zu", path.c_str(), file.tensors().size(),
                           promised.size());
        return "";
    }

    std::vector<SafetensorsFile> files_;
    std::map<std::string, Place> places_;
};

// Whether a name without prefix is a buffer of the attention mask, "h.3.attn.bias" or "h.3.attn.masked_bias", that old
// versions of transformers saved among the weights.
inline bool is_mask_buffer(std::string_view name) {
    if (!name.starts_with("h.")) return false;
    name.remove_prefix(2);
    const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
    name.remove_prefix(digits);
    return digits > 0 && (name == ".attn.bias" || name == ".attn.masked_bias");
}

// Whether every number of lm_head.weight is that of wte.weight: then it is the tied head, saved a second time.
inline std::string check_tied_head(const WeightFiles& files) {
    constexpr uint64_t kChunk = 1 << 20;
    const auto head = files.places().find("lm_head.weight"), wte = files.places().find("wte.weight");
    if (head == files.places().end() || wte == files.places().end()) return "";
    const std::string differs = files.path(head->second) + ": lm_head.weight differs from wte.weight: this program's "
                                                           "head is tied to wte";
    if (head->second.tensor->shape != wte->second.tensor->shape) return differs;
    const uint64_t elements = wte->second.tensor->elements();
    std::vector<float> a(std::min(kChunk, elements)), b(a.size());
    for (uint64_t first = 0; first < elements; first += kChunk) {
        const uint64_t now = std::min(kChunk, elements - first);
        std::string error = files.read(a.data(), head->second, first, now);
        if (error.empty()) error = files.read(b.data(), wte->second, first, now);
        if (!error.empty()) return error;
        if (std::memcmp(a.data(), b.data(), now * sizeof(float)) != 0) return differs;   // a NaN equals its copy
    }
    return "";
}

// Whether the files hold the wanted tensors, of the wanted shapes, and nothing that is unknown.
inline std::string check_weights(const WeightFiles& files, const std::vector<SavedTensor>& wanted) {
    std::map<std::string, const SavedTensor*> by_name;
    for (const SavedTensor& w : wanted) by_name[WeightFiles::plain_name(w.name)] = &w;
    for (const auto& [name, place] : files.places()) {
        const auto found = by_name.find(name);
        const std::string who = files.path(place) + ": tensor \"" + printable(place.tensor->name) + "\"";
        if (found == by_name.end()) {
            if (is_mask_buffer(name) || name == "lm_head.weight") continue;
            return who + " is unknown in a GPT-2 of the shape that config.json gives";
        }
        if (place.tensor->shape != found->second->shape)
            return who + " has shape " + shape_text(place.tensor->shape) + ": wants " +
                   shape_text(found->second->shape);
    }
    for (const auto& [name, tensor] : by_name)
        if (!files.places().contains(name)) return "tensor \"" + tensor->name + "\" is missing";
    return check_tied_head(files);
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

// Gives every wanted tensor to the sink, in the order of `wanted`, or returns an error; a late one, a number that isn't
// finite, say, leaves those before it given. Host memory: the largest tensor.
inline std::string read_weights(const std::string& dir, const std::vector<SavedTensor>& wanted,
                                const WeightSink& sink) {
    WeightFiles files;
    std::string error = files.open(dir);
    if (!error.empty()) return error;
    error = check_weights(files, wanted);
    if (!error.empty()) return dir + ": " + error;
    std::vector<float> data;
    for (size_t i = 0; i < wanted.size(); i++) {
        const auto& place = files.places().at(WeightFiles::plain_name(wanted[i].name));
        data.resize(std::max<size_t>(data.size(), wanted[i].elements()));
        const size_t count = wanted[i].elements();
        error = files.read(data.data(), place, 0, count);
        if (!error.empty()) return error;
        for (size_t j = 0; j < count; j++)
            if (!std::isfinite(data[j]))
                return text_of("%s: tensor \"%s\": element %zu is %g", files.path(place).c_str(),
                               printable(place.tensor->name).c_str(), j, data[j]);
        sink(i, data.data(), count);
    }
    return "";
}

// The shape of the model in a Hugging Face GPT-2 directory. Fatal where there is none that this program computes.
inline ModelShape load_shape(const std::string& dir) {
    ModelShape shape{};
    const std::string error = read_shape(shape, dir);
    if (!error.empty()) fatal("--init-from: %s", error.c_str());
    return shape;
}

// Reads the weights of a Hugging Face GPT-2 directory: F32, F16 or BF16, names with or without "transformer.", one file
// or several with an index. Mask buffers and an lm_head.weight equal to wte are passed over; a missing or unknown tensor,
// another shape, a number that isn't finite are fatal.
inline void load_model(const std::string& dir, const std::vector<SavedTensor>& wanted, const WeightSink& sink) {
    const std::string error = read_weights(dir, wanted, sink);
    if (!error.empty()) fatal("--init-from: %s", error.c_str());
}

// ---- saving ---------------------------------------------------------------------------------------------------------

// "step_00000240"
inline std::string checkpoint_name(int64_t step) {
    return text_of("step_%08lld", static_cast<long long>(step));
}

// Brings a directory's entries to the disk: without it, a rename may not survive a power cut.
inline std::string sync_directory(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    std::string error;
    // Some network file systems can't do it and say EINVAL: they need no help then.
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) error = path + " cannot be written: " + std::strerror(errno);
    if (fd >= 0) ::close(fd);
    return error;
}

// Writes config.json and model.safetensors into a directory that exists.
inline std::string write_model(const std::string& dir, const ModelShape& shape,
                               const std::vector<SavedTensor>& tensors, const WeightSource& source) {
    std::vector<NewTensor> list;
    for (const SavedTensor& t : tensors) list.push_back({t.name, kF32, t.shape});
    std::string error = write_safetensors(dir + "/model.safetensors", list,
                                          [&](void* out_cpu, size_t tensor, uint64_t first, uint64_t bytes) {
                                              source(static_cast<float*>(out_cpu), tensor, first / sizeof(float),
                                                     bytes / sizeof(float));
                                          });
    if (!error.empty()) return error;
    const std::string config = config_text(shape);
    File file;
    error = file.create(dir + "/config.json");
    if (error.empty()) error = file.write(config.data(), config.size());
    return error.empty() ? file.sync_and_close() : error;
}

// Renames a filled directory to its final name and points `latest` at it. One of that name from an earlier run is
// moved aside first and removed last, so that at every moment a whole one is there.
inline std::string publish_checkpoint(const std::string& output_dir, const std::string& partial,
                                      const std::string& name) {
    const std::string final = output_dir + "/" + name, replaced = output_dir + "/." + name + ".replaced";
    const auto failure = [](const std::string& path) { return path + " cannot be renamed: " + std::strerror(errno); };
    std::error_code ignored;
    std::string error = sync_directory(partial);
    if (!error.empty()) return error;
    std::filesystem::remove_all(replaced, ignored);
    if (rename(final.c_str(), replaced.c_str()) != 0 && errno != ENOENT) return failure(final);
    if (rename(partial.c_str(), final.c_str()) != 0) {
        error = failure(partial);
        rename(replaced.c_str(), final.c_str());
        return error;
    }
    error = sync_directory(output_dir);
    if (!error.empty()) return error;
    std::filesystem::remove_all(replaced, ignored);

    const std::string link = output_dir + "/latest", new_link = output_dir + "/.latest.partial";
    unlink(new_link.c_str());
    if (symlink(name.c_str(), new_link.c_str()) != 0 || rename(new_link.c_str(), link.c_str()) != 0) {
        // The model is safe under its own name, and some file systems have no links: no reason to end a run.
        warn("%s cannot be pointed at %s: %s", link.c_str(), name.c_str(), std::strerror(errno));
        unlink(new_link.c_str());
    }
    return sync_directory(output_dir);
}

// Saves the model as OUTPUT_DIR/step_00000240/ and returns that path. OUTPUT_DIR is made where it is missing. A failure,
// a full disk, say, is fatal: the partial directory is removed, what was saved before stays. Host memory: 16 MiB.
inline std::string save_model(const std::string& output_dir, int64_t step, const ModelShape& shape,
                              const std::vector<SavedTensor>& tensors, const WeightSource& source) {
    const std::string name = checkpoint_name(step), partial = output_dir + "/." + name + ".partial";
    std::error_code failed;
    std::filesystem::remove_all(partial, failed);   // of a run that was killed while it saved
    std::filesystem::create_directories(partial, failed);
    if (failed) fatal("--output-dir: %s cannot be created: %s", partial.c_str(), failed.message().c_str());
    std::string error = write_model(partial, shape, tensors, source);
    if (error.empty()) error = publish_checkpoint(output_dir, partial, name);
    if (!error.empty()) {
        std::filesystem::remove_all(partial, failed);
        fatal("the model of step %lld is not saved: %s", static_cast<long long>(step), error.c_str());
    }
    return output_dir + "/" + name;
}
