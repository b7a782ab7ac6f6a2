// The choice of a kernel for a 2:4 linear, and of the number of blocks that share its columns (split-K).
#include "linear_2_4.h"

#include "linear_2_4_times.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

namespace surgeon {
namespace {

constexpr int kSplits[] = {1, 2, 3, 4, 5, 6, 8};  // blocks of a cluster
constexpr int kSplitCount = sizeof(kSplits) / sizeof(kSplits[0]);

int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Device {
  int id = 0;
  int capability = 0;
  bool wgmma = false;  // the device has it, and this build the kernels for it
  std::once_flag once;
  std::atomic<int> resident[2][kKernelCount][kSplitCount] = {};  // clusters, 0 before the first query
};

const Kernel24& kernel_of(int number) {
  return number < kMmaCount ? linear_2_4_mma_kernel(number) : linear_2_4_wgmma_kernel(number - kMmaCount);
}

// Forgets the error that CUDA noted of a kernel that cannot run: another runs instead. One noted `before` is not ours.
void forget(cudaError_t before) {
  if (before == cudaSuccess) cudaGetLastError();
}

// Clusters that are resident at a time; -1 where the kernel does not run so.
int query_resident(const Kernel24& kernel, bool half, int split) {
  const cudaError_t before = cudaPeekAtLastError();
  int clusters = 0;
  if (kernel.launch[half]({}, {0, 0, split, 0}, nullptr, &clusters) == cudaSuccess) return clusters > 0 ? clusters : -1;
  forget(before);
  return -1;
}

Device& current_device() {
  static std::array<Device, kMaxDevices> devices;
  int id = -1;
  cudaGetDevice(&id);
  Device& device = devices.at(id);
  std::call_once(device.once, [&] {
    device.id = id;
    cudaDeviceGetAttribute(&device.capability, cudaDevAttrComputeCapabilityMajor, id);
    device.wgmma = device.capability == 9 && query_resident(kernel_of(kMmaCount), false, 1) > 0;
  });
  return device;
}

bool allowed(const Linear24& call, int number, int split, const Device& device) {
  if (number >= kMmaCount && !device.wgmma) return false;
  if (split > 1 && device.capability < 9) return false;  // no clusters
  const Kernel24& kernel = kernel_of(number);
  // Never the fastest, and long to try: tiles much smaller than all tokens, or much larger.
  if (kernel.tokens < (device.wgmma ? 128 : 32) && call.tokens > 8 * kernel.tokens) return false;
  if (kernel.tokens > 32 && kernel.tokens > 4 * call.tokens) return false;
  // No larger clusters; and blocks that share x take equal parts of a tile's tokens.
  if (kernel.sharers > 1 && (split * kernel.sharers > 8 || call.tokens < kernel.tokens)) return false;
  return split == 1 || split * kernel.k_units <= call.units;
}

bool allowed(const Linear24& call, int choice, const Device& device) {
  return allowed(call, choice / kSplitCount, kSplits[choice % kSplitCount], device);
}

int resident_clusters(bool half, int number, int index, Device& device) {
  std::atomic<int>& known = device.resident[half][number][index];
  if (known.load(std::memory_order_relaxed) == 0) {
    const Kernel24& kernel = kernel_of(number);
    const int clusters = query_resident(kernel, half, kSplits[index]);
    // Large clusters do not always fit beside others.
    const bool large = kSplits[index] * kernel.sharers > 3 && clusters > 1;
    known.store(large ? clusters * 9 / 10 : clusters, std::memory_order_relaxed);
  }
  return known.load(std::memory_order_relaxed);
}

int tiles_of(const Linear24& call, const Kernel24& kernel) {
  return ceil_div(call.rows, kernel.rows) * ceil_div(call.tokens, kernel.tokens);
}

// Few tokens: the smallest tile that holds them, and the largest split-K that still runs in one wave.
int choice_for_few(const Linear24& call, Device& device) {
  constexpr int kMostSplit = 4;
  const int number = call.tokens <= 2 && call.rows <= 8192 ? kMma8Narrow
                     : call.tokens <= 8                    ? kMma8
                     : call.tokens <= 16                   ? kMma16
                                                           : kMma32;
  const int tiles = tiles_of(call, kernel_of(number));
  int best = 0;
  for (int index = 1; index < kSplitCount && kSplits[index] <= kMostSplit; ++index) {
    if (!allowed(call, number, kSplits[index], device)) break;
    if (tiles <= resident_clusters(call.half, number, index, device)) best = index;
  }
  return number * kSplitCount + best;
}

// Without sparse wgmma, from this number of tokens on: cuSPARSELt by its own choice of an algorithm where the caller
// has it, else the dense product with the weight, unpacked for the call. Estimated, not measured: the kernel for few
// tokens reads W from L2 anew for every 32 of them, about 40 operations a byte, which takes longer than a dense product
// and the time to unpack.
constexpr int kDenseTokens = 256, kDefaultAlgorithm = 0;

int choice_without_wgmma(const Linear24& call, bool library, Device& device) {
  if (call.tokens < kDenseTokens) return choice_for_few(call, device);
  return library ? linear_2_4_choices() + kDefaultAlgorithm : linear_2_4_dense();
}

// The least time by kTimes, of the kernels that have one there. On wgmma.sp whole waves of tiles are data-parallel, a
// block to a tile, and the tiles of the last, partial wave are split-K over clusters; on mma.sp all tiles are.
int choice_by_time(const Linear24& call, Device& device) {
  int best = -1;
  float least = 0;
  for (int number = 0; number < kKernelCount; ++number) {
    const Times24& times = kTimes[number];
    if (times.unit == 0 || !allowed(call, number, 1, device)) continue;
    const int tiles = tiles_of(call, kernel_of(number)), resident = resident_clusters(call.half, number, 0, device);
    if (resident <= 0) continue;
    for (int index = 0; index < kSplitCount && allowed(call, number, kSplits[index], device); ++index) {
      const int clusters = resident_clusters(call.half, number, index, device);
      const int waves = index == 0 ? ceil_div(tiles, resident) : number < kMmaCount ? 0 : tiles / resident;
      const int rest = index == 0 ? 0 : number < kMmaCount ? tiles : tiles % resident;
      if (clusters <= 0 || (index > 0 && rest == 0)) continue;
      float time = waves * (call.units * times.unit + times.tile);
      if (rest > 0)
        time +=
            (waves > 0) * kLaunchTime +
            ceil_div(rest, clusters) * (ceil_div(call.units, kSplits[index]) * times.unit + times.tile + times.cluster);
      if (best < 0 || time < least) best = number * kSplitCount + index, least = time;
    }
  }
  return best < 0 ? choice_without_wgmma(call, false, device) : best;  // where none is known to run
}

// Of cuSPARSELt 0.8's algorithms the one that was fastest, or nearly, at all sizes from this number of tokens on:
// measured on an H200, as `tune_2_4` does.
constexpr int kLibraryTokens = 1024, kLibraryAlgorithm = 17;

int choice_for(const Linear24& call, bool library, Device& device) {
  if (!device.wgmma) return choice_without_wgmma(call, library, device);
  if (library && call.tokens >= kLibraryTokens) return linear_2_4_choices() + kLibraryAlgorithm;
  return call.tokens <= kFewTokens ? choice_for_few(call, device) : choice_by_time(call, device);
}

// Sizes that share a pinned choice: tokens up to the same power of two.
using Key = std::tuple<int, bool, bool, int, int, int>;

Key key_of(const Linear24& call, bool library, const Device& device) {
  int bucket = 0;
  while (bucket < 13 && (1 << bucket) < call.tokens) ++bucket;
  return {device.id, library, call.half, ceil_div(call.rows, 16), call.units, bucket};
}

std::shared_mutex pins_mutex;
std::map<Key, int> pins;

}  // namespace

int linear_2_4_mma_choices() { return kMmaCount * kSplitCount; }
int linear_2_4_dense() { return kKernelCount * kSplitCount; }
int linear_2_4_choices() { return linear_2_4_dense() + 1; }

cudaError_t linear_2_4_run(const Linear24& call, int choice, cudaStream_t stream) {
  if (choice < 0 || choice >= linear_2_4_choices()) return cudaErrorInvalidValue;
  if (choice == linear_2_4_dense()) return cudaErrorNotSupported;
  if (call.tokens == 0 || call.rows == 0) return cudaSuccess;  // a grid may not be empty
  Device& device = current_device();
  const int number = choice / kSplitCount, split = kSplits[choice % kSplitCount];
  if (!allowed(call, number, split, device)) return cudaErrorNotSupported;
  const Kernel24& kernel = kernel_of(number);
  const auto launch = [&](const Linear24& with, const TileRange24& range) {
    const cudaError_t before = cudaPeekAtLastError();
    const cudaError_t status = kernel.launch[call.half](with, range, stream, nullptr);
    if (status == cudaErrorNotSupported) forget(before);
    return status;
  };
  Linear24 with = call;
  with.overlap = device.capability < 9 ? Overlap::kNone : kernel.overlap;
  const int tiles = tiles_of(call, kernel);
  if (number < kMmaCount) return launch(with, {0, tiles, split, tiles});
  // Whole waves first. Their blocks are persistent, except where an activation is applied: its sums lie in the memory
  // of the next tile.
  const int resident = std::max(1, resident_clusters(call.half, number, 0, device));
  const int whole = split == 1 ? tiles : tiles / resident * resident;
  if (whole > 0) {
    const int clusters = kernel.persistent && call.activation == Activation::kNone ? std::min(whole, resident) : whole;
    const cudaError_t status = launch(with, {0, whole, 1, clusters});
    if (status != cudaSuccess || whole == tiles) return status;
  }
  return launch(with, {whole, tiles, split, tiles - whole});
}

Geometry24 linear_2_4_geometry(int choice, bool half) {
  if (choice < 0 || choice >= linear_2_4_dense()) return {};
  Device& device = current_device();
  const int number = choice / kSplitCount, index = choice % kSplitCount;
  const bool runs = (number < kMmaCount || device.wgmma) && (index == 0 || device.capability >= 9);
  const Kernel24& kernel = kernel_of(number);
  const int resident = runs ? resident_clusters(half, number, index, device) : 0;
  return {number - kMmaCount, kernel.rows, kernel.tokens, kSplits[index], resident};
}

bool linear_2_4_pin(const Linear24& call, bool library, int choice) {
  // Only the library knows the number of its algorithms.
  if (choice < 0 || choice >= (library ? INT_MAX : linear_2_4_choices())) return false;
  const Key key = key_of(call, library, current_device());
  const std::unique_lock lock(pins_mutex);
  pins[key] = choice;
  return true;
}

int linear_2_4_choice(const Linear24& call, bool library) {
  Device& device = current_device();
  {
    const std::shared_lock lock(pins_mutex);
    const auto found = pins.find(key_of(call, library, device));
    if (found != pins.end() && (found->second >= linear_2_4_dense() || allowed(call, found->second, device)))
      return found->second;
  }
  return choice_for(call, library, device);
}

}  // namespace surgeon
