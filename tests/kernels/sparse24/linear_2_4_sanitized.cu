// Small 2:4 linears by every kernel, or with the argument "mma" by those on mma.sp, against double on the host: for
// compute-sanitizer, which test_sanitized_gpu.py runs it under. Exits with 1 at the first wrong value.

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "sanitized.h"
#include "sparse24/linear_2_4.h"

using namespace surgeon;

namespace {

std::mt19937 generator(0);

__nv_bfloat16 draw() { return __float2bfloat16(std::normal_distribution<float>()(generator)); }

// A random 2:4 weight, dense and in the fragments of surgeon_kernels/sparse24/linear_2_4_layout.py.
struct Weight {
  int rows, columns, units;
  std::vector<double> dense;
  std::vector<uint8_t> fragments;

  Weight(int rows, int columns)
      : rows(rows),
        columns(columns),
        units((columns + 127) / 128),
        dense(rows * columns),
        fragments((rows + 15) / 16 * units * kUnitBytes) {
    for (int row = 0; row < (rows + 15) / 16 * 16; ++row)
      for (int column = 0; column < units * 128; column += 4) {
        uint8_t* unit = &fragments[(row / 16 * units + column / 128) * kUnitBytes];
        const int tile = column % 128 / 32, half = column % 32 / 16, group = column % 16 / 4;
        const bool inside = row < rows && column < columns;
        const int first = inside ? generator() % 3 : 0, second = inside ? first + 1 + generator() % (3 - first) : 1;
        const __nv_bfloat16 kept[2] = {inside ? draw() : __nv_bfloat16(0.f), inside ? draw() : __nv_bfloat16(0.f)};
        const int lane = row % 8 * 4;
        std::copy_n(
            kept, 2,
            reinterpret_cast<__nv_bfloat16*>(unit) + ((tile * 32 + lane + group) * 4 + 2 * half + row % 16 / 8) * 2);
        reinterpret_cast<uint32_t*>(unit + 2048)[(lane + 2 * (tile % 2) + half) * 2 + tile / 2] |=
            (first | second << 2) << (16 * (row % 16 / 8) + 4 * group);
        if (!inside) continue;
        dense[row * columns + column + first] = __bfloat162float(kept[0]);
        dense[row * columns + column + second] = __bfloat162float(kept[1]);
      }
  }
};

int compare(int choices, int rows, int columns, int tokens, Activation activation) {
  const Weight weight(rows, columns);
  std::vector<__nv_bfloat16> x(tokens * columns), bias(rows), y(tokens * rows);
  std::generate(x.begin(), x.end(), draw);
  std::generate(bias.begin(), bias.end(), draw);
  std::vector<double> exact(tokens * rows);
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < rows; ++r) {
      double sum = __bfloat162float(bias[r]);
      for (int c = 0; c < columns; ++c) sum += weight.dense[r * columns + c] * __bfloat162float(x[t * columns + c]);
      exact[t * rows + r] = activation == Activation::kRelu ? std::max(sum, 0.) : sum;
    }
  uint8_t* fragments = upload(weight.fragments);
  __nv_bfloat16 *device_x = upload(x), *device_bias = upload(bias), *device_y = upload(y);
  __nv_bfloat16* device_dense = upload(std::vector<__nv_bfloat16>(rows * columns, __nv_bfloat16(1.f)));
  check(linear_2_4_unpack(fragments, device_dense, rows, columns, nullptr));
  const std::vector<__nv_bfloat16> dense = download(device_dense, rows * columns);
  for (int i = 0; i < rows * columns; ++i)
    if (__bfloat162float(dense[i]) != weight.dense[i])
      std::printf("unpacked, at %d: %g, not %g\n", i, __bfloat162float(dense[i]), weight.dense[i]), std::exit(1);
  int ran = 0;
  for (int choice = 0; choice < choices; ++choice) {
    check(cudaMemset(device_y, 0xff, sizeof(y[0]) * y.size()));
    const Linear24 call{fragments, device_x,     device_bias, device_y, tokens,        rows,
                        columns,   weight.units, activation,  false,    Overlap::kNone};
    const cudaError_t status = linear_2_4_run(call, choice, nullptr);
    if (status == cudaErrorNotSupported) continue;
    check(status);
    y = download(device_y, y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      const double value = __bfloat162float(y[i]);
      if (!(std::abs(value - exact[i]) <= 0.01 * std::abs(exact[i]) + 0.01))
        std::printf("choice %d, %d x %d, %d tokens, at %zu: %g, not %g\n", choice, rows, columns, tokens, i, value,
                    exact[i]),
            std::exit(1);
    }
    ++ran;
  }
  for (void* each : {static_cast<void*>(fragments), static_cast<void*>(device_x), static_cast<void*>(device_bias),
                     static_cast<void*>(device_y), static_cast<void*>(device_dense)})
    check(cudaFree(each));
  return ran;
}

}  // namespace

int main(int count, char** arguments) {
  const int choices = count > 1 && arguments[1] == std::string("mma") ? linear_2_4_mma_choices() : linear_2_4_choices();
  int ran = compare(choices, 72, 1160, 5, Activation::kNone);
  ran += compare(choices, 200, 1032, 100, Activation::kNone);
  ran += compare(choices, 40, 384, 150, Activation::kRelu);
  check(cudaDeviceSynchronize());
  std::printf("%d ran, 0 wrong\n", ran);
}
