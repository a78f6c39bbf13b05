// Dequantizers against ggml's own.
#include "support.h"

namespace ggft_test {
namespace {

/// Fail unless got is ggml's value within `rounding`; a fused multiply-add may move the last bit.
void expect_dequantized(const char * what, ggml_type type, const std::vector<float> & got,
                        const std::vector<float> & want, float rounding) {
    int differ = 0;
    for (size_t j = 0; j < got.size(); j++) {
        if (!(std::fabs(got[j] - want[j]) <= std::fabs(want[j]) * rounding + 1e-9f))
            differ++;
    }
    if (differ) {
        failures++;
        std::printf("FAIL dequantizer %s to %s: %d of %zu differ\n", ggml_type_name(type), what,
                    differ, got.size());
    }
}

} // namespace

void test_dequant() {
    const int64_t n = 3 * 512;
    for (const ggml_type type : weight_types()) {
        const TestWeight w = random_weight(type, 3, 512);
        std::vector<float> got(n);
        internals().dequant_f32(type, w.bytes.data(), n, got.data());
        // Codes near an offset cancel: the error is one of the product's last bits.
        expect_dequantized("F32", type, got, w.values, 1e-5f);
        std::vector<uint16_t> bits(n);
        internals().dequant_bf16(type, w.bytes.data(), n, bits.data());
        expect_dequantized("BF16", type, from_bf16_bits(bits), w.values, 0.00393f);
    }
}

} // namespace ggft_test
