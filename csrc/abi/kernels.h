// TABLE
#pragma once

#include <cstdint>

#include "abi/attention.h"
#include "abi/decode.h"
#include "abi/gemm.h"
#include "abi/heads.h"
#include "abi/numbers.h"
#include "abi/rows.h"
#include "abi/tiles.h"

// AVX512-FP16 needs GCC 12 or Clang 16. Clang 14 and 15 have the header, but it declares nothing in a function with
// `target("avx512fp16")` unless the whole file is compiled for AVX512-FP16.
#if defined(__x86_64__) && __has_include(<avx512fp16intrin.h>) && (!defined(__clang__) || __clang_major__ >= 16)
#define ICAE_BUILDS_FP16
#endif

namespace icae_fast {

struct Kernels {
  const char* isa;
  AttentionKernels attention[3];  // by Dtype
  HeadsKernels heads[3];
  RowsKernels rows[3];
  DecodeKernels decode[3];
  GemmKernels gemm;  // of bf16; null in a unit that has none
  // Multiplies as the unit does in bf16, in registers alone, and says how many products that were: tells which of
  // two units is faster. Null where nobody asks.
  int64_t (*bf16_products)();
};

const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
#if defined(ICAE_BUILDS_FP16)
const Kernels& kernels_avx512_fp16();
#endif
const Kernels& kernels_avx512();
const Kernels& kernels_amx();
#endif

}  // namespace icae_fast
