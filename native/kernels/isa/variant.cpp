// The kernels of one instruction set. Constants: nothing of it runs before it has been chosen.
#include "kernels/isa/dispatch.h"
#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {

extern const GemmKernels gemm_kernels;
extern const LoraKernels lora_kernels;
extern const AttentionKernels attention_kernels;
extern const RowwiseKernels rowwise_kernels;
extern const LossKernels loss_kernels;
extern const CalibrateKernels calibrate_kernels;

namespace {

constexpr uint32_t needs() {
    uint32_t features = 0;
#if defined(__AVX2__)
    features |= CPU_AVX2;
#endif
#if defined(__AVXVNNI__)
    features |= CPU_AVX_VNNI;
#endif
#if defined(__AVX512F__)
    features |= CPU_AVX512;
#endif
#if defined(__AVX512VNNI__)
    features |= CPU_AVX512_VNNI;
#endif
#if defined(__AVX512BF16__)
    features |= CPU_AVX512_BF16;
#endif
    return features;
}

} // namespace

extern const KernelSet kernels;
const KernelSet kernels = {GGFT_ISA_NAME,   FAST,         needs(),
                           gemm_kernels,    lora_kernels, attention_kernels,
                           rowwise_kernels, loss_kernels, calibrate_kernels};

} // namespace ggft::GGFT_ISA_NAMESPACE
