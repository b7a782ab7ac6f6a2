// The 2:4 linear for many tokens on Hopper: sparse wgmma, W from global memory into registers in the order of its
// fragments, x through shared memory by the copy engine.
#pragma once

#include "linear_2_4_store.cuh"
#include "linear_2_4_wgmma_sp.cuh"

namespace surgeon {

// A block of two groups of four warps computes tiles of 128*MI rows, half of them each group, for BN tokens. x passes
// through a ring of STAGES tiles one unit wide. A warp holds two units of its part of W in registers: as soon as GROUP
// steps of 32 columns are multiplied, those of the unit after the next are loaded in their place; PREFETCH units ahead
// they are asked for from memory. Where a block takes tile after tile (LOOP), loads for the next are under way while y is
// stored.
template <class T, int BN, int MI, int STAGES>
struct WgmmaTile {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128 * MI;
  static constexpr int kStageBytes = BN * kUnitColumns * 2;
  static constexpr int kRingBytes = STAGES * kStageBytes;
  static constexpr int kOutPitch = 64 * MI + 8;             // of a token of a group's rows of y, in elements
  static constexpr int kOutBytes = 2 * 32 * kOutPitch * 2;  // behind the ring: 32 tokens of both groups
  static constexpr int kSumPitch = kRows + 4;               // of a token's sums, where blocks share the columns
  static constexpr int kSumBytes = BN * kSumPitch * 4;      // in place of the ring
  static constexpr int kBiasAt = kRingBytes + kOutBytes > kSumBytes ? kRingBytes + kOutBytes : kSumBytes;
  static constexpr int kBarriersAt = kBiasAt + kRows * 4;
  static constexpr int kLoaderAt = kBarriersAt + 16 * STAGES;
  static constexpr int kSharedBytes = 1024 + kLoaderAt + 32;  // the ring begins at a multiple of 1024
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a thread holds its sums: sums[m][i] belongs to token i / 4 * 8 + lane % 4 * 2 + i % 2 and to row
// lane / 4 + i / 2 % 2 * 8 of the 16 rows of its warp, which begin here in the tile.
template <int MI>
__device__ inline int warp_row(int m) {
  return (threadIdx.x / 128 * MI + m) * 64 + threadIdx.x / 32 % 4 * 16;
}

// The block has all columns, and y no activation: every group turns 32 tokens at a time in shared memory, so that the
// rows of a token lie together.
template <class T, int BN, int MI, int STAGES>
__device__ inline void store_tile(const Linear24& p, uint8_t* shared, const float* bias,
                                  const float (&sums)[MI][BN / 2], int token0, int row0) {
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  constexpr int kPitch = Tile::kOutPitch, kVectors = 64 * MI / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
  T* out = reinterpret_cast<T*>(shared + Tile::kRingBytes) + group * 32 * kPitch;  // [32][kPitch]
  const int first = row0 + group * 64 * MI;
  const bool aligned = p.rows % 8 == 0;
#pragma unroll
  for (int c = 0; c < BN / 32; ++c) {
    barrier_sync(1 + group, 128);
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t packed[4];  // rows 0 and 8 of tokens 16 j, rows 0 and 8 of tokens 16 j + 8
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* two = &sums[m][16 * c + 8 * j + 2 * q];
          const float b = bias[warp_row<MI>(m) + lane / 4 + q % 2 * 8];
          alignas(4) const T pair[2] = {from_float<T>(two[0] + b), from_float<T>(two[1] + b)};
          packed[q] = *reinterpret_cast<const uint32_t*>(pair);
        }
        const int token = 16 * j + lane / 16 * 8 + lane % 8, row = m * 64 + warp * 16 + lane / 8 % 2 * 8;
        store_matrices_transposed(shared_address(out + token * kPitch + row), packed);
      }
    barrier_sync(1 + group, 128);
    const int valid = min(32, p.tokens - token0 - 32 * c);
    for (int i = threadIdx.x % 128; i < valid * kVectors; i += 128) {
      const int token = i / kVectors, row = first + i % kVectors * 8;
      const T* from = out + token * kPitch + i % kVectors * 8;
      T* y = static_cast<T*>(p.y) + static_cast<size_t>(token0 + 32 * c + token) * p.rows + row;
      if (row + 8 <= p.rows && aligned) {
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int r = 0; r < 8 && row + r < p.rows; ++r) y[r] = from[r];
      }
    }
  }
}

// Blocks of a cluster (of one, where y has an activation) share the columns: each adds the sums of all, in order, for
// its part of the tokens.
template <class T, int BN, int MI, int STAGES>
__device__ inline void store_cluster(const Linear24& p, uint8_t* shared, const float* bias,
                                     const float (&sums)[MI][BN / 2], int token0, int row0, int split, int rank) {
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  constexpr int kPitch = Tile::kSumPitch, kQuads = Tile::kRows / 4;
  static_assert(Tile::kThreads % kQuads == 0, "a thread adds the same rows of every token it takes");
  const int lane = threadIdx.x % 32;
  const int quad = threadIdx.x % kQuads * 4;
  float* partial = reinterpret_cast<float*>(shared);  // [BN][kPitch]
#pragma unroll
  for (int m = 0; m < MI; ++m)
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp_row<MI>(m) + lane / 4 + i / 2 % 2 * 8;
      partial[token * kPitch + row] = sums[m][i] + bias[row];
    }
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  constexpr int kTokens = Tile::kThreads / kQuads;  // at a time
  const int valid = min(BN, p.tokens - token0);
