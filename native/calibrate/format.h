// Which block types of ggml can be calibrated.
#pragma once

#include "kernels/calibrate/calibrate.h"

namespace ggft {

/// The grid of a type, or null where it has none that can be chosen code by code.
const BlockFormat * find_format(ggml_type type);

} // namespace ggft
