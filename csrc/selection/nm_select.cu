#include "nm_select.h"

#include "element_cost.cuh"
#include "mark_cheapest.cuh"

// N:M selection is memory bound: weights are read once, past the caches.
//
//   aligned rows, a warp to a tile, no shared memory                     any M, any alignment: a block to a segment
//   ────────────────────────────────────────────────                     ──────────────────────────────────────────
//   prologue   ld the factors a of the lane's columns                    costs of its groups ─> shared memory
//   mainloop   ld kUnroll rows of weights, 16 bytes each, all in flight  __syncthreads
//              cost ─> mark the M - N cheapest in registers              rank by counting, a thread to a weight
//   epilogue   st the mask, the group's cost or the pruned weights       __syncthreads ─> st
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

// Small blocks, for 2:4 of few rows each, so that all multiprocessors end together. Tiles of larger groups have more
// rows, which share the loads of their factors.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
template <int M>
constexpr int kRowSteps = M == 4 ? 1 : 8;  // of the mainloop, kUnroll rows each

constexpr int kGeneralThreads = 256;

template <typename T>
__device__ bool within_threshold(const NmProblem<T>& p, float total, bool before) {
  return before || !(p.ties ? total > p.threshold : total >= p.threshold);  // true for inf - inf
}

// Costs of weights that are pruned already become -1, to come before all others. True where there are any.
template <int M>
__device__ bool rank_previous_first(const bool* previous, float (&cost)[M]) {
  bool any = false;
#pragma unroll
  for (int word = 0; word < M / 4; ++word) {
    const unsigned gone = __ldcs(reinterpret_cast<const unsigned*>(previous) + word);
    any |= gone != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (gone & 0xffu << 8 * i) cost[4 * word + i] = -1.0f;
    }
  }
  return any;
}

// Word `i` of a group of T, zero in the weights that are marked.
template <typename T>
__device__ unsigned zero_marked(unsigned word, const unsigned* marks, int i) {
  if constexpr (sizeof(T) == 4) {
    return marked(marks, i) ? 0 : word;
  } else {  // two weights: each one's mark, spread over its 16 bits
    const unsigned ones = __byte_perm(marks[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
    return word & ~(ones * 0xffffu);
  }
}

// Aligned rows: a lane holds whole groups of some rows, reads 16 bytes at a time, all rows before it uses one, and
// ranks the costs in registers. kHalf: N = M / 2. kLimited: there is a threshold or a mask of earlier choices.
template <typename T, int M, Output kOutput, bool kHalf, bool kLimited>
__global__ void __launch_bounds__(kThreads, M == 4 ? 8 : 4)
    aligned_kernel(NmProblem<T> p, typename OutputType<T, kOutput>::type* out) {
  static_assert(M == 4 || M == 8 || M == 16, "marks are bytes of whole words, and the sort is unrolled");
  constexpr int E = kLaneColumns<T, M>, kGroups = E / M, kRows = Rows<T, E>::kCount;
  constexpr int kBytes = kOutput == Output::kMask ? E : kOutput == Output::kWeight ? E * sizeof(T) : 4 * kGroups;
  const WarpTile tile(blockIdx.x * kWarps + threadIdx.x / 32, p.rows, p.columns, E, kRowSteps<M> * kRows);
  if (tile.rows <= 0) return;
  float a[E];
  float check = 0.0f;  // NaN if any cost is
  for (int first = 0; first < tile.rows; first += kRows) {
    Rows<T, E> rows;
    rows.load_weights(tile, first, p.weight, p.row_stride);
    if (first == 0) cost_factors(p.a + tile.column, a);
    rows.load_g(p.g);
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t at = rows.row[u] * p.columns + tile.column;
      alignas(16) unsigned result[kBytes / 4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float cost[M];
        unsigned marks[M / 4];
        bool before = false;
#pragma unroll
        for (int i = 0; i < M; ++i) {
          cost[i] = element_cost(rows.weights[u].at(group * M + i), rows.half_g[u], a[group * M + i]);
          check += cost[i];
        }
        if (kLimited && p.previous != nullptr) before = rank_previous_first(p.previous + at + group * M, cost);
        const float total = mark_cheapest<kHalf>(cost, p.m - p.n, marks);
        if constexpr (kLimited) {
          const bool taken = within_threshold(p, total, before);
#pragma unroll
          for (int word = 0; word < M / 4; ++word) marks[word] = taken ? marks[word] : 0;
        }
        if constexpr (kOutput == Output::kGroupCost) {
          result[group] = __float_as_uint(total);
        } else if constexpr (kOutput == Output::kMask) {
#pragma unroll
          for (int word = 0; word < M / 4; ++word) result[group * (M / 4) + word] = marks[word];
        } else {
          constexpr int kWords = M * sizeof(T) / 4;
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            result[group * kWords + i] = zero_marked<T>(rows.weights[u].word(group * kWords + i), marks, i);
          }
        }
      }
      store<kBytes>(out + (kOutput == Output::kGroupCost ? at / M : at), result);
    }
  }
  if (isnan(check)) *p.invalid = true;
}

