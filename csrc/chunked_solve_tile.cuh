#pragma once

#include <cfloat>

#include "chunked_solve.h"
#include "chunked_solve_ptx.cuh"

// What the kernels of chunked_solve_*.cu are made of: Cholesky factorisation of square tiles, left-looking. A tile is
// gathered into the registers of one block, the products of the finished tiles to its left are subtracted on tensor
// cores, and what remains is finished 32 columns at a time.
namespace surgeon {
namespace {

__constant__ float kJitters[kAttempts] = {0.0f, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f};  // spd_inverse.JITTERS
constexpr float kLeastMeanDiagonal = 5.9749284e-15f;  // FLT_MIN^(3/8), as in spd_inverse.damp

// A finished tile lies in slabs of 32 columns, in rows of 32 floats whose eight 16-byte groups are permuted by the row,
// so that neither the reads of mma operands nor one thread a row have bank conflicts. The 32 x 32 blocks on the
// diagonal hold L⁻¹ below it, 1 / L_kk on it and Lᵀ above it.
constexpr int kPanel = 32;

__device__ __forceinline__ int swizzle(int row) { return ((row & 1) << 2) | ((row >> 1) & 3); }

__device__ __forceinline__ int slab_offset(int row, int k) {
  return row * kPanel + ((((k >> 2) ^ swizzle(row)) << 2) | (k & 3));
}

// x, which the compiler takes for new: what is computed from it is not kept in registers (or spilled) between uses.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ int tile_index(int i, int j) { return i * (i + 1) / 2 + j; }

// The warps of a block stand 2 x kPanels; each holds kSize / 2 rows and 32 columns of the tile as mma accumulators.
template <int kTileSize>
struct TileShape {
  static constexpr int kSize = kTileSize;
  static constexpr int kPanels = kSize / kPanel;
  static constexpr int kSlab = kSize * kPanel;  // floats
  static constexpr int kFloats = kSize * kSize;
  static constexpr int kThreads = 64 * kPanels;
  static constexpr int kSteps = kSize / 32;  // of 16 rows, in a warp

  static __device__ __forceinline__ int warp_column() { return (threadIdx.x >> 5) % kPanels; }
  static __device__ __forceinline__ int first_row() { return (threadIdx.x >> 5) / kPanels * (kSize / 2); }
  static __device__ __forceinline__ int first_column() { return warp_column() * kPanel; }
};

// A tile of one warp, 32 x 32.
struct WarpShape {
  static constexpr int kSlab = kPanel * kPanel;
  static constexpr int kSteps = 2;

  static __device__ __forceinline__ int warp_column() { return 0; }
  static __device__ __forceinline__ int first_row() { return 0; }
  static __device__ __forceinline__ int first_column() { return 0; }
};

template <class Shape>
struct Accumulator {
  float v[Shape::kSteps][4][4];

  // A lane holds as v[step][n][e] row 16 step + lane / 4 + 8 (e / 2) and column 8 n + 2 (lane % 4) + e % 2 of the warp's.

  // To and from the slab of the warp's columns.
  __device__ __forceinline__ void store(float* tile) const {
    float* slab = tile + Shape::warp_column() * Shape::kSlab;
    visit([&](int step, int n, int half, int offset) {
      *reinterpret_cast<float2*>(slab + offset) = make_float2(v[step][n][2 * half], v[step][n][2 * half + 1]);
    });
  }
  __device__ __forceinline__ void load(const float* tile) {
    const float* slab = tile + Shape::warp_column() * Shape::kSlab;
    visit([&](int step, int n, int half, int offset) {
      const float2 pair = *reinterpret_cast<const float2*>(slab + offset);
      v[step][n][2 * half] = pair.x, v[step][n][2 * half + 1] = pair.y;
    });
  }
  template <class F>
  static __device__ __forceinline__ void visit(const F& f) {
    const int lane = fresh(threadIdx.x & 31), g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int offset = (Shape::first_row() + g) * kPanel + (((2 * n + (t >> 1)) ^ swizzle(g)) << 2) + (t & 1) * 2;
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) f(step, n, half, offset + (step * 16 + half * 8) * kPanel);
      }
    }
  }
};

// The indices of a tile's rows or columns in shared memory, of which `count` are real; the others are 0.
struct TileIndices {
  const int* rows;
  const int* columns;
  int count;
};

__device__ __forceinline__ void load_indices(const GatheredSystems& systems, int64_t begin, int first, int size, int count,
                                             int* rows, int* columns) {
  for (int p = threadIdx.x; p < count; p += blockDim.x) {
    const bool inside = first + p < size;
    rows[p] = inside ? static_cast<int>(systems.rows[begin + first + p]) : 0;
    columns[p] = inside ? static_cast<int>(systems.columns[begin + first + p]) : 0;
  }
}

