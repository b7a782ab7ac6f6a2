// The 2:4 linear for many tokens on Hopper: sparse wgmma, x and W through shared memory by the copy engine (TMA).
//
// A block of one producer warpgroup and kConsumers consumers computes tiles of y of 64 kConsumers rows x kTokens
// tokens, one after the other: the pipelines run on across tiles.
//
//   producer, one thread         consumer warps, kConsumers x 4
//   ────────────────────         ──────────────────────────────────────────────────────────────────────────────
//   wait empty[stage] <───────── arrive when wgmma of the stage before has ended
//   TMA x ─> stage ────────────> wait full[stage] ─┐
//   next stage                                     ├─> wgmma.sp(W in registers, x in shared memory) ─> sums
//                                wait weight_full ─┘   the next unit's fragments load meanwhile
//                                  ^   each warp is the producer of its own 16 rows of W: a bulk copy
//                                  └── of a unit a stage, reissued when all lanes have read it
//   next tile                    next tile: first units of W on their way, then the epilogue of this one
//
// Blocks that share x are a cluster of their own: each copies its part of a stage to all of them, and a stage is empty
// when the consumers of all have read it.
//
// Loads of W from global memory into registers would share one scoreboard: waiting for the oldest is waiting for all.
#pragma once

#include "linear_2_4_launch.h"
#include "linear_2_4_wgmma_epilogue.cuh"
#include "linear_2_4_wgmma_sp.cuh"

