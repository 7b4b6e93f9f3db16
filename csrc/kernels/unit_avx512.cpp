// For CPUs with AVX512-BF16 and VBMI.
#include "kernels/prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#endif
#define ICAE_TARGET_SWITCHED

#define ICAE_ISA avx512
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_BF16_PAIRS
#include "kernels/unit_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
