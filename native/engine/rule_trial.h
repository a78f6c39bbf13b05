// One rule of the table by itself, on data from outside: what the tests of local gradients compare
// with a float64 reference.
#pragma once

#include "base/graph.h"

#include <array>
#include <string>
#include <vector>

namespace ggft {

struct TrialSource {
    ggml_type type; // F32 or I32
    std::array<int64_t, GGML_MAX_DIMS> ne;
    const void * data;
    bool frozen; // gets no gradient
};

struct Trial {
    std::string op; // as find_rule has it
    std::vector<TrialSource> sources;
    std::array<int64_t, GGML_MAX_DIMS> ne; // of the result
    std::vector<int32_t> params;           // of the operation, behind a UNARY's or GLU's kind
    const float * dy;
};

struct TrialResult {
    std::vector<float> y;
    std::vector<std::vector<float>> gradients; // of each source; empty without one
};

// Throws Error(input) if there is no such operation or rule.
TrialResult try_rule(const Trial & trial);

} // namespace ggft
