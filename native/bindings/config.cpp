#include "bindings/config.h"

#include "base/error.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace ggft {

namespace {

class Settings {
public:
    explicit Settings(const nb::dict & values) : values_(values) {}

    template <class T> void take(const char * name, T & field) {
        require(values_.contains(name), ErrorKind::input,
                std::string("the engine's setting '") + name + "' is missing");
        require(nb::try_cast(values_[name], field), ErrorKind::input,
                std::string("the engine's setting '") + name +
                    "' has a wrong type or is too large");
        n_taken_++;
    }

    // One of some words, as the index of the word.
    int take_word(const char * name, const std::vector<std::string> & words) {
        std::string value, known;
        take(name, value);
        for (size_t i = 0; i < words.size(); i++) {
            if (value == words[i]) {
                return (int)i;
            }
            known += std::string(i == 0 ? "" : ", ") + words[i];
        }
        fail(ErrorKind::input,
             std::string(name) + " must be one of " + known + ", found '" + value + "'");
    }

    void require_all_taken() const {
        require(nb::len(values_) == n_taken_, ErrorKind::input,
                "the engine was given a setting that it does not have");
    }

private:
    const nb::dict & values_;
    size_t n_taken_ = 0;
};

} // namespace

EngineConfig config_of(const nb::dict & settings) {
    EngineConfig c;
    Settings s(settings);
    s.take("paths", c.paths);
    s.take("targets", c.targets);
    s.take("train", c.lora.train);
    s.take("layer_first", c.lora.layer_first);
    s.take("layer_last", c.lora.layer_last);
    s.take("rank", c.lora.rank);
    s.take("alpha", c.lora.alpha);
    s.take("dropout", c.lora.dropout);
    require(c.lora.dropout >= 0 && c.lora.dropout < 1, ErrorKind::input,
            "dropout must be in [0, 1)");
    c.mode = s.take_word("precision", {"fast", "f32"}) == 0 ? Mode::fast : Mode::f32;
    s.take("device", c.device);
    c.kernels = (Kernels)s.take_word("kernels", {"auto", "fused", "ggml"});
    s.take("threads", c.threads);
    s.take("keep", c.keep);
    s.take("prepacked_bytes", c.prepacked_bytes);
    s.take("n_rows", c.n_rows);
    s.take("n_tokens", c.n_tokens);
    s.take("weight_decay", c.adamw.weight_decay);
    s.take("beta1", c.adamw.beta1);
    s.take("beta2", c.adamw.beta2);
    s.take("eps", c.adamw.eps);
    s.take("max_grad_norm", c.adamw.max_grad_norm);
    s.require_all_taken();
    return c;
}

nb::dict as_dict(const Buffers & buffers) {
    nb::dict d;
    for (const auto & [name, bytes] : buffers) {
        d[name.c_str()] = bytes;
    }
    return d;
}

} // namespace ggft
