// JSON as a plain value: what the program reads and writes of it. json.cpp alone knows the library
// underneath.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// One JSON value; an object keeps the order of its keys.
//   Json::object().add("n_layer", 12).add("tied", true)   ->   {"n_layer":12,"tied":true}
struct Json {
    enum class Kind { null, boolean, integer, number, string, array, object };

    Kind kind = Kind::null;
    bool boolean = false;
    int64_t integer = 0;  // Kind::integer: written without a point or exponent, and fits 64 bits
    double number = 0;    // Kind::number, and Kind::integer converted
    std::string string;
    std::vector<std::string> keys;  // object: keys[i] names items[i]
    std::vector<Json> items;        // array and object

    Json() = default;
    Json(bool value) : kind(Kind::boolean), boolean(value) {}
    Json(double value) : kind(Kind::number), number(value) {}
    Json(std::string value) : kind(Kind::string), string(std::move(value)) {}
    Json(const char* value) : kind(Kind::string), string(value) {}
    template <std::integral Integer>
    Json(Integer value)
        : kind(Kind::integer), integer(static_cast<int64_t>(value)), number(static_cast<double>(value)) {}

    static Json object() { return of_kind(Kind::object); }
    static Json array() { return of_kind(Kind::array); }

    bool is(Kind wanted) const { return kind == wanted; }

    // Appends to an object; the key must be new.
    Json& add(std::string key, Json value) {
        keys.push_back(std::move(key));
        items.push_back(std::move(value));
        return *this;
    }

    // Appends to an array.
    Json& push(Json value) {
        items.push_back(std::move(value));
        return *this;
    }

    // The value of a key, or nullptr where this is no object or has no such key. Linear in the number of
    // keys.
    const Json* find(std::string_view key) const {
        for (size_t i = 0; i < keys.size(); i++)
            if (keys[i] == key) return &items[i];
        return nullptr;
    }

  private:
    static Json of_kind(Kind kind) {
        Json value;
        value.kind = kind;
        return value;
    }
};

// A text of more values, or deeper, is refused: no file of ours comes near, and the memory for a value is a
// hundred times that of the "," it takes to ask for one.
constexpr size_t kMostJsonValues = size_t{1} << 18;
constexpr size_t kDeepestJson = 32;

// out = the value of a whole JSON text (RFC 8259, UTF-8). Returns an error in one line, empty where all went
// well. A key that comes twice in an object is an error.
std::string parse_json(Json& out, std::string_view text);

// The text of a value, on one line, or indented by `indent` spaces a level where that is 0 or more. Doubles
// are written so that reading gives the same bits; what isn't finite becomes null, and bad UTF-8 U+FFFD.
std::string json_text(const Json& value, int indent = -1);