#pragma unroll 2
  for (int token = rank * kTokens + threadIdx.x / kQuads; token < valid; token += split * kTokens) {
    const float4 sum = split > 1 ? cluster_sum(partial, token * kPitch + quad, split)
                                 : *reinterpret_cast<const float4*>(partial + token * kPitch + quad);
    store_sums<T>(p, token0 + token, row0 + quad, sum);
  }
  cluster.sync();
}

struct XLoader {  // what is loaded next, and into which stage of the ring
  int tile, token0, unit, begin, end, stage, parity;
};

#endif

template <class T, int BN, int MI, int STAGES, int BLOCKS, int GROUP, int PREFETCH, bool LOOP>
__global__ void __launch_bounds__(256, BLOCKS)
    linear_2_4_wgmma(const Linear24 p, const Part24 part, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  float* bias = reinterpret_cast<float*>(shared + Tile::kBiasAt);
  XLoader& loader = *reinterpret_cast<XLoader*>(shared + Tile::kLoaderAt);
  const uint32_t ring = shared_address(shared), full = ring + Tile::kBarriersAt, empty = full + 8 * STAGES;
  const int lane = threadIdx.x % 32;
  const int rank = blockIdx.x % part.split;
  const int begin = p.units * rank / part.split, count = p.units * (rank + 1) / part.split - begin;
  if (p.overlap == Overlap::kEarly) let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // Tiles that are computed at the same time form a compact patch of y, so that L2 serves most of W and x.
  const int token_tiles = (p.tokens + BN - 1) / BN, row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  auto place_of = [&](int tile) {  // first token, first row
    constexpr int kPatch = 8;      // tiles of tokens
    const int patch = tile / (kPatch * row_tiles), place = tile - patch * kPatch * row_tiles;
    const int width = min(kPatch, token_tiles - patch * kPatch);
    return make_int2((patch * kPatch + place % width) * BN, place / width * Tile::kRows);
  };

  const uint8_t* weight = nullptr;  // where this lane reads in the unit being multiplied, of its warp's first rows
  uint32_t below[MI];               // bytes from there to the warp's other rows
  uint4 a[8][MI];                   // two units, by step of 32 columns
  uint2 e[2][MI];                   // their positions
  float sums[MI][BN / 2];
  // `ahead` counts units from the one being multiplied.
  auto load_steps = [&](int slot, int ahead, int step, int steps) {
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int m = 0; m < MI; ++m)
        a[slot + s][m] = load_stream(weight + below[m] + ahead * kUnitBytes + (step + s) * 512);
  };
  auto load_positions = [&](int set, int ahead) {
#pragma unroll
    for (int m = 0; m < MI; ++m)
      e[set][m] = load_stream2(weight + below[m] + ahead * kUnitBytes + 2048 - 8 * lane);
  };
  auto prefetch_weight = [&](int ahead) {  // into L2: the rows of this warp
#pragma unroll
    for (int m = 0; m < MI; ++m)
      if (lane == 0) prefetch_bulk(weight + below[m] + ahead * kUnitBytes, kUnitBytes);
  };
  auto begin_tile = [&](int row0) {  // the first units of W on their way
    const int last = (p.rows - 1) / 16, first = min((row0 + warp_row<MI>(0)) / 16, last);
    weight = static_cast<const uint8_t*>(p.weight) + (static_cast<size_t>(first) * p.units + begin) * kUnitBytes +
             lane * 16;
#pragma unroll
    for (int m = 0; m < MI; ++m)  // rows past the end repeat the last, unstored
      below[m] = m == 0 ? 0 : (min(first + 4 * m, last) - first) * p.units * kUnitBytes;
    load_positions(0, 0);
    load_steps(0, 0, 0, 4);
    for (int unit = 1; unit < min(PREFETCH, count); ++unit) prefetch_weight(unit);
  };

  auto load_second_unit = [&] {
    if (count == 1) return;
    load_positions(1, 1);
    load_steps(4, 1, 0, 4);
  };

  // x, loaded by the first thread, which keeps in shared memory what it alone needs: registers are scarce.
  int tile = part.first + blockIdx.x / part.split;
  auto load_x = [&] {
    XLoader at = loader;
    if (at.tile >= part.end) return;
    const uint32_t barrier = full + 8 * at.stage, to = ring + at.stage * Tile::kStageBytes;
    barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
    barrier_expect(barrier, Tile::kStageBytes);
    copy_tile(to, &map, at.unit * kUnitColumns, at.token0, barrier);
    copy_tile(to + Tile::kStageBytes / 2, &map, at.unit * kUnitColumns + 64, at.token0, barrier);
    if (++at.stage == STAGES) at.stage = 0, at.parity ^= 1;
    if (++at.unit == at.end) at.unit = at.begin, at.tile += part.clusters, at.token0 = place_of(at.tile).x;
    loader = at;
  };

  begin_tile(place_of(tile).y);
  load_second_unit();
  __syncthreads();
  constexpr int kAhead = STAGES - 2;  // the other two: the unit being multiplied and the one that ends meanwhile
  if (threadIdx.x == 0) {
    wait_for_previous_kernel();
    loader = {tile, place_of(tile).x, begin, begin, begin + count, 0, 0};
    for (int u = 0; u < kAhead; ++u) load_x();
  }
  __syncwarp();

  int stage = 0, parity = 0;
  auto multiply = [&](auto set_constant, int unit) {
    constexpr int set = decltype(set_constant)::value, slot = 4 * set;
    if (threadIdx.x == 0) load_x();
    __syncwarp();
    barrier_wait(full + 8 * stage, parity);
#pragma unroll
    for (int s = 0; s < 4; s += GROUP) {
      wgmma_fence();
#pragma unroll
      for (int g = s; g < s + GROUP; ++g) {
        const uint64_t b =
            swizzled_operand(ring + stage * Tile::kStageBytes + g / 2 * (Tile::kStageBytes / 2) + g % 2 * 64);
#pragma unroll
        for (int m = 0; m < MI; ++m) {
          if (g % 2 == 0)
            wgmma_sp<T, 0>(sums[m], a[slot + g][m], b, g / 2 ? e[set][m].y : e[set][m].x);
          else
            wgmma_sp<T, 1>(sums[m], a[slot + g][m], b, g / 2 ? e[set][m].y : e[set][m].x);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // the group before has ended: what it used is free
      if (s > 0) {
        if (unit + 2 < count) load_steps(slot + s - GROUP, 2, s - GROUP, GROUP);
      } else if (unit > 0) {
        if (lane == 0) barrier_arrive(empty + 8 * (stage > 0 ? stage - 1 : STAGES - 1));
        if (unit + 1 < count) {
          load_positions(1 - set, 1);
          load_steps(4 - slot + 4 - GROUP, 1, 4 - GROUP, GROUP);
        }
      }
    }
    if (PREFETCH > 0 && unit + PREFETCH < count) prefetch_weight(PREFETCH);
    weight += kUnitBytes;
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };

  for (; tile < part.end; tile += part.clusters) {
    // Each group the bias of its own rows.
    const int row = threadIdx.x / 128 * 64 * MI + threadIdx.x % 128;
    if (threadIdx.x % 128 < 64 * MI) bias[row] = load_bias<T>(p, place_of(tile).y + row, rank);
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) sums[m][i] = 0.f;
#pragma unroll 1
    for (int unit = 0; unit + 1 < count; unit += 2) {
      multiply(std::integral_constant<int, 0>(), unit);
      multiply(std::integral_constant<int, 1>(), unit + 1);
    }
    if (count % 2) multiply(std::integral_constant<int, 0>(), count - 1);
    if (p.overlap == Overlap::kLate) let_next_kernel_start();
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty + 8 * (stage > 0 ? stage - 1 : STAGES - 1));
    const bool more = LOOP && tile + part.clusters < part.end;
    if (more) begin_tile(place_of(tile + part.clusters).y);
    const int2 place = place_of(tile);
    if (part.split == 1 && p.activation == Activation::kNone) {
      store_tile<T, BN, MI, STAGES>(p, shared, bias, sums, place.x, place.y);
    } else {
      __syncthreads();
      store_cluster<T, BN, MI, STAGES>(p, shared, bias, sums, place.x, place.y, part.split, rank);
    }
    if constexpr (!LOOP) break;
    if (more) load_second_unit();
  }
#endif
}

template <class T, int BN, int MI, int STAGES, int BLOCKS, int GROUP, int PREFETCH, bool LOOP>
cudaError_t launch_linear_2_4_wgmma(const Linear24& p, const Part24& part, cudaStream_t stream, int* capacity) {
  using Tile = WgmmaTile<T, BN, MI, STAGES>;
  auto kernel = linear_2_4_wgmma<T, BN, MI, STAGES, BLOCKS, GROUP, PREFETCH, LOOP>;
  static std::atomic<bool> ready[kMaxDevices];
  const cudaError_t status = allow_shared_bytes(reinterpret_cast<const void*>(kernel), Tile::kSharedBytes, ready);
  if (status != cudaSuccess) return status;
  if (capacity != nullptr) return count_clusters(kernel, part.split, Tile::kThreads, Tile::kSharedBytes, capacity);
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
  const Launch launch(part.clusters * part.split, part.split, Tile::kThreads, Tile::kSharedBytes, p.overlap, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p, part, map);
}

}  // namespace surgeon
