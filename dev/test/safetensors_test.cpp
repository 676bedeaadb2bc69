// llmc/safetensors.h and llmc/json.cpp: what is written is read back, every value of the short types is
// exact, and every file that lies is an error that names it.
#include "llmc/safetensors.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <numeric>

#include "dev/test/temp_dir.h"

namespace {

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// ---- JSON -------------------------------------------------------------------------------------------------

Json parsed(std::string_view text) {
    Json value;
    EXPECT_EQ(parse_json(value, text), "") << text;
    return value;
}

std::string json_error(std::string_view text) {
    Json value;
    const std::string error = parse_json(value, text);
    EXPECT_FALSE(error.empty()) << text << " is taken";
    return error;
}

TEST(JsonText, ValuesOfEveryKindAreRead) {
    const Json v = parsed(R"( {"a": [1, -2.5, "x\u00e9\n", true, null, {}], "b": {"c": 9007199254740993}} )");
    ASSERT_EQ(v.keys, (std::vector<std::string>{"a", "b"}));
    const std::vector<Json>& a = v.find("a")->items;
    ASSERT_EQ(a.size(), 6u);
    EXPECT_EQ(a[0].integer, 1);
    EXPECT_EQ(a[0].number, 1.0);
    EXPECT_EQ(a[1].number, -2.5);
    EXPECT_TRUE(a[1].is(Json::Kind::number));
    EXPECT_EQ(a[2].string, "x\xc3\xa9\n");
    EXPECT_TRUE(a[3].is(Json::Kind::boolean) && a[3].boolean);
    EXPECT_TRUE(a[4].is(Json::Kind::null));
    EXPECT_TRUE(a[5].is(Json::Kind::object));
    EXPECT_EQ(v.find("b")->find("c")->integer, 9007199254740993) << "went through a double";
    EXPECT_EQ(v.find("c"), nullptr);
    EXPECT_EQ(a[0].find("c"), nullptr);
}

TEST(JsonText, NumbersAreIntegersOnlyWhereTheyFit) {
    EXPECT_EQ(parsed("9223372036854775807").integer, INT64_MAX);
    EXPECT_EQ(parsed("-9223372036854775808").integer, INT64_MIN);
    EXPECT_TRUE(parsed("9223372036854775808").is(Json::Kind::number));
    EXPECT_TRUE(parsed("18446744073709551616").is(Json::Kind::number));
    EXPECT_TRUE(parsed("1.0").is(Json::Kind::number));
    EXPECT_TRUE(parsed("1e3").is(Json::Kind::number));
}

TEST(JsonText, WhatIsNoJsonIsAnError) {
    for (const char* text : {"", " ", "{", "[1,]", "{\"a\":}", "{\"a\" 1}", "{} {}", "nul", "NaN", "1e999",
                             "'a'", "[1 2]", "\"\xff\"", "\"\n\"", "{\"a\":1,}", "// a\n1", "01", "+1", "[}"})
        EXPECT_HAS(json_error(text), "bad JSON at byte");
    EXPECT_HAS(json_error(std::string_view("1\0", 2)), "bad JSON at byte 2");
    EXPECT_HAS(json_error(std::string_view("{}\0{", 4)), "bad JSON at byte 3");
    EXPECT_HAS(json_error(R"({"a":1,"b":{"c":1,"d":2,"c":3}})"), "the key \"c\" comes twice");
    EXPECT_HAS(json_error(R"({"":1,"":1})"), "the key \"\" comes twice");
    EXPECT_HAS(json_error(std::string(1000000, '[')), "JSON deeper than 32 levels");
    std::string wide = "[0";
    for (size_t i = 0; i < kMostJsonValues; i++) wide += ",0";
    EXPECT_HAS(json_error(wide + "]"), "JSON of more than 262144 values");
}

TEST(JsonText, TextIsReadBackAsItWas) {
    Json v = Json::object();
    v.add("list", Json::array().push(1).push(-1.5).push(0.1).push(1e-05).push(5e-324).push(INT64_MIN));
    v.add("text", "a \"quoted\" \\ line\n\x01")
        .add("none", Json())
        .add("yes", true)
        .add("empty", Json::array());
    v.add("inner", Json::object().add("z", 1u).add("a", 2u));
    const std::string text = json_text(v);
    EXPECT_EQ(text.substr(0, 12), "{\"list\":[1,-");
    EXPECT_EQ(text.find('\n'), text.npos);
    EXPECT_EQ(json_text(parsed(text)), text);
    EXPECT_EQ(json_text(parsed(json_text(v, 2))), text);
    EXPECT_EQ(parsed(text).find("list")->items[2].number, 0.1);
    EXPECT_EQ(parsed(text).find("list")->items[4].number, 5e-324);
    EXPECT_HAS(text, R"("inner":{"z":1,"a":2})");  // the keys in their order
    EXPECT_EQ(json_text(Json(std::nan(""))), "null");
    EXPECT_EQ(json_text(Json("a\xff")), "\"a\xef\xbf\xbd\"");
}

// ---- the short types --------------------------------------------------------------------------------------

// The value of sign, exponent and fraction bits by the definition of IEEE 754.
double value_of(uint16_t bits, int exponent_bits, int fraction_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1, highest = (1 << exponent_bits) - 1;
    const int exponent = bits >> fraction_bits & highest, fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == highest) return fraction ? std::nan("") : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
    return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

TEST(ShortTypes, EveryValueIsExact) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const auto u = static_cast<uint16_t>(bits);
        const double half = value_of(u, 5, 10), bf16 = value_of(u, 8, 7);
        if (std::isnan(half)) EXPECT_TRUE(std::isnan(float_of_f16(u))) << bits;
        else
            EXPECT_EQ(std::bit_cast<uint32_t>(float_of_f16(u)),
                      std::bit_cast<uint32_t>(static_cast<float>(half)))
                << bits;
        if (std::isnan(bf16)) EXPECT_TRUE(std::isnan(float_of_bf16(u))) << bits;
        else
            EXPECT_EQ(std::bit_cast<uint32_t>(float_of_bf16(u)),
                      std::bit_cast<uint32_t>(static_cast<float>(bf16)))
                << bits;
    }
}

