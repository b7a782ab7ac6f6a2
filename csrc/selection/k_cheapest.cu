#include "k_cheapest.h"

#include <algorithm>

#include "element_cost.cuh"
#include "mark_cheapest.cuh"

// Costs of many matrices are counted by one launch of persistent blocks:
//
//   tiles of all matrices, in their order   | matrix 0 ........ | matrix 1 ... | matrix 2 ............. |
//   blocks, a run of equal length each      |   0    |    1   |    2    |    3   |    4    |    5      |
//
//   for each tile of the run, a warp's tile to a warp:
//     ld kUnroll rows of weights, all in flight ─> cost, or a group's cost in registers ─> red.shared bin += 1
//   at the end of a matrix or of the run:
//     __syncthreads ─> atomicAdd of the bins that counted to the matrix's counts in device memory
namespace surgeon {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 32;  // of a warp, in a histogram

// A persistent block takes a run of tiles, a warp's tile for each of its warps, and adds its counts to the output when
// it comes to another matrix. Counting in shared memory costs as much as reading, unless few costs fall into the bins.
template <typename T, int E, int M, bool kHalf>
__global__ void __launch_bounds__(kThreads, M == 1   ? 4
                                            : M == 4 ? 3
                                                     : 1)
    histogram_kernel(const CostMatrix* __restrict__ matrices, int count, int64_t tiles, CostHistogram h,
                     int64_t* counts) {
  static_assert(E % M == 0, "a lane has whole groups");
  constexpr int kRows = kUnroll<T, E>;
  extern __shared__ unsigned histogram[];  // below, bins, invalid
  const unsigned width = static_cast<unsigned>(h.bins) << h.shift;
  unsigned bins;  // address of the first bin; opaque, or the compiler would compute it anew for every count
  asm volatile("mov.u32 %0, %1;" : "=r"(bins) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(histogram + 1))));
  const int drop = h.m - h.n, size = h.bins + 2;
  int64_t tile = tiles * blockIdx.x / gridDim.x;
  const int64_t end = tiles * (blockIdx.x + 1) / gridDim.x;
  int current = 0;
  while (current + 1 < count && matrices[current + 1].first_tile <= tile) ++current;
  for (int i = threadIdx.x; i < size; i += kThreads) histogram[i] = 0;
  __syncthreads();
  while (tile < end) {
    const CostMatrix matrix = matrices[current];
    const int64_t stop = current + 1 < count ? min(end, matrices[current + 1].first_tile) : end;
    unsigned below = 0;
    float check = 0.0f;  // NaN if any cost is
    const auto add = [&](float cost) {
      const unsigned offset = static_cast<unsigned>(__float_as_int(cost) - h.low);
      below += offset >> 31;
      if (offset < width) asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(bins + (offset >> h.shift) * 4) : "memory");
    };
    for (; tile < stop; ++tile) {
      const unsigned index = static_cast<unsigned>(tile - matrix.first_tile) * kWarps + threadIdx.x / 32;
      const WarpTile part(index, matrix.rows, matrix.columns, E, kTileRows);
      if (part.rows <= 0) continue;
      const T* from = static_cast<const T*>(matrix.weight) + part.row * matrix.row_stride + part.column;
      const float* g = matrix.g + part.row * h.row_step;
      float a[E];
      cost_factors(matrix.a + part.column, a);
      for (int row = 0; row < part.rows; row += kRows) {
        Packet<T, E> weights[kRows];
        float half_g[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          if (row + u < part.rows) {
            weights[u].load(from + u * matrix.row_stride);
            half_g[u] = 0.5f * cost_factor(g + u * h.row_step);
          }
        }
        from += kRows * matrix.row_stride;
        g += kRows * h.row_step;
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          if (row + u >= part.rows) break;
#pragma unroll
          for (int group = 0; group < E; group += M) {
            float cost[M];
#pragma unroll
            for (int i = 0; i < M; ++i) {
              cost[i] = element_cost(weights[u].at(group + i), half_g[u], a[group + i]);
              check += cost[i];
            }
            if constexpr (M == 1) {
              add(cost[0]);
            } else {
              unsigned marks[M / 4];
              add(mark_cheapest<kHalf>(cost, drop, marks));
            }
          }
        }
      }
    }
    below = __reduce_add_sync(0xffffffff, below);
    if (threadIdx.x % 32 == 0) atomicAdd(&histogram[0], below);
    if (isnan(check)) atomicAdd(&histogram[size - 1], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (histogram[i] != 0) {
        auto* to = reinterpret_cast<unsigned long long*>(counts + static_cast<int64_t>(current) * size + i);
        atomicAdd(to, static_cast<unsigned long long>(histogram[i]));
        histogram[i] = 0;
      }
    }
    __syncthreads();
    while (current + 1 < count && matrices[current + 1].first_tile <= tile) ++current;
  }
}

