#include "linear_2_4_mma.cuh"

namespace surgeon {

#define SURGEON_KERNEL(NT, MT, WM, WK, STAGES, BLOCKS, OVERLAP)             \
  {                                                                         \
    8 * NT, 16 * MT *WM, WK, OVERLAP, {                                     \
      launch_linear_2_4_mma<__nv_bfloat16, NT, MT, WM, WK, STAGES, BLOCKS>, \
          launch_linear_2_4_mma<__half, NT, MT, WM, WK, STAGES, BLOCKS>     \
    }                                                                       \
  }

// In the order of Mma24; tile sizes, stages and overlap by measurement on an H200.
const Kernel24& linear_2_4_mma_kernel(int which) {
  static const Kernel24 kernels[kMmaCount] = {
      SURGEON_KERNEL(1, 1, 1, 16, 2, 2, Overlap::kEarly),
      SURGEON_KERNEL(1, 4, 1, 4, 3, 3, Overlap::kEarly),
      SURGEON_KERNEL(2, 2, 4, 2, 3, 2, Overlap::kLate),
      SURGEON_KERNEL(4, 2, 4, 2, 3, 2, Overlap::kLate),
  };
  return kernels[which];
}

}  // namespace surgeon
