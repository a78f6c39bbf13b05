// Exceptions of the native module. Everything a user can get wrong is checked before ggml could
// assert, and thrown as one of these; ggft/engine.py turns the kind into an exit code.
#pragma once

#include <stdexcept>
#include <string>

namespace ggft {

enum class ErrorKind { input, resource, numeric, cancelled };

class Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string & message) : std::runtime_error(message), kind(kind) {}
    const ErrorKind kind;
};

[[noreturn]] inline void fail(ErrorKind kind, const std::string & message) {
    throw Error(kind, message);
}

inline void require(bool ok, ErrorKind kind, const std::string & message) {
    if (!ok) {
        fail(kind, message);
    }
}

} // namespace ggft
