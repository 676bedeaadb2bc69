// Proves that tokens are drawn with the probabilities that temperature and top-k ask for, that the draw
// depends on (logits, seed, index) alone, and that padding, NaN and infinities are never what comes out.
//     make build/host/test/sampler_test && build/host/test/sampler_test
#include "llmc/sampler.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace {

constexpr uint64_t kSeed = 42;

std::vector<int> counts(const std::vector<float>& logits, int vocab_size, const SamplerOptions& options,
                        int draws) {
    std::vector<int> out(logits.size());
    for (int i = 0; i < draws; i++) out[sample_token(logits.data(), vocab_size, options, kSeed, i)]++;
    return out;
}

// Draws follow p: Pearson's statistic over the tokens with p > 0, which for k tokens has mean k - 1 and
// variance 2 (k - 1). Five standard deviations above the mean would be chance in fewer than 1 of 10^4 seeds;
// this seed is fixed.
void expect_distribution(const std::vector<int>& seen, const std::vector<double>& p, int draws) {
    double statistic = 0;
    int tokens = 0;
    for (size_t v = 0; v < p.size(); v++) {
        if (p[v] == 0) {
            EXPECT_EQ(seen[v], 0) << v;
            continue;
        }
        tokens++;
        const double wanted = p[v] * draws;
        ASSERT_GT(wanted, 20) << "too few for the statistic";
        statistic += (seen[v] - wanted) * (seen[v] - wanted) / wanted;
    }
    EXPECT_LT(statistic, tokens - 1 + 5 * sqrt(2.0 * (tokens - 1)));
    for (size_t v = p.size(); v < seen.size(); v++) EXPECT_EQ(seen[v], 0);
}

// softmax(logits / temperature) over the tokens in kept.
std::vector<double> softmax(const std::vector<float>& logits, double temperature, const std::set<int>& kept) {
    std::vector<double> p(logits.size());
    double sum = 0;
    for (int v : kept) sum += p[v] = exp(logits[v] / temperature);
    for (double& x : p) x /= sum;
    return p;
}

TEST(SampleToken, FollowsTheSoftmax) {
    const std::vector<float> logits = {0.5f, -1.0f, 2.0f, 0.0f, 1.5f};
    for (double temperature : {0.7, 1.0, 2.0}) {
        expect_distribution(counts(logits, 5, {temperature, 0}, 100000),
                            softmax(logits, temperature, {0, 1, 2, 3, 4}), 100000);
    }
}

TEST(SampleToken, TopKKeepsTheLargestAndOfEqualsTheLower) {
    const std::vector<float> logits = {0.5f, -1.0f, 2.0f, 0.5f, 1.5f};
    expect_distribution(counts(logits, 5, {1.0, 3}, 100000), softmax(logits, 1.0, {2, 4, 0}), 100000);
    expect_distribution(counts(logits, 5, {1.0, 4}, 100000), softmax(logits, 1.0, {2, 4, 0, 3}), 100000);
    expect_distribution(counts(logits, 5, {1.0, 99}, 100000), softmax(logits, 1.0, {0, 1, 2, 3, 4}), 100000);
    EXPECT_EQ(counts(logits, 5, {1.0, 1}, 100)[2], 100);
}

TEST(SampleToken, TemperatureZeroIsTheLikeliest) {
    EXPECT_EQ(counts({0, 3, 3, 1}, 4, {0, 0}, 100)[1], 100);
    EXPECT_EQ(counts({0, 3, 3, 1}, 4, {1e-300, 0}, 1000)[1] + counts({0, 3, 3, 1}, 4, {1e-300, 0}, 1000)[2],
              1000);
}

// The row is as long as the padded vocabulary; the rest of it may hold anything.
TEST(SampleToken, PaddingIsNeverDrawn) {
    std::vector<float> logits(384, 0.0f);
    for (int v = 257; v < 384; v++) logits[v] = v % 3 ? 1e30f : v % 2 ? NAN : INFINITY;
    const std::vector<int> seen = counts(logits, 257, {1.0, 0}, 100000);
    std::vector<double> p(384);
    std::fill(p.begin(), p.begin() + 257, 1.0 / 257);
    expect_distribution(seen, p, 100000);
    EXPECT_EQ(counts(logits, 257, {1.0, 300}, 1000), counts(logits, 257, {1.0, 0}, 1000));
}

