#include "trace/log.h"

namespace ggft {

static std::mutex mutex;

HeldLog::HeldLog() : lock_(mutex) {
    llama_log_get(&callback_, &data_);
    llama_log_set(listen, this);
}

HeldLog::~HeldLog() {
    llama_log_set(callback_, data_);
}

std::string HeldLog::first_error() const {
    const size_t colon = text_.find(": ");
    const bool named = colon != std::string::npos && text_.find(' ') == colon + 1;
    std::string text = named ? text_.substr(colon + 2) : text_;
    text.erase(text.find_last_not_of(" \n") + 1);
    return text.empty() ? "no reason given" : text;
}

void HeldLog::listen(ggml_log_level level, const char * text, void * self) {
    auto * log = (HeldLog *)self;
    if (level == GGML_LOG_LEVEL_ERROR && log->text_.empty()) {
        log->text_ = text;
    }
}

} // namespace ggft
