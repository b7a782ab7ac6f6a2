// The one file that knows torch: schemas of the ops, their CUDA implementations, and the Python module.
// Arguments are checked in Python (surgeon_kernels/<op>.py), where the same checks guard the reference; here only what
// would corrupt memory is checked again.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "chunked_solve.h"
#include "cost_threshold.h"
#include "linear_2_4.h"
#include "nm_select.h"

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

// Calls `function` with a null pointer of the kernels' type for the weight's dtype.
template <typename F>
auto with_type(const Tensor& weight, F function) {
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

surgeon::CostMatrix cost_matrix(const Tensor& weight, const Tensor& g, const Tensor& a) {
  TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.numel() == 0), "weights must be [R, C], rows dense");
  for (const auto& [factor, size] : {std::pair(g, weight.size(0)), std::pair(a, weight.size(1))}) {
    TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.is_contiguous() && factor.numel() == size &&
                    factor.device() == weight.device(),
                "factors of costs must be contiguous float32 vectors on the weight's device, as long as its sides");
  }
  return {weight.const_data_ptr(), g.const_data_ptr<float>(), a.const_data_ptr<float>(), weight.size(0),
          weight.size(1),          weight.stride(0)};
}

template <typename T>
surgeon::NmProblem<T> nm_problem(const Tensor& weight, const std::optional<Tensor>& g, const std::optional<Tensor>& a,
                                 int64_t n, int64_t m, const Tensor& invalid) {
  TORCH_CHECK(0 < n && n < m && m <= surgeon::kLargestGroup && weight.size(1) % m == 0, "no N:M pattern of the weights");
  TORCH_CHECK(g.has_value() == a.has_value(), "both factors or none");
  surgeon::CostMatrix matrix{weight.const_data_ptr(), nullptr, nullptr, weight.size(0), weight.size(1), weight.stride(0)};
  if (g.has_value()) matrix = cost_matrix(weight, *g, *a);
  return {static_cast<const T*>(matrix.weight), matrix.g, matrix.a, matrix.rows, matrix.columns, matrix.row_stride,
          static_cast<int>(n), static_cast<int>(m), nullptr, INFINITY, true, invalid.mutable_data_ptr<bool>()};
}

std::tuple<Tensor, Tensor> nm_select(const Tensor& weight, const std::optional<Tensor>& g, const std::optional<Tensor>& a,
                                     int64_t n, int64_t m, const std::optional<Tensor>& previous, double threshold,
                                     bool ties) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TORCH_CHECK(!previous || (previous->is_contiguous() && previous->sizes() == weight.sizes() &&
                            previous->scalar_type() == at::kBool && previous->device() == weight.device()),
              "previous must be a contiguous bool tensor of the weight's shape, on its device");
  const Tensor pruned = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  const Tensor invalid = at::zeros({}, pruned.options());
  C10_CUDA_CHECK(with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto problem = nm_problem<T>(weight, g, a, n, m, invalid);
    if (previous) problem.previous = previous->const_data_ptr<bool>();
    problem.threshold = static_cast<float>(threshold);
    problem.ties = ties;
    return surgeon::nm_mask(problem, pruned.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream());
  }));
  return {pruned, invalid};
}

std::tuple<Tensor, Tensor> nm_group_cost(const Tensor& weight, const std::optional<Tensor>& g,
                                         const std::optional<Tensor>& a, int64_t n, int64_t m) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor cost = at::empty({weight.size(0), weight.size(1) / m}, weight.options().dtype(at::kFloat));
  const Tensor invalid = at::zeros({}, weight.options().dtype(at::kBool));
  C10_CUDA_CHECK(with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::nm_group_cost(nm_problem<T>(weight, g, a, n, m, invalid), cost.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream());
  }));
  return {cost, invalid};
}

std::tuple<Tensor, Tensor> nm_prune(const Tensor& weight, const Tensor& g, const Tensor& a, int64_t n, int64_t m) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor pruned = at::empty(weight.sizes(), weight.options());
  const Tensor invalid = at::zeros({}, weight.options().dtype(at::kBool));
  C10_CUDA_CHECK(with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::nm_prune(nm_problem<T>(weight, g, a, n, m, invalid), static_cast<T*>(pruned.mutable_data_ptr()),
                             c10::cuda::getCurrentCUDAStream());
  }));
  return {pruned, invalid};
}

