// The 2:4 linear for few tokens: weights stream once from memory into the registers of mma.sp, which takes W as its
// sparse operand. Tokens are the narrow side, so the time is that of reading the packed weight.
//
// A block computes a tile of y; a step of its mainloop is kWarpsK units of K, one to a warp.
//
//        prologue                     mainloop                                      epilogue
//        ────────                     ────────                                      ────────
//   W    ld unit 0 into registers     ld of the next unit follows each mma.sp       sums ─> shared memory
//   x    wait for previous kernel     wait for the stage, __syncthreads             add kWarpsK warps
//        cp.async 0 .. kStages-2      cp.async step + kStages - 1 ─> free stage     add the cluster (split-K)
//                                     ldmatrix <─ stage of this step, mma.sp        bias, activation, st y
#pragma once

#include "linear_2_4_epilogue.cuh"
#include "linear_2_4_launch.h"

namespace surgeon {

// Config names, all int:
//   kTokenMmas, kRowMmas  mma.sp of 8 tokens and of 16 rows in a warp's tile
//   kWarpsM, kWarpsK      warps along the rows, and along a step of the mainloop, one unit each
//   kStages               of x in shared memory
//   kMinBlocks            resident on a multiprocessor, for __launch_bounds__
template <class Config>
struct MmaTile {
  static constexpr int kThreads = 32 * Config::kWarpsM * Config::kWarpsK;
  static constexpr int kRows = 16 * Config::kRowMmas * Config::kWarpsM;
  static constexpr int kTokens = 8 * Config::kTokenMmas;
  static constexpr int kColumns = Config::kWarpsK * kUnitColumns;
  static constexpr int kPitch = kColumns + 8;  // of a token, in elements: rows of ldmatrix fall in different banks
  static constexpr int kSumPitch = kRows + 4;  // of a token's partial sums
  static constexpr int kStageBytes = kTokens * kPitch * 2;
  static constexpr int kPipelineBytes = Config::kStages * kStageBytes;
  static constexpr int kSumBytes = Config::kWarpsK * kTokens * kSumPitch * 4;  // in place of the stages
  static constexpr int kSharedBytes = kPipelineBytes > kSumBytes ? kPipelineBytes : kSumBytes;

  static_assert(kThreads <= 1024, "a block has no more threads");
  static_assert(Config::kStages >= 2, "a stage is filled while another is read");
  static_assert(Config::kMinBlocks * kThreads <= 1536, "not every multiprocessor holds more threads");
};

template <class T, class Config>
__global__ void __launch_bounds__(MmaTile<Config>::kThreads, Config::kMinBlocks) linear_2_4_mma(const Linear24 p) {
  using Tile = MmaTile<Config>;
  constexpr int kRowMmas = Config::kRowMmas, kTokenMmas = Config::kTokenMmas, kWarpsK = Config::kWarpsK;
  constexpr int kStages = Config::kStages;
  extern __shared__ __align__(128) uint8_t shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int warp_m = warp % Config::kWarpsM, warp_k = warp / Config::kWarpsM;
  const int split = gridDim.x, rank = blockIdx.x;
  const int token0 = blockIdx.y * Tile::kTokens, row0 = blockIdx.z * Tile::kRows;
  const int valid = min(Tile::kTokens, p.tokens - token0);
  const int begin = p.units * rank / split, end = p.units * (rank + 1) / split;
  const int steps = (end - begin + kWarpsK - 1) / kWarpsK;
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();

  // Prologue: the first unit of every row block of this warp, in flight before x is touched.
  const int row_blocks = (p.rows + 15) / 16;
  const uint8_t* weight[kRowMmas];
  uint4 a[kRowMmas][4];
  uint2 e[kRowMmas];
#pragma unroll
  for (int m = 0; m < kRowMmas; ++m) {
    // Rows past the end repeat the last block, unstored.
    const int block = min(row0 / 16 + warp_m * kRowMmas + m, row_blocks - 1);
    const int unit = min(begin + warp_k, p.units - 1);
    weight[m] = static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(block) * p.units + unit) * kUnitBytes;
#pragma unroll
    for (int s = 0; s < 4; ++s) a[m][s] = load_stream(weight[m] + s * 512 + lane * 16);
    e[m] = load_stream2(weight[m] + kUnitPositionsAt + lane * 8);
  }

  // Tokens past the end are zero in every stage, written once.
  const uint32_t stages = shared_address(shared);
  for (int i = thread; i < kStages * (Tile::kTokens - valid) * (Tile::kPitch / 8); i += Tile::kThreads) {
    const int row = i / (Tile::kPitch / 8), stage = row / (Tile::kTokens - valid);
    const int token = valid + row % (Tile::kTokens - valid);
    reinterpret_cast<uint4*>(shared)[(stage * Tile::kTokens + token) * (Tile::kPitch / 8) + i % (Tile::kPitch / 8)] =
        make_uint4(0, 0, 0, 0);
  }
  const T* x = static_cast<const T*>(p.x) + static_cast<size_t>(token0) * p.columns;
  auto copy_x = [&](int step) {
    if (step < steps) {
      const int column0 = (begin + step * kWarpsK) * kUnitColumns;
      const uint32_t to = stages + (step % kStages) * Tile::kStageBytes;
      for (int i = thread; i < valid * (Tile::kColumns / 8); i += Tile::kThreads) {
        const int token = i / (Tile::kColumns / 8), column = i % (Tile::kColumns / 8) * 8;
        const bool inside = column0 + column < p.columns;
        copy_async(to + (token * Tile::kPitch + column) * 2,
                   inside ? x + static_cast<size_t>(token) * p.columns + column0 + column : x, inside ? 16 : 0);
      }
    }
    commit_copies();
  };
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy_x(s);

