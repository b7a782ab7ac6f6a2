#pragma once

#undef NDEBUG  // positions come from the caller: the assertion on them stays in every build
#include <cassert>

#include "chunked_solve.h"
#include "chunked_solve_mma.cuh"

// Building blocks of the factorisations and solves, 32 columns at a time.
namespace surgeon {
namespace {

__constant__ float kJitters[kAttempts] = {0.0f, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f};  // spd_inverse.JITTERS
constexpr float kLeastMeanDiagonal = 5.9749284e-15f;  // FLT_MIN^(3/8), as in spd_inverse.damp

// Number of tile (i, j), j <= i, among those of a factor.
__device__ __forceinline__ int tile_index(int i, int j) { return i * (i + 1) / 2 + j; }

// A row of a matrix: one instruction, where 64-bit products take six.
__device__ __forceinline__ const float* row_of(const float* matrix, uint32_t stride, int row) {
  const uint64_t bytes = static_cast<uint64_t>(static_cast<uint32_t>(row)) * (stride * 4u);
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(matrix) + bytes);
}

__device__ __forceinline__ void check_position(const GatheredSystems& systems, uint64_t row, uint64_t column) {
  assert(row < systems.G_size && column < systems.A_size && "chunked_solve: a position outside the inverse factors");
}

// Indices of the `count` positions from `first` on, of a system of `size`; 0 beyond it.
template <bool kCheck>
__device__ __forceinline__ void load_indices(const GatheredSystems& systems, int64_t begin, int first, int size,
                                             int count, int* rows, int* columns) {
  for (int p = threadIdx.x; p < count; p += blockDim.x) {
    const bool inside = first + p < size;
    if (kCheck && inside) check_position(systems, systems.rows[begin + first + p], systems.columns[begin + first + p]);
    rows[p] = inside ? static_cast<int>(systems.rows[begin + first + p]) : 0;
    columns[p] = inside ? static_cast<int>(systems.columns[begin + first + p]) : 0;
  }
}

// One warp factorises the 32 x 32 block, a lane a row, into Lᵀ above the diagonal and 1 / L_kk on it; with kSolve it
// replaces rhs[0:32] by the solution of L y = rhs. Below the diagonal nothing is kept. False if a pivot was not
// positive, normal and finite: its root is NaN then, and so are all later pivots, of which the last is looked at.
template <bool kSolve>
__device__ __forceinline__ bool factor_block(float* block, float* rhs) {
  const int lane = opaque(threadIdx.x & 31);
  float a[kPanel];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float4 v = load4(block + lane * kPanel + ((c ^ swizzle(lane)) << 2));
    a[4 * c] = v.x, a[4 * c + 1] = v.y, a[4 * c + 2] = v.z, a[4 * c + 3] = v.w;
  }
  __syncwarp();
  float w = kSolve ? rhs[lane] : 0.0f;
  float pivot = __shfl_sync(~0u, a[0], 0), inverse;
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    inverse = rsqrt_flushed(pivot);
    inverse = fmaf(0.5f * inverse, fmaf(-pivot * inverse, inverse, 1.0f), inverse);  // NaN for a pivot of 0 or infinity
    const float l = a[k] * inverse;
    if (lane >= k) block[slab_offset(k, lane)] = lane == k ? inverse : l;
    if (k + 1 < kPanel) {
      // The next column and pivot go ahead through registers, the others follow through shared memory.
      const int next = k + 1 < kPanel ? k + 1 : k;
      pivot = __shfl_sync(~0u, fmaf(-l, l, a[next]), next);
      a[next] = fmaf(-l, __shfl_sync(~0u, l, next), a[next]);
      __syncwarp();
      if (lane > k) {  // a branch, which keeps ptxas from overlapping more steps than registers hold
#pragma unroll
        for (int c = (k + 2) / 4; c < 8; ++c) {
          const float4 v = load4(block + k * kPanel + ((c ^ swizzle(k)) << 2));
          if (4 * c > next) a[4 * c] = fmaf(-l, v.x, a[4 * c]);
          if (4 * c + 1 > next) a[4 * c + 1] = fmaf(-l, v.y, a[4 * c + 1]);
          if (4 * c + 2 > next) a[4 * c + 2] = fmaf(-l, v.z, a[4 * c + 2]);
          if (4 * c + 3 > next) a[4 * c + 3] = fmaf(-l, v.w, a[4 * c + 3]);
        }
      }
    }
    if (kSolve) {
      const float y = __shfl_sync(~0u, w, k) * inverse;
      w = lane == k ? y : lane > k ? fmaf(-l, y, w) : w;
    }
  }
  if (kSolve) rhs[lane] = w;
  return inverse == inverse;
}

// A row of a slab, in one thread's registers.
struct Row {
  float v[kPanel];

