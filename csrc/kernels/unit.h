// The unit that is being compiled. Every kernel header includes this first.
//
// A unit is all kernels compiled for one instruction set, in the namespace icae_fast::ICAE_UNIT. A unit_*.cpp
// includes prelude.h, switches the compiler to its instruction set, defines the macros below, and includes
// unit_table.h:
//
//     ICAE_ISA                  name of the unit
//     ICAE_VECTOR_BYTES         width of its vectors
//     ICAE_AVX2, ICAE_AVX512    which intrinsics there are; at most one is defined
//     ICAE_BF16_PAIRS           large bf16 products use `vdpbf16ps`
//     ICAE_AMX                  large bf16 products use AMX tiles (tiles.h)
//     ICAE_FP16                 values times softmax weights are summed in fp16 (attention/half_values.h)
//     ICAE_PREFETCH_EVERY_LINE  how weights of a token step are prefetched (decode/streamed_product.h)
//
// A header that is parsed by itself, in an editor or by check_headers.py, belongs to the scalar unit.
#pragma once

#include "kernels/prelude.h"  // IWYU pragma: export

#if !defined(ICAE_ISA)
#define ICAE_ISA scalar
#define ICAE_VECTOR_BYTES 16
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed only between functions of one unit, which are all compiled for the same instruction set.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define ICAE_PASTE2(a, b) a##b
#define ICAE_PASTE(a, b) ICAE_PASTE2(a, b)
#define ICAE_TEXT2(a) #a
#define ICAE_TEXT(a) ICAE_TEXT2(a)

#define ICAE_UNIT ICAE_PASTE(unit_, ICAE_ISA)

#define ICAE_FORCED inline __attribute__((always_inline))
#define ICAE_INLINE static ICAE_FORCED