namespace surgeon {

// Compiled for 9.0 instead of 9.0a, or for another device, the kernels have none of their instructions: they trap, and
// are bounded to one warp, by which prepare_kernel knows them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A block's units of K, and the stage where its x begins.
struct KRange24 {
  int rank, begin, count, first_stage;
};

// In a cluster the last of x is in the last stage: the others then take what its blocks send each other. So the first
// lap around the stages may begin in its middle.
template <class Config>
__device__ inline KRange24 k_range(const Linear24& p, const TileRange24& tiles) {
  constexpr int kStages = Config::kStages;
  const int rank = blockIdx.x / Config::kSharers % tiles.split, begin = p.units * rank / tiles.split;
  const int count = p.units * (rank + 1) / tiles.split - begin;
  return {rank, begin, count, tiles.split > 1 ? (kStages - count * (2 / Config::kBoxes) % kStages) % kStages : 0};
}

// Tiles are rasterized in groups of tokens: those that are computed at the same time form a compact patch of y, so that
// L2 serves most of W and x.
template <class Config>
__device__ inline Origin24 tile_origin(const Linear24& p, int tile) {
  using Tile = WgmmaTile<Config>;
  constexpr int kGroup = 8;  // tiles of tokens
  constexpr int kRows = Tile::kRows * Config::kSharers;
  const int token_tiles = (p.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int row_tiles = (p.rows + kRows - 1) / kRows;
  const int group = tile / (kGroup * row_tiles), index = tile - group * kGroup * row_tiles;
  const int width = min(kGroup, token_tiles - group * kGroup);
  const int token = (group * kGroup + index % width) * Tile::kTokens;
  const int begin = max(0, min(token, p.tokens - Tile::kTokens));
  return {begin, token - begin, index / width * kRows + static_cast<int>(blockIdx.x % Config::kSharers) * Tile::kRows};
}

#endif

template <class T, class Config>
__global__ void __launch_bounds__(kHasWgmma ? WgmmaTile<Config>::kBlockThreads : 32, Config::kBlocks)
    linear_2_4_wgmma(const Linear24 p, const TileRange24 tiles, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = WgmmaTile<Config>;
  constexpr int kTokens = Config::kTokens, kConsumers = Config::kConsumers, kBoxes = Config::kBoxes;
  constexpr int kStages = Config::kStages, kWeightStages = Config::kWeightStages, kSharers = Config::kSharers;
  extern __shared__ uint8_t unaligned[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = (shared_address(unaligned) + 1023) / 1024 * 1024, x_stages = base + Tile::kXAt;
  const uint32_t full = base + Tile::kBarriersAt, empty = full + 8 * kStages;
  int tile = tiles.first + blockIdx.x / (tiles.split * kSharers);
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();

  // Those of the block, or of all that write to each other's stages.
  auto barriers_are_ready = [] {
    if constexpr (kSharers == 1)
      __syncthreads();
    else
      __syncwarp(), cluster_arrive(), cluster_wait();
  };

  // A thread begins with an equal share of the registers; the producer leaves most of its own to the consumers.
  constexpr int kShare = 65536 / (Tile::kBlockThreads * Config::kBlocks) / 8 * 8;
  constexpr int kProducerRegisters = kConsumers == 3 || kSharers > 1 ? 56 : 40;
  constexpr int kConsumerRegisters = (kShare * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8;
  if (warp >= 4 * kConsumers) {  // producer
    set_fewer_registers<kProducerRegisters>();
    const KRange24 k = k_range<Config>(p, tiles);
    int stage = k.first_stage, phase = 0;  // of x: the phase is the parity of the lap around the stages
    if (threadIdx.x == 128 * kConsumers) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 4 * kConsumers * kSharers);
        if (s < stage) barrier_arrive(full + 8 * s, 1), barrier_arrive(empty + 8 * s, 4 * kConsumers * kSharers);
      }
      barrier_init(base + Tile::kReceivedAt, 1);
      fence_barrier_init();
      prefetch_map(&map);
    }
    barriers_are_ready();
    if (threadIdx.x == 128 * kConsumers) {
      wait_for_previous_kernel();
      const int bytes = min(kTokens, p.tokens) * kBoxes * 128;
      for (; tile < tiles.end; tile += tiles.clusters) {
        const int token0 = tile_origin<Config>(p, tile).token;
        for (int box = 2 * k.begin; box < 2 * (k.begin + k.count); box += kBoxes) {
          const uint32_t barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(barrier, bytes);
#pragma unroll
          for (int b = 0; b < kBoxes; ++b) {
            const uint32_t to = x_stages + stage * Tile::kStageBytes + b * kTokens * 128;
            if constexpr (kSharers == 1) {
              copy_box(to, &map, (box + b) * 64, token0, barrier);
            } else {
              const int part = blockIdx.x % kSharers * (kTokens / kSharers);
              const uint16_t sharers = ((1 << kSharers) - 1) << (k.rank * kSharers);
              copy_box_to_cluster(to + part * 128, &map, (box + b) * 64, token0 + part, barrier, sharers);
            }
          }
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
    if (tiles.split > 1) cluster_arrive(), cluster_wait();
    if (kSharers > 1) cluster_arrive(), cluster_wait();
  } else {  // consumer
    set_more_registers<kConsumerRegisters>();
    const KRange24 k = k_range<Config>(p, tiles);
    const int count = k.count;
    int stage = k.first_stage, phase = 0;
    uint8_t* shared = unaligned + (base - shared_address(unaligned));
    float* bias = reinterpret_cast<float*>(shared + Tile::kBiasAt);
    // The warp's own pipeline of W, at the unit that is multiplied.
    const uint32_t weight_stages = base + warp * kUnitBytes;
    const uint32_t weight_full = base + Tile::kWeightBarriersAt + 8 * kWeightStages * warp;
    const uint8_t* weight = nullptr;  // the warp's first unit of this tile
    int weight_stage = 0, weight_phase = 0;
    auto copy_unit = [&](int unit, int to) {
      if (lane != 0 || unit >= count) return;
      barrier_expect(weight_full + 8 * to, kUnitBytes);
      copy_bulk(weight_stages + to * Tile::kWeightStageBytes, weight + unit * kUnitBytes, kUnitBytes,
                weight_full + 8 * to);
    };
    // Of a tile: its first units on their way. Rows past the end repeat the last block, unstored.
    auto prologue = [&](int row0) {
      const int block = min(row0 / 16 + warp, (p.rows - 1) / 16);
      weight = static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(block) * p.units + k.begin) * kUnitBytes;
      for (int unit = 0, to = weight_stage; unit < kWeightStages; ++unit)
        copy_unit(unit, to), to = to + 1 == kWeightStages ? 0 : to + 1;
    };
    // Fragments for two stages of x by turns, by step of 32 columns, and their positions.
    uint4 a[2][2 * kBoxes];
    uint32_t e[2][kBoxes];
    float sums[kTokens / 2];
    auto load_fragments = [&](int set, int half) {  // of the unit at weight_stage
      if (half == 0) barrier_wait(weight_full + 8 * weight_stage, weight_phase);
      const uint32_t from = weight_stages + weight_stage * Tile::kWeightStageBytes;
      const uint32_t positions = from + kUnitPositionsAt + lane * 8;
      if constexpr (kBoxes == 2) {
        const uint2 both = load_shared2(positions);
        e[set][0] = both.x, e[set][1] = both.y;
      } else {
        e[set][0] = load_shared1(positions + 4 * half);
      }
#pragma unroll
      for (int s = 0; s < 2 * kBoxes; ++s) a[set][s] = load_shared4(from + (2 * half + s) * 512 + lane * 16);
    };

    if (lane == 0) {
      for (int s = 0; s < kWeightStages; ++s) barrier_init(weight_full + 8 * s, 1);
      fence_barrier_init();
    }
    prologue(tile_origin<Config>(p, tile).row);
    barriers_are_ready();

    auto release_previous = [&] {  // stage of x
      const uint32_t barrier = empty + 8 * (stage > 0 ? stage - 1 : kStages - 1);
      if constexpr (kSharers == 1) {
        if (lane == 0) barrier_arrive(barrier, 1);
      } else {
        if (lane < kSharers) barrier_arrive_cluster(remote_address(barrier, k.rank * kSharers + lane));
      }
    };
    auto multiply = [&](auto set_constant, int unit) {  // a stage of x: a unit, or half of one
      constexpr int set = decltype(set_constant)::value, half = kBoxes == 1 ? set : 0;
      constexpr bool unit_ends = kBoxes == 2 || half == 1;
      const int read = weight_stage;
      barrier_wait(full + 8 * stage, phase);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 2 * kBoxes; ++s) {
        const uint64_t b =
            swizzled_operand(x_stages + stage * Tile::kStageBytes + s / 2 * (kTokens * 128) + s % 2 * 64);
        if (s % 2 == 0)
          wgmma_sp<T, 0>(sums, a[set][s], b, e[set][s / 2]);
        else
          wgmma_sp<T, 1>(sums, a[set][s], b, e[set][s / 2]);
      }
      wgmma_commit();
      wgmma_wait<1>();  // what was multiplied before has ended: its operands are free
      if (unit > 0 || half > 0) release_previous();
      if constexpr (unit_ends) {
        if (++weight_stage == kWeightStages) weight_stage = 0, weight_phase ^= 1;
        if (unit + 1 < count) load_fragments(1 - set, 0);
      } else {
        load_fragments(1 - set, 1);
      }
      if (++stage == kStages) stage = 0, phase ^= 1;
      if constexpr (unit_ends) {
        __syncwarp();  // all lanes have read it
        copy_unit(unit + kWeightStages, read);
      }
    };

    for (; tile < tiles.end; tile += tiles.clusters) {
      // Each consumer the bias of its own rows. It is an input as x is: the kernel before may be the one that writes
      // it.
      const int row = warp / 4 * 64 + threadIdx.x % 128;
      const bool takes_bias = threadIdx.x % 128 < 64;
      float added = 0.f;
      if (takes_bias && p.bias != nullptr) {
        wait_for_previous_kernel();
        added = load_bias<T>(p, tile_origin<Config>(p, tile).row + row, 0);
      }
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
      load_fragments(0, 0);
      if (takes_bias) bias[row] = added;
      // Mainloop, two stages of x in a round so that the sets of fragments are registers.
#pragma unroll 1
      for (int unit = 0; unit + kBoxes <= count; unit += kBoxes) {
        multiply(std::integral_constant<int, 0>(), unit);
        multiply(std::integral_constant<int, 1>(), unit + kBoxes - 1);
      }
      if (kBoxes == 2 && count % 2) multiply(std::integral_constant<int, 0>(), count - 1);
      if (tiles.split > 1) cluster_arrive();
      wgmma_wait<0>();
      release_previous();
      if (tile + tiles.clusters < tiles.end) prologue(tile_origin<Config>(p, tile + tiles.clusters).row);
      const Origin24 origin = tile_origin<Config>(p, tile);
      if (Tile::kPersistent && tiles.split == 1 && p.activation == Activation::kNone)
        store_whole_k<T, Config>(p, shared, bias, sums, origin);
      else
        store_split_k<T, Config>(p, shared, bias, sums, origin, tiles.split, k.rank);
    }
    if (kSharers > 1) __syncwarp(), cluster_arrive(), cluster_wait();  // nobody sends to a block that is gone
  }
#else
  __trap();
#endif
}

template <class T, class Config>
cudaError_t launch_linear_2_4_wgmma(const Linear24& p, const TileRange24& tiles, cudaStream_t stream, int* capacity) {
  using Tile = WgmmaTile<Config>;
  constexpr int kThreads = Tile::kBlockThreads;
  auto kernel = linear_2_4_wgmma<T, Config>;
  static std::atomic<bool> ready[kMaxDevices];
  const cudaError_t status = prepare_kernel(reinterpret_cast<const void*>(kernel), kThreads, Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  const int cluster = tiles.split * Config::kSharers;
  if (capacity != nullptr) return count_clusters(kernel, cluster, kThreads, Tile::kSharedBytes, capacity);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(status == cudaSuccess ? function : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.columns), static_cast<cuuint64_t>(p.tokens)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.columns) * 2};
  // Fewer tokens than a tile: a smaller box, for the copy engine is slow where it has nothing to read. What then lies
  // in the rest of a stage reaches only sums that are not stored.
  const int box_tokens = (p.tokens < Tile::kTokens ? p.tokens : Tile::kTokens) / Config::kSharers;
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (encode(&map, type, 2, const_cast<void*>(p.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  const Launch launch(tiles.clusters * cluster, cluster, kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p, tiles, map);
}

// Numbers: those of WgmmaConfig.
template <int... kNumbers>
constexpr Kernel24 wgmma_kernel() {
  using Config = WgmmaConfig<kNumbers...>;
  using Tile = WgmmaTile<Config>;
  return {Tile::kTokens,
          Tile::kRows * Config::kSharers,
          1,
          Config::kSharers,
          Tile::kPersistent,
          Overlap::kEarly,
          {launch_linear_2_4_wgmma<__nv_bfloat16, Config>, launch_linear_2_4_wgmma<__half, Config>}};
}

}  // namespace surgeon
