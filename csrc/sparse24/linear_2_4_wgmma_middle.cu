#include "linear_2_4_wgmma.cuh"

namespace surgeon {

extern const Kernel24 kWgmmaMiddle[5];
const Kernel24 kWgmmaMiddle[5] = {
    wgmma_kernel<96, 2, 5, 2, 5>(),  wgmma_kernel<96, 3, 4, 2, 4>(),  wgmma_kernel<128, 2, 4, 2, 4>(),
    wgmma_kernel<128, 3, 4, 2, 3>(), wgmma_kernel<160, 2, 7, 1, 4>(),
};

}  // namespace surgeon
