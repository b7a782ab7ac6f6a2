#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "chunked_solve.h"
#include "ops.h"

namespace {

using at::Tensor;

constexpr int64_t kFactorBytes = int64_t{2} << 30;  // of the Cholesky factors kept at a time

surgeon::GatheredSystems gathered(const Tensor& G_inv, const Tensor& A_inv, const Tensor& rows, const Tensor& columns,
                                  const int64_t* offsets) {
  for (const Tensor* factor : {&G_inv, &A_inv}) {
    TORCH_CHECK(
        factor->scalar_type() == at::kFloat && factor->dim() == 2 && factor->size(0) == factor->size(1) &&
            factor->stride(1) == 1 && factor->stride(0) < (int64_t{1} << 30) && factor->size(0) < (int64_t{1} << 30) &&
            factor->device() == rows.device(),
        "chunked solve: inverse factors must be square float32 matrices with contiguous rows, on the indices' device");
  }
  for (const Tensor* index : {&rows, &columns}) {
    TORCH_CHECK(index->scalar_type() == at::kLong && index->is_contiguous() && index->device() == rows.device() &&
                    index->is_cuda(),
                "chunked solve: indices must be contiguous int64, on one CUDA device");
  }
  return {G_inv.const_data_ptr<float>(),
          A_inv.const_data_ptr<float>(),
          static_cast<uint32_t>(G_inv.stride(0)),
          static_cast<uint32_t>(A_inv.stride(0)),
          static_cast<uint32_t>(G_inv.size(0)),
          static_cast<uint32_t>(A_inv.size(0)),
          rows.const_data_ptr<int64_t>(),
          columns.const_data_ptr<int64_t>(),
          offsets};
}

// A plan, and in device memory the offsets and order it goes by.
struct PlannedChunks {
  surgeon::ChunkPlan plan;
  Tensor memory;
  const int64_t* offsets;
  const int* order;
};

// Both go to the current device in one copy that nothing waits for.
PlannedChunks plan_chunks(const Tensor& offsets, at::Device device) {
  const int64_t* host = offsets.const_data_ptr<int64_t>();
  const int64_t chunks = offsets.numel() - 1;
  int shared_limit = 0;
  C10_CUDA_CHECK(surgeon::shared_limit(&shared_limit));
  const int64_t offset_bytes = offsets.numel() * static_cast<int64_t>(sizeof(int64_t));
  const Tensor staged = at::empty({offset_bytes + chunks * static_cast<int64_t>(sizeof(int))},
                                  at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  char* staging = static_cast<char*>(staged.mutable_data_ptr());
  std::memcpy(staging, host, offset_bytes);
  surgeon::ChunkPlan plan = surgeon::plan_chunks(host, static_cast<int>(chunks), shared_limit, kFactorBytes,
                                                 reinterpret_cast<int*>(staging + offset_bytes));
  TORCH_CHECK(plan.count >= 0, "chunked_solve: offsets must not decrease");
  Tensor memory = staged.to(device, /*non_blocking=*/true);
  const char* uploaded = static_cast<const char*>(memory.const_data_ptr());
  return {std::move(plan), std::move(memory), reinterpret_cast<const int64_t*>(uploaded),
          reinterpret_cast<const int*>(uploaded + offset_bytes)};
}

// Factors of the chunks listed and scratch for their right-hand sides, as surgeon::solve_factored takes them.
std::tuple<Tensor, Tensor> factor_chunks(const surgeon::GatheredSystems& systems, const int* chunks, int count,
                                         int tiles, Tensor& level) {
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
  const int64_t* ends = offsets.const_data_ptr<int64_t>();
  const int64_t chunks = offsets.numel() - 1;
  TORCH_CHECK(ends[0] == 0 && ends[chunks] == target.numel() && target.numel() == rows.numel() &&
                  rows.numel() == columns.numel() && rows.device() == target.device(),
              "chunked_solve: offsets must start at 0, and rows, columns and target be as long as the chunks");
  const c10::cuda::CUDAGuard guard(target.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const PlannedChunks planned = plan_chunks(offsets, target.device());
  const surgeon::GatheredSystems systems = gathered(G_inv, A_inv, rows, columns, planned.offsets);
  Tensor solution = at::empty_like(target);
  Tensor level = at::empty({chunks}, target.options().dtype(at::kInt));
  if (chunks > 0) C10_CUDA_CHECK(cudaMemsetAsync(level.mutable_data_ptr(), 0, level.nbytes(), stream));
  for (const surgeon::ChunkBatch& batch : planned.plan.batches) {
    const int* members = planned.order + batch.first;
    if (batch.shared) {
      C10_CUDA_CHECK(surgeon::solve_in_shared(systems, members, batch.count, batch.tiles,
                                              target.const_data_ptr<float>(), solution.mutable_data_ptr<float>(),
                                              level.mutable_data_ptr<int>(), stream));
    } else {
      const auto [factors, scratch] = factor_chunks(systems, members, batch.count, batch.tiles, level);
      C10_CUDA_CHECK(surgeon::solve_factored(systems, members, batch.count, batch.tiles,
                                             factors.const_data_ptr<float>(), {target.const_data_ptr<float>(), 0, 0, 0},
                                             solution.mutable_data_ptr<float>(), level.const_data_ptr<int>(),
                                             static_cast<float*>(scratch.mutable_data_ptr()), stream));
    }
  }
  return {solution, level};
}

// One block of chunks of the sequential update: all factorised at once, then solved one after the other.
Tensor chunked_sequence_(Tensor& Y, Tensor& pending, const Tensor& G_inv, const Tensor& A_inv, const Tensor& rows,
                         const Tensor& columns, const Tensor& row_offsets, const Tensor& offsets,
                         const Tensor& row_ranges, int64_t block_begin) {
  for (const Tensor* matrix : {static_cast<const Tensor*>(&Y), static_cast<const Tensor*>(&pending)}) {
    TORCH_CHECK(
        matrix->is_cuda() && matrix->is_contiguous() && matrix->scalar_type() == at::kFloat && matrix->dim() == 2,
        "chunked_sequence_: Y and pending must be contiguous float32 matrices");
  }
  for (const Tensor* index : {&offsets, &row_ranges}) {
    TORCH_CHECK(index->is_cpu() && index->is_contiguous() && index->scalar_type() == at::kLong,
                "chunked_sequence_: offsets and row_ranges must be contiguous int64 on the CPU");
  }
  const int64_t chunks = offsets.numel() - 1, C = Y.size(1), block_end = block_begin + pending.size(0);
  TORCH_CHECK(G_inv.dim() == 2 && A_inv.dim() == 2 && G_inv.size(0) == Y.size(0) && A_inv.size(0) == C && chunks >= 0 &&
                  row_ranges.dim() == 2 && row_ranges.size(0) == chunks && row_ranges.size(1) == 2 &&
                  pending.size(1) == C && block_begin >= 0 && block_end <= Y.size(0) && rows.numel() == columns.numel(),
              "chunked_sequence_: sizes do not agree");
  TORCH_CHECK(row_offsets.is_contiguous() && row_offsets.scalar_type() == at::kLong &&
                  row_offsets.numel() == Y.size(0) + 1 && row_offsets.device() == Y.device() &&
                  rows.device() == Y.device() && pending.device() == Y.device(),
              "chunked_sequence_: row_offsets must be contiguous int64, one more than rows, all on one device");
  const c10::cuda::CUDAGuard guard(Y.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor device_offsets = offsets.to(Y.device());
  const surgeon::GatheredSystems systems =
      gathered(G_inv, A_inv, rows, columns, device_offsets.const_data_ptr<int64_t>());
  const int64_t* host = offsets.const_data_ptr<int64_t>();
  const int64_t* ranges = row_ranges.const_data_ptr<int64_t>();
  Tensor level = at::zeros({chunks}, Y.options().dtype(at::kInt));
  if (chunks == 0) return level;
  TORCH_CHECK(host[0] >= 0 && host[chunks] <= rows.numel(), "chunked_sequence_: offsets beyond the positions");
  int64_t widest = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    TORCH_CHECK(
        block_begin <= ranges[2 * chunk] && ranges[2 * chunk + 1] <= block_end && host[chunk] <= host[chunk + 1],
        "chunked_sequence_: a chunk outside its block, or offsets that decrease");
    widest = std::max(widest, host[chunk + 1] - host[chunk]);
  }
  const int tiles = static_cast<int>((widest + surgeon::kTile - 1) / surgeon::kTile);
  const Tensor members = at::arange(chunks, level.options());
  const int* ids = members.const_data_ptr<int>();
  const auto [factors, scratch] = factor_chunks(systems, ids, static_cast<int>(chunks), tiles, level);
  const Tensor solution = at::empty({rows.numel()}, Y.options());
  float* x = solution.mutable_data_ptr<float>();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    C10_CUDA_CHECK(surgeon::solve_factored(
        systems, ids + chunk, 1, tiles, factors.const_data_ptr<float>() + chunk * surgeon::factor_floats(tiles),
        {pending.const_data_ptr<float>(), C, block_begin, pending.size(0)}, x, level.const_data_ptr<int>(),
        static_cast<float*>(scratch.mutable_data_ptr()) + chunk * surgeon::solve_scratch_floats(1, tiles), stream));
    C10_CUDA_CHECK(surgeon::apply_chunk(
        systems, row_offsets.const_data_ptr<int64_t>(),
        {host[chunk], host[chunk + 1], ranges[2 * chunk], ranges[2 * chunk + 1], block_begin, block_end}, C, x,
        Y.mutable_data_ptr<float>(), pending.mutable_data_ptr<float>(), stream));
  }
  return level;
}

}  // namespace

TORCH_LIBRARY_IMPL(surgeon_kernels, CUDA, m) {
  m.impl("chunked_solve", &chunked_solve);
  m.impl("chunked_sequence_", &chunked_sequence_);
}
