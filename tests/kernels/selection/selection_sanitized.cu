// Small problems of all kernels of N:M selection and cost thresholds, against loops on the host: for compute-sanitizer,
// which test_sanitized_gpu.py runs it under.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sanitized.h"
#include "selection/k_cheapest.h"
#include "selection/nm_select.h"

namespace {

int wrong = 0;

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    check(cudaMalloc(&data_, size * sizeof(T)));
    check(cudaMemset(data_, 0, size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return data_; }
  template <typename U>  // bool as char, so that std::vector holds it
  void expect(const std::vector<U>& values, const char* what) const {
    static_assert(sizeof(U) == sizeof(T));
    std::vector<U> found(size_);
    check(cudaMemcpy(found.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    if (values.size() == size_ && std::memcmp(found.data(), values.data(), size_ * sizeof(T)) == 0) return;
    std::printf("wrong: %s\n", what);
    ++wrong;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};

template <typename T>
void run(int rows, int columns, int stride, int n, int m) {
  const size_t size = static_cast<size_t>(rows) * columns;
  std::vector<T> weight(static_cast<size_t>(rows) * stride), pruned(size);
  std::vector<float> g(rows), a(columns), cost(size), total(size / m);
  std::vector<char> mask(size), cheap(size);
  for (T& x : weight) x = T(static_cast<float>(std::rand() % 9 - 4));  // many ties
  for (float& x : g) x = static_cast<float>(std::rand() % 3);
  for (float& x : a) x = static_cast<float>(std::rand() % 3);
  for (size_t i = 0; i < size; ++i) {
    const float w = static_cast<float>(weight[i / columns * stride + i % columns]);
    cost[i] = w * w * (0.5f * g[i / columns]) * a[i % columns];
    cheap[i] = cost[i] <= 1.0f;
  }
  for (size_t i = 0; i < size; ++i) {
    const size_t group = i / m * m;
    int before = 0;
    for (size_t j = group; j < group + m; ++j) before += cost[j] < cost[i] || (cost[j] == cost[i] && j < i);
    mask[i] = before < m - n;
    total[i / m] += mask[i] ? cost[i] : 0.0f;
    pruned[i] = mask[i] ? T(0.0f) : weight[i / columns * stride + i % columns];
  }
  const DeviceArray<T> d_weight(weight), d_pruned(size);
  const DeviceArray<float> d_g(g), d_a(a), d_total(total.size());
  const DeviceArray<bool> d_mask(size), d_again(size), d_invalid(1);
  surgeon::NmProblem<T> problem{d_weight.get(), d_g.get(), d_a.get(), rows,           columns, stride, n, m,
                                nullptr,        INFINITY,  true,      d_invalid.get()};
  check(surgeon::nm_mask(problem, d_mask.get(), nullptr));
  check(surgeon::nm_group_cost(problem, d_total.get(), nullptr));
  check(surgeon::nm_prune(problem, d_pruned.get(), nullptr));
  d_mask.expect(mask, "mask");
  d_total.expect(total, "costs of groups");
  d_pruned.expect(pruned, "pruned weights");
  problem.previous = d_mask.get();
  problem.threshold = -1.0f;  // only what was pruned before stays so
  check(surgeon::nm_mask(problem, d_again.get(), nullptr));
  d_again.expect(mask, "mask of what was pruned before");
  d_invalid.expect(std::vector<char>{0}, "flag of invalid costs");

  const surgeon::CostMatrix matrix{d_weight.get(), d_g.get(), d_a.get(), rows, columns, stride, 0};
  check(surgeon::cost_mask<T>(matrix, 1.0f, true, d_again.get(), nullptr));
  d_again.expect(cheap, "mask of cheap weights");
  for (int group : {1, m}) {
    surgeon::CostHistogram histogram{
        group == 1 ? 0 : n, group, 0, 20, 2048, 1, surgeon::aligned_costs<T>(matrix, group)};
    if (group != 1 && !histogram.aligned) continue;
    std::vector<surgeon::CostMatrix> matrices{matrix, matrix};
    const int64_t tiles = surgeon::assign_tiles<T>(matrices.data(), 2, histogram);
    const DeviceArray<surgeon::CostMatrix> d_matrices(matrices);
    const DeviceArray<int64_t> d_counts(2 * 2050);
    check(surgeon::cost_histogram<T>(d_matrices.get(), 2, tiles, histogram, d_counts.get(), nullptr));
    std::vector<int64_t> counts(2 * 2050);
    for (float value : group == 1 ? cost : total) {
      int bits;
      std::memcpy(&bits, &value, sizeof bits);
      for (int i : {0, 1}) ++counts[2050 * i + 1 + (bits >> 20)];
    }
    d_counts.expect(counts, "histogram");
  }
}

template <typename T>
void run_all() {
  const int patterns[][2] = {{2, 4}, {3, 4}, {4, 8}, {8, 16}, {12, 16}, {3, 5}};
  for (const auto& [n, m] : patterns) {
    run<T>(37, 48 * m, 48 * m, n, m);
    run<T>(6, 16 * m, 16 * m + 16, n, m);
    run<T>(5, 17 * m, 17 * m + 1, n, m);
  }
}

}  // namespace

int main() {
  run_all<float>();
  run_all<__half>();
  run_all<__nv_bfloat16>();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
