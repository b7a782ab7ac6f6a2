#include "chunked_solve_scheduler.cuh"

// S = L Lᵀ left-looking, a tile by a block of threads at a time:
//   L_ij = (S_ij - Σ_{k < j} L_ik L_jkᵀ) L_jj⁻ᵀ        L_jj = Cholesky factor of S_jj - Σ_{k < j} L_jk L_jkᵀ
// S is gathered into the accumulators of the tile and exists nowhere else. One launch computes the tiles of all chunks
// (chunked_solve_scheduler.cuh). Every tile is computed by one block in one order, so the same inputs give the same
// bits.
//
//   prologue            mainloop, k < j: a slab of 32 columns a stage     epilogue: a panel of 32 columns at a time
//   ────────            ─────────────────────────────────────────────     ─────────────────────────────────────────
//   cp.async slabs      wait for tile k of rows i and j (scheduler)       wait for L_jj, copy it
//     0 .. kStages-2    cp.async L_ik, L_jk   slab s + kStages - 1        i = j: Cholesky of 32 x 32, its inverse
//   gather S into acc   acc -= L_ik L_jkᵀ     slab s                      i > j: solve against the panel of L_jj
//                         (mma, three products of tf32)                   update the panels to its right
//                                                                         store, release progress[i] = j + 1
namespace surgeon {
namespace {

constexpr int kStages = 3;  // pairs of slabs in flight; the epilogue's two tiles lie in their place
constexpr int kBlocks = 4;  // on a multiprocessor: the waits of one hide behind the products of others
#if __CUDA_ARCH__ >= 1200
constexpr int kResident = 2;  // shared memory holds no more there, and registers for four would spill
#else
constexpr int kResident = kBlocks;
#endif
constexpr int kShared = kStages * 2 * Shape::kSlab * sizeof(float) + 4 * kTile * sizeof(int) + 4 * sizeof(int);

// The indices of a tile's rows or columns in shared memory, of which `count` are real; the others are 0.
struct TileIndices {
  const int* rows;
  const int* columns;
  int count;
};

// S at the tile, with `shift` added on the system's diagonal and the identity where it is padded. Loads are
// unconditional, so that many are in flight; what does not count is dropped afterwards.
__device__ __forceinline__ void gather(Accumulator<Shape>& acc, const GatheredSystems& systems, TileIndices left,
                                       TileIndices right, bool diagonal, float shift) {
  const int lane = opaque(threadIdx.x & 31);
  const int row0 = Shape::first_row() + (lane >> 2), column0 = Shape::first_column() + (lane & 3) * 2;
  int right_row[4][2], right_column[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      right_row[n][e] = right.rows[column0 + n * 8 + e];
      right_column[n][e] = right.columns[column0 + n * 8 + e];
    }
  }
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + step * 16 + half * 8;
      const float* G_row = row_of(systems.G_inv, systems.G_stride, left.rows[row]);
      const float* A_row = row_of(systems.A_inv, systems.A_stride, left.columns[row]);
      float G[4][2], A[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          G[n][e] = __ldg(G_row + right_row[n][e]);
          A[n][e] = __ldg(A_row + right_column[n][e]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = column0 + n * 8 + e;
          const bool on_diagonal = diagonal && row == column;
          const bool inside = row < left.count && column < right.count && !(diagonal && row < column);
          const float value = fmaf(G[n][e], A[n][e], on_diagonal ? shift : 0.0f);
          acc.v[step][n][2 * half + e] = inside ? value : on_diagonal ? 1.0f : 0.0f;
        }
      }
    }
  }
}

__device__ __forceinline__ void copy_slab(float* to, const float* from) {
  const int thread = opaque(threadIdx.x);
#pragma unroll
  for (int p = 0; p < Shape::kSlab / 4 / Shape::kThreads; ++p) {
    const int at = (p * Shape::kThreads + thread) * 4;
    copy_async(to + at, from + at);
  }
}

// Epilogue of the accumulated tile (i, j): makes it that of the factor, in `tile` (shared memory), a panel at a time.
// `above` is the factor's tile (j, j), or for i = j this tile itself. False for warp 0 if a pivot was not positive and
// finite.
__device__ __forceinline__ bool finish_tile(const Accumulator<Shape>& accumulated, float* tile, const float* above,
                                            bool diagonal) {
  bool ok = true;
  accumulated.store(tile);  // it lies there between panels: the solves need the registers
  __syncthreads();
#pragma unroll 1
  for (int s = 0; s < Shape::kPanels; ++s) {
    const int thread = opaque(threadIdx.x);
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
    if (solves || inverts) x.solve(block);
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
      subtract_product(acc, slab, factor, diagonal);
      acc.store(tile);
    }
    __syncthreads();
  }
  return ok;
}