// S at the tile, with `shift` added on the system's diagonal and the identity where it is padded. Loads are unconditional,
// so that many are in flight; what does not count is dropped afterwards.
template <class Shape>
__device__ __forceinline__ void gather(Accumulator<Shape>& acc, const GatheredSystems& systems, TileIndices left,
                                       TileIndices right, bool diagonal, float shift) {
  const int lane = fresh(threadIdx.x & 31);
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
      const float* G_row = systems.G_inv + left.rows[row] * systems.G_stride;
      const float* A_row = systems.A_inv + left.columns[row] * systems.A_stride;
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

// x = hi + lo to 22 bits, both tf32, rounded to nearest.
__device__ __forceinline__ void split(float x, uint32_t& hi, uint32_t& lo) {
  hi = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  lo = __float_as_uint(x - __uint_as_float(hi)) + 0x1000u;
}

// acc -= a bᵀ over the 32 columns of two slabs, in three tf32 products (lo lo is below fp32's last bit). The order of k
// within a slab is free, so a lane takes four neighbours. The tensor cores' own sums, which truncate, run over 16 k only.
// Rows above `top` are left out.
template <class Shape>
__device__ __forceinline__ void subtract_product(Accumulator<Shape>& acc, const float* a, const float* b, int top) {
  constexpr int kWide = 2;  // groups of 8 columns at a time: as many as registers allow
  const int lane = fresh(threadIdx.x & 31), g = lane >> 2, t = lane & 3;
  const int row0 = Shape::first_row(), column0 = Shape::first_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int group = ((half * 4 + t) ^ swizzle(g)) << 2;
#pragma unroll
    for (int n0 = 0; n0 < 4; n0 += kWide) {
      uint32_t b_hi[kWide][4], b_lo[kWide][4];
#pragma unroll
      for (int n = 0; n < kWide; ++n) {
        const float4 v = load4(b + (column0 + (n0 + n) * 8 + g) * kPanel + group);
        split(v.x, b_hi[n][0], b_lo[n][0]);
        split(v.y, b_hi[n][1], b_lo[n][1]);
        split(v.z, b_hi[n][2], b_lo[n][2]);
        split(v.w, b_hi[n][3], b_lo[n][3]);
      }
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        if (row0 + step * 16 + 15 < top) continue;
        const float* p = a + (row0 + step * 16 + g) * kPanel + group;
        const float4 u = load4(p), v = load4(p + 8 * kPanel);
        uint32_t hi[2][4], lo[2][4];
        split(u.x, hi[0][0], lo[0][0]);
        split(v.x, hi[0][1], lo[0][1]);
        split(u.y, hi[0][2], lo[0][2]);
        split(v.y, hi[0][3], lo[0][3]);
        split(u.z, hi[1][0], lo[1][0]);
        split(v.z, hi[1][1], lo[1][1]);
        split(u.w, hi[1][2], lo[1][2]);
        split(v.w, hi[1][3], lo[1][3]);
        float run[kWide][4] = {};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
#pragma unroll
          for (int n = 0; n < kWide; ++n) mma_tf32(run[n], lo[q], b_hi[n][2 * q], b_hi[n][2 * q + 1]);
#pragma unroll
          for (int n = 0; n < kWide; ++n) mma_tf32(run[n], hi[q], b_lo[n][2 * q], b_lo[n][2 * q + 1]);
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
#pragma unroll
          for (int n = 0; n < kWide; ++n) mma_tf32(run[n], hi[q], b_hi[n][2 * q], b_hi[n][2 * q + 1]);
        }
#pragma unroll
        for (int n = 0; n < kWide; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc.v[step][n0 + n][e] -= run[n][e];
        }
      }
    }
  }
}

