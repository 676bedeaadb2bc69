// The shape of a GPT-2: the numbers that everything else is computed from.
#pragma once

inline constexpr int kHeadSize = 64;        // channels a head; GPT-2's, at every size
inline constexpr int kVocabMultiple = 128;  // 50257 -> 50304: whole tensor-core tiles in the head's products

// L layers, C channels, NH heads of 64, V tokens, P positions (rows of wpe; a run's sequences may be
// shorter).
struct ModelShape {
    int layers, channels, heads, vocab_size, positions;
    int padded_vocab_size() const {
        return (vocab_size + kVocabMultiple - 1) / kVocabMultiple * kVocabMultiple;
    }
};
