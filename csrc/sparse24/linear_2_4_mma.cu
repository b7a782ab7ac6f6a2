#include "linear_2_4_mma.cuh"

namespace surgeon {

// Tiles, stages and overlap: tried by hand on an H200, where `python -m bench.kernels.linear_2_4` times them.
struct Mma8Narrow {
  static constexpr int kTokenMmas = 1, kRowMmas = 1, kWarpsM = 1, kWarpsK = 16, kStages = 2, kMinBlocks = 2;
};
struct Mma8 {
  static constexpr int kTokenMmas = 1, kRowMmas = 4, kWarpsM = 1, kWarpsK = 4, kStages = 3, kMinBlocks = 3;
};
struct Mma16 {
  static constexpr int kTokenMmas = 2, kRowMmas = 2, kWarpsM = 4, kWarpsK = 2, kStages = 3, kMinBlocks = 2;
};
struct Mma32 {
  static constexpr int kTokenMmas = 4, kRowMmas = 2, kWarpsM = 4, kWarpsK = 2, kStages = 3, kMinBlocks = 2;
};

namespace {

template <class Config>
constexpr Kernel24 kernel(Overlap overlap) {
  using Tile = MmaTile<Config>;
  return {Tile::kTokens,
          Tile::kRows,
          Config::kWarpsK,
          1,
          false,
          overlap,
          {launch_linear_2_4_mma<__nv_bfloat16, Config>, launch_linear_2_4_mma<__half, Config>}};
}

}  // namespace

const Kernel24& linear_2_4_mma_kernel(int which) {
  // In the order of Mma24.
  static const Kernel24 kernels[kMmaCount] = {kernel<Mma8Narrow>(Overlap::kEarly), kernel<Mma8>(Overlap::kEarly),
                                              kernel<Mma16>(Overlap::kLate), kernel<Mma32>(Overlap::kLate)};
  return kernels[which];
}

}  // namespace surgeon
