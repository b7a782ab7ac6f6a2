// The 2:4 linear for many tokens on Hopper: sparse wgmma, x and W through shared memory by the copy engine.
#pragma once

#include "linear_2_4_wgmma_sp.cuh"
#include "linear_2_4_wgmma_store.cuh"

namespace surgeon {

// Compiled for 9.0 instead of 9.0a, or for another device, the kernels have none of their instructions: they trap, and
// are bounded to one warp, by which prepare_kernel knows them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Share24 {  // of a block: its units of the columns, and the stage where x begins
  int rank, begin, count, stage;
};

// In a cluster the last of x is in the last stage: the others then take what its blocks send each other. So the first
// lap of the ring may begin in its middle.
template <int STAGES, int HALVES>
__device__ inline Share24 share_of(const Linear24& p, const Part24& part) {
  const int rank = blockIdx.x % part.split, begin = p.units * rank / part.split;
  const int count = p.units * (rank + 1) / part.split - begin;
  return {rank, begin, count, part.split > 1 ? (STAGES - count * (2 / HALVES) % STAGES) % STAGES : 0};
}

// First token and first row of a tile. Tiles that are computed at the same time form a compact patch of y, so that L2
// serves most of W and x.
template <class Tile>
__device__ inline int2 place_of(const Linear24& p, int tile) {
  constexpr int kPatch = 8;  // tiles of tokens
  const int token_tiles = (p.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int patch = tile / (kPatch * row_tiles), place = tile - patch * kPatch * row_tiles;
  const int width = min(kPatch, token_tiles - patch * kPatch);
  return make_int2((patch * kPatch + place % width) * Tile::kTokens, place / width * Tile::kRows);
}

#endif

template <class T, int BN, int WG, int STAGES, int HALVES, int WSTAGES>
__global__ void __launch_bounds__(kHasWgmma ? 128 * (WG + 1) : 32, 1)
    linear_2_4_wgmma(const Linear24 p, const Part24 part, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = WgmmaTile<T, BN, WG, STAGES, HALVES, WSTAGES>;
  extern __shared__ uint8_t unaligned[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = (shared_address(unaligned) + 1023) / 1024 * 1024, ring = base + Tile::kRingAt;
  const uint32_t full = base + Tile::kBarriersAt, empty = full + 8 * STAGES;
  int tile = part.first + blockIdx.x / part.split;
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();

  // A thread begins with an equal share of the registers; those that load x leave most of theirs to the others.
  constexpr int kShare = 65536 / (128 * (WG + 1)) / 8 * 8, kLoaderRegisters = WG == 3 ? 56 : 40;
  constexpr int kRegisters = (kShare * (WG + 1) - kLoaderRegisters) / WG / 8 * 8;
  if (warp >= 4 * WG) {  // loads x
    set_fewer_registers<kLoaderRegisters>();
    const Share24 share = share_of<STAGES, HALVES>(p, part);
    int stage = share.stage, parity = 0;
    if (threadIdx.x == 128 * WG) {
      for (int s = 0; s < STAGES; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 4 * WG);
        if (s < stage) barrier_arrive(full + 8 * s, 1), barrier_arrive(empty + 8 * s, 4 * WG);
      }
      barrier_init(base + Tile::kReceivedAt, 1);
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 128 * WG) {
      wait_for_previous_kernel();
      const int bytes = min(BN, p.tokens) * HALVES * 128;
      for (; tile < part.end; tile += part.clusters) {
        const int token0 = place_of<Tile>(p, tile).x;
        for (int half = 2 * share.begin; half < 2 * (share.begin + share.count); half += HALVES) {
          const uint32_t barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, parity ^ 1);
          barrier_expect(barrier, bytes);
#pragma unroll
          for (int h = 0; h < HALVES; ++h)
            copy_tile(ring + stage * Tile::kStageBytes + h * BN * 128, &map, (half + h) * 64, token0, barrier);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    if (part.split > 1) cluster_arrive(), cluster_wait();
  } else {
    set_more_registers<kRegisters>();
    const Share24 share = share_of<STAGES, HALVES>(p, part);
    const int count = share.count;
    int stage = share.stage, parity = 0;
    uint8_t* shared = unaligned + (base - shared_address(unaligned));
    float* bias = reinterpret_cast<float*>(shared + Tile::kBiasAt);
    // W: `slot` has the unit that is multiplied.
    const uint32_t weight_ring = base + warp * kUnitBytes;
    const uint32_t weight_full = base + Tile::kWeightBarriersAt + 8 * WSTAGES * warp;
    const uint8_t* weight = nullptr;  // the warp's first unit of this tile
    int slot = 0, weight_parity = 0;
    auto copy_unit = [&](int unit, int to) {
      if (lane != 0 || unit >= count) return;
      barrier_expect(weight_full + 8 * to, kUnitBytes);
      copy_bulk(weight_ring + to * Tile::kWeightStageBytes, weight + unit * kUnitBytes, kUnitBytes,
                weight_full + 8 * to);
    };
    auto begin_tile = [&](int row0) {                              // its first units on their way
      const int block = min(row0 / 16 + warp, (p.rows - 1) / 16);  // rows past the end repeat the last, unstored
      weight =
          static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(block) * p.units + share.begin) * kUnitBytes;
      for (int unit = 0, to = slot; unit < WSTAGES; ++unit) copy_unit(unit, to), to = to + 1 == WSTAGES ? 0 : to + 1;
    };
    uint4 a[2][4];  // two units by turns, by step of 32 columns
    uint2 e[2];     // their positions
    float sums[BN / 2];
    auto load_unit = [&](int set) {  // from `slot`
      barrier_wait(weight_full + 8 * slot, weight_parity);
      const uint32_t from = weight_ring + slot * Tile::kWeightStageBytes;
      e[set] = load_shared2(from + 2048 + lane * 8);
#pragma unroll
      for (int s = 0; s < 4; ++s) a[set][s] = load_shared4(from + s * 512 + lane * 16);
    };
    auto next_slot = [&] {
      if (++slot == WSTAGES) slot = 0, weight_parity ^= 1;
    };

    if (lane == 0) {
      for (int s = 0; s < WSTAGES; ++s) barrier_init(weight_full + 8 * s, 1);
      fence_barrier_init();
    }
    begin_tile(place_of<Tile>(p, tile).y);
    __syncthreads();

    auto release_x = [&] {  // the stage before
      if (lane == 0) barrier_arrive(empty + 8 * (stage > 0 ? stage - 1 : STAGES - 1), 1);
    };
    auto multiply = [&](auto set_constant, int unit) {
      constexpr int set = decltype(set_constant)::value;
      const int used = slot;
#pragma unroll
      for (int h = 0; h < 2; h += HALVES) {
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
#pragma unroll
        for (int s = 2 * h; s < 2 * (h + HALVES); ++s) {
          const uint64_t b = swizzled_operand(ring + stage * Tile::kStageBytes + (s / 2 - h) * (BN * 128) + s % 2 * 64);
          if (s % 2 == 0)
            wgmma_sp<T, 0>(sums, a[set][s], b, s / 2 ? e[set].y : e[set].x);
          else
            wgmma_sp<T, 1>(sums, a[set][s], b, s / 2 ? e[set].y : e[set].x);
        }
        wgmma_commit();
        wgmma_wait<1>();  // what was multiplied before has ended: its operands are free
        if (unit > 0 || h > 0) release_x();
        if (h == 0) {
          next_slot();
          if (unit + 1 < count) load_unit(1 - set);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      __syncwarp();  // all lanes have read it
      copy_unit(unit + WSTAGES, used);
    };

    for (; tile < part.end; tile += part.clusters) {
      // Each group the bias of its own rows. It is an input as x is: the kernel before may be the one that writes it.
      const int row = warp / 4 * 64 + threadIdx.x % 128;
      const bool takes_bias = threadIdx.x % 128 < 64;
      float added = 0.f;
      if (takes_bias && p.bias != nullptr) {
        wait_for_previous_kernel();
        added = load_bias<T>(p, place_of<Tile>(p, tile).y + row, 0);
      }
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) sums[i] = 0.f;
      load_unit(0);
      if (takes_bias) bias[row] = added;
#pragma unroll 1
      for (int unit = 0; unit + 1 < count; unit += 2) {
        multiply(std::integral_constant<int, 0>(), unit);
        multiply(std::integral_constant<int, 1>(), unit + 1);
      }
      if (count % 2) multiply(std::integral_constant<int, 0>(), count - 1);
      if (part.split > 1) cluster_arrive();
      wgmma_wait<0>();
      release_x();
      if (tile + part.clusters < part.end) begin_tile(place_of<Tile>(p, tile + part.clusters).y);
      const int2 place = place_of<Tile>(p, tile);
      if (part.split == 1 && p.activation == Activation::kNone)
        store_tile<T, BN, WG, STAGES, HALVES, WSTAGES>(p, shared, bias, sums, place.x, place.y);
      else
        store_shared<T, BN, WG, STAGES, HALVES, WSTAGES>(p, shared, bias, sums, place.x, place.y, part.split,
                                                         share.rank);
    }
  }
#else
  __trap();
#endif
}

template <class T, int BN, int WG, int STAGES, int HALVES, int WSTAGES>
cudaError_t launch_linear_2_4_wgmma(const Linear24& p, const Part24& part, cudaStream_t stream, int* capacity) {
  using Tile = WgmmaTile<T, BN, WG, STAGES, HALVES, WSTAGES>;
  static_assert(Tile::fits(), "what the blocks of a cluster send each other has no place");
  static_assert(Tile::kSharedBytes <= 232448, "a multiprocessor has no more shared memory");
  auto kernel = linear_2_4_wgmma<T, BN, WG, STAGES, HALVES, WSTAGES>;
  static std::atomic<bool> ready[kMaxDevices];
  constexpr int kThreads = Tile::kThreads + 128;
  const cudaError_t status = prepare_kernel(reinterpret_cast<const void*>(kernel), kThreads, Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  if (capacity != nullptr) return count_clusters(kernel, part.split, kThreads, Tile::kSharedBytes, capacity);
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
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(p.tokens < BN ? p.tokens : BN)}, steps[2] = {1, 1};
  const CUtensorMapDataType type =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (encode(&map, type, 2, const_cast<void*>(p.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  const Launch launch(part.clusters * part.split, part.split, kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p, part, map);
}

}  // namespace surgeon