// ---- hostile headers --------------------------------------------------------------------------------------

std::string with_length(const std::string& header, const std::string& data, int64_t longer = 0) {
    const uint64_t length = header.size() + static_cast<uint64_t>(longer);
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

std::string open_error(const std::string& bytes) {
    TempDir dir;
    write_file(dir / "a.safetensors", bytes);
    SafetensorsFile file;
    const std::string error = file.open(dir / "a.safetensors");
    if (!error.empty()) {
        EXPECT_NE(error.find(dir / "a.safetensors"), error.npos) << error << ": the file is not named";
        EXPECT_EQ(error.find('\n'), error.npos) << error;
    }
    return error;
}

std::string header_error(const std::string& header, size_t data_bytes) {
    return open_error(with_length(header, std::string(data_bytes, '\1')));
}

TEST(Header, GoodOnesAreTaken) {
    EXPECT_EQ(header_error("{}", 0), "");
    EXPECT_EQ(header_error(R"({"__metadata__":{"format":"pt","any":"thing"}}   )", 0), "");
    EXPECT_EQ(header_error(R"({"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}})", 8), "");
    EXPECT_EQ(header_error(R"({"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},)"
                           R"("a":{"data_offsets":[0,8],"dtype":"I64","shape":[]}})",
                           12),
              "");
    // Tensors without elements, anywhere; one begins where another does.
    EXPECT_EQ(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                           R"("z":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
                           R"("e":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}})",
                           4),
              "");
}

