// Arguments of the ops of selection, as their kernels take them: for the _ops.cpp files of this folder.
#pragma once

#include <utility>

#include "k_cheapest.h"
#include "ops.h"

namespace surgeon {

// Calls `function` with a null pointer of the kernels' type for the weight's dtype.
template <typename F>
auto with_type(const at::Tensor& weight, F function) {
  switch (weight.scalar_type()) {
    case at::kFloat:
      return function(static_cast<float*>(nullptr));
    case at::kHalf:
      return function(static_cast<__half*>(nullptr));
    case at::kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    default:
      TORCH_CHECK(false, "weights must be float32, float16 or bfloat16, not ", weight.scalar_type());
  }
}

// A layer's weights and the factors of their costs, as the kernels take them.
inline CostMatrix cost_matrix(const at::Tensor& weight, const at::Tensor& g, const at::Tensor& a) {
  TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.numel() == 0),
              "weights must be [R, C], rows dense");
  for (const auto& [factor, size] : {std::pair(g, weight.size(0)), std::pair(a, weight.size(1))}) {
    TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.is_contiguous() && factor.numel() == size &&
                    factor.device() == weight.device(),
                "factors of costs must be contiguous float32 vectors on the weight's device, as long as its sides");
  }
  return {weight.const_data_ptr(), g.const_data_ptr<float>(), a.const_data_ptr<float>(), weight.size(0),
          weight.size(1),          weight.stride(0)};
}

}  // namespace surgeon
