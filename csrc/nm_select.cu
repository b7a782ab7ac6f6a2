#include "nm_select.h"

#include "element_cost.cuh"

namespace surgeon {
namespace {

enum class Output { kMask, kGroupCost, kWeight };

template <typename T, Output kOutput>
struct OutputType {
  using type = T;
};
template <typename T>
struct OutputType<T, Output::kMask> {
  using type = bool;
};
template <typename T>
struct OutputType<T, Output::kGroupCost> {
  using type = float;
};

template <typename T>
__device__ bool chosen(const NmProblem<T>& p, float total, bool before) {
  return before || !(p.ties ? total > p.threshold : total >= p.threshold);  // true for inf - inf
}

// Aligned rows: a lane holds whole groups, reads 16 bytes at a time and ranks the costs in registers.
template <typename T, int M, Output kOutput>
__global__ void __launch_bounds__(kThreads) aligned_kernel(NmProblem<T> p, typename OutputType<T, kOutput>::type* out) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int E = M > kVector ? M : kVector;
  constexpr int kRows = kUnroll<T, E>, kGroups = E / M;
  constexpr int kOutputs = kOutput == Output::kGroupCost ? kGroups : E;
  const Unit unit(blockIdx.x * kWarps + threadIdx.x / 32, p.rows, p.columns, E);
  const int drop = p.m - p.n;
  if (unit.rows <= 0) return;
  float a[E];
#pragma unroll
  for (int e = 0; e < E; ++e) a[e] = cost_factor(p.a + unit.column + e);
  float check = 0.0f;  // NaN if any cost is
  for (int row = 0; row < unit.rows; row += kRows) {
    const T* from = p.weight + (unit.row + row) * p.row_stride + unit.column;
    Packet<T, E> weights[kRows];
    float half_g[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row + u < unit.rows) {
        weights[u].load(from + u * p.row_stride);
        half_g[u] = 0.5f * cost_factor(p.g + unit.row + row + u);
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row + u >= unit.rows) break;
      const int64_t r = unit.row + row + u;
      alignas(16) typename OutputType<T, kOutput>::type result[kOutputs];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float cost[M], total = 0.0f;
        bool pruned[M], before = false;
#pragma unroll
        for (int i = 0; i < M; ++i) {
          cost[i] = element_cost(as_float(weights[u].at(group * M + i)), half_g[u], a[group * M + i]);
          check += cost[i];
        }
        if (p.previous != nullptr) {
          const bool* flags = p.previous + r * p.columns + unit.column + group * M;
#pragma unroll
          for (int i = 0; i < M; i += 4) {
            const uchar4 gone = __ldcs(reinterpret_cast<const uchar4*>(flags + i));
            before |= gone.x || gone.y || gone.z || gone.w;
            if (gone.x) cost[i] = -INFINITY;
            if (gone.y) cost[i + 1] = -INFINITY;
            if (gone.z) cost[i + 2] = -INFINITY;
            if (gone.w) cost[i + 3] = -INFINITY;
          }
        }
        mark_cheapest(cost, drop, pruned);
#pragma unroll
        for (int i = 0; i < M; ++i) total = __fadd_rn(total, pruned[i] ? fmaxf(cost[i], 0.0f) : 0.0f);
        if constexpr (kOutput == Output::kGroupCost) {
          result[group] = total;
        } else {
          const bool taken = chosen(p, total, before);
#pragma unroll
          for (int i = 0; i < M; ++i) {
            if constexpr (kOutput == Output::kMask) {
              result[group * M + i] = taken && pruned[i];
            } else {
              const T weight = weights[u].at(group * M + i);
              result[group * M + i] = taken && pruned[i] ? T{} : weight;
            }
          }
        }
      }
      if constexpr (kOutput == Output::kGroupCost) {
        store<sizeof(float) * kOutputs>(out + r * (p.columns / M) + unit.column / M, result);
      } else {
        store<sizeof(result)>(out + r * p.columns + unit.column, result);
      }
    }
  }
  if (isnan(check)) *p.invalid = true;
}

