// Stands in for libcusparseLt.so.0: computes nothing, and counts the plans and matrices that exist.

#include <cstddef>
#include <cstdint>

extern "C" {

int plans = 0, matrices = 0;

int cusparseLtGetProperty(int which, int* value) { return *value = which == 1 ? 8 : 0, 0; }
int cusparseLtInit(void*) { return 0; }
const char* cusparseLtGetErrorString(int) { return "an error"; }
int cusparseLtDenseDescriptorInit(...) { return ++matrices, 0; }
int cusparseLtStructuredDescriptorInit(...) { return ++matrices, 0; }
int cusparseLtMatmulDescriptorInit(...) { return 0; }
int cusparseLtMatmulAlgSelectionInit(...) { return 0; }
int cusparseLtMatmulAlgSetAttribute(...) { return 0; }
int cusparseLtMatmulAlgGetAttribute(const void*, const void*, int, void* value, size_t) {
  return *static_cast<int*>(value) = 4, 0;  // algorithms
}
int cusparseLtMatmulPlanInit(...) { return ++plans, 0; }
int cusparseLtMatmulGetWorkspace(const void*, const void*, size_t* bytes) { return *bytes = 256, 0; }
int cusparseLtMatmul(...) { return 0; }
int cusparseLtSpMMACompressedSize(...) { return 0; }
int cusparseLtSpMMACompress(...) { return 0; }
int cusparseLtMatmulPlanDestroy(const void*) { return --plans, 0; }
int cusparseLtMatDescriptorDestroy(const void*) { return --matrices, 0; }
}
