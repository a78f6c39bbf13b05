#include "calibrate/format.h"

namespace ggft {

namespace {

// Source: ggml-common.h, kvalues_iq4nl and kvalues_mxfp4.
constexpr float IQ4_CODES[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
constexpr float MXFP4_CODES[] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

BlockFormat whole(ggml_type type, float low, float high, bool has_min) {
    BlockFormat f{type, Scales::half, 32, 32, low, high};
    f.has_min = has_min;
    return f;
}

BlockFormat with_min(ggml_type type, int group, float high, float multiples) {
    BlockFormat f{type, Scales::super, 256, group, 0, high};
    f.scale_high = f.min_high = multiples;
    f.has_min = true;
    return f;
}

BlockFormat signed_scales(ggml_type type, int group, float low, float high, float multiples) {
    BlockFormat f{type, Scales::super, 256, group, low, high};
    f.scale_low = -multiples;
    f.scale_high = multiples - 1;
    return f;
}

BlockFormat with_table(BlockFormat f, const float * table, int n) {
    f.table = table;
    f.n_codes = n;
    return f;
}

const BlockFormat FORMATS[] = {
    whole(GGML_TYPE_Q4_0, -8, 7, false),
    whole(GGML_TYPE_Q4_1, 0, 15, true),
    whole(GGML_TYPE_Q5_0, -16, 15, false),
    whole(GGML_TYPE_Q5_1, 0, 31, true),
    // Not -128, which some products of ggml cannot negate.
    whole(GGML_TYPE_Q8_0, -127, 127, false),
    with_min(GGML_TYPE_Q2_K, 16, 3, 15),
    signed_scales(GGML_TYPE_Q3_K, 16, -4, 3, 32),
    with_min(GGML_TYPE_Q4_K, 32, 15, 63),
    with_min(GGML_TYPE_Q5_K, 32, 31, 63),
    signed_scales(GGML_TYPE_Q6_K, 16, -32, 31, 128),
    with_table(whole(GGML_TYPE_IQ4_NL, -127, 113, false), IQ4_CODES, 16),
    with_table(signed_scales(GGML_TYPE_IQ4_XS, 32, -127, 113, 32), IQ4_CODES, 16),
    with_table({GGML_TYPE_MXFP4, Scales::power, 32, 32, -12, 12}, MXFP4_CODES, 15),
};

} // namespace

const BlockFormat * find_format(ggml_type type) {
    for (const BlockFormat & f : FORMATS) {
        if (f.type == type)
            return &f;
    }
    return nullptr;
}

} // namespace ggft
