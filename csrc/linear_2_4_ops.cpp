#include <algorithm>
#include <climits>
#include <optional>

#include "linear_2_4.h"
#include "linear_2_4_cusparselt.h"
#include "ops.h"

namespace {

using at::Tensor;

// y = act(x W^T + b) as surgeon::linear_2_4 takes it; y is allocated, and x and b copied where they do not lie as they must.
struct Linear24 {
  Tensor input, added, y;
  surgeon::Linear24 call;

  Linear24(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows, int64_t activation) {
    const int64_t columns = x.size(-1);
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "linear_2_4: x must have 16 bits");
    TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.dim() == 3 && columns % 8 == 0 &&
                    weight.size(0) == (rows + 15) / 16 && weight.size(1) == (columns + 127) / 128 &&
                    weight.size(2) == surgeon::kUnitBytes && weight.device() == x.device(),
                "linear_2_4: the weight's fragments do not fit ", rows, " rows of ", columns, " columns");
    TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == rows && bias->device() == x.device()),
                "linear_2_4: bias must be of x's dtype and device, one value a row");
    if (bias) added = bias->contiguous();
    TORCH_CHECK(x.numel() / std::max<int64_t>(columns, 1) <= INT_MAX - 256 && rows <= INT_MAX - 256 && columns <= INT_MAX - 256,
                "linear_2_4: tokens, rows and columns must each be less than 2^31");
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
};

// Whether the sizes or the device allow this choice; if so, it is under way.
bool run(const surgeon::Linear24& call, int choice, const std::optional<Tensor>& compressed) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  surgeon::Linear24 rest = call;
  if (choice >= surgeon::linear_2_4_choices()) {
    if (!compressed) return false;
    // cuSPARSELt takes tokens by eight; our kernel for few tokens does those that are left.
    const int tokens = call.tokens / 8 * 8;
    if (tokens == 0) return false;
    surgeon::CusparseltPlan* plan = nullptr;
    size_t workspace_bytes = 0;
    const char* error = surgeon::cusparselt_plan({tokens, call.rows, call.columns, call.half},
                                                 choice - surgeon::linear_2_4_choices(), &plan, &workspace_bytes);
    TORCH_CHECK(error == nullptr, "linear_2_4: cuSPARSELt: ", error);
    if (plan == nullptr) return false;
    const Tensor workspace = at::empty({static_cast<int64_t>(workspace_bytes)}, compressed->options());
    error = surgeon::cusparselt_run(plan, compressed->const_data_ptr(), call.x, call.y, workspace.mutable_data_ptr(),
                                    stream);
    TORCH_CHECK(error == nullptr, "linear_2_4: cuSPARSELt: ", error);
    if (tokens == call.tokens) return true;
    rest.tokens -= tokens;
    rest.x = static_cast<const char*>(call.x) + static_cast<size_t>(tokens) * call.columns * 2;
    rest.y = static_cast<char*>(call.y) + static_cast<size_t>(tokens) * call.rows * 2;
    choice = surgeon::linear_2_4_choice(rest, false);
  }
  const cudaError_t status = surgeon::linear_2_4_run(rest, choice, stream);
  if (status == cudaErrorNotSupported) return false;
  C10_CUDA_CHECK(status);
  return true;
}

Tensor linear_2_4(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows,
                  int64_t activation, const std::optional<Tensor>& compressed) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, bias, rows, activation);
  if (linear.y.numel() == 0) return linear.y;
  const bool plain = linear.call.bias == nullptr && linear.call.activation == surgeon::Activation::kNone;
  const bool library = compressed && plain;  // cuSPARSELt would keep a plan for every bias
  if (library && run(linear.call, surgeon::linear_2_4_choice(linear.call, true), compressed)) return linear.y;
  const int choice = surgeon::linear_2_4_choice(linear.call, false);
  TORCH_CHECK(run(linear.call, choice, std::nullopt), "linear_2_4: no kernel runs on this device");
  return linear.y;
}

// Ours, and with cuSPARSELt its algorithms after them; which of those there are only the library knows.
bool exists(int64_t choice, bool library) {
  return choice >= 0 && choice < (library ? INT_MAX : surgeon::linear_2_4_choices());
}

// The same by the way `choice`; nothing where there is no such choice, or the device or the sizes do not allow it.
std::optional<Tensor> linear_2_4_run(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice,
                                     const std::optional<Tensor>& compressed) {
  if (!exists(choice, compressed.has_value())) return std::nullopt;
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, std::nullopt, rows, 0);
  if (linear.y.numel() > 0 && !run(linear.call, static_cast<int>(choice), compressed)) return std::nullopt;
  return linear.y;
}

int64_t linear_2_4_choice(const Tensor& x, const Tensor& weight, int64_t rows, bool library) {
  const c10::cuda::CUDAGuard guard(x.device());
  return surgeon::linear_2_4_choice(Linear24(x, weight, std::nullopt, rows, 0).call, library);
}

// Whether there is such a choice: nothing is pinned otherwise.
bool linear_2_4_pin(const Tensor& x, const Tensor& weight, int64_t rows, int64_t choice, bool library) {
  if (!exists(choice, library)) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  const Linear24 linear(x, weight, std::nullopt, rows, 0);
  surgeon::linear_2_4_pin(linear.call, library, static_cast<int>(choice));
  return true;
}

// A dense 2:4 weight as cuSPARSELt compresses it.
Tensor linear_2_4_compress(const Tensor& dense) {
  const c10::cuda::CUDAGuard guard(dense.device());
  TORCH_CHECK(dense.dim() == 2 && dense.is_contiguous() && dense.size(0) % 16 == 0 && dense.size(1) % 16 == 0 &&
                  (dense.scalar_type() == at::kHalf || dense.scalar_type() == at::kBFloat16),
              "linear_2_4_compress: a contiguous matrix of 16 bits, its sizes divisible by 16");
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

TORCH_LIBRARY_FRAGMENT(surgeon_kernels, m) {
  m.def("linear_2_4(Tensor x, Tensor weight, Tensor? bias, int rows, int activation, Tensor? compressed=None) -> Tensor");
  m.def("linear_2_4_choices() -> int", [] { return static_cast<int64_t>(surgeon::linear_2_4_choices()); });
  m.def("linear_2_4_choice(Tensor x, Tensor weight, int rows, bool library=False) -> int");
  m.def("linear_2_4_run(Tensor x, Tensor weight, int rows, int choice, Tensor? compressed=None) -> Tensor?");
  m.def("linear_2_4_pin(Tensor x, Tensor weight, int rows, int choice, bool library=False) -> bool");
  m.def("linear_2_4_compress(Tensor dense) -> Tensor");
  m.def("cusparselt_version() -> int", [] { return static_cast<int64_t>(surgeon::cusparselt_version()); });
}

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("linear_2_4", &linear_2_4);
  m.impl("linear_2_4_choice", &linear_2_4_choice);
  m.impl("linear_2_4_run", &linear_2_4_run);
  m.impl("linear_2_4_pin", &linear_2_4_pin);
  m.impl("linear_2_4_compress", &linear_2_4_compress);
}
