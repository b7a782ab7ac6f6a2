// The kernel that a 2:4 linear takes, on devices that are only pretended: csrc/sparse24/linear_2_4.cpp with a CUDA
// runtime and kernels that note what they are asked. Exits with 1 at the first wrong answer.

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "sparse24/linear_2_4.h"

using namespace surgeon;

namespace {

// The device that is current; by its number, its major capability and whether the build holds the kernels on wgmma: an
// H200 and one without its instructions, sm_80 and sm_89, sm_100, sm_120.
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

enum Kind { kMma, kWgmma, kDense, kLibrary, kOwn };  // kOwn: either of the first two
Kind kind_of(int choice) {
  return choice < linear_2_4_mma_choices() ? kMma
         : choice < linear_2_4_dense()     ? kWgmma
         : choice < linear_2_4_choices()   ? kDense
                                           : kLibrary;
}

void expect(int tokens, bool library, Kind kind) {
  const int choice = linear_2_4_choice(call_of(tokens), library);
  const Kind found = kind_of(choice);
  require(found == kind || (kind == kOwn && found <= kWgmma), "another kind of kernel than expected", tokens);
  if (found > kWgmma) return;
  launched = -1;
  require(linear_2_4_run(call_of(tokens), choice, nullptr) == cudaSuccess, "what is chosen does not run", tokens);
  require(found == kWgmma ? launched >= kMmaCount : launched >= 0 && launched < kMmaCount, "another was launched",
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

// What is known of the first device's kernels, a line each: kernel, rows and tokens of a tile, split, clusters. Then,
// by rows, columns and tokens, kernels and splits that run, and those that are chosen.
void print_choices() {
  for (int choice = 0; choice < linear_2_4_dense(); ++choice) {
    const Geometry24 of = linear_2_4_geometry(choice, false);
    std::printf("kernel %d %d %d %d %d\n", of.wgmma, of.tile_rows, of.tile_tokens, of.split, of.resident);
  }
  for (int rows : {1024, 4096, 12288, 22016})
    for (int columns : {1024, 4096, 11008})
      for (int tokens = 17; tokens <= 4096; tokens = tokens * 5 / 4) {
        Linear24 call = call_of(tokens);
        call.rows = rows, call.columns = columns, call.units = (columns + kUnitColumns - 1) / kUnitColumns;
        for (int choice = 0; choice < linear_2_4_dense(); ++choice)
          if (linear_2_4_run(call, choice, nullptr) == cudaSuccess) {
            const Geometry24 of = linear_2_4_geometry(choice, false);
            std::printf("run %d %d %d %d %d\n", rows, columns, tokens, of.wgmma, of.split);
          }
        const Geometry24 chosen = linear_2_4_geometry(linear_2_4_choice(call, false), false);
        std::printf("choice %d %d %d %d %d\n", rows, columns, tokens, chosen.wgmma, chosen.split);
      }
}

}  // namespace

namespace surgeon {

const Kernel24& linear_2_4_mma_kernel(int which) {
  static const Kernel24 kernels[kMmaCount] = {{8, 16, 16, 1, false, Overlap::kEarly, {run<0>, run<0>}},
                                              {8, 64, 4, 1, false, Overlap::kEarly, {run<1>, run<1>}},
                                              {16, 128, 2, 1, false, Overlap::kLate, {run<2>, run<2>}},
                                              {32, 128, 2, 1, false, Overlap::kLate, {run<3>, run<3>}}};
  return kernels[which];
}

// Tokens and rows of the tiles in csrc/sparse24/linear_2_4_wgmma_*.cu; the last six share x.
const Kernel24& linear_2_4_wgmma_kernel(int which) {
  constexpr int kTiles[kWgmmaCount][2] = {
      {32, 192},  {64, 128},  {64, 192},  {8, 128},   {16, 128},  {32, 128},  {64, 128},  {16, 64},   {32, 64},
      {64, 64},   {96, 128},  {96, 192},  {128, 128}, {128, 192}, {160, 128}, {160, 192}, {192, 128}, {192, 192},
      {224, 128}, {256, 128}, {128, 256}, {192, 384}, {256, 256}, {160, 384}, {64, 256},  {96, 256}};
  static Kernel24 kernels[kWgmmaCount];
  const int sharers = which < 20 ? 1 : 2, tokens = kTiles[which][0];
  return kernels[which] = {tokens, kTiles[which][1], 1, sharers, tokens % 32 == 0, Overlap::kEarly, {run<4>, run<4>}};
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
  for (int tokens : {1, 16, 17, 64}) expect(tokens, false, kOwn), expect(tokens, true, kOwn);
  for (int tokens : {256, 1023}) expect(tokens, false, kWgmma), expect(tokens, true, kWgmma);
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

  // Blocks that share x: as many tokens as a tile has, and clusters of no more than eight.
  current = 0;
  const auto runs = [](int tokens, int split) {
    return linear_2_4_run(call_of(tokens), (kMmaCount + 20) * 7 + split, nullptr) == cudaSuccess;
  };
  require(runs(128, 0) && runs(200, 3) && !runs(127, 0) && !runs(128, 4), "other sizes for blocks that share x");

  // No tile of more than 32 tokens and four times the call's.
  const auto wide_runs = [](int tokens) {
    return linear_2_4_run(call_of(tokens), (kMmaCount + 19) * 7, nullptr) == cudaSuccess;
  };
  require(wide_runs(64) && !wide_runs(63), "other sizes for tiles of 256 tokens");

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
  const Geometry24 wide = linear_2_4_geometry((kMmaCount + 2) * 7, false);
  require(wide.wgmma == 2 && wide.tile_tokens == 64 && wide.tile_rows == 192 && wide.split == 1, "another tile",
          wide.tile_rows);
  require(wide.resident == 132, "other blocks are resident", wide.resident);
  const Geometry24 split = linear_2_4_geometry(kMma8 * 7 + 6, false);
  require(split.wgmma < 0 && split.tile_rows == 64 && split.split == 8 && split.resident == 118, "another split",
          split.resident);
  const Geometry24 shared = linear_2_4_geometry((kMmaCount + 20) * 7 + 1, false);
  require(shared.split == 2 && shared.resident == 118, "clusters of four, though two of them share K", shared.resident);
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