template <typename T, int E>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(CostMatrix matrix, float threshold, bool ties, bool* __restrict__ selected) {
  using Loaded = Rows<T, E>;
  const WarpTile tile(blockIdx.x * kWarps + threadIdx.x / 32, matrix.rows, matrix.columns, E, Loaded::kCount);
  if (tile.rows <= 0) return;
  Loaded rows;
  rows.load_weights(tile, 0, static_cast<const T*>(matrix.weight), matrix.row_stride);
  float a[E];
  cost_factors(matrix.a + tile.column, a);
  rows.load_g(matrix.g);
#pragma unroll
  for (int u = 0; u < Loaded::kCount; ++u) {
    alignas(16) bool result[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float cost = element_cost(rows.weights[u].at(e), rows.half_g[u], a[e]);
      result[e] = cost < threshold || (ties && cost == threshold);
    }
    store<E>(selected + rows.row[u] * matrix.columns + tile.column, result);
  }
}

template <typename T, int E, int M, bool kHalf = false>
cudaError_t launch_histogram(const CostMatrix* matrices, int count, int64_t tiles, const CostHistogram& h,
                             int64_t* counts, cudaStream_t stream) {
  const size_t shared = (h.bins + 2) * sizeof(unsigned);
  int device, processors, resident;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto kernel = histogram_kernel<T, E, M, kHalf>;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(tiles, int64_t{processors} * std::max(1, resident));
  return launch_kernel(kernel, blocks, kThreads, shared, stream, matrices, count, tiles, h, counts);
}

}  // namespace

template <typename T>
bool aligned_costs(const CostMatrix& matrix, int m) {
  const int64_t lane = std::max<int64_t>(m, 16 / sizeof(T));
  return (m == 1 || m == 4 || m == 8 || m == 16) && matrix.columns % lane == 0 &&
         matrix.row_stride * sizeof(T) % 16 == 0 && aligned_to(16, matrix.weight) && aligned_to(16, matrix.a);
}

template <typename T>
int64_t assign_tiles(CostMatrix* matrices, int count, const CostHistogram& h) {
  const int64_t lane = h.aligned ? std::max<int64_t>(h.m, 16 / sizeof(T)) : 1;
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    CostMatrix& matrix = matrices[i];
    matrix.rows = ceil_div(matrix.rows, h.row_step);
    matrix.row_stride *= h.row_step;
    matrix.first_tile = tiles;
    tiles += ceil_div(ceil_div(matrix.columns, 32 * lane) * ceil_div(matrix.rows, kTileRows), kWarps);
  }
  return tiles;
}

template <typename T>
cudaError_t cost_histogram(const CostMatrix* matrices, int count, int64_t tiles, const CostHistogram& h,
                           int64_t* counts, cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  if (!h.aligned) return launch_histogram<T, 1, 1>(matrices, count, tiles, h, counts, stream);
  switch (h.m) {
    case 4:
      if (h.n == 2) return launch_histogram<T, kLaneColumns<T, 4>, 4, true>(matrices, count, tiles, h, counts, stream);
      return launch_histogram<T, kLaneColumns<T, 4>, 4>(matrices, count, tiles, h, counts, stream);
    case 8:
      return launch_histogram<T, kLaneColumns<T, 8>, 8>(matrices, count, tiles, h, counts, stream);
    case 16:
      return launch_histogram<T, kLaneColumns<T, 16>, 16>(matrices, count, tiles, h, counts, stream);
    default:
      return launch_histogram<T, kLaneColumns<T, 1>, 1>(matrices, count, tiles, h, counts, stream);
  }
}

template <typename T>
cudaError_t cost_mask(const CostMatrix& matrix, float threshold, bool ties, bool* selected, cudaStream_t stream) {
  const bool aligned = aligned_costs<T>(matrix, 1);
  const int64_t lane = aligned ? kLaneColumns<T, 1> : 1;
  const int rows = aligned ? Rows<T, kLaneColumns<T, 1>>::kCount : Rows<T, 1>::kCount;
  const int64_t tiles = ceil_div(matrix.columns, 32 * lane) * ceil_div(matrix.rows, rows);
  if (tiles == 0) return cudaSuccess;
  const auto kernel = aligned ? mask_kernel<T, kLaneColumns<T, 1>> : mask_kernel<T, 1>;
  return launch_kernel(kernel, ceil_div(tiles, kWarps), kThreads, 0, stream, matrix, threshold, ties, selected);
}

#define INSTANTIATE(T)                                                                                    \
  template bool aligned_costs<T>(const CostMatrix&, int);                                                 \
  template int64_t assign_tiles<T>(CostMatrix*, int, const CostHistogram&);                               \
  template cudaError_t cost_histogram<T>(const CostMatrix*, int, int64_t, const CostHistogram&, int64_t*, \
                                         cudaStream_t);                                                   \
  template cudaError_t cost_mask<T>(const CostMatrix&, float, bool, bool*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace surgeon