Tensor cost_histogram(const std::vector<Tensor>& weights, const std::vector<Tensor>& g, const std::vector<Tensor>& a,
                      int64_t n, int64_t m, int64_t low, int64_t shift, int64_t bins, int64_t row_step) {
  TORCH_CHECK(!weights.empty() && g.size() == weights.size() && a.size() == weights.size(), "no weights, or no factors");
  TORCH_CHECK(low >= 0 && bins >= 1 && bins <= 8192 && shift >= 0 && (bins << shift) <= (int64_t{1} << 31) && row_step >= 1,
              "no such bins");
  const Tensor& first = weights.front();
  const c10::cuda::CUDAGuard guard(first.device());
  const int count = static_cast<int>(weights.size());
  return with_type(first, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    surgeon::CostHistogram histogram{static_cast<int>(n),    static_cast<int>(m), static_cast<int>(low),
                                     static_cast<int>(shift), static_cast<int>(bins), static_cast<int>(row_step), true};
    std::vector<surgeon::CostMatrix> matrices;
    for (int i = 0; i < count; ++i) {
      TORCH_CHECK(weights[i].scalar_type() == first.scalar_type() && weights[i].device() == first.device(),
                  "weights must share a dtype and a device");
      matrices.push_back(cost_matrix(weights[i], g[i], a[i]));
      histogram.aligned = histogram.aligned && surgeon::aligned_costs<T>(matrices.back(), histogram.m);
    }
    TORCH_CHECK(histogram.aligned || m == 1, "groups of costs must be aligned");
    const int64_t tiles = surgeon::lay_out<T>(matrices.data(), count, histogram);
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
  C10_CUDA_CHECK(with_type(weight, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return surgeon::cost_mask<T>(cost_matrix(weight, g, a), static_cast<float>(threshold), ties,
                                 selected.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream());
  }));
  return selected;
}

constexpr int64_t kFactorBytes = int64_t{2} << 30;  // of the Cholesky factors kept at a time

surgeon::GatheredSystems gathered(const Tensor& G_inv, const Tensor& A_inv, const Tensor& rows, const Tensor& columns,
                                  const Tensor& offsets) {
  for (const Tensor* factor : {&G_inv, &A_inv}) {
    TORCH_CHECK(factor->is_cuda() && factor->scalar_type() == at::kFloat && factor->dim() == 2 && factor->stride(1) == 1,
                "chunked solve: inverse factors must be float32 matrices with contiguous rows");
  }
  for (const Tensor* index : {&rows, &columns, &offsets}) {
    TORCH_CHECK(index->is_cuda() && index->scalar_type() == at::kLong && index->is_contiguous(),
                "chunked solve: indices must be contiguous int64");
  }
  return {G_inv.const_data_ptr<float>(),  G_inv.stride(0),
          A_inv.const_data_ptr<float>(),  A_inv.stride(0),
          rows.const_data_ptr<int64_t>(), columns.const_data_ptr<int64_t>(),
          offsets.const_data_ptr<int64_t>()};
}

// Factors of the chunks listed and room for their right sides, as surgeon::solve_factored takes them.
std::tuple<Tensor, Tensor> factor_chunks(const surgeon::GatheredSystems& systems, const int* chunks, int count, int tiles,
                                         Tensor& level) {
  const auto floats = level.options().dtype(at::kFloat);
  Tensor factors = at::empty({count * surgeon::factor_floats(tiles)}, floats);
  const Tensor counters = at::empty({surgeon::factor_scratch_ints(count, tiles)}, level.options());
  C10_CUDA_CHECK(surgeon::factor_chunks(systems, chunks, count, tiles, factors.mutable_data_ptr<float>(),
                                        counters.mutable_data_ptr<int>(), level.mutable_data_ptr<int>(),
                                        c10::cuda::getCurrentCUDAStream()));
  return {factors, at::full({count * surgeon::solve_scratch_floats(1, tiles)}, -1, level.options())};
}

