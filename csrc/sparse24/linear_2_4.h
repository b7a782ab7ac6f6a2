#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace surgeon {

constexpr int kMaxDevices = 64;

// A unit of W, 16 rows x 128 columns, is one k-tile of a warp: 16 x 64 values of 2 bytes, then 4 bits for every group
// of 4 columns, in the order of surgeon_kernels/sparse24/linear_2_4_layout.py.
constexpr int kUnitRows = 16;
constexpr int kUnitColumns = 128;
constexpr int kUnitPositionsAt = 2048;  // bytes from the unit's beginning
constexpr int kUnitBytes = 2304;

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// Programmatic dependent launch, at the beginning or at the end of a kernel's mainloop: the next kernel's first loads
// of a weight overlap the rest of this one.
enum class Overlap : int { kNone = 0, kEarly = 1, kLate = 2 };

// y[tokens, rows] = act(x[tokens, columns] W^T + bias), W 2:4 sparse, [ceil(rows / 16)][units][kUnitBytes]. Kernels on
// capability 9.0 and newer start to read W while the kernel before them in the stream may still run, and wait for its
// end before they touch x, bias or y: a kernel that writes W must have ended for the host before the first call.
struct Linear24 {
  const void* weight;  // aligned to 16 bytes
  const void* x;       // contiguous, aligned to 16 bytes, columns a multiple of 8
  const void* bias;    // [rows] or null
  void* y;             // contiguous
  int tokens;
  int rows;
  int columns;
  int units;  // ceil(columns / kUnitColumns), the length of the mainloop
  Activation activation;
  bool half;  // float16, else bfloat16
  Overlap overlap;
};

// Output tiles first .. end - 1, computed by `clusters` clusters. Split-K: the `split` blocks of a cluster share the
// units of its tile and add their sums at the end.
struct TileRange24 {
  int first;
  int end;
  int split;
  int clusters;
};

// A kernel for output tiles of `rows` x `tokens`, whose blocks take `k_units` units in a step of the mainloop. `launch`
// launches it or, where `capacity` is given, only says how many clusters of `split` blocks are resident at a time.
// cudaErrorNotSupported where the build does not hold it for the current device.
struct Kernel24 {
  int tokens;
  int rows;
  int k_units;
  int sharers;      // blocks of a cluster that share x, for each of those that share K
  bool persistent;  // a block may compute several tiles
  Overlap overlap;
  cudaError_t (*launch[2])(const Linear24& call, const TileRange24& tiles, cudaStream_t stream,
                           int* capacity);  // bf16, fp16
};

// Kernels on mma.sp (every device from capability 8.0) and on wgmma.sp (9.0).
enum Mma24 { kMma8Narrow, kMma8, kMma16, kMma32, kMmaCount };
constexpr int kWgmmaCount = 26;
constexpr int kKernelCount = kMmaCount + kWgmmaCount;
const Kernel24& linear_2_4_mma_kernel(int which);
const Kernel24& linear_2_4_wgmma_kernel(int which);

// Choices are numbers: below linear_2_4_dense() a kernel and its split, those below linear_2_4_mma_choices() on mma.sp;
// linear_2_4_dense() a dense product with the unpacked weight, the last of linear_2_4_choices(); from there on, if the
// caller has the weight also as cuSPARSELt compresses it (`library`), that library's algorithm of the number that is
// left.
int linear_2_4_mma_choices();
int linear_2_4_dense();
int linear_2_4_choices();

// The choice of the rules in linear_2_4.cpp, or the one pinned for this device, these sizes and this dtype, if it runs.
// Pinned is what exists; false otherwise. Devices beyond kMaxDevices throw std::out_of_range.
int linear_2_4_choice(const Linear24& call, bool library);
bool linear_2_4_pin(const Linear24& call, bool library, int choice);

// Runs a kernel; cudaErrorNotSupported where the device, the build or the sizes do not allow it and for the dense
// product, which is the caller's, cudaErrorInvalidValue where there is no such choice.
cudaError_t linear_2_4_run(const Linear24& call, int choice, cudaStream_t stream);

// Tile and occupancy of a choice below linear_2_4_dense() on the current device: its estimated time depends on them.
struct Geometry24 {
  int wgmma;  // which of the kernels on wgmma.sp; negative for mma.sp
  int tile_rows, tile_tokens;
  int split;
  int resident;  // clusters at a time; 0 or less where it does not run
};
Geometry24 linear_2_4_geometry(int choice, bool half);

// dense[rows, columns] = W, 16 bits each, contiguous and aligned to 16 bytes.
cudaError_t linear_2_4_unpack(const void* weight, void* dense, int rows, int columns, cudaStream_t stream);

}  // namespace surgeon
