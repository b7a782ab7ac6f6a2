// Times that choose a kernel for a 2:4 linear, fitted to those measured on an H200.
#pragma once

#include "linear_2_4.h"

namespace surgeon {

// Nanoseconds: of a unit of K of a tile, of the prologue and epilogue of a tile, of adding up the sums of a cluster.
// All 0: a kernel that is not chosen, for want of times or because others serve as well.
struct Times24 {
  float unit, tile, cluster;
};

// What follows is written by
//   python -m bench.kernels.linear_2_4_fit --write
// clang-format off
// Fitted by hand, before the other kernels were there. Of the times in bench/results/linear_2_4_kernels.csv they choose
// kernels 1.1% slower than the fastest (mean; 21% worst).
constexpr Times24 kTimes[kKernelCount] = {
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {510, 1700, 2500},
    {395, 1700, 3500},
    {535, 1700, 4000},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {565, 1700, 3500},
    {790, 1700, 4600},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {920, 1700, 7000},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
    {0, 0, 0},
};
constexpr float kLaunchTime = 2700;  // of a second launch
constexpr int kFewTokens = 16;       // up to so many choose by a rule, not by time
// clang-format on

}  // namespace surgeon