std::tuple<Tensor, Tensor> chunked_solve(const Tensor& G_inv, const Tensor& A_inv, const Tensor& rows,
                                         const Tensor& columns, const Tensor& offsets, const Tensor& target) {
  TORCH_CHECK(offsets.is_cpu() && offsets.is_contiguous() && offsets.scalar_type() == at::kLong && offsets.numel() > 0,
              "chunked_solve: offsets must be contiguous int64 on the CPU");
  TORCH_CHECK(target.is_cuda() && target.is_contiguous() && target.scalar_type() == at::kFloat,
              "chunked_solve: target must be contiguous float32");
  const int64_t* host = offsets.const_data_ptr<int64_t>();
  const int64_t chunks = offsets.numel() - 1;
  TORCH_CHECK(host[chunks] <= target.numel() && target.numel() == rows.numel() && rows.numel() == columns.numel(),
              "chunked_solve: rows, columns and target must be as long as the chunks");
  const c10::cuda::CUDAGuard guard(target.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  int shared_limit = 0;
  C10_CUDA_CHECK(surgeon::shared_limit(&shared_limit));
  const surgeon::ChunkPlan plan = surgeon::plan_chunks(host, static_cast<int>(chunks), shared_limit, kFactorBytes);
  // Offsets and order go to the device in one copy that nothing waits for.
  const int64_t offset_bytes = offsets.numel() * static_cast<int64_t>(sizeof(int64_t));
  const int64_t order_bytes = static_cast<int64_t>(plan.order.size() * sizeof(int));
  const Tensor staged = at::empty({offset_bytes + order_bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(staged.mutable_data_ptr(), host, offset_bytes);
  std::memcpy(static_cast<char*>(staged.mutable_data_ptr()) + offset_bytes, plan.order.data(), order_bytes);
  const Tensor uploaded = staged.to(target.device(), /*non_blocking=*/true);
  const Tensor device_offsets = uploaded.narrow(0, 0, offset_bytes).view(at::kLong);
  const int* order = reinterpret_cast<const int*>(static_cast<const char*>(uploaded.const_data_ptr()) + offset_bytes);
  const surgeon::GatheredSystems systems = gathered(G_inv, A_inv, rows, columns, device_offsets);
  Tensor solution = at::empty_like(target);
  Tensor level = at::zeros({chunks}, target.options().dtype(at::kInt));
  for (const surgeon::ChunkBatch& batch : plan.batches) {
    const int* members = order + batch.first;
    if (batch.shared) {
      C10_CUDA_CHECK(surgeon::solve_in_shared(systems, members, batch.count, batch.tiles, target.const_data_ptr<float>(),
                                              solution.mutable_data_ptr<float>(), level.mutable_data_ptr<int>(), stream));
    } else {
      const auto [factors, scratch] = factor_chunks(systems, members, batch.count, batch.tiles, level);
      C10_CUDA_CHECK(surgeon::solve_factored(
          systems, members, batch.count, batch.tiles, factors.const_data_ptr<float>(),
          {target.const_data_ptr<float>(), 0, 0}, solution.mutable_data_ptr<float>(), level.const_data_ptr<int>(),
          static_cast<float*>(scratch.mutable_data_ptr()), stream));
    }
  }
  return {solution, level};
}

// One block of chunks of the sequential update: all factorised at once, then solved one after the other.
Tensor chunked_sequence_(Tensor& Y, Tensor& pending, const Tensor& G_inv, const Tensor& A_inv, const Tensor& rows,
                         const Tensor& columns, const Tensor& row_offsets, const Tensor& offsets, const Tensor& row_ranges,
                         int64_t block_begin) {
  for (const Tensor* matrix : {static_cast<const Tensor*>(&Y), static_cast<const Tensor*>(&pending)}) {
    TORCH_CHECK(matrix->is_cuda() && matrix->is_contiguous() && matrix->scalar_type() == at::kFloat && matrix->dim() == 2,
                "chunked_sequence_: Y and pending must be contiguous float32 matrices");
  }
  for (const Tensor* index : {&offsets, &row_ranges}) {
    TORCH_CHECK(index->is_cpu() && index->is_contiguous() && index->scalar_type() == at::kLong,
                "chunked_sequence_: offsets and row_ranges must be contiguous int64 on the CPU");
  }
  const int64_t chunks = offsets.numel() - 1, C = Y.size(1), block_end = block_begin + pending.size(0);
  TORCH_CHECK(row_ranges.dim() == 2 && row_ranges.size(0) == chunks && row_ranges.size(1) == 2 && pending.size(1) == C &&
                  row_offsets.numel() == Y.size(0) + 1 && block_begin >= 0 && block_end <= Y.size(0),
              "chunked_sequence_: sizes do not agree");
  const c10::cuda::CUDAGuard guard(Y.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor device_offsets = offsets.to(Y.device());
  const surgeon::GatheredSystems systems = gathered(G_inv, A_inv, rows, columns, device_offsets);
  const int64_t* host = offsets.const_data_ptr<int64_t>();
  const int64_t* ranges = row_ranges.const_data_ptr<int64_t>();
  Tensor level = at::zeros({chunks}, Y.options().dtype(at::kInt));
  if (chunks == 0) return level;
  int64_t widest = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) widest = std::max(widest, host[chunk + 1] - host[chunk]);
  const int tiles = static_cast<int>((widest + surgeon::kTile - 1) / surgeon::kTile);
  const Tensor members = at::arange(chunks, level.options());
  const int* ids = members.const_data_ptr<int>();
  const auto [factors, scratch] = factor_chunks(systems, ids, static_cast<int>(chunks), tiles, level);
  const Tensor solution = at::empty({rows.numel()}, Y.options());
  float* x = solution.mutable_data_ptr<float>();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    C10_CUDA_CHECK(surgeon::solve_factored(
        systems, ids + chunk, 1, tiles, factors.const_data_ptr<float>() + chunk * surgeon::factor_floats(tiles),
        {pending.const_data_ptr<float>(), C, block_begin}, x, level.const_data_ptr<int>(),
        static_cast<float*>(scratch.mutable_data_ptr()) + chunk * surgeon::solve_scratch_floats(1, tiles), stream));
    C10_CUDA_CHECK(surgeon::apply_chunk(
        systems, row_offsets.const_data_ptr<int64_t>(),
        {host[chunk], host[chunk + 1], ranges[2 * chunk], ranges[2 * chunk + 1], block_begin, block_end}, C, x,
        Y.mutable_data_ptr<float>(), pending.mutable_data_ptr<float>(), stream));
  }
  return level;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(surgeon_kernels, m) {
  m.def("linear_2_4(Tensor x, Tensor weight, Tensor? bias, int rows, int activation) -> Tensor");
  m.def("linear_2_4_choices() -> int", [] { return static_cast<int64_t>(surgeon::linear_2_4_choices()); });
  m.def("linear_2_4_run(Tensor x, Tensor weight, int rows, int choice) -> Tensor?");
  m.def("linear_2_4_pin(Tensor x, Tensor weight, int rows, int choice) -> ()");
  m.def("nm_select(Tensor weight, Tensor? g, Tensor? a, int n, int m, Tensor? previous, float threshold, bool ties)"
        " -> (Tensor pruned, Tensor invalid)");
  m.def("nm_group_cost(Tensor weight, Tensor? g, Tensor? a, int n, int m) -> (Tensor cost, Tensor invalid)");
  m.def("nm_prune(Tensor weight, Tensor g, Tensor a, int n, int m) -> (Tensor weight, Tensor invalid)");
  m.def("cost_histogram(Tensor[] weights, Tensor[] g, Tensor[] a, int n, int m, int low, int shift, int bins,"
        " int row_step) -> Tensor");
  m.def("cost_mask(Tensor weight, Tensor g, Tensor a, float threshold, bool ties) -> Tensor");
}

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("chunked_solve", &chunked_solve);
  m.impl("chunked_sequence_", &chunked_sequence_);
  m.impl("linear_2_4", &linear_2_4);
  m.impl("linear_2_4_run", &linear_2_4_run);
  m.impl("linear_2_4_pin", &linear_2_4_pin);
  m.impl("nm_select", &nm_select);
  m.impl("nm_group_cost", &nm_group_cost);
  m.impl("nm_prune", &nm_prune);
  m.impl("cost_histogram", &cost_histogram);
  m.impl("cost_mask", &cost_mask);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA ops of surgeon-kernels, registered under torch.ops.surgeon_kernels.";
  m.attr("cuda_version") = CUDART_VERSION;
}
