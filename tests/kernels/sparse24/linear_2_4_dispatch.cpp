// The kernel that a 2:4 linear takes, on devices that are only pretended: csrc/sparse24/linear_2_4.cpp with a CUDA
// runtime and kernels that note what they are asked. Exits with 1 at the first wrong answer.

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "sparse24/linear_2_4.h"

using namespace surgeon;

namespace {

// The device that is current; by its number, its capability and whether the build holds the kernels on wgmma.
int current = 0;
constexpr struct {
  int capability;
  bool holds_wgmma;
} kDevices[] = {{9, true}, {9, false}, {8, false}, {10, false}, {12, false}, {9, false}, {9, false}};
cudaError_t last = cudaSuccess;
int launched = -1;  // the number of the kernel

template <int kNumber>
cudaError_t run(const Linear24&, const TileRange24&, cudaStream_t, int* capacity) {
  if (kNumber >= kMmaCount && !kDevices[current].holds_wgmma) return last = cudaErrorInvalidDeviceFunction;
  if (capacity != nullptr)
    *capacity = 132;
  else
    launched = kNumber;
  return cudaSuccess;
}

void require(bool condition, const char* what, int value = 0) {
  if (!condition) std::printf("device %d: %s (%d)\n", current, what, value), std::exit(1);
}

Linear24 call_of(int tokens) {
  Linear24 call = {};
  call.tokens = tokens, call.rows = 4096, call.columns = 4096, call.units = 32;
  return call;
}

enum Kind { kMma, kWgmma, kDense, kLibrary };
Kind kind_of(int choice) {
  return choice < linear_2_4_mma_choices() ? kMma
         : choice < linear_2_4_dense()     ? kWgmma
         : choice < linear_2_4_choices()   ? kDense
                                           : kLibrary;
}

void expect(int tokens, bool library, Kind kind) {
  const int choice = linear_2_4_choice(call_of(tokens), library);
  require(kind_of(choice) == kind, "another kind of kernel than expected", tokens);
  if (kind > kWgmma) return;
  launched = -1;
  require(linear_2_4_run(call_of(tokens), choice, nullptr) == cudaSuccess, "what is chosen does not run", tokens);
  require(kind == kWgmma ? launched >= kMmaCount : launched >= 0 && launched < kMmaCount, "another was launched",
          tokens);
}

void without_wgmma() {
  for (int tokens : {1, 16, 17, 128, 255}) expect(tokens, false, kMma), expect(tokens, true, kMma);
  for (int tokens : {256, 1024, 5000}) expect(tokens, false, kDense), expect(tokens, true, kLibrary);
  launched = -1;
  for (int choice = linear_2_4_mma_choices(); choice < linear_2_4_choices(); ++choice)
    require(linear_2_4_run(call_of(200), choice, nullptr) == cudaErrorNotSupported, "not refused", choice);
  require(launched == -1, "a kernel was launched that the build does not hold", launched);
}

// The choices on the first device, a line each: rows, columns, tokens, and the kernel of Wgmma24 and its split.
void print_choices() {
  for (int rows : {1024, 4096, 12288, 22016})
    for (int columns : {1024, 4096, 11008})
      for (int tokens = 17; tokens <= 4096; tokens = tokens * 5 / 4) {
        Linear24 call = call_of(tokens);
        call.rows = rows, call.columns = columns, call.units = (columns + kUnitColumns - 1) / kUnitColumns;
        const Geometry24 chosen = linear_2_4_geometry(linear_2_4_choice(call, false), false);
        std::printf("%d %d %d %d %d\n", rows, columns, tokens, chosen.wgmma, chosen.split);
      }
}

}  // namespace

