#include "bindings/tools.h"

#include "base/devices.h"
#include "bindings/arrays.h"
#include "bindings/config.h"
#include "engine/memory.h"
#include "engine/rule_trial.h"
#include "engine/traced.h"
#include "kernels/isa/dispatch.h"
#include "rules/table.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

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

static nb::dict kernels() {
    const KernelSet & set = find_kernels();
    nb::dict d;
    d["isa"] = set.name;
    d["products"] = format_name(set.fast);
    nb::list runnable;
    for (const std::string & name : runnable_isas()) {
        runnable.append(name);
    }
    d["runnable"] = runnable;
    return d;
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

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

static nb::object array_of(const std::vector<float> & values) {
    float * data;
    nb::object array = new_array(values.size(), {values.size()}, data);
    std::copy(values.begin(), values.end(), data);
    return array;
}

// Arrays are in NumPy order, of four dimensions, float32 or int32. Returns the result and, of each
// source, its gradient, flat; None for the frozen ones and for integers.
static nb::tuple try_rule_on(const std::string & op, const std::vector<AnyArray> & sources,
                             const std::vector<size_t> & frozen,
                             const std::vector<int32_t> & params, FloatArray dy) {
    auto shape = [](const auto & a) {
        require(a.ndim() == GGML_MAX_DIMS, ErrorKind::input, "an array needs four dimensions");
        return std::array<int64_t, GGML_MAX_DIMS>{(int64_t)a.shape(3), (int64_t)a.shape(2),
                                                  (int64_t)a.shape(1), (int64_t)a.shape(0)};
    };
    Trial trial{op, {}, shape(dy), params, dy.data()};
    for (size_t i = 0; i < sources.size(); i++) {
        const bool is_float = sources[i].dtype() == nb::dtype<float>();
        const bool is_frozen =
            !is_float || std::find(frozen.begin(), frozen.end(), i) != frozen.end();
        trial.sources.push_back({is_float ? GGML_TYPE_F32 : GGML_TYPE_I32, shape(sources[i]),
                                 sources[i].data(), is_frozen});
    }
    const TrialResult result = try_rule(trial);
    nb::list gradients;
    for (size_t i = 0; i < sources.size(); i++) {
        gradients.append(trial.sources[i].frozen ? nb::none() : array_of(result.gradients[i]));
    }
    return nb::make_tuple(array_of(result.y), gradients);
}

void bind_tools(nb::module_ & m) {
    m.def("devices", &devices);
    m.def("build_info", &build_info);
    m.def("kernels", &kernels);
    m.def("deny_family", &deny_family, "family"_a);
    m.def("rule_names", &rule_names);
    m.def("try_rule", &try_rule_on, "op"_a, "sources"_a, "frozen"_a, "params"_a, "dy"_a);
    m.def("fail_kernels", &fail_kernels, "name"_a);
    bind_forecast<Forecast>(m, "Forecast");
    bind_forecast<TracedForecast>(m, "TracedForecast")
        .def_prop_ro("ignored", &TracedForecast::ignored);
}

} // namespace ggft
