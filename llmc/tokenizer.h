// Token ids to text. The table is llm.c's tokenizer.bin, beside the shards: 256 uint32 (20240328, version 2,
// number of tokens, id of end-of-text, 0 ...), then for every token a length byte and its bytes. (Version 1
// lacks the id: GPT-2's.)
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>
#include <string_view>
#include <vector>

#include "llmc/fatal.h"
#include "llmc/file.h"  // read_text_file, text_of

// The bytes of one UTF-8 character at the beginning of text, or 0 where there is none: text is empty, or not
// UTF-8 (overlong forms, surrogates and what lies beyond U+10FFFF are not).
inline size_t utf8_length(std::string_view text) {
    const auto at = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : 0; };
    const auto follows = [&](size_t i) { return (at(i) & 0xC0) == 0x80; };
    const uint8_t b = at(0);
    if (b < 0x80) return text.empty() ? 0 : 1;
    if (b >= 0xC2 && b <= 0xDF) return follows(1) ? 2 : 0;
    if (b >= 0xE0 && b <= 0xEF) {
        if ((b == 0xE0 && at(1) < 0xA0) || (b == 0xED && at(1) > 0x9F)) return 0;
        return follows(1) && follows(2) ? 3 : 0;
    }
    if (b >= 0xF0 && b <= 0xF4) {
        if ((b == 0xF0 && at(1) < 0x90) || (b == 0xF4 && at(1) > 0x8F)) return 0;
        return follows(1) && follows(2) && follows(3) ? 4 : 0;
    }
    return 0;
}

// Text that is safe to show: valid UTF-8 without the control characters that move a terminal's cursor or
// change its state. Line breaks and tabs stay, CR LF becomes LF; every other such byte or character becomes
// U+FFFD.
inline std::string printable_utf8(std::string_view bytes) {
    std::string out;
    while (!bytes.empty()) {
        const size_t length = utf8_length(bytes);
        const std::string_view character = bytes.substr(0, length > 0 ? length : 1);
        bytes.remove_prefix(character.size());
        const uint8_t first = static_cast<uint8_t>(character[0]);
        if (first == '\r' && !bytes.empty() && bytes[0] == '\n') continue;
        const bool c0 = (first < 0x20 && first != '\n' && first != '\t') || first == 0x7F;
        const bool c1 =
            first == 0xC2 && length == 2 && static_cast<uint8_t>(character[1]) < 0xA0;  // U+0080 - U+009F
        if (length == 0 || c0 || c1) out += "\xEF\xBF\xBD";
        else out += character;
    }
    return out;
}

class Tokenizer {
  public:
    // Reads the table. Fatal where the file is missing or not one.
    explicit Tokenizer(const std::string& path) {
        std::string bytes;
        std::string error = read_text_file(bytes, path, kHeaderBytes + kMaxTokens * 256);
        if (error.empty()) error = parse(bytes);
        if (error.empty()) return;
        fatal("tokenizer %s: %s; the scripts in data/ write it beside the shards", path.c_str(),
              error.c_str());
    }

    int vocab_size() const { return static_cast<int>(tokens_.size()); }
    int end_of_text() const { return end_of_text_; }

    // The bytes of one token; those of an id that the table lacks are U+FFFD.
    std::string_view bytes_of(int token) const {
        if (token < 0 || token >= vocab_size()) return "\xEF\xBF\xBD";
        return tokens_[token];
    }

    // The bytes of many tokens. A character may be split over tokens, so only the whole is text: see
    // printable_utf8().
    template <class Tokens>
    std::string decode(const Tokens& tokens) const {
        std::string out;
        for (const auto token : tokens) out += bytes_of(static_cast<int>(token));
        return out;
    }

  private:
    static constexpr size_t kHeaderBytes = 256 * sizeof(uint32_t);
    static constexpr size_t kMaxTokens = 65536;  // 16 bits in the shards

    // Returns an error in one line, empty where all went well.
    std::string parse(std::string_view bytes) {
        uint32_t header[256];
        if (bytes.size() < kHeaderBytes)
            return text_of("wants a header of %zu bytes, got %zu", kHeaderBytes, bytes.size());
        memcpy(header, bytes.data(), kHeaderBytes);
        const uint32_t magic = header[0], version = header[1], vocabulary = header[2];
        if (magic != 20240328) return text_of("wants the magic number 20240328, got %u", magic);
        if (version != 1 && version != 2) return text_of("wants version 1 or 2, got %u", version);
        if (vocabulary < 1 || vocabulary > kMaxTokens)
            return text_of("wants 1 to 65536 tokens, got %u", vocabulary);
        const uint32_t end_of_text = version == 1 ? 50256 : header[3];
        if (end_of_text >= vocabulary)
            return text_of("end-of-text is %u, wants below %u", end_of_text, vocabulary);
        end_of_text_ = static_cast<int>(end_of_text);
        bytes.remove_prefix(kHeaderBytes);
        for (uint32_t token = 0; token < vocabulary; token++) {
            if (bytes.empty()) return text_of("ends before token %u of %u", token, vocabulary);
            const size_t length = static_cast<uint8_t>(bytes[0]);
            if (length == 0) return text_of("token %u of %u has no bytes", token, vocabulary);
            if (bytes.size() < 1 + length) return text_of("ends inside token %u of %u", token, vocabulary);
            tokens_.emplace_back(bytes.substr(1, length));
            bytes.remove_prefix(1 + length);
        }
        if (!bytes.empty())
            return text_of("%zu bytes follow the last of %u tokens", bytes.size(), vocabulary);
        return "";
    }

    std::vector<std::string> tokens_;
    int end_of_text_ = 0;
};
