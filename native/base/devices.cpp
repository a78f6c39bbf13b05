#include "base/devices.h"

#include "base/error.h"
#include "base/graph.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <mutex>
#include <thread>

namespace ggft {

static const char * type_name(ggml_backend_dev_t device) {
    switch (ggml_backend_dev_type(device)) {
    case GGML_BACKEND_DEVICE_TYPE_CPU:
        return "cpu";
    case GGML_BACKEND_DEVICE_TYPE_GPU:
        return "gpu";
    case GGML_BACKEND_DEVICE_TYPE_IGPU:
        return "igpu";
    default:
        return "accelerator";
    }
}

static std::vector<ggml_backend_dev_t> all_devices() {
    if (ggml_backend_dev_count() == 0) {
        ggml_backend_load_all();
    }
    std::vector<ggml_backend_dev_t> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        devices.push_back(ggml_backend_dev_get(i));
    }
    return devices;
}

// Asks for one of each operation that older and virtual GPUs lack; the real graphs are checked when
// an engine opens.
static bool trains(ggml_backend_dev_t device) {
    Graph g(64);
    ggml_context * c = g.ctx();
    auto floats = [&](int64_t n0, int64_t n1, int64_t n2 = 1) {
        return ggml_new_tensor_3d(c, GGML_TYPE_F32, n0, n1, n2);
    };
    Tensor w = ggml_new_tensor_2d(c, GGML_TYPE_Q4_0, 256, 64), x = floats(256, 32);
    Tensor ids = ggml_new_tensor_1d(c, GGML_TYPE_I32, 32);
    Tensor mask = ggml_new_tensor_2d(c, GGML_TYPE_F16, 32, 32);
    Tensor value = floats(256, 32);
    ggml_set_param(value);
    const std::vector<Tensor> nodes = {
        ggml_mul_mat(c, w, x),
        ggml_rms_norm(c, x, 1e-5f),
        ggml_soft_max_ext(c, floats(32, 32, 4), mask, 1.0f, 0.0f),
        ggml_rope_ext_back(c, floats(64, 4, 32), ids, nullptr, 64, GGML_ROPE_TYPE_NEOX, 0, 10000.0f,
                           1.0f, 0.0f, 1.0f, 32.0f, 1.0f),
        ggml_silu_back(c, x, floats(256, 32)),
        ggml_sum_rows(c, x),
        ggml_get_rows(c, w, ids),
        ggml_set_rows(c, floats(256, 64), x, ids),
        ggml_opt_step_adamw(c, value, x, floats(256, 32), floats(256, 32), floats(7, 1)),
    };
    return std::all_of(nodes.begin(), nodes.end(), [device](Tensor node) {
        return ggml_backend_dev_supports_op(device, node);
    });
}

std::vector<DeviceInfo> list_devices() {
    std::vector<DeviceInfo> result;
    for (ggml_backend_dev_t device : all_devices()) {
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(device, &props);
        result.push_back({ggml_backend_dev_name(device), ggml_backend_dev_description(device),
                          type_name(device), props.memory_free, props.memory_total,
                          props.caps.buffer_from_host_ptr, trains(device)});
    }
    return result;
}

static bool same_word(const std::string & a, const std::string & b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char x, unsigned char y) {
        return std::tolower(x) == std::tolower(y);
    });
}

ggml_backend_dev_t find_device(const std::string & name) {
    const auto devices = all_devices();
    if (name == "auto") {
        for (const auto type : {GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU,
                                GGML_BACKEND_DEVICE_TYPE_CPU}) {
            for (ggml_backend_dev_t device : devices) {
                if (ggml_backend_dev_type(device) == type && trains(device)) {
                    return device;
                }
            }
        }
    }
    std::string names;
    for (ggml_backend_dev_t device : devices) {
        const char * family = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
        // ggml calls Metal's registry MTL.
        const bool metal = same_word(name, "metal") && same_word(family, "MTL");
        if (metal || same_word(name, family) || same_word(name, ggml_backend_dev_name(device))) {
            return device;
        }
        names += std::string(names.empty() ? "" : ", ") + ggml_backend_dev_name(device);
    }
    fail(ErrorKind::resource, "device '" + name + "' does not exist here (found: " + names + ")");
}

// ggml's threads come from OpenMP, which ends the process where they cannot be had.
static void require_threads(int n) {
    std::mutex all_started;
    std::vector<std::thread> threads;
    bool ok = true;
    {
        std::lock_guard<std::mutex> lock(all_started);
        try {
            for (int i = 0; i < n; i++) {
                threads.emplace_back([&] { std::lock_guard<std::mutex> wait(all_started); });
            }
        } catch (const std::exception &) {
            ok = false;
        }
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    require(ok, ErrorKind::resource,
            "cannot start " + std::to_string(n) + " threads: out of memory or above a limit");
}

ggml_backend_ptr open_device(ggml_backend_dev_t device, int threads) {
    require_threads(threads);
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    require(backend != nullptr, ErrorKind::resource,
            std::string("device ") + ggml_backend_dev_name(device) + " cannot be opened");
    auto set_threads = (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");
    if (set_threads != nullptr) {
        set_threads(backend.get(), threads);
    }
    return backend;
}

} // namespace ggft
