#include <algorithm>
#include <map>

#include "chunked_solve.h"

namespace surgeon {

ChunkPlan plan_chunks(const int64_t* offsets, int chunks, int shared_limit, int64_t factor_bytes, int* order) {
  // Chunks by their number of tiles, those in shared memory first: counted, then placed, as there may be very many.
  std::vector<int> in_shared(shared_limit / kSharedTile + 1);
  std::map<int, int> tiled;
  const auto tiles = [](int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); };
  const auto bin = [&](int64_t size) -> int& {
    return size <= shared_limit ? in_shared[tiles(size, kSharedTile)] : tiled[tiles(size, kTile)];
  };
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t size = offsets[chunk + 1] - offsets[chunk];
    if (size < 0) return {-1, {}};
    ++bin(size);
  }
  in_shared[0] = 0;  // the empty ones
  ChunkPlan plan{};
  const auto add = [&](int& count, int tiles, bool shared, int64_t limit) {
    // Batches of one size, so that none is left with a few chunks and an idle device.
    const int64_t batches = (count + limit - 1) / limit;
    for (int64_t b = 0; b < batches; ++b) {
      const int begin = static_cast<int>(b * count / batches), end = static_cast<int>((b + 1) * count / batches);
      plan.batches.push_back({plan.count + begin, end - begin, tiles, shared});
    }
    plan.count += count;
    count = plan.count - count;  // from now on where the next one goes
  };
  for (size_t t = 1; t < in_shared.size(); ++t) add(in_shared[t], static_cast<int>(t), true, INT32_MAX);
  for (auto& [t, count] : tiled) {
    const int64_t each = factor_floats(t) * static_cast<int64_t>(sizeof(float));
    add(count, t, false, std::max<int64_t>(1, factor_bytes / each));
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t size = offsets[chunk + 1] - offsets[chunk];
    if (size > 0) order[bin(size)++] = chunk;
  }
  return plan;
}

}  // namespace surgeon
