#pragma once

#include <cstdint>

#include "chunked_solve_ptx.cuh"

// Products of slabs of a matrix on tensor cores, at the accuracy of float32.
namespace surgeon {
namespace {

// A finished tile lies in slabs of 32 columns, in rows of 32 floats whose eight 16-byte groups are permuted by the row,
// so that neither the reads of mma operands nor one thread a row have bank conflicts. The 32 x 32 blocks on the
// diagonal hold Lᵀ above it, 1 / L_kk on it and, for factors in device memory, L⁻¹ below it.
constexpr int kPanel = 32;

__device__ __forceinline__ int swizzle(int row) { return ((row & 1) << 2) | ((row >> 1) & 3); }

__device__ __forceinline__ int slab_offset(int row, int k) {
  return row * kPanel + ((((k >> 2) ^ swizzle(row)) << 2) | (k & 3));
}

// x, whose value is opaque to the compiler: what is computed from it is not kept in registers (or spilled) between
// uses.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// The warps of a block stand 2 x kPanels; each holds kSize / 2 rows and 32 columns of the tile as mma accumulators.
template <int kTileSize>
struct TileShape {
  static constexpr int kSize = kTileSize;
  static constexpr int kPanels = kSize / kPanel;
  static constexpr int kSlab = kSize * kPanel;  // floats
  static constexpr int kFloats = kSize * kSize;
  static constexpr int kThreads = 64 * kPanels;
  static constexpr int kSteps = kSize / 32;  // of 16 rows, in a warp
  static constexpr int kGroups = 4;          // of 8 columns

  static __device__ __forceinline__ int warp_column() { return (threadIdx.x >> 5) % kPanels; }
  static __device__ __forceinline__ int first_row() { return (threadIdx.x >> 5) / kPanels * (kSize / 2); }
  static __device__ __forceinline__ int first_column() { return warp_column() * kPanel; }
};

// A tile of 32 x 32 of one warp, 16 columns of it at a time.
template <int kColumn>
struct WarpShape {
  static constexpr int kSlab = kPanel * kPanel;
  static constexpr int kSteps = 2;
  static constexpr int kGroups = 2;

  static __device__ __forceinline__ int warp_column() { return 0; }
  static __device__ __forceinline__ int first_row() { return 0; }
  static __device__ __forceinline__ int first_column() { return kColumn; }
};

template <class Shape>
struct Accumulator {
  float v[Shape::kSteps][Shape::kGroups][4];

  // A lane holds as v[step][n][e] row 16 step + lane / 4 + 8 (e / 2) and column 8 n + 2 (lane % 4) + e % 2 of its warp.
  // PTX ISA, "Matrix Fragments for mma.m16n8k8".

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
    const int lane = opaque(threadIdx.x & 31), g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < Shape::kGroups; ++n) {
      const int group = (Shape::first_column() % kPanel) / 4 + 2 * n + (t >> 1);
      const int offset = (Shape::first_row() + g) * kPanel + ((group ^ swizzle(g)) << 2) + (t & 1) * 2;
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) f(step, n, half, offset + (step * 16 + half * 8) * kPanel);
      }
    }
  }
};

// x = hi + lo, both tf32: hi is rounded to nearest, lo cut by the tensor core, at x's 23rd bit. A NaN or infinite x
// gives a NaN lo, so that the products keep it.
__device__ __forceinline__ void split(float x, uint32_t& hi, uint32_t& lo) {
  hi = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  lo = __float_as_uint(x - __uint_as_float(hi));
}

// acc -= a bᵀ over the 32 columns of two slabs, in three tf32 products: hi hi + hi lo + lo hi, as lo lo is below fp32's
// last bit. The tensor cores truncate their sums, which for sums of squares is a bias: they start from zero for every
// 16 columns, two of them are added in fp32 and then subtracted from acc. Rounding there, once in 32 columns, is what
// the factor's error comes from. The order of the columns within a slab is free, so a lane takes four neighbours. With
// `lower`, a and b are rows of a tile on the diagonal, and what is wholly above the diagonal is left out.
template <class Shape>
__device__ __forceinline__ void subtract_product(Accumulator<Shape>& acc, const float* a, const float* b, bool lower) {
  constexpr int kWide = 2;  // groups of 8 columns of acc at a time: as many as registers allow
  const int row0 = Shape::first_row(), column0 = Shape::first_column();
#pragma unroll
  for (int n0 = 0; n0 < Shape::kGroups; n0 += kWide) {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      if (lower && row0 + step * 16 + 15 < column0 + n0 * 8) continue;
      float sum[kWide][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float run[kWide][4] = {};
        const int lane = opaque(threadIdx.x & 31), g = lane >> 2;  // b is split again, which takes no registers
        const int group = ((half * 4 + (lane & 3)) ^ swizzle(g)) << 2;
        uint32_t b_hi[kWide][4], b_lo[kWide][4];
#pragma unroll
        for (int n = 0; n < kWide; ++n) {
          const float4 v = load4(b + (column0 + (n0 + n) * 8 + g) * kPanel + group);
          split(v.x, b_hi[n][0], b_lo[n][0]);
          split(v.y, b_hi[n][1], b_lo[n][1]);
          split(v.z, b_hi[n][2], b_lo[n][2]);
          split(v.w, b_hi[n][3], b_lo[n][3]);
        }
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
          for (int e = 0; e < 4; ++e) sum[n][e] = half == 0 ? run[n][e] : sum[n][e] + run[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kWide; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc.v[step][n0 + n][e] -= sum[n][e];
      }
    }
  }
}

}  // namespace
}  // namespace surgeon
