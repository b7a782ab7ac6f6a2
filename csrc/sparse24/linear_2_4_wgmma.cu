#include "linear_2_4_wgmma.cuh"

namespace surgeon {

#define SURGEON_KERNEL(BN, WG, STAGES, HALVES, WSTAGES)                        \
  {                                                                            \
    BN, 64 * WG, 1, Overlap::kEarly, {                                         \
      launch_linear_2_4_wgmma<__nv_bfloat16, BN, WG, STAGES, HALVES, WSTAGES>, \
          launch_linear_2_4_wgmma<__half, BN, WG, STAGES, HALVES, WSTAGES>     \
    }                                                                          \
  }

// In the order of Wgmma24; tile sizes and stages by measurement on an H200.
const Kernel24& linear_2_4_wgmma_kernel(int which) {
  static const Kernel24 kernels[kWgmmaCount] = {
      SURGEON_KERNEL(32, 3, 6, 2, 5),  SURGEON_KERNEL(64, 2, 6, 2, 6),  SURGEON_KERNEL(64, 3, 5, 2, 4),
      SURGEON_KERNEL(128, 2, 4, 2, 4), SURGEON_KERNEL(128, 3, 4, 2, 3), SURGEON_KERNEL(256, 2, 5, 1, 3),
  };
  return kernels[which];
}

}  // namespace surgeon
