// Calibration: what blocks read, and weights fitted to it.
#pragma once

#include "engine/engine.h"

#include <nanobind/nanobind.h>

namespace ggft {

void bind_calibration(nanobind::module_ & m, nanobind::class_<Engine> & engine);

} // namespace ggft
