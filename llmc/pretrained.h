// Reads the weights of a Hugging Face GPT-2 directory, OpenAI's included: model.safetensors, or several files
// with model.safetensors.index.json; F32, F16 or BF16; names with or without "transformer.". Buffers of the
// attention mask and an lm_head.weight equal to wte are passed over.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/json.h"
#include "llmc/model_config.h"
#include "llmc/safetensors.h"
#include "llmc/tensors.h"  // TensorTable

// One tensor of a model under its Hugging Face name, "transformer.h.3.attn.c_attn.weight", with the shape it
// has there: (in, out) for matrices, (n) for biases and layernorms, (V, C) for wte without pad rows.
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
        const bool matrix = block.decay;  // decay goes to the tensors of two dimensions
        list.push_back({block.hf_name, matrix ? std::vector<uint64_t>{block.rows, block.cols}
                                              : std::vector<uint64_t>{block.cols}});
    }
    return list;
}

// Takes the whole of tensors[tensor], data (count); the memory is lent for the call.
using WeightSink = std::function<void(size_t tensor, const float* data_cpu, size_t count)>;

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
            return "the file of \"" + printable(map->keys[i]) + "\" is " +
                   printable(json_text(map->items[i])) + ": wants the name of a .safetensors file";
        out[file].push_back(map->keys[i]);
    }
    return "";
}

// The safetensors files of a directory, open, and where each tensor lies. Names are kept without
// "transformer.".
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
            return dir +
                   " has neither model.safetensors nor model.safetensors.index.json (files of another kind: "
                   "open "
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

// Whether a name without prefix is a buffer of the attention mask, "h.3.attn.bias" or "h.3.attn.masked_bias",
// that old versions of transformers saved among the weights.
inline bool is_mask_buffer(std::string_view name) {
    if (!name.starts_with("h.")) return false;
    name.remove_prefix(2);
    const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
    name.remove_prefix(digits);
    return digits > 0 && (name == ".attn.bias" || name == ".attn.masked_bias");
}

// Whether every number of lm_head.weight is that of wte.weight: then it is the tied head, saved a second
// time.
inline std::string check_tied_head(const WeightFiles& files) {
    constexpr uint64_t kChunk = 1 << 20;
    const auto head = files.places().find("lm_head.weight"), wte = files.places().find("wte.weight");
    if (head == files.places().end() || wte == files.places().end()) return "";
    const std::string differs = files.path(head->second) +
                                ": lm_head.weight differs from wte.weight: this program's "
                                "head is tied to wte";
    if (head->second.tensor->shape != wte->second.tensor->shape) return differs;
    const uint64_t elements = wte->second.tensor->elements();
    std::vector<float> a(std::min(kChunk, elements)), b(a.size());
    for (uint64_t first = 0; first < elements; first += kChunk) {
        const uint64_t now = std::min(kChunk, elements - first);
        std::string error = files.read(a.data(), head->second, first, now);
        if (error.empty()) error = files.read(b.data(), wte->second, first, now);
        if (!error.empty()) return error;
        if (std::memcmp(a.data(), b.data(), now * sizeof(float)) != 0)
            return differs;  // a NaN equals its copy
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

// Gives every wanted tensor to the sink, in the order of `wanted`, or returns an error; a late one, a number
// that isn't finite, say, leaves those before it given. Host memory: the largest tensor.
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

// Reads the weights of a Hugging Face GPT-2 directory: F32, F16 or BF16, names with or without
// "transformer.", one file or several with an index. Mask buffers and an lm_head.weight equal to wte are
// passed over; a missing or unknown tensor, another shape, a number that isn't finite are fatal.
inline void load_model(const std::string& dir, const std::vector<SavedTensor>& wanted,
                       const WeightSink& sink) {
    const std::string error = read_weights(dir, wanted, sink);
    if (!error.empty()) fatal("--init-from: %s", error.c_str());
}