// Any M, any alignment: a block computes the costs of some groups of one row into shared memory, a thread ranks one.
template <typename T, Output kOutput>
__global__ void __launch_bounds__(kThreads) general_kernel(NmProblem<T> p, typename OutputType<T, kOutput>::type* out) {
  __shared__ float costs[kLargestGroup];
  __shared__ bool pruned[kLargestGroup], taken[kLargestGroup];
  const int groups_at_once = kLargestGroup / p.m, width = groups_at_once * p.m, drop = p.m - p.n;
  const int64_t pieces = ceil_div(p.columns, width);
  for (int64_t piece = blockIdx.x; piece < p.rows * pieces; piece += gridDim.x) {
    const int64_t row = piece / pieces, start = piece % pieces * width;
    const int size = static_cast<int>(p.columns - start < width ? p.columns - start : width);
    const T* weight = p.weight + row * p.row_stride + start;
    const bool* previous = p.previous == nullptr ? nullptr : p.previous + row * p.columns + start;
    const float half_g = p.g == nullptr ? 0.0f : 0.5f * cost_factor(p.g + row);
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const float w = as_float(weight[i]);
      float cost = p.g == nullptr ? w : element_cost(w, half_g, cost_factor(p.a + start + i));
      if (isnan(cost)) *p.invalid = true;
      if (previous != nullptr && previous[i]) cost = -INFINITY;
      costs[i] = cost;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const int group = i / p.m * p.m;
      const float mine = costs[i];
      int rank = 0;
      for (int j = group; j < group + p.m; ++j) rank += costs[j] < mine || (costs[j] == mine && j < i);
      pruned[i] = rank < drop;
    }
    __syncthreads();
    for (int group = threadIdx.x; group < size / p.m; group += kThreads) {
      float total = 0.0f;
      bool before = false;
      for (int i = group * p.m; i < (group + 1) * p.m; ++i) {
        const bool gone = previous != nullptr && previous[i];
        before |= gone;
        if (pruned[i]) total = __fadd_rn(total, gone ? 0.0f : costs[i]);
      }
      if constexpr (kOutput == Output::kGroupCost) {
        out[row * (p.columns / p.m) + start / p.m + group] = total;
      } else {
        taken[group] = chosen(p, total, before);
      }
    }
    __syncthreads();
    if constexpr (kOutput != Output::kGroupCost) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const bool gone = pruned[i] && taken[i / p.m];
        if constexpr (kOutput == Output::kMask) {
          out[row * p.columns + start + i] = gone;
        } else {
          out[row * p.columns + start + i] = gone ? T{} : weight[i];
        }
      }
      __syncthreads();
    }
  }
}

template <typename T, int M, Output kOutput>
void launch_aligned(const NmProblem<T>& p, typename OutputType<T, kOutput>::type* out, cudaStream_t stream) {
  constexpr int64_t kColumns = 32 * (M * sizeof(T) > 16 ? M : 16 / sizeof(T));
  const int64_t units = ceil_div(p.columns, kColumns) * ceil_div(p.rows, kUnitRows);
  aligned_kernel<T, M, kOutput><<<static_cast<unsigned>(ceil_div(units, kWarps)), kThreads, 0, stream>>>(p, out);
}

template <typename T>
bool aligned(const NmProblem<T>& p) {
  const int64_t lane = p.m * sizeof(T) > 16 ? p.m : 16 / sizeof(T);
  return p.g != nullptr && p.columns % lane == 0 && p.row_stride * sizeof(T) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(p.previous) % 4 == 0;
}

template <typename T, Output kOutput>
cudaError_t launch(const NmProblem<T>& p, typename OutputType<T, kOutput>::type* out, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (aligned(p) && p.m == 4) {
    launch_aligned<T, 4, kOutput>(p, out, stream);
  } else if (aligned(p) && p.m == 8) {
    launch_aligned<T, 8, kOutput>(p, out, stream);
  } else if (aligned(p) && p.m == 16) {
    launch_aligned<T, 16, kOutput>(p, out, stream);
  } else {
    const int64_t pieces = p.rows * ceil_div(p.columns, kLargestGroup / p.m * p.m);
    const unsigned blocks = static_cast<unsigned>(pieces < (1 << 20) ? pieces : 1 << 20);
    general_kernel<T, kOutput><<<blocks, kThreads, 0, stream>>>(p, out);
  }
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t nm_mask(const NmProblem<T>& problem, bool* pruned, cudaStream_t stream) {
  return launch<T, Output::kMask>(problem, pruned, stream);
}

template <typename T>
cudaError_t nm_group_cost(const NmProblem<T>& problem, float* cost, cudaStream_t stream) {
  return launch<T, Output::kGroupCost>(problem, cost, stream);
}

template <typename T>
cudaError_t nm_prune(const NmProblem<T>& problem, T* pruned_weight, cudaStream_t stream) {
  return launch<T, Output::kWeight>(problem, pruned_weight, stream);
}

#define INSTANTIATE(T)                                                              \
  template cudaError_t nm_mask(const NmProblem<T>&, bool*, cudaStream_t);           \
  template cudaError_t nm_group_cost(const NmProblem<T>&, float*, cudaStream_t);    \
  template cudaError_t nm_prune(const NmProblem<T>&, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace surgeon