// One tile of the factor: prologue, mainloop, epilogue. False if the chunk failed here or elsewhere.
__device__ bool compute_tile(const FactorArguments& f, const WorkTile& work, float* stages, int* indices,
                             int* broadcast) {
  const int i = work.i, j = work.j;
  int ready = work.ready;
  const int slabs = j * Shape::kPanels;
  const auto fetch = [&](int s) {
    float* stage = stages + s % kStages * 2 * Shape::kSlab;
    copy_slab(stage, work.left + s * Shape::kSlab);
    if (work.left != work.above) copy_slab(stage + Shape::kSlab, work.above + s * Shape::kSlab);
  };
  const auto wait = [&](const int* row, int need) {
    return wait_for(row, work.other, need, work.level, f.attempt, broadcast);
  };

  // Prologue.
  load_indices<false>(f.systems, work.begin, i * kTile, work.size, kTile, indices, indices + kTile);
  load_indices<false>(f.systems, work.begin, j * kTile, work.size, kTile, indices + 2 * kTile, indices + 3 * kTile);
  const float shift = i == j ? jitter_shift(f.systems, work.begin, work.size, f.attempt, stages) : 0.0f;
  static_assert(kStages - 1 <= Shape::kPanels, "the first stages are all of the first tile");
  const bool early = ready > 0;
  for (int s = 0; s < kStages - 1; ++s) {
    if (early && s < slabs) fetch(s);
    if (early) copy_commit();
  }
  __syncthreads();
  Accumulator<Shape> acc;
  gather(acc, f.systems, {indices, indices + kTile, work.size - i * kTile},
         {indices + 2 * kTile, indices + 3 * kTile, work.size - j * kTile}, i == j, shift);
  if (!early) {
    if (j > 0 && (ready = wait(work.row, 1)) < 0) return false;
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < slabs) fetch(s);
      copy_commit();
    }
  }
  // Mainloop.
  for (int s = 0; s < slabs; ++s) {
    const int ahead = s + kStages - 1;
    if (ahead < slabs && ahead / Shape::kPanels >= ready) {
      ready = wait(work.row, ahead / Shape::kPanels + 1);
      if (ready < 0) return false;
    }
    copy_wait<kStages - 2>();
    __syncthreads();
    if (ahead < slabs) fetch(ahead);
    copy_commit();
    const float* stage = stages + s % kStages * 2 * Shape::kSlab;
    subtract_product(acc, stage, i == j ? stage : stage + Shape::kSlab, i == j);
  }

  // Epilogue. From here on i and j are read again, where registers are short.
  float* tile = stages;
  float* diagonal = stages + (work.i == work.j ? 0 : Shape::kFloats);
  __syncthreads();
  if (work.i != work.j) {
    if (wait(work.other, work.j + 1) < 0) return false;
    for (int s = 0; s < Shape::kPanels; ++s) {
      copy_slab(diagonal + s * Shape::kSlab, work.above + (work.j * Shape::kPanels + s) * Shape::kSlab);
    }
    copy_commit();
    copy_wait<0>();
  }
  const bool ok = finish_tile(acc, tile, diagonal, work.i == work.j);
  if (__syncthreads_or(!ok)) return false;
  float4* to = reinterpret_cast<float4*>(work.left + work.j * Shape::kFloats);
  for (int p = threadIdx.x; p < Shape::kFloats / 4; p += Shape::kThreads)
    to[p] = reinterpret_cast<const float4*>(tile)[p];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    store_release(work.row, work.j + 1);
  }
  return true;
}

// Before anything is read at them: a block looks at one chunk's positions. In the factorisation itself an assertion
// would take registers that it has not.
__global__ void check_positions_kernel(GatheredSystems systems, const int* chunks) {
  const int chunk = chunks[blockIdx.x];
  const int64_t end = systems.offsets[chunk + 1];
  for (int64_t i = systems.offsets[chunk] + threadIdx.x; i < end; i += blockDim.x) {
    check_position(systems, systems.rows[i], systems.columns[i]);
  }
}

// Blocks take tiles until none is left.
__global__ __launch_bounds__(Shape::kThreads, kResident) void factor_kernel(FactorArguments f) {
  extern __shared__ float4 shared[];
  float* stages = reinterpret_cast<float*>(shared);
  int* indices = reinterpret_cast<int*>(stages + kStages * 2 * Shape::kSlab);
  int* broadcast = indices + 4 * kTile;
  __shared__ WorkTile work;
  if (f.attempt > 0 && counters(f, f.attempt - 1)[1] == 0) return;
  for (;;) {
    if (threadIdx.x == 0) next_tile(f, work);
    __syncthreads();
    if (work.n < 0) return;
    if (!compute_tile(f, work, stages, indices, broadcast)) {
      copy_wait<0>();
      if (threadIdx.x == 0) {
        atomicAdd(counters(f, f.attempt) + 1, 1);
        atomicMax(work.level, f.attempt + 1);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t factor_chunks(const GatheredSystems& systems, const int* chunks, int count, int tiles, float* factors,
                          int* scratch, int* level, cudaStream_t stream) {
  if (count == 0 || tiles == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(scratch, 0, sizeof(int) * factor_scratch_ints(count, tiles), stream);
  }
  const int64_t work = int64_t{count} * tiles * (tiles + 1) / 2;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(count));
  config.blockDim = dim3(256);
  config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, check_positions_kernel, systems, chunks);
  config.gridDim = dim3(static_cast<unsigned>(work < kBlocks * processors ? work : kBlocks * processors));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kShared;
  for (int attempt = 0; attempt < kAttempts && error == cudaSuccess; ++attempt) {
    const FactorArguments f = {systems, chunks, count, tiles, factors, scratch, level, attempt};
    error = cudaLaunchKernelEx(&config, factor_kernel, f);
  }
  return error;
}

}  // namespace surgeon
