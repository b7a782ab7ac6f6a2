// Costs ½ w² g a of weights, bit for bit those of the PyTorch reference.
#pragma once

#include "warp_tile.cuh"

namespace surgeon {

// A factor g or a of a cost. Negative ones are errors: they become NaN, and with them the costs. -0 becomes +0.
__device__ inline float valid_factor(float x) { return x >= 0.0f ? fabsf(x) : NAN; }
__device__ inline float cost_factor(const float* from) { return valid_factor(__ldg(from)); }

// E factors from an address aligned to 16 bytes, or a single one.
template <int E>
__device__ inline void cost_factors(const float* from, float (&to)[E]) {
  if constexpr (E == 1) {
    to[0] = cost_factor(from);
  } else {
    static_assert(E % 4 == 0);
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      to[i] = valid_factor(four.x);
      to[i + 1] = valid_factor(four.y);
      to[i + 2] = valid_factor(four.z);
      to[i + 3] = valid_factor(four.w);
    }
  }
}

// w² (½ g) a, every product rounded on its own: bit for bit what the PyTorch reference computes.
__device__ inline float element_cost(float w, float half_g, float a) {
  return __fmul_rn(__fmul_rn(__fmul_rn(w, w), half_g), a);
}

// Some rows of a warp's tile, from `first` on: their weights and ½ g. Where the tile has no more rows, its last one
// again: what is made of it is the same, and written twice.
template <typename T, int E>
struct Rows {
  static constexpr int kCount = kUnroll<T, E>;
  int64_t row[kCount];
  Packet<T, E> weights[kCount];
  float half_g[kCount];

  __device__ void load_weights(const WarpTile& tile, int first, const T* weight, int64_t row_stride) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      row[u] = tile.row + min(first + u, tile.rows - 1);
      weights[u].load(weight + row[u] * row_stride + tile.column);
    }
  }
  __device__ void load_g(const float* g) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) half_g[u] = 0.5f * cost_factor(g + row[u]);
  }
};

}  // namespace surgeon
