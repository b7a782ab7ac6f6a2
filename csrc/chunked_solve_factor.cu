#include "chunked_solve_tile.cuh"

namespace surgeon {
namespace {

using Shape = TileShape<kTile>;
constexpr int kStages = 3;  // pairs of slabs in flight; at the end they hold two tiles
constexpr int kBlocks = 4;  // on a multiprocessor: what one waits for hides behind the others' products
constexpr int kShared = kStages * 2 * Shape::kSlab * sizeof(float) + 4 * kTile * sizeof(int) + 4 * sizeof(int);

struct Factoring {
  GatheredSystems systems;
  const int* chunks;
  int count;
  int tiles;
  float* factors;
  int* scratch;
  int* level;
  int attempt;
};

// In shared memory, which leaves registers to the products. n is -1 when no tile is left.
struct Task {
  int i, j, n, size, ready;
  int64_t begin;
  float* left;   // tiles (i, 0), (i, 1), ...
  float* above;  // tiles (j, 0), (j, 1), ...
  int* row;      // how many tiles of row i are finished, and of row j
  int* other;
  int* level;
};

// Of one attempt: the next ticket, failures, and how many tiles of each tile row are finished.
__device__ __forceinline__ int* counters(const Factoring& f, int attempt) {
  return f.scratch + static_cast<int64_t>(attempt) * (f.count * f.tiles + 2);
}

// The next tile to compute. Tickets go column by column, so that whatever a tile needs has an earlier ticket,
// which a running block holds or has finished: blocks may wait for each other without deadlock. In a column the diagonal
// tiles of all chunks come first, then the others chunk by chunk, which read the same row of tiles from the L2 cache.
__device__ __forceinline__ void next_task(const Factoring& f, Task& task) {
  int* ticket = counters(f, f.attempt);
  int* progress = ticket + 2;
  const int total = f.count * (f.tiles * (f.tiles + 1) / 2);
  for (;;) {
    int t = atomicAdd(ticket, 1);
    if (t >= total) {
      task.n = -1;
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
      task = {i,
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
__device__ int wait_for(const int* row, const int* other, int need, const int* level, int attempt, int* message) {
  if (threadIdx.x == 0) {
    int ready;
    while ((ready = min(load_acquire(row), load_acquire(other))) < need) {
      if (load_acquire(level) != attempt) {
        ready = -1;
        break;
      }
    }
    *message = ready;
  }
  __syncthreads();
  const int ready = *message;
  __syncthreads();
  return ready;
}

__device__ __forceinline__ void copy_slab(float* to, const float* from) {
  const int thread = fresh(threadIdx.x);
#pragma unroll
  for (int p = 0; p < Shape::kSlab / 4 / Shape::kThreads; ++p) {
    const int at = (p * Shape::kThreads + thread) * 4;
    copy_async(to + at, from + at);
  }
}

// Turns the accumulated tile (i, j) into that of the factor, in `tile` (shared memory), a panel at a time. `above` is the
// factor's tile (j, j), or for i = j this tile itself. Every thread returns whether what it saw was positive and finite.
__device__ __forceinline__ bool finish_tile(const Accumulator<Shape>& accumulated, float* tile, const float* above,
                                            bool diagonal) {
  bool ok = true;
  accumulated.store(tile);  // it lies there between panels: the solves need the registers
  __syncthreads();
#pragma unroll 1
  for (int s = 0; s < Shape::kPanels; ++s) {
    const int thread = fresh(threadIdx.x);
    float* slab = tile + s * Shape::kSlab;
    const float* factor = above + s * Shape::kSlab;
    const float* block = factor + s * kPanel * kPanel;
    if (diagonal) {
      if (thread < 32) ok = factor_block<false>(slab + s * kPanel * kPanel, nullptr) && ok;
      __syncthreads();
    }
    const bool solves = thread < Shape::kSize && (!diagonal || thread >= (s + 1) * kPanel);
    const bool inverts = diagonal && thread / kPanel == Shape::kPanels;  // a row of the identity: a column of L⁻¹
    Row x;
    if (solves) x.load(slab, thread);
    if (inverts) {
#pragma unroll
      for (int m = 0; m < kPanel; ++m) x.v[m] = thread % kPanel == m ? 1.0f : 0.0f;
    }
    if (solves || inverts) ok = x.solve(block) && ok;
    if (solves) x.store(slab, thread);
    __syncthreads();
    if (inverts) {
      const int column = thread % kPanel;
#pragma unroll
      for (int m = 1; m < kPanel; ++m) {
        if (m > column) slab[s * kPanel * kPanel + slab_offset(m, column)] = x.v[m];
      }
    }
    if (s + 1 == Shape::kPanels) break;
    if (Shape::warp_column() > s) {
      Accumulator<Shape> acc;
      acc.load(tile);
      subtract_product(acc, slab, factor, diagonal ? Shape::first_column() : 0);
      acc.store(tile);
    }
    __syncthreads();
  }
  return ok;
}

// One tile of the factor, from S and the tiles to its left. False if the chunk failed here or elsewhere.
__device__ bool compute_tile(const Factoring& f, const Task& task, float* stages, int* indices, int* message) {
  const int i = task.i, j = task.j;
  int ready = task.ready;
  const int slabs = j * Shape::kPanels;
  const auto fetch = [&](int s) {
    float* stage = stages + s % kStages * 2 * Shape::kSlab;
    copy_slab(stage, task.left + s * Shape::kSlab);
    if (task.left != task.above) copy_slab(stage + Shape::kSlab, task.above + s * Shape::kSlab);
  };
  const auto wait = [&](const int* row, int need) {
    return wait_for(row, task.other, need, task.level, f.attempt, message);
  };

  load_indices(f.systems, task.begin, i * kTile, task.size, kTile, indices, indices + kTile);
  load_indices(f.systems, task.begin, j * kTile, task.size, kTile, indices + 2 * kTile, indices + 3 * kTile);
  const float shift = i == j ? jitter_shift(f.systems, task.begin, task.size, f.attempt, stages) : 0.0f;
  static_assert(kStages - 1 <= Shape::kPanels, "the first stages are all of the first tile");
  const bool early = ready > 0;
  for (int s = 0; s < kStages - 1; ++s) {
    if (early && s < slabs) fetch(s);
    if (early) copy_commit();
  }
  __syncthreads();
  Accumulator<Shape> acc;
  gather(acc, f.systems, {indices, indices + kTile, task.size - i * kTile},
         {indices + 2 * kTile, indices + 3 * kTile, task.size - j * kTile}, i == j, shift);
  if (!early) {
    if (j > 0 && (ready = wait(task.row, 1)) < 0) return false;
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < slabs) fetch(s);
      copy_commit();
    }
  }
  const int top = i == j ? Shape::first_column() : 0;
  for (int s = 0; s < slabs; ++s) {
    const int ahead = s + kStages - 1;
    if (ahead < slabs && ahead / Shape::kPanels >= ready) {
      ready = wait(task.row, ahead / Shape::kPanels + 1);
      if (ready < 0) return false;
    }
    copy_wait<kStages - 2>();
    __syncthreads();
    if (ahead < slabs) fetch(ahead);
    copy_commit();
    const float* stage = stages + s % kStages * 2 * Shape::kSlab;
    subtract_product(acc, stage, i == j ? stage : stage + Shape::kSlab, top);
  }

  float* tile = stages;
  float* diagonal = stages + (i == j ? 0 : Shape::kFloats);
  __syncthreads();
  if (i != j) {
    if (wait(task.other, j + 1) < 0) return false;
    for (int s = 0; s < Shape::kPanels; ++s) {
      copy_slab(diagonal + s * Shape::kSlab, task.above + (j * Shape::kPanels + s) * Shape::kSlab);
    }
    copy_commit();
    copy_wait<0>();
  }
  const bool ok = finish_tile(acc, tile, diagonal, i == j);
  if (__syncthreads_or(!ok)) return false;
  float4* to = reinterpret_cast<float4*>(task.left + j * Shape::kFloats);
  for (int p = threadIdx.x; p < Shape::kFloats / 4; p += Shape::kThreads) to[p] = reinterpret_cast<const float4*>(tile)[p];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    store_release(task.row, j + 1);
  }
  return true;
}

// Blocks take tiles until none is left.
__global__ __launch_bounds__(Shape::kThreads, kBlocks) void factor_kernel(Factoring f) {
  extern __shared__ float4 shared[];
  float* stages = reinterpret_cast<float*>(shared);
  int* indices = reinterpret_cast<int*>(stages + kStages * 2 * Shape::kSlab);
  int* message = indices + 4 * kTile;
  __shared__ Task task;
  if (f.attempt > 0 && counters(f, f.attempt - 1)[1] == 0) return;
  for (;;) {
    if (threadIdx.x == 0) next_task(f, task);
    __syncthreads();
    if (task.n < 0) return;
    if (!compute_tile(f, task, stages, indices, message)) {
      copy_wait<0>();
      if (threadIdx.x == 0) {
        atomicAdd(counters(f, f.attempt) + 1, 1);
        atomicMax(task.level, f.attempt + 1);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t factor_chunks(const GatheredSystems& systems, const int* chunks, int count, int tiles, float* factors,
                          int* scratch, int* level, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(scratch, 0, sizeof(int) * factor_scratch_ints(count, tiles), stream);
  }
  const int64_t tasks = int64_t{count} * tiles * (tiles + 1) / 2;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tasks < kBlocks * processors ? tasks : kBlocks * processors));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  for (int attempt = 0; attempt < kAttempts && error == cudaSuccess; ++attempt) {
    const Factoring f = {systems, chunks, count, tiles, factors, scratch, level, attempt};
    error = cudaLaunchKernelEx(&config, factor_kernel, f);
  }
  return error;
}

}  // namespace surgeon
