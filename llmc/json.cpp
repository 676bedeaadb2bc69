#include "llmc/json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "llmc/file.h"

namespace {

// nlohmann's parser calls one member a value, with no recursion and no exception; false stops it.
class Builder {
  public:
    explicit Builder(Json& root) : root_(root) {}

    const std::string& error() const { return error_; }

    bool null() { return place(Json()); }
    bool boolean(bool value) { return place(Json(value)); }
    bool number_integer(int64_t value) { return place(Json(value)); }
    bool number_unsigned(uint64_t value) {
        return value <= INT64_MAX ? place(Json(static_cast<int64_t>(value)))
                                  : place(Json(static_cast<double>(value)));
    }
    bool number_float(double value, const std::string&) { return place(Json(value)); }
    bool string(std::string& value) { return place(Json(std::move(value))); }
    bool binary(nlohmann::json::binary_t&) { return refuse("bad JSON"); }  // not in the text format

    bool start_object(size_t) { return open(Json::object()); }
    bool start_array(size_t) { return open(Json::array()); }
    bool end_array() { return close(); }
    bool key(std::string& name) {
        open_.back()->keys.push_back(std::move(name));
        return true;
    }
    bool end_object() {
        std::vector<std::string_view> names(open_.back()->keys.begin(), open_.back()->keys.end());
        std::sort(names.begin(), names.end());
        const auto twice = std::adjacent_find(names.begin(), names.end());
        if (twice != names.end())
            return refuse("bad JSON: the key \"" + printable(*twice) + "\" comes twice");
        return close();
    }

    bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) {
        return refuse(text_of("bad JSON at byte %zu", position));
    }

  private:
    bool refuse(std::string why) {
        error_ = std::move(why);
        return false;
    }

    bool place(Json value) {
        if (++values_ > kMostJsonValues)
            return refuse(text_of("JSON of more than %zu values", kMostJsonValues));
        if (open_.empty()) root_ = std::move(value);
        else open_.back()->items.push_back(std::move(value));
        return true;
    }

    bool open(Json value) {
        if (open_.size() >= kDeepestJson) return refuse(text_of("JSON deeper than %zu levels", kDeepestJson));
        Json* parent = open_.empty() ? nullptr : open_.back();
        if (!place(std::move(value))) return false;
        open_.push_back(parent ? &parent->items.back() : &root_);
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    Json& root_;
    std::vector<Json*> open_;  // an item of each is the next: it stays where it is until that one is closed
    size_t values_ = 0;
    std::string error_;
};

nlohmann::ordered_json to_library(const Json& value) {
    switch (value.kind) {
        case Json::Kind::null: return nullptr;
        case Json::Kind::boolean: return value.boolean;
        case Json::Kind::integer: return value.integer;
        case Json::Kind::number: return value.number;
        case Json::Kind::string: return value.string;
        case Json::Kind::array: break;
        case Json::Kind::object: {
            auto object = nlohmann::ordered_json::object_t();
            object.reserve(value.items.size());
            for (size_t i = 0; i < value.items.size(); i++)
                object.push_back({value.keys[i], to_library(value.items[i])});
            return object;
        }
    }
    auto array = nlohmann::ordered_json::array();
    for (const Json& item : value.items) array.push_back(to_library(item));
    return array;
}

}  // namespace

std::string parse_json(Json& out, std::string_view text) {
    out = Json();
    const size_t nul = text.find('\0');  // to the library it is the end of the text, whatever follows
    if (nul != text.npos) return text_of("bad JSON at byte %zu", nul + 1);
    Builder builder(out);
    if (nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) return "";
    return builder.error().empty() ? "bad JSON" : builder.error();
}

std::string json_text(const Json& value, int indent) {
    return to_library(value).dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}
