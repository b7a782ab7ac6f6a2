// wgmma.sp with A in registers, for 8 to 256 columns of B. The PTX ISA ("wgmma.mma_async.sp", matrix shape .m64nNk32)
// wants every register of the sum by name, so the lists of operands are generated: n / 2 floats, then the four
// registers of A, the descriptor of B, the metadata, the sparsity selector.
#pragma once

#include "linear_2_4_ptx.cuh"

namespace surgeon {

#define SURGEON_1_TO_3(F) F(1) F(2) F(3)
#define SURGEON_1_TO_7(F) SURGEON_1_TO_3(F) F(4) F(5) F(6) F(7)
#define SURGEON_1_TO_9(F) SURGEON_1_TO_7(F) F(8) F(9)
#define SURGEON_TEN(F, T) F(T##0) F(T##1) F(T##2) F(T##3) F(T##4) F(T##5) F(T##6) F(T##7) F(T##8) F(T##9)
#define SURGEON_1_TO_15(F) SURGEON_1_TO_9(F) F(10) F(11) F(12) F(13) F(14) F(15)
#define SURGEON_1_TO_29(F) SURGEON_1_TO_9(F) SURGEON_TEN(F, 1) SURGEON_TEN(F, 2)
#define SURGEON_1_TO_31(F) SURGEON_1_TO_29(F) F(30) F(31)
#define SURGEON_1_TO_39(F) SURGEON_1_TO_29(F) SURGEON_TEN(F, 3)
#define SURGEON_1_TO_47(F) SURGEON_1_TO_39(F) F(40) F(41) F(42) F(43) F(44) F(45) F(46) F(47)
#define SURGEON_1_TO_59(F) SURGEON_1_TO_39(F) SURGEON_TEN(F, 4) SURGEON_TEN(F, 5)
#define SURGEON_1_TO_63(F) SURGEON_1_TO_59(F) F(60) F(61) F(62) F(63)
#define SURGEON_1_TO_79(F) SURGEON_1_TO_59(F) SURGEON_TEN(F, 6) SURGEON_TEN(F, 7)
#define SURGEON_1_TO_89(F) SURGEON_1_TO_79(F) SURGEON_TEN(F, 8)
#define SURGEON_1_TO_95(F) SURGEON_1_TO_89(F) F(90) F(91) F(92) F(93) F(94) F(95)
#define SURGEON_1_TO_109(F) SURGEON_1_TO_89(F) SURGEON_TEN(F, 9) SURGEON_TEN(F, 10)
#define SURGEON_1_TO_111(F) SURGEON_1_TO_109(F) F(110) F(111)
#define SURGEON_1_TO_119(F) SURGEON_1_TO_109(F) SURGEON_TEN(F, 11)
#define SURGEON_1_TO_127(F) SURGEON_1_TO_119(F) F(120) F(121) F(122) F(123) F(124) F(125) F(126) F(127)

#define SURGEON_NAME(I) ", %" #I
#define SURGEON_OPERAND(I) , "+f"(d[I])
#define SURGEON_WGMMA_SP_OF(TYPE, N, LAST, A_TO_SELECTOR)                                   \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE           \
               " {%0" SURGEON_1_TO_##LAST(SURGEON_NAME) "}, " A_TO_SELECTOR ", 1, 1, 1, 0;" \
               : "+f"(d[0])SURGEON_1_TO_##LAST(SURGEON_OPERAND)                             \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(metadata), "n"(kSelector))

// d[64 x N] += A[64 x 32, 2:4] B[32 x N], A in registers as mma.sp takes it; a thread holds d[0 .. LAST].
#define SURGEON_WGMMA_SP(N, LAST, A_TO_SELECTOR)                                                         \
  template <class T, int kSelector>                                                                      \
  __device__ inline void wgmma_sp(float (&d)[LAST + 1], const uint4& a, uint64_t b, uint32_t metadata) { \
    if constexpr (std::is_same_v<T, __half>)                                                             \
      SURGEON_WGMMA_SP_OF("f16", N, LAST, A_TO_SELECTOR);                                                \
    else                                                                                                 \
      SURGEON_WGMMA_SP_OF("bf16", N, LAST, A_TO_SELECTOR);                                               \
  }

SURGEON_WGMMA_SP(8, 3, "{%4, %5, %6, %7}, %8, %9, %10")
SURGEON_WGMMA_SP(16, 7, "{%8, %9, %10, %11}, %12, %13, %14")
SURGEON_WGMMA_SP(32, 15, "{%16, %17, %18, %19}, %20, %21, %22")
SURGEON_WGMMA_SP(64, 31, "{%32, %33, %34, %35}, %36, %37, %38")
SURGEON_WGMMA_SP(96, 47, "{%48, %49, %50, %51}, %52, %53, %54")
SURGEON_WGMMA_SP(128, 63, "{%64, %65, %66, %67}, %68, %69, %70")
SURGEON_WGMMA_SP(160, 79, "{%80, %81, %82, %83}, %84, %85, %86")
SURGEON_WGMMA_SP(192, 95, "{%96, %97, %98, %99}, %100, %101, %102")
SURGEON_WGMMA_SP(224, 111, "{%112, %113, %114, %115}, %116, %117, %118")
SURGEON_WGMMA_SP(256, 127, "{%128, %129, %130, %131}, %132, %133, %134")

#undef SURGEON_WGMMA_SP
#undef SURGEON_WGMMA_SP_OF
#undef SURGEON_OPERAND
#undef SURGEON_NAME
#undef SURGEON_1_TO_127
#undef SURGEON_1_TO_119
#undef SURGEON_1_TO_111
#undef SURGEON_1_TO_109
#undef SURGEON_1_TO_95
#undef SURGEON_1_TO_89
#undef SURGEON_1_TO_79
#undef SURGEON_1_TO_63
#undef SURGEON_1_TO_59
#undef SURGEON_1_TO_47
#undef SURGEON_1_TO_39
#undef SURGEON_1_TO_31
#undef SURGEON_1_TO_29
#undef SURGEON_1_TO_15
#undef SURGEON_TEN
#undef SURGEON_1_TO_9
#undef SURGEON_1_TO_7
#undef SURGEON_1_TO_3

}  // namespace surgeon
