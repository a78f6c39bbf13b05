// Primitives of an instruction set against what they are defined as.
#include <algorithm>
#include <limits>

#include "kernels/rowwise/dropout.h"
#include "support.h"

namespace ggft_test {
namespace {

void test_exp() {
    std::vector<float> x, y;
    for (float at = -87.0f; at < 88.0f; at += 0.00137f)
        x.push_back(at);
    x.resize(x.size() / 16 * 16);
    y.resize(x.size());
    internals().exp(x.data(), (int64_t)x.size(), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const double want = std::exp((double)x[i]);
        worst = std::max(worst, std::fabs(y[i] - want) / want);
    }
    expect_same("vexp within 2 ulp", worst < 2 * 1.2e-7, true);
    const float inf = INFINITY;
    const std::vector<float> limits = {-inf, inf, NAN, -90, 90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    internals().exp(limits.data(), 16, y.data());
    expect_same("vexp limits", y[0] == 0 && y[1] == inf && std::isnan(y[2]) && y[5] == 1, true);
}

/// Bits of floats of all kinds: normal, denormal, zero, infinite, NaN.
std::vector<uint32_t> random_bits(size_t n) {
    std::vector<uint32_t> bits(n);
    for (uint32_t & b : bits)
        b = (uint32_t)random_engine()();
    for (size_t i = 0; i < n; i += 16) {
        bits[i] &= 0x807fffffu;                                         // denormal
        bits[i + 1] &= 0x80000000u;                                     // zero
        bits[i + 2] |= 0x7f800000u;                                     // infinity or NaN
        bits[i + 3] = 0x3f800000u | 0x8000u | (bits[i + 3] & 0x10000u); // a tie
    }
    return bits;
}

float float_of(uint32_t bits) {
    return ggft::load_as<float>(&bits);
}

float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

void test_to_bf16() {
    const std::vector<uint32_t> bits = random_bits(4096);
    std::vector<uint16_t> got(bits.size());
    internals().to_bf16((const float *)bits.data(), (int64_t)bits.size(), got.data());
    int differ = 0;
    for (size_t i = 0; i < bits.size(); i++) {
        const float x = float_of(bits[i]);
        const uint16_t want = ggft::to_bf16(std::isnan(x) ? x : flushed(x));
        // Of a NaN that it is one.
        differ += std::isnan(x) ? !std::isnan(ggft::from_bf16(got[i])) : got[i] != want;
    }
    expect_same("BF16 rounded to nearest even", differ, 0);
}

/// Intel's definition of VDPBF16PS: odd products first, each fused with its sum, denormals zero.
float dot_bf16(float acc, uint32_t a, uint32_t b) {
    const auto low = [](uint32_t pair) { return flushed(float_of(pair << 16)); };
    const auto high = [](uint32_t pair) { return flushed(float_of(pair & 0xffff0000u)); };
    acc = flushed(std::fma(high(a), high(b), flushed(acc)));
    return flushed(std::fma(low(a), low(b), acc));
}

/// Where the instruction set multiplies BF16, or emulates it.
void test_dot_bf16() {
    const size_t n = 4096;
    std::vector<uint32_t> a = random_bits(n), b = random_bits(n);
    std::vector<float> y = random_floats((int64_t)n), got = y;
    for (size_t i = 0; i < n; i++) {
        // Exponents in the middle: a product that is denormal is rounded by machines without FMA.
        a[i] = (a[i] & 0x9fff9fffu) | 0x20002000u;
        b[i] = (b[i] & 0x9fff9fffu) | 0x20002000u;
        if (i % 8 == 0)
            b[i] &= 0x807f807fu; // denormals
    }
    internals().dot_bf16(a.data(), b.data(), (int64_t)n, got.data());
    int differ = 0;
    for (size_t i = 0; i < n; i++) {
        const float want = dot_bf16(y[i], a[i], b[i]);
        differ += std::memcmp(&want, &got[i], 4) != 0;
    }
    expect_same("products of BF16 as VDPBF16PS", differ, 0);
}

void test_dot_i16() {
    const size_t n = 4096;
    std::vector<int32_t> a(n), b(n), y(n), want(n);
    for (size_t i = 0; i < n; i++) {
        a[i] = (int32_t)random_engine()();
        b[i] = (int32_t)random_engine()();
        want[i] = y[i] = (int32_t)random_engine()();
        for (const int shift : {0, 16}) {
            const int32_t x = (int16_t)(a[i] >> shift), z = (int16_t)(b[i] >> shift);
            want[i] = (int32_t)((uint32_t)want[i] + (uint32_t)(x * z));
        }
    }
    internals().dot_i16(a.data(), b.data(), (int64_t)n, y.data());
    expect_same("products of 16-bit integers", y, want);
}

void test_dropout() {
    const int64_t T = 200, C = 512;
    const float p = 0.3f;
    std::vector<float> y((size_t)(T * C));
    std::vector<double> want(y.size());
    double kept = 0, neighbours = 0, below = 0;
    for (int64_t t = 0; t < T; t++) {
        internals().dropout(5, t, C, p, y.data() + t * C);
        for (int64_t c = 0; c < C; c++) {
            want[t * C + c] = ggft::dropout_factor(5, t, c, p);
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

} // namespace

void test_isa() {
    test_exp();
    test_to_bf16();
    test_dot_bf16();
    test_dot_i16();
    test_dropout();
}

} // namespace ggft_test
