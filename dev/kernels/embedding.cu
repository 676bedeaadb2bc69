// Test of llmc/embedding.cuh against sums in double precision; --bench times it.
//
// The backward pass cuts the sorted positions into segments of 32 and treats runs of equal tokens by how they
// lie to the cuts, so the batches are made to have every such case: runs inside a segment, across one border,
// across many, ending on a border.
#include "llmc/dataloader.h"  // sort_positions
#include "llmc/embedding.cuh"
#include <functional>
#include "dev/kernels/harness.h"

namespace {

struct Shape {
    int B, T, C, V;
    int positions() const { return B * T; }
    int padded_vocab() const { return (V + 127) / 128 * 128; }
    std::string name() const {
        return "B " + std::to_string(B) + " T " + std::to_string(T) + " C " + std::to_string(C) + " V " +
               std::to_string(V);
    }
};

constexpr size_t kGuard = 64;  // elements after the last that must stay as they were

// order is the stable sort by token, by its definition: tokens ascend, equal tokens in order of position.
void test_order(Harness& h, const std::string& name, const std::vector<int>& tokens, int V) {
    std::vector<int> want(tokens.size()), got(tokens.size());
    for (size_t i = 0; i < want.size(); i++) want[i] = static_cast<int>(i);
    std::stable_sort(want.begin(), want.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    std::vector<int> counts;
    sort_positions(got.data(), counts, tokens.data(), tokens.size(), V);
    h.check("order " + name, got == want);
}

void test_forward(Harness& h, const Shape& shape, const std::vector<int>& tokens) {
    const auto [B, T, C, V] = shape;
    const size_t n = static_cast<size_t>(shape.positions()) * C;
    const auto wte = h.random<floatX>(static_cast<size_t>(shape.padded_vocab()) * C),
               wpe = h.random<floatX>(static_cast<size_t>(T) * C);
    auto wte_device = h.to_device(wte), wpe_device = h.to_device(wpe);
    auto tokens_device = h.to_device(tokens);
    auto out_device = h.poisoned<floatX>(n + kGuard);
    const auto poison = h.to_host(out_device.get() + n, kGuard);
    embedding_forward(out_device, tokens_device, wte_device, wpe_device, B, T, C, h.gpu);

    std::vector<double> want(n);
    for (int i = 0; i < shape.positions(); i++)
        for (int c = 0; c < C; c++)
            want[static_cast<size_t>(i) * C + c] =
                static_cast<double>(static_cast<float>(wte[static_cast<size_t>(tokens[i]) * C + c])) +
                static_cast<double>(static_cast<float>(wpe[static_cast<size_t>(i % T) * C + c]));
    // one sum in float, one rounding to floatX
    h.compare("forward " + shape.name(), h.to_host(out_device.get(), n), want,
              {.relative = 1.01 * (kUX + kU32)});
    h.same_bits("forward " + shape.name() + ": nothing written beyond the end",
                h.to_host(out_device.get() + n, kGuard), poison);
}

// Sums of `rows` of dout in double, and of their magnitudes.
struct Sums {
    std::vector<double> value, magnitude;
    std::vector<int> terms;  // per row
    Sums(size_t rows, int C, const std::vector<float>& start)
        : value(start.begin(), start.end()), terms(rows) {
        for (double v : value) magnitude.push_back(std::fabs(v));
        value.resize(rows * C), magnitude.resize(rows * C);
    }
    void add(size_t row, const floatX* x, int C) {
        terms[row]++;
        for (int c = 0; c < C; c++) {
            const double v = static_cast<float>(x[c]);
            value[row * C + c] += v, magnitude[row * C + c] += std::fabs(v);
        }
    }
    // A sum of k floats in any order errs by at most (k - 1) u times the sum of magnitudes, to first order;
    // here k = terms + 1 for what was there before, and a few zeros of the merge's warps, which add no error.
    std::vector<double> bounds(int C) const {
        std::vector<double> bound(value.size());
        for (size_t i = 0; i < bound.size(); i++) bound[i] = 1.01 * kU32 * terms[i / C] * magnitude[i];
        return bound;
    }
};

void test_backward(Harness& h, const std::string& name, const Shape& shape, const std::vector<int>& tokens,
                   Write write) {
    const auto [B, T, C, V] = shape;
    const int n = shape.positions(), P = T + 3;  // a wpe longer than the sequence
    const std::string what = "backward " + shape.name() + " " + name + (write == Write::Add ? " +=" : " =");
    const auto dout = h.random<floatX>(static_cast<size_t>(n) * C);
    const auto dwte = h.random<float>(static_cast<size_t>(shape.padded_vocab()) * C);
    const auto dwpe = h.random<float>(static_cast<size_t>(P) * C);
    std::vector<int> order(n);
    std::vector<int> counts;
    sort_positions(order.data(), counts, tokens.data(), n, V);
    auto dout_device = h.to_device(dout);
    auto tokens_device = h.to_device(tokens), order_device = h.to_device(order);

    std::vector<float> got_wte, got_wpe;
    for (int run = 0; run < 2; run++) {
        auto dwte_device = h.to_device(dwte);
        auto dwpe_device = write == Write::Add ? h.to_device(dwpe) : h.poisoned<float>(dwpe.size());
        auto scratch = h.poisoned<float>(embedding_backward_scratch_floats(n, C));
        embedding_backward(dwte_device, dwpe_device, scratch, dout_device, tokens_device, order_device, B, T,
                           P, C, write, h.gpu);
        const auto wte_now = h.to_host(dwte_device.get(), dwte.size()),
                   wpe_now = h.to_host(dwpe_device.get(), dwpe.size());
        if (run == 1)
            h.same_bits(what + ": again the same bits", got_wte, wte_now) &&
                h.same_bits(what + ", wpe too", got_wpe, wpe_now);
        got_wte = wte_now, got_wpe = wpe_now;
    }

    Sums wte(shape.padded_vocab(), C, dwte), wpe(P, C, write == Write::Add ? dwpe : std::vector<float>());
    for (int i = 0; i < n; i++) {
        wte.add(tokens[i], &dout[static_cast<size_t>(i) * C], C);
        wpe.add(i % T, &dout[static_cast<size_t>(i) * C], C);
    }
    h.compare(what + ", wte", got_wte, wte.value, {}, wte.bounds(C));  // rows without a token: a bound of 0
    h.compare(what + ", wpe", got_wpe, wpe.value, {}, wpe.bounds(C));
}

// Batches by name: token i of n, of a vocabulary V.
struct Batch {
    const char* name;
    std::function<int(int i, int n, int V)> token;
};
const Batch kBatches[] = {
    {"one token", [](int, int, int V) { return V - 1; }},
    {"runs of 32", [](int i, int, int V) { return i / 32 % V; }},
    {"runs of 64 from 16", [](int i, int, int V) { return (i + 48) / 64 % V; }},
    {"runs of 5", [](int i, int, int V) { return i / 5 % V; }},
    {"half one token", [](int i, int, int V) { return i % 2 ? V / 2 : i / 2 % V; }},
};

void test_batches(Harness& h, const Shape& shape) {
    std::vector<int> tokens(shape.positions());
    for (const Batch& batch : kBatches) {
        for (int i = 0; i < shape.positions(); i++) tokens[i] = batch.token(i, shape.positions(), shape.V);
        test_backward(h, batch.name, shape, tokens, Write::Add);
    }
}

// Rows of wte beyond 2^31 elements, only where there is memory for them.
void test_beyond_2_31(Harness& h) {
    if (h.gpu.properties.totalGlobalMem < size_t{32} << 30) return;
    const int C = 1600, V = static_cast<int>((size_t{1} << 31) / C) + 128;
    const auto row = h.random<floatX>(C);
    DeviceBuffer<floatX> wte(static_cast<size_t>(V) * C), out(C);
    auto wpe = h.to_device(std::vector<floatX>(C)), dout = h.to_device(row);
    auto tokens = h.to_device(std::vector<int>{V - 1}), order = h.to_device(std::vector<int>{0});
    const size_t last = static_cast<size_t>(V - 1) * C;
    copy_to_device(wte.get() + last, row.data(), C, h.gpu);
    embedding_forward(out, tokens, wte, wpe, 1, 1, C, h.gpu);
    h.same_bits("forward, a row beyond 2^31", h.to_host(out.get(), C), row);
    wte = {};

    DeviceBuffer<float> dwte(static_cast<size_t>(V) * C), dwpe(C),
        scratch(embedding_backward_scratch_floats(1, C));
    fill_zero(dwte.get() + last, C, h.gpu);
    embedding_backward(dwte, dwpe, scratch, dout, tokens, order, 1, 1, 1, C, Write::Assign, h.gpu);
    h.same_bits("backward, a row beyond 2^31", h.to_host(dwte.get() + last, C),
                std::vector<float>(row.begin(), row.end()));
}

// Tokens of text are Zipf's: token v with probability proportional to 1 / (v + 3).
std::vector<int> zipf(Harness& h, int n, int V) {
    std::vector<int> tokens = h.random_ints(n, 1 << 24);
    for (int& t : tokens)
        t = std::min(V - 1, static_cast<int>(3 * (std::pow((V + 3) / 3.0, t / double(1 << 24)) - 1)));
    return tokens;
}

void bench(Harness& h, const std::string& model, const Shape& shape) {
    const auto [B, T, C, V] = shape;
    const int n = shape.positions();
    const std::vector<int> tokens = zipf(h, n, V);
    std::vector<int> order(n);
    std::vector<int> counts;
    sort_positions(order.data(), counts, tokens.data(), n, V);
    auto wte = h.to_device(h.random<floatX>(static_cast<size_t>(V) * C)),
         wpe = h.to_device(h.random<floatX>(static_cast<size_t>(T) * C));
    auto dout = h.to_device(h.random<floatX>(static_cast<size_t>(n) * C));
    auto tokens_device = h.to_device(tokens), order_device = h.to_device(order);
    DeviceBuffer<float> dwte(static_cast<size_t>(V) * C), dwpe(static_cast<size_t>(T) * C),
        scratch(embedding_backward_scratch_floats(n, C));
    fill_zero(dwte.get(), dwte.size(), h.gpu);
    std::vector<int> used = tokens;
    std::sort(used.begin(), used.end());
    const double distinct = static_cast<double>(std::unique(used.begin(), used.end()) - used.begin());

    // Forward: each row of wte that occurs and wpe once, out; backward: dout once, the rows of dwte that
    // occur read and written, dwpe written.
    const double x = sizeof(floatX), row = static_cast<double>(C);
    h.report("embedding_forward " + model,
             h.median_us([&] { embedding_forward(dout, tokens_device, wte, wpe, B, T, C, h.gpu); }),
             (distinct + T + n) * row * x);
    h.report("embedding_backward " + model, h.median_us([&] {
        embedding_backward(dwte, dwpe, scratch, dout, tokens_device, order_device, B, T, T, C, Write::Assign,
                           h.gpu);
    }),
             n * row * x + (2 * distinct + T) * row * 4);
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("embedding", argc, argv);
    if (h.bench) {
        bench(h, "124M, 64 x 1024 x 768", {64, 1024, 768, 50257});
        bench(h, "1558M, 32 x 1024 x 1600", {32, 1024, 1600, 50257});
        bench(h, "bytes, 64 x 1024 x 768", {64, 1024, 768, 256});
        return h.finish();
    }
    for (const Shape& shape :
         {Shape{1, 1, 64, 1}, Shape{1, 63, 128, 50}, Shape{3, 65, 192, 257}, Shape{2, 200, 768, 4000},
          Shape{1, 65, 1280, 256}, Shape{2, 63, 1600, 2}, Shape{11, 1024, 64, 256}}) {
        if (h.small && shape.positions() > 1024) continue;
        const auto tokens = h.random_ints(shape.positions(), shape.V);
        test_order(h, shape.name(), tokens, shape.V);
        test_forward(h, shape, tokens);
        test_backward(h, "uniform", shape, tokens, Write::Assign);
        test_backward(h, "uniform", shape, tokens, Write::Add);
        test_backward(h, "like text", shape, zipf(h, shape.positions(), shape.V), Write::Assign);
    }
    for (int n : {31, 32, 33, 64, 200, 1024}) test_batches(h, {1, n, 64, 50});
    if (!h.small) {
        test_batches(h, {4, 1024, 128, 256});
        test_beyond_2_31(h);
    }
    return h.finish();
}
