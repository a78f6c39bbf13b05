// The skinny products of LoRA against loops in double, with dropout; speed.
#include "kernels/rowwise/dropout.h"
#include "support.h"

namespace ggft_test {
namespace {

using namespace ggft;

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
        kernels().lora.down(rows, drop, C, T, adapters, 2, ith, n);
        kernels().lora.grad_a(rows, drop, du.data(), R + 1, k.R, 0.5f, C, T, da.data(), ith, n);
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
        kernels().lora.up_t({dy.data(), false, N}, b.data(), k.R, 2.0f, N, T, du.data(), R, ith, n);
        kernels().lora.grad_b({dy.data(), false, N}, u.data(), R, k.R, 2.0f, N, T, db.data(), ith,
                              n);
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

} // namespace

void test_lora() {
    const SkinnyCase cases[] = {{7, 576, 8, 0, false},  {70, 200, 4, 0.1f, false},
                                {3, 64, 64, 0, true},   {130, 37, 5, 0.2f, true},
                                {66, 96, 9, 0, true},   {1, 16, 1, 0, false},
                                {65, 609, 15, 0, false}};
    for (int nth = 1; nth <= 3; nth++) {
        for (const SkinnyCase & k : cases) {
            check_down(k, nth);
            check_up(k, nth);
        }
    }
}

void bench_lora(int nth) {
    const int64_t T = 512;
    struct Shape {
        int64_t n_rows, n_cols;
    };
    std::printf(
        "\nLoRA products R=8, microseconds: down, up_t, grad_a, grad_b (%% of one product)\n");
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
        const Rows packed = rows_for(kernels().fast, true, w.weight, xr, T, nth, words);
        const double gemm = bench_seconds(nth, [&](int i, int n) {
            kernels().gemm.nt(kernels().fast, w.weight, packed, nullptr, {y.data(), N}, T, nullptr,
                              i, n);
        });
        const double seconds[] = {
            bench_seconds(nth,
                          [&](int i, int n) { kernels().lora.down(xr, {}, C, T, &l, 1, i, n); }),
            bench_seconds(nth,
                          [&](int i, int n) {
                              kernels().lora.up_t(dyr, b.data(), 8, 1, N, T, u.data(), 8, i, n);
                          }),
            bench_seconds(nth,
                          [&](int i, int n) {
                              kernels().lora.grad_a(xr, {}, u.data(), 8, 8, 1, C, T, a.data(), i,
                                                    n);
                          }),
            bench_seconds(nth, [&](int i, int n) {
                kernels().lora.grad_b(dyr, u.data(), 8, 8, 1, N, T, b.data(), i, n);
            })};
        std::printf("%5dx%-5d", (int)N, (int)C);
        for (const double t : seconds)
            std::printf(" %7.0f (%4.1f%%)", t * 1e6, 100 * t / gemm);
        std::printf("\n");
    }
}

} // namespace ggft_test
