// Settings as Python gives them, a dict by name, and the engine's configuration.
#pragma once

#include "engine/engine.h"

#include <nanobind/nanobind.h>

namespace ggft {

// Every setting has a field and every field a setting. Throws Error(input) for a name that is
// missing or unknown, and for a value of another type or out of range.
EngineConfig config_of(const nanobind::dict & settings);

nanobind::dict as_dict(const Buffers & buffers);

} // namespace ggft
