#include "linear_2_4_wgmma.cuh"

namespace surgeon {

extern const Kernel24 kWgmmaShared[6];
const Kernel24 kWgmmaShared[6] = {
    wgmma_kernel<128, 2, 4, 2, 4, 1, 2>(), wgmma_kernel<192, 3, 5, 1, 3, 1, 2>(), wgmma_kernel<256, 2, 5, 1, 3, 1, 2>(),
    wgmma_kernel<160, 3, 6, 1, 3, 1, 2>(), wgmma_kernel<64, 2, 6, 2, 6, 1, 2>(),  wgmma_kernel<96, 2, 5, 2, 5, 1, 2>(),
};

}  // namespace surgeon
