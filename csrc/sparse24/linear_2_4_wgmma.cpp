#include <array>

#include "linear_2_4.h"

namespace surgeon {

// In files of their own, to be compiled at the same time: tiles of up to 64 tokens, of up to 160, of more, and those
// whose blocks share x. Numbered one after the other. Those without a time in linear_2_4_times.h are there to be
// measured: by tune_2_4, and by the benchmark that the times are fitted to.
extern const Kernel24 kWgmmaNarrow[10], kWgmmaMiddle[5], kWgmmaWide[5], kWgmmaShared[6];

const Kernel24& linear_2_4_wgmma_kernel(int which) {
  static const auto kernels = [] {
    std::array<const Kernel24*, kWgmmaCount> all;
    auto end = all.begin();
    const auto append = [&](const auto& file) {
      for (const Kernel24& kernel : file) *end++ = &kernel;
    };
    append(kWgmmaNarrow), append(kWgmmaMiddle), append(kWgmmaWide), append(kWgmmaShared);
    return all;
  }();
  return *kernels[which];
}

}  // namespace surgeon
