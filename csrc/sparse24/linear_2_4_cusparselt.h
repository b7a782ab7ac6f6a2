#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>

namespace surgeon {

// y[tokens, rows] = x[tokens, columns] W^T by NVIDIA's cuSPARSELt, from the weight as that library compresses it. Found
// at run time: torch brings it along. Functions return null, or what went wrong in words.
struct Cusparselt24 {
  int tokens;  // divisible by 8
  int rows;    // divisible by 16
  int columns;
  bool half;
  bool operator<(const Cusparselt24& other) const;
};

struct CusparseltPlan;

int cusparselt_version();  // 800 for 0.8.0; 0 where it is not found
const char* cusparselt_compressed_bytes(const Cusparselt24& size, size_t* bytes, size_t* buffer_bytes);
const char* cusparselt_compress(const Cusparselt24& size, const void* dense, void* compressed, void* buffer,
                                cudaStream_t stream);

// Of `tokens`, how many a plan is made for: a multiple of 8 with at most four significant bits, so that few plans serve
// all numbers, and what is left is at most an eighth.
int cusparselt_tokens(int tokens);

// The plan for these sizes and this algorithm on the current device; null where there is no such algorithm, and where
// `stream` is captured in a graph and there is no plan yet: making one is no work of the stream's. Plans are kept,
// those that served a capture for good, of the others the kMostPlans used last. `workspace_bytes` belong to each call.
constexpr int kMostPlans = 512;
const char* cusparselt_plan(const Cusparselt24& size, int algorithm, cudaStream_t stream,
                            std::shared_ptr<CusparseltPlan>* plan, size_t* workspace_bytes);
const char* cusparselt_run(CusparseltPlan& plan, const void* compressed, const void* x, void* y, void* workspace,
                           cudaStream_t stream);

}  // namespace surgeon
