#include "linear_2_4_wgmma.cuh"

namespace surgeon {

extern const Kernel24 kWgmmaWide[5];
const Kernel24 kWgmmaWide[5] = {
    wgmma_kernel<160, 3, 6, 1, 3>(), wgmma_kernel<192, 2, 5, 1, 4>(), wgmma_kernel<192, 3, 5, 1, 3>(),
    wgmma_kernel<224, 2, 5, 1, 4>(), wgmma_kernel<256, 2, 5, 1, 3>(),
};

}  // namespace surgeon
