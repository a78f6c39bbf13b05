// All kernels of an instruction set, and the choice of one on this machine.
//
// Kernels are compiled once for each instruction set that the compiler can make
// (kernels/CMakeLists.txt), all into one library. The best one that the processor runs is taken;
// the environment variable GGFT_ISA names another.
#pragma once

#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/calibrate/calibrate.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/lora.h"
#include "kernels/rowwise/cross_entropy.h"
#include "kernels/rowwise/rowwise.h"

namespace ggft {

struct KernelSet {
    const char * name; // of the instruction set
    Format fast;       // what it multiplies fastest
    uint32_t needs;    // CpuFeature
    const GemmKernels & gemm;
    const LoraKernels & lora;
    const AttentionKernels & attention;
    const RowwiseKernels & rowwise;
    const LossKernels & loss;
    const CalibrateKernels & calibrate;
};

/// What a processor, and the system on it, must have.
enum CpuFeature : uint32_t {
    CPU_AVX2 = 1, // with FMA, F16C, BMI and BMI2
    CPU_AVX_VNNI = 2,
    CPU_AVX512 = 4, // F, BW, DQ and VL
    CPU_AVX512_VNNI = 8,
    CPU_AVX512_BF16 = 16,
};

/// Those that GGFT_ISA names, else the best that this machine runs. Throws Error.
const KernelSet & find_kernels();

/// The names of those that this machine runs, best first.
std::vector<std::string> runnable_isas();

} // namespace ggft
