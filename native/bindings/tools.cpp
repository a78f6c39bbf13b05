#include "bindings/tools.h"

#include "base/devices.h"
#include "engine/engine.h"

#include <nanobind/stl/string.h>

namespace nb = nanobind;
using namespace nb::literals;

namespace ggft {

static nb::list devices() {
    nb::list result;
    for (const DeviceInfo & device : list_devices()) {
        nb::dict d;
        d["name"] = device.name;
        d["description"] = device.description;
        d["type"] = device.type;
        d["memory_free"] = device.memory_free;
        d["memory_total"] = device.memory_total;
        d["host_pointer"] = device.host_pointer;
        d["trains"] = device.trains;
        result.append(d);
    }
    return result;
}

static nb::dict build_info() {
    nb::dict d;
    d["ggml_built"] = GGFT_GGML_VERSION;
    d["ggml_loaded"] = ggml_version();
    d["ggml_commit"] = ggml_commit();
    nb::list archs;
    for (const auto & a : supported_archs()) {
        archs.append(a.name);
    }
    d["architectures"] = archs;
    return d;
}

void bind_tools(nb::module_ & m) {
    m.def("devices", &devices);
    m.def("build_info", &build_info);
    m.def("deny_family", &deny_family, "family"_a);
    m.def("fail_kernels", &fail_kernels, "name"_a);
}

} // namespace ggft
