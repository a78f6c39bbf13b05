// Low-rank products, element-wise operations and the loss against loops in double.
#include <algorithm>
#include <cstring>

#include "kernels/isa/vector.h"
#include "kernels/rowwise/cross_entropy.h"
#include "kernels/rowwise/dropout.h"
#include "kernels/rowwise/rowwise.h"
#include "kernels_test.h"

namespace ggft_test {
namespace {

using namespace ggft;

std::vector<double> doubles(const std::vector<float> & x) {
    return {x.begin(), x.end()};
}

std::vector<float> from_bf16_bits(const std::vector<uint16_t> & h) {
    std::vector<float> x(h.size());
    for (size_t i = 0; i < h.size(); i++) {
        const uint32_t bits = (uint32_t)h[i] << 16;
        std::memcpy(&x[i], &bits, 4);
    }
    return x;
}

double keep(const Dropout & d, int64_t t, int64_t c) {
    return d.p > 0 ? dropout_factor(d.seed, t, c, d.p) : 1.0;
}

struct SkinnyCase {
    int64_t T, C;
    int R;
    float p;
    bool bf16;
};

/// lora_down with two adapters, and the gradient of a, on the same rows.
void check_down(const SkinnyCase & k, int nth) {
    const int64_t T = k.T, C = k.C, R = k.R;
    std::vector<float> x = random_floats(T * C);
    const std::vector<uint16_t> h = to_bf16_bits(x);
    if (k.bf16)
        x = from_bf16_bits(h);
    const Rows rows = k.bf16 ? Rows{h.data(), true, C} : Rows{x.data(), false, C};
    const Dropout drop = {k.p, 99};
    const std::vector<float> a = random_floats(R * C), a2 = random_floats(4 * C);
    std::vector<float> u((size_t)(T * (R + 3))), u2((size_t)(T * 4));
    const LoraDown adapters[] = {{a.data(), k.R, u.data(), R + 3}, {a2.data(), 4, u2.data(), 4}};
    const std::vector<float> du = random_floats(T * (R + 1)), da0 = random_floats(R * C);
    std::vector<float> da = da0;
    parallel(nth, [&](int ith, int n) {
        lora_down(rows, drop, C, T, adapters, 2, ith, n);
        lora_grad_a(rows, drop, du.data(), R + 1, k.R, 0.5f, C, T, da.data(), ith, n);
    });
    std::vector<double> want((size_t)(T * (R + 3))), want2((size_t)(T * 4)), want_da = doubles(da0);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t c = 0; c < C; c++) {
            const double xk = x[t * C + c] * keep(drop, t, c);
            for (int64_t r = 0; r < R; r++) {
                want[t * (R + 3) + r] += xk * a[r * C + c];
                want_da[r * C + c] += 0.5 * du[t * (R + 1) + r] * xk;
            }
            for (int64_t r = 0; r < 4; r++)
                want2[t * 4 + r] += xk * a2[r * C + c];
        }
    }
    const std::string name =
        " T" + std::to_string(T) + " C" + std::to_string(C) + " R" + std::to_string(R);
    expect_close("lora_down" + name, u, want, 2e-5);
    expect_close("lora_down second" + name, u2, want2, 2e-5);
    expect_close("lora_grad_a" + name, da, want_da, 2e-5);
}

void check_up(const SkinnyCase & k, int nth) {
    const int64_t T = k.T, N = k.C, R = k.R;
    const std::vector<float> dy = random_floats(T * N), b = random_floats(N * R),
                             u = random_floats(T * R), db0 = random_floats(N * R);
    std::vector<float> du((size_t)(T * R)), db = db0;
    parallel(nth, [&](int ith, int n) {
        lora_up_t({dy.data(), false, N}, b.data(), k.R, 2.0f, N, T, du.data(), R, ith, n);
        lora_grad_b({dy.data(), false, N}, u.data(), R, k.R, 2.0f, N, T, db.data(), ith, n);
    });
    std::vector<double> want((size_t)(T * R)), want_db = doubles(db0);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t j = 0; j < N; j++) {
            for (int64_t r = 0; r < R; r++) {
                want[t * R + r] += 2.0 * dy[t * N + j] * b[j * R + r];
                want_db[j * R + r] += 2.0 * dy[t * N + j] * u[t * R + r];
            }
        }
    }
    expect_close("lora_up_t", du, want, 2e-5);
    expect_close("lora_grad_b", db, want_db, 2e-5);
}

