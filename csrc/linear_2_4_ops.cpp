#include <algorithm>
#include <optional>

#include "linear_2_4.h"
#include "ops.h"

namespace {

using at::Tensor;

// y = act(x W^T + b) as surgeon::linear_2_4 takes it; y is allocated, and x copied where it does not lie as it must.
struct Linear24 {
  Tensor input, y;
  surgeon::Linear24 call;

  Linear24(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows, int64_t activation) {
    const int64_t columns = x.size(-1);
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "linear_2_4: x must have 16 bits");
    TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.dim() == 3 && columns % 8 == 0 &&
                    weight.size(0) == (rows + 15) / 16 && weight.size(1) == (columns + 127) / 128 &&
                    weight.size(2) == surgeon::kUnitBytes && weight.device() == x.device(),
                "linear_2_4: the weight's fragments do not fit ", rows, " rows of ", columns, " columns");
    TORCH_CHECK(!bias || (bias->is_contiguous() && bias->scalar_type() == x.scalar_type() && bias->numel() == rows &&
                          bias->device() == x.device()),
                "linear_2_4: bias must be contiguous and of x's dtype and device");
    input = x.contiguous();
    if (reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16) input = input.clone();
    at::DimVector sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = rows;
    y = at::empty(sizes, x.options());
    call = {weight.const_data_ptr(),
            input.const_data_ptr(),
            bias ? bias->const_data_ptr() : nullptr,
            y.mutable_data_ptr(),
            static_cast<int>(x.numel() / std::max<int64_t>(columns, 1)),
            static_cast<int>(rows),
            static_cast<int>(columns),
            static_cast<int>(weight.size(1)),
            static_cast<surgeon::Activation>(activation),
            x.scalar_type() == at::kHalf,
            surgeon::Overlap::kNone};
  }
};

Tensor linear_2_4(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows,
                  int64_t activation) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, bias, rows, activation);
  if (linear.y.numel() > 0) C10_CUDA_CHECK(surgeon::linear_2_4(linear.call, c10::cuda::getCurrentCUDAStream()));
  return linear.y;
}

// The same by the way `choice`; nothing where the device or the sizes do not allow it.
std::optional<Tensor> linear_2_4_run(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, std::nullopt, rows, 0);
  const cudaError_t status =
      surgeon::linear_2_4_run(linear.call, static_cast<int>(choice), c10::cuda::getCurrentCUDAStream());
  if (status == cudaErrorNotSupported) return std::nullopt;
  C10_CUDA_CHECK(status);
  return linear.y;
}

void linear_2_4_pin(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice) {
  const c10::cuda::CUDAGuard guard(x.device());
  surgeon::linear_2_4_pin(Linear24(x, weight, std::nullopt, rows, 0).call, static_cast<int>(choice));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(surgeon_kernels, m) {
  m.def("linear_2_4(Tensor x, Tensor weight, Tensor? bias, int rows, int activation) -> Tensor");
  m.def("linear_2_4_choices() -> int", [] { return static_cast<int64_t>(surgeon::linear_2_4_choices()); });
  m.def("linear_2_4_run(Tensor x, Tensor weight, int rows, int choice) -> Tensor?");
  m.def("linear_2_4_pin(Tensor x, Tensor weight, int rows, int choice) -> ()");
}

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("linear_2_4", &linear_2_4);
  m.impl("linear_2_4_run", &linear_2_4_run);
  m.impl("linear_2_4_pin", &linear_2_4_pin);
}
