#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace surgeon {

// One matrix [rows, columns] of costs ½ weight² g aᵀ, unit stride along its columns.
struct CostMatrix {
  const void* weight;
  const float* g;  // [rows]
  const float* a;  // [columns]
  int64_t rows, columns, row_stride;
  int64_t first_tile;  // see assign_tiles
};

// Sorts the costs of many matrices of T (float, __half or __nv_bfloat16) into bins by their bits, which order them as
// their values do: bin b of a matrix counts low + (b << shift) <= bits < low + ((b + 1) << shift).
struct CostHistogram {
  int n, m;  // m = 1: costs of single weights. Else of groups of m, the sum of their (m - n) cheapest
  int low, shift, bins;
  int row_step;  // only every row_step-th row counts
  bool aligned;  // rows can be read 16 bytes, and a group, at a time; must be so for m > 1, which is 4, 8 or 16
};

// Prepares descriptions of whole matrices for the kernel: leaves the rows that count, and fills first_tile. Returns the
// number of tiles.
template <typename T>
int64_t assign_tiles(CostMatrix* matrices, int count, const CostHistogram& histogram);

// True where a matrix can be read as CostHistogram::aligned says.
template <typename T>
bool aligned_costs(const CostMatrix& matrix, int m);

// counts: [count, 2 + bins], zeroed: how many costs are below low; the bins; how often a cost was seen to be NaN.
// matrices: in device memory.
template <typename T>
cudaError_t cost_histogram(const CostMatrix* matrices, int count, int64_t tiles, const CostHistogram& histogram,
                           int64_t* counts, cudaStream_t stream);

// selected[r, c] = cost < threshold, or cost == threshold if `ties`. Contiguous.
template <typename T>
cudaError_t cost_mask(const CostMatrix& matrix, float threshold, bool ties, bool* selected, cudaStream_t stream);

}  // namespace surgeon
