// The 2:4 linear for few tokens: weights stream once from memory into the registers of mma.sp, which takes W as its
// sparse operand. Tokens are the narrow side, so the time is that of reading the packed weight.
#pragma once

#include "linear_2_4_store.cuh"

namespace surgeon {

// A block computes 16*MT*WM rows for 8*NT tokens. Its warps are WM along the rows times WK along the columns; a chunk
// is WK units wide, and every warp takes one unit of it. Blocks of a cluster share the columns among them.
template <class T, int NT, int MT, int WM, int WK, int STAGES>
struct MmaTile {
  static constexpr int kThreads = 32 * WM * WK;
  static constexpr int kRows = 16 * MT * WM;
  static constexpr int kTokens = 8 * NT;
  static constexpr int kColumns = WK * kUnitColumns;
  static constexpr int kPitch = kColumns + 8;  // of a token, in elements: rows of ldmatrix fall in different banks
  static constexpr int kSumPitch = kRows + 4;  // of a token's partial sums
  static constexpr int kStageBytes = kTokens * kPitch * 2;
  static constexpr int kSumBytes = WK * kTokens * kSumPitch * 4;
  static constexpr int kSharedBytes = STAGES * kStageBytes > kSumBytes ? STAGES * kStageBytes : kSumBytes;
};

template <class T, int NT, int MT, int WM, int WK, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(32 * WM * WK, BLOCKS) linear_2_4_mma(const Linear24 p) {
  using Tile = MmaTile<T, NT, MT, WM, WK, STAGES>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int wm = warp % WM, wk = warp / WM;
  const int split = gridDim.x, rank = blockIdx.x;
  const int token0 = blockIdx.y * Tile::kTokens, row0 = blockIdx.z * Tile::kRows;
  const int valid = min(Tile::kTokens, p.tokens - token0);
  const int begin = p.units * rank / split, end = p.units * (rank + 1) / split;
  const int chunks = (end - begin + WK - 1) / WK;
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();

  // The first unit of every row block of this warp, in flight before x is touched.
  const int row_blocks = (p.rows + 15) / 16;
  const uint8_t* weight[MT];
  uint4 a[MT][4];
  uint2 e[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int block = min(row0 / 16 + wm * MT + m, row_blocks - 1);  // rows past the end repeat the last, unstored
    const int unit = min(begin + wk, p.units - 1);
    weight[m] = static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(block) * p.units + unit) * kUnitBytes;
#pragma unroll
    for (int s = 0; s < 4; ++s) a[m][s] = load_stream(weight[m] + s * 512 + lane * 16);
    e[m] = load_stream2(weight[m] + 2048 + lane * 8);
  }

  // Tokens past the end are zero in every stage, written once.
  const uint32_t tiles = shared_address(shared);
  for (int i = thread; i < STAGES * (Tile::kTokens - valid) * (Tile::kPitch / 8); i += Tile::kThreads) {
    const int row = i / (Tile::kPitch / 8), stage = row / (Tile::kTokens - valid);
    const int token = valid + row % (Tile::kTokens - valid);
    reinterpret_cast<uint4*>(shared)[(stage * Tile::kTokens + token) * (Tile::kPitch / 8) + i % (Tile::kPitch / 8)] =
        make_uint4(0, 0, 0, 0);
  }
  const T* x = static_cast<const T*>(p.x) + static_cast<size_t>(token0) * p.columns;
  auto load_chunk = [&](int chunk) {
    if (chunk < chunks) {
      const int column0 = (begin + chunk * WK) * kUnitColumns;
      const uint32_t to = tiles + (chunk % STAGES) * Tile::kStageBytes;
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
  for (int s = 0; s < STAGES - 1; ++s) load_chunk(s);

  float sums[MT][NT][4] = {};
  const uint32_t fragment = tiles + ((lane % 8) * Tile::kPitch + wk * kUnitColumns + lane / 8 * 8) * 2;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    load_chunk(chunk + STAGES - 1);
    const int unit = begin + chunk * WK + wk;
    if (unit < end) {
      const bool more = unit + WK < end;
      const uint32_t tile = fragment + (chunk % STAGES) * Tile::kStageBytes;
      uint2 next[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        weight[m] += WK * kUnitBytes;
        next[m] = more ? load_stream2(weight[m] + 2048 + lane * 8) : e[m];
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint4 b = load_matrices(tile + (n * 8 * Tile::kPitch + s * 32) * 2);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            if (s % 2 == 0)
              mma_sp<T, 0>(sums[m][n], a[m][s], b, s / 2 ? e[m].y : e[m].x);
            else
              mma_sp<T, 1>(sums[m][n], a[m][s], b, s / 2 ? e[m].y : e[m].x);
          }
        }
        if (more) {
#pragma unroll
          for (int m = 0; m < MT; ++m) a[m][s] = load_stream(weight[m] + s * 512 + lane * 16);
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) e[m] = next[m];
    }
  }
  if (p.overlap == Overlap::kLate) let_next_kernel_start();
  wait_copies<0>();
  __syncthreads();

  // Partial sums of the warps that share rows, then of the blocks that share them, each added in a fixed order.
  float* partial = reinterpret_cast<float*>(shared);  // [WK][kTokens][kSumPitch]
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int first = row0 + (wm * MT + m) * 16 + lane / 4;
    const float bias[2] = {wk == 0 ? load_bias<T>(p, first, rank) : 0.f,
                           wk == 0 ? load_bias<T>(p, first + 8, rank) : 0.f};
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, row = (wm * MT + m) * 16 + lane / 4 + i / 2 * 8;
        partial[(wk * Tile::kTokens + token) * Tile::kSumPitch + row] = sums[m][n][i] + bias[i / 2];
      }
  }
  __syncthreads();
  const int items = valid * (Tile::kRows / 4);
  auto add_warps = [&](int token, int row) {
    float4 sum = *reinterpret_cast<float4*>(partial + token * Tile::kSumPitch + row);
#pragma unroll
    for (int w = 1; w < WK; ++w) {
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
      const float4 sum = cluster_sum(partial, token * Tile::kSumPitch + row, split);
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

template <class T, int NT, int MT, int WM, int WK, int STAGES, int BLOCKS>
cudaError_t launch_linear_2_4_mma(const Linear24& p, const Part24& part, cudaStream_t stream, int* capacity) {
  using Tile = MmaTile<T, NT, MT, WM, WK, STAGES>;
  auto kernel = linear_2_4_mma<T, NT, MT, WM, WK, STAGES, BLOCKS>;
  static std::atomic<bool> ready[kMaxDevices];
  const cudaError_t status =
      prepare_kernel(reinterpret_cast<const void*>(kernel), Tile::kThreads, Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  if (capacity != nullptr) return count_clusters(kernel, part.split, Tile::kThreads, Tile::kSharedBytes, capacity);
  const dim3 grid(part.split, (p.tokens + Tile::kTokens - 1) / Tile::kTokens, (p.rows + Tile::kRows - 1) / Tile::kRows);
  const Launch launch(grid, part.split, Tile::kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p);
}

}  // namespace surgeon
