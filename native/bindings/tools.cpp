#include "bindings/tools.h"

#include "base/devices.h"
#include "bindings/config.h"
#include "engine/memory.h"
#include "engine/traced.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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

template <class F>
nb::dict buffers(const F & f, int64_t n_rows, int64_t n_tokens, bool keep, size_t prepacked_bytes) {
    return as_dict(f.buffers(n_rows, n_tokens, keep, prepacked_bytes));
}

template <class F> nb::class_<F> bind_forecast(nb::module_ & m, const char * name) {
    return nb::class_<F>(m, name)
        .def(nb::new_([](const nb::dict & settings) { return new F(config_of(settings)); }),
             "settings"_a)
        .def("buffers", &buffers<F>, "n_rows"_a, "n_tokens"_a, "keep"_a, "prepacked_bytes"_a)
        .def_prop_ro("kernels", &F::kernels)
        .def_prop_ro("n_parameters", &F::n_parameters)
        .def_prop_ro("n_vocab", &F::n_vocab)
        .def_prop_ro("prepackable_bytes", &F::prepackable_bytes);
}

void bind_tools(nb::module_ & m) {
    m.def("devices", &devices);
    m.def("build_info", &build_info);
    m.def("deny_family", &deny_family, "family"_a);
    m.def("fail_kernels", &fail_kernels, "name"_a);
    bind_forecast<Forecast>(m, "Forecast");
    bind_forecast<TracedForecast>(m, "TracedForecast")
        .def_prop_ro("ignored", &TracedForecast::ignored);
}

} // namespace ggft
