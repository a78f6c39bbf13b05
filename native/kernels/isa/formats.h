// The numbers that products multiply.
#pragma once

namespace ggft {

/// f32: everything in F32. bf16: pairs of BF16 (AVX512-BF16). i16: 16-bit integers with a scale per
/// block, closer to F32 than BF16 is (AVX2, AVX-512). Sums are F32 in all.
enum class Format { f32, bf16, i16 };

constexpr const char * format_name(Format format) {
    return format == Format::f32 ? "F32" : format == Format::bf16 ? "BF16" : "16-bit integers";
}

} // namespace ggft
