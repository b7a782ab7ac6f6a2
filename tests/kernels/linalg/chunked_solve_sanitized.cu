// Small systems of all kernels of the chunked solve, against double on the host: for compute-sanitizer, which
// test_sanitized_gpu.py runs it under. Exits with 1 at the first wrong value.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "linalg/chunked_solve.h"
#include "sanitized.h"

using namespace surgeon;

namespace {

void expect(bool good, const char* what, double value) {
  if (!good) std::printf("%s: %g\n", what, value), std::exit(1);
}

std::mt19937 generator(0);

// 0.9^|i - j|, or all ones, which has rank one.
std::vector<float> factor(int n, bool ones) {
  std::vector<float> M(n * n);
  for (int i = 0; i < n * n; ++i) M[i] = ones ? 1.0f : std::pow(0.9f, std::abs(i / n - i % n));
  return M;
}

struct Problem {
  int R, C;
  std::vector<float> G, A, target;
  std::vector<int64_t> rows, columns, offsets;
  GatheredSystems device() const {
    return {upload(G),   upload(A),    uint32_t(R),     uint32_t(C),    uint32_t(R),
            uint32_t(C), upload(rows), upload(columns), upload(offsets)};
  }
  double residual(size_t chunk, const std::vector<float>& x) const {
    double rest = 0, total = 0;
    for (int64_t i = offsets[chunk]; i < offsets[chunk + 1]; ++i) {
      double sum = -target[i];
      for (int64_t j = offsets[chunk]; j < offsets[chunk + 1]; ++j) {
        sum += double(G[rows[i] * R + rows[j]]) * A[columns[i] * C + columns[j]] * x[j];
      }
      rest += sum * sum, total += double(target[i]) * target[i];
    }
    return std::sqrt(rest / total);
  }
};

// Solves as csrc/linalg/chunked_solve_ops.cpp does.
void solve(const std::vector<int>& sizes, bool ones) {
  Problem p{30, 40, factor(30, false), factor(40, ones), {}, {}, {}, {0}};
  if (ones) p.G.assign(p.G.size(), 1.0f);
  std::normal_distribution<float> normal;
  for (int size : sizes) {
    std::vector<int> cells(p.R * p.C);
    for (size_t i = 0; i < cells.size(); ++i) cells[i] = int(i);
    std::shuffle(cells.begin(), cells.end(), generator);
    for (int i = 0; i < size; ++i) {
      p.rows.push_back(cells[i] / p.C), p.columns.push_back(cells[i] % p.C), p.target.push_back(normal(generator));
    }
    p.offsets.push_back(p.offsets.back() + size);
  }
  const GatheredSystems systems = p.device();
  const float* target = upload(p.target);
  float* x = upload(std::vector<float>(p.target.size(), NAN));
  int* level = upload(std::vector<int>(sizes.size()));
  int limit = 0;
  check(shared_limit(&limit));
  std::vector<int> order(sizes.size());
  const ChunkPlan plan = plan_chunks(p.offsets.data(), int(sizes.size()), limit, int64_t{1} << 24, order.data());
  const int* members = upload(order);
  for (const ChunkBatch& b : plan.batches) {
    if (b.shared) {
      check(solve_in_shared(systems, members + b.first, b.count, b.tiles, target, x, level, nullptr));
      continue;
    }
    float* factors = upload(std::vector<float>(b.count * factor_floats(b.tiles)));
    int* counters = upload(std::vector<int>(factor_scratch_ints(b.count, b.tiles)));
    auto* scratch = reinterpret_cast<float*>(upload(std::vector<int>(solve_scratch_floats(b.count, b.tiles), -1)));
    check(factor_chunks(systems, members + b.first, b.count, b.tiles, factors, counters, level, nullptr));
    check(solve_factored(systems, members + b.first, b.count, b.tiles, factors, {target, 0, 0, 0}, x, level, scratch,
                         nullptr));
  }
  const auto solution = download(x, p.target.size());
  const auto levels = download(level, sizes.size());
  for (size_t chunk = 0; chunk < sizes.size(); ++chunk) {
    if (sizes[chunk] == 0) continue;
    const bool jittered = levels[chunk] > 0 && levels[chunk] < kAttempts;
    expect(jittered == (ones && sizes[chunk] > 1), "attempt", levels[chunk]);
    if (!ones) expect(p.residual(chunk, solution) < 1e-4, "residual", p.residual(chunk, solution));
    for (auto i = p.offsets[chunk]; i < p.offsets[chunk + 1]; ++i) expect(std::isfinite(solution[i]), "x", solution[i]);
  }
}

// One chunk of the sequential update: three rows of six, every other column.
void apply() {
  Problem p{6, 90, factor(6, false), factor(90, false), {}, {}, {}, {0, 135}};
  std::vector<int64_t> row_offsets{0};
  for (int i = 0; i < 270; ++i) p.rows.push_back(i / 45), p.columns.push_back(i % 45 * 2);
  for (int r = 1; r <= 6; ++r) row_offsets.push_back(45 * r);
  std::normal_distribution<float> normal;
  std::vector<float> weight(6 * 90);
  for (float& w : weight) w = normal(generator);
  for (int i = 0; i < 135; ++i) p.target.push_back(weight[p.rows[i] * 90 + p.columns[i]]);
  const GatheredSystems systems = p.device();
  float *Y = upload(std::vector<float>(weight.size())), *pending = upload(weight), *x = upload(std::vector<float>(270));
  int *level = upload(std::vector<int>{0}), *member = upload(std::vector<int>{0});
  float* factors = upload(std::vector<float>(factor_floats(3)));
  int* counters = upload(std::vector<int>(factor_scratch_ints(1, 3)));
  auto* scratch = reinterpret_cast<float*>(upload(std::vector<int>(solve_scratch_floats(1, 3), -1)));
  check(factor_chunks(systems, member, 1, 3, factors, counters, level, nullptr));
  check(solve_factored(systems, member, 1, 3, factors, {pending, 90, 0, 6}, x, level, scratch, nullptr));
  check(apply_chunk(systems, upload(row_offsets), {0, 135, 0, 3, 0, 6}, 90, x, Y, pending, nullptr));
  const auto solution = download(x, 270);
  expect(p.residual(0, solution) < 1e-4, "residual", p.residual(0, solution));
  const auto gained = download(Y, weight.size()), left = download(pending, weight.size());
  for (int c = 0; c < 90; ++c) {
    double y[3] = {};
    for (int i = 0; i < 135; ++i) y[p.rows[i]] += double(solution[i]) * p.A[p.columns[i] * 90 + c];
    for (int r = 0; r < 6; ++r) {
      const double expected = r < 3 ? y[r] : 0.0;
      expect(std::abs(gained[r * 90 + c] - expected) < 1e-3, "Y", gained[r * 90 + c] - expected);
      if (r < 2) continue;
      double rest = weight[r * 90 + c];
      for (int q = 0; q < 3; ++q) rest -= p.G[r * 6 + q] * y[q];
      expect(std::abs(left[r * 90 + c] - rest) < 1e-3, "pending", left[r * 90 + c] - rest);
    }
  }
}

}  // namespace

int main() {
  solve({1, 31, 64, 0, 33, 65, 100, 129, 200, 256, 257, 300, 450}, false);
  solve({1, 40, 100, 300}, true);
  apply();
  std::puts("0 wrong");
}
