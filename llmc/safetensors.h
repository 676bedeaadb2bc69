// Reads and writes safetensors files: 8 bytes of header length (little-endian), the header in JSON, then the
// data.
//   {"__metadata__": {TEXT: TEXT}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}
// Offsets count from the end of the header; the tensors cover the data without holes or overlaps.
// Source: the format's description in huggingface/safetensors, README.md, "Format".
//
// A file is believed in nothing: every length is compared with the file's own size before anything is
// allocated for it. Errors are returned as one line of text that names the file; empty means that all went
// well.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "llmc/file.h"
#include "llmc/json.h"

static_assert(std::endian::native == std::endian::little,
              "the format is little-endian, and data is copied as it lies");

// ---- types -----------------------------------------------------------------------------------------------

struct FileDtype {
    const char* name;
    uint32_t bytes;
};
constexpr FileDtype kFileDtypes[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8},     {"I64", 8},
                                     {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
                                     {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
constexpr const FileDtype* kF32 = &kFileDtypes[0];
constexpr const FileDtype* kF16 = &kFileDtypes[1];
constexpr const FileDtype* kBF16 = &kFileDtypes[2];

// A bfloat16 is the upper half of the float with the same value. Exact.
inline float float_of_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The float with the value of an IEEE half: 1 sign, 5 exponent (bias 15), 10 fraction bits. Exact, subnormals
// too.
inline float float_of_f16(uint16_t bits) {
    const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);  // infinite or NaN
    if (exponent > 0) return std::bit_cast<float>(sign | (exponent + 127 - 15) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // fraction * 2^-10 * 2^-14: both exact
    return sign ? -magnitude : magnitude;
}

// ---- the header ------------------------------------------------------------------------------------------

// One tensor as a header describes it.
struct FileTensor {
    std::string name;
    const FileDtype* dtype = kF32;
    std::vector<uint64_t> shape;  // empty: one number
    uint64_t begin = 0, end = 0;  // bytes from the end of the header
    uint64_t elements() const { return (end - begin) / dtype->bytes; }
};

constexpr uint64_t kLargestHeader = uint64_t{16} << 20;  // GPT-2 with 48 layers takes 60 KB

// "(50257, 768)"
inline std::string shape_text(const std::vector<uint64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

// Reads a member that must be an array of non-negative integers. Returns whether it is one.
inline bool read_sizes(std::vector<uint64_t>& out, const Json& tensor, const char* key) {
    const Json* list = tensor.find(key);
    if (!list || !list->is(Json::Kind::array)) return false;
    for (const Json& item : list->items) {
        if (!item.is(Json::Kind::integer) || item.integer < 0) return false;
        out.push_back(static_cast<uint64_t>(item.integer));
    }
    return true;
}

// out = the tensor that `value` describes; its offsets lie within data_bytes and fit its shape and type.
inline std::string parse_file_tensor(FileTensor& out, const std::string& name, const Json& value,
                                     uint64_t data_bytes) {
    const std::string who = "tensor \"" + printable(name) + "\": ";
    out.name = name;
    if (value.items.size() != 3) return who + "wants an object of dtype, shape and data_offsets";

    const Json* dtype = value.find("dtype");
    if (!dtype || !dtype->is(Json::Kind::string)) return who + "has no dtype";
    const auto known = std::find_if(std::begin(kFileDtypes), std::end(kFileDtypes),
                                    [&](const FileDtype& d) { return d.name == dtype->string; });
    if (known == std::end(kFileDtypes)) return who + "unknown dtype \"" + printable(dtype->string) + "\"";
    out.dtype = known;

    std::vector<uint64_t> offsets;
    if (!read_sizes(out.shape, value, "shape")) return who + "shape is not a list of sizes";
    if (!read_sizes(offsets, value, "data_offsets") || offsets.size() != 2)
        return who + "data_offsets is not a pair of sizes";
    out.begin = offsets[0];
    out.end = offsets[1];
    if (out.begin > out.end || out.end > data_bytes)
        return who + text_of("its bytes %llu to %llu are not within the %llu bytes of data", out.begin + 0ULL,
                             out.end + 0ULL, data_bytes + 0ULL);

    uint64_t bytes = known->bytes;
    for (uint64_t size : out.shape)
        if (__builtin_mul_overflow(bytes, size, &bytes))
            return who + "shape " + shape_text(out.shape) + " overflows";
    if (bytes != out.end - out.begin)
        return who + text_of("shape %s of %s takes %llu bytes, its offsets span %llu",
                             shape_text(out.shape).c_str(), known->name, bytes + 0ULL,
                             out.end - out.begin + 0ULL);
    return "";
}

// Whether tensors in the order of their offsets cover the data: each begins where the last one ended.
inline std::string check_layout(const std::vector<FileTensor>& tensors, uint64_t data_bytes) {
    uint64_t end = 0;
    for (const FileTensor& t : tensors) {
        if (t.begin != end)
            return text_of(
                "tensor \"%s\" begins at byte %llu of the data, %s byte %llu, where the one before it ends",
                printable(t.name).c_str(), t.begin + 0ULL, t.begin < end ? "before" : "after", end + 0ULL);
        end = t.end;
    }
    if (end == data_bytes) return "";
    return text_of("the tensors end at byte %llu of the data, %llu bytes trail", end + 0ULL,
                   data_bytes - end + 0ULL);
}

// out = the tensors of a header in the order of their data. data_bytes: what the file holds after the header.
inline std::string parse_safetensors_header(std::vector<FileTensor>& out, std::string_view header,
                                            uint64_t data_bytes) {
    out.clear();
    Json json;
    if (!header.starts_with('{')) return "the header does not begin with '{'";
    const std::string bad = parse_json(json, header);
    if (!bad.empty()) return "the header: " + bad;
    for (size_t i = 0; i < json.items.size(); i++) {
        if (json.keys[i] == "__metadata__") {
            const auto& items = json.items[i].items;
            const bool texts =
                std::all_of(items.begin(), items.end(), [](auto& v) { return v.is(Json::Kind::string); });
            if (!json.items[i].is(Json::Kind::object) || !texts)
                return "__metadata__ is not an object of strings";
            continue;
        }
        const std::string error =
            parse_file_tensor(out.emplace_back(), json.keys[i], json.items[i], data_bytes);
        if (!error.empty()) return error;
    }
    // By the end too, so that an empty tensor comes before the one that begins at the same byte.
    std::stable_sort(out.begin(), out.end(), [](const FileTensor& a, const FileTensor& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    return check_layout(out, data_bytes);
}

// ---- reading ---------------------------------------------------------------------------------------------

// An open file: the header is read and checked, the data stays on the disk until it is asked for.
class SafetensorsFile {
  public:
    const std::string& path() const { return file_.path(); }
    const std::vector<FileTensor>& tensors() const { return tensors_; }

    std::string open(const std::string& path) {
        std::string error = file_.open_to_read(path);
        if (!error.empty()) return error;
        uint64_t header_bytes = 0;
        const uint64_t file_bytes = file_.bytes();
        if (file_bytes < sizeof(header_bytes))
            return text_of("%s has %llu bytes: not a safetensors file", path.c_str(), file_bytes + 0ULL);
        error = file_.read_at(&header_bytes, sizeof(header_bytes), 0);
        if (!error.empty()) return error;
        if (header_bytes > file_bytes - sizeof(header_bytes) || header_bytes > kLargestHeader)
            return text_of(
                "%s: its header is to have %llu bytes, the file has %llu and a header at most %llu: "
                "truncated, or not a safetensors file",
                path.c_str(), header_bytes + 0ULL, file_bytes + 0ULL, kLargestHeader + 0ULL);
        std::string header(header_bytes, '\0');
        error = file_.read_at(header.data(), header_bytes, sizeof(header_bytes));
        if (!error.empty()) return error;
        data_begin_ = sizeof(header_bytes) + header_bytes;
        error = parse_safetensors_header(tensors_, header, file_bytes - data_begin_);
        return error.empty() ? "" : path + ": " + error;
    }

    // out (count) = elements first .. first + count of t, one of tensors(), as floats. Exact: F32, F16 and
    // BF16 alone.
    std::string read(float* out_cpu, const FileTensor& t, uint64_t first, uint64_t count) const {
        if (t.dtype != kF32 && t.dtype != kF16 && t.dtype != kBF16)
            return text_of("%s: tensor \"%s\" is of type %s: wants F32, F16 or BF16", path().c_str(),
                           printable(t.name).c_str(), t.dtype->name);
        const uint64_t offset = data_begin_ + t.begin + first * t.dtype->bytes;
        if (t.dtype == kF32) return file_.read_at(out_cpu, count * sizeof(float), offset);

        // The halves are read into the upper half of out and widened from the front: element i lands in bytes
        // 4 i .. 4 i + 4, the halves not yet read begin at 2 count + 2 i + 2, never below 4 i + 4 while i <
        // count.
        char* const halves = reinterpret_cast<char*>(out_cpu) + count * sizeof(uint16_t);
        const std::string error = file_.read_at(halves, count * sizeof(uint16_t), offset);
        if (!error.empty()) return error;
        for (uint64_t i = 0; i < count; i++) {
            uint16_t bits;
            std::memcpy(&bits, halves + i * sizeof(bits), sizeof(bits));
            out_cpu[i] = t.dtype == kF16 ? float_of_f16(bits) : float_of_bf16(bits);
        }
        return "";
    }

  private:
    File file_;
    uint64_t data_begin_ = 0;
    std::vector<FileTensor> tensors_;
};

// ---- writing ---------------------------------------------------------------------------------------------

// A tensor to be written; its place in the file follows from the order.
struct NewTensor {
    std::string name;
    const FileDtype* dtype;
    std::vector<uint64_t> shape;
    uint64_t bytes() const {
        uint64_t n = dtype->bytes;
        for (uint64_t size : shape) n *= size;
        return n;
    }
};

// Fills out with `bytes` bytes of tensors[tensor] from byte `first` on; both are multiples of its element's
// size.
using TensorSource = std::function<void(void* out_cpu, size_t tensor, uint64_t first, uint64_t bytes)>;

// The length and the header, padded with spaces so that the data begins at a multiple of 8.
inline std::string safetensors_head(const std::vector<NewTensor>& tensors) {
    Json header = Json::object();
    header.add("__metadata__", Json::object().add("format", "pt"));
    uint64_t end = 0;
    for (const NewTensor& t : tensors) {
        Json shape = Json::array(), offsets = Json::array();
        for (uint64_t size : t.shape) shape.push(size);
        offsets.push(end).push(end + t.bytes());
        end += t.bytes();
        Json entry = Json::object();
        entry.add("dtype", t.dtype->name)
            .add("shape", std::move(shape))
            .add("data_offsets", std::move(offsets));
        header.add(t.name, std::move(entry));
    }
    std::string text = json_text(header);
    text.resize((text.size() + 7) / 8 * 8, ' ');
    uint64_t header_bytes = text.size();
    return std::string(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes)) + text;
}

// Writes a file of these tensors, in this order, and waits until it is on the disk. The data passes through
// one buffer of at most 16 MiB. Names must differ, and the larger types should come first: then every tensor
// is aligned to its type.
inline std::string write_safetensors(const std::string& path, const std::vector<NewTensor>& tensors,
                                     const TensorSource& source) {
    constexpr uint64_t kBufferBytes = uint64_t{16} << 20;
    File file;
    const std::string head = safetensors_head(tensors);
    std::string error = file.create(path);
    if (error.empty()) error = file.write(head.data(), head.size());
    std::vector<std::byte> buffer;
    for (size_t i = 0; i < tensors.size() && error.empty(); i++) {
        const uint64_t bytes = tensors[i].bytes();
        for (uint64_t first = 0; first < bytes && error.empty(); first += kBufferBytes) {
            const uint64_t now = std::min(kBufferBytes, bytes - first);
            if (buffer.size() < now) buffer.resize(now);
            source(buffer.data(), i, first, now);
            error = file.write(buffer.data(), now);
        }
    }
    return error.empty() ? file.sync_and_close() : error;
}
