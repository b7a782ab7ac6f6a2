#include <algorithm>
#include <climits>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "linear_2_4.h"
#include "linear_2_4_cusparselt.h"
#include "ops.h"

namespace {

using at::Tensor;

void check_fragments(const Tensor& weight, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0 && rows <= INT_MAX - 256 && columns <= INT_MAX - 256 &&
                        columns % 8 == 0 && weight.scalar_type() == at::kByte && weight.is_contiguous() &&
                        weight.dim() == 3 && weight.size(0) == (rows + 15) / 16 &&
                        weight.size(1) == (columns + 127) / 128 && weight.size(2) == surgeon::kUnitBytes,
                    "linear_2_4: the weight's fragments do not fit ", rows, " rows of ", columns, " columns");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                    "linear_2_4: the weight's fragments must begin at a multiple of 16 bytes, as a copy of them does");
}

Tensor unpack(const Tensor& weight, int64_t rows, int64_t columns, at::ScalarType dtype) {
  const Tensor dense = at::empty({rows, columns}, weight.options().dtype(dtype));
  C10_CUDA_CHECK(surgeon::linear_2_4_unpack(weight.const_data_ptr(), dense.mutable_data_ptr(), static_cast<int>(rows),
                                            static_cast<int>(columns), c10::cuda::getCurrentCUDAStream()));
  return dense;
}

// Forms of the weight that are kept beside its fragments.
struct OtherForms {
  std::optional<Tensor> compressed, dense;
};

// y = act(x W^T + b) as surgeon::linear_2_4 takes it; y is allocated, and x and b copied where they do not lie as they
// must.
struct Linear24 {
  Tensor fragments, input, added, y;
  surgeon::Linear24 call;

  Linear24(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows, int64_t activation)
      : fragments(weight) {
    const int64_t columns = x.size(-1);
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "linear_2_4: x must have 16 bits");
    TORCH_CHECK_VALUE(weight.device() == x.device(), "linear_2_4: x and the weight must be on one device");
    check_fragments(weight, rows, columns);
    TORCH_CHECK(
        !bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == rows && bias->device() == x.device()),
        "linear_2_4: bias must be of x's dtype and device, one value a row");
    TORCH_CHECK_VALUE(activation >= 0 && activation <= static_cast<int64_t>(surgeon::Activation::kSilu),
                      "linear_2_4: no activation has the number ", activation);
    if (bias) added = bias->contiguous();
    TORCH_CHECK_VALUE(x.numel() / std::max<int64_t>(columns, 1) <= INT_MAX - 256, "linear_2_4: 2^31 tokens or more");
    input = x.contiguous();
    if (reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16) input = input.clone();
    at::DimVector sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = rows;
    y = at::empty(sizes, x.options());
    call = {weight.const_data_ptr(),
            input.const_data_ptr(),
            bias ? added.const_data_ptr() : nullptr,
            y.mutable_data_ptr(),
            static_cast<int>(x.numel() / std::max<int64_t>(columns, 1)),
            static_cast<int>(rows),
            static_cast<int>(columns),
            static_cast<int>(weight.size(1)),
            static_cast<surgeon::Activation>(activation),
            x.scalar_type() == at::kHalf,
            surgeon::Overlap::kNone};
  }

  surgeon::Linear24 from(int token) const {
    surgeon::Linear24 rest = call;
    rest.tokens -= token;
    rest.x = static_cast<const char*>(call.x) + static_cast<size_t>(token) * call.columns * 2;
    rest.y = static_cast<char*>(call.y) + static_cast<size_t>(token) * call.rows * 2;
    return rest;
  }
};

// The dense product from a token on, rounded before the activation as well.
void run_dense(const Linear24& linear, int token, const std::optional<Tensor>& kept) {
  const at::AutoDispatchBelowAutograd guard;
  const int64_t tokens = linear.call.tokens, rows = linear.call.rows, columns = linear.call.columns;
  const Tensor dense = kept ? *kept : unpack(linear.fragments, rows, columns, linear.input.scalar_type());
  const Tensor x = linear.input.view({tokens, columns}).slice(0, token);
  Tensor y = linear.y.view({tokens, rows}).slice(0, token);
  if (linear.added.defined())
    at::addmm_out(y, linear.added.view({rows}), x, dense.t());
  else
    at::mm_out(y, x, dense.t());
  switch (linear.call.activation) {
    case surgeon::Activation::kNone:
      break;
    case surgeon::Activation::kRelu:
      at::relu_(y);
      break;
    case surgeon::Activation::kGelu:
      at::gelu_(y);
      break;
    case surgeon::Activation::kGeluTanh:
      at::gelu_(y, "tanh");
      break;
    case surgeon::Activation::kSilu:
      at::silu_(y);
      break;
  }
}

