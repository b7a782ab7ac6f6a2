// Epilogues of the 2:4 linear for many tokens on Hopper.
#pragma once

#include "linear_2_4_epilogue.cuh"
#include "linear_2_4_wgmma_tile.cuh"

namespace surgeon {

// A block's part of a tile: its first token, how many of its tokens the tile before stores, its first row. The last
// tile of tokens begins earlier where it would reach past the end: the copy engine is slow where it has nothing to
// read.
struct Origin24 {
  int token, stored, row;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Accumulators of a thread (PTX ISA, "wgmma", fragment D of m64nNk32): sums[i] belongs to token i / 4 * 8 + lane % 4 *
// 2 + i % 2 and to row lane / 4 + i / 2 % 2 * 8 of the 16 rows of its warp.

// The block has all of K, and y no activation: every consumer transposes 32 tokens at a time in shared memory, so that
// the rows of a token lie together.
template <class T, class Config>
__device__ inline void store_whole_k(const Linear24& p, uint8_t* shared, const float* bias,
                                     const float (&sums)[Config::kTokens / 2], const Origin24& origin) {
  using Tile = WgmmaTile<Config>;
  constexpr int kPitch = Tile::kOutPitch, kVectors = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, consumer = threadIdx.x / 128;
  T* out = reinterpret_cast<T*>(shared + Tile::kXEnd) + consumer * 32 * kPitch;  // [32][kPitch]
  const int first = origin.row + consumer * 64;
  const bool aligned = p.rows % 8 == 0;
#pragma unroll
  for (int c = 0; c < Tile::kTokens / 32; ++c) {
    barrier_sync(1 + consumer, 128);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t packed[4];  // rows 0 and 8 of tokens 16 j, rows 0 and 8 of tokens 16 j + 8
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float* two = &sums[16 * c + 8 * j + 2 * q];
        const float b = bias[consumer * 64 + warp * 16 + lane / 4 + q % 2 * 8];
        alignas(4) const T pair[2] = {from_float<T>(two[0] + b), from_float<T>(two[1] + b)};
        packed[q] = *reinterpret_cast<const uint32_t*>(pair);
      }
      const int token = 16 * j + lane / 16 * 8 + lane % 8, row = warp * 16 + lane / 8 % 2 * 8;
      store_matrices_transposed(shared_address(out + token * kPitch + row), packed);
    }
    barrier_sync(1 + consumer, 128);
    const int begin = max(0, origin.stored - 32 * c), end = min(32, p.tokens - origin.token - 32 * c);
    for (int i = begin * kVectors + threadIdx.x % 128; i < end * kVectors; i += 128) {
      const int token = i / kVectors, row = first + i % kVectors * 8;
      const T* from = out + token * kPitch + i % kVectors * 8;
      T* y = static_cast<T*>(p.y) + static_cast<size_t>(origin.token + 32 * c + token) * p.rows + row;
      if (row + 8 <= p.rows && aligned) {
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int r = 0; r < 8 && row + r < p.rows; ++r) y[r] = from[r];
      }
    }
  }
}

// Split-K: the blocks of a cluster each complete an equal part of the tokens: every thread sends what it has of the
// others' parts, in the order of its registers, to the same thread there. What comes lies in place of the stages but
// for the last one of x; the cluster has agreed that nobody reads there any more. A cluster of one, where y has an
// activation, only transposes its sums in shared memory, so that the rows of a token lie together.
template <class T, class Config>
__device__ inline void store_split_k(const Linear24& p, uint8_t* shared, const float* bias,
                                     float (&sums)[Config::kTokens / 2], const Origin24& origin, int split, int rank) {
  using Tile = WgmmaTile<Config>;
  constexpr int kPitch = Tile::kSumPitch, kQuads = Tile::kRows / 4, kOctets = Tile::kTokens / 8;
  constexpr int kAllConsumers = Config::kConsumers + 1;  // the barrier of their threads
  static_assert(Tile::kThreads % kQuads == 0, "a thread stores the same rows of every token it takes");
  const int lane = threadIdx.x % 32, valid = min(Tile::kTokens, p.tokens - origin.token);
  const int begin = origin.stored / 8, end = (valid + 7) / 8, each = (end - begin + split - 1) / split;
  const int first = begin + rank * each, mine = max(0, min(each, end - first)), part_bytes = each * Tile::kOctetBytes;
  if (split > 1) {
    const uint32_t received = shared_address(shared) + Tile::kReceivedAt;
    cluster_wait();
    if (threadIdx.x == 0) barrier_expect(received, (split - 1) * mine * Tile::kOctetBytes);
    int owner = 0, slot = 0;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      if (o < begin) continue;
      if (o < end && owner != rank) {
        const int at = (rank - (rank > owner)) * part_bytes + slot * Tile::kOctetBytes + threadIdx.x * 16;
        const int block = owner * Config::kSharers + blockIdx.x % Config::kSharers;
        const uint32_t to = remote_address(shared_address(shared) + at, block);
        send_async(to, &sums[4 * o], remote_address(received, block));
      }
      if (++slot == each) slot = 0, ++owner;
    }
    barrier_wait_cluster(received, 0);
  }
  barrier_sync(kAllConsumers, Tile::kThreads);  // nobody multiplies any more

  // [8 * mine][kPitch]
  float* total = reinterpret_cast<float*>(shared + (split - 1) * part_bytes);
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
  barrier_sync(kAllConsumers, Tile::kThreads);
  const int quad = threadIdx.x % kQuads * 4;
  for (int token = threadIdx.x / kQuads; token < min(8 * mine, valid - 8 * first); token += Tile::kThreads / kQuads) {
    if (8 * first + token < origin.stored) continue;
    store_sums<T>(p, origin.token + 8 * first + token, origin.row + quad,
                  *reinterpret_cast<const float4*>(total + token * kPitch + quad));
  }
}

#endif

}  // namespace surgeon
