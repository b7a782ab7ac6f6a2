// How the 2:4 linears end: sums of a cluster, bias, activation, rounding. And how they are launched.
#pragma once

#include <cooperative_groups.h>

#include <atomic>

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
// Sums of the blocks of a cluster for four rows of a token, added in the order of the blocks.
__device__ inline float4 cluster_sum(float* partial, int offset, int split) {
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

// A launch whose blocks of x are grouped in clusters and, if asked, start early (both need capability 9.0).
struct Launch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  Launch(dim3 grid, int cluster, int threads, int shared_bytes, Overlap overlap, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
      ++config.numAttrs;
    }
    if (overlap != Overlap::kNone) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
      ++config.numAttrs;
    }
  }
  Launch(const Launch&) = delete;
};

// Once a device, before a kernel runs. Whether this build holds it there: one that was compiled without its
// instructions takes fewer threads than it needs (linear_2_4_wgmma.cuh). And its shared memory: more than 48 KB has to
// be asked for.
inline cudaError_t prepare_kernel(const void* kernel, int threads, int shared_bytes, std::atomic<bool>* ready) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (ready[device].load(std::memory_order_acquire)) return cudaSuccess;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess && attributes.maxThreadsPerBlock < threads) status = cudaErrorNotSupported;
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) ready[device].store(true, std::memory_order_release);
  return status;
}

// How many clusters of `split` blocks the device runs at the same time.
template <class... Arguments>
cudaError_t count_clusters(void (*kernel)(Arguments...), int split, int threads, int shared_bytes, int* clusters) {
  if (split > 1) {
    const Launch launch(dim3(split), split, threads, shared_bytes, Overlap::kNone, nullptr);
    return cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
  }
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  *clusters = blocks * multiprocessors;
  return status;
}

}  // namespace surgeon
