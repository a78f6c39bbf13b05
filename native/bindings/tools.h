// What the Python module offers besides the engine.
#pragma once

#include <nanobind/nanobind.h>

namespace ggft {

void bind_tools(nanobind::module_ & m);

} // namespace ggft
