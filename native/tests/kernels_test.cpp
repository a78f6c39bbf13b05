// Tests of the CPU kernels against naive loops in double; with "bench [threads]", their speed.
#include "kernels_test.h"

#include <cstdlib>

#include <cstring>

int main(int argc, char ** argv) {
    ggml_init_params params = {1 << 20, nullptr, false};
    ggml_free(ggml_init(params)); // fills ggml's F16 tables
    if (argc > 1 && std::strcmp(argv[1], "bench") == 0) {
        const int nth = argc > 2 ? std::atoi(argv[2]) : 2;
        ggft_test::bench_gemm(nth);
        ggft_test::bench_rows(nth);
        ggft_test::bench_attention(nth);
        return 0;
    }
    ggft_test::test_gemm();
    ggft_test::test_rows();
    ggft_test::test_attention();
    std::printf(ggft_test::failures ? "%d failures\n" : "all passed\n", ggft_test::failures);
    return ggft_test::failures ? 1 : 0;
}
