// Proves that tokenizer.bin becomes text, that every file which is not one is an error in one line, and that
// nothing a model writes can reach the terminal as anything but text.
//     make build/host/test/tokenizer_test && build/host/test/tokenizer_test
#include "llmc/tokenizer.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <random>

#include "dev/test/death.h"
#include "dev/test/temp_dir.h"

namespace {

const std::string kReplacement = "\xEF\xBF\xBD";

class TokenizerFile : public ::testing::Test {
  protected:
    void write(const std::string& bytes) const { write_file(path_, bytes); }

    std::string error(const std::string& what) const {
        return "tokenizer " + path_ + ": " + what + "; the scripts in data/ write it beside the shards";
    }

    TempDir temp_;
    const std::string dir_ = temp_.path(), path_ = temp_ / "tokenizer.bin";
};

// A file of these header words and tokens.
std::string file_of(std::vector<uint32_t> header, const std::vector<std::string>& tokens) {
    header.resize(256);
    std::string out(reinterpret_cast<const char*>(header.data()), 1024);
    for (const std::string& token : tokens) out += static_cast<char>(token.size()) + token;
    return out;
}

std::vector<std::string> all_bytes() {
    std::vector<std::string> tokens;
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, static_cast<char>(b)));
    return tokens;
}

TEST_F(TokenizerFile, Bytes) {
    write(file_of({20240328, 2, 256, 0}, all_bytes()));
    const Tokenizer tokenizer(path_);
    EXPECT_EQ(tokenizer.vocab_size(), 256);
    EXPECT_EQ(tokenizer.end_of_text(), 0);
    const std::string text = "To be, \xC3\xA9\n";
    std::vector<uint16_t> tokens;
    for (unsigned char c : text) tokens.push_back(c);
    EXPECT_EQ(tokenizer.decode(tokens), text);
    EXPECT_EQ(tokenizer.bytes_of(0), std::string(1, '\0'));
}

TEST_F(TokenizerFile, LongTokensAndIdsBeyondTheTable) {
    write(file_of({20240328, 2, 3, 2}, {"a", std::string(255, 'b'), "<|endoftext|>"}));
    const Tokenizer tokenizer(path_);
    EXPECT_EQ(tokenizer.end_of_text(), 2);
    EXPECT_EQ(tokenizer.decode(std::vector<int>{1, 0, 2}), std::string(255, 'b') + "a<|endoftext|>");
    EXPECT_EQ(tokenizer.decode(std::vector<int>{0, 3, -1, 65535}),
              "a" + kReplacement + kReplacement + kReplacement);
    EXPECT_EQ(tokenizer.decode(std::vector<int>{}), "");
}

TEST_F(TokenizerFile, VersionOneHasGpt2sEndOfText) {
    std::vector<std::string> tokens(50257, "ab");
    write(file_of({20240328, 1, 50257, 0}, tokens));
    EXPECT_EQ(Tokenizer(path_).end_of_text(), 50256);
    write(file_of({20240328, 1, 3, 0}, {"a", "b", "c"}));
    EXPECT_FATAL(Tokenizer{path_}, error("end-of-text is 50256, wants below 3"));
}

using TokenizerErrors = TokenizerFile;

TEST_F(TokenizerErrors, NoFile) {
    EXPECT_FATAL(Tokenizer{path_}, error(path_ + " cannot be opened: No such file or directory"));
    EXPECT_FATAL(Tokenizer{dir_}, "tokenizer " + dir_ + ": " + dir_ +
                                      " is not a regular file; the scripts in data/ write "
                                      "it beside the shards");
    ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
    EXPECT_FATAL(Tokenizer{path_}, error(path_ + " is not a regular file"));
}

TEST_F(TokenizerErrors, Header) {
    write("");
    EXPECT_FATAL(Tokenizer{path_}, error("wants a header of 1024 bytes, got 0"));
    write(std::string(1023, 'x'));
    EXPECT_FATAL(Tokenizer{path_}, error("wants a header of 1024 bytes, got 1023"));
    write(file_of({20240520, 1, 100}, {}));
    EXPECT_FATAL(Tokenizer{path_}, error("wants the magic number 20240328, got 20240520"));
    write(file_of({20240328, 3, 1, 0}, {"a"}));
    EXPECT_FATAL(Tokenizer{path_}, error("wants version 1 or 2, got 3"));
    write(file_of({20240328, 2, 0, 0}, {}));
    EXPECT_FATAL(Tokenizer{path_}, error("wants 1 to 65536 tokens, got 0"));
    write(file_of({20240328, 2, 0xFFFFFFFF, 0}, {"a"}));
    EXPECT_FATAL(Tokenizer{path_}, error("wants 1 to 65536 tokens, got 4294967295"));
    write(file_of({20240328, 2, 2, 2}, {"a", "b"}));
    EXPECT_FATAL(Tokenizer{path_}, error("end-of-text is 2, wants below 2"));
}

