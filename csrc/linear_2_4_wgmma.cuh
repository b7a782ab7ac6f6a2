// The 2:4 linear for many tokens on Hopper: sparse wgmma, W from global memory into registers in the order of its
// fragments, x through shared memory by the copy engine.
#pragma once

#include "linear_2_4_store.cuh"
#include "linear_2_4_wgmma_sp.cuh"

namespace surgeon {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a thread of a block's 256 holds its sums: 64*MI rows a group of warps, 16 a warp; sums[m][i] belongs to token
// i / 4 * 8 + lane % 4 * 2 + i % 2 and row lane / 4 + i / 2 % 2 * 8 of the warp's.
__device__ inline int warp_row(int m, int MI) { return (threadIdx.x / 128 * MI + m) * 64 + threadIdx.x / 32 % 4 * 16; }

// The block has all columns, and y no activation: y passes through shared memory, turned so that the rows of a token
// lie together.
template <class T, int BN, int MI>
__device__ inline void store_block(const Linear24& p, uint8_t* shared, const float (&sums)[MI][BN / 2], int token0,
                                   int row0) {
  constexpr int kRows = 128 * MI, kPitch = kRows + 8;
  const int lane = threadIdx.x % 32;
  T* out = reinterpret_cast<T*>(shared);  // [BN][kPitch]
#pragma unroll
  for (int m = 0; m < MI; ++m) {
    float bias[2] = {0.f, 0.f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + warp_row(m, MI) + lane / 4 + 8 * h;
      if (p.bias && row < p.rows) bias[h] = to_float(static_cast<const T*>(p.bias)[row]);
    }
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
      uint32_t packed[4];  // rows 0 and 8 of tokens 16 j, rows 0 and 8 of tokens 16 j + 8
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        alignas(4) const T pair[2] = {from_float<T>(sums[m][8 * j + 2 * q] + bias[q % 2]),
                           from_float<T>(sums[m][8 * j + 2 * q + 1] + bias[q % 2])};
        packed[q] = *reinterpret_cast<const uint32_t*>(pair);
      }
      const int token = 16 * j + lane / 16 * 8 + lane % 8, row = warp_row(m, MI) + lane / 8 % 2 * 8;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared_address(out + token * kPitch + row)),
                   "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                   : "memory");
    }
  }
  __syncthreads();
  const int valid = min(BN, p.tokens - token0);
  for (int i = threadIdx.x; i < valid * (kRows / 8); i += 256) {
    const int token = i / (kRows / 8), row = i % (kRows / 8) * 8;
    const T* from = out + token * kPitch + row;
    T* y = static_cast<T*>(p.y) + static_cast<size_t>(token0 + token) * p.rows + row0 + row;
    if (row0 + row + 8 <= p.rows && p.rows % 8 == 0) {
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int r = 0; r < 8 && row0 + row + r < p.rows; ++r) y[r] = from[r];
    }
  }
}

// Blocks of a cluster (of one, where y has an activation) share the columns: each adds the sums of all, in order, for
// its part of the tokens.
template <class T, int BN, int MI>
__device__ inline void store_cluster(const Linear24& p, uint8_t* shared, const float (&sums)[MI][BN / 2], int token0,
                                     int row0, int split, int rank) {
  constexpr int kRows = 128 * MI, kPitch = kRows + 4;
  const int lane = threadIdx.x % 32;
  float* partial = reinterpret_cast<float*>(shared);  // [BN][kPitch]
#pragma unroll
  for (int m = 0; m < MI; ++m)
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp_row(m, MI) + lane / 4 + i / 2 % 2 * 8;
      partial[token * kPitch + row] = sums[m][i];
    }
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  const int items = min(BN, p.tokens - token0) * (kRows / 4);
  for (int i = rank * 256 + threadIdx.x; i < items; i += split * 256) {
    const int token = i / (kRows / 4), row = i % (kRows / 4) * 4;
    const float4 sum = split > 1 ? cluster_sum(partial, token * kPitch + row, split)
                                 : *reinterpret_cast<const float4*>(partial + token * kPitch + row);
    store_sums<T>(p, token0 + token, row0 + row, sum);
  }
  cluster.sync();
}

#endif

// A block computes 128*MI rows for BN tokens: two groups of four warps, each 64*MI rows. x passes through a ring of
// STAGES tiles one unit wide, W goes from memory into two sets of registers, one
// multiplied while the other is loaded: more would wait for one another (a warp has few scoreboards).
template <class T, int BN, int MI, int STAGES>
struct WgmmaTile {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128 * MI;
  static constexpr int kStageBytes = BN * kUnitColumns * 2;
  static constexpr int kSumBytes = BN * (kRows + 4) * 4;
  static constexpr int kSharedBytes = 1024 + (STAGES * kStageBytes > kSumBytes ? STAGES * kStageBytes : kSumBytes);
};

