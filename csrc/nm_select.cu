#include "nm_select.h"

namespace surgeon {
namespace {

// One thread a group. The rank of a cost is the number of costs that go before it, so no sorting network is needed.
__global__ void nm_select_kernel(const float* __restrict__ cost, bool* __restrict__ pruned, int64_t groups, int n, int m) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t group = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; group < groups; group += stride) {
    const float* x = cost + group * m;
    for (int i = 0; i < m; ++i) {
      const float mine = x[i];
      int rank = 0;
      for (int j = 0; j < m; ++j) rank += x[j] < mine || (x[j] == mine && j < i);
      pruned[group * m + i] = rank < m - n;
    }
  }
}

}  // namespace

cudaError_t nm_select(const float* cost, bool* pruned, int64_t groups, int n, int m, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  constexpr int threads = 256;
  const int64_t blocks = (groups + threads - 1) / threads;
  nm_select_kernel<<<static_cast<unsigned>(blocks < 65535 ? blocks : 65535), threads, 0, stream>>>(cost, pruned, groups, n, m);
  return cudaGetLastError();
}

}  // namespace surgeon
