// The Python module ggft._native: this folder alone knows Python. Arrays are checked here; every
// call that computes releases the GIL.
#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/calibration.h"
#include "bindings/config.h"
#include "bindings/tools.h"
#include "engine/traced.h"
#include "kernels/isa/dispatch.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

using namespace nanobind::literals;

namespace ggft {

template <class E> E * open_engine(const nb::dict & settings) {
    const EngineConfig config = config_of(settings);
    nb::gil_scoped_release release;
    return new E(config);
}

static nb::tuple as_tuple(const LossSum & sum) {
    return nb::make_tuple(sum.nats, sum.n_targets);
}

template <class E>
nb::tuple forward_backward(E & e, IntArray tokens, IntArray positions, IntArray segments,
                           IntArray targets, uint64_t seed, std::optional<FloatMatrix> weights) {
    check_targets(tokens, targets);
    MicroBatch b = batch_of(tokens, positions, segments, targets.data(), seed);
    set_weights(b, weights);
    LossSum sum;
    {
        nb::gil_scoped_release release;
        sum = e.forward_backward(b);
    }
    return as_tuple(sum);
}

template <class E>
nb::tuple evaluate(E & e, IntArray tokens, IntArray positions, IntArray segments, IntArray targets,
                   std::optional<FloatMatrix> weights) {
    check_targets(tokens, targets);
    MicroBatch b = batch_of(tokens, positions, segments, targets.data(), 0);
    set_weights(b, weights);
    LossSum sum;
    {
        nb::gil_scoped_release release;
        sum = e.evaluate(b);
    }
    return as_tuple(sum);
}

template <class E>
nb::object token_nats(E & e, IntArray tokens, IntArray positions, IntArray segments,
                      IntArray targets) {
    check_targets(tokens, targets);
    const MicroBatch b = batch_of(tokens, positions, segments, targets.data(), 0);
    float * data;
    nb::object array = new_array((size_t)(b.B * b.T), {(size_t)b.B, (size_t)b.T}, data);
    nb::gil_scoped_release release;
    e.token_nats(b, data);
    return array;
}

template <class E>
nb::object logits(E & e, IntArray tokens, IntArray positions, IntArray segments) {
    const MicroBatch b = batch_of(tokens, positions, segments, nullptr, 0);
    const size_t V = (size_t)e.n_vocab();
    float * data;
    nb::object array = new_array((size_t)(b.B * b.T) * V, {(size_t)b.B, (size_t)b.T, V}, data);
    nb::gil_scoped_release release;
    e.logits(b, data);
    return array;
}

static nb::object dropout_mask(Engine & e, int64_t id, int64_t B, int64_t T, int64_t width,
                               uint64_t seed) {
    float * data;
    nb::object array = new_array((size_t)(B * T * width), {(size_t)(B * T), (size_t)width}, data);
    e.dropout_mask(id, B, T, width, seed, data);
    return array;
}

static nb::dict probe(Engine & e, const std::string & op, IntArray tokens, IntArray positions,
                      IntArray segments, IntArray targets, uint64_t seed, nb::dict arrays) {
    check_targets(tokens, targets);
    Arrays given;
    for (auto [name, array] : arrays) {
        const auto a = nb::cast<FloatArray>(array);
        given[nb::cast<std::string>(name)].assign(a.data(), a.data() + a.size());
    }
    nb::dict result;
    for (const auto & [name, values] :
         e.probe(op, batch_of(tokens, positions, segments, targets.data(), seed), given)) {
        float * data;
        result[name.c_str()] = new_array(values.size(), {values.size()}, data);
        std::copy(values.begin(), values.end(), data);
    }
    return result;
}

template <class E> nb::list parameters(E & e) {
    nb::list result;
    for (const Parameter & p : e.lora().parameters()) {
        result.append(nb::make_tuple(p.name, nb::make_tuple(p.ne1, p.ne0)));
    }
    return result;
}

template <class E> const Parameter & parameter(E & e, const std::string & name) {
    for (const Parameter & p : e.lora().parameters()) {
        if (p.name == name) {
            return p;
        }
    }
    fail(ErrorKind::input, "no trainable tensor is called '" + name + "'");
}

template <class E>
nb::object get_tensor(E & e, const std::string & name, const std::string & which) {
    const Parameter & p = parameter(e, name);
    float * data;
    nb::object array = new_array((size_t)(p.ne0 * p.ne1), {(size_t)p.ne1, (size_t)p.ne0}, data);
    e.lora().get(name, which, data);
    return array;
}

template <class E>
void set_tensor(E & e, const std::string & name, const std::string & which, FloatArray array) {
    const Parameter & p = parameter(e, name);
    require(array.ndim() == 2 && (int64_t)array.shape(0) == p.ne1 &&
                (int64_t)array.shape(1) == p.ne0,
            ErrorKind::input,
            name + " has shape (" + std::to_string(p.ne1) + ", " + std::to_string(p.ne0) +
                "), the array differs");
    e.lora().set(name, which, array.data());
}

template <class E> nb::dict info(E & e) {
    nb::dict d;
    d["device"] = ggml_backend_dev_name(e.device());
    d["device_description"] = ggml_backend_dev_description(e.device());
    d["kernels"] = e.kernels();
    const bool fast = e.config().mode == Mode::fast;
    d["precision"] = fast ? "fast" : "f32";
    const KernelSet * set = e.kernel_set();
    d["isa"] = set ? nb::cast(set->name) : nb::none();
    d["products"] = !set ? "ggml's types" : format_name(fast ? set->fast : Format::f32);
    d["threads"] = e.config().threads;
    d["ggml_version"] = ggml_version();
    d["architecture"] = e.architecture();
    d["n_vocab"] = e.n_vocab();
    d["n_params_matmul"] = e.n_params_matmul();
    d["base_bytes"] = e.base_bytes();
    d["base_mapped"] = e.base_mapped();
    d["buffers"] = as_dict(e.buffer_bytes());
    nb::dict traffic;
    traffic["to_device"] = e.traffic().to_device;
    traffic["from_device"] = e.traffic().from_device;
    d["traffic"] = traffic;
    return d;
}

static nb::dict operand(const Operand & o) {
    nb::dict d;
    d["type"] = o.type;
    d["ne"] = nb::make_tuple(o.ne[0], o.ne[1], o.ne[2], o.ne[3]);
    d["nb"] = nb::make_tuple(o.nb[0], o.nb[1], o.nb[2], o.nb[3]);
    return d;
}

static nb::list graph_report(Engine & e, bool gpu) {
    nb::list result;
    for (const NodeReport & r : e.graph_report(gpu)) {
        nb::dict d;
        nb::list sources;
        for (const Operand & o : r.sources) {
            sources.append(operand(o));
        }
        d["op"] = r.op;
        d["family"] = r.family;
        d["type"] = r.type;
        d["shapes"] = r.shape;
        d["result"] = operand(r.result);
        d["sources"] = sources;
        d["count"] = r.count;
        d["supported"] = r.supported;
        result.append(d);
    }
    return result;
}

static const char * kind_name(ErrorKind kind) {
    switch (kind) {
    case ErrorKind::input:
        return "input";
    case ErrorKind::resource:
        return "resource";
    case ErrorKind::numeric:
        return "numeric";
    default:
        return "cancelled";
    }
}

// Raised as ggft._native.Error(kind, message).
static void translate(const std::exception_ptr & p, void * type) {
    try {
        std::rethrow_exception(p);
    } catch (const Error & e) {
        PyErr_SetObject((PyObject *)type, nb::make_tuple(kind_name(e.kind), e.what()).ptr());
    }
}

// The calls that both engines have.
template <class E> nb::class_<E> bind_shared(nb::module_ & m, const char * name) {
    return nb::class_<E>(m, name)
        .def(nb::new_(&open_engine<E>), "settings"_a)
        .def("forward_backward", &forward_backward<E>, "tokens"_a, "positions"_a, "segments"_a,
             "targets"_a, "seed"_a, "weights"_a = nb::none())
        .def("evaluate", &evaluate<E>, "tokens"_a, "positions"_a, "segments"_a, "targets"_a,
             "weights"_a = nb::none())
        .def("token_nats", &token_nats<E>, "tokens"_a, "positions"_a, "segments"_a, "targets"_a)
        .def("logits", &logits<E>, "tokens"_a, "positions"_a, "segments"_a)
        .def("optimizer_step", &E::optimizer_step, "lr"_a, "n_targets"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def("zero_grad", [](E & e) { e.lora().zero_grad(); })
        .def("parameters", &parameters<E>)
        .def("get_tensor", &get_tensor<E>, "name"_a, "which"_a)
        .def("set_tensor", &set_tensor<E>, "name"_a, "which"_a, "array"_a)
        .def_rw("step", &E::step)
        .def("cancel", &E::cancel)
        .def("info", &info<E>);
}

} // namespace ggft

NB_MODULE(_native, m) {
    using namespace ggft;
    // Structures are passed by layout: another ggml than that of the build could crash instead of
    // failing.
    if (std::string(ggml_version()) != GGFT_GGML_VERSION) {
        const std::string message = std::string("built with ggml " GGFT_GGML_VERSION
                                                ", but llama-cpp-python now carries ggml ") +
                                    ggml_version() + "; rebuild with `make setup`";
        throw nb::import_error(message.c_str());
    }
    m.doc() =
        "Training engine over llama.cpp's ggml; see ggft.engine for the documented interface.";
    nb::object error =
        nb::steal(PyErr_NewException("ggft._native.Error", PyExc_RuntimeError, nullptr));
    m.attr("Error") = error;
    nb::register_exception_translator(translate, error.ptr());

    bind_tools(m);
    bind_shared<TracedEngine>(m, "TracedEngine");
    auto engine = bind_shared<Engine>(m, "Engine");
    bind_calibration(m, engine);
    engine
        .def("probe", &probe, "op"_a, "tokens"_a, "positions"_a, "segments"_a, "targets"_a,
             "seed"_a, "arrays"_a)
        .def("dropout_mask", &dropout_mask, "id"_a, "n_rows"_a, "n_tokens"_a, "width"_a, "seed"_a)
        .def("graph_report", &graph_report, "gpu"_a = false)
        .def("set_profiling", &Engine::set_profiling, "on"_a)
        .def("profile", &Engine::profile);
}