// cuSPARSELt on the tokens that it has a plan for: how many. None where it has no such algorithm, or no plan yet while
// the stream is captured.
int run_library(const Linear24& linear, int algorithm, const Tensor& compressed) {
  const surgeon::Linear24& call = linear.call;
  TORCH_CHECK_VALUE(compressed.scalar_type() == at::kByte && compressed.is_contiguous() &&
                        compressed.device() == linear.input.device() &&
                        compressed.numel() >= int64_t{9} * call.rows * call.columns / 8 &&
                        reinterpret_cast<uintptr_t>(compressed.const_data_ptr()) % 16 == 0,
                    "linear_2_4: no compressed weight of ", call.rows, " rows of ", call.columns,
                    " columns, on x's device, that begins at a multiple of 16 bytes");
  const int tokens = surgeon::cusparselt_tokens(call.tokens);
  if (tokens == 0) return 0;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  std::shared_ptr<surgeon::CusparseltPlan> plan;
  size_t workspace_bytes = 0;
  const char* error = surgeon::cusparselt_plan({tokens, call.rows, call.columns, call.half}, algorithm, stream, &plan,
                                               &workspace_bytes);
  TORCH_CHECK(error == nullptr, "linear_2_4: cuSPARSELt: ", error);
  if (plan == nullptr) return 0;
  const Tensor workspace = at::empty({static_cast<int64_t>(workspace_bytes)}, compressed.options());
  error =
      surgeon::cusparselt_run(*plan, compressed.const_data_ptr(), call.x, call.y, workspace.mutable_data_ptr(), stream);
  TORCH_CHECK(error == nullptr, "linear_2_4: cuSPARSELt: ", error);
  return tokens;
}

// Launches a choice; false where the sizes, the device or the build do not allow it.
bool run(const Linear24& linear, int64_t choice, const OtherForms& other) {
  int token = 0;
  if (choice >= surgeon::linear_2_4_choices()) {
    if (!other.compressed) return false;
    token = run_library(linear, static_cast<int>(choice - surgeon::linear_2_4_choices()), *other.compressed);
    if (token == 0) return false;
    if (token == linear.call.tokens) return true;
    choice = surgeon::linear_2_4_choice(linear.from(token), false);
  }
  if (choice == surgeon::linear_2_4_dense()) {
    run_dense(linear, token, other.dense);
    return true;
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const cudaError_t status = surgeon::linear_2_4_run(linear.from(token), static_cast<int>(choice), stream);
  if (status == cudaErrorNotSupported) return false;
  C10_CUDA_CHECK(status);
  return true;
}

void check_dense(const std::optional<Tensor>& dense, const Tensor& x, int64_t rows) {
  TORCH_CHECK_VALUE(!dense || (dense->dim() == 2 && dense->size(0) == rows && dense->size(1) == x.size(-1) &&
                               dense->scalar_type() == x.scalar_type() && dense->device() == x.device()),
                    "linear_2_4: the dense weight must be of x's dtype and device and as large as the fragments' one");
}

Tensor linear_2_4(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows,
                  int64_t activation, const std::optional<Tensor>& compressed, const std::optional<Tensor>& dense) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, bias, rows, activation);
  check_dense(dense, x, rows);
  if (linear.y.numel() == 0) return linear.y;
  const bool plain = linear.call.bias == nullptr && linear.call.activation == surgeon::Activation::kNone;
  const bool library = compressed && plain;  // cuSPARSELt would keep a plan for every bias
  if (library && run(linear, surgeon::linear_2_4_choice(linear.call, true), {compressed, dense})) return linear.y;
  const int choice = surgeon::linear_2_4_choice(linear.call, false);
  TORCH_CHECK(run(linear, choice, {std::nullopt, dense}), "linear_2_4: no kernel runs on this device");
  return linear.y;
}

// The same by the kernel of number `choice`; nothing where there is no such choice, or the device, the build or the
// sizes do not allow it. Where y is `poisoned` before, what is not written is NaN.
std::optional<Tensor> linear_2_4_run(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice,
                                     const std::optional<Tensor>& compressed, bool poisoned) {
  if (choice < 0 || choice >= (compressed ? int64_t{INT_MAX} : surgeon::linear_2_4_choices())) return std::nullopt;
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, std::nullopt, rows, 0);
  if (poisoned) linear.y.fill_(NAN);
  if (linear.y.numel() > 0 && !run(linear, choice, {compressed, std::nullopt})) return std::nullopt;
  return linear.y;
}

