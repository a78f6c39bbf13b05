// Weights of a stage on a grid, so that the stage's outputs come out as they should: targets, error
// feedback, and sweeps over the codes. See moments.h for x, y and R.
//
// Sources: error feedback is that of GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al.
// 2023); grids fitted to what feedback has made of a block, and targets from the written prefix's
// own inputs, are ours.
#pragma once

#include "calibrate/format.h"
#include "calibrate/moments.h"

namespace ggft {

/// The weights that make of y what w makes of x, least squares, and w where y says nothing:
///   out = w + w cross second⁻¹, with the damped second moments.
/// w and out are (n_rows, n) and may be the same.
void find_targets(const Moments & moments, const float * w, int64_t n_rows, float * out);

/// Squared error of a row's outputs, summed over rows and mean over tokens.
struct OutputError {
    double fed_back = 0; // after error feedback
    double swept = 0;    // after the sweeps
};

/// Writes the blocks of targets (n_rows, n) in a type, n a multiple of its block: column by column,
/// what an earlier one got wrong made up for by the later ones; then `sweeps` times over the codes,
/// each the best while all others stay, and over the scales.
OutputError quantize(const Moments & moments, const BlockFormat & format, const float * targets,
                     int64_t n_rows, int sweeps, uint8_t * blocks);

} // namespace ggft