TEST(Header, ALengthThatLiesIsAnError) {
    const std::string header = "{}      ";
    EXPECT_HAS(open_error(""), "has 0 bytes: not a safetensors file");
    EXPECT_HAS(open_error("1234567"), "has 7 bytes");
    EXPECT_EQ(open_error(with_length(header, "")), "");
    EXPECT_HAS(open_error(with_length(header, "", 1)), "its header is to have 9 bytes, the file has 16");
    EXPECT_HAS(open_error(with_length(header, "", -9)), "its header is to have 18446744073709551615 bytes");
    EXPECT_HAS(open_error(with_length(header, "", INT64_MAX)),
               "its header is to have 9223372036854775815 bytes");
    EXPECT_HAS(open_error(with_length("", "")), "does not begin with '{'");
    EXPECT_HAS(open_error(with_length(" {}", "")), "does not begin with '{'");
    EXPECT_HAS(open_error(with_length("[]", "")), "does not begin with '{'");
    EXPECT_HAS(open_error(with_length(header, "xy", -7)), "bad JSON");

    // More than 16 MiB, though the file has it: a hole of 20 MiB.
    TempDir dir;
    write_file(dir / "a", with_length("{}", "", (20 << 20) - 2));
    std::filesystem::resize_file(dir / "a", (20 << 20) + 8);
    SafetensorsFile file;
    EXPECT_HAS(file.open(dir / "a"), "a header at most 16777216");
}

TEST(Header, EveryLieAboutATensorIsAnError) {
    const auto one = [](const char* entry, size_t data_bytes) {
        return header_error(std::string(R"({"w":)") + entry + "}", data_bytes);
    };
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 7),
               "bytes 0 to 8 are not within the 7 bytes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 9), "1 bytes trail");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})", 12),
               "begins at byte 4 of the data, after byte 0");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", 8), "bytes 8 to 0 are not within");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", 8),
               "shape (3) of F32 takes 12 bytes, its offsets span 8");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", 8),
               "shape (1) of F32 takes 4 bytes, its offsets span 8");
    EXPECT_HAS(one(R"({"dtype":"F64","shape":[2],"data_offsets":[0,8]})", 8),
               "shape (2) of F64 takes 16 bytes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})", 8),
               "overflows");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})", 0), "overflows");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", 8),
               "shape is not a list of sizes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})", 8),
               "shape is not a list of sizes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})", 8), "shape is not a list of sizes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})", 8),
               "shape is not a list of sizes");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})", 8), "data_offsets is not a pair");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})", 8), "data_offsets is not a pair");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[-8,0]})", 8), "data_offsets is not a pair");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]})", 8),
               "data_offsets is not a pair");
    EXPECT_HAS(one(R"({"dtype":"f32","shape":[2],"data_offsets":[0,8]})", 8), "unknown dtype \"f32\"");
    EXPECT_HAS(one(R"({"dtype":"F4","shape":[2],"data_offsets":[0,1]})", 1), "unknown dtype \"F4\"");
    EXPECT_HAS(one(R"({"dtype":4,"shape":[2],"data_offsets":[0,8]})", 8), "has no dtype");
    EXPECT_HAS(one(R"({"Dtype":"F32","shape":[2],"data_offsets":[0,8]})", 8), "has no dtype");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2]})", 8), "wants an object of dtype, shape and data_offsets");
    EXPECT_HAS(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1})", 8), "wants an object");
    EXPECT_HAS(one("[1,2,3]", 8), "has no dtype");
    EXPECT_HAS(one("null", 0), "wants an object");
    EXPECT_HAS(header_error(R"({"__metadata__":{"format":1}})", 0),
               "__metadata__ is not an object of strings");
    EXPECT_HAS(header_error(R"({"__metadata__":["a"]})", 0), "__metadata__ is not an object of strings");
    EXPECT_HAS(header_error(R"({"__metadata__":"a"})", 0), "__metadata__ is not an object of strings");
    EXPECT_HAS(header_error("{}", 1), "1 bytes trail");
}

