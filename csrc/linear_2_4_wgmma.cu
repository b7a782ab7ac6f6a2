#include "linear_2_4_wgmma.cuh"

namespace surgeon {

#define SURGEON_KERNEL(BN, MI, STAGES, BLOCKS, UNITS, GROUP, PREFETCH, OVERLAP)                              \
  {BN, 128 * MI, 1, OVERLAP,                                                                                \
   {launch_linear_2_4_wgmma<__nv_bfloat16, BN, MI, STAGES, BLOCKS, UNITS, GROUP, PREFETCH>,                 \
    launch_linear_2_4_wgmma<__half, BN, MI, STAGES, BLOCKS, UNITS, GROUP, PREFETCH>}}

// In the order of Wgmma24; tile sizes, stages and overlap by measurement on an H200.
const Kernel24& linear_2_4_wgmma_kernel(int which) {
  static const Kernel24 kernels[kWgmmaCount] = {
      SURGEON_KERNEL(32, 1, 6, 2, 2, 4, 0, Overlap::kLate),
      SURGEON_KERNEL(64, 1, 5, 2, 2, 4, 0, Overlap::kLate),
      SURGEON_KERNEL(128, 1, 3, 2, 1, 1, 0, Overlap::kEarly),
      SURGEON_KERNEL(128, 2, 6, 1, 2, 2, 0, Overlap::kEarly),
  };
  return kernels[which];
}

}  // namespace surgeon
