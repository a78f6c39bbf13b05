#include "bindings/tools.h"

#include "base/devices.h"
#include "bindings/config.h"
#include "engine/memory.h"

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

static nb::dict buffers(const Forecast & f, int64_t n_rows, int64_t n_tokens, bool keep,
                        size_t prepacked_bytes) {
    return as_dict(f.buffers(n_rows, n_tokens, keep, prepacked_bytes));
}

void bind_tools(nb::module_ & m) {
    m.def("devices", &devices);
    m.def("build_info", &build_info);
    m.def("deny_family", &deny_family, "family"_a);
    m.def("fail_kernels", &fail_kernels, "name"_a);
    nb::class_<Forecast>(m, "Forecast")
        .def(nb::new_([](const nb::dict & settings) { return new Forecast(config_of(settings)); }),
             "settings"_a)
        .def("buffers", &buffers, "n_rows"_a, "n_tokens"_a, "keep"_a, "prepacked_bytes"_a)
        .def_prop_ro("kernels", &Forecast::kernels)
        .def_prop_ro("n_parameters", &Forecast::n_parameters)
        .def_prop_ro("n_vocab", &Forecast::n_vocab)
        .def_prop_ro("prepackable_bytes", &Forecast::prepackable_bytes);
}

} // namespace ggft
