#include "linear_2_4_wgmma.cuh"

namespace surgeon {

#define SURGEON_KERNEL(BN, MI, STAGES, BLOCKS, GROUP, PREFETCH, LOOP, OVERLAP)             \
  {BN, 128 * MI, 1, LOOP, OVERLAP,                                                        \
   {launch_linear_2_4_wgmma<__nv_bfloat16, BN, MI, STAGES, BLOCKS, GROUP, PREFETCH, LOOP>, \
    launch_linear_2_4_wgmma<__half, BN, MI, STAGES, BLOCKS, GROUP, PREFETCH, LOOP>}}

// In the order of Wgmma24; tile sizes, stages, groups, prefetch and overlap by measurement on an H200. Loops need
// registers: where two blocks share a multiprocessor, one begins while the other ends. A prefetch pays where few blocks
// read the same rows of W: 128 rows to a block, all or most tokens in its tile.
const Kernel24& linear_2_4_wgmma_kernel(int which) {
  static const Kernel24 kernels[kWgmmaCount] = {
      SURGEON_KERNEL(32, 1, 6, 2, 4, 0, false, Overlap::kLate),
      SURGEON_KERNEL(64, 1, 5, 2, 4, 0, false, Overlap::kLate),
      SURGEON_KERNEL(128, 1, 3, 2, 4, 0, false, Overlap::kEarly),
      SURGEON_KERNEL(128, 1, 6, 1, 2, 4, true, Overlap::kEarly),
      SURGEON_KERNEL(128, 2, 6, 1, 2, 0, true, Overlap::kEarly),
      SURGEON_KERNEL(256, 1, 3, 1, 2, 4, true, Overlap::kEarly),
  };
  return kernels[which];
}

}  // namespace surgeon
