// How the 2:4 linear for many tokens on Hopper lies in shared memory, and how its sums leave.
#pragma once

#include "linear_2_4_store.cuh"

namespace surgeon {

// A block of WG groups of four warps, and one more that loads x, computes tiles of 64*WG rows, 64 of them each group,
// for BN tokens. x passes through a ring of STAGES tiles of 64*HALVES columns, which all warps read. W passes through
// rings of WSTAGES units, one ring a warp: each asks for its own rows and takes a unit from shared memory into
// registers, in the order of the fragments, while the one before is multiplied. (Loads from global memory into
// registers would share one scoreboard: waiting for the oldest is waiting for all.) A block may take tile after tile; W
// of the next then comes while y is stored.
template <class T, int BN, int WG, int STAGES, int HALVES, int WSTAGES>
struct WgmmaTile {
  static constexpr int kThreads = 128 * WG;  // that multiply
  static constexpr int kRows = 64 * WG;
  static constexpr int kTokens = BN;
  static constexpr int kWeightStageBytes = 4 * WG * kUnitBytes;  // a multiple of 1024, as x needs
  static constexpr int kStageBytes = BN * HALVES * 128;
  static constexpr int kRingAt = WSTAGES * kWeightStageBytes;
  static constexpr int kRingEnd = kRingAt + STAGES * kStageBytes;
  static constexpr int kOutPitch = 64 + 8;                   // of a token of a group's rows of y, in elements
  static constexpr int kOutBytes = WG * 32 * kOutPitch * 2;  // behind the rings: 32 tokens of every group
  static constexpr int kSumPitch = kRows + 4;                // of a token's sums, where they do not leave by kOut
  static constexpr int kSumBytes = BN * kSumPitch * 4;       // in place of the rings
  static constexpr int kOctetBytes = kThreads * 16;          // of the sums of eight tokens, as the threads hold them
  static constexpr int kBiasAt = kRingEnd + kOutBytes > kSumBytes ? kRingEnd + kOutBytes : kSumBytes;
  static constexpr int kBarriersAt = kBiasAt + kRows * 4;
  static constexpr int kWeightBarriersAt = kBarriersAt + 16 * STAGES;
  static constexpr int kReceivedAt = kWeightBarriersAt + 32 * WG * WSTAGES;
  static constexpr int kSharedBytes = 1024 + kReceivedAt + 16;  // the rings begin at a multiple of 1024
  static constexpr bool fits() {
    for (int split = 2; split <= 8; ++split) {
      const int each = (BN / 8 + split - 1) / split, received = (split - 1) * each * kOctetBytes;
      if (received > kRingEnd - kStageBytes || received + 8 * each * kSumPitch * 4 > kBiasAt) return false;
    }
    return true;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a thread holds its sums: sums[i] belongs to token i / 4 * 8 + lane % 4 * 2 + i % 2 and to row
// lane / 4 + i / 2 % 2 * 8 of the 16 rows of its warp.

// The block has all columns, and y no activation: every group turns 32 tokens at a time in shared memory, so that the
// rows of a token lie together.
template <class T, int BN, int WG, int STAGES, int HALVES, int WSTAGES>
__device__ inline void store_tile(const Linear24& p, uint8_t* shared, const float* bias, const float (&sums)[BN / 2],
                                  int token0, int row0) {
  using Tile = WgmmaTile<T, BN, WG, STAGES, HALVES, WSTAGES>;
  constexpr int kPitch = Tile::kOutPitch, kVectors = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
  T* out = reinterpret_cast<T*>(shared + Tile::kRingEnd) + group * 32 * kPitch;  // [32][kPitch]
  const int first = row0 + group * 64;
  const bool aligned = p.rows % 8 == 0;
#pragma unroll
  for (int c = 0; c < BN / 32; ++c) {
    barrier_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t packed[4];  // rows 0 and 8 of tokens 16 j, rows 0 and 8 of tokens 16 j + 8
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float* two = &sums[16 * c + 8 * j + 2 * q];
        const float b = bias[group * 64 + warp * 16 + lane / 4 + q % 2 * 8];
        alignas(4) const T pair[2] = {from_float<T>(two[0] + b), from_float<T>(two[1] + b)};
        packed[q] = *reinterpret_cast<const uint32_t*>(pair);
      }
      const int token = 16 * j + lane / 16 * 8 + lane % 8, row = warp * 16 + lane / 8 % 2 * 8;
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

// Blocks of a cluster share the columns, and each completes an equal part of the tokens: every thread sends what it has
// of the others' parts, in the order of its registers, to the same thread there. What comes lies in place of the rings
// but for the last stage of x; the cluster has agreed that nobody reads there any more. A cluster of one, where y has
// an activation, only turns its sums in shared memory, so that the rows of a token lie together.
template <class T, int BN, int WG, int STAGES, int HALVES, int WSTAGES>
__device__ inline void store_shared(const Linear24& p, uint8_t* shared, const float* bias, float (&sums)[BN / 2],
                                    int token0, int row0, int split, int rank) {
  using Tile = WgmmaTile<T, BN, WG, STAGES, HALVES, WSTAGES>;
  constexpr int kPitch = Tile::kSumPitch, kQuads = Tile::kRows / 4, kOctets = BN / 8, kAll = WG + 1;
  static_assert(Tile::kThreads % kQuads == 0, "a thread stores the same rows of every token it takes");
  const int lane = threadIdx.x % 32, valid = min(BN, p.tokens - token0);
  const int octets = (valid + 7) / 8, each = (octets + split - 1) / split, first = rank * each;
  const int mine = max(0, min(each, octets - first)), part_bytes = each * Tile::kOctetBytes;
  if (split > 1) {
    const uint32_t received = shared_address(shared) + Tile::kReceivedAt;
    cluster_wait();
    if (threadIdx.x == 0) barrier_expect(received, (split - 1) * mine * Tile::kOctetBytes);
    int owner = 0, place = 0;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      if (o < octets && owner != rank) {
        const int at = (rank - (rank > owner)) * part_bytes + place * Tile::kOctetBytes + threadIdx.x * 16;
        const uint32_t to = remote_address(shared_address(shared) + at, owner);
        send_async(to, &sums[4 * o], remote_address(received, owner));
      }
      if (++place == each) place = 0, ++owner;
    }
    barrier_wait_cluster(received, 0);
  }
  barrier_sync(kAll, Tile::kThreads);                                          // no group multiplies any more
  float* total = reinterpret_cast<float*>(shared + (split - 1) * part_bytes);  // [8 * mine][kPitch]
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    if (o < first || o >= first + mine) continue;
    const uint8_t* from = shared + (o - first) * Tile::kOctetBytes + threadIdx.x * 16;
    float4 sum = make_float4(sums[4 * o], sums[4 * o + 1], sums[4 * o + 2], sums[4 * o + 3]);
    for (int r = 1; r < split; ++r, from += part_bytes) {
      const float4 part = *reinterpret_cast<const float4*>(from);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const int row = threadIdx.x / 32 * 16 + lane / 4;
    float* to = total + ((o - first) * 8 + lane % 4 * 2) * kPitch + row;
    to[0] = sum.x + bias[row];
    to[kPitch] = sum.y + bias[row];
    to[8] = sum.z + bias[row + 8];
    to[kPitch + 8] = sum.w + bias[row + 8];
  }
  barrier_sync(kAll, Tile::kThreads);
  const int quad = threadIdx.x % kQuads * 4;
  for (int token = threadIdx.x / kQuads; token < min(8 * mine, valid - 8 * first); token += Tile::kThreads / kQuads)
    store_sums<T>(p, token0 + 8 * first + token, row0 + quad,
                  *reinterpret_cast<const float4*>(total + token * kPitch + quad));
}

#endif

}  // namespace surgeon
