// The one file that knows torch: schemas of the ops, their CUDA implementations, and the Python module.
// Arguments are checked in Python (surgeon_kernels/<op>.py), where the same checks guard the reference; here only what
// would corrupt memory is checked again.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "nm_select.h"

namespace {

using at::Tensor;

Tensor nm_select(const Tensor& cost, int64_t n, int64_t m) {
  TORCH_CHECK(cost.is_contiguous() && cost.scalar_type() == at::kFloat, "nm_select: cost must be contiguous float32");
  TORCH_CHECK(m > 0 && cost.numel() % m == 0, "nm_select: the number of costs is not divisible by ", m);
  const c10::cuda::CUDAGuard guard(cost.device());
  Tensor pruned = at::empty_like(cost, cost.options().dtype(at::kBool));
  C10_CUDA_CHECK(surgeon::nm_select(cost.const_data_ptr<float>(), pruned.mutable_data_ptr<bool>(), cost.numel() / m,
                                    static_cast<int>(n), static_cast<int>(m), c10::cuda::getCurrentCUDAStream()));
  return pruned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(surgeon_kernels, m) {
  m.def("nm_select(Tensor cost, int n, int m) -> Tensor");
}

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("nm_select", &nm_select);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA ops of surgeon-kernels, registered under torch.ops.surgeon_kernels.";
  m.attr("cuda_version") = CUDART_VERSION;
}
