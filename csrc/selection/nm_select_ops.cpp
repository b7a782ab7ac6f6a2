#include <cmath>
#include <optional>
#include <type_traits>

#include "nm_select.h"
#include "selection_ops.h"

namespace {

using at::Tensor;

void check_pattern(const Tensor& weight, int64_t n, int64_t m) {
  TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.numel() == 0),
              "weights must be [R, C], rows dense");
  TORCH_CHECK(0 < n && n < m && m <= surgeon::kLargestGroup && weight.size(1) % m == 0,
              "no N:M pattern of the weights");
}

template <typename T>
surgeon::NmProblem<T> nm_problem(const Tensor& weight, const std::optional<Tensor>& g, const std::optional<Tensor>& a,
                                 int64_t n, int64_t m, Tensor& invalid) {
  check_pattern(weight, n, m);
  TORCH_CHECK(g.has_value() == a.has_value(), "both factors or none");
  TORCH_CHECK(invalid.scalar_type() == at::kBool && invalid.numel() == 1 && invalid.device() == weight.device(),
              "invalid must be one bool on the weights' device");
  surgeon::CostMatrix matrix{weight.const_data_ptr(), nullptr,        nullptr,
                             weight.size(0),          weight.size(1), weight.stride(0)};
  if (g.has_value()) matrix = surgeon::cost_matrix(weight, *g, *a);
  return {static_cast<const T*>(matrix.weight),
          matrix.g,
          matrix.a,
          matrix.rows,
          matrix.columns,
          matrix.row_stride,
          static_cast<int>(n),
          static_cast<int>(m),
          nullptr,
          INFINITY,
          true,
          invalid.mutable_data_ptr<bool>()};
}

Tensor nm_select(const Tensor& weight, const std::optional<Tensor>& g, const std::optional<Tensor>& a, int64_t n,
                 int64_t m, const std::optional<Tensor>& previous, double threshold, bool ties, Tensor& invalid) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TORCH_CHECK(!previous || (previous->is_contiguous() && previous->sizes() == weight.sizes() &&
                            previous->scalar_type() == at::kBool && previous->device() == weight.device()),
              "previous must be a contiguous bool tensor of the weight's shape, on its device");
  const Tensor pruned = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  C10_CUDA_CHECK(surgeon::with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto problem = nm_problem<T>(weight, g, a, n, m, invalid);
    if (previous) problem.previous = previous->const_data_ptr<bool>();
    problem.threshold = static_cast<float>(threshold);
    problem.ties = ties;
    return surgeon::nm_mask(problem, pruned.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream());
  }));
  return pruned;
}

Tensor nm_group_cost(const Tensor& weight, const std::optional<Tensor>& g, const std::optional<Tensor>& a, int64_t n,
                     int64_t m, Tensor& invalid) {
  const c10::cuda::CUDAGuard guard(weight.device());
  check_pattern(weight, n, m);  // before m divides
  const Tensor cost = at::empty({weight.size(0), weight.size(1) / m}, weight.options().dtype(at::kFloat));
  C10_CUDA_CHECK(surgeon::with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::nm_group_cost(nm_problem<T>(weight, g, a, n, m, invalid), cost.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream());
  }));
  return cost;
}

Tensor nm_prune(const Tensor& weight, const Tensor& g, const Tensor& a, int64_t n, int64_t m, Tensor& invalid) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor pruned = at::empty(weight.sizes(), weight.options());
  C10_CUDA_CHECK(surgeon::with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::nm_prune(nm_problem<T>(weight, g, a, n, m, invalid), static_cast<T*>(pruned.mutable_data_ptr()),
                             c10::cuda::getCurrentCUDAStream());
  }));
  return pruned;
}

}  // namespace

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("nm_select", &nm_select);
  m.impl("nm_group_cost", &nm_group_cost);
  m.impl("nm_prune", &nm_prune);
}
