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
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction each, where the compiler's way takes two
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

// What a warp reads of a matrix: some rows of a strip of 32 E columns, E for each lane. The first row, the number of
// rows, and this lane's first column; no rows past the last column.
struct Unit {
  int64_t column, row;
  int rows;

  __device__ Unit(unsigned index, int64_t matrix_rows, int64_t columns, int lane_columns, int unit_rows) {
    const unsigned strips = static_cast<unsigned>(ceil_div(columns, 32 * lane_columns));
    column = (static_cast<int64_t>(index % strips) * 32 + threadIdx.x % 32) * lane_columns;
    row = static_cast<int64_t>(index / strips) * unit_rows;
    const int64_t left = column < columns ? matrix_rows - row : 0;
    rows = left < unit_rows ? static_cast<int>(left) : unit_rows;
  }
};

// A factor g or a of a cost. Negative ones are errors: they become NaN, and with them the costs. -0 becomes +0.
__device__ inline float valid_factor(float x) { return x >= 0.0f ? fabsf(x) : NAN; }
__device__ inline float cost_factor(const float* from) { return valid_factor(__ldg(from)); }

// E factors from an address aligned to 16 bytes, or a single one.
template <int E>
__device__ inline void cost_factors(const float* from, float (&to)[E]) {
  if constexpr (E == 1) {
    to[0] = cost_factor(from);
  } else {
    static_assert(E % 4 == 0);
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      to[i] = valid_factor(four.x);
      to[i + 1] = valid_factor(four.y);
      to[i + 2] = valid_factor(four.z);
      to[i + 3] = valid_factor(four.w);
    }
  }
}

// w² (½ g) a, every product rounded on its own: bit for bit what the PyTorch reference computes.
__device__ inline float element_cost(float w, float half_g, float a) {
  return __fmul_rn(__fmul_rn(__fmul_rn(w, w), half_g), a);
}

// Some rows of a unit, from `first` on: their weights and ½ g. Where the unit has no more rows, its last one again:
// what is made of it is the same, and written twice.
template <typename T, int E>
struct Rows {
  static constexpr int kCount = kUnroll<T, E>;
  int64_t row[kCount];
  Packet<T, E> weights[kCount];
  float half_g[kCount];

  __device__ void load_weights(const Unit& unit, int first, const T* weight, int64_t row_stride) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      row[u] = unit.row + min(first + u, unit.rows - 1);
      weights[u].load(weight + row[u] * row_stride + unit.column);
    }
  }
  __device__ void load_g(const float* g) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) half_g[u] = 0.5f * cost_factor(g + row[u]);
  }
};

// Marks the `drop` cheapest of M costs, the lower index first among equals: byte i % 4 of marks[i / 4] is 1, or else 0.
// A byte each counts the costs that go before cost i; sums of 128 - drop and more set its highest bit.
template <int M>
__device__ inline void rank_costs(const float (&cost)[M], int drop, unsigned (&marks)[M / 4]) {
#pragma unroll
  for (int word = 0; word < M / 4; ++word) marks[word] = 0x01010101u * (0x80u - drop);
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = i + 1; j < M; ++j) {
      const bool in_order = cost[i] <= cost[j];
      const unsigned one_i = 1u << 8 * (i % 4), one_j = 1u << 8 * (j % 4);
      if (i / 4 == j / 4) {
        marks[i / 4] += in_order ? one_j : one_i;
      } else {
        if (in_order) marks[j / 4] += one_j;
        if (!in_order) marks[i / 4] += one_i;
      }
    }
  }
#pragma unroll
  for (int word = 0; word < M / 4; ++word) marks[word] = ~marks[word] >> 7 & 0x01010101u;
}

__device__ inline bool marked(const unsigned* marks, int i) { return marks[i / 4] & 1u << 8 * (i % 4); }

