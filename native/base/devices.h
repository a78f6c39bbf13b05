// The compute devices that this build of llama.cpp knows.
#pragma once

#include "ggml-cpp.h"

#include <string>
#include <vector>

namespace ggft {

struct DeviceInfo {
    std::string name, description, type; // type: cpu, gpu, igpu or accelerator
    size_t memory_free, memory_total;    // bytes
    bool host_pointer;                   // reads mapped files without a copy
    bool trains;                         // has the operations of the training graphs
};

std::vector<DeviceInfo> list_devices();

// By device name or family, case ignored; "auto" prefers a GPU that trains. Throws Error(resource).
ggml_backend_dev_t find_device(const std::string & name);

// Throws Error(resource), also where so many threads cannot be started.
ggml_backend_ptr open_device(ggml_backend_dev_t device, int threads);

} // namespace ggft
