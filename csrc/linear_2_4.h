#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace surgeon {

constexpr int kMaxDevices = 64;
constexpr int kUnitColumns = 128;
constexpr int kUnitBytes = 2304;  // 16 rows x 64 values of 2 bytes, then 4 bits for every group of 4 columns

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// When the next kernel of the stream may start: its first loads of a weight then overlap the end of this one.
enum class Overlap : int { kNone = 0, kEarly = 1, kLate = 2 };

// y[tokens, rows] = act(x[tokens, columns] W^T + bias), W 2:4 sparse, [ceil(rows / 16)][units][kUnitBytes] in the order
// of surgeon_kernels/linear_2_4_layout.py.
struct Linear24 {
  const void* weight;
  const void* x;     // contiguous, aligned to 16 bytes, columns a multiple of 8
  const void* bias;  // [rows] or null
  void* y;           // contiguous
  int tokens;
  int rows;
  int columns;
  int units;  // ceil(columns / kUnitColumns)
  Activation activation;
  bool half;  // float16, else bfloat16
  Overlap overlap;
};

// A kernel for blocks of `rows` x `tokens`, whose warps take `step` units at a time. `run` launches it with `split`
// blocks of a cluster sharing the columns or, where `capacity` is given, only says how many such clusters run at once.
struct Kernel24 {
  int tokens;
  int rows;
  int step;
  Overlap overlap;
  cudaError_t (*run[2])(const Linear24& call, int split, cudaStream_t stream, int* capacity);  // bfloat16, float16
};

// Kernels on mma.sp (every device from capability 8.0) and on wgmma.sp (9.0).
enum Mma24 { kMma8Narrow, kMma8, kMma16, kMma32, kMmaCount };
enum Wgmma24 { kWgmma32, kWgmma64, kWgmma128, kWgmma128Wide, kWgmmaCount };
const Kernel24& linear_2_4_mma_kernel(int which);
const Kernel24& linear_2_4_wgmma_kernel(int which);

// The kernel that the rule in linear_2_4.cpp names, or the choice pinned for this device, these sizes and this dtype.
cudaError_t linear_2_4(const Linear24& call, cudaStream_t stream);

// A choice (kernel and split) by its number; cudaErrorNotSupported where the device or the sizes do not allow it.
int linear_2_4_choices();
cudaError_t linear_2_4_run(const Linear24& call, int choice, cudaStream_t stream);
void linear_2_4_pin(const Linear24& call, int choice);

}  // namespace surgeon
