// Picks the next token from a row of logits, by temperature and top-k. On the host: a sample is a hundred
// rows.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <numeric>
#include <vector>

struct SamplerOptions {
    double temperature =
        0.8;         // 0: always the likeliest. Below 1 keeps a model that has seen little from rambling
    int top_k = 40;  // 0: all tokens. 40 is what GPT-2's authors published their samples with
};

// Tokens a sample has: a few lines of text, and cheap beside a validation.
constexpr int kSampleTokens = 128;

// A number in [0, 1) that depends on (seed, index) alone: two rounds of splitmix64's mixer (Steele et al.
// 2014).
inline double uniform_from(uint64_t seed, uint64_t index) {
    const auto mix = [](uint64_t x) {
        x += 0x9E3779B97F4A7C15;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        return x ^ (x >> 31);
    };
    return static_cast<double>(mix(mix(seed) ^ index) >> 11) * 0x1p-53;
}

// A token in [0, vocab_size), drawn with probability softmax(logits / temperature) among the top_k largest.
//   logits_cpu (vocab_size or more) read; what lies beyond, the padding, is not looked at
// The same (logits, seed, index) gives the same token. Of equal logits the lower token comes first. A NaN is
// never drawn; +inf is drawn before anything finite. Returns -1 where no logit is above -inf.
inline int sample_token(const float* logits_cpu, int vocab_size, const SamplerOptions& options, uint64_t seed,
                        uint64_t index) {
    std::vector<int> tokens;
    for (int v = 0; v < vocab_size; v++) {
        if (logits_cpu[v] > -INFINITY) tokens.push_back(v);
    }
    if (tokens.empty()) return -1;
    const auto likelier = [&](int a, int b) {
        return logits_cpu[a] != logits_cpu[b] ? logits_cpu[a] > logits_cpu[b] : a < b;
    };
    const int likeliest = *std::min_element(tokens.begin(), tokens.end(), likelier);
    const double largest = logits_cpu[likeliest];
    if (options.temperature <= 0 || isinf(largest)) return likeliest;

    const size_t kept = options.top_k > 0 ? std::min<size_t>(options.top_k, tokens.size()) : tokens.size();
    if (kept < tokens.size()) {
        std::nth_element(tokens.begin(), tokens.begin() + kept, tokens.end(), likelier);
        tokens.resize(kept);
        std::sort(tokens.begin(), tokens.end());  // nth_element leaves an order that the library may choose
    }
    // Weights relative to the largest: exp never overflows, and their sum is at least 1.
    std::vector<double> weights(kept);
    std::transform(tokens.begin(), tokens.end(), weights.begin(),
                   [&](int v) { return exp((logits_cpu[v] - largest) / options.temperature); });
    double left = uniform_from(seed, index) * std::accumulate(weights.begin(), weights.end(), 0.0);
    int last = likeliest;  // where rounding leaves a rest behind the last token
    for (size_t i = 0; i < kept; i++) {
        if (weights[i] == 0) continue;
        if (left < weights[i]) return tokens[i];
        left -= weights[i];
        last = tokens[i];
    }
    return last;
}
