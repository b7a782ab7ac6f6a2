#pragma once

#include "chunked_solve_panel.cuh"

// Tile scheduler of the factorisation: persistent blocks take tiles of many chunks by tickets (an atomic counter), and
// wait for each other by counts of the finished tiles of a row, published with release and read with acquire.
//
//   tickets, column by column          of one chunk, tiles (i, j)              what tile (2, 1) waits for
//   ─────────────────────────          ──────────────────────────              ──────────────────────────
//   (0,0) of every chunk               0                                       progress[2] >= 1: (2, 0)
//   (1,0) (2,0) ... chunk by chunk     1  3                                    progress[1] >= 1: (1, 0)
//   (1,1) of every chunk, (2,1) ...    2  4  5                                 then >= 2:        (1, 1)
namespace surgeon {
namespace {

using Shape = TileShape<kTile>;

struct FactorArguments {
  GatheredSystems systems;
  const int* chunks;
  int count;
  int tiles;
  float* factors;
  int* scratch;
  int* level;
  int attempt;
};

// A tile to compute, in shared memory, which leaves registers to the products. n is -1 when no tile is left.
struct WorkTile {
  int i, j, n, size, ready;
  int64_t begin;
  float* left;   // tiles (i, 0), (i, 1), ...
  float* above;  // tiles (j, 0), (j, 1), ...
  int* row;      // how many tiles of row i are finished, and of row j
  int* other;
  int* level;
};

// Of one attempt: the next ticket, failures, and how many tiles of each tile row are finished.
__device__ __forceinline__ int* counters(const FactorArguments& f, int attempt) {
  return f.scratch + static_cast<int64_t>(attempt) * (f.count * f.tiles + 2);
}

// The next tile to compute. Tickets go column by column, so that whatever a tile needs has an earlier ticket,
// which a running block holds or has finished: blocks may wait for each other without deadlock. In a column the
// diagonal tiles of all chunks come first, then the others chunk by chunk, which read the same row of tiles from the L2
// cache.
__device__ __forceinline__ void next_tile(const FactorArguments& f, WorkTile& work) {
  int* ticket = counters(f, f.attempt);
  int* progress = ticket + 2;
  const int total = f.count * (f.tiles * (f.tiles + 1) / 2);
  for (;;) {
    int t = atomicAdd(ticket, 1);
    if (t >= total) {
      work.n = -1;
      return;
    }
    int j = 0;
    for (; t >= (f.tiles - j) * f.count; ++j) t -= (f.tiles - j) * f.count;
    const int below = f.tiles - 1 - j;
    const int n = t < f.count ? t : (t - f.count) / below;
    const int i = t < f.count ? j : j + 1 + (t - f.count) % below;
    const int chunk = f.chunks[n];
    const int64_t begin = f.systems.offsets[chunk];
    const int size = static_cast<int>(f.systems.offsets[chunk + 1] - begin);
    if (i * kTile < size && load_acquire(f.level + chunk) == f.attempt) {
      float* factors = f.factors + n * factor_floats(f.tiles);
      int* rows = progress + n * f.tiles;
      work = {i,
              j,
              n,
              size,
              min(load_acquire(rows + i), load_acquire(rows + j)),
              begin,
              factors + tile_index(i, 0) * Shape::kFloats,
              factors + tile_index(j, 0) * Shape::kFloats,
              rows + i,
              rows + j,
              f.level + chunk};
      return;
    }
  }
}

// Waits until both tile rows have `need` finished tiles and returns how many they have; -1 if the chunk has failed.
__device__ int wait_for(const int* row, const int* other, int need, const int* level, int attempt, int* broadcast) {
  if (threadIdx.x == 0) {
    int ready;
    while ((ready = min(load_acquire(row), load_acquire(other))) < need) {
      if (load_acquire(level) != attempt) {
        ready = -1;
        break;
      }
    }
    *broadcast = ready;
  }
  __syncthreads();
  const int ready = *broadcast;
  __syncthreads();
  return ready;
}

}  // namespace
}  // namespace surgeon