TEST(Header, TensorsThatOverlapOrLeaveAHoleOrComeTwiceAreErrors) {
    const auto two = [](const char* a, const char* b, const char* second_name = "b") {
        return header_error(std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + a + R"(},")" +
                                second_name + R"(":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}",
                            8);
    };
    EXPECT_EQ(two("[0,4]", "[4,8]"), "");
    EXPECT_EQ(two("[4,8]", "[0,4]"), "");
    EXPECT_HAS(two("[0,4]", "[0,4]"), "tensor \"b\" begins at byte 0 of the data, before byte 4");
    EXPECT_HAS(two("[0,4]", "[3,7]"), "tensor \"b\" begins at byte 3 of the data, before byte 4");
    EXPECT_HAS(two("[3,7]", "[0,4]"), "tensor \"a\" begins at byte 3 of the data, before byte 4");
    EXPECT_HAS(header_error(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                            R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                            8),
               "begins at byte 4 of the data, after byte 3");
    EXPECT_HAS(two("[0,4]", "[4,8]", "a"), "the key \"a\" comes twice");
}

TEST(Header, AHostileNameStaysOnOneLineOfTheMessage) {
    const std::string error = header_error(R"({"a\n\u001b[31m)" + std::string(5000, 'x') + R"(":{}})", 0);
    EXPECT_HAS(error, "tensor \"a??[31mxxx");
    EXPECT_LT(error.size(), 400u);
}

// ---- reading and writing ----------------------------------------------------------------------------------

std::vector<float> ramp(size_t n) {
    std::vector<float> values(n);
    for (size_t i = 0; i < n; i++) values[i] = 0.25f * static_cast<float>(i) - 3;
    return values;
}

TEST(Data, WhatIsWrittenIsReadBack) {
    TempDir dir;
    // The third is larger than the buffer it is written through, and no multiple of it.
    const std::vector<NewTensor> tensors = {
        {"scalar", kF32, {}}, {"empty", kF32, {0, 5}}, {"big", kF32, {2203, 2001}}, {"short", kBF16, {3}}};
    const std::vector<float> values = ramp(2203 * 2001);
    const uint16_t shorts[] = {0x3f80, 0xc000, 0x0001};
    ASSERT_EQ(write_safetensors(dir / "a", tensors,
                                [&](void* out, size_t tensor, uint64_t first, uint64_t bytes) {
                                    EXPECT_LE(first + bytes, tensors[tensor].bytes());
                                    const char* data = tensor == 3
                                                           ? reinterpret_cast<const char*>(shorts)
                                                           : reinterpret_cast<const char*>(values.data());
                                    std::memcpy(out, data + first, bytes);
                                }),
              "");

    const std::string bytes = read_file(dir / "a");
    uint64_t length;
    std::memcpy(&length, bytes.data(), 8);
    EXPECT_EQ(length % 8, 0u) << "the data is not aligned";
    EXPECT_EQ(bytes.substr(8, 34), R"({"__metadata__":{"format":"pt"},"s)");
    EXPECT_EQ(bytes.size(), 8 + length + 4 + 4 * values.size() + 6);

    SafetensorsFile file;
    ASSERT_EQ(file.open(dir / "a"), "");
    ASSERT_EQ(file.tensors().size(), 4u);
    for (const FileTensor& t : file.tensors()) {
        std::vector<float> read(t.elements());
        ASSERT_EQ(file.read(read.data(), t, 0, read.size()), "");
        if (t.name == "scalar") { EXPECT_EQ(read, std::vector<float>{-3}); }
        if (t.name == "empty") { EXPECT_EQ(t.shape, (std::vector<uint64_t>{0, 5})); }
        if (t.name == "big") { EXPECT_EQ(read, values); }
        if (t.name == "short") { EXPECT_EQ(read, (std::vector<float>{1, -2, 0x1p-133f})); }
    }
}

TEST(Data, ShortTypesAreWidenedInPlaceAtAnyLengthAndFromAnyElement) {
    for (size_t n : {1, 2, 3, 64, 1001}) {
        std::string data;
        std::vector<float> half(n), bf16(n);
        for (size_t i = 0; i < n; i++) {
            const auto bits = static_cast<uint16_t>(0x1234 + 3 * i);
            data.append(reinterpret_cast<const char*>(&bits), 2);
            half[i] = float_of_f16(bits);
            bf16[i] = float_of_bf16(bits);
        }
        TempDir dir;
        const std::string count = std::to_string(n), middle = std::to_string(2 * n),
                          end = std::to_string(4 * n);
        // An odd header length: the data isn't aligned.
        write_file(dir / "a",
                   with_length("{\"h\":{\"dtype\":\"F16\",\"shape\":[" + count + "],\"data_offsets\":[0," +
                                   middle + "]},\"b\":{\"dtype\":\"BF16\",\"shape\":[" + count +
                                   "],\"data_offsets\":[" + middle + "," + end + "]}}" + (n % 2 ? " " : ""),
                               data + data));
        SafetensorsFile file;
        ASSERT_EQ(file.open(dir / "a"), "");
        for (const FileTensor& t : file.tensors())
            for (size_t first = 0; first < n; first += n / 3 + 1) {
                std::vector<float> read(n - first + 1,
                                        77);  // one more than is read, to see that it is left alone
                ASSERT_EQ(file.read(read.data(), t, first, n - first), "");
                for (size_t i = first; i < n; i++)
                    ASSERT_EQ(read[i - first], (t.name == "h" ? half : bf16)[i]);
                EXPECT_EQ(read.back(), 77);
            }
    }
}

TEST(Data, OtherTypesAreNoWeights) {
    TempDir dir;
    write_file(dir / "a", with_length(R"({"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", "1234"));
    SafetensorsFile file;
    ASSERT_EQ(file.open(dir / "a"), "");
    float x;
    EXPECT_HAS(file.read(&x, file.tensors()[0], 0, 1), "tensor \"w\" is of type I32: wants F32, F16 or BF16");
}

TEST(Data, OffsetsBeyondFourGiBAreRight) {
    TempDir dir;
    const uint64_t n = 1'500'000'000;  // 6 GB, nearly all of it a hole that takes no disk
    const std::string header = R"({"w":{"dtype":"F32","shape":[1500000000],"data_offsets":[0,6000000000]}})";
    write_file(dir / "a", with_length(header, ""));
    std::filesystem::resize_file(dir / "a", 8 + header.size() + 4 * n);
    const float last[] = {1.5f, -2.5f};
    std::fstream file(dir / "a", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(8 + header.size() + 4 * (n - 2)));
    file.write(reinterpret_cast<const char*>(last), sizeof(last));
    file.close();
    SafetensorsFile big;
    ASSERT_EQ(big.open(dir / "a"), "");
    float read[3] = {9, 9, 9};
    ASSERT_EQ(big.read(read, big.tensors()[0], n - 3, 3), "");
    EXPECT_EQ(read[0], 0);
    EXPECT_EQ(read[1], 1.5f);
    EXPECT_EQ(read[2], -2.5f);
}

TEST(Data, AFileThatShrinksOrCannotBeWrittenIsAnError) {
    TempDir dir;
    const std::vector<NewTensor> tensors = {{"w", kF32, {100000}}};
    const auto zeros = [](void* out, size_t, uint64_t, uint64_t bytes) { std::memset(out, 0, bytes); };
    ASSERT_EQ(write_safetensors(dir / "a", tensors, zeros), "");
    SafetensorsFile file;
    ASSERT_EQ(file.open(dir / "a"), "");
    std::filesystem::resize_file(dir / "a", 1000);
    std::vector<float> read(100000);
    EXPECT_HAS(file.read(read.data(), file.tensors()[0], 0, read.size()), "ends at byte 1000");

    EXPECT_HAS(write_safetensors(dir / "none/a", tensors, zeros), "none/a cannot be created: No such file");
    EXPECT_HAS(write_safetensors(dir.path(), tensors, zeros), "cannot be created: Is a directory");
    EXPECT_HAS(write_safetensors("/dev/full", tensors, zeros),
               "/dev/full cannot be written: No space left on device");
    signal(SIGXFSZ, SIG_IGN);
    rlimit before;
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit small = {65536, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    const std::string error = write_safetensors(dir / "b", tensors, zeros);
    setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_HAS(error, "b cannot be written: File too large");
}

}  // namespace
