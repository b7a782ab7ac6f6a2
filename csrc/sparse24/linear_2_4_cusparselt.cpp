// cuSPARSELt called directly: through torch.sparse every call makes descriptors and plans anew, about 0.45 ms.
#include "linear_2_4_cusparselt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include "linear_2_4.h"

namespace surgeon {
namespace {

// The few declarations of cusparseLt.h that are used, so that its headers are not needed. Since 0.8 its structures are
// 512 bytes that the caller keeps; before, they were larger.
constexpr int kOldest = 800;
struct alignas(16) Opaque {
  uint8_t data[512];
};
using Status = int;  // 0 is success
enum { kRowMajor = 2, kColumnMajor = 1, kNoTranspose = 0, kTranspose = 1, kFiftyPercent = 0, kComputeFloat = 2 };
enum { kDefaultAlgorithm = 0, kAlgorithmId = 0, kAlgorithmMaxId = 1 };

struct Library {
  int version = 0;  // 800 for 0.8.0; 0 where it is missing, incomplete or too old
  Status (*property)(libraryPropertyType, int*);
  Status (*init)(Opaque*);
  const char* (*error)(Status);
  Status (*dense)(const Opaque*, Opaque*, int64_t, int64_t, int64_t, uint32_t, cudaDataType, int);
  Status (*structured)(const Opaque*, Opaque*, int64_t, int64_t, int64_t, uint32_t, cudaDataType, int, int);
  Status (*matmul_descriptor)(const Opaque*, Opaque*, int, int, const Opaque*, const Opaque*, const Opaque*,
                              const Opaque*, int);
  Status (*algorithm)(const Opaque*, Opaque*, const Opaque*, int);
  Status (*set_algorithm)(const Opaque*, Opaque*, int, const void*, size_t);
  Status (*get_algorithm)(const Opaque*, const Opaque*, int, void*, size_t);
  Status (*plan)(const Opaque*, Opaque*, const Opaque*, const Opaque*);
  Status (*workspace)(const Opaque*, const Opaque*, size_t*);
  Status (*matmul)(const Opaque*, const Opaque*, const void*, const void*, const void*, const void*, const void*, void*,
                   void*, cudaStream_t*, int32_t);
  Status (*compressed_size)(const Opaque*, const Opaque*, size_t*, size_t*);
  Status (*compress)(const Opaque*, const Opaque*, const void*, void*, void*, cudaStream_t);
  Status (*destroy_plan)(const Opaque*);
  Status (*destroy_matrix)(const Opaque*);

  Library() {
    // Loaded already by a torch that was built with it.
    void* handle = dlopen("libcusparseLt.so.0", RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) handle = dlopen("libcusparseLt.so.0", RTLD_LAZY);
    if (handle == nullptr) return;
    bool complete = true;
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      complete = complete && function != nullptr;
    };
    find(property, "cusparseLtGetProperty");
    find(init, "cusparseLtInit");
    find(error, "cusparseLtGetErrorString");
    find(dense, "cusparseLtDenseDescriptorInit");
    find(structured, "cusparseLtStructuredDescriptorInit");
    find(matmul_descriptor, "cusparseLtMatmulDescriptorInit");
    find(algorithm, "cusparseLtMatmulAlgSelectionInit");
    find(set_algorithm, "cusparseLtMatmulAlgSetAttribute");
    find(get_algorithm, "cusparseLtMatmulAlgGetAttribute");
    find(plan, "cusparseLtMatmulPlanInit");
    find(workspace, "cusparseLtMatmulGetWorkspace");
    find(matmul, "cusparseLtMatmul");
    find(compressed_size, "cusparseLtSpMMACompressedSize");
    find(compress, "cusparseLtSpMMACompress");
    find(destroy_plan, "cusparseLtMatmulPlanDestroy");
    find(destroy_matrix, "cusparseLtMatDescriptorDestroy");
    int major = 0, minor = 0, patch = 0;
    if (!complete || property(MAJOR_VERSION, &major) || property(MINOR_VERSION, &minor) ||
        property(PATCH_LEVEL, &patch))
      return;
    const int found = major * 1000 + minor * 100 + patch;
    version = found < kOldest ? 0 : found;
  }
};

const Library& library() {
  static const Library loaded;
  return loaded;
}

// A handle for each device, made on first use.
struct Device {
  std::once_flag once;
  Opaque handle;
  const char* error = "libcusparseLt.so.0, at least version 0.8, is not found";
  int id = 0;
};

Device& current_device() {
  static std::array<Device, kMaxDevices> devices;
  int id = -1;
  cudaGetDevice(&id);
  Device& device = devices.at(id);
  std::call_once(device.once, [&] {
    device.id = id;
    if (library().version == 0) return;
    const Status status = library().init(&device.handle);
    device.error = status == 0 ? nullptr : library().error(status);
  });
  return device;
}

}  // namespace

bool Cusparselt24::operator<(const Cusparselt24& other) const {
  return std::tie(tokens, rows, columns, half) < std::tie(other.tokens, other.rows, other.columns, other.half);
}

// Descriptors stay where they are as long as their plan: it refers to them.
struct CusparseltPlan {
  Device* device;
  Opaque weight, x, y, matmul, algorithm, plan;
  size_t workspace = 0;
  bool exists = false;    // such an algorithm
  bool captured = false;  // served a capture: kept, whatever of it a graph may refer to
  int64_t used = 0;       // when, counted in calls
  std::mutex running;     // calls on the host follow one another
  int matrices = 0;       // of weight, x and y that are described

