// The cheapest of the M costs of a group, all in one thread's registers.
#pragma once

namespace surgeon {

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