int64_t linear_2_4_choice(const Tensor& x, const Tensor& weight, int64_t rows, bool library) {
  const c10::cuda::CUDAGuard guard(x.device());
  return surgeon::linear_2_4_choice(Linear24(x, weight, std::nullopt, rows, 0).call, library);
}

// False where there is no such choice: nothing is pinned then.
bool linear_2_4_pin(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice, bool library) {
  if (choice < 0 || choice > INT_MAX) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, std::nullopt, rows, 0);
  return surgeon::linear_2_4_pin(linear.call, library, static_cast<int>(choice));
}

// Tokens and rows of a tile, split and resident clusters of a kernel; empty where it does not run on the current
// device.
std::vector<int64_t> linear_2_4_geometry(int64_t choice, bool half) {
  if (choice < 0 || choice >= surgeon::linear_2_4_dense()) return {};
  const surgeon::Geometry24 geometry = surgeon::linear_2_4_geometry(static_cast<int>(choice), half);
  if (geometry.resident <= 0) return {};
  return {geometry.wgmma, geometry.tile_rows, geometry.tile_tokens, geometry.split, geometry.resident};
}

// The weight, dense.
Tensor linear_2_4_unpack(const Tensor& weight, int64_t rows, int64_t columns, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf, "linear_2_4_unpack: a weight has 16 bits");
  check_fragments(weight, rows, columns);
  return unpack(weight, rows, columns, dtype);
}

// A dense 2:4 weight as cuSPARSELt compresses it.
Tensor linear_2_4_compress(const Tensor& dense) {
  const c10::cuda::CUDAGuard guard(dense.device());
  TORCH_CHECK(dense.dim() == 2 && dense.is_contiguous() && dense.size(0) % 16 == 0 && dense.size(1) % 16 == 0 &&
                  dense.size(0) <= INT_MAX && dense.size(1) <= INT_MAX &&
                  reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 &&
                  (dense.scalar_type() == at::kHalf || dense.scalar_type() == at::kBFloat16),
              "linear_2_4_compress: a contiguous matrix of 16 bits, its beginning and sizes divisible by 16");
  const surgeon::Cusparselt24 size{128, static_cast<int>(dense.size(0)), static_cast<int>(dense.size(1)),
                                   dense.scalar_type() == at::kHalf};
  size_t bytes = 0, buffer_bytes = 0;
  const char* error = surgeon::cusparselt_compressed_bytes(size, &bytes, &buffer_bytes);
  TORCH_CHECK(error == nullptr, "linear_2_4_compress: cuSPARSELt: ", error);
  const Tensor compressed = at::empty({static_cast<int64_t>(bytes)}, dense.options().dtype(at::kByte));
  const Tensor buffer = at::empty({static_cast<int64_t>(buffer_bytes)}, compressed.options());
  error = surgeon::cusparselt_compress(size, dense.const_data_ptr(), compressed.mutable_data_ptr(),
                                       buffer.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "linear_2_4_compress: cuSPARSELt: ", error);
  return compressed;
}

}  // namespace

// Those that a model's graph may hold are defined in surgeon_kernels/sparse24/linear_2_4.py, so that it loads before
// this module.
TORCH_LIBRARY_FRAGMENT(surgeon_kernels, m) {
  m.def("linear_2_4_choices() -> int", [] { return static_cast<int64_t>(surgeon::linear_2_4_choices()); });
  m.def("linear_2_4_geometry(int choice, bool half=False) -> int[]", &linear_2_4_geometry);
  m.def("linear_2_4_choice(Tensor x, Tensor weight, int rows, bool library=False) -> int");
  m.def(
      "linear_2_4_run(Tensor x, Tensor weight, int rows, int choice, Tensor? compressed=None, bool poisoned=False)"
      " -> Tensor?");
  m.def("linear_2_4_pin(Tensor x, Tensor weight, int rows, int choice, bool library=False) -> bool");
  m.def("linear_2_4_compress(Tensor dense) -> Tensor");
  m.def("cusparselt_version() -> int", [] { return static_cast<int64_t>(surgeon::cusparselt_version()); });
}

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("linear_2_4", &linear_2_4);
  m.impl("linear_2_4_unpack", &linear_2_4_unpack);
  m.impl("linear_2_4_choice", &linear_2_4_choice);
  m.impl("linear_2_4_run", &linear_2_4_run);
  m.impl("linear_2_4_pin", &linear_2_4_pin);
  m.impl("linear_2_4_compress", &linear_2_4_compress);
}
