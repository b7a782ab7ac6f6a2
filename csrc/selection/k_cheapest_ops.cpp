#include <climits>
#include <type_traits>
#include <vector>

#include "selection_ops.h"

namespace {

using at::Tensor;

Tensor cost_histogram(const std::vector<Tensor>& weights, const std::vector<Tensor>& g, const std::vector<Tensor>& a,
                      int64_t n, int64_t m, int64_t low, int64_t shift, int64_t bins, int64_t row_step) {
  TORCH_CHECK(!weights.empty() && g.size() == weights.size() && a.size() == weights.size(),
              "no weights, or no factors");
  TORCH_CHECK((m == 1 && n == 0) || (0 < n && n < m && m <= 16), "no N:M pattern of the weights");
  TORCH_CHECK(low >= 0 && bins >= 1 && bins <= 8192 && 0 <= shift && shift < 32 &&
                  (bins << shift) <= (int64_t{1} << 31) && low <= INT_MAX && row_step >= 1 && row_step <= INT_MAX,
              "no such bins");
  const Tensor& first = weights.front();
  const c10::cuda::CUDAGuard guard(first.device());
  const int count = static_cast<int>(weights.size());
  return surgeon::with_type(first, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    surgeon::CostHistogram histogram{static_cast<int>(n),
                                     static_cast<int>(m),
                                     static_cast<int>(low),
                                     static_cast<int>(shift),
                                     static_cast<int>(bins),
                                     static_cast<int>(row_step),
                                     true};
    std::vector<surgeon::CostMatrix> matrices;
    for (int i = 0; i < count; ++i) {
      TORCH_CHECK(weights[i].scalar_type() == first.scalar_type() && weights[i].device() == first.device(),
                  "weights must share a dtype and a device");
      matrices.push_back(surgeon::cost_matrix(weights[i], g[i], a[i]));
      histogram.aligned = histogram.aligned && surgeon::aligned_costs<T>(matrices.back(), histogram.m);
    }
    TORCH_CHECK(histogram.aligned || m == 1, "groups of costs must be aligned");
    const int64_t tiles = surgeon::assign_tiles<T>(matrices.data(), count, histogram);
    const auto bytes = static_cast<int64_t>(matrices.size() * sizeof(surgeon::CostMatrix));
    const Tensor table = at::from_blob(matrices.data(), {bytes}, at::kByte).to(first.device());
    Tensor counts = at::zeros({count, bins + 2}, first.options().dtype(at::kLong));
    C10_CUDA_CHECK(surgeon::cost_histogram<T>(static_cast<const surgeon::CostMatrix*>(table.const_data_ptr()), count,
                                              tiles, histogram, counts.mutable_data_ptr<int64_t>(),
                                              c10::cuda::getCurrentCUDAStream()));
    return counts;
  });
}

Tensor cost_mask(const Tensor& weight, const Tensor& g, const Tensor& a, double threshold, bool ties) {
  const c10::cuda::CUDAGuard guard(weight.device());
  Tensor selected = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  C10_CUDA_CHECK(surgeon::with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::cost_mask<T>(surgeon::cost_matrix(weight, g, a), static_cast<float>(threshold), ties,
                                 selected.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream());
  }));
  return selected;
}

}  // namespace

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("cost_histogram", &cost_histogram);
  m.impl("cost_mask", &cost_mask);
}