void test_rms_norm(int64_t C, int64_t T, int nth) {
    const std::vector<float> x = random_floats(T * C), w = random_floats(C),
                             dy = random_floats(T * C), dx0 = random_floats(T * C);
    std::vector<float> y(x.size()), r((size_t)T), dx = dx0;
    std::vector<uint16_t> h(x.size());
    parallel(nth, [&](int ith, int n) {
        rms_norm(x.data(), w.data(), 1e-5f, C, T, y.data(), h.data(), r.data(), ith, n);
    });
    parallel(nth, [&](int ith, int n) {
        rms_norm_backward(dy.data(), x.data(), w.data(), r.data(), C, T, dx.data(), ith, n);
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
        swiglu(g.data(), u.data(), size, h.data(), nullptr, ith, n);
        swiglu_backward(du.data(), dg.data(), u.data(), size, dg.data(), du.data(), ith, n);
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
        rope(x.data(), H * D, c.data(), s.data(), mode, n_rot, D, H, T, false, y.data(), H * D, ith,
             n);
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
        rope(y.data(), H * D, c.data(), s.data(), mode, n_rot, D, H, T, true, y.data(), H * D, ith,
             n);
    });
    expect_close("rope backward undoes rope", y, doubles(x), 1e-6);
}

void test_dropout() {
    const int64_t T = 200, C = 501;
    const float p = 0.3f;
    std::vector<float> x((size_t)(T * C), 1.0f), y(x.size());
    std::vector<double> want(x.size());
    parallel(2, [&](int ith, int n) { dropout(x.data(), {p, 5}, C, T, y.data(), ith, n); });
    double kept = 0, neighbours = 0, below = 0;
    for (int64_t t = 0; t < T; t++) {
        for (int64_t c = 0; c < C; c++) {
            want[t * C + c] = dropout_factor(5, t, c, p);
            kept += y[t * C + c] > 0;
            neighbours += c > 0 && y[t * C + c] > 0 && y[t * C + c - 1] > 0;
            below += t > 0 && y[t * C + c] > 0 && y[t * C + c - C] > 0;
        }
    }
    expect_close("dropout mask", y, want, 1e-6);
    const double n = (double)(T * C);
    // Four standard deviations of a binomial share of n independent elements.
    const bool fair = std::fabs(kept / n - 0.7) < 4 * std::sqrt(0.21 / n);
    const bool independent =
        std::fabs(neighbours / n - 0.49) < 0.008 && std::fabs(below / n - 0.49) < 0.008;
    expect_same("dropout share and independence", fair && independent, true);
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
        cross_entropy(z.data(), stride, labels.data(), vocab, n, {false}, only.data(), ith, k);
        cross_entropy(dz.data(), stride, labels.data(), vocab, n, {}, nats.data(), ith, k);
        cross_entropy(shared.data(), stride, labels.data(), vocab, n, {true, bf16, 2 * stride},
                      only.data(), ith, k);
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

void test_exp() {
    double worst = 0;
    for (float x = -87.0f; x < 88.0f; x += 0.00137f) {
        const double want = std::exp((double)x);
        worst = std::max(worst, std::fabs(vexp(splat(x))[0] - want) / want);
    }
    expect_same("vexp within 2 ulp", worst < 2 * 1.2e-7, true);
    const float nan = __builtin_nanf(""), inf = __builtin_inff();
    expect_same("vexp limits",
                vexp(splat(-inf))[0] == 0 && vexp(splat(inf))[0] == inf &&
                    std::isnan(vexp(splat(nan))[0]),
                true);
}

void test_adamw() {
    const int64_t n = 131;
    const std::vector<float> g = random_floats(n), p0 = random_floats(n), m0 = random_floats(n);
    std::vector<float> p = p0, m = m0, v((size_t)n, 0.5f);
    const AdamW config = {0.01f, 0.9f, 0.99f, 1e-8f, 0.1f, 3};
    parallel(2, [&](int ith, int k) {
        adamw(config, 0.25f, g.data(), n, p.data(), m.data(), v.data(), ith, k);
    });
    std::vector<double> want((size_t)n);
    for (int64_t i = 0; i < n; i++) {
        const double d = 0.25 * g[i], mi = 0.9 * m0[i] + 0.1 * d, vi = 0.99 * 0.5 + 0.01 * d * d;
        const double step =
            mi / (1 - std::pow(0.9, 3)) / (std::sqrt(vi / (1 - std::pow(0.99, 3))) + 1e-8);
        want[i] = p0[i] - 0.01 * (step + 0.1 * p0[i]);
    }
    expect_close("adamw", p, want, 1e-5);
    double square = 0;
    for (const float d : g)
        square += (double)d * d;
    const double sum = square_sum(g.data(), n, 0, 2) + square_sum(g.data(), n, 1, 2);
    expect_same("square_sum", std::fabs(sum - square) < 1e-9 * square, true);
}

} // namespace

