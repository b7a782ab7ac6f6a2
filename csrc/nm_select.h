#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace surgeon {

// pruned[r, c] = true for the (m - n) cheapest costs of every m consecutive columns; of equal costs the lower column
// goes first. cost is fp32 and contiguous, rows * columns long, columns divisible by m, m <= 32.
cudaError_t nm_select(const float* cost, bool* pruned, int64_t groups, int n, int m, cudaStream_t stream);

}  // namespace surgeon