TEST(SampleToken, HugeAndTinyLogits) {
    expect_distribution(counts({3e38f, 3e38f, -3e38f}, 3, {1.0, 0}, 10000), {0.5, 0.5, 0}, 10000);
    expect_distribution(counts({-3e38f, -3e38f, -INFINITY}, 3, {1.0, 0}, 10000), {0.5, 0.5, 0}, 10000);
    expect_distribution(counts({1e-45f, 0, -1e-45f}, 3, {1.0, 0}, 10000), {1 / 3.0, 1 / 3.0, 1 / 3.0}, 10000);
    EXPECT_EQ(counts({0, -1000, -1000}, 3, {1.0, 0}, 1000)[0], 1000);
}

TEST(SampleToken, NumbersThatAreNone) {
    EXPECT_EQ(counts({NAN, 1, -INFINITY, NAN}, 4, {1.0, 0}, 1000)[1], 1000);
    EXPECT_EQ(counts({NAN, 1, -INFINITY, NAN}, 4, {0.0, 2}, 1000)[1], 1000);
    EXPECT_EQ(counts({1, INFINITY, NAN, INFINITY}, 4, {1.0, 0}, 1000)[1], 1000);
    const std::vector<float> none = {NAN, -INFINITY, NAN};
    EXPECT_EQ(sample_token(none.data(), 3, {}, kSeed, 0), -1);
    EXPECT_EQ(sample_token(none.data(), 0, {}, kSeed, 0), -1);
}

// The draw walks the kept tokens from the lowest up, so that it does not depend on how a library orders them.
TEST(SampleToken, WalksTokensInOrder) {
    std::mt19937 random(5);
    std::vector<float> logits(500);
    for (float& x : logits) x = static_cast<float>(random() % 1000) / 300;
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    const std::vector<double> p =
        softmax(logits, 0.8, std::set<int>(order.begin(), order.begin() + SamplerOptions{}.top_k));
    for (uint64_t i = 0; i < 1000; i++) {
        const double u = uniform_from(kSeed, i);
        double sum = 0;
        int wanted = -1;
        while (sum <= u) sum += p[++wanted];
        // Sums in another order differ by rounding: a draw that close to a boundary may fall on either side.
        if (fabs(sum - u) > 1e-12 && fabs(sum - p[wanted] - u) > 1e-12) {
            EXPECT_EQ(sample_token(logits.data(), 500, {}, kSeed, i), wanted) << i;
        }
    }
}

TEST(SampleToken, DependsOnSeedAndIndexAlone) {
    std::mt19937 random(4);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> logits(50304);
    for (float& x : logits) x = normal(random);
    std::vector<int> first, again, other_seed;
    for (int i = 0; i < 200; i++) first.push_back(sample_token(logits.data(), 50257, {}, kSeed, i));
    for (int i = 199; i >= 0; i--) again.push_back(sample_token(logits.data(), 50257, {}, kSeed, i));
    for (int i = 0; i < 200; i++) other_seed.push_back(sample_token(logits.data(), 50257, {}, kSeed + 1, i));
    std::reverse(again.begin(), again.end());
    EXPECT_EQ(first, again);
    EXPECT_NE(first, other_seed);
    EXPECT_GT(std::set<int>(first.begin(), first.end()).size(), 5u);
}

// Uniform over its range, for consecutive indices of one seed and for one index of consecutive seeds (which
// is how runs differ): 64 equal cells.
TEST(UniformFrom, IsUniformAlongIndexAndSeed) {
    for (bool along_seed : {false, true}) {
        std::vector<int> cells(64);
        for (int i = 0; i < 100000; i++) {
            const double u = along_seed ? uniform_from(i, 7) : uniform_from(kSeed, i);
            ASSERT_TRUE(u >= 0 && u < 1);
            cells[static_cast<int>(u * 64)]++;
        }
        expect_distribution(cells, std::vector<double>(64, 1.0 / 64), 100000);
    }
    EXPECT_NE(uniform_from(0, 1), uniform_from(1, 0));
}

}  // namespace
