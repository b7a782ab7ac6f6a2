// Plans that csrc/sparse24/linear_2_4_cusparselt.cpp makes and keeps, with a CUDA runtime and a library that are only
// pretended (linear_2_4_plans_library.cpp). Exits with 1 at the first wrong answer.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "sparse24/linear_2_4_cusparselt.h"

using namespace surgeon;

extern "C" {
extern int plans, matrices;

bool capturing = false;
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
}

namespace {

void require(bool condition, const char* what, int value = 0) {
  if (!condition) std::printf("%s (%d)\n", what, value), std::exit(1);
}

std::shared_ptr<CusparseltPlan> plan_of(int rows, bool in_capture, int algorithm = 0) {
  std::shared_ptr<CusparseltPlan> plan;
  size_t workspace = 0;
  capturing = in_capture;
  require(cusparselt_plan({1024, rows, 1024, false}, algorithm, nullptr, &plan, &workspace) == nullptr, "an error");
  require(workspace == (plan == nullptr ? 0 : 256), "another workspace");
  return plan;
}

}  // namespace

int main() {
  const int rounded[][2] = {{0, 0}, {7, 0}, {8, 8}, {100, 96}, {1024, 1024}, {1029, 1024}, {3000, 2816}, {4096, 4096}};
  for (const auto& [tokens, of_plan] : rounded)
    require(cusparselt_tokens(tokens) == of_plan, "tokens rounded otherwise", tokens);
  int sizes = 0;
  for (int tokens = 1024, before = 0; tokens <= 65536; ++tokens) {
    const int of_plan = cusparselt_tokens(tokens);
    require(of_plan % 8 == 0 && of_plan <= tokens && tokens - of_plan <= tokens / 8, "too few by a plan", tokens);
    sizes += of_plan != before;
    before = of_plan;
  }
  require(sizes == 49, "plans for all numbers of tokens", sizes);

  require(plan_of(16, true) == nullptr && plans == 0 && matrices == 0, "a plan made in a capture");
  const CusparseltPlan* first = plan_of(16, false).get();
  require(plans == 1 && plan_of(16, false).get() == first && plans == 1, "a plan made twice");
  require(plan_of(16, true).get() == first && plans == 1, "a plan that a capture does not find");
  require(plan_of(16, false, 99) == nullptr && plans == 1, "an algorithm that does not exist");

  auto held = plan_of(32, false);
  for (int i = 0; i < kMostPlans + 300; ++i) plan_of(16 * (i + 3), false);
  require(plans == kMostPlans + 2, "plans kept: the last, the one captured and the one in use", plans);
  require(matrices == 3 * plans, "matrices described", matrices);
  held.reset();
  require(plans == kMostPlans + 1, "a plan kept that was given up", plans);
  require(plan_of(16, true).get() == first, "a plan gone that a graph may need");
  require(plan_of(32, true) == nullptr && plan_of(48, true) == nullptr, "the oldest is kept");
  require(plan_of(16 * (kMostPlans + 302), true) != nullptr, "the newest is gone");
  std::printf("0 wrong\n");
}
