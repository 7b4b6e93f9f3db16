// The table of function pointers through which ops call the kernels of a unit: plain structs of pointers and
// strides, compiled for the default instruction set. So their inline functions are the same in every unit that
// includes them.
//
// To add kernels, write the header of their structs in this folder, a member of `Kernels`, and its row in
// kernels/unit_table.h.
#pragma once

#include <cstdint>

#include "abi/attention.h"  // IWYU pragma: export
#include "abi/decode.h"     // IWYU pragma: export
#include "abi/gemm.h"       // IWYU pragma: export
#include "abi/heads.h"      // IWYU pragma: export
#include "abi/numbers.h"    // IWYU pragma: export
#include "abi/rows.h"       // IWYU pragma: export
#include "abi/tiles.h"      // IWYU pragma: export

// AVX512-FP16 needs GCC 12 or Clang 16. Before Clang 16 <immintrin.h> declares it only in files that are compiled
// for it as a whole.
#if defined(__x86_64__) && __has_include(<avx512fp16intrin.h>) && (!defined(__clang__) || __clang_major__ >= 16)
#define ICAE_BUILDS_FP16
#endif

namespace icae_fast {

struct Kernels {
  const char* isa;
  AttentionKernels attention[3];  // arrays of three are indexed by Dtype
  HeadsKernels heads[3];
  RowsKernels rows[3];
  DecodeKernels decode[3];
  GemmKernels gemm;  // bf16; null in a unit without a GEMM
  // Multiply in registers as the unit does for bf16, and return the number of products. Tells which of two units is
  // faster; null in units that are not compared.
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
