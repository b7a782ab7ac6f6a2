#include "chunked_solve_panel.cuh"

// x = S⁻¹ b for systems in shared memory, one block of threads each: S = L Lᵀ right-looking, 32 columns at a time, with
// L y = b on the way, then Lᵀ x = y. S is gathered once and never leaves shared memory, where its lower triangle lies
// in 32 x 32 blocks, block column after block column, each as in a slab. A failed attempt starts again from the gather.
//
//   step p      warp 0                               other warps                     all warps
//   ──────      ──────                               ───────────                     ─────────
//               trailing update of (p, p) by p - 1   of (i, j), i >= j >= p          panel: (i, p) L_pp⁻ᵀ, i > p
//               Cholesky of (p, p), y_p                by block column p - 1         b_i -= (i, p) y_p
//
// At its start the blocks (i, j), j < p, are final, those from p on lack the products of block column p - 1 only, and b
// has become y up to block p.
//
// Small systems wait for latencies, not for arithmetic, and idle warps keep others from the multiprocessor: up to 64
// weights, one warp does it all.
namespace surgeon {
namespace {

constexpr int kBlock = kPanel * kPanel;

__host__ __device__ constexpr int shared_floats(int blocks) {
  return blocks * (blocks + 1) / 2 * kBlock + 3 * blocks * kPanel;
}

struct System {
  int size;
  int blocks;  // block rows
  float* matrix;
  float* rhs;
  const int* rows;
  const int* columns;

