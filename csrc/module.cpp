#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "architectures.h"

// Loading this module registers the ops of every <op>_ops.cpp.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA ops of surgeon-kernels, registered under torch.ops.surgeon_kernels.";
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("architectures") = surgeon::kArchitectures;
}
