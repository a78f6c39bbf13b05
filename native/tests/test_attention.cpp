// Attention against the textbook loops in double: packing, padding, grouping, head sizes; speed.
#include <algorithm>

#include "support.h"

namespace ggft_test {
namespace {

using namespace ggft;

struct Tensors {
    std::vector<float> q, k, v, d_o, o, lse, dq, dk, dv;
};

Tensors make_tensors(const AttentionShape & s) {
    const int64_t nq = s.n_tokens * s.n_head * s.head_size;
    const int64_t nk = s.n_tokens * s.n_head_kv * s.head_size;
    Tensors x;
    x.q = random_floats(nq);
    x.k = random_floats(nk);
    x.v = random_floats(nk);
    x.d_o = random_floats(nq);
    const float unset = 1e30f; // everything must be written
    x.o.assign((size_t)nq, unset);
    x.lse.assign((size_t)(s.n_tokens * s.n_head), unset);
    x.dq.assign((size_t)nq, unset);
    x.dk.assign((size_t)nk, unset);
    x.dv.assign((size_t)nk, unset);
    return x;
}

struct Naive {
    std::vector<double> o, lse, dq, dk, dv;
};

/// One query row: its output, and what it adds to the gradients.
void naive_row(const AttentionShape & s, const Tensors & x, const int32_t * start, int64_t i, int h,
               Naive & r) {
    const int64_t D = s.head_size, first = start[i];
    const int64_t qi = (i * s.n_head + h) * D;
    const auto kv = [&](int64_t j) { return (j * s.n_head_kv + h / (s.n_head / s.n_head_kv)) * D; };
    std::vector<double> p((size_t)(i - first + 1)), dp(p);
    double max = -1e30, sum = 0, delta = 0;
    for (int64_t j = first; j <= i; j++) {
        double z = 0;
        for (int64_t d = 0; d < D; d++) {
            z += (double)x.q[qi + d] * x.k[kv(j) + d];
            dp[j - first] += (double)x.d_o[qi + d] * x.v[kv(j) + d];
        }
        p[j - first] = z * s.scale;
        max = std::max(max, z * s.scale);
    }
    for (double & z : p)
        sum += z = std::exp(z - max);
    for (double & z : p)
        z /= sum;
    for (size_t j = 0; j < p.size(); j++)
        delta += p[j] * dp[j];
    r.lse[i * s.n_head + h] = max + std::log(sum);
    for (int64_t j = first; j <= i; j++) {
        const double pj = p[j - first], ds = pj * (dp[j - first] - delta) * s.scale;
        for (int64_t d = 0; d < D; d++) {
            r.o[qi + d] += pj * x.v[kv(j) + d];
            r.dq[qi + d] += ds * x.k[kv(j) + d];
            r.dk[kv(j) + d] += ds * x.q[qi + d];
            r.dv[kv(j) + d] += pj * x.d_o[qi + d];
        }
    }
}

/// Examples of the given lengths one after the other; a negative length is that much padding.
std::vector<int32_t> starts_of(const std::vector<int> & lengths) {
    std::vector<int32_t> start;
    for (const int n : lengths) {
        const int32_t first = (int32_t)start.size();
        for (int i = 0; i < std::abs(n); i++)
            start.push_back(n > 0 ? first : first + i);
    }
    return start;
}

void run(Format format, const AttentionShape & s, Tensors & x, const int32_t * start, int nth) {
    parallel(nth, [&](int ith, int n) {
        kernels().attention.forward(format, s, x.q.data(), x.k.data(), x.v.data(), start,
                                    x.o.data(), x.lse.data(), ith, n);
    });
    parallel(nth, [&](int ith, int n) {
        kernels().attention.backward(format, s, x.q.data(), x.k.data(), x.v.data(), start,
                                     x.o.data(), x.lse.data(), x.d_o.data(), x.dq.data(),
                                     x.dk.data(), x.dv.data(), ith, n);
    });
}

void check(int H, int K, int D, const std::vector<int> & lengths, bool windowed) {
    std::vector<int32_t> start = starts_of(lengths);
    if (windowed) {
        for (int32_t i = 0; i < (int32_t)start.size(); i++)
            start[i] = std::max(start[i], i - 30);
    }
    const AttentionShape s = {(int64_t)start.size(), H, K, D, 1.0f / std::sqrt((float)D),
                              (int64_t)start.size()};
    const Tensors inputs = make_tensors(s);
    Naive want;
    want.o.resize(inputs.o.size());
    want.lse.resize(inputs.lse.size());
    want.dq.resize(inputs.dq.size());
    want.dk.resize(inputs.dk.size());
    want.dv.resize(inputs.dv.size());
    for (int64_t i = 0; i < s.n_tokens; i++) {
        for (int h = 0; h < H; h++)
            naive_row(s, inputs, start.data(), i, h, want);
    }
    char name[64];
    std::snprintf(name, sizeof name, "attention N%d H%d K%d D%d ", (int)s.n_tokens, H, K, D);
    for (const Format format : {Format::f32, kernels().fast}) {
        // q, k, v, p, dS in BF16: 2^-9 each; in 16-bit integers 2^-13 of a block's largest. Of two
        // keys the gradient can be a small difference of large terms.
        const double limit = (s.n_tokens > 2 ? 0.01 : 0.1) / (format == Format::bf16 ? 1 : 5);
        const auto compare = [&](const std::string & what, const std::vector<float> & got,
                                 const std::vector<double> & expected) {
            if (format == Format::f32)
                expect_close(what, got, expected, 3e-5);
            else
                expect_near(what + format_name(format), got, expected, limit);
        };
        for (int nth = 1; nth <= 3; nth++) {
            Tensors x = inputs;
            run(format, s, x, start.data(), nth);
            const std::string label = name + std::to_string(nth) + " ";
            compare(label + "o", x.o, want.o);
            compare(label + "lse", x.lse, want.lse);
            compare(label + "dq", x.dq, want.dq);
            compare(label + "dk", x.dk, want.dk);
            compare(label + "dv", x.dv, want.dv);
            Tensors again = inputs;
            run(format, s, again, start.data(), nth);
            expect_same(label + "repeated", x.dk == again.dk && x.dq == again.dq && x.o == again.o,
                        true);
        }
    }
}

/// The n tokens from `first` on alone.
Tensors part_of(const AttentionShape & s, const Tensors & x, int64_t first, int64_t n) {
    const auto cut = [&](const std::vector<float> & from, int64_t width) {
        return std::vector<float>(from.begin() + first * width, from.begin() + (first + n) * width);
    };
    const int64_t nq = s.n_head * s.head_size, nk = s.n_head_kv * s.head_size;
    return {cut(x.q, nq),         cut(x.k, nk),  cut(x.v, nk),  cut(x.d_o, nq), cut(x.o, nq),
            cut(x.lse, s.n_head), cut(x.dq, nq), cut(x.dk, nk), cut(x.dv, nk)};
}

/// Two rows of a batch, the first ending in a short example, give to the bit what each gives alone.
void test_rows_alone() {
    const std::vector<int> lengths = {70, 20, 10, 30, 70};
    const AttentionShape both = {200, 4, 2, 64, 0.125f, 100}, one = {100, 4, 2, 64, 0.125f, 100};
    for (const Format format : {Format::f32, kernels().fast}) {
        Tensors x = make_tensors(both);
        run(format, both, x, starts_of(lengths).data(), 2);
        for (const int row : {0, 1}) {
            const std::vector<int> of_row =
                row == 0 ? std::vector<int>{70, 20, 10} : std::vector<int>{30, 70};
            const Tensors want = part_of(both, x, row * 100, 100);
            Tensors alone = want;
            run(format, one, alone, starts_of(of_row).data(), 2);
            expect_same("a row alone",
                        alone.o == want.o && alone.dq == want.dq && alone.dk == want.dk &&
                            alone.dv == want.dv,
                        true);
        }
    }
}

} // namespace

void test_attention() {
    test_rows_alone();
    check(9, 3, 64, {70, 3, 1, 150, -9}, false);
    check(9, 3, 64, {330}, false);
    check(4, 4, 80, {33, 90, -40}, false);
    check(2, 1, 128, {129}, true);
    check(8, 2, 96, {20, 20, 20, 20, 20, 20}, false);
    check(2, 2, 256, {140}, false);
    check(80, 1, 16, {40}, false);
    check(3, 1, 17, {2}, false);
}

void bench_attention(int nth) {
    struct Case {
        int H, K, D;
        std::vector<int> lengths;
    };
    const Case cases[] = {{9, 3, 64, {512, 512, 512, 512}},
                          {9, 3, 64, {512}},
                          {9, 3, 64, {100, 156, 200, 56, 300, 212}},
                          {32, 32, 128, {512}},
                          {32, 32, 128, {2048}},
                          {32, 8, 128, {2048}}};
    std::printf("\nattention, milliseconds forward, backward (GFLOP/s of the pairs seen)\n");
    for (const Case & c : cases) {
        const std::vector<int32_t> start = starts_of(c.lengths);
        const AttentionShape s = {(int64_t)start.size(), c.H, c.K, c.D, 0.125f,
                                  (int64_t)start.size()};
        double pairs = 0;
        for (size_t i = 0; i < start.size(); i++)
            pairs += (double)i - start[i] + 1;
        std::printf("H%d K%d D%d, %zu tokens in %zu:", c.H, c.K, c.D, start.size(),
                    c.lengths.size());
        for (const Format format : {kernels().fast, Format::f32}) {
            Tensors x = make_tensors(s);
            const double forward = bench_seconds(nth, [&](int i, int n) {
                kernels().attention.forward(format, s, x.q.data(), x.k.data(), x.v.data(),
                                            start.data(), x.o.data(), x.lse.data(), i, n);
            });
            const double backward = bench_seconds(nth, [&](int i, int n) {
                kernels().attention.backward(format, s, x.q.data(), x.k.data(), x.v.data(),
                                             start.data(), x.o.data(), x.lse.data(), x.d_o.data(),
                                             x.dq.data(), x.dk.data(), x.dv.data(), i, n);
            });
            const double flops = 2e-9 * pairs * c.H * c.D;
            std::printf("  %s %.2f (%.0f) %.2f (%.0f)", format_name(format), forward * 1e3,
                        2 * flops / forward, backward * 1e3, 5 * flops / backward);
        }
        std::printf("\n");
    }
}

} // namespace ggft_test