void test_rows() {
    const SkinnyCase cases[] = {{7, 576, 8, 0, false},  {70, 200, 4, 0.1f, false},
                                {3, 64, 64, 0, true},   {130, 37, 5, 0.2f, true},
                                {66, 96, 9, 0, true},   {1, 16, 1, 0, false},
                                {65, 609, 15, 0, false}};
    test_exp();
    test_dropout();
    test_adamw();
    for (int nth = 1; nth <= 3; nth++) {
        for (const SkinnyCase & k : cases) {
            check_down(k, nth);
            check_up(k, nth);
        }
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

void bench_rows(int nth) {
    const int64_t T = 512;
    struct Shape {
        int64_t n_rows, n_cols;
    };
    std::printf(
        "\nLoRA products R=8, microseconds: down, up_t, grad_a, grad_b (%% of one BF16 product)\n");
    for (const Shape & s :
         {Shape{576, 576}, Shape{1536, 576}, Shape{576, 1536}, Shape{4096, 4096}}) {
        const int64_t N = s.n_rows, C = s.n_cols;
        const std::vector<float> x = random_floats(T * C), dy = random_floats(T * N);
        std::vector<float> a = random_floats(8 * C), b = random_floats(8 * N), u((size_t)(T * 8)),
                           y((size_t)(T * N));
        const TestWeight w = random_weight(GGML_TYPE_Q4_0, N, C);
        const LoraDown l = {a.data(), 8, u.data(), 8};
        const Rows xr = {x.data(), false, C}, dyr = {dy.data(), false, N};
        std::vector<uint32_t> words;
        const Rows packed = rows_for(Precision::fast, true, w.weight, xr, T, nth, words);
        const double gemm = bench_seconds(nth, [&](int i, int n) {
            matmul_nt(Precision::fast, w.weight, packed, nullptr, {y.data(), N}, T, nullptr, i, n);
        });
        const double seconds[] = {
            bench_seconds(nth, [&](int i, int n) { lora_down(xr, {}, C, T, &l, 1, i, n); }),
            bench_seconds(
                nth,
                [&](int i, int n) { lora_up_t(dyr, b.data(), 8, 1, N, T, u.data(), 8, i, n); }),
            bench_seconds(nth,
                          [&](int i, int n) {
                              lora_grad_a(xr, {}, u.data(), 8, 8, 1, C, T, a.data(), i, n);
                          }),
            bench_seconds(nth, [&](int i, int n) {
                lora_grad_b(dyr, u.data(), 8, 8, 1, N, T, b.data(), i, n);
            })};
        std::printf("%5dx%-5d", (int)N, (int)C);
        for (const double t : seconds)
            std::printf(" %7.0f (%4.1f%%)", t * 1e6, 100 * t / gemm);
        std::printf("\n");
    }
    const int64_t vocab = 49152, rows = 64;
    std::vector<float> z = random_floats(rows * vocab);
    std::vector<int32_t> labels((size_t)rows, 7);
    std::vector<double> nats((size_t)rows);
    const double t = bench_seconds(nth, [&](int i, int n) {
        cross_entropy(z.data(), vocab, labels.data(), vocab, rows,
                      {true, (uint16_t *)z.data(), 2 * vocab}, nats.data(), i, n);
    });
    std::printf("cross entropy, vocabulary 49152: %.0f us per 64 rows\n", t * 1e6);
}

} // namespace ggft_test
