// Helpers of the kernel tests: random tensors, weights of any ggml type, comparison, threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ggml.h"
#include "internals.h"
#include "kernels/isa/dispatch.h"

namespace ggft_test {

inline int failures = 0;

/// Those under test, which GGFT_ISA names.
inline const ggft::KernelSet & kernels() {
    static const ggft::KernelSet & found = ggft::find_kernels();
    return found;
}

const Internals & internals();

inline std::mt19937 & random_engine() {
    static std::mt19937 engine(1234);
    return engine;
}

inline std::vector<float> random_floats(int64_t n, float sigma = 1.0f) {
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float> x((size_t)n);
    for (float & v : x)
        v = normal(random_engine());
    return x;
}

inline std::vector<uint16_t> to_bf16_bits(const std::vector<float> & x) {
    std::vector<uint16_t> h(x.size());
    for (size_t i = 0; i < x.size(); i++)
        h[i] = ggft::to_bf16(x[i]);
    return h;
}

inline std::vector<float> from_bf16_bits(const std::vector<uint16_t> & h) {
    std::vector<float> x(h.size());
    for (size_t i = 0; i < h.size(); i++)
        x[i] = ggft::from_bf16(h[i]);
    return x;
}

inline std::vector<double> doubles(const std::vector<float> & x) {
    return {x.begin(), x.end()};
}

/// Run f(ith, nth) on nth threads at once, as a ggml custom op is.
template <class F> void parallel(int nth, F f) {
    std::vector<std::thread> threads;
    for (int i = 1; i < nth; i++)
        threads.emplace_back([=] { f(i, nth); });
    f(0, nth);
    for (std::thread & t : threads)
        t.join();
}

/// Fail unless |got - want| <= tolerance * rms(want) everywhere.
inline void expect_close(const std::string & what, const std::vector<float> & got,
                         const std::vector<double> & want, double tolerance) {
    double square = 0, worst = 0;
    size_t at = 0;
    bool finite = true;
    for (size_t i = 0; i < want.size(); i++) {
        square += want[i] * want[i];
        const double error = std::fabs(got[i] - want[i]);
        finite = finite && std::isfinite(got[i]);
        if (error > worst) {
            worst = error;
            at = i;
        }
    }
    const double rms = std::sqrt(square / (double)want.size()) + 1e-30;
    if (got.size() == want.size() && finite && worst <= tolerance * rms)
        return;
    failures++;
    std::printf("FAIL %s: worst error %.3g of rms (limit %.3g) at %zu of %zu: %g, expected %g\n",
                what.c_str(), worst / rms, tolerance, at, want.size(), got[at], want[at]);
}

/// Fail unless the norm of got - want is at most tolerance * norm(want).
inline void expect_near(const std::string & what, const std::vector<float> & got,
                        const std::vector<double> & want, double tolerance) {
    double square = 0, error = 0;
    for (size_t i = 0; i < want.size(); i++) {
        square += want[i] * want[i];
        error += (got[i] - want[i]) * (got[i] - want[i]);
    }
    const double relative = std::sqrt(error / (square + 1e-30));
    if (got.size() == want.size() && relative <= tolerance)
        return;
    failures++;
    std::printf("FAIL %s: relative error %.3g (limit %.3g)\n", what.c_str(), relative, tolerance);
}

template <class T> void expect_same(const std::string & what, const T & a, const T & b) {
    if (a == b)
        return;
    failures++;
    std::printf("FAIL %s: results differ\n", what.c_str());
}

/// All types that weights may have.
inline std::vector<ggml_type> weight_types() {
    std::vector<ggml_type> types;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type type = (ggml_type)i;
        const ggml_type_traits * traits = ggml_get_type_traits(type);
        const bool of_weights = type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K;
        if (type == GGML_TYPE_F32 || (traits->to_float && traits->blck_size && of_weights))
            types.push_back(type);
    }
    return types;
}

/// A random matrix, and its values as ggml dequantizes them.
struct TestWeight {
    std::vector<uint8_t> bytes;
    std::vector<float> values;
    ggft::Weight weight;
};

/// Quantized: random bits, drawn again until they make a block of usual magnitudes, as ggml takes
/// seconds to quantize to some types.
inline void random_block(ggml_type type, uint8_t * block, float * values) {
    const int64_t n = ggml_blck_size(type);
    for (;;) {
        for (size_t i = 0; i < ggml_type_size(type); i++)
            block[i] = (uint8_t)random_engine()();
        ggml_get_type_traits(type)->to_float(block, values, n);
        float largest = 0;
        for (int64_t i = 0; i < n; i++)
            largest = std::isfinite(values[i]) ? ggft::max(largest, std::fabs(values[i])) : 1e30f;
        if (0.05f < largest && largest < 0.5f)
            return;
    }
}

inline TestWeight random_weight(ggml_type type, int64_t n_rows, int64_t n_cols) {
    TestWeight t;
    const size_t row_bytes = ggml_row_size(type, n_cols);
    t.bytes.resize(row_bytes * (size_t)n_rows);
    t.values = random_floats(n_rows * n_cols, 0.05f);
    if (ggml_is_quantized(type)) {
        for (int64_t i = 0; i < n_rows * n_cols / ggml_blck_size(type); i++) {
            random_block(type, t.bytes.data() + (size_t)i * ggml_type_size(type),
                         t.values.data() + i * ggml_blck_size(type));
        }
    } else {
        ggml_quantize_chunk(type, t.values.data(), t.bytes.data(), 0, n_rows, n_cols, nullptr);
        if (type != GGML_TYPE_F32)
            ggml_get_type_traits(type)->to_float(t.bytes.data(), t.values.data(), n_rows * n_cols);
    }
    t.weight = {type, n_rows, n_cols, t.bytes.data(), row_bytes};
    return t;
}

/// x as a product with w reads it: itself, or packed by nth threads into `words`.
inline ggft::Rows rows_for(ggft::Format format, bool nt, const ggft::Weight & w, ggft::Rows x,
                           int64_t n_tokens, int nth, std::vector<uint32_t> & words) {
    const ggft::GemmKernels & gemm = kernels().gemm;
    const ggft::RowPacking packing =
        nt ? gemm.packing_nt(format, w.n_cols) : gemm.packing_nn(format, w);
    if (!packing)
        return x;
    words.resize(packing.words(n_tokens));
    parallel(nth,
             [&](int ith, int n) { gemm.pack_tokens(packing, x, n_tokens, words.data(), ith, n); });
    return {words.data()};
}

/// CPU seconds of this thread: other programs on the machine do not count.
inline double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/// Run f(ith, nth) on nth threads repeatedly; CPU seconds of the slowest thread in the best run.
template <class F> double bench_seconds(int nth, F f, double budget = 0.15) {
    double best = 1e9, spent = 0;
    for (int i = 0; i < 4 || spent < budget; i++) {
        std::vector<double> seconds((size_t)nth);
        parallel(nth, [&](int ith, int n) {
            f(ith, n); // untimed: warms this thread's caches and scratch
            const double start = thread_seconds();
            f(ith, n);
            seconds[(size_t)ith] = thread_seconds() - start;
        });
        double slowest = 0;
        for (const double s : seconds)
            slowest = s > slowest ? s : slowest;
        best = slowest < best ? slowest : best;
        spent += slowest;
    }
    return best;
}

void test_isa();
void test_dequant();
void test_gemm();
void bench_gemm(int nth);
void test_lora();
void bench_lora(int nth);
void test_attention();
void bench_attention(int nth);
void test_rowwise();
void bench_rowwise(int nth);

} // namespace ggft_test
