// Launches of the 2:4 linears: clusters, programmatic dependent launch, and what fits on the device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "linear_2_4.h"

namespace surgeon {

// A launch whose blocks of x are grouped in clusters, and which may be a programmatic dependent one (both need
// capability 9.0).
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

// Once a device, before a kernel runs. Checks that this build holds it there: one that was compiled without its
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

// Number of clusters of `split` blocks that are resident on the device at a time.
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
