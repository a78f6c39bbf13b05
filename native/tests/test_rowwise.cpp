// Row-wise operations and the loss against loops in double; speed.
#include <algorithm>

#include "support.h"

namespace ggft_test {
namespace {

using namespace ggft;

void test_rms_norm(int64_t C, int64_t T, int nth) {
    const std::vector<float> x = random_floats(T * C), w = random_floats(C),
                             dy = random_floats(T * C), dx0 = random_floats(T * C);
    std::vector<float> y(x.size()), r((size_t)T), dx = dx0;
    std::vector<uint16_t> h(x.size());
    parallel(nth, [&](int ith, int n) {
        kernels().rowwise.rms_norm(x.data(), w.data(), 1e-5f, C, T, y.data(), h.data(), r.data(),
                                   ith, n);
    });
    parallel(nth, [&](int ith, int n) {
        kernels().rowwise.rms_norm_backward(dy.data(), x.data(), w.data(), r.data(), C, T,
                                            dx.data(), ith, n);
    });
    std::vector<double> want(x.size()), want_dx = doubles(dx0);
    for (int64_t t = 0; t < T; t++) {
        double square = 0, dot = 0;
        for (int64_t c = 0; c < C; c++)
            square += (double)x[t * C + c] * x[t * C + c];
        const double inv = 1 / std::sqrt(square / C + 1e-5);
        for (int64_t c = 0; c < C; c++) {
            want[t * C + c] = x[t * C + c] * inv * w[c];
            dot += (double)dy[t * C + c] * w[c] * x[t * C + c] * inv;
        }
        for (int64_t c = 0; c < C; c++) {
            want_dx[t * C + c] +=
                inv * ((double)dy[t * C + c] * w[c] - x[t * C + c] * inv * dot / C);
        }
    }
    expect_close("rms_norm", y, want, 1e-5);
    expect_close("rms_norm bf16", from_bf16_bits(h), want, 0.03);
    expect_close("rms_norm_backward", dx, want_dx, 1e-5);
}

void test_swiglu(int64_t size, int nth) {
    std::vector<float> g = random_floats(size, 4.0f);
    const std::vector<float> u = random_floats(size), dh = random_floats(size);
    g[0] = -200.0f;
    g[1] = 200.0f;
    std::vector<float> h((size_t)size), dg = g, du = dh;
    parallel(nth, [&](int ith, int n) {
        kernels().rowwise.swiglu(g.data(), u.data(), size, h.data(), nullptr, ith, n);
        kernels().rowwise.swiglu_backward(du.data(), dg.data(), u.data(), size, dg.data(),
                                          du.data(), ith, n);
    });
    std::vector<double> want((size_t)size), want_g(want), want_u(want);
    for (int64_t i = 0; i < size; i++) {
        const double s = 1 / (1 + std::exp(-(double)g[i]));
        want[i] = g[i] * s * u[i];
        want_u[i] = dh[i] * g[i] * s;
        want_g[i] = (double)dh[i] * u[i] * s * (1 + g[i] * (1 - s));
    }
    expect_close("swiglu", h, want, 1e-5);
    expect_close("swiglu d_up", du, want_u, 1e-5);
    expect_close("swiglu d_gate", dg, want_g, 2e-5);
}

void test_rope(RopeMode mode, int n_rot, int D, int nth) {
    const int64_t T = 5, H = 3;
    const int pairs = n_rot / 2;
    const std::vector<float> x = random_floats(T * H * D), angle = random_floats(T * pairs, 3.0f);
    std::vector<float> c(angle.size()), s(angle.size()), y(x.size());
    for (size_t i = 0; i < angle.size(); i++) {
        c[i] = std::cos(angle[i]);
        s[i] = std::sin(angle[i]);
    }
    parallel(nth, [&](int ith, int n) {
        kernels().rowwise.rope(x.data(), H * D, c.data(), s.data(), mode, n_rot, D, H, T, false,
                               y.data(), H * D, ith, n);
    });
    std::vector<double> want = doubles(x);
    for (int64_t i = 0; i < T * H; i++) {
        for (int j = 0; j < pairs; j++) {
            const int64_t a = i * D + (mode == RopeMode::norm ? 2 * j : j);
            const int64_t b = mode == RopeMode::norm ? a + 1 : a + pairs;
            const double cj = c[i / H * pairs + j], sj = s[i / H * pairs + j];
            want[a] = x[a] * cj - x[b] * sj;
            want[b] = x[a] * sj + x[b] * cj;
        }
    }
    expect_close("rope", y, want, 1e-6);
    parallel(nth, [&](int ith, int n) {
        kernels().rowwise.rope(y.data(), H * D, c.data(), s.data(), mode, n_rot, D, H, T, true,
                               y.data(), H * D, ith, n);
    });
    expect_close("rope backward undoes rope", y, doubles(x), 1e-6);
}

void test_loss(int64_t vocab, int nth) {
    const int64_t n = 5, stride = vocab + 3;
    std::vector<float> z = random_floats(n * stride, 5.0f);
    z[0] = 90.0f;
    std::vector<int32_t> labels = {0, (int32_t)vocab - 1, -1, (int32_t)vocab / 2, 1};
    std::vector<double> want = doubles(z), want_nats((size_t)n), nats((size_t)n), only(nats);
    for (int64_t t = 0; t < n; t++) {
        double sum = 0, max = -1e30;
        for (int64_t v = 0; v < vocab; v++)
            max = std::max(max, (double)z[t * stride + v]);
        for (int64_t v = 0; v < vocab; v++)
            sum += std::exp(z[t * stride + v] - max);
        if (labels[t] >= 0)
            want_nats[t] = std::log(sum) + max - z[t * stride + labels[t]];
        for (int64_t v = 0; v < vocab; v++) {
            want[t * stride + v] =
                labels[t] < 0 ? 0 : std::exp(z[t * stride + v] - max) / sum - (v == labels[t]);
        }
    }
    std::vector<float> dz = z, shared = z;
    uint16_t * bf16 = (uint16_t *)shared.data();
    parallel(nth, [&](int ith, int k) {
        kernels().loss.cross_entropy(z.data(), stride, labels.data(), vocab, n, {false},
                                     only.data(), ith, k);
        kernels().loss.cross_entropy(dz.data(), stride, labels.data(), vocab, n, {}, nats.data(),
                                     ith, k);
        kernels().loss.cross_entropy(shared.data(), stride, labels.data(), vocab, n,
                                     {true, bf16, 2 * stride}, only.data(), ith, k);
    });
    expect_same("loss with and without gradient", only, nats);
    for (int64_t t = 0; t < n; t++) {
        if (std::fabs(nats[t] - want_nats[t]) > 2e-6 * (1 + want_nats[t])) {
            failures++;
            std::printf("FAIL nats %g, expected %.9g\n", nats[t], want_nats[t]);
        }
    }
    std::vector<float> dz_bf16 = dz;
    for (int64_t t = 0; t < n; t++) {
        const std::vector<uint16_t> row(bf16 + 2 * t * stride, bf16 + 2 * t * stride + vocab);
        const std::vector<float> values = from_bf16_bits(row);
        std::copy(values.begin(), values.end(), dz_bf16.begin() + t * stride);
    }
    // z - max is rounded at the size of z (20): 1e-6 of p, and p is up to 30 times the rms.
    expect_close("logit gradient", dz, want, 1e-4);
    double worst = 0;
    for (size_t i = 0; i < want.size(); i++) {
        worst = std::max(worst, std::fabs(dz_bf16[i] - dz[i]) - std::fabs(dz[i]) * 0.0040);
    }
    expect_same("BF16 logit gradient", worst <= 1e-30, true);
}

void test_dot(int64_t n) {
    const std::vector<float> a = random_floats(n), b = random_floats(n), y0 = random_floats(n);
    std::vector<float> y = y0;
    std::vector<double> sum(1), want_y = doubles(y0);
    for (int64_t i = 0; i < n; i++) {
        sum[0] += (double)a[i] * b[i];
        want_y[i] += 0.3f * (double)a[i];
    }
    expect_close("dot", {kernels().rowwise.dot(a.data(), b.data(), n)}, sum, 1e-5);
    kernels().rowwise.add_scaled(0.3f, a.data(), n, y.data());
    expect_close("add_scaled", y, want_y, 1e-6);
}

} // namespace

void test_rowwise() {
    test_dot(1003);
    test_dot(576);
    for (int nth = 1; nth <= 3; nth++) {
        test_rms_norm(576, 7, nth);
        test_rms_norm(45, 4, nth);
        test_swiglu(1003, nth);
        for (const RopeMode mode : {RopeMode::norm, RopeMode::neox}) {
            test_rope(mode, 64, 64, nth);
            test_rope(mode, 20, 80, nth);
        }
        test_loss(49152, nth);
        test_loss(1003, nth);
    }
}

void bench_rowwise(int nth) {
    const int64_t vocab = 49152, rows = 64;
    std::vector<float> z = random_floats(rows * vocab);
    std::vector<int32_t> labels((size_t)rows, 7);
    std::vector<double> nats((size_t)rows);
    const double t = bench_seconds(nth, [&](int i, int n) {
        kernels().loss.cross_entropy(z.data(), vocab, labels.data(), vocab, rows,
                                     {true, (uint16_t *)z.data(), 2 * vocab}, nats.data(), i, n);
    });
    std::printf("cross entropy, vocabulary 49152: %.0f us per 64 rows\n", t * 1e6);
}

} // namespace ggft_test
