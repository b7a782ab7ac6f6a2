// Shared memory of the 2:4 linear for many tokens on Hopper.
#pragma once

#include "linear_2_4.h"

namespace surgeon {

// Config names, all int:
//   kTokens        of a tile: the n of wgmma
//   kConsumers     warpgroups that multiply, 64 rows of the tile each
//   kStages        of x
//   kBoxes         TMA boxes of 64 columns in a stage of x
//   kWeightStages  of W, for every consumer warp
//   kBlocks        resident on a multiprocessor
//   kSharers       blocks of a cluster, with the same tokens and the next rows, that read x from memory once
//
//   0         weight stages [kWeightStages][4 kConsumers warps][unit]
//   kXAt      stages of x [kStages][kBoxes][kTokens][64 columns], 128-byte swizzle
//   kXEnd     32 tokens of y of every consumer, on their way out
//   kBiasAt   bias [kRows]; then the barriers of x, of W, and of the sums that a cluster exchanges
//
// Sums that do not leave directly lie in place of the stages.
template <int kTokens_, int kConsumers_, int kStages_, int kBoxes_, int kWeightStages_, int kBlocks_ = 1,
          int kSharers_ = 1>
struct WgmmaConfig {
  static constexpr int kTokens = kTokens_, kConsumers = kConsumers_, kStages = kStages_, kBoxes = kBoxes_;
  static constexpr int kWeightStages = kWeightStages_, kBlocks = kBlocks_, kSharers = kSharers_;
};

template <class Config>
struct WgmmaTile {
  static constexpr int kThreads = 128 * Config::kConsumers;  // of the consumers; a warpgroup more is the producer
  static constexpr int kBlockThreads = kThreads + 128;
  static constexpr int kRows = 64 * Config::kConsumers;
  static constexpr int kTokens = Config::kTokens;
  static constexpr int kWeightStageBytes = 4 * Config::kConsumers * kUnitBytes;
  static constexpr int kStageBytes = kTokens * Config::kBoxes * 128;
  static constexpr int kXAt = Config::kWeightStages * kWeightStageBytes;
  static constexpr int kXEnd = kXAt + Config::kStages * kStageBytes;
  static constexpr int kOutPitch = 64 + 8;  // of a token of a consumer's rows of y, in elements
  static constexpr bool kPersistent = kTokens % 32 == 0;
  static constexpr int kOutBytes = kPersistent ? Config::kConsumers * 32 * kOutPitch * 2 : 0;
  static constexpr int kSumPitch = kRows + 4;  // of a token's sums
  static constexpr int kSumBytes = kTokens * kSumPitch * 4;
  static constexpr int kOctetBytes = kThreads * 16;  // of the sums of eight tokens, as the threads hold them
  static constexpr int kBiasAt = kXEnd + kOutBytes > kSumBytes ? kXEnd + kOutBytes : kSumBytes;
  static constexpr int kBarriersAt = kBiasAt + kRows * 4;
  static constexpr int kWeightBarriersAt = kBarriersAt + 16 * Config::kStages;
  static constexpr int kReceivedAt = kWeightBarriersAt + 32 * Config::kConsumers * Config::kWeightStages;
  static constexpr int kSharedBytes = 1024 + kReceivedAt + 16;  // the stages begin at a multiple of 1024

  // The exchange of sums between split-K blocks leaves the last stage of x alone, which is read until the end.
  static constexpr bool has_room_for_exchange() {
    for (int split = 2; split <= 8 / Config::kSharers; ++split) {
      const int each = (kTokens / 8 + split - 1) / split, received = (split - 1) * each * kOctetBytes;
      if (received > kXEnd - kStageBytes || received + 8 * each * kSumPitch * 4 > kBiasAt) return false;
    }
    return true;
  }

  static_assert(kTokens % 8 == 0 && kTokens <= 256, "wgmma_sp has no such n, or the epilogue no such tile");
  static_assert(Config::kConsumers >= 1 && Config::kConsumers <= 3, "warpgroups of one block");
  static_assert(Config::kBoxes == 1 || Config::kBoxes == 2, "a unit of W is two boxes of x wide");
  static_assert(Config::kStages >= 2 && Config::kWeightStages >= 2, "a stage is filled while another is read");
  static_assert(kXAt % 1024 == 0 && kStageBytes % 1024 == 0, "swizzled boxes begin at multiples of 1024 bytes");
  static_assert(has_room_for_exchange(), "no room for the sums that the blocks of a cluster send each other");
  static_assert(Config::kBlocks * (kSharedBytes + 1024) <= 233472, "a multiprocessor has no more shared memory");
  static_assert(Config::kSharers == 1 || kTokens % (8 * Config::kSharers) == 0, "parts of swizzled boxes");
};

}  // namespace surgeon
