#include <algorithm>
#include <map>

#include "chunked_solve.h"

namespace surgeon {

ChunkPlan plan_chunks(const int64_t* offsets, int chunks, int shared_limit, int64_t factor_bytes) {
  std::map<int, std::vector<int>> in_shared, tiled;  // by tiles
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t size = offsets[chunk + 1] - offsets[chunk];
    if (size == 0) continue;
    if (size <= shared_limit) {
      in_shared[static_cast<int>((size + kSharedTile - 1) / kSharedTile)].push_back(chunk);
    } else {
      tiled[static_cast<int>((size + kTile - 1) / kTile)].push_back(chunk);
    }
  }
  ChunkPlan plan;
  const auto add = [&](const std::vector<int>& members, int tiles, bool shared, int64_t limit) {
    // Batches of one size, so that none is left with a few chunks and an idle device.
    const int64_t count = static_cast<int64_t>(members.size()), batches = (count + limit - 1) / limit;
    for (int64_t b = 0; b < batches; ++b) {
      const int64_t begin = b * count / batches, end = (b + 1) * count / batches;
      plan.batches.push_back({static_cast<int>(plan.order.size()), static_cast<int>(end - begin), tiles, shared});
      plan.order.insert(plan.order.end(), members.begin() + begin, members.begin() + end);
    }
  };
  for (const auto& [tiles, members] : in_shared) add(members, tiles, true, members.size());
  for (const auto& [tiles, members] : tiled) {
    const int64_t each = factor_floats(tiles) * static_cast<int64_t>(sizeof(float));
    add(members, tiles, false, std::max<int64_t>(1, factor_bytes / each));
  }
  return plan;
}

}  // namespace surgeon
