// Weights kept as panels ("prepacked", as in oneDNN and ONNX Runtime): a product with the same
// weight as an earlier one in the same direction reads its panels instead of dequantizing it again.
// They take about two bytes an element and direction, four in F32.
#pragma once

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/gemm/gemm.h"
#include "kernels/isa/memory.h"

namespace ggft {

struct KernelSet;

/// The panels of a weight in one direction: made by the first product, read by all that follow. The
/// threads of a product make and read different ones.
struct Prepacked {
    uint32_t * words;
    char * made; // flags, by chunk of the reduction and panel
};

/// Larger ones are not kept, so that an output matrix takes no more memory in large vocabularies.
inline constexpr size_t PREPACKED_MOST = 128u << 20;

/// Bytes of w's panels in one direction; 0 if it is too large to keep them. Of w only type and
/// shape are read.
size_t prepacked_bytes(const KernelSet & kernels, Format format, const Weight & w, bool nt);

/// Those of as many weights as `limit` bytes hold, first come, first served; of none where there is
/// no memory.
class PrepackedWeights {
public:
    PrepackedWeights(const KernelSet & kernels, Format format, size_t limit);

    /// W as the products read it: with its panels, if it is among those that have some. One thread.
    Weight with_panels(Weight w, bool nt);
    size_t bytes() const { return used_ * 4; }

private:
    struct Kept {
        std::vector<char> made;
        Prepacked panels;
    };
    const KernelSet & kernels_;
    Format format_;
    Words memory_;
    size_t words_ = 0, used_ = 0;
    std::map<std::pair<const void *, bool>, std::optional<Kept>> weights_;
};

} // namespace ggft
