#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace surgeon {

// The largest M of a pattern.
constexpr int kLargestGroup = 1024;

// Costs of a matrix [rows, columns] of float, __half or __nv_bfloat16, unit stride along its columns:
// ½ weight² g aᵀ, or the weights themselves where g and a are null.
template <typename T>
struct NmProblem {
  const T* weight;
  const float* g;  // [rows]
  const float* a;  // [columns]
  int64_t rows, columns, row_stride;
  int n, m;              // keep n of every m consecutive columns; columns are divisible by m, m <= kLargestGroup
  const bool* previous;  // [rows, columns], or null: pruned already, before all others
  float threshold;       // groups that cost more are left alone, and those that cost as much unless `ties`
  bool ties;
  bool* invalid;  // set, and never cleared, where a cost is NaN or one of its factors negative
};

// Of equal costs the lower column is pruned first. A group costs the sum of its pruned weights' costs, added in the
// order of the columns; one with a weight that is pruned already is pruned whatever it costs. Outputs are contiguous.
template <typename T>
cudaError_t nm_mask(const NmProblem<T>& problem, bool* pruned, cudaStream_t stream);
template <typename T>
cudaError_t nm_group_cost(const NmProblem<T>& problem, float* cost, cudaStream_t stream);  // [rows, columns / m]
template <typename T>
cudaError_t nm_prune(const NmProblem<T>& problem, T* pruned_weight, cudaStream_t stream);  // weight, zero where pruned

}  // namespace surgeon
