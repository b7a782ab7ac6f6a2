#include "linear_2_4_wgmma.cuh"

namespace surgeon {

// Tiles and stages: tried by hand on an H200, where `python -m bench.kernels.linear_2_4` times them.
struct Wgmma32 {
  static constexpr int kTokens = 32, kConsumers = 3, kStages = 6, kBoxes = 2, kWeightStages = 5;
};
struct Wgmma64 {
  static constexpr int kTokens = 64, kConsumers = 2, kStages = 6, kBoxes = 2, kWeightStages = 6;
};
struct Wgmma64Wide {
  static constexpr int kTokens = 64, kConsumers = 3, kStages = 5, kBoxes = 2, kWeightStages = 4;
};
struct Wgmma128 {
  static constexpr int kTokens = 128, kConsumers = 2, kStages = 4, kBoxes = 2, kWeightStages = 4;
};
struct Wgmma128Wide {
  static constexpr int kTokens = 128, kConsumers = 3, kStages = 4, kBoxes = 2, kWeightStages = 3;
};
struct Wgmma256 {
  static constexpr int kTokens = 256, kConsumers = 2, kStages = 5, kBoxes = 1, kWeightStages = 3;
};

namespace {

template <class Config>
constexpr Kernel24 kernel() {
  using Tile = WgmmaTile<Config>;
  return {Tile::kTokens,
          Tile::kRows,
          1,
          Overlap::kEarly,
          {launch_linear_2_4_wgmma<__nv_bfloat16, Config>, launch_linear_2_4_wgmma<__half, Config>}};
}

}  // namespace

const Kernel24& linear_2_4_wgmma_kernel(int which) {
  // In the order of Wgmma24.
  static const Kernel24 kernels[kWgmmaCount] = {kernel<Wgmma32>(),  kernel<Wgmma64>(),      kernel<Wgmma64Wide>(),
                                                kernel<Wgmma128>(), kernel<Wgmma128Wide>(), kernel<Wgmma256>()};
  return kernels[which];
}

}  // namespace surgeon