  CusparseltPlan() = default;
  CusparseltPlan(const CusparseltPlan&) = delete;
  // A launch has copied what it needs: torch destroys its plans directly after it.
  ~CusparseltPlan() {
    if (exists) library().destroy_plan(&plan);
    const Opaque* described[] = {&weight, &x, &y};
    for (int i = 0; i < matrices; ++i) library().destroy_matrix(described[i]);
  }

  const char* make(const Cusparselt24& size, int number) {
    const Library& use = library();
    const Opaque* handle = &device->handle;
    const cudaDataType type = size.half ? CUDA_R_16F : CUDA_R_16BF;
    const int64_t tokens = size.tokens, rows = size.rows, columns = size.columns;
    int most = 0;
    Status status = use.structured(handle, &weight, rows, columns, columns, 16, type, kRowMajor, kFiftyPercent);
    matrices += !status;
    if (!status) status = use.dense(handle, &x, tokens, columns, columns, 16, type, kRowMajor), matrices += !status;
    if (!status) status = use.dense(handle, &y, rows, tokens, rows, 16, type, kColumnMajor), matrices += !status;
    if (!status)
      status = use.matmul_descriptor(handle, &matmul, kNoTranspose, kTranspose, &weight, &x, &y, &y, kComputeFloat);
    if (!status) status = use.algorithm(handle, &algorithm, &matmul, kDefaultAlgorithm);
    if (!status) status = use.get_algorithm(handle, &algorithm, kAlgorithmMaxId, &most, sizeof(most));
    if (status) return use.error(status);
    if (number >= most || use.set_algorithm(handle, &algorithm, kAlgorithmId, &number, sizeof(number)) ||
        use.plan(handle, &plan, &matmul, &algorithm))
      return nullptr;
    exists = true;
    status = use.workspace(handle, &plan, &workspace);
    return status ? use.error(status) : nullptr;
  }
};

int cusparselt_version() { return library().version; }

int cusparselt_tokens(int tokens) {
  int step = 8;
  while (tokens / step >= 16) step *= 2;
  return tokens / step * step;
}

namespace {

// The plan, or null where there is no such algorithm, or no plan and none `may_make` one.
const char* find_plan(const Cusparselt24& size, int algorithm, bool may_make, std::shared_ptr<CusparseltPlan>* plan) {
  using Plans = std::map<std::tuple<int, Cusparselt24, int>, std::shared_ptr<CusparseltPlan>>;
  static std::mutex mutex;
  static Plans& plans = *new Plans;  // never destroyed: the library may be gone before
  static int64_t calls = 0;
  plan->reset();
  Device& device = current_device();
  if (device.error != nullptr) return device.error;
  const std::lock_guard lock(mutex);
  auto found = plans.find({device.id, size, algorithm});
  if (found == plans.end()) {
    if (!may_make) return nullptr;
    auto made = std::make_shared<CusparseltPlan>();
    made->device = &device;
    if (const char* error = made->make(size, algorithm)) return error;
    const auto evictable = [](const Plans::value_type& each) { return !each.second->captured; };
    if (std::count_if(plans.begin(), plans.end(), evictable) >= kMostPlans) {
      plans.erase(std::min_element(plans.begin(), plans.end(), [&](const auto& a, const auto& b) {
        return std::pair(a.second->captured, a.second->used) < std::pair(b.second->captured, b.second->used);
      }));
    }
    found = plans.emplace(std::tuple(device.id, size, algorithm), std::move(made)).first;
  }
  CusparseltPlan& kept = *found->second;
  kept.used = ++calls;
  kept.captured = kept.captured || (!may_make && kept.exists);
  if (kept.exists) *plan = found->second;
  return nullptr;
}

}  // namespace

const char* cusparselt_compressed_bytes(const Cusparselt24& size, size_t* bytes, size_t* buffer_bytes) {
  std::shared_ptr<CusparseltPlan> plan;
  if (const char* error = find_plan(size, 0, true, &plan)) return error;
  if (plan == nullptr) return "its first algorithm does not take these sizes";
  const Status status = library().compressed_size(&plan->device->handle, &plan->plan, bytes, buffer_bytes);
  return status ? library().error(status) : nullptr;
}

const char* cusparselt_compress(const Cusparselt24& size, const void* dense, void* compressed, void* buffer,
                                cudaStream_t stream) {
  std::shared_ptr<CusparseltPlan> plan;
  if (const char* error = find_plan(size, 0, true, &plan)) return error;
  if (plan == nullptr) return "its first algorithm does not take these sizes";
  const std::lock_guard lock(plan->running);
  const Status status = library().compress(&plan->device->handle, &plan->plan, dense, compressed, buffer, stream);
  return status ? library().error(status) : nullptr;
}

const char* cusparselt_plan(const Cusparselt24& size, int algorithm, cudaStream_t stream,
                            std::shared_ptr<CusparseltPlan>* plan, size_t* workspace_bytes) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (const char* error = find_plan(size, algorithm, capture == cudaStreamCaptureStatusNone, plan)) return error;
  *workspace_bytes = *plan == nullptr ? 0 : (*plan)->workspace;
  return nullptr;
}

const char* cusparselt_run(CusparseltPlan& plan, const void* compressed, const void* x, void* y, void* workspace,
                           cudaStream_t stream) {
  const float one = 1, zero = 0;
  const std::lock_guard lock(plan.running);
  const Status status =
      library().matmul(&plan.device->handle, &plan.plan, &one, compressed, x, &zero, y, y, workspace, &stream, 1);
  return status ? library().error(status) : nullptr;
}

}  // namespace surgeon
