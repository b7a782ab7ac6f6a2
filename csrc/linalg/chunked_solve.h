#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace surgeon {

// The systems S_b = G⁻¹[r,r] ∘ A⁻¹[c,c] of chunks b of pruned positions (r_i, c_i), offsets[b] <= i <
// offsets[b + 1]. They are symmetric and only their lower triangles are read. All pointers are to device memory. A
// position outside the inverses ends the kernel with an assertion before anything is read there.
struct GatheredSystems {
  const float* G_inv;
  const float* A_inv;
  uint32_t G_stride;  // floats from one row to the next, below 2³⁰
  uint32_t A_stride;
  uint32_t G_size;  // rows and columns
  uint32_t A_size;
  const int64_t* rows;
  const int64_t* columns;
  const int64_t* offsets;
};

// Attempts at a factorisation, each with more of the mean diagonal added, the first with none. level[b] is the number
// of the attempt that succeeded, from 0, or kAttempts where none did; the solution is zero there.
constexpr int kAttempts = 6;

// Systems of up to kSharedLimit weights, or what the device's shared memory holds, are solved by one block each.
constexpr int kSharedTile = 32;
constexpr int kSharedLimit = 8 * kSharedTile;
cudaError_t shared_limit(int* size);

// solution = S⁻¹ target for the chunks listed, of at most `tiles * kSharedTile` weights; both
// [offsets[B]].
cudaError_t solve_in_shared(const GatheredSystems& systems, const int* chunks, int count, int tiles,
                            const float* target, float* solution, int* level, cudaStream_t stream);

// Larger ones are factorised in tiles of kTile x kTile in device memory: tile (i, j), j <= i, of the n-th chunk listed
// is number i (i + 1) / 2 + j of the n-th run of `tiles (tiles + 1) / 2` tiles in `factors`.
constexpr int kTile = 64;
constexpr int64_t factor_floats(int tiles) { return int64_t{tiles} * (tiles + 1) / 2 * kTile * kTile; }
constexpr int64_t factor_scratch_ints(int count, int tiles) {
  return int64_t{kAttempts} * (int64_t{count} * tiles + 2);
}

// Cholesky factors of the chunks listed, of at most `tiles * kTile` weights; level must be 0 for each of them.
// scratch: factor_scratch_ints(count, tiles) ints.
cudaError_t factor_chunks(const GatheredSystems& systems, const int* chunks, int count, int tiles, float* factors,
                          int* scratch, int* level, cudaStream_t stream);

// Right-hand sides: target[i] of position i, or, with a stride, target[(r_i - first_row) * stride + c_i] of
// `rows` rows. A position outside these ends the kernel with an assertion before anything is read there.
struct Targets {
  const float* values;
  int64_t stride;  // 0: one value a position
  int64_t first_row;
  int64_t rows;  // with a stride
};
constexpr int64_t solve_scratch_floats(int count, int tiles) {
  return int64_t{2} * count * ((tiles + 1) / 2 * 2 * kTile) + 4;
}

// solution = (L Lᵀ)⁻¹ target for the chunks listed, as factorised by factor_chunks.
// scratch: solve_scratch_floats(count, tiles) floats, every byte 0xff.
cudaError_t solve_factored(const GatheredSystems& systems, const int* chunks, int count, int tiles,
                           const float* factors, const Targets& targets, float* solution, const int* level,
                           float* scratch, cudaStream_t stream);

// Chunks that one launch solves: `count` of a plan's order from `first` on, of at most `tiles` tiles, in shared memory
// or with factors in device memory.
struct ChunkBatch {
  int first, count, tiles;
  bool shared;
};
struct ChunkPlan {
  int count;  // of chunks that are not empty; -1 where offsets decrease
  std::vector<ChunkBatch> batches;
};
// offsets: [chunks + 1], and order: [chunks], the chunks that are not empty in the order of the batches; both in host
// memory. Chunks of up to shared_limit weights go to shared memory; the factors of a batch take at most factor_bytes
// unless it is a single chunk.
ChunkPlan plan_chunks(const int64_t* offsets, int chunks, int shared_limit, int64_t factor_bytes, int* order);

// Takes one solved chunk's positions begin .. end - 1, in rows first_row .. last_row - 1, up into
//   Y[r] += Σ_i λ_i A⁻¹[c_i], and pending[r'] -= G⁻¹[r', r] (what Y[r] gained) for the rows r' that later chunks read,
// last_row - 1 .. block_end - 1. pending starts at row block_begin; Y and pending are C wide, without gaps.
struct SolvedChunk {
  int64_t begin, end, first_row, last_row, block_begin, block_end;
};
cudaError_t apply_chunk(const GatheredSystems& systems, const int64_t* row_offsets, const SolvedChunk& chunk, int64_t C,
                        const float* solution, float* Y, float* pending, cudaStream_t stream);

}  // namespace surgeon