template <class T, int BN, int MI, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(256, BLOCKS)
    linear_2_4_wgmma(const Linear24 p, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t barriers[2 * STAGES];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const uint32_t tiles = shared_address(shared), full = shared_address(barriers), empty = full + 8 * STAGES;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int split = gridDim.x, rank = blockIdx.x;
  // Blocks that run at the same time form a compact patch of y, so that L2 serves most of W and x.
  constexpr int kPatch = 8;  // tiles of tokens
  const int order = blockIdx.z * gridDim.y + blockIdx.y, patch = order / (kPatch * gridDim.z);
  const int width = min(kPatch, gridDim.y - patch * kPatch), place = order - patch * kPatch * gridDim.z;
  const int token0 = (patch * kPatch + place % width) * BN, row0 = place / width * Tile::kRows;
  const int begin = p.units * rank / split, count = p.units * (rank + 1) / split - begin;
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  const int row_blocks = (p.rows + 15) / 16;
  const uint8_t* weight[MI];
  uint4 a[2][MI][4];
  uint2 e[2][MI];
  float sums[MI][BN / 2];
  auto load_weight = [&](int set, int unit) {  // past the end the last unit is read again
    const size_t offset = static_cast<size_t>(min(unit, count - 1)) * kUnitBytes;
#pragma unroll
    for (int m = 0; m < MI; ++m) {
#pragma unroll
      for (int s = 0; s < 4; ++s) a[set][m][s] = load_stream(weight[m] + offset + s * 512 + lane * 16);
      e[set][m] = load_stream2(weight[m] + offset + 2048 + lane * 8);
    }
  };
#pragma unroll
  for (int m = 0; m < MI; ++m) {
    const int block = min(row0 / 16 + (group * MI + m) * 4 + warp, row_blocks - 1);  // rows past the end, unstored
    weight[m] = static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(block) * p.units + begin) * kUnitBytes;
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) sums[m][i] = 0.f;
  }
  load_weight(0, 0);
  __syncthreads();

  auto load_x = [&](int unit) {
    const uint32_t barrier = full + 8 * (unit % STAGES), to = tiles + unit % STAGES * Tile::kStageBytes;
    barrier_expect(barrier, Tile::kStageBytes);
    copy_tile(to, &map, (begin + unit) * kUnitColumns, token0, barrier);
    copy_tile(to + Tile::kStageBytes / 2, &map, (begin + unit) * kUnitColumns + 64, token0, barrier);
  };
  if (threadIdx.x == 0) {
    wait_for_previous_kernel();
    for (int unit = 0; unit < min(STAGES - 2, count); ++unit) load_x(unit);
  }
  __syncwarp();

  auto multiply = [&](auto set_constant, int i) {
    constexpr int set = decltype(set_constant)::value;
    const int stage = i % STAGES, ahead = i + STAGES - 2;
    if (threadIdx.x == 0 && ahead < count) {
      if (ahead >= STAGES) barrier_wait(empty + 8 * (ahead % STAGES), (ahead / STAGES - 1) & 1);
      load_x(ahead);
    }
    __syncwarp();
    barrier_wait(full + 8 * stage, i / STAGES & 1);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint64_t b =
          swizzled_operand(tiles + stage * Tile::kStageBytes + s / 2 * (Tile::kStageBytes / 2) + s % 2 * 64);
#pragma unroll
      for (int m = 0; m < MI; ++m) {
        if (s % 2 == 0)
          wgmma_sp<T, 0>(sums[m], a[set][m][s], b, s / 2 ? e[set][m].y : e[set][m].x);
        else
          wgmma_sp<T, 1>(sums[m], a[set][m][s], b, s / 2 ? e[set][m].y : e[set][m].x);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // the unit before has ended: its tile and its registers are free
    if (lane == 0 && i > 0) barrier_arrive(empty + 8 * ((i - 1) % STAGES));
    load_weight(1 - set, i + 1);
  };
#pragma unroll 1
  for (int i = 0; i + 1 < count; i += 2) {
    multiply(std::integral_constant<int, 0>(), i);
    multiply(std::integral_constant<int, 1>(), i + 1);
  }
  if (count % 2) multiply(std::integral_constant<int, 0>(), count - 1);
  if (p.overlap == Overlap::kLate) let_next_kernel_start();
  wgmma_wait<0>();
  __syncthreads();

  if (split == 1 && p.activation == Activation::kNone)
    store_block<T, BN, MI>(p, shared, sums, token0, row0);
  else
    store_cluster<T, BN, MI>(p, shared, sums, token0, row0, split, rank);
#endif
}

template <class T, int BN, int MI, int STAGES, int BLOCKS>
cudaError_t launch_linear_2_4_wgmma(const Linear24& p, int split, cudaStream_t stream, int* capacity) {
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  auto kernel = linear_2_4_wgmma<T, BN, MI, STAGES, BLOCKS>;
  static std::atomic<bool> ready[kMaxDevices];
  const cudaError_t status = allow_shared_bytes(reinterpret_cast<const void*>(kernel), Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  if (capacity != nullptr) return count_clusters(kernel, split, Tile::kThreads, Tile::kSharedBytes, capacity);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.columns), static_cast<cuuint64_t>(p.tokens)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.columns) * 2};
  const cuuint32_t box[2] = {64, BN}, steps[2] = {1, 1};
  const CUtensorMapDataType type =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (encode(&map, type, 2, const_cast<void*>(p.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  const dim3 grid(split, (p.tokens + BN - 1) / BN, (p.rows + Tile::kRows - 1) / Tile::kRows);
  const Launch launch(grid, Tile::kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p, map);
}

}  // namespace surgeon