namespace surgeon {

const Kernel24& linear_2_4_mma_kernel(int which) {
  static const Kernel24 kernels[kMmaCount] = {{8, 16, 16, Overlap::kEarly, {run<0>, run<0>}},
                                              {8, 64, 4, Overlap::kEarly, {run<1>, run<1>}},
                                              {16, 128, 2, Overlap::kLate, {run<2>, run<2>}},
                                              {32, 128, 2, Overlap::kLate, {run<3>, run<3>}}};
  return kernels[which];
}

const Kernel24& linear_2_4_wgmma_kernel(int which) {
  static const Kernel24 kernels[kWgmmaCount] = {
      {32, 192, 1, Overlap::kEarly, {run<4>, run<4>}},  {64, 128, 1, Overlap::kEarly, {run<5>, run<5>}},
      {64, 192, 1, Overlap::kEarly, {run<6>, run<6>}},  {128, 128, 1, Overlap::kEarly, {run<7>, run<7>}},
      {128, 192, 1, Overlap::kEarly, {run<8>, run<8>}}, {256, 128, 1, Overlap::kEarly, {run<9>, run<9>}}};
  return kernels[which];
}

}  // namespace surgeon

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = kDevices[device].capability, cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  return last = cudaSuccess, error;
}
}

int main(int count, char**) {
  if (count > 1) return print_choices(), 0;
  expect(1, false, kMma), expect(16, true, kMma);
  for (int tokens : {17, 64, 256, 1023}) expect(tokens, false, kWgmma), expect(tokens, true, kWgmma);
  expect(4096, false, kWgmma), expect(1024, true, kLibrary);
  for (current = 1; current <= 4; ++current) without_wgmma();

  // A pin of a kernel that the build does not hold is not followed, and one that does not exist is refused.
  current = 1;
  require(linear_2_4_pin(call_of(64), false, linear_2_4_mma_choices()), "not pinned");
  expect(64, false, kMma);
  require(linear_2_4_pin(call_of(64), false, linear_2_4_dense()), "not pinned");
  expect(64, false, kDense);
  for (int choice : {-1, linear_2_4_choices()}) {
    require(!linear_2_4_pin(call_of(64), false, choice), "pinned", choice);
    require(linear_2_4_run(call_of(64), choice, nullptr) == cudaErrorInvalidValue, "ran", choice);
  }
  require(linear_2_4_pin(call_of(64), true, linear_2_4_choices() + 3), "not pinned");
  expect(64, true, kLibrary);

  // Asking leaves no error behind, and takes none away that was there.
  require(last == cudaSuccess, "an error of ours is left", last);
  current = 5;
  linear_2_4_choice(call_of(64), false);
  require(last == cudaSuccess, "an error of ours is left", last);
  current = 6, last = cudaErrorMisalignedAddress;
  linear_2_4_choice(call_of(64), false);
  require(last != cudaSuccess, "another's error is gone");
  current = 0, last = cudaErrorMisalignedAddress;
  linear_2_4_choice(call_of(300), false);
  require(last == cudaErrorMisalignedAddress, "another's error is gone");

  // The geometry that the estimates go by is that of the kernels that run; 9/10 of the larger clusters.
  current = 0;
  const Geometry24 wide = linear_2_4_geometry((kMmaCount + kWgmma64Wide) * 7, false);
  require(wide.wgmma == kWgmma64Wide && wide.tile_tokens == 64 && wide.tile_rows == 192 && wide.split == 1,
          "another tile", wide.tile_rows);
  require(wide.resident == 132, "other blocks are resident", wide.resident);
  const Geometry24 split = linear_2_4_geometry(kMma8 * 7 + 6, false);
  require(split.wgmma < 0 && split.tile_rows == 64 && split.split == 8 && split.resident == 118, "another split",
          split.resident);
  for (current = 1; current <= 4; ++current)
    require(linear_2_4_geometry(kMmaCount * 7, false).resident <= 0, "a kernel that the build does not hold");
  current = 2;
  require(linear_2_4_geometry(kMma8 * 7 + 6, false).resident <= 0, "clusters before 9.0");

  for (int device : {-1, kMaxDevices}) {
    current = device;
    bool refused = false;
    try {
      linear_2_4_choice(call_of(1), false);
    } catch (const std::out_of_range&) {
      refused = true;
    }
    require(refused, "a device beyond the table");
  }
  std::printf("0 wrong\n");
}
