#include "linear_2_4_wgmma.cuh"

namespace surgeon {

extern const Kernel24 kWgmmaNarrow[10];
const Kernel24 kWgmmaNarrow[10] = {
    wgmma_kernel<32, 3, 6, 2, 5>(),    wgmma_kernel<64, 2, 6, 2, 6>(),    wgmma_kernel<64, 3, 5, 2, 4>(),
    wgmma_kernel<8, 2, 6, 2, 5, 2>(),  wgmma_kernel<16, 2, 4, 2, 5, 2>(), wgmma_kernel<32, 2, 3, 2, 4, 2>(),
    wgmma_kernel<64, 2, 5, 1, 3, 2>(), wgmma_kernel<16, 1, 6, 2, 8, 2>(), wgmma_kernel<32, 1, 4, 2, 8, 2>(),
    wgmma_kernel<64, 1, 5, 1, 6, 2>(),
};

}  // namespace surgeon
