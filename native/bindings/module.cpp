// The Python module ggft._native: the only file that knows Python. Arrays are checked here; every
// call that computes releases the GIL.
#include "base/devices.h"
#include "base/error.h"
#include "engine/engine.h"
#include "ggml-cpu.h"
#include "kernels/gemm/gemm.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>

namespace nb = nanobind;
using namespace nb::literals;

namespace ggft {

using IntArray = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

// ---- ggml's log ----

static std::mutex log_mutex;
static PyObject * log_callable = nullptr;

// ggml may log from any of its threads, some while the interpreter shuts down.
static void log_to_python(ggml_log_level level, const char * text, void *) {
    if (!Py_IsInitialized()) {
        return;
    }
    nb::gil_scoped_acquire gil;
    std::lock_guard<std::mutex> lock(log_mutex);
    if (log_callable == nullptr) {
        return;
    }
    PyObject * result = PyObject_CallFunction(log_callable, "is", (int)level, text);
    if (result == nullptr) {
        PyErr_WriteUnraisable(log_callable);
    }
    Py_XDECREF(result);
}

static void set_log(nb::object callable) {
    std::lock_guard<std::mutex> lock(log_mutex);
    Py_XDECREF(log_callable);
    log_callable = callable.is_none() ? nullptr : callable.inc_ref().ptr();
    ggml_log_set(log_to_python, nullptr);
}

// ---- what is here ----

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

// ---- the engine ----

static Mode mode_of(const std::string & name) {
    if (name == "fast") {
        return Mode::fast;
    }
    require(name == "f32", ErrorKind::input, "precision must be fast or f32, found '" + name + "'");
    return Mode::f32;
}

static Engine *
open_engine(const std::vector<std::string> & paths, const std::vector<std::string> & targets,
            int layer_first, int layer_last, int rank, float alpha, float dropout,
            const std::string & precision, const std::string & device, const std::string & kernels,
            int threads, bool keep, size_t prepacked_bytes, int64_t n_rows, int64_t n_tokens,
            float weight_decay, float beta1, float beta2, float eps, float max_grad_norm) {
    EngineConfig c;
    c.paths = paths;
    c.mode = mode_of(precision);
    require(kernels == "auto" || kernels == "fused" || kernels == "ggml", ErrorKind::input,
            "kernels must be auto, fused or ggml, found '" + kernels + "'");
    require(dropout >= 0 && dropout < 1, ErrorKind::input, "dropout must be in [0, 1)");
    for (const std::string & t : targets) {
        int site = 0;
        while (site < N_SITES && t != site_name(site)) {
            site++;
        }
        require(site < N_SITES, ErrorKind::input, "unknown target module '" + t + "'");
        c.lora.targets[site] = true;
    }
    c.lora.layer_first = layer_first;
    c.lora.layer_last = layer_last;
    c.lora.rank = rank;
    c.lora.alpha = alpha;
    c.lora.dropout = dropout;
    c.adamw = {beta1, beta2, eps, weight_decay, max_grad_norm};
    c.device = device;
    c.kernels = kernels;
    c.threads = threads;
    c.keep = keep;
    c.prepacked_bytes = prepacked_bytes;
    c.n_rows = n_rows;
    c.n_tokens = n_tokens;
    nb::gil_scoped_release release;
    return new Engine(c);
}

static MicroBatch batch_of(const IntArray & tokens, const IntArray & positions,
                           const IntArray & segments, const int32_t * targets, uint64_t seed) {
    require(tokens.shape(0) == positions.shape(0) && tokens.shape(1) == positions.shape(1) &&
                tokens.shape(0) == segments.shape(0) && tokens.shape(1) == segments.shape(1),
            ErrorKind::input, "tokens, positions and segments differ in shape");
    return {(int64_t)tokens.shape(0),
            (int64_t)tokens.shape(1),
            tokens.data(),
            positions.data(),
            segments.data(),
            targets,
            seed};
}

static void check_targets(const IntArray & tokens, const IntArray & targets) {
    require(tokens.shape(0) == targets.shape(0) && tokens.shape(1) == targets.shape(1),
            ErrorKind::input, "tokens and targets differ in shape");
}

// A NumPy array that owns `n` floats.
static nb::object new_array(size_t n, std::initializer_list<size_t> shape, float *& data) {
    data = new float[n]();
    nb::capsule owner(data, [](void * p) noexcept { delete[] (float *)p; });
    return nb::cast(nb::ndarray<nb::numpy, float>(data, shape, owner));
}

static nb::tuple as_tuple(const LossSum & sum) {
    return nb::make_tuple(sum.nats, sum.n_targets);
}

static nb::tuple forward_backward(Engine & e, IntArray tokens, IntArray positions,
                                  IntArray segments, IntArray targets, uint64_t seed) {
    check_targets(tokens, targets);
    const MicroBatch b = batch_of(tokens, positions, segments, targets.data(), seed);
    LossSum sum;
    {
        nb::gil_scoped_release release;
        sum = e.forward_backward(b);
    }
    return as_tuple(sum);
}

static nb::tuple evaluate(Engine & e, IntArray tokens, IntArray positions, IntArray segments,
                          IntArray targets) {
    check_targets(tokens, targets);
    const MicroBatch b = batch_of(tokens, positions, segments, targets.data(), 0);
    LossSum sum;
    {
        nb::gil_scoped_release release;
        sum = e.evaluate(b);
    }
    return as_tuple(sum);
}

static nb::object token_nats(Engine & e, IntArray tokens, IntArray positions, IntArray segments,
                             IntArray targets) {
    check_targets(tokens, targets);
    const MicroBatch b = batch_of(tokens, positions, segments, targets.data(), 0);
    float * data;
    nb::object array = new_array((size_t)(b.B * b.T), {(size_t)b.B, (size_t)b.T}, data);
    nb::gil_scoped_release release;
    e.token_nats(b, data);
    return array;
}

static nb::object logits(Engine & e, IntArray tokens, IntArray positions, IntArray segments) {
    const MicroBatch b = batch_of(tokens, positions, segments, nullptr, 0);
    const size_t V = (size_t)e.model().hparams.n_vocab;
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

static nb::list parameters(Engine & e) {
    nb::list result;
    for (const Parameter & p : e.lora().parameters()) {
        result.append(nb::make_tuple(p.name, nb::make_tuple(p.ne1, p.ne0)));
    }
    return result;
}

static const Parameter & parameter(Engine & e, const std::string & name) {
    for (const Parameter & p : e.lora().parameters()) {
        if (p.name == name) {
            return p;
        }
    }
    fail(ErrorKind::input, "no trainable tensor is called '" + name + "'");
}

static nb::object get_tensor(Engine & e, const std::string & name, const std::string & which) {
    const Parameter & p = parameter(e, name);
    float * data;
    nb::object array = new_array((size_t)(p.ne0 * p.ne1), {(size_t)p.ne1, (size_t)p.ne0}, data);
    e.lora().get(name, which, data);
    return array;
}

static void set_tensor(Engine & e, const std::string & name, const std::string & which,
                       FloatArray array) {
    const Parameter & p = parameter(e, name);
    require(array.ndim() == 2 && (int64_t)array.shape(0) == p.ne1 &&
                (int64_t)array.shape(1) == p.ne0,
            ErrorKind::input,
            name + " has shape (" + std::to_string(p.ne1) + ", " + std::to_string(p.ne0) +
                "), the array differs");
    e.lora().set(name, which, array.data());
}

static nb::dict info(Engine & e) {
    nb::dict d;
    d["device"] = ggml_backend_dev_name(e.device());
    d["device_description"] = ggml_backend_dev_description(e.device());
    d["kernels"] = e.kernels();
    const bool fast = e.config().mode == Mode::fast;
    d["precision"] = fast ? "fast" : "f32";
    d["products"] = std::string(e.kernels()) != "fused" ? "ggml's types"
                    : fast                              ? fast_format()
                                                        : "F32";
    d["threads"] = e.config().threads;
    d["ggml_version"] = ggml_version();
    d["architecture"] = e.model().hparams.arch;
    d["n_vocab"] = e.model().hparams.n_vocab;
    d["n_params_matmul"] = e.model().n_params_matmul();
    d["base_bytes"] = e.model().bytes();
    d["base_mapped"] = e.model().mapped();
    nb::dict buffers;
    for (const auto & [name, bytes] : e.buffer_bytes()) {
        buffers[name.c_str()] = bytes;
    }
    d["buffers"] = buffers;
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

    m.def("set_log", &set_log, "callable"_a.none());
    m.def("devices", &devices);
    m.def("build_info", &build_info);
    m.def("deny_family", &deny_family, "family"_a);
    nb::class_<Engine>(m, "Engine")
        .def(nb::new_(&open_engine), "paths"_a, nb::kw_only(), "targets"_a, "layer_first"_a,
             "layer_last"_a, "rank"_a, "alpha"_a, "dropout"_a, "precision"_a, "device"_a,
             "kernels"_a, "threads"_a, "keep"_a, "prepacked_bytes"_a, "n_rows"_a, "n_tokens"_a,
             "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "max_grad_norm"_a)
        .def("forward_backward", &forward_backward, "tokens"_a, "positions"_a, "segments"_a,
             "targets"_a, "seed"_a)
        .def("evaluate", &evaluate, "tokens"_a, "positions"_a, "segments"_a, "targets"_a)
        .def("token_nats", &token_nats, "tokens"_a, "positions"_a, "segments"_a, "targets"_a)
        .def("logits", &logits, "tokens"_a, "positions"_a, "segments"_a)
        .def("probe", &probe, "op"_a, "tokens"_a, "positions"_a, "segments"_a, "targets"_a,
             "seed"_a, "arrays"_a)
        .def("dropout_mask", &dropout_mask, "id"_a, "n_rows"_a, "n_tokens"_a, "width"_a, "seed"_a)
        .def("optimizer_step", &Engine::optimizer_step, "lr"_a, "n_targets"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def("zero_grad", [](Engine & e) { e.lora().zero_grad(); })
        .def("parameters", &parameters)
        .def("get_tensor", &get_tensor, "name"_a, "which"_a)
        .def("set_tensor", &set_tensor, "name"_a, "which"_a, "array"_a)
        .def_rw("step", &Engine::step)
        .def("cancel", &Engine::cancel)
        .def("info", &info)
        .def("graph_report", &graph_report, "gpu"_a = false)
        .def("set_profiling", &Engine::set_profiling, "on"_a)
        .def("profile", &Engine::profile);
}
