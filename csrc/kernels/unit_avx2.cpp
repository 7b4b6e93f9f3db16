// For x86 CPUs with AVX2 that lack AVX512-BF16 or VBMI.
#include "kernels/prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ICAE_TARGET_SWITCHED

#define ICAE_ISA avx2
#define ICAE_VECTOR_BYTES 32
#define ICAE_AVX2
#include "kernels/unit_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
