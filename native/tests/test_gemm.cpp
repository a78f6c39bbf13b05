// Matrix products: every weight type, odd shapes, threads, low-rank term; speed.
#include "kernels/gemm/prepacked.h"
#include "kernels/isa/work_stealing.h"
#include "kernels/rowwise/dropout.h"
#include "support.h"

namespace ggft_test {
namespace {

using namespace ggft;

struct Case {
    ggml_type type;
    int64_t n_rows, n_cols, n_tokens;
    int rank;
    bool add;
    float dropout;
};

struct Inputs {
    TestWeight w;
    std::vector<float> x, left, right, y0;
    LowRank low;
};

Inputs make_inputs(const Case & c, bool nt) {
    Inputs in;
    in.w = random_weight(c.type, c.n_rows, c.n_cols);
    const int64_t depth = nt ? c.n_cols : c.n_rows, width = nt ? c.n_rows : c.n_cols;
    in.x = random_floats(c.n_tokens * depth);
    in.left = random_floats(c.n_tokens * c.rank);
    in.right = random_floats(width * c.rank, 0.1f);
    in.y0 = random_floats(c.n_tokens * width);
    in.low = {in.left.data(), c.rank, in.right.data(), c.rank, 0.5f, c.dropout, 77};
    return in;
}

std::vector<double> naive(const Case & c, const Inputs & in, bool nt) {
    const int64_t depth = nt ? c.n_cols : c.n_rows, width = nt ? c.n_rows : c.n_cols;
    std::vector<double> y((size_t)(c.n_tokens * width));
    for (int64_t t = 0; t < c.n_tokens; t++) {
        for (int64_t j = 0; j < width; j++) {
            double sum = c.add ? in.y0[t * width + j] : 0, low = 0;
            for (int64_t k = 0; k < depth; k++) {
                sum += (double)in.x[t * depth + k] *
                       in.w.values[nt ? j * c.n_cols + k : k * c.n_cols + j];
            }
            for (int r = 0; r < c.rank; r++) {
                low +=
                    (double)in.left[t * c.rank + r] * in.right[nt ? j * c.rank + r : r * width + j];
            }
            if (!nt && c.dropout > 0)
                low *= dropout_factor(77, t, j, c.dropout);
            y[t * width + j] = sum + 0.5 * low;
        }
    }
    return y;
}

/// With `stealing`, twice: threads one after the other, so that the first does all the work, and
/// then at once.
std::vector<float> run(const Case & c, const Inputs & in, bool nt, Format format, int nth,
                       const Weight & w, Rows x, WorkStealing * stealing = nullptr) {
    const int64_t width = nt ? c.n_rows : c.n_cols;
    std::vector<float> y = in.y0;
    const LowRank * low = c.rank ? &in.low : nullptr;
    std::vector<uint32_t> words;
    x = rows_for(format, nt, w, x, c.n_tokens, nth, words);
    const auto product = [&](int ith, int n) {
        (nt ? kernels().gemm.nt : kernels().gemm.nn)(format, w, x, low, {y.data(), width, c.add},
                                                     c.n_tokens, stealing, ith, n);
    };
    if (stealing) {
        for (int i = 0; i < nth; i++)
            product(i, nth);
        const std::vector<float> alone = y;
        y = in.y0;
        parallel(nth, product);
        expect_same("one thread for all", y, alone);
        return y;
    }
    parallel(nth, product);
    return y;
}

/// BF16 rounds both factors by at most 2^-9 each, 16-bit integers by less than 2^-11 of a block's
/// largest; errors add up like a random walk.
double limit_of(Format format) {
    return format == Format::bf16 ? 0.02 : format == Format::i16 ? 0.004 : 2e-5;
}

/// Panels that are kept give the same to the bit: those that an earlier call made, and new ones,
/// which threads make at the same time.
void check_prepacked(const std::string & label, const Case & c, const Inputs & in, bool nt, int nth,
                     Format format, Rows x, const std::vector<float> & want,
                     PrepackedWeights & kept) {
    const Weight w = kept.with_panels(in.w.weight, nt);
    expect_same(label + " prepacked", want, run(c, in, nt, format, nth, w, x));
    PrepackedWeights made(kernels(), format, 64u << 20);
    WorkStealing stealing(nth);
    const Weight own = made.with_panels(in.w.weight, nt);
    for (int i = 0; i < 2; i++)
        expect_same(label + " prepacked anew", want,
                    run(c, in, nt, format, nth, own, x, &stealing));
}

void check(const Case & c, bool nt) {
    const Inputs in = make_inputs(c, nt);
    const std::vector<double> want = naive(c, in, nt);
    const int64_t depth = nt ? c.n_cols : c.n_rows;
    const Rows x = {in.x.data(), false, depth};
    char name[128];
    std::snprintf(name, sizeof name, "%s %s %dx%d T%d R%d", nt ? "nt" : "nn",
                  ggml_type_name(c.type), (int)c.n_rows, (int)c.n_cols, (int)c.n_tokens, c.rank);
    // Made by one thread, read by more.
    PrepackedWeights kept(kernels(), kernels().fast, 64u << 20);
    PrepackedWeights kept_f32(kernels(), Format::f32, 64u << 20);
    for (int nth = 1; nth <= 3; nth++) {
        const std::string label = std::string(name) + " threads " + std::to_string(nth);
        const std::vector<float> exact = run(c, in, nt, Format::f32, nth, in.w.weight, x);
        expect_close(label + " f32", exact, want, 2e-5);
        const std::vector<float> y = run(c, in, nt, kernels().fast, nth, in.w.weight, x);
        expect_close(label + " fast", y, want, limit_of(kernels().fast));
        check_prepacked(label, c, in, nt, nth, kernels().fast, x, y, kept);
        check_prepacked(label + " f32", c, in, nt, nth, Format::f32, x, exact, kept_f32);
        for (const int n_threads : {nth, 1}) {
            WorkStealing stealing(n_threads); // for fewer threads than there are: nobody helps
            expect_same(label + " with stealing", y,
                        run(c, in, nt, kernels().fast, nth, in.w.weight, x, &stealing));
        }

        const std::vector<uint16_t> converted = to_bf16_bits(in.x);
        const Rows x_bf16 = {converted.data(), true, depth};
        const std::vector<float> y_bf16 = run(c, in, nt, kernels().fast, nth, in.w.weight, x_bf16);
        if (kernels().fast == Format::bf16)
            expect_same(label + " converted rows", y, y_bf16);
        expect_close(label + " BF16 rows", run(c, in, nt, Format::f32, nth, in.w.weight, x_bf16),
                     want, 0.02);
    }
}

/// A NaN or an infinity in one token's row shows in all its outputs, and in no other's.
void test_not_finite() {
    const Case c = {GGML_TYPE_Q4_0, 64, 96, 9, 0, false, 0.0f};
    for (const float bad : {(float)NAN, (float)INFINITY}) {
        for (const bool nt : {true, false}) {
            Inputs in = make_inputs(c, nt);
            const int64_t depth = nt ? c.n_cols : c.n_rows, width = nt ? c.n_rows : c.n_cols;
            in.x[4 * depth + 33] = bad;
            const std::vector<float> y =
                run(c, in, nt, kernels().fast, 2, in.w.weight, {in.x.data(), false, depth});
            for (int64_t i = 0; i < c.n_tokens * width; i++) {
                if (std::isfinite(y[i]) == (i / width == 4)) {
                    failures++;
                    std::printf("FAIL %s with %f: y[%d] is %f\n", nt ? "nt" : "nn", bad, (int)i,
                                y[i]);
                    break;
                }
            }
        }
    }
}

} // namespace

void test_gemm() {
    test_not_finite();
    for (const ggml_type type : weight_types()) {
        const int64_t block = ggml_blck_size(type);
        for (const bool nt : {true, false}) {
            check({type, 67, std::max<int64_t>(block, 96 / block * block), 17, 8, true, 0.0f}, nt);
        }
    }
    const Case shapes[] = {
        {GGML_TYPE_Q4_0, 70, 32, 1, 0, false, 0.0f},
        {GGML_TYPE_Q4_1, 576, 576, 37, 4, false, 0.0f},
        {GGML_TYPE_Q8_0, 192, 576, 1, 8, false, 0.0f},
        {GGML_TYPE_F16, 33, 83, 29, 5, true, 0.0f},
        {GGML_TYPE_Q4_K, 130, 2304, 15, 0, true, 0.0f},
        {GGML_TYPE_Q6_K, 1301, 512, 14, 3, true, 0.0f},
        {GGML_TYPE_F32, 2200, 7, 5, 64, false, 0.25f},
        {GGML_TYPE_Q4_0, 40, 64, 1100, 4, false, 0.1f},
        {GGML_TYPE_Q4_1, 96, 288, 53, 8, true, 0.1f},
    };
    for (const Case & c : shapes) {
        check(c, true);
        check(c, false);
    }
}

void bench_gemm(int nth) {
    struct Shape {
        int64_t n_rows, n_cols;
    };
    const ggml_type types[] = {GGML_TYPE_F32,    GGML_TYPE_F16,   GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                               GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1,  GGML_TYPE_Q5_0, GGML_TYPE_Q4_K,
                               GGML_TYPE_Q5_K,   GGML_TYPE_Q6_K,  GGML_TYPE_Q2_K, GGML_TYPE_Q3_K,
                               GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS};
    const Shape shapes[] = {{576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {4096, 4096}};
    const int64_t n_tokens = 512;
    std::printf("GFLOP/s, T=%d, %d threads: nt/nn %s | nt/nn F32\n%-8s", (int)n_tokens, nth,
                format_name(kernels().fast), "");
    for (const Shape & s : shapes)
        std::printf(" %21dx%-5d", (int)s.n_rows, (int)s.n_cols);
    std::printf("\n");
    for (const ggml_type type : types) {
        std::printf("%-8s", ggml_type_name(type));
        for (const Shape & s : shapes) {
            if (s.n_cols % ggml_blck_size(type)) {
                std::printf(" %27s", "-");
                continue;
            }
            WorkStealing stealing(nth);
            const TestWeight w = random_weight(type, s.n_rows, s.n_cols);
            const int64_t wide = std::max(s.n_rows, s.n_cols);
            const std::vector<float> x = random_floats(n_tokens * wide);
            std::vector<float> y((size_t)(n_tokens * wide));
            std::printf("  ");
            for (const Format format : {kernels().fast, Format::f32}) {
                for (const bool nt : {true, false}) {
                    const int64_t in = nt ? s.n_cols : s.n_rows, out = nt ? s.n_rows : s.n_cols;
                    std::vector<uint32_t> words;
                    const Rows rows =
                        rows_for(format, nt, w.weight, {x.data(), false, in}, n_tokens, nth, words);
                    const double seconds = bench_seconds(nth, [&](int ith, int n) {
                        (nt ? kernels().gemm.nt : kernels().gemm.nn)(format, w.weight, rows,
                                                                     nullptr, {y.data(), out},
                                                                     n_tokens, &stealing, ith, n);
                    });
                    std::printf(" %5.0f",
                                2e-9 * (double)(n_tokens * s.n_rows * s.n_cols) / seconds);
                }
            }
        }
        std::printf("\n");
        std::fflush(stdout);
    }
}

} // namespace ggft_test