// One warp factorises the 32 x 32 block, a lane a row, into Lᵀ above the diagonal and 1 / L_kk on it; with kSolve it
// replaces right[0:32] by its solution. False for a pivot that is not positive and finite.
template <bool kSolve>
__device__ __forceinline__ bool factor_block(float* block, float* right) {
  const int lane = fresh(threadIdx.x & 31);
  float a[kPanel];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float4 v = load4(block + lane * kPanel + ((c ^ swizzle(lane)) << 2));
    a[4 * c] = v.x, a[4 * c + 1] = v.y, a[4 * c + 2] = v.z, a[4 * c + 3] = v.w;
  }
  __syncwarp();
  float w = kSolve ? right[lane] : 0.0f;
  bool ok = true;
  float pivot = __shfl_sync(~0u, a[0], 0);
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    ok = ok && pivot > 0.0f && pivot <= FLT_MAX;
    float inverse = rsqrtf(pivot);
    inverse = fmaf(0.5f * inverse, fmaf(-pivot * inverse, inverse, 1.0f), inverse);
    const float l = a[k] * inverse;
    if (lane >= k) block[slab_offset(k, lane)] = lane == k ? inverse : l;
    if (k + 1 < kPanel) {
      // The next column and pivot go ahead through registers, the others follow through shared memory.
      const int next = k + 1 < kPanel ? k + 1 : k;
      pivot = __shfl_sync(~0u, fmaf(-l, l, a[next]), next);
      a[next] = fmaf(-l, __shfl_sync(~0u, l, next), a[next]);
      __syncwarp();
#pragma unroll
      for (int c = (k + 2) / 4; c < 8; ++c) {
        const float4 v = load4(block + k * kPanel + ((c ^ swizzle(k)) << 2));
        if (4 * c > next) a[4 * c] = fmaf(-l, v.x, a[4 * c]);
        if (4 * c + 1 > next) a[4 * c + 1] = fmaf(-l, v.y, a[4 * c + 1]);
        if (4 * c + 2 > next) a[4 * c + 2] = fmaf(-l, v.z, a[4 * c + 2]);
        if (4 * c + 3 > next) a[4 * c + 3] = fmaf(-l, v.w, a[4 * c + 3]);
      }
    }
    if (kSolve) {
      const float y = __shfl_sync(~0u, w, k) * inverse;
      w = lane == k ? y : lane > k ? fmaf(-l, y, w) : w;
    }
  }
  if (kSolve) right[lane] = w;
  return ok;
}

// A row of a slab, in one thread's registers.
struct Row {
  float v[kPanel];

  __device__ __forceinline__ void load(const float* slab, int row) {
    row = fresh(row);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 u = load4(slab + row * kPanel + ((c ^ swizzle(row)) << 2));
      v[4 * c] = u.x, v[4 * c + 1] = u.y, v[4 * c + 2] = u.z, v[4 * c + 3] = u.w;
    }
  }
  __device__ __forceinline__ void store(float* slab, int row) const {
    row = fresh(row);
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
  // Solves x Lᵀ = v for the block's L, in place; false where x is not finite.
  __device__ __forceinline__ bool solve(const float* block) {
    float check = 0.0f;
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      float l[kPanel];  // column k of L from k on, its first entry inverted
#pragma unroll
      for (int c = k / 4; c < 8; ++c) {
        const float4 u = load4(block + k * kPanel + ((c ^ swizzle(k)) << 2));
        l[4 * c] = u.x, l[4 * c + 1] = u.y, l[4 * c + 2] = u.z, l[4 * c + 3] = u.w;
      }
      v[k] *= l[k];
      check = fmaf(v[k], 0.0f, check);
#pragma unroll
      for (int m = k + 1; m < kPanel; ++m) v[m] = fmaf(-v[k], l[m], v[m]);
    }
    return check == 0.0f;
  }
};

// One warp replaces v[0:32] by the solution of L y = v, or of Lᵀ y = v: L⁻¹ v and one step of refinement. That is three
// short products instead of 32 steps that wait for each other, and as accurate; L⁻¹ v alone is not where the block is
// ill-conditioned.
template <bool kTransposed>
__device__ __forceinline__ void solve_block(const float* block, float* v) {
  const int lane = fresh(threadIdx.x & 31);
  Row inverse, factor;  // row `lane` of L⁻¹ and L, or column, without the diagonal
  inverse.load(block, lane);
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const float mirrored = block[slab_offset(k, lane)];
    const bool inside = kTransposed ? k > lane : k < lane;
    factor.v[k] = inside ? (kTransposed ? inverse.v[k] : mirrored) : 0.0f;
    inverse.v[k] = inside ? (kTransposed ? mirrored : inverse.v[k]) : 0.0f;
  }
  const float diagonal = block[slab_offset(lane, lane)], right = v[lane];
  const auto product = [](const Row& row, float x) {
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < kPanel; ++k) sum[k % 4] = fmaf(row.v[k], __shfl_sync(~0u, x, k), sum[k % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  };
  const float y = fmaf(diagonal, right, product(inverse, right));
  const float rest = right - product(factor, y) - y / diagonal;
  v[lane] = y + fmaf(diagonal, rest, product(inverse, rest));
}

// What attempt n adds to the diagonal of a system; `partial`: blockDim.x floats of shared memory. Ends synchronised.
__device__ __forceinline__ float jitter_shift(const GatheredSystems& systems, int64_t begin, int size, int attempt,
                                              float* partial) {
  if (attempt == 0) return 0.0f;
  float sum = 0.0f;
  for (int p = threadIdx.x; p < size; p += blockDim.x) {
    const int64_t r = systems.rows[begin + p], c = systems.columns[begin + p];
    sum += systems.G_inv[r * systems.G_stride + r] * systems.A_inv[c * systems.A_stride + c];
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
