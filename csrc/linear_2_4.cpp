// Which kernel computes a 2:4 linear, and how many blocks share its columns.
#include "linear_2_4.h"

#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

namespace surgeon {
namespace {

constexpr int kSplits[] = {1, 2, 3, 4, 6, 8};  // blocks of a cluster that share the columns
constexpr int kSplitCount = sizeof(kSplits) / sizeof(kSplits[0]);
constexpr int kKernelCount = kMmaCount + kWgmmaCount;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Device {
  int id = 0;
  int capability = 0;
  std::once_flag once;
  std::atomic<int> clusters[2][kKernelCount][kSplitCount] = {};  // that run at the same time, 0 where not yet asked
};

Device& current_device() {
  static Device devices[kMaxDevices];
  int id = 0;
  cudaGetDevice(&id);
  Device& device = devices[id];
  std::call_once(device.once, [&] {
    device.id = id;
    cudaDeviceGetAttribute(&device.capability, cudaDevAttrComputeCapabilityMajor, id);
  });
  return device;
}

const Kernel24& kernel_of(int number) {
  return number < kMmaCount ? linear_2_4_mma_kernel(number) : linear_2_4_wgmma_kernel(number - kMmaCount);
}

bool allowed(const Linear24& call, int number, int split, const Device& device) {
  if (number >= kMmaCount && device.capability != 9) return false;
  if (split > 1 && device.capability < 9) return false;  // no clusters
  return split == 1 || split * kernel_of(number).step <= call.units;
}

int concurrent_clusters(const Linear24& call, int number, int index, Device& device) {
  std::atomic<int>& known = device.clusters[call.half][number][index];
  if (known.load(std::memory_order_relaxed) == 0) {
    int clusters = 0;
    if (kernel_of(number).run[call.half](call, kSplits[index], nullptr, &clusters) != cudaSuccess) {
      cudaGetLastError();  // not launched, so nothing is lost: such a split is simply not chosen
      clusters = -1;
    }
    // Large clusters do not always find their places next to others'.
    known.store(kSplits[index] > 3 ? clusters * 9 / 10 : clusters, std::memory_order_relaxed);
  }
  return known.load(std::memory_order_relaxed);
}

// Measured on an H200. The smallest tile that holds the tokens; past 512 tokens, or where rows are long, blocks of
// twice the rows, because x is then read half as often.
int kernel_for(const Linear24& call, const Device& device) {
  if (call.tokens <= 2 && call.rows <= 8192) return kMma8Narrow;
  if (call.tokens <= 8) return kMma8;
  if (call.tokens <= 16) return kMma16;
  if (device.capability != 9) return kMma32;
  if (call.tokens <= 32) return kMmaCount + kWgmma32;
  if (call.tokens <= 64) return kMmaCount + kWgmma64;
  return kMmaCount + (call.tokens > 512 || call.units >= 64 ? kWgmma128Wide : kWgmma128);
}

// As many blocks share the columns as still run at the same time: more would wait for a second wave.
int choice_for(const Linear24& call, Device& device) {
  const int number = kernel_for(call, device);
  const Kernel24& kernel = kernel_of(number);
  const int clusters = ceil_div(call.rows, kernel.rows) * ceil_div(call.tokens, kernel.tokens);
  const int most = number < kMmaCount ? 4 : 8;
  int best = 0;
  for (int index = 1; index < kSplitCount && kSplits[index] <= most; ++index) {
    if (!allowed(call, number, kSplits[index], device)) break;
    if (clusters <= concurrent_clusters(call, number, index, device)) best = index;
  }
  return number * kSplitCount + best;
}

// Sizes that share a pinned choice: tokens up to the same power of two.
using Key = std::tuple<int, bool, int, int, int>;

Key key_of(const Linear24& call, const Device& device) {
  int bucket = 0;
  while (bucket < 13 && (1 << bucket) < call.tokens) ++bucket;
  return {device.id, call.half, ceil_div(call.rows, 16), call.units, bucket};
}

std::shared_mutex pins_mutex;
std::map<Key, int> pins;

int pinned_choice(const Linear24& call, const Device& device) {
  const std::shared_lock lock(pins_mutex);
  const auto found = pins.find(key_of(call, device));
  return found == pins.end() ? -1 : found->second;
}

}  // namespace

int linear_2_4_choices() { return kKernelCount * kSplitCount; }

cudaError_t linear_2_4_run(const Linear24& call, int choice, cudaStream_t stream) {
  const Device& device = current_device();
  const int number = choice / kSplitCount, split = kSplits[choice % kSplitCount];
  if (!allowed(call, number, split, device)) return cudaErrorNotSupported;
  const Kernel24& kernel = kernel_of(number);
  Linear24 with = call;
  with.overlap = device.capability < 9 ? Overlap::kNone : kernel.overlap;
  return kernel.run[call.half](with, split, stream, nullptr);
}

void linear_2_4_pin(const Linear24& call, int choice) {
  const Key key = key_of(call, current_device());
  const std::unique_lock lock(pins_mutex);
  pins[key] = choice;
}

cudaError_t linear_2_4(const Linear24& call, cudaStream_t stream) {
  Device& device = current_device();
  const int pinned = pinned_choice(call, device);
  return linear_2_4_run(call, pinned >= 0 ? pinned : choice_for(call, device), stream);
}

}  // namespace surgeon
