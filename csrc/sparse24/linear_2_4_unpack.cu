// The dense weight from its fragments, for the products that the kernels do not compute: a block takes a unit, a thread
// eight columns of one of its rows.
#include "linear_2_4.h"

namespace surgeon {
namespace {

constexpr int kThreadColumns = 8;
constexpr int kThreads = kUnitRows * (kUnitColumns / kThreadColumns);

// Four columns: the two values where the nibble says, zero elsewhere.
__host__ __device__ inline uint2 spread(uint32_t values, uint32_t nibble) {
  const uint64_t four = static_cast<uint64_t>(values & 0xffff) << (16 * (nibble & 3)) |
                        static_cast<uint64_t>(values >> 16) << (16 * (nibble >> 2 & 3));
  return {static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32)};
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* weight, uint16_t* dense, int rows, int columns, int units) {
  const int block = blockIdx.x / units, unit = blockIdx.x % units;
  const int r = threadIdx.x / (kUnitColumns / kThreadColumns), c = threadIdx.x % (kUnitColumns / kThreadColumns) * 8;
  const int row = block * kUnitRows + r, column = unit * kUnitColumns + c;
  if (row >= rows || column >= columns) return;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(weight + static_cast<size_t>(blockIdx.x) * kUnitBytes);
  const int tile = c / 32, half = c % 32 / 16, group = c % 16 / 4, upper = r / 8, lane = r % 8 * 4;
  const uint32_t* values = words + (tile * 32 + lane + group) * 4 + 2 * half + upper;
  const uint32_t positions = words[512 + (lane + 2 * (tile % 2) + half) * 2 + tile / 2] >> (16 * upper + 4 * group);
  const uint2 first = spread(values[0], positions), second = spread(values[4], positions >> 4);
  *reinterpret_cast<uint4*>(dense + static_cast<size_t>(row) * columns + column) = {first.x, first.y, second.x,
                                                                                    second.y};
}

}  // namespace

cudaError_t linear_2_4_unpack(const void* weight, void* dense, int rows, int columns, cudaStream_t stream) {
  const int units = (columns + kUnitColumns - 1) / kUnitColumns;
  const int64_t blocks = static_cast<int64_t>((rows + kUnitRows - 1) / kUnitRows) * units;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, unpack_kernel, static_cast<const uint8_t*>(weight), static_cast<uint16_t*>(dense),
                            rows, columns, units);
}

}  // namespace surgeon