// Any M, any alignment: a block computes the costs of some groups of one row into shared memory, a thread ranks one.
template <typename T, Output kOutput>
__global__ void __launch_bounds__(kGeneralThreads, kOutput == Output::kGroupCost ? 4 : 1)
    general_kernel(NmProblem<T> p, typename OutputType<T, kOutput>::type* out) {
  __shared__ float costs[kLargestGroup];
  __shared__ bool pruned[kLargestGroup], taken[kLargestGroup];
  const int segment_groups = kLargestGroup / p.m, width = segment_groups * p.m, drop = p.m - p.n;
  const int64_t segments = ceil_div(p.columns, width);
  for (int64_t segment = blockIdx.x; segment < p.rows * segments; segment += gridDim.x) {
    const int64_t row = segment / segments, start = segment % segments * width;
    const int size = static_cast<int>(p.columns - start < width ? p.columns - start : width);
    const T* weight = p.weight + row * p.row_stride + start;
    const bool* previous = p.previous == nullptr ? nullptr : p.previous + row * p.columns + start;
    const float half_g = p.g == nullptr ? 0.0f : 0.5f * cost_factor(p.g + row);
    for (int i = threadIdx.x; i < size; i += kGeneralThreads) {
      const float w = as_float(weight[i]);
      float cost = p.g == nullptr ? w : element_cost(w, half_g, cost_factor(p.a + start + i));
      if (isnan(cost)) *p.invalid = true;
      if (previous != nullptr && previous[i]) cost = -INFINITY;
      costs[i] = cost;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kGeneralThreads) {
      const int group = i / p.m * p.m;
      const float mine = costs[i];
      int rank = 0;
      for (int j = group; j < group + p.m; ++j) rank += costs[j] < mine || (costs[j] == mine && j < i);
      pruned[i] = rank < drop;
    }
    __syncthreads();
    for (int group = threadIdx.x; group < size / p.m; group += kGeneralThreads) {
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
        taken[group] = within_threshold(p, total, before);
      }
    }
    __syncthreads();
    if constexpr (kOutput != Output::kGroupCost) {
      for (int i = threadIdx.x; i < size; i += kGeneralThreads) {
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
cudaError_t launch_aligned(const NmProblem<T>& p, typename OutputType<T, kOutput>::type* out, cudaStream_t stream) {
  constexpr int E = kLaneColumns<T, M>;
  const int64_t tiles = ceil_div(p.columns, 32 * E) * ceil_div(p.rows, kRowSteps<M> * Rows<T, E>::kCount);
  const int64_t blocks = ceil_div(tiles, kWarps);
  const auto run = [&](auto half) {
    constexpr bool kHalf = decltype(half)::value;
    if constexpr (kOutput == Output::kMask) {
      if (p.previous != nullptr || !p.ties || p.threshold != INFINITY)
        return launch_kernel(aligned_kernel<T, M, kOutput, kHalf, true>, blocks, kThreads, 0, stream, p, out);
    }
    return launch_kernel(aligned_kernel<T, M, kOutput, kHalf, false>, blocks, kThreads, 0, stream, p, out);
  };
  return 2 * p.n == M ? run(std::true_type()) : run(std::false_type());
}

template <typename T>
bool aligned(const NmProblem<T>& p) {
  const int64_t lane = p.m * sizeof(T) > 16 ? p.m : 16 / sizeof(T);
  return p.g != nullptr && p.columns % lane == 0 && p.row_stride * sizeof(T) % 16 == 0 && aligned_to(16, p.weight) &&
         aligned_to(16, p.a) && aligned_to(4, p.previous);
}

template <typename T, Output kOutput>
cudaError_t launch(const NmProblem<T>& p, typename OutputType<T, kOutput>::type* out, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  switch (aligned(p) ? p.m : 0) {
    case 4:
      return launch_aligned<T, 4, kOutput>(p, out, stream);
    case 8:
      return launch_aligned<T, 8, kOutput>(p, out, stream);
    case 16:
      return launch_aligned<T, 16, kOutput>(p, out, stream);
    default: {
      const int64_t segments = p.rows * ceil_div(p.columns, kLargestGroup / p.m * p.m);
      const int64_t blocks = segments < (1 << 20) ? segments : 1 << 20;
      return launch_kernel(general_kernel<T, kOutput>, blocks, kGeneralThreads, 0, stream, p, out);
    }
  }
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

#define INSTANTIATE(T)                                                           \
  template cudaError_t nm_mask(const NmProblem<T>&, bool*, cudaStream_t);        \
  template cudaError_t nm_group_cost(const NmProblem<T>&, float*, cudaStream_t); \
  template cudaError_t nm_prune(const NmProblem<T>&, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace surgeon
