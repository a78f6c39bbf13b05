// Tests of the CPU kernels that GGFT_ISA names against naive loops in double; with "bench
// [threads]", their speed; with "list", the instruction sets that this machine runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "support.h"

// Of all instruction sets that were compiled (kernels/CMakeLists.txt).
#define V(isa)                                                                                     \
    namespace ggft::isa {                                                                          \
    extern const KernelSet kernels;                                                                \
    extern const ggft_test::Internals internals;                                                   \
    }
GGFT_VARIANTS
#undef V

namespace ggft_test {

const Internals & internals() {
#define V(isa)                                                                                     \
    if (&kernels().gemm == &ggft::isa::kernels.gemm)                                               \
        return ggft::isa::internals;
    GGFT_VARIANTS
#undef V
    std::abort();
}

static int run(int argc, char ** argv) {
    ggml_init_params params = {1 << 20, nullptr, false};
    ggml_free(ggml_init(params)); // fills ggml's F16 tables
    if (argc > 1 && std::strcmp(argv[1], "list") == 0) {
        for (const std::string & name : ggft::runnable_isas())
            std::printf("%s\n", name.c_str());
        return 0;
    }
    std::printf("%s, %s\n", kernels().name, ggft::format_name(kernels().fast));
    if (argc > 1 && std::strcmp(argv[1], "bench") == 0) {
        const int nth = argc > 2 ? std::atoi(argv[2]) : 2;
        bench_gemm(nth);
        bench_lora(nth);
        bench_rowwise(nth);
        bench_attention(nth);
        return 0;
    }
    test_isa();
    test_dequant();
    test_gemm();
    test_lora();
    test_attention();
    test_rowwise();
    std::printf(failures ? "%d failures\n" : "all passed\n", failures);
    return failures ? 1 : 0;
}

} // namespace ggft_test

int main(int argc, char ** argv) {
    try {
        return ggft_test::run(argc, argv);
    } catch (const std::exception & e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 2;
    }
}
