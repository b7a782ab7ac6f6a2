#include "chunked_solve_panel.cuh"

// L y = b, then Lᵀ x = y, for factors in device memory. Memory bound: every tile is read twice. A block takes a step,
// 128 rows of one chunk, by a ticket; steps of all chunks run forward, then backward.
//
//   step i forward, consumer of the steps before it           (backward: from the last step down, with Lᵀ)
//   ───────────────────────────────────────────────
//   prologue   cp.async L_ii into shared memory
//   mainloop   for k < i: ld L_ik into registers, then wait for y_k: sum += L_ik y_k
//              The wait for the producer, the block of step k, hides the read.
//   epilogue   y_i = L_ii⁻¹ (b_i - sum), 32 rows at a time, published to later steps
namespace surgeon {
namespace {

// Steps of two tiles, 128 rows: fewer of them wait for each other.
using Shape = TileShape<2 * kTile>;
constexpr int kStep = Shape::kSize;
constexpr int kTileSlab = kTile * kPanel;
constexpr int kGroups = 32;  // of rows: a thread reads 16 bytes of every 32nd row
constexpr int kShared = (Shape::kFloats + kStep + kGroups * kStep) * sizeof(float);

struct SolveArguments {
  GatheredSystems systems;
  const int* chunks;
  int count;
  int tiles;
  int steps;
  const float* factors;
  Targets targets;
  float* solution;
  const int* level;
  float* forward;   // [count, steps * kStep], of L y = target
  float* backward;  // of Lᵀ x = y
  int* ticket;
};

// Vectors are passed between blocks without flags: a value is there when it is no longer the NaN that memory was filled
// with. Arithmetic never makes that one.
__device__ __forceinline__ bool missing(float x) { return __float_as_uint(x) == 0xffffffffu; }

__device__ __forceinline__ float await(const float* p) {
  float v;
  do v = load_relaxed(p);
  while (missing(v));
  return v;
}

__device__ __forceinline__ float4 await4(const float* p) {
  float4 v;
  do v = load_relaxed(reinterpret_cast<const float4*>(p));
  while (missing(v.x) || missing(v.y) || missing(v.z) || missing(v.w));
  return v;
}

// A thread's fragment of a step's tiles: in each slab four columns of four rows, which read whole lines with its warp's
// others.
struct Fragment {
  float4 v[Shape::kPanels][4];

  static __device__ __forceinline__ int row(int n) { return n * kGroups + (threadIdx.x >> 3); }
  static __device__ __forceinline__ int column() { return ((threadIdx.x & 7) ^ swizzle(threadIdx.x >> 3)) * 4; }