TEST_F(TokenizerErrors, Body) {
    write(file_of({20240328, 2, 3, 0}, {"a", "b"}));
    EXPECT_FATAL(Tokenizer{path_}, error("ends before token 2 of 3"));
    write(file_of({20240328, 2, 2, 0}, {"a", "bcd"}).substr(0, 1024 + 5));
    EXPECT_FATAL(Tokenizer{path_}, error("ends inside token 1 of 2"));
    write(file_of({20240328, 2, 2, 0}, {"a", ""}));
    EXPECT_FATAL(Tokenizer{path_}, error("token 1 of 2 has no bytes"));
    write(file_of({20240328, 2, 2, 0}, {"a", "b", "c"}));
    EXPECT_FATAL(Tokenizer{path_}, error("2 bytes follow the last of 2 tokens"));
    write(std::string(1024 + 65536 * 256 + 1, 'x'));
    EXPECT_FATAL(Tokenizer{path_}, error(path_ + " has 16778241 bytes, at most 16778240 are expected"));
}

TEST_F(TokenizerErrors, EveryTruncationIsOne) {
    const std::string whole = file_of({20240328, 2, 4, 0}, {"a", "bc", std::string(255, 'x'), "d"});
    for (size_t size = 1024; size < whole.size(); size += size < 1040 || size > 1280 ? 1 : 40) {
        write(whole.substr(0, size));
        EXPECT_EXIT(Tokenizer{path_}, ::testing::ExitedWithCode(1),
                    ": ends (inside|before) token [0-3] of 4; ")
            << size;
    }
}

// The definition of UTF-8 (RFC 3629, section 4), decoded the long way: as a number, then judged.
bool is_utf8_character(std::string_view s) {
    const auto at = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(s[i])); };
    uint32_t code = 0;
    if (s.size() == 1) return at(0) < 0x80;
    if (s.size() == 2 && (at(0) & 0xE0) == 0xC0) code = at(0) & 0x1F;
    else if (s.size() == 3 && (at(0) & 0xF0) == 0xE0) code = at(0) & 0x0F;
    else if (s.size() == 4 && (at(0) & 0xF8) == 0xF0) code = at(0) & 0x07;
    else return false;
    for (size_t i = 1; i < s.size(); i++) {
        if ((at(i) & 0xC0) != 0x80) return false;
        code = code << 6 | (at(i) & 0x3F);
    }
    const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    return code >= least[s.size()] && code <= 0x10FFFF && !(code >= 0xD800 && code <= 0xDFFF);
}

TEST(Utf8, LengthAgreesWithTheDefinition) {
    const auto expected = [](std::string_view text) -> size_t {
        for (size_t length = 1; length <= std::min<size_t>(4, text.size()); length++) {
            if (is_utf8_character(text.substr(0, length))) return length;
        }
        return 0;
    };
    EXPECT_EQ(utf8_length(""), 0u);
    // Every pair of first bytes, with continuations that matter behind them, and every truncation.
    for (int a = 0; a < 256; a++) {
        for (int b = 0; b < 256; b++) {
            for (const char* tail :
                 {"", "\x80", "\x80\x80", "\xBF\xBF", "\xC0\x80", "\x80\x41", "\x41\x41"}) {
                const std::string text = {static_cast<char>(a), static_cast<char>(b)};
                ASSERT_EQ(utf8_length(text + tail), expected(text + tail)) << a << " " << b;
            }
        }
        const std::string one(1, static_cast<char>(a));
        ASSERT_EQ(utf8_length(one), expected(one));
    }
}

TEST(PrintableUtf8, KeepsTextAndReplacesTheRest) {
    const std::string text = "Ay, h\xC3\xA9 \xE4\xBD\xA0 \xF0\x9F\x98\x80\n\tend";
    EXPECT_EQ(printable_utf8(text), text);
    EXPECT_EQ(printable_utf8("a\r\nb\rc"), "a\nb" + kReplacement + "c");
    EXPECT_EQ(printable_utf8("\x1b[2J\x07\x7f"), kReplacement + "[2J" + kReplacement + kReplacement);
    EXPECT_EQ(printable_utf8(std::string(1, '\0')), kReplacement);
    EXPECT_EQ(printable_utf8("\xC2\x9B"
                             "31m \xC2\xA0"),
              kReplacement + "31m \xC2\xA0");  // U+009B is CSI in one character
    EXPECT_EQ(printable_utf8("x\xE4\xBD"), "x" + kReplacement + kReplacement);
    EXPECT_EQ(printable_utf8("\xFF"
                             "a\xC3("),
              kReplacement + "a" + kReplacement + "(");
    EXPECT_EQ(printable_utf8(""), "");
}

TEST(PrintableUtf8, RandomBytesBecomeValidText) {
    std::mt19937 random(3);
    for (int round = 0; round < 3000; round++) {
        std::string bytes(random() % 30, ' ');
        for (char& c : bytes) c = static_cast<char>(random());
        const std::string text = printable_utf8(bytes);
        for (std::string_view rest = text; !rest.empty();) {
            const size_t length = utf8_length(rest);
            ASSERT_GT(length, 0u);
            const uint8_t first = static_cast<uint8_t>(rest[0]);
            ASSERT_TRUE(length > 1 || first == '\n' || first == '\t' || (first >= 0x20 && first < 0x7F));
            rest.remove_prefix(length);
        }
        EXPECT_EQ(printable_utf8(text), text);
    }
}

}  // namespace