// The sum of the marked costs, in their order.
template <int M>
__device__ inline float marked_sum(const float (&cost)[M], const unsigned (&marks)[M / 4]) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < M; ++i) total = __fadd_rn(total, marked(marks, i) ? cost[i] : 0.0f);
  return total;
}

// Marks the two cheapest of four costs and returns their sum, in half of the instructions: both of a pair, or the
// cheaper of either pair.
__device__ inline float mark_two(const float (&cost)[4], unsigned (&marks)[1]) {
  const float lower[] = {fminf(cost[0], cost[1]), fminf(cost[2], cost[3])};
  const float upper[] = {fmaxf(cost[0], cost[1]), fmaxf(cost[2], cost[3])};
  const bool first = upper[0] <= lower[1], last = upper[1] < lower[0];
  const unsigned either = (cost[0] <= cost[1] ? 0x1u : 0x100u) | (cost[2] <= cost[3] ? 0x10000u : 0x1000000u);
  marks[0] = first ? 0x101u : last ? 0x1010000u : either;
  return __fadd_rn(last ? lower[1] : lower[0], first ? upper[0] : last ? upper[1] : lower[1]);
}

// Batcher's odd-even merge sort: of x[kFrom], x[kFrom + kStep], ... before kEnd, both halves are sorted.
template <int kFrom, int kEnd, int kStep, int M>
__device__ inline void merge_sorted(float (&x)[M]) {
  const auto order = [&x](int i, int j) {
    const float lower = fminf(x[i], x[j]), upper = fmaxf(x[i], x[j]);
    x[i] = lower;
    x[j] = upper;
  };
  if constexpr (2 * kStep < kEnd - kFrom) {
    merge_sorted<kFrom, kEnd, 2 * kStep>(x);
    merge_sorted<kFrom + kStep, kEnd, 2 * kStep>(x);
#pragma unroll
    for (int i = kFrom + kStep; i + kStep < kEnd; i += 2 * kStep) order(i, i + kStep);
  } else {
    order(kFrom, kFrom + kStep);
  }
}
template <int kFrom, int kEnd, int M>
__device__ inline void sort(float (&x)[M]) {
  if constexpr (kEnd - kFrom > 1) {
    constexpr int kMiddle = (kFrom + kEnd) / 2;
    sort<kFrom, kMiddle>(x);
    sort<kMiddle, kEnd>(x);
    merge_sorted<kFrom, kEnd, 1>(x);
  }
}

// Marks the cheaper half of M costs: all up to the largest of them, which is found from the sorted halves of the group.
template <int M>
__device__ inline void mark_half(const float (&cost)[M], unsigned (&marks)[M / 4]) {
  float sorted[M];
#pragma unroll
  for (int i = 0; i < M; ++i) sorted[i] = cost[i];
  sort<0, M / 2>(sorted);
  sort<M / 2, M>(sorted);
  float last = fminf(sorted[0], sorted[M - 1]);
#pragma unroll
  for (int i = 1; i < M / 2; ++i) last = fmaxf(last, fminf(sorted[i], sorted[M - 1 - i]));
  int count = 0;
#pragma unroll
  for (int word = 0; word < M / 4; ++word) {
    marks[word] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) marks[word] |= cost[4 * word + i] <= last ? 1u << 8 * i : 0u;
    count += __popc(marks[word]);
  }
  if (count != M / 2) rank_costs(cost, M / 2, marks);  // of equal costs not all are among them
}

// Marks the `drop` cheapest of M costs and returns their sum; kHalf: drop = M / 2.
template <bool kHalf, int M>
__device__ inline float mark_cheapest(const float (&cost)[M], int drop, unsigned (&marks)[M / 4]) {
  if constexpr (kHalf && M == 4) {
    return mark_two(cost, marks);
  } else if constexpr (kHalf) {
    mark_half(cost, marks);
  } else {
    rank_costs(cost, drop, marks);
  }
  return marked_sum(cost, marks);
}

}  // namespace surgeon
