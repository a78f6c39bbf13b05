#include "kernels/isa/dispatch.h"

#include <cstdlib>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Of all that were compiled, best first (kernels/CMakeLists.txt).
#define V(isa)                                                                                     \
    namespace ggft::isa {                                                                          \
    extern const KernelSet kernels;                                                                \
    }
GGFT_VARIANTS
#undef V

namespace ggft {
namespace {

#if defined(__x86_64__)
/// Registers that the system saves when it changes threads.
uint32_t saved_registers() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

uint32_t cpu_features() {
    uint32_t eax, ebx, ecx, edx, features = 0;
    const auto all = [](uint32_t word, std::initializer_list<int> bits) {
        for (const int bit : bits) {
            if (!(word >> bit & 1))
                return false;
        }
        return true;
    };
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !all(ecx, {12, 27, 29})) // FMA OSXSAVE F16C
        return 0;
    const uint32_t saved = saved_registers();
    if (!all(saved, {1, 2}) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        !all(ebx, {3, 5, 8})) // BMI AVX2 BMI2
        return 0;
    features |= CPU_AVX2;
    const bool avx512 = all(saved, {5, 6, 7}) && all(ebx, {16, 17, 30, 31}); // F DQ BW VL
    if (avx512)
        features |= CPU_AVX512;
    if (avx512 && (ecx >> 11 & 1))
        features |= CPU_AVX512_VNNI;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
        return features;
    if (eax >> 4 & 1)
        features |= CPU_AVX_VNNI;
    if (avx512 && (eax >> 5 & 1))
        features |= CPU_AVX512_BF16;
    return features;
}
#else
uint32_t cpu_features() {
    return 0;
}
#endif

/// The generic kernels with another format: products that this machine may have no instructions
/// for, so that their arithmetic can be tested anywhere.
KernelSet emulated(const char * name, Format fast) {
    KernelSet k = generic::kernels;
    k.name = name;
    k.fast = fast;
    return k;
}

const std::vector<KernelSet> & all_kernels() {
    static const std::vector<KernelSet> all = {
#define V(isa) isa::kernels,
        GGFT_VARIANTS
#undef V
            emulated("generic-bf16", Format::bf16),
        emulated("generic-i16", Format::i16),
    };
    return all;
}

bool runs(const KernelSet & k) {
    static const uint32_t features = cpu_features();
    return (k.needs & ~features) == 0;
}

} // namespace

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const KernelSet & k : all_kernels()) {
        if (runs(k))
            names.push_back(k.name);
    }
    return names;
}

const KernelSet & find_kernels() {
    const char * given = std::getenv("GGFT_ISA");
    const std::string wanted = given ? given : "";
    bool known = false;
    for (const KernelSet & k : all_kernels()) {
        if (!wanted.empty() && wanted != k.name)
            continue;
        if (runs(k))
            return k;
        known = true;
    }
    std::string names;
    for (const std::string & name : runnable_isas())
        names += (names.empty() ? "" : ", ") + name;
    fail(ErrorKind::input, "GGFT_ISA is '" + wanted + "', " +
                               (known ? "instructions that this processor lacks"
                                      : "which is no instruction set of ggft") +
                               ": unset it, or name one that this machine runs: " + names);
}

} // namespace ggft
