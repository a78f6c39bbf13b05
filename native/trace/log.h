// llama.cpp's log, which is one for the whole process.
#pragma once

#include <llama.h>

#include <mutex>
#include <string>

namespace ggft {

// Keeps the log to itself, and the first error in it, then gives the log back to whoever had it.
class HeldLog {
public:
    HeldLog();
    ~HeldLog();

    // Without the name of the function that wrote it.
    std::string first_error() const;

private:
    static void listen(ggml_log_level level, const char * text, void * self);

    std::lock_guard<std::mutex> lock_;
    ggml_log_callback callback_ = nullptr;
    void * data_ = nullptr;
    std::string text_;
};

} // namespace ggft
