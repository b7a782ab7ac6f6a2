// Shared by the epilogues of the 2:4 linears: sums of a cluster, bias, activation, rounding.
#pragma once

#include <cooperative_groups.h>

#include "linear_2_4_ptx.cuh"

namespace surgeon {

__device__ inline float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return fmaxf(v, 0.f);
    case Activation::kGelu:
      return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * v * (1.f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::kSilu:
      return v / (1.f + __expf(-v));
    default:
      return v;
  }
}

__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ inline T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// Of the blocks that share the columns of a row, the first adds its bias.
template <class T>
__device__ inline float load_bias(const Linear24& p, int row, int rank) {
  return rank == 0 && p.bias != nullptr && row < p.rows ? to_float(static_cast<const T*>(p.bias)[row]) : 0.f;
}

// y[token, row .. row + 3] = act(sum), rows past the end left out.
template <class T>
__device__ inline void store_sums(const Linear24& p, int token, int row, const float4& sum) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  alignas(8) T out[4];
  const bool whole = p.rows % 4 == 0 && row + 4 <= p.rows;
  if (p.activation != Activation::kNone) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = activate(v[i], p.activation);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = from_float<T>(v[i]);
  T* y = static_cast<T*>(p.y) + static_cast<size_t>(token) * p.rows + row;
  if (whole) {
    *reinterpret_cast<uint2*>(y) = *reinterpret_cast<uint2*>(out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < p.rows) y[i] = out[i];
    }
  }
}

#if __CUDA_ARCH__ >= 900
// Sums of the split-K blocks of a cluster for four rows of a token, added in the order of the blocks.
__device__ inline float4 add_cluster(float* partial, int offset, int split) {
  constexpr int kMost = 8;
  auto cluster = cooperative_groups::this_cluster();
  float4 part[kMost];  // all loads are under way before the first is added
#pragma unroll
  for (int r = 0; r < kMost; ++r) {
    if (r < split) part[r] = *reinterpret_cast<const float4*>(cluster.map_shared_rank(partial, r) + offset);
  }
  float4 sum = part[0];
#pragma unroll
  for (int r = 1; r < kMost; ++r) {
    if (r < split) sum.x += part[r].x, sum.y += part[r].y, sum.z += part[r].z, sum.w += part[r].w;
  }
  return sum;
}
#endif

}  // namespace surgeon
