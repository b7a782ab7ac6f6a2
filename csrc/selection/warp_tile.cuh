// Loads and stores of a matrix [rows, columns], a tile by a warp, and the launch of kernels that do so.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace surgeon {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launch that returns its own error; cudaGetLastError would take another's for it, and away from who asks next.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                          cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline bool aligned_to(int bytes, const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__half x) { return __half2float(x); }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// E weights of one row: loads of 16 bytes, for which the address must be aligned, or of a single weight.
template <typename T, int E>
struct Packet {
  static constexpr int kLoads = E * sizeof(T) / 16;
  static_assert(kLoads * 16 == E * sizeof(T));
  uint4 raw[kLoads];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ unsigned word(int i) const { return reinterpret_cast<const unsigned*>(raw)[i]; }
  __device__ float at(int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction each, where the compiler takes two
      return __uint_as_float(i % 2 ? word(i / 2) & 0xffff0000u : word(i / 2) << 16);
    } else {
      return as_float(reinterpret_cast<const T*>(raw)[i]);
    }
  }
};

template <typename T>
struct Packet<T, 1> {
  T raw;

  __device__ void load(const T* from) { raw = __ldcs(from); }
  __device__ float at(int) const { return as_float(raw); }
};

// Columns of a lane in aligned rows: whole groups of M, and whole loads of 16 bytes.
template <typename T, int M>
constexpr int kLaneColumns = M * sizeof(T) > 16 ? M : 16 / sizeof(T);

// Rows whose loads are in flight together: 64 bytes a lane hide the memory's latency.
template <typename T, int E>
constexpr int kUnroll = E * sizeof(T) <= 16   ? 4
                        : E * sizeof(T) <= 32 ? 2
                                              : 1;

// N bytes of registers to an address aligned to N (to 16 where N is larger), past the caches.
template <int N>
__device__ inline void store(void* to, const void* from) {
  if constexpr (N >= 16) {
#pragma unroll
    for (int i = 0; i < N / 16; ++i) __stcs(static_cast<uint4*>(to) + i, static_cast<const uint4*>(from)[i]);
  } else if constexpr (N == 8) {
    __stcs(static_cast<uint2*>(to), *static_cast<const uint2*>(from));
  } else if constexpr (N == 4) {
    __stcs(static_cast<unsigned*>(to), *static_cast<const unsigned*>(from));
  } else {
    static_assert(N == 1);
    *static_cast<char*>(to) = *static_cast<const char*>(from);
  }
}

// A warp's tile of a matrix: `tile_rows` rows of 32 lanes' columns. The first row, the number of rows, and this lane's
// first column; no rows past the last column.
struct WarpTile {
  int64_t column, row;
  int rows;

  __device__ WarpTile(unsigned index, int64_t matrix_rows, int64_t columns, int lane_columns, int tile_rows) {
    const unsigned strips = static_cast<unsigned>(ceil_div(columns, 32 * lane_columns));
    column = (static_cast<int64_t>(index % strips) * 32 + threadIdx.x % 32) * lane_columns;
    row = static_cast<int64_t>(index / strips) * tile_rows;
    const int64_t left = column < columns ? matrix_rows - row : 0;
    rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
  }
};

}  // namespace surgeon
