#include "chunked_solve.h"

// The effect of a solved chunk of the sequential update: Y gains scatter(λ) A⁻¹, and the targets of later chunks lose
// G⁻¹ times that. A block takes a strip of columns through all of it, so nothing waits between blocks.
namespace surgeon {
namespace {

constexpr int kStrip = 64;  // columns of a block
constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 8;  // of the chunk, applied together

// Memory bound: λ's rows of A⁻¹ are read once, a strip of columns by each block, a row's strip by one warp.
__global__ __launch_bounds__(kThreads, 2) void apply_kernel(GatheredSystems systems, const int64_t* row_offsets,
                                                            SolvedChunk chunk, int64_t C, const float* solution,
                                                            float* Y, float* pending) {
  __shared__ float partial[kWarps][kStrip];
  __shared__ float gained[kRows][kStrip];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kStrip;
  const float* A = systems.A_inv + strip + lane;
  const bool first = strip + lane < C, second = strip + lane + 32 < C;
  const int64_t column = strip + threadIdx.x % kStrip;

  for (int64_t base = chunk.first_row; base < chunk.last_row; base += kRows) {
    const int rows = static_cast<int>(chunk.last_row - base < kRows ? chunk.last_row - base : kRows);
    for (int q = 0; q < rows; ++q) {
      const int64_t row = base + q;
      const int64_t begin = row_offsets[row] > chunk.begin ? row_offsets[row] : chunk.begin;
      const int64_t end = row_offsets[row + 1] < chunk.end ? row_offsets[row + 1] : chunk.end;
      float sum[2] = {};
#pragma unroll 8
      for (int64_t i = begin + warp; i < end; i += kWarps) {
        const float* a = A + systems.columns[i] * systems.A_stride;
        const float x = solution[i];
        sum[0] = fmaf(x, first ? __ldg(a) : 0.0f, sum[0]);
        sum[1] = fmaf(x, second ? __ldg(a + 32) : 0.0f, sum[1]);
      }
      partial[warp][lane] = sum[0];
      partial[warp][lane + 32] = sum[1];
      __syncthreads();
      if (threadIdx.x < kStrip) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
        gained[q][threadIdx.x] = total;
        if (column < C) Y[row * C + column] += total;
      }
      __syncthreads();
    }
    if (column < C) {
      for (int64_t row = chunk.last_row - 1 + threadIdx.x / kStrip; row < chunk.block_end; row += kThreads / kStrip) {
        const float* G = systems.G_inv + row * systems.G_stride + base;
        float* target = pending + (row - chunk.block_begin) * C + column;
        float value = *target;
        for (int q = 0; q < rows; ++q) value = fmaf(-G[q], gained[q][threadIdx.x % kStrip], value);
        *target = value;
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t apply_chunk(const GatheredSystems& systems, const int64_t* row_offsets, const SolvedChunk& chunk, int64_t C,
                        const float* solution, float* Y, float* pending, cudaStream_t stream) {
  if (chunk.begin == chunk.end) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((C + kStrip - 1) / kStrip));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, apply_kernel, systems, row_offsets, chunk, C, solution, Y, pending);
}

}  // namespace surgeon