  // Of the four tiles at step i, k, or of two where `halves` is 1.
  __device__ __forceinline__ void load(const float* factors, int i, int k, int halves) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int s = 0; s < Shape::kPanels; ++s) {
        const float* tile = factors + tile_index(2 * i + n / 2, 2 * k + s / 2) * (kTile * kTile);
        const float4* from = reinterpret_cast<const float4*>(tile + s % 2 * kTileSlab + n % 2 * (kTileSlab / 2));
        v[s][n] = n / 2 < halves ? __ldcs(from + threadIdx.x) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }
};

// The three tiles on the diagonal at step i as slabs of 128 rows; the identity for the second tile row where it is
// absent.
__device__ __forceinline__ void fetch_diagonal(float* to, const float* factors, int i, int halves) {
  for (int p = threadIdx.x; p < Shape::kFloats / 4; p += Shape::kThreads) {
    const int s = p / (Shape::kSlab / 4), row = p / 8 % kStep, group = p % 8;
    if (row < kTile && s >= 2) continue;
    if (row / kTile < halves) {
      const float* tile = factors + tile_index(2 * i + row / kTile, 2 * i + s / 2) * (kTile * kTile);
      copy_async(to + 4 * p, tile + s % 2 * kTileSlab + row % kTile * kPanel + 4 * group);
    } else {
      const int diagonal = row - s * kPanel - ((group ^ swizzle(row)) << 2);
      *reinterpret_cast<float4*>(to + 4 * p) = make_float4(diagonal == 0, diagonal == 1, diagonal == 2, diagonal == 3);
    }
  }
  copy_commit();
}

// Tile rows of step i.
__device__ __forceinline__ int halves(int size, int i) { return size > (2 * i + 1) * kTile ? 2 : 1; }

__device__ float target_at(const SolveArguments& f, int64_t position) {
  if (f.targets.stride == 0) return f.targets.values[position];
  const int64_t row = f.systems.rows[position] - f.targets.first_row;
  assert(row >= 0 && row < f.targets.rows && "chunked_solve: a position outside the rows of the targets");
  return f.targets.values[row * f.targets.stride + f.systems.columns[position]];
}

// y of step i: L_ii y_i = target_i - Σ_{k < i} L_ik y_k.
__device__ void solve_forward(const SolveArguments& f, const float* factors, int n, int i, int64_t begin, int size,
                              float* diagonal, float* v) {
  const int thread = threadIdx.x;
  float* y = f.forward + static_cast<int64_t>(n) * f.steps * kStep;
  fetch_diagonal(diagonal, factors, i, halves(size, i));
  if (thread < kStep) v[thread] = i * kStep + thread < size ? target_at(f, begin + i * kStep + thread) : 0.0f;
  float sum[4] = {};
  for (int k = 0; k < i; ++k) {
    Fragment fragment;
    fragment.load(factors, i, k, halves(size, i));
#pragma unroll
    for (int s = 0; s < Shape::kPanels; ++s) {
      const float4 u = await4(y + k * kStep + s * kPanel + fragment.column());
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float4 l = fragment.v[s][r];
        sum[r] += fmaf(l.x, u.x, l.y * u.y) + fmaf(l.z, u.z, l.w * u.w);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    for (int lanes = 1; lanes < 8; lanes *= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], lanes);
  }
  copy_wait<0>();
  __syncthreads();
  if ((thread & 7) == 0) {
#pragma unroll
    for (int r = 0; r < 4; ++r) v[Fragment::row(r)] -= sum[r];
  }
  __syncthreads();
  for (int s = 0; s < Shape::kPanels; ++s) {
    const float* slab = diagonal + s * Shape::kSlab;
    if (thread < 32) solve_block<false>(slab + s * kPanel * kPanel, v + s * kPanel);
    __syncthreads();
    if (thread >= (s + 1) * kPanel && thread < kStep) {
      Row row;
      row.load(slab, thread);
      v[thread] -= row.dot(v + s * kPanel);
    }
    __syncthreads();
  }
  if (thread < kStep) store_relaxed(y + i * kStep + thread, v[thread]);
}

// x of step j: L_jjᵀ x_j = y_j - Σ_{i > j} L_ijᵀ x_i.
__device__ void solve_backward(const SolveArguments& f, const float* factors, int n, int j, int64_t begin, int size,
                               float* diagonal, float* v, float* partial) {
  const int thread = threadIdx.x;
  const float* y = f.forward + static_cast<int64_t>(n) * f.steps * kStep;
  float* x = f.backward + static_cast<int64_t>(n) * f.steps * kStep;
  fetch_diagonal(diagonal, factors, j, halves(size, j));
  float4 sum[Shape::kPanels];
#pragma unroll
  for (int s = 0; s < Shape::kPanels; ++s) sum[s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int i = (size - 1) / kStep; i > j; --i) {
    Fragment fragment;
    fragment.load(factors, i, j, halves(size, i));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float u = await(x + i * kStep + fragment.row(r));
#pragma unroll
      for (int s = 0; s < Shape::kPanels; ++s) {
        const float4 l = fragment.v[s][r];
        sum[s].x = fmaf(l.x, u, sum[s].x);
        sum[s].y = fmaf(l.y, u, sum[s].y);
        sum[s].z = fmaf(l.z, u, sum[s].z);
        sum[s].w = fmaf(l.w, u, sum[s].w);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < Shape::kPanels; ++s) {
    *reinterpret_cast<float4*>(partial + (thread >> 3) * kStep + s * kPanel + Fragment::column()) = sum[s];
  }
  copy_wait<0>();
  __syncthreads();
  if (thread < kStep) {
    float total = 0.0f;
    for (int g = 0; g < kGroups; ++g) total += partial[g * kStep + thread];
    v[thread] = await(y + j * kStep + thread) - total;
  }
  __syncthreads();
  for (int s = Shape::kPanels - 1; s >= 0; --s) {
    if (thread < 32) solve_block<true>(diagonal + s * (Shape::kSlab + kPanel * kPanel), v + s * kPanel);
    __syncthreads();
    if (thread < s * kPanel) {
      const float* slab = diagonal + thread / kPanel * Shape::kSlab;
      float total = 0.0f;
#pragma unroll
      for (int m = 0; m < kPanel; ++m) {
        total = fmaf(slab[slab_offset(s * kPanel + m, thread % kPanel)], v[s * kPanel + m], total);
      }
      v[thread] -= total;
    }
    __syncthreads();
  }
  if (thread < kStep) {
    store_relaxed(x + j * kStep + thread, v[thread]);
    if (j * kStep + thread < size) f.solution[begin + j * kStep + thread] = v[thread];
  }
}

// Tickets go down the tile rows of all chunks and back up: what a block waits for has an earlier one.
__global__ __launch_bounds__(Shape::kThreads, 2) void solve_kernel(SolveArguments f) {
  extern __shared__ float4 shared[];
  float* diagonal = reinterpret_cast<float*>(shared);
  float* v = diagonal + Shape::kFloats;
  float* partial = v + kStep;
  __shared__ int ticket;
  const int half = f.count * f.steps;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(f.ticket, 1) + 1;
    __syncthreads();
    const int t = ticket;
    if (t >= 2 * half) return;
    const int n = t % f.count;
    const int i = t < half ? t / f.count : 2 * f.steps - 1 - t / f.count;
    const int chunk = f.chunks[n];
    const int64_t begin = f.systems.offsets[chunk];
    const int size = static_cast<int>(f.systems.offsets[chunk + 1] - begin);
    if (i * kStep >= size) continue;
    if (f.level[chunk] == kAttempts) {
      const int position = i * kStep + threadIdx.x;
      if (t >= half && threadIdx.x < kStep && position < size) f.solution[begin + position] = 0.0f;
      continue;
    }
    const float* factors = f.factors + n * factor_floats(f.tiles);
    if (t < half) {
      solve_forward(f, factors, n, i, begin, size, diagonal, v);
    } else {
      solve_backward(f, factors, n, i, begin, size, diagonal, v, partial);
    }
  }
}

}  // namespace

cudaError_t solve_factored(const GatheredSystems& systems, const int* chunks, int count, int tiles,
                           const float* factors, const Targets& targets, float* solution, const int* level,
                           float* scratch, cudaStream_t stream) {
  if (count == 0 || tiles == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(solve_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  }
  if (error != cudaSuccess) return error;
  const int steps = (tiles + 1) / 2;
  const int64_t length = int64_t{count} * steps * kStep;
  int* ticket = reinterpret_cast<int*>(scratch + 2 * length);
  const SolveArguments f = {systems, chunks,           count, tiles, steps, factors, targets, solution, level,
                            scratch, scratch + length, ticket};
  const int64_t work = int64_t{2} * count * steps;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(work < 2 * processors ? work : 2 * processors));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, solve_kernel, f);
}

}  // namespace surgeon