  // Mainloop.
  float sums[kRowMmas][kTokenMmas][4] = {};
  const uint32_t fragment = stages + ((lane % 8) * Tile::kPitch + warp_k * kUnitColumns + lane / 8 * 8) * 2;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    copy_x(step + kStages - 1);
    const int unit = begin + step * kWarpsK + warp_k;
    if (unit < end) {
      const bool more = unit + kWarpsK < end;
      const uint32_t tile = fragment + (step % kStages) * Tile::kStageBytes;
      uint2 next[kRowMmas];
#pragma unroll
      for (int m = 0; m < kRowMmas; ++m) {
        weight[m] += kWarpsK * kUnitBytes;
        next[m] = more ? load_stream2(weight[m] + kUnitPositionsAt + lane * 8) : e[m];
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int n = 0; n < kTokenMmas; ++n) {
          const uint4 b = load_matrices(tile + (n * 8 * Tile::kPitch + s * 32) * 2);
#pragma unroll
          for (int m = 0; m < kRowMmas; ++m) {
            if (s % 2 == 0)
              mma_sp<T, 0>(sums[m][n], a[m][s], b, s / 2 ? e[m].y : e[m].x);
            else
              mma_sp<T, 1>(sums[m][n], a[m][s], b, s / 2 ? e[m].y : e[m].x);
          }
        }
        if (more) {
#pragma unroll
          for (int m = 0; m < kRowMmas; ++m) a[m][s] = load_stream(weight[m] + s * 512 + lane * 16);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowMmas; ++m) e[m] = next[m];
    }
  }
  if (p.overlap == Overlap::kLate) let_next_kernel_start();
  wait_copies<0>();
  __syncthreads();

  // Epilogue: partial sums of the warps that share rows, then of the blocks that share them, each added in a fixed
  // order.
  float* partial = reinterpret_cast<float*>(shared);  // [kWarpsK][kTokens][kSumPitch]
#pragma unroll
  for (int m = 0; m < kRowMmas; ++m) {
    const int first = row0 + (warp_m * kRowMmas + m) * 16 + lane / 4;
    const float bias[2] = {warp_k == 0 ? load_bias<T>(p, first, rank) : 0.f,
                           warp_k == 0 ? load_bias<T>(p, first + 8, rank) : 0.f};
#pragma unroll
    for (int n = 0; n < kTokenMmas; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, row = (warp_m * kRowMmas + m) * 16 + lane / 4 + i / 2 * 8;
        partial[(warp_k * Tile::kTokens + token) * Tile::kSumPitch + row] = sums[m][n][i] + bias[i / 2];
      }
  }
  __syncthreads();
  const int items = valid * (Tile::kRows / 4);
  auto add_warps = [&](int token, int row) {
    float4 sum = *reinterpret_cast<float4*>(partial + token * Tile::kSumPitch + row);
#pragma unroll
    for (int w = 1; w < kWarpsK; ++w) {
      const float4 v = *reinterpret_cast<float4*>(partial + (w * Tile::kTokens + token) * Tile::kSumPitch + row);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
  };
#if __CUDA_ARCH__ >= 900
  if (split > 1) {
    auto cluster = cooperative_groups::this_cluster();
    for (int i = thread; i < items; i += Tile::kThreads) {
      const int token = i / (Tile::kRows / 4), row = i % (Tile::kRows / 4) * 4;
      *reinterpret_cast<float4*>(partial + token * Tile::kSumPitch + row) = add_warps(token, row);
    }
    cluster.sync();
    for (int i = rank * Tile::kThreads + thread; i < items; i += split * Tile::kThreads) {
      const int token = i / (Tile::kRows / 4), row = i % (Tile::kRows / 4) * 4;
      const float4 sum = add_cluster(partial, token * Tile::kSumPitch + row, split);
      store_sums<T>(p, token0 + token, row0 + row, sum);
    }
    cluster.sync();
    return;
  }
#endif
  for (int i = thread; i < items; i += Tile::kThreads) {
    const int token = i / (Tile::kRows / 4), row = i % (Tile::kRows / 4) * 4;
    store_sums<T>(p, token0 + token, row0 + row, add_warps(token, row));
  }
}

template <class T, class Config>
cudaError_t launch_linear_2_4_mma(const Linear24& p, const TileRange24& tiles, cudaStream_t stream, int* capacity) {
  using Tile = MmaTile<Config>;
  auto kernel = linear_2_4_mma<T, Config>;
  static std::atomic<bool> ready[kMaxDevices];
  const cudaError_t status =
      prepare_kernel(reinterpret_cast<const void*>(kernel), Tile::kThreads, Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  if (capacity != nullptr) return count_clusters(kernel, tiles.split, Tile::kThreads, Tile::kSharedBytes, capacity);
  const dim3 grid(tiles.split, (p.tokens + Tile::kTokens - 1) / Tile::kTokens,
                  (p.rows + Tile::kRows - 1) / Tile::kRows);
  const Launch launch(grid, tiles.split, Tile::kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p);
}

}  // namespace surgeon