  __device__ __forceinline__ float* block(int i, int j) const {
    return matrix + (j * blocks - j * (j - 1) / 2 + i - j) * kBlock;
  }
};

// S, a block by each warp at a time and a column by each lane. The rows beyond its size are any numbers.
template <int kWarps>
__device__ __forceinline__ void gather(const GatheredSystems& systems, const System& s) {
  const int lane = threadIdx.x & 31;
  int i = threadIdx.x >> 5, j = 0;
  for (;; i += kWarps) {
    while (i >= s.blocks) {
      i -= s.blocks - ++j;  // the next column starts at row j
      if (j == s.blocks) return;
    }
    float* block = s.block(i, j);
    const float* G = systems.G_inv + s.rows[j * kPanel + lane];
    const float* A = systems.A_inv + s.columns[j * kPanel + lane];
#pragma unroll 1
    for (int half = 0; half < kPanel; half += 16) {
      const int row = i * kPanel + half;
      float g[16], a[16];  // all in flight together
#pragma unroll
      for (int m = 0; m < 16; ++m) {
        g[m] = __ldg(row_of(G, systems.G_stride, s.rows[row + m]));
        a[m] = __ldg(row_of(A, systems.A_stride, s.columns[row + m]));
      }
#pragma unroll
      for (int m = 0; m < 16; ++m) block[slab_offset(half + m, lane)] = g[m] * a[m];
    }
  }
}

// Adds the shift to the diagonal, and makes rows of the identity of those beyond the system's size.
template <int kWarps>
__device__ __forceinline__ void shift_and_pad(const System& s, float shift) {
  for (int p = threadIdx.x; p < s.size; p += 32 * kWarps) {
    s.block(p / kPanel, p / kPanel)[slab_offset(p % kPanel, p % kPanel)] += shift;
  }
  const int last = s.blocks - 1, beyond = s.blocks * kPanel - s.size;
  for (int p = threadIdx.x; p < beyond * s.blocks * kPanel; p += 32 * kWarps) {
    const int row = s.size + p / (s.blocks * kPanel), column = p % (s.blocks * kPanel);
    s.block(last, column / kPanel)[slab_offset(row % kPanel, column % kPanel)] = row == column ? 1.0f : 0.0f;
  }
}

// One warp: block (i, q) -= block (i, p) block (q, p)ᵀ, the 16 columns from kColumn on.
template <int kColumn>
__device__ __forceinline__ void trailing_update_half(const System& s, int i, int q, int p) {
  Accumulator<WarpShape<kColumn>> acc;
  float* block = s.block(i, q);
  acc.load(block);
  subtract_product(acc, s.block(i, p), s.block(q, p), i == q);
  acc.store(block);
}

__device__ __forceinline__ void trailing_update(const System& s, int i, int q, int p) {
  trailing_update_half<0>(s, i, q, p);
  trailing_update_half<16>(s, i, q, p);
}

// The factor in place of S, and the solution of L y = rhs in place of rhs. False if it failed, for all threads.
// Needs a thread for each row below the first block.
template <int kWarps>
__device__ __forceinline__ bool factor(const System& s) {
#pragma unroll 1
  for (int p = 0; p < s.blocks; ++p) {
    const int thread = opaque(threadIdx.x), warp = thread >> 5, row = thread % kPanel;
    // Warp 0 updates the diagonal block by the last block column and factorises it; the others update the rest.
    bool ok = true;
    if (warp == 0) {
      if (p > 0) trailing_update(s, p, p, p - 1);
      __syncwarp();
      ok = factor_block<true>(s.block(p, p), s.rhs + p * kPanel);
    } else if (p > 0) {
      for (int i = p + warp, j = p;; i += kWarps - 1) {
        while (j < s.blocks && i >= s.blocks) i -= s.blocks - ++j;
        if (j == s.blocks) break;
        trailing_update(s, i, j, p - 1);
      }
    }
    if (__syncthreads_or(!ok)) return false;
    if (thread < (s.blocks - 1 - p) * kPanel) {
      float* block = s.block(p + 1 + warp, p);
      Row x;
      x.load(block, row);
      x.solve(s.block(p, p));
      x.store(block, row);
      s.rhs[(p + 1) * kPanel + thread] -= x.dot(s.rhs + p * kPanel);
    }
    __syncthreads();
  }
  return true;
}

// x of Lᵀ x = rhs, in place.
template <int kWarps>
__device__ __forceinline__ void solve_backward(const System& s) {
#pragma unroll 1
  for (int p = s.blocks - 1; p >= 0; --p) {
    if (threadIdx.x < 32) substitute_backward(s.block(p, p), s.rhs + p * kPanel);
    __syncthreads();
    for (int column = threadIdx.x; column < p * kPanel; column += 32 * kWarps) {
      const float* block = s.block(p, column / kPanel);
      float sum[2] = {};
#pragma unroll
      for (int m = 0; m < kPanel; ++m) {
        sum[m % 2] = fmaf(block[slab_offset(m, column % kPanel)], s.rhs[p * kPanel + m], sum[m % 2]);
      }
      s.rhs[column] -= sum[0] + sum[1];
    }
    __syncthreads();
  }
}

template <int kWarps>
__global__ __launch_bounds__(32 * kWarps, 16 / kWarps) void solve_in_shared_kernel(GatheredSystems systems,
                                                                                   const int* chunks, int capacity,
                                                                                   const float* target, float* solution,
                                                                                   int* level) {
  extern __shared__ float4 shared[];
  const int chunk = chunks[blockIdx.x];
  const int64_t begin = systems.offsets[chunk];
  const int size = static_cast<int>(systems.offsets[chunk + 1] - begin);
  if (size == 0) return;
  float* matrix = reinterpret_cast<float*>(shared);
  float* rhs = matrix + capacity * (capacity + 1) / 2 * kBlock;
  int* rows = reinterpret_cast<int*>(rhs + capacity * kPanel);
  int* columns = rows + capacity * kPanel;
  const System s = {size, (size + kPanel - 1) / kPanel, matrix, rhs, rows, columns};
  load_indices<true>(systems, begin, 0, size, s.blocks * kPanel, rows, columns);
  int attempt = 0;
  for (bool done = false; !done && attempt < kAttempts;) {
    const float shift = jitter_shift(systems, begin, size, attempt, matrix);
    for (int p = threadIdx.x; p < s.blocks * kPanel; p += blockDim.x) rhs[p] = p < size ? target[begin + p] : 0.0f;
    __syncthreads();
    gather<kWarps>(systems, s);
    __syncthreads();
    if (attempt > 0 || size % kPanel > 0) {
      shift_and_pad<kWarps>(s, shift);
      __syncthreads();
    }
    done = factor<kWarps>(s);
    attempt += !done;
  }
  if (attempt < kAttempts) solve_backward<kWarps>(s);
  for (int p = threadIdx.x; p < size; p += blockDim.x) solution[begin + p] = attempt < kAttempts ? rhs[p] : 0.0f;
  if (threadIdx.x == 0) level[chunk] = attempt;
}

template <int kWarps>
cudaError_t launch(const GatheredSystems& systems, const int* chunks, int count, int blocks, const float* target,
                   float* solution, int* level, cudaStream_t stream) {
  constexpr int size = sizeof(float);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(count);
  config.blockDim = dim3(32 * kWarps);
  config.dynamicSmemBytes = size * shared_floats(blocks);
  config.stream = stream;
  int limit = 0;
  cudaError_t error = shared_limit(&limit);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(solve_in_shared_kernel<kWarps>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 size * shared_floats(limit / kPanel));
  }
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, solve_in_shared_kernel<kWarps>, systems, chunks, blocks, target, solution, level);
}

}  // namespace

cudaError_t shared_limit(int* size) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  int blocks = kSharedLimit / kPanel;
  while (blocks > 1 && static_cast<int>(sizeof(float)) * shared_floats(blocks) > bytes) --blocks;
  *size = blocks * kPanel;
  return error;
}

cudaError_t solve_in_shared(const GatheredSystems& systems, const int* chunks, int count, int blocks,
                            const float* target, float* solution, int* level, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto run = blocks <= 2 ? launch<1> : blocks <= 4 ? launch<4> : launch<8>;
  return run(systems, chunks, count, blocks, target, solution, level, stream);
}

}  // namespace surgeon