  __device__ __forceinline__ void load(const float* slab, int row) {
    row = opaque(row);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 u = load4(slab + row * kPanel + ((c ^ swizzle(row)) << 2));
      v[4 * c] = u.x, v[4 * c + 1] = u.y, v[4 * c + 2] = u.z, v[4 * c + 3] = u.w;
    }
  }
  __device__ __forceinline__ void store(float* slab, int row) const {
    row = opaque(row);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      *reinterpret_cast<float4*>(slab + row * kPanel + ((c ^ swizzle(row)) << 2)) =
          make_float4(v[4 * c], v[4 * c + 1], v[4 * c + 2], v[4 * c + 3]);
    }
  }
  __device__ __forceinline__ float dot(const float* y) const {
    float sum[4] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 u = load4(y + 4 * c);
      sum[0] = fmaf(v[4 * c], u.x, sum[0]);
      sum[1] = fmaf(v[4 * c + 1], u.y, sum[1]);
      sum[2] = fmaf(v[4 * c + 2], u.z, sum[2]);
      sum[3] = fmaf(v[4 * c + 3], u.w, sum[3]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  // Solves x Lᵀ = v for the block's L, in place.
  __device__ __forceinline__ void solve(const float* block) {
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      float l[kPanel];  // column k of L from k on, its first entry inverted
#pragma unroll
      for (int c = k / 4; c < 8; ++c) {
        const float4 u = load4(block + k * kPanel + ((c ^ swizzle(k)) << 2));
        l[4 * c] = u.x, l[4 * c + 1] = u.y, l[4 * c + 2] = u.z, l[4 * c + 3] = u.w;
      }
      v[k] *= l[k];
#pragma unroll
      for (int m = k + 1; m < kPanel; ++m) v[m] = fmaf(-v[k], l[m], v[m]);
    }
  }
};

// One warp replaces v[0:32] by the solution of Lᵀ x = v, by substitution: a lane holds a row of Lᵀ.
__device__ __forceinline__ void substitute_backward(const float* block, float* v) {
  const int lane = opaque(threadIdx.x & 31);
  Row row;
  row.load(block, lane);
  const float inverse = block[slab_offset(lane, lane)];
  float w = v[lane];
#pragma unroll
  for (int k = kPanel - 1; k > 0; --k) {
    const float x = __shfl_sync(~0u, w * inverse, k);
    if (lane < k) w = fmaf(-row.v[k], x, w);
  }
  v[lane] = w * inverse;
}

// One warp replaces v[0:32] by the solution of L y = v, or of Lᵀ y = v: L⁻¹ v and one step of refinement. That is three
// short products instead of 32 steps that wait for each other, and as accurate; L⁻¹ v alone is not where the block is
// ill-conditioned.
template <bool kTransposed>
__device__ __forceinline__ void solve_block(const float* block, float* v) {
  const int lane = opaque(threadIdx.x & 31);
  Row inverse, factor;  // row `lane` of L⁻¹ and L, or column, without the diagonal
  inverse.load(block, lane);
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const float mirrored = block[slab_offset(k, lane)];
    const bool inside = kTransposed ? k > lane : k < lane;
    factor.v[k] = inside ? (kTransposed ? inverse.v[k] : mirrored) : 0.0f;
    inverse.v[k] = inside ? (kTransposed ? mirrored : inverse.v[k]) : 0.0f;
  }
  const float diagonal = block[slab_offset(lane, lane)], rhs = v[lane];
  const auto product = [](const Row& row, float x) {
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < kPanel; ++k) sum[k % 4] = fmaf(row.v[k], __shfl_sync(~0u, x, k), sum[k % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  };
  const float y = fmaf(diagonal, rhs, product(inverse, rhs));
  const float rest = rhs - product(factor, y) - y / diagonal;
  v[lane] = y + fmaf(diagonal, rest, product(inverse, rest));
}

// Shift of the diagonal of a system in attempt n; `partial`: blockDim.x floats of shared memory. Ends synchronised.
__device__ __forceinline__ float jitter_shift(const GatheredSystems& systems, int64_t begin, int size, int attempt,
                                              float* partial) {
  if (attempt == 0) return 0.0f;
  float sum = 0.0f;
  for (int p = threadIdx.x; p < size; p += blockDim.x) {
    const int r = static_cast<int>(systems.rows[begin + p]), c = static_cast<int>(systems.columns[begin + p]);
    sum += row_of(systems.G_inv, systems.G_stride, r)[r] * row_of(systems.A_inv, systems.A_stride, c)[c];
  }
  __syncthreads();
  partial[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int p = 0; p < static_cast<int>(blockDim.x); ++p) sum += partial[p];
  __syncthreads();
  return kJitters[attempt] * fmaxf(sum / static_cast<float>(size), kLeastMeanDiagonal);
}

}  // namespace
}  // namespace surgeon
